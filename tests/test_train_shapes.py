"""The whole training of the small model in miniature: every stage runs, is skipped when finished, and ends in a
repository that draws."""

import itertools
import json
import os

import pytest
import torch
from accelerate import PartialState
from processes import in_processes
from safetensors.torch import load_file

from nextflow_hf import NextFlowPipeline
from nextflow_hf.training import train_shapes, train_shapes_decoder


def measured_precision() -> bool:
    """Of a process whose own clock says that bf16 is slower if it is the first, and faster if not."""
    slower = os.environ["RANK"] == "0"
    seconds = itertools.cycle([0, 1, 0, 2] if slower else [0, 2, 0, 1])  # start and end of fp32, then of bf16
    train_shapes.time.perf_counter = lambda: next(seconds)
    # A fork of a worker that other tests have left their traces in.
    PartialState._reset_state()
    train_shapes.multiplies_faster_in_bf16.cache_clear()
    PartialState(cpu=True)
    return train_shapes.multiplies_faster_in_bf16(size=4)


def test_processes_agree_on_the_precision():
    assert in_processes(measured_precision) == [False, False]


@pytest.fixture
def tiny_recipes(monkeypatch):
    """The recipes with numbers for seconds: two steps a stage, few pictures, few codes."""
    load = train_shapes.load_recipe

    def load_tiny(stage: str) -> dict:
        recipe = load(stage)
        if "training" in recipe and stage != "export":
            recipe["training"].pop("num_train_epochs", None)
            recipe["training"] |= {"max_steps": 2, "warmup_steps": 0, "logging_steps": 1, "save_steps": 1}
            recipe["training"] |= {"per_device_train_batch_size": 4}
        if stage == "pictures":
            recipe |= {"num_train": 700, "num_eval": 12}
        if stage == "text-tokenizer":
            recipe |= {"num_texts": 300}
        if stage in ("tokenizer", "sharpen", "pixel-decoder"):
            recipe["training"] |= {"eval_steps": 2}
        if stage == "tokenizer":
            recipe["model"] |= {"codebook_size": 64}
            recipe["training"] |= {"continuous_steps": 1, "codebook_init_batches": 2}
        if stage == "merge":
            recipe |= {"codebook_size": 48, "num_pictures": 64}
        if stage == "extract":
            recipe |= {"num_rows": 24, "rows_per_shard": 12}
        if stage == "transformer":
            recipe["model"] |= {"num_hidden_layers": 1}
        if stage == "export":
            recipe["judge"]["counts"] = {"prompt": 6, "edit": 6, "direct": 5, "example": 6}
        return recipe

    monkeypatch.setattr(train_shapes, "load_recipe", load_tiny)


def test_from_nothing_to_a_repository(tiny_recipes, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_shapes", "--output-dir", str(tmp_path)])
    train_shapes.main()
    for _, finished in train_shapes.STAGES.values():
        assert (tmp_path / finished).exists()
    repository = tmp_path / "nextflow-shapes"
    merged, last = (
        load_file(tmp_path / name / "model.safetensors") for name in ("vision_tokenizer_merged", "vision_tokenizer")
    )
    changed = {name.split(".")[0] for name in merged if not torch.equal(merged[name], last[name])}
    assert changed == {"pixel_decoder"}  # the codes stay
    losses = json.loads((tmp_path / "transformer" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in losses if "loss" in entry]) == 2
    card = (repository / "README.md").read_text()
    assert "dB PSNR" in card and "| scale 3 |" in card and (repository / "edits.png").exists()
    pipe = NextFlowPipeline.from_pretrained(repository)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.dtype == torch.bfloat16
    assert pipe("a red circle").images[0].size == (64, 64)

    # A second call finds everything finished and touches nothing.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    train_shapes.main()
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    # Its diffusion decoder, from a denoiser to a part of that repository.
    load = train_shapes_decoder.load_decoder_recipe

    def load_tiny(name: str) -> dict:
        recipe = load(name)
        recipe["training"] |= {"warmup_steps": 0, "logging_steps": 1, "save_steps": 1}
        recipe["training"] |= {"per_device_train_batch_size": 2}
        recipe["pretraining"] |= {"max_steps": 2}
        for stage in recipe["stages"].values():
            stage |= {"max_steps": 1, "per_device_train_batch_size": 2}
        return recipe

    monkeypatch.setattr(train_shapes_decoder, "load_decoder_recipe", load_tiny)
    monkeypatch.setattr(train_shapes_decoder, "HELD_OUT", 2)
    monkeypatch.setattr("sys.argv", ["decoder", "--output-dir", str(tmp_path), "--add-to", str(repository)])
    train_shapes_decoder.main()
    pipe = NextFlowPipeline.from_pretrained(repository)
    pipe.set_progress_bar_config(disable=True)
    options = {"decoder": "diffusion", "decoder_num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    assert pipe("a red circle", **options).images[0].size == (128, 128)
    assert 'pipe("a red circle", decoder="diffusion"' in (repository / "README.md").read_text()
    # Before the two stages it was the denoiser.
    base, denoiser = (
        load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors")
        for folder in ("diffusion_decoder_base/diffusion_decoder", "denoiser")
    )
    assert base["denoiser.conv_in.weight"].shape[1] == denoiser["conv_in.weight"].shape[1] + 16
    torch.testing.assert_close(base["denoiser.conv_out.weight"], denoiser["conv_out.weight"], atol=5e-3, rtol=0)
