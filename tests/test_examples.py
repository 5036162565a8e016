"""The Makefiles of examples/: one public command a stage, a mark when it has ended well, and nothing done twice."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toy import SQUARE
from toy_codes import extract_toy_codes
from toy_pipeline import toy_pipeline, toy_processor, toy_vision_tokenizer

from nextflow_hf.commands.export import CARD_KEYS
from nextflow_hf.commands.train import KINDS
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM, NextFlowModel
from nextflow_hf.training.common.recipe import load_recipe
from nextflow_hf.training.common.run import resolve
from nextflow_hf.training.data.shards import load_codes


EXAMPLES = Path(__file__).parents[1] / "examples"
ABLATIONS = EXAMPLES / "ablations"
WORLDS = ("shapes", "emoji")
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(tmp_path: Path, example: str, *arguments: str, nextflow: str = "true") -> subprocess.CompletedProcess:
    folders = [f"DATA={tmp_path / 'data'}", f"RUN={tmp_path / 'run'}", f"NEXTFLOW={nextflow}"]
    command = ["make", "-C", EXAMPLES / example, *folders, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def commands(output: str) -> list[str]:
    return re.findall(r"^STAGE (\S+ \S+)", output, flags=re.MULTILINE)


@pytest.mark.parametrize("size", ["tiny", "full"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_stage_is_one_command_and_is_done_once(tmp_path, world, size):
    planned = commands(make(tmp_path, world, "-n", f"SIZE={size}", "all", nextflow="STAGE").stdout)
    assert planned[:3] == [f"world {world}", "train text_tokenizer", "train teacher"]
    assert planned.index("train tokenizer") < planned.index("train transformer") < planned.index("train grpo")
    assert make(tmp_path, world, f"SIZE={size}", "all").returncode == 0
    assert commands(make(tmp_path, world, "-n", f"SIZE={size}", "all", nextflow="STAGE").stdout) == []
    (tmp_path / "run" / "done" / "transformer_mixture").unlink()
    left = commands(make(tmp_path, world, "-n", "model", nextflow="STAGE").stdout)
    assert list(dict.fromkeys(command.split()[0] for command in left)) == ["train", "export", "evaluate"]


def test_what_ships_is_what_was_evaluated(tmp_path):
    """The evaluated folder gets its demo and its card, and is copied as it is."""
    options = ["LAST=transformer", "RESOLUTION=64", "SHOWN=text_to_image", f"SHIPPED={tmp_path / 'shipped'}"]
    plan = make(tmp_path, "emoji", "-n", *options, "ship", nextflow="STAGE").stdout.replace("\\\n", "")
    planned = [line for line in plan.splitlines() if line.startswith("STAGE")]
    model = str(tmp_path / "run" / "nextflow-emoji")
    export = next(line for line in planned if line.startswith("STAGE export"))
    assert f"export {tmp_path / 'run' / 'transformer'} --output {model} " in export
    assert "--card card.yaml" in export and "resolution=64" in export and "train transformer " in plan
    assert commands("\n".join(planned[-3:])) == ["world emoji", "evaluate card", "demo --model"]
    assert all(model in line for line in planned[planned.index(export) + 1 :] if "--judge" not in line)
    assert "--resolution 64 --tasks text_to_image" in planned[-3] and "update=true" in planned[-2]
    assert f"\ncp -r {model} {tmp_path / 'shipped'}\n" in plan
    texts = yaml.safe_load((EXAMPLES / "emoji" / "card.yaml").read_text())
    assert {*texts} <= {*CARD_KEYS} and "Mozilla" in texts["credits"] and "concepts.txt" in texts["limits"]


@pytest.mark.parametrize("example", [*WORLDS, "ablations"])
def test_a_stage_that_fails_leaves_no_mark(tmp_path, example):
    targets = ["planted"] if example == "ablations" else []
    assert make(tmp_path, example, *targets, nextflow="false").returncode != 0
    assert not list(tmp_path.rglob("done/*"))


@pytest.mark.parametrize("example", [*WORLDS, "ablations"])
def test_recipes_are_those_that_the_makefile_names(example):
    named = set(re.findall(r"\$\(RECIPES\)/(\w+)\.yaml", (EXAMPLES / example / "Makefile").read_text()))
    paths = list((EXAMPLES / example / "recipes").glob("*.yaml"))
    assert named == {path.stem for path in paths}
    for path in paths:
        recipe = yaml.safe_load(path.read_text())
        assert "base" in recipe or recipe["output_dir"].startswith(f"runs/{example}/")


@pytest.mark.parametrize("size", ["tiny", "full"])
@pytest.mark.parametrize("example", [*WORLDS, "ablations"])
def test_every_training_understands_its_keys(tmp_path, monkeypatch, example, size):
    is_world = example in WORLDS
    targets = ["all"] if is_world else ["SEEDS=0", *make(tmp_path, example, "-s", "list").stdout.split()]
    plan = make(tmp_path, example, "-n", f"SIZE={size}", *targets, nextflow="STAGE").stdout.replace("\\\n", "")
    trainings = [shlex.split(line)[2:] for line in plan.splitlines() if line.startswith("STAGE train ")]
    monkeypatch.chdir(EXAMPLES / example)
    for kind, path, *assignments in trainings:
        module = importlib.import_module(f"nextflow_hf.training.{KINDS[kind][0]}")
        recipe, groups, _ = resolve(load_recipe(kind, path, assignments), module.GROUPS)
        assert recipe["output_dir"].startswith(str(tmp_path)) and len(groups) == len(module.GROUPS)
    assert {Path(path) for _, path, *_ in trainings} >= {*Path("recipes").glob("*.yaml")}


# ---- the ablations


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ABLATIONS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def accumulated():
    """The script that gives the transformer accumulated features, for the toy's square images."""
    module = load_script("accumulated")
    module.SIDES = tuple(height for height, _ in SQUARE)
    return module


def test_every_claim_has_a_target_and_every_arm_its_runs(tmp_path):
    claims = yaml.safe_load((ABLATIONS / "claims.yaml").read_text())
    names = make(tmp_path, "ablations", "-s", "list").stdout.split()
    assert names == list(claims["claims"]) and claims["planted"] in names
    planned = make(tmp_path, "ablations", "-n", "SEEDS=0 1", *names, nextflow="STAGE").stdout
    judged = {arm for name in names for arm in (claims["claims"][name]["better"], claims["claims"][name]["worse"])}
    evaluated = set(re.findall(r"evaluate emoji \S+/arms/(\w+)-1/pipeline", planned))
    assert evaluated == judged and planned.count("nextflow_hf.training.evaluation.comparison") == len(names)
    # Rows are extracted where they were composed, and images from words have one emoji.
    composed = dict(re.findall(r"world emoji .*--output-dir (\S+) .*--tasks (.*?) --rows", planned))
    assert composed[str(tmp_path / "data")] == "text_to_image --categories single"
    named = re.findall(r"path: (\S+)/64/train/(\w+)", planned)
    assert named and all(task in composed[folder].split() for folder, task in named)
    # Each arm is trained once a seed, whatever claims name it.
    trained = re.findall(r"train (?:transformer|grpo) .*output_dir=\S+/arms/(\S+)", planned)
    assert len(trained) == len(set(trained)) == 2 * len(judged)


def test_every_rollout_has_the_same_prompts(tmp_path):
    """Otherwise the reward's curve is that of the choice of prompts, and eight of them teach little."""
    planned = make(tmp_path, "ablations", "-n", "SEEDS=0", "grpo", nextflow="STAGE").stdout
    (rows,) = re.findall(r"world emoji .*--output-dir \S+/few .*--rows (\d+)", planned)
    assert set(re.findall(r"train grpo .* prompts=(\S+)", planned)) == {f"{tmp_path / 'data'}/few/64/prompts.yaml"}
    recipe, base = (
        yaml.safe_load((EXAMPLES / name / "recipes" / "grpo.yaml").read_text()) for name in ("ablations", "emoji")
    )
    assert recipe["per_device_train_batch_size"] == int(rows) * base["num_generations"]


def test_the_share_of_a_prefix_is_that_of_its_variance():
    share = load_script("prefix_share").share_between
    prefixes = np.array([[0.0, 1.0], [3.0, 4.0]])[..., None]  # of two prompts; between them does not count
    assert share(prefixes + np.zeros(4)) == 1
    assert share(np.broadcast_to([0.0, 1.0, 0.0, 1.0], (2, 2, 4))) == 0
    # Variances by hand: of suffixes 1/3, of prefixes 1/2 less the 1/3 / 4 that four suffixes leave in their means.
    assert share(prefixes + [0.0, 1.0, 0.0, 1.0]) == pytest.approx((1 / 2 - 1 / 12) / (1 / 2 - 1 / 12 + 1 / 3))


def test_accumulated_features_are_those_of_all_coarser_scales_in_training_and_in_sampling(accumulated, monkeypatch):
    model = toy_pipeline().transformer
    codes = torch.randint(24, (2, sum(height * width for height, width in SQUARE)))
    images = [(tuple(SQUARE), codes.shape[1])] * 2
    with torch.no_grad():
        residual = NextFlowModel._embed_cells(model.model, codes.flatten(), images).unflatten(0, (2, -1))
        found = accumulated.embed_cells(model.model, codes.flatten(), images).unflatten(0, (2, -1))
        first, second, third = 4, 9, 16
        torch.testing.assert_close(found[:, :first], residual[:, :first])  # of one coarser scale alone
        assert not torch.allclose(found[:, first : first + second], residual[:, first : first + second])
        seen = codes[:, : 1 + first + second]
        sampled = accumulated.embed_next_scale(model, seen, (3, 3), (4, 4), torch.zeros(2, 32))
        torch.testing.assert_close(sampled, found[:, -third:])


@pytest.mark.process
def test_a_tiny_arm_of_the_ablations(tmp_path):
    """A run of the planted fault, on codes of the toy: shuffled scale by scale, trained on, and marked."""
    run = tmp_path / "run"
    processor, vision_tokenizer = toy_processor(), toy_vision_tokenizer()
    for name in ("codes", "codes_eval"):
        extract_toy_codes(run / name, processor, vision_tokenizer, task="text_to_image", rows=12)
        (run / "done").mkdir(exist_ok=True)
        (run / "done" / name).touch()
    processor.save_pretrained(run / "processor")
    vision_tokenizer.save_pretrained(tmp_path / "tokenizer")
    targets = [f"{run / 'done' / name}" for name in ("train_shuffled-0",)]
    options = ["SIZE=tiny", "SEEDS=0", f"TOKENIZER={tmp_path / 'tokenizer'}", f"PYTHON={sys.executable}"]
    old = [argument for name in ("codes", "codes_eval") for argument in ("-o", f"{run / 'done' / name}")]
    nextflow = f"{sys.executable} -m nextflow_hf.cli"
    made = make(tmp_path, "ablations", *options, *old, *targets, nextflow=nextflow)
    assert made.returncode == 0, made.stderr[-2000:]
    rows, shuffled = (load_codes(run / name).with_format(None).to_list() for name in ("codes", "codes_shuffled"))
    changed = [old["image_codes"] != new["image_codes"] for old, new in zip(rows, shuffled, strict=True)]
    assert 0 < sum(changed) < len(changed)
    scales = np.cumsum([height * width for height, width in SQUARE])[:-1]
    for old, new in zip(rows, shuffled):
        for before, after in zip(np.split(old["image_codes"], scales), np.split(new["image_codes"], scales)):
            assert sorted(before) == sorted(after)
    log = json.loads((run / "arms" / "shuffled-0" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss_scale_4" in entry for entry in log) and (targets[0] and Path(targets[0]).exists())
    assert NextFlowForCausalLM.from_pretrained(run / "arms" / "shuffled-0").config.codebook_size == 24
