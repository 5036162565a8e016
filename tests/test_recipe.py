"""Recipes as files: the YAML that people write, keys that are none, what is written over them."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from nextflow_hf.training.recipe import load_yaml, override, parse_recipe, read_recipe


@dataclass
class Group:
    rate: float = 0.5
    name: str | None = None
    is_on: bool = False
    numbers: list[int] = field(default_factory=list)
    fields: dict | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("off", "off"), ("Yes", "Yes"), ("true", True), ("False", False), ("truely", "truely"),
        ("1e-4", 1e-4), ("1E3", 1e3), ("-.5", -0.5), ("3.", 3.0), ("1.5e+2", 150.0), ("7", 7), ("1e", "1e"),
        ("1.0.0", "1.0.0"), (".inf", float("inf")), ("null", None), ("~", None), ("'no'", "no"), ("'1e-4'", "1e-4"),
        ("[1e-4, no]", [1e-4, "no"]), ("{a: 1e-4}", {"a": 1e-4}), ("runs/2e5", "runs/2e5"),
    ],
)  # fmt: skip
def test_words_are_words_and_numbers_numbers(text, value):
    found = load_yaml(text)
    assert found == value and type(found) is type(value)


def test_a_recipe_is_arguments(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("rate: 1e-4\nname: no\nis_on: yes\nnumbers: [1, 2]\nfields: {a: {b: 2e-1}}\n")
    recipe = read_recipe(path)
    (group,) = parse_recipe(recipe, [Group], prog="x")
    assert group == Group(1e-4, "no", True, [1, 2], {"a": {"b": 0.2}})
    for assignment in ("fields.a.c=3e-1", "rate=2e-2", "numbers=[3]"):
        override(recipe, assignment)
    (group,) = parse_recipe(recipe, [Group], prog="x", rest=["--rate", "3e-2"])
    assert group == Group(3e-2, "no", True, [3], {"a": {"b": 0.2, "c": 0.3}})


def test_strategies_may_be_no(tmp_path):
    recipe = {"output_dir": str(tmp_path), "use_cpu": True}
    for assignment in ("eval_strategy=no", "save_strategy=no", "report_to=none", "resume_from_checkpoint=false"):
        override(recipe, assignment)
    (args,) = parse_recipe(recipe, [TrainingArguments], prog="x")
    assert args.eval_strategy == "no" and args.save_strategy == "no"


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown keys.*'raet': \['rate'\]"):
        parse_recipe({"raet": 1}, [Group], prog="x")
    with pytest.raises(ValueError, match="name is missing, expected a name"):
        parse_recipe({}, [Group], prog="x", needed={"name": "a name"})
    assert parse_recipe({}, [Group], prog="x", needed={"name": "a name"}, rest=["--name", "it"])[0].name == "it"
    with pytest.raises(ValueError, match="expected key=value"):
        override({}, "max_steps")
    with pytest.raises(ValueError, match="optim is 'sgd', expected a mapping"):
        override({"optim": "sgd"}, "optim.name=1")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="holds list, expected a mapping"):
        read_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize("text", ["rate: 1\nname: a\nrate: 2\n", "fields:\n  a: 1\n  b: 2\n  a: 3\n", "{a: 1, a: 2}"])
def test_a_key_that_is_there_twice_is_refused(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe.yaml: '(rate|a)' is there twice, in lines \d and \d: keep one"):
        read_recipe(path)
