"""Recipes as files: the YAML that people write, keys that are none, what is written over them."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from nextflow_hf.hub_cards import emoji_model_path, shapes_model_path
from nextflow_hf.training.common import run
from nextflow_hf.training.common.recipe import Recipe, load_recipe, load_yaml, override, parse_recipe, read_recipe
from nextflow_hf.training.transformer.arguments import NextFlowTrainingArguments


@dataclass
class Group:
    rate: float = 0.5
    name: str | None = None
    is_on: bool = False
    numbers: list[int] = field(default_factory=list)
    fields: dict | None = None
    steps: int = 1
    shares: list[float] | None = None


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
    (group,) = parse_recipe(recipe, [Group])
    assert group == Group(1e-4, "no", True, [1, 2], {"a": {"b": 0.2}})
    for assignment in ("fields.a.c=3e-1", "rate=2e-2", "numbers=[3]"):
        override(recipe, assignment)
    (group,) = parse_recipe(recipe, [Group])
    assert group == Group(2e-2, "no", True, [3], {"a": {"b": 0.2, "c": 0.3}})


def test_strategies_may_be_no(tmp_path):
    recipe = {"output_dir": str(tmp_path), "use_cpu": True}
    for assignment in ("eval_strategy=no", "save_strategy=no", "report_to=none"):
        override(recipe, assignment)
    (args,) = parse_recipe(recipe, [TrainingArguments])
    assert args.eval_strategy == "no" and args.save_strategy == "no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: [0.1]", r"rate is \[0.1\], expected float"),
        ("rate: fast", "rate is 'fast', expected float"),
        ("rate: true", "rate is True, expected float"),
        ("rate: null", "rate is None, expected float"),
        ("name: 3", "name is 3, expected str | None"),
        ("numbers: 3", r"numbers is 3, expected list\[int\]"),
        ("numbers: [1.5]", r"numbers is \[1.5\], expected list\[int\]"),
        ("fields: [a]", r"fields is \['a'\], expected dict | None"),
        ("is_on: maybe", "is_on is 'maybe', expected bool"),
        ("steps: 2.5", "steps is 2.5, expected int"),
        ("lr_scheduler_type: sloping", "lr_scheduler_type is 'sloping', expected one of .*'cosine'"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size is 0, expected at least 1"),
        ("max_steps: -3", "max_steps is -3, expected at least 1"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor is 0.1, which is not supported"),
        ("label_smoothing_factor: [0.1]", r"label_smoothing_factor is \[0.1\], expected float"),
        ("1: a", "the key 1 in line 1 is int, expected a word"),
        ("fields:\n  no: 1\n  2.5: 1", "the key 2.5 in line 3 is float"),
        ("rate: [1", r"this is no YAML: while parsing a flow sequence.*line 1"),
        ("rate: 1\n  b: 2", r"this is no YAML: mapping values are not allowed.*line 2"),
        ("raet: 1", r"raet is unknown, near ones that exist: \['rate'"),
        ("raet: 1\nrate: [1]\nsteps: no", r"raet is unknown, .*mine.yaml: rate is \[1\], .*mine.yaml: steps is 'no'"),
    ],
)
def test_file_and_key_are_named_in_one_line(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path}:? .*{message}") as error:
        recipe = Recipe({"output_dir": str(tmp_path), "use_cpu": True, **read_recipe(path)}, path)
        parse_recipe(recipe, [Group, NextFlowTrainingArguments])
    assert "\n" not in str(error.value)


def test_numbers_may_be_written_as_people_do(tmp_path):
    recipe = load_yaml("{rate: 1, steps: 1e3, numbers: [1, 2], shares: [1, 0.5], fields: {a: 1}}")
    (group,) = parse_recipe(recipe, [Group])
    assert (group.rate, group.steps, group.shares) == (1, 1000, [1, 0.5]) and type(group.steps) is int


@dataclass
class Placed:
    output_dir: str = ""
    model: str | None = None
    vision_tokenizer_name_or_path: str | None = None
    train_codes: list[str] = field(default_factory=list)


def test_home_and_shipped_models_are_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = {"output_dir": "~/runs/mine", "train_codes": ["~/codes", "codes"], "model": "nextflow-shapes"}
    recipe["vision_tokenizer_name_or_path"] = "nextflow-emoji"
    (group,) = parse_recipe(recipe, [Placed])
    models = [str(shapes_model_path()), str(emoji_model_path())]
    assert group == Placed(f"{tmp_path}/runs/mine", *models, [f"{tmp_path}/codes", "codes"])
    (group,) = parse_recipe({"output_dir": "nextflow-shapes"}, [Placed])
    assert group.output_dir == "nextflow-shapes"  # of one's own


def test_a_word_for_a_list_is_shown_in_brackets():
    with pytest.raises(ValueError, match=r"train_codes is 'codes', expected list\[str\], such as \[codes\]"):
        parse_recipe({"train_codes": "codes"}, [Placed])


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "get_available_reporting_integrations", lambda: ["tensorboard"])
    recipe = Recipe({"output_dir": str(tmp_path), "report_to": "wandb"}, "mine.yaml")
    with pytest.raises(ImportError, match=r"mine.yaml: report_to has \['wandb'\], not installed: .* report_to: none"):
        run.resolve(recipe, [TrainingArguments])
    run.resolve({**recipe, "report_to": "tensorboard"}, [TrainingArguments])


@dataclass
class Needed:
    name: str
    paths: list[str]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match="the recipe: name, paths must be set: write it there, or name=... paths=..."):
        parse_recipe({}, [Needed])
    with pytest.raises(ValueError, match="expected key=value"):
        override({}, "max_steps")
    with pytest.raises(ValueError, match=r"a=\[1: this is no YAML"):
        override({}, "a=[1")
    with pytest.raises(ValueError, match="optim is 'sgd', expected a mapping"):
        override({"optim": "sgd"}, "optim.name=1")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="holds list, expected a mapping"):
        read_recipe(tmp_path / "list.yaml")


def test_a_base_is_inherited_key_by_key(tmp_path):
    (tmp_path / "base.yaml").write_text("rate: 0.1\nname: a\nfields: {a: {b: 1, c: 2}}\nnumbers: [1, 2]\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nname: null\nfields: {a: {c: 3}}\nnumbers: [3]\n")
    recipe = load_recipe("transformer", tmp_path / "mine.yaml", ["fields.a.d=4"])
    assert recipe == {"rate": 0.1, "name": None, "fields": {"a": {"b": 1, "c": 3, "d": 4}}, "numbers": [3]}
    (tmp_path / "shipped.yaml").write_text("base: sft_1024\nseed: 7\n")
    assert load_recipe("transformer", tmp_path / "shipped.yaml") == {
        **load_recipe("transformer", "sft_1024"),
        "seed": 7,
    }
    (tmp_path / "base.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(ValueError, match="base leads back"):
        load_recipe("transformer", tmp_path / "mine.yaml")


def test_a_near_name_of_a_shipped_recipe_is_said():
    with pytest.raises(
        FileNotFoundError, match=r"no recipe of transformer, expected a file or one of \['alignment'\]"
    ):
        load_recipe("transformer", "aligment")


@pytest.mark.parametrize("text", ["rate: 1\nname: a\nrate: 2\n", "fields:\n  a: 1\n  b: 2\n  a: 3\n", "{a: 1, a: 2}"])
def test_a_key_that_is_there_twice_is_refused(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe.yaml: '(rate|a)' is there twice, in lines \d and \d: keep one"):
        read_recipe(path)
