"""`nextflow-hf train decoder`: from an extraction's file to a decoder or a LoRA, in two stages."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from toy_decoder import toy_base_model, toy_decoder_pipeline
from toy_pipeline import toy_pipeline

from nextflow_hf import cli
from nextflow_hf.commands import extract
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import export_pipeline
from nextflow_hf.training.data.decoder_rows import NextFlowDecoderCollator, NextFlowDecoderDataset
from nextflow_hf.training.data.mixture import MixtureArguments, MixtureRows
from nextflow_hf.training.data.shards import load_codes


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
    recipe = {
        "base_model": str(tmp_path / "base_model"), "denoiser": "transformer" if is_lora else "unet",
        "data": str(data / "data.yaml"), "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2,
        "save_steps": 1, "bf16": True, "activation_checkpointing": True, "max_steps": 2,
        **({"lora_rank": 2} if is_lora else {}),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    base, upscale = tmp_path / "base", tmp_path / "upscale"
    command = ["train", "decoder", str(tmp_path / "recipe.yaml")]
    assert cli.main([*command, f"output_dir={base}"]) == 0
    name = "pytorch_lora_weights.safetensors" if is_lora else "diffusion_pytorch_model.safetensors"
    first = load_file(base / name)
    # As if it had been interrupted after its first step
    (base / "trainer_state.json").unlink()
    (base / "checkpoint-2").rename(tmp_path / "aside")
    assert cli.main([*command, f"output_dir={base}"]) == 0
    second = [f"output_dir={upscale}", f"decoder_name_or_path={base}", "upscale_factor=2", "max_steps=1"]
    assert cli.main([*command, *second]) == 0
    again, last = load_file(base / name), load_file(upscale / name)
    assert all(torch.equal(again[key], value) for key, value in first.items())
    assert last.keys() == first.keys() and any(not torch.equal(last[key], again[key]) for key in last)
    if is_lora:
        pipe = toy_decoder_pipeline(family, projection_dim=None).to(torch.bfloat16)
        pipe.load_lora_weights(upscale)
        assert pipe.diffusion_decoder.dtype == torch.bfloat16
    else:
        assert json.loads((upscale / "config.json").read_text())["upscale_factor"] == 2
    assert yaml.safe_load((upscale / "run.yaml").read_text())["kind"] == "decoder"
    times = {path: path.stat().st_mtime_ns for path in upscale.rglob("*") if path.is_file()}
    assert cli.main([*command, *second]) == 0  # all is there
    assert times == {path: path.stat().st_mtime_ns for path in upscale.rglob("*") if path.is_file()}
