"""The commands that train the diffusion decoder: from an extraction's file to a LoRA, and the small one of Shapes."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from toy_decoder import toy_base_model, toy_decoder_pipeline, toy_denoiser
from toy_pipeline import toy_pipeline

from nextflow_hf.commands import extract
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import export_pipeline
from nextflow_hf.training.data.decoder_rows import NextFlowDecoderCollator, NextFlowDecoderDataset
from nextflow_hf.training.data.extraction import load_codes
from nextflow_hf.training.data.mixture import MixtureArguments, MixtureRows
from nextflow_hf.training.diffusion_decoder import train as train_decoder
from nextflow_hf.training.diffusion_decoder.trainer import NextFlowDiffusionDecoderTrainingArguments
from nextflow_hf.training.shapes.denoiser import train_denoiser


SIZES = ((16, 16), (20, 12), (12, 20))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A toy model, two folders of pictures and a text, and the file by which they were extracted."""
    folder = tmp_path_factory.mktemp("data")
    export_pipeline(toy_pipeline(), folder / "model", create_card("model", repo_id="toy/nextflow"))
    for name, count in (("first", 3), ("second", 4)):
        (folder / name).mkdir()
        for index in range(count):
            pixels = np.random.default_rng(count + index).integers(
                0, 255, (*SIZES[index % 3][::-1], 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
            (folder / name / f"{index}.txt").write_text(f"a {name} {index}")
    (folder / "text.txt").write_text("a b\n")
    sources = [
        {"path": str(folder / "first"), "format": "captioned_folder", "task": "text_to_image", "inversion_rate": 0},
        {"path": str(folder / "second"), "format": "captioned_folder", "task": "image_to_text", "resolution": 8},
        {"path": str(folder / "text.txt"), "format": "text", "task": "text"},
    ]
    options = {"model": str(folder / "model"), "output_dir": str(folder / "codes"), "sources": sources}
    options |= {"stopping_strategy": "all_exhausted_without_replacement", "dtype": "float32", "self_correction": False}
    (folder / "data.yaml").write_text(yaml.safe_dump(options))
    assert extract.main([str(folder / "data.yaml")]) == 0
    return folder


def mixture_of(folder) -> MixtureArguments:
    options = yaml.safe_load((folder / "data.yaml").read_text())
    return MixtureArguments(sources=options["sources"], stopping_strategy=options["stopping_strategy"])


def test_pictures_are_found_by_the_names_in_the_shards(data):
    """Every picture beside its own codes, at the level of its source; texts are left out."""
    pipe = toy_decoder_pipeline("unet")
    rows = NextFlowDecoderDataset(load_codes(data / "codes"), MixtureRows(mixture_of(data)))
    assert len(rows) == 7
    captions = {row["caption"] for row in rows}
    assert captions == {"", "a first 0", "a first 1", "a first 2"}
    collate = NextFlowDecoderCollator(pipe.image_processor)
    for index in range(len(rows)):
        batch = collate([rows[index]])
        resolution = 16 if batch["captions"][0] else 8
        path = rows[index]["image"]["path"] if isinstance(rows[index]["image"], dict) else rows[index]["image"]
        inputs = pipe.image_processor(Image.open(path), resolution=resolution, return_tensors="pt")
        expected = pipe.vision_tokenizer.encode(inputs["pixel_values"], inputs["image_grids"]).image_codes
        assert torch.equal(batch["image_codes"], expected)
        assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    batch = collate([rows[index] for index in range(7)])
    assert batch["image_grids"].shape[:2] == (7, 4) and batch["pixel_values"].shape[0] == 7


def test_rows_that_are_no_longer_there_are_named(data):
    mixture = mixture_of(data)
    rows = MixtureRows(mixture)
    with pytest.raises(ValueError, match="has no row '9.png'"):
        rows(str(data / "first"), "9.png")
    with pytest.raises(ValueError, match="is of source 'elsewhere'"):
        rows("elsewhere", "0.png")
    options = {"format": "captioned_folder", "label": "one", "path": str(data / "first")}
    sources = [{**options, "task": task} for task in ("text_to_image", "image_to_text")]
    with pytest.raises(ValueError, match="give each a label of its own"):
        MixtureRows(MixtureArguments(sources=sources))
    source = {"format": "text", "path": str(data / "text.txt"), "task": "text", "streaming": True}
    with pytest.raises(ValueError, match="come in order, not by name"):
        MixtureRows(MixtureArguments(sources=[source]))


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_the_command_trains_both_stages_and_goes_on(data, tmp_path, family):
    toy_base_model(family).save_pretrained(tmp_path / "base_model")
    is_lora = family != "unet"
    training = {"report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2, "save_steps": 1}
    recipe = {
        "base_model": str(tmp_path / "base_model"),
        "denoiser": "transformer" if is_lora else "unet",
        "training": {
            **training,
            "bf16": True,
            "activation_checkpointing": True,
            **({"lora_rank": 2} if is_lora else {}),
        },
        "stages": {"base": {"max_steps": 2}, "upscale": {"max_steps": 1}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--recipe", str(tmp_path / "recipe.yaml"), "--data", str(data / "data.yaml")]
    arguments += ["--output-dir", str(tmp_path / "out")]
    assert train_decoder.main([*arguments, "--stage", "base"]) == 0
    name = "pytorch_lora_weights.safetensors" if is_lora else "diffusion_pytorch_model.safetensors"
    first = load_file(tmp_path / "out" / "base" / name)
    # As if it had been interrupted after its first step
    (tmp_path / "out" / "base_run" / "trainer_state.json").unlink()
    (tmp_path / "out" / "base_run" / "checkpoint-2").rename(tmp_path / "out" / "aside")
    assert train_decoder.main(arguments) == 0
    again, last = (load_file(tmp_path / "out" / stage / name) for stage in ("base", "upscale"))
    assert all(torch.equal(again[key], value) for key, value in first.items())
    assert last.keys() == first.keys() and any(not torch.equal(last[key], again[key]) for key in last)
    if is_lora:
        pipe = toy_decoder_pipeline(family, projection_dim=None).to(torch.bfloat16)
        pipe.load_lora_weights(tmp_path / "out" / "upscale")
        assert pipe.diffusion_decoder.dtype == torch.bfloat16
    else:
        config = json.loads((tmp_path / "out" / "upscale" / "config.json").read_text())
        assert config["upscale_factor"] == 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert train_decoder.main(arguments) == 0  # all is there
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_denoiser_of_pictures_learns_and_goes_on(tmp_path):
    pictures = np.zeros((12, 8, 8, 3), np.uint8)
    pictures[:, 2:6, 2:6] = 255
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_steps": 20, "logging_steps": 20}
    options |= {"learning_rate": 1e-2, "per_device_train_batch_size": 6, "lr_scheduler_type": "constant"}

    def train(folder: str, steps: int) -> UNet2DConditionModel:
        torch.manual_seed(0)
        args = NextFlowDiffusionDecoderTrainingArguments(str(tmp_path / folder), max_steps=steps, **options)
        return train_denoiser(toy_denoiser("unet", channels=3), DDIMScheduler(), pictures, args)

    whole = train("whole", 40)
    history = json.loads((tmp_path / "whole" / "checkpoint-40" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    train("again", 20)
    again = train("again", 40)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-5, rtol=1e-3, msg=name)
