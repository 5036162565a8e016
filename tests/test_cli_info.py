"""`nextflow-hf info` and `reconstruct`; `--help`, which takes no time."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import pixels, save_picture, use_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_decoder import toy_clip, toy_decoder, toy_scheduler, toy_vae
from toy_hub import ToyHub
from toy_pipeline import toy_pipeline
from transformers import DynamicCache

from nextflow_hf import NextFlowPipeline, cli
from nextflow_hf.commands import checkpoint
from nextflow_hf.commands.measuring import peak_memory, reset_peak_memory
from nextflow_hf.commands.records import read_record
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import export_pipeline


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- info


def test_what_a_model_is(command_line, model_folder):
    said = command_line.json("info", model_folder)
    pipe = toy_pipeline()
    sizes = {name: count(getattr(pipe, name)) for name in ("transformer", "vision_tokenizer")}
    assert said["class"] == "NextFlowPipeline" and said["model"] == model_folder
    assert said["components"] == [
        {"name": "processor", "class": "NextFlowProcessor", "parameters": None, "dtype": None, "bytes": None},
        *(
            {"name": name, "class": type(getattr(pipe, name)).__name__, "parameters": sizes[name], "dtype": "float32"}
            | {"bytes": 4 * sizes[name]}
            for name in sizes
        ),
    ]
    assert said["vocabulary"] == {
        "total": 326,
        "text": 300,
        "image_codes": 24,
        "other": 2,
        "semantic_code_dim": 6,
        "pixel_code_dim": 4,
    }
    assert said["attention"] == {
        "implementation": "sdpa",
        "layers": 2,
        "hidden_size": 32,
        "heads": 4,
        "key_value_heads": 2,
        "head_dim": 8,
        "longest_sequence": 512,
    }
    assert said["memory"]["weights_bytes"] == 4 * sum(sizes.values())
    assert [(level["resolution"], level["scales"], level["codes"]) for level in said["resolutions"]] == [
        (4, 1, 1),
        (8, 2, 5),
        (12, 3, 14),
        (16, 4, 30),
    ]
    assert said["resolution"] == 16 and len(said["buckets"]) == 7
    assert said["buckets"][0] == {"width": 32, "height": 8}
    assert said["sampling"]["guidance_scale"] == 1.0


def test_the_cache_is_as_large_as_said(command_line, model_folder):
    """Drawing an image adds its codes to the cache: `<boi>`, and the cells of all scales but the first."""
    said = command_line.json("info", model_folder)
    pipe = toy_pipeline()
    inputs = pipe.encode_conversations([[{"role": "user", "content": "a"}]], generation_mode="interleaved")
    output = pipe.generate_answers(
        inputs, min_images=1, max_images=1, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    )
    cache = output.past_key_values
    assert isinstance(cache, DynamicCache) and len(output.image_grids) == 1
    held = sum(part.numel() * part.itemsize for layer in cache.layers for part in (layer.keys, layer.values))
    level = next(level for level in said["resolutions"] if level["resolution"] == said["resolution"])
    before = inputs["input_ids"].shape[1]
    of_text = said["memory"]["kv_cache_bytes_per_token"] * before
    assert held == of_text + level["kv_cache_bytes"]
    assert level["kv_cache_bytes_guided"] == 2 * level["kv_cache_bytes"]


def test_nothing_is_loaded(command_line, model_folder, monkeypatch):
    """The weights may be larger than the memory."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(NextFlowPipeline, "from_pretrained", fail)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", fail)
    said = command_line.run("info", model_folder)
    sizes = {name: count(getattr(toy_pipeline(), name)) for name in ("transformer", "vision_tokenizer")}
    assert f"NextFlowForCausalLM, {sizes['transformer']:,} parameters, float32" in said
    assert "326 tokens: 300 of text, 24 image codes, 2 others" in said
    assert "*     16         4       30" in said and "7, from 32x8 to 8x32 pixels" in said


def test_describing_a_model_imports_no_torch(model_folder):
    code = f"""
import sys
from nextflow_hf import cli
for argv in (["info"], ["info", {model_folder!r}], ["train", "--list"]):
    assert cli.main(argv) == 0
    assert not {{"torch", "transformers", "diffusers"}} & set(sys.modules), argv
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_dtype_to_load_in(command_line, model_folder):
    saved, half = (command_line.json("info", model_folder, *dtype) for dtype in ([], ["--dtype", "bfloat16"]))
    for name in ("weights_bytes", "kv_cache_bytes_per_token"):
        assert half["memory"][name] * 2 == saved["memory"][name]


def test_the_cache_of_a_quantised_model_is_of_the_type_that_it_computes_in(command_line, tmp_path):
    pipe = toy_pipeline()
    pipe.transformer.bfloat16()
    pipe.save_pretrained(tmp_path)
    usual = command_line.json("info", tmp_path)["memory"]["kv_cache_bytes_per_token"]
    folder = tmp_path / "transformer"
    weights = load_file(folder / "model.safetensors")
    packed = {name: weight.view(torch.uint8) if weight.ndim == 2 else weight for name, weight in weights.items()}
    save_file(packed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert command_line.json("info", tmp_path)["memory"]["kv_cache_bytes_per_token"] == usual


def test_every_part_of_a_diffusion_decoder(command_line, tmp_path):
    text_encoder, tokenizer = toy_clip()
    parts = {
        "diffusion_decoder": toy_decoder("unet"),
        "decoder_vae": toy_vae("unet"),
        "decoder_text_encoder": text_encoder,
    }
    pipe = NextFlowPipeline(
        **{name: part for name, part in toy_pipeline().components.items() if part is not None},
        **parts,
        decoder_scheduler=toy_scheduler("unet"),
        decoder_tokenizer=tokenizer,
    )
    pipe.save_pretrained(tmp_path / "model")
    said = {part["name"]: part for part in command_line.json("info", "model")["components"]}
    assert {name: said[name]["parameters"] for name in parts} == {name: count(part) for name, part in parts.items()}
    assert said["decoder_scheduler"]["parameters"] is None


def test_mixed_types_and_shards(command_line, tmp_path):
    pipe = toy_pipeline()
    pipe.transformer.bfloat16()
    pipe.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 1
    said = {part["name"]: part for part in command_line.json("info", "model")["components"]}
    assert said["transformer"]["dtype"] == "bfloat16" and said["vision_tokenizer"]["dtype"] == "float32"
    assert said["transformer"]["bytes"] == 2 * count(pipe.transformer)


def test_a_transformer_or_a_vision_tokenizer_alone(command_line, model_folder):
    said = command_line.json("info", f"{model_folder}/transformer")
    assert said["class"] == "NextFlowForCausalLM" and said["vocabulary"]["total"] == 326 and "resolutions" not in said
    said = command_line.json("info", f"{model_folder}/vision_tokenizer")
    assert said["class"] == "NextFlowVisionTokenizer" and "vocabulary" not in said
    assert "memory" in command_line.run("info", f"{model_folder}/vision_tokenizer")


def test_another_model(command_line, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "is a bert, expected a pipeline" in command_line.mistake("info", ".")
    assert "neither a folder nor a Hub id" in command_line.mistake("info", "none")


def test_a_model_on_a_hub_without_its_weights(command_line, model_folder, tmp_path, monkeypatch):
    folder = export_pipeline(
        toy_pipeline(), tmp_path / "export", create_card("model", repo_id="toy/nextflow"), include_code=False
    )
    with ToyHub() as hub:
        hub.files["toy/nextflow"] = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        download = checkpoint.snapshot_download
        monkeypatch.setattr(
            checkpoint,
            "snapshot_download",
            lambda *args, **options: download(*args, **options, endpoint=hub.url, cache_dir=tmp_path / "cache"),
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        said = command_line.json("info", "toy/nextflow")
        assert not [path for method, path in hub.requests if path.endswith(".safetensors")]
    local = command_line.json("info", model_folder)
    assert said | {"model": ""} == local | {"model": ""}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak of a process cannot be reset")
def test_a_peak_is_that_of_what_follows():
    device = torch.device("cpu")
    block = np.ones(200_000_000, dtype=np.uint8)
    assert reset_peak_memory(device)
    with_block, of = peak_memory(device)
    del block
    assert reset_peak_memory(device) and of == "the whole process"
    assert 150e6 < with_block - peak_memory(device)[0] < 250e6
    np.ones(200_000_000, dtype=np.uint8)
    assert abs(peak_memory(device)[0] - with_block) < 50e6


def test_how_an_image_was_made(command_line, model_folder):
    command_line.run("generate", "a", "--model", model_folder, "--seed", 1, "--output", "a.png")
    record = command_line.json("info", "a.png")["record"]
    assert record == json.loads(command_line.run("info", "a.png"))
    assert record["arguments"]["prompt"] == "a" and record["command"] == "generate"


def test_a_head_of_its_own_is_not_taken_for_a_tied_one(tmp_path):
    toy_pipeline().save_pretrained(tmp_path)
    checkpoint.check_weights(tmp_path)
    path = next(tmp_path.rglob("transformer/*.safetensors"), tmp_path / "model.safetensors")
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match="the files of the transformer in .* lack lm_head.weight"):
        checkpoint.check_weights(tmp_path)


# --- reconstruct


def test_there_and_back(command_line, model_folder, tmp_path):
    wide, square = save_picture(tmp_path / "wide.png", size=(40, 24)), save_picture(tmp_path / "square.png", 1)
    said = command_line.json("reconstruct", wide, square, "--model", model_folder, "--output", "out")
    pipe = NextFlowPipeline.from_pretrained(model_folder)
    assert [one["path"] for one in said["images"]] == [
        "out/wide-reconstructed.png",
        "out/square-reconstructed.png",
    ]
    for one, source in zip(said["images"], (wide, square), strict=True):
        codes, grids = pipe.encode_images(source)
        (expected,) = pipe.decode_codes(codes, grids)
        assert pixels(one["path"]) == (expected.size, expected.tobytes())
        assert one["codes"] == len(codes) and (one["width"], one["height"]) == expected.size
        assert one["bits_per_pixel"] == pytest.approx(len(codes) * np.log2(24) / expected.width / expected.height)
    true, decoded = (np.frombuffer(pixels(path)[1], np.uint8) / 255 for path in (square, said["images"][1]["path"]))
    assert said["images"][1]["psnr"] == pytest.approx(-10 * np.log10(np.square(true - decoded).mean()), abs=1e-3)
    record = read_record("out/wide-reconstructed.png")
    assert record.command == "reconstruct" and record.arguments["image"][0]["path"] == str(wide)
    assert list(record.weights) == ["vision_tokenizer"]  # the transformer is not even loaded


def test_the_first_scales_beside_the_original(command_line, model_folder, tmp_path):
    source = save_picture(tmp_path / "source.png")
    run = ["reconstruct", source, "--model", model_folder, "--num-scales", 2, "--compare", "--output", "both.png"]
    assert command_line.json(*run)["images"][0]["codes"] == 5
    pipe = NextFlowPipeline.from_pretrained(model_folder)
    codes, grids = pipe.encode_images(source)
    (expected,) = pipe.decode_codes(codes[:5], grids, num_scales=2)
    with Image.open("both.png") as both:
        assert both.size == (32, 16)
        assert both.crop((16, 0, 32, 16)).tobytes() == expected.tobytes()
        assert both.crop((0, 0, 16, 16)).tobytes() == pixels(source)[1]
    assert "PSNR" in command_line.run(*run)


def test_a_reconstruction_of_no_name_given_overwrites_nothing(command_line, model_folder, tmp_path):
    run = ["reconstruct", save_picture(tmp_path / "a.png"), "--model", model_folder]
    paths = [command_line.json(*run, *more)["images"][0]["path"] for more in ([], ["--num-scales", 2])]
    assert paths == ["a-reconstructed.png", "a-reconstructed-2.png"]


def test_one_bad_image_among_several_ends_nothing(command_line, model_folder, tmp_path):
    good = [save_picture(tmp_path / name) for name in ("a.png", "c.png")]
    bad = tmp_path / "b.png"
    bad.write_bytes(good[0].read_bytes()[:60])
    run = ["reconstruct", good[0], bad, tmp_path / "none.png", good[1], "--model", model_folder, "--output", "out"]
    assert command_line.run(*run, status=1).count("PSNR") == 2
    assert "b.png' is truncated, corrupt" in command_line.errors and "none.png' does not" in command_line.errors
    assert sorted(path.name for path in Path("out").iterdir()) == ["a-reconstructed.png", "c-reconstructed.png"]
    said = command_line.json(*run, status=1)
    assert [Path(one["source"]).name for one in said["left_out"]] == ["b.png", "none.png"]


def test_through_the_diffusion_decoder(command_line, tmp_path, monkeypatch):
    pipe = NextFlowPipeline(
        **{name: part for name, part in toy_pipeline().components.items() if part is not None},
        diffusion_decoder=toy_decoder("unet"),
        decoder_scheduler=toy_scheduler("unet"),
        decoder_vae=toy_vae("unet"),
    )
    use_pipeline(monkeypatch, pipe)
    source = save_picture(tmp_path / "source.png")
    run = ["reconstruct", source, "--decoder", "diffusion", "--seed", 3, "--model", "toy/model", "--output", "a.png"]
    command_line.run(*run, "--decoder-num-inference-steps", 2, "--quiet")
    codes, grids = pipe.encode_images(source)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
    (expected,) = pipe.diffusion_decoder_pipeline(codes, grids, **options).images
    assert pixels("a.png") == (expected.size, expected.tobytes())


def test_mistakes_in_a_reconstruction(command_line, model_folder, tmp_path):
    source = save_picture(tmp_path / "source.png")
    run = ["reconstruct", source, "--model", model_folder]
    assert "--num-scales is 5, expected 1 to 4" in command_line.mistake(*run, "--num-scales", 5)
    assert "which needs --decoder diffusion" in command_line.mistake(*run, "--decoder-strength", 0.5)
    assert "none.png does not exist" in command_line.mistake("reconstruct", "none.png", "--model", model_folder)
    (tmp_path / "text.png").write_text("text")
    assert "not an image" in command_line.mistake("reconstruct", "text.png", "--model", model_folder)
    assert "expected a .png or a folder" in command_line.mistake(*run, "--output", "a.jpg")


# --- help


def test_mistakes_in_the_commands_of_transformers_are_its_own(command_line):
    assert "nosuch" in command_line.mistake("transformers", "nosuch")


def test_help_imports_neither_torch_nor_numpy():
    names = [name for name, (module, _) in cli.COMMANDS.items() if module.startswith("nextflow_hf.commands.")]
    names = [name for name in names if name not in ("diffusers", "transformers")]  # whose help is theirs
    assert {"generate", "edit", "chat", "interleave", "frames", "reconstruct", "info"} <= set(names)
    code = f"""
import sys
from nextflow_hf import cli
for argv in [["--help"], *([name, "--help"] for name in {names})]:
    try:
        cli.main(argv)
    except SystemExit as stop:
        assert not stop.code
    loaded = {{"torch", "numpy", "PIL", "transformers", "diffusers", "huggingface_hub"}} & set(sys.modules)
    assert not loaded, (argv, loaded)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in names:
        assert f"usage: nextflow-hf {name}" in result.stdout


@pytest.mark.parametrize(("missing", "extra"), [("datasets", "train"), ("scipy", "train"), ("trl", "rl")])
def test_a_command_without_its_extra_names_it(missing, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(cli.COMMANDS, "train", (missing, ""))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == f'nextflow-hf train needs {missing}: pip install "nextflow-hf[{extra}]"\n'


def test_a_command_that_is_broken_says_so(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "train", ("no_such_module", ""))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["train"])
