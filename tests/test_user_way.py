"""The way of a user, by commands alone, offline and in a fresh folder: from a Qwen to a model in use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import pixels, save_picture
from huggingface_hub import constants, hf_api
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tokenflow_reference import tiny_checkpoint
from toy_decoder import toy_base_model
from toy_hub import ToyHub
from toy_pipeline import NUMBERS
from toy_qwen import CONTROL, QWENS, save_qwen, save_tokenizer

from nextflow_hf import (
    NextFlowDiffusionDecoderPipeline,
    NextFlowForCausalLM,
    NextFlowPipeline,
    NextFlowVisionTokenizer,
)
from nextflow_hf.conversion import from_tokenflow
from nextflow_hf.processing import NextFlowImageProcessorPil
from nextflow_hf.training.diffusion_decoder.build import DecoderArguments, build_decoder_pipeline
from nextflow_hf.training.diffusion_decoder.trainer import lora_state_dict
from nextflow_hf.training.transformer.adapters import IMAGE_MODULES, image_token_rows


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    from nextflow_hf import cli

    folder = tmp_path_factory.mktemp("converted")
    qwen, tokenizer = save_qwen(folder / "qwen"), save_tokenizer(folder / "tokenizer")
    assert cli.main(["convert", "qwen", str(qwen), str(folder / "model"), "--vision-tokenizer", str(tokenizer)]) == 0
    return folder / "model"


@pytest.mark.parametrize("family", QWENS)
def test_convert_writes_a_whole_pipeline(family, tmp_path, command_line):
    save_qwen(tmp_path / "qwen", family), save_tokenizer(tmp_path / "tokenizer")
    said = command_line.run("convert", "qwen", "qwen", "model", "--vision-tokenizer", "tokenizer", "--dry-run")
    assert "vocabulary of 306: 280 of text from qwen, 24 codes, <boi> and <eoi>" in said
    assert "images of 16 x 16 pixels" in said and "vision tokenizer -> model/vision_tokenizer" in said
    assert not Path("model").exists()
    command_line.run("convert", "qwen", "qwen", "model", "--vision-tokenizer", "tokenizer")
    assert "MISSING" not in command_line.errors
    pipe = NextFlowPipeline.from_pretrained("model")
    config, processor = pipe.transformer.config, pipe.processor
    assert config.max_scales == processor.max_scales == 4
    assert processor.tokenizer.convert_tokens_to_ids(CONTROL) == list(range(256, 262))
    assert (config.image_token_id, config.boi_token_id, config.eos_token_id) == (261, 304, 258)
    assert config.vision_tokenizer_fingerprint == pipe.vision_tokenizer.get_codes_fingerprint()
    assert pipe.transformer.generation_config.image_top_k == 2  # the paper's
    assert "You are Qwen" not in processor.apply_chat_template([{"role": "user", "content": "a"}])
    command_line.run("generate", "a", "--model", "model", "--seed", "1", "--output", "drawn.png")
    assert Path("drawn.png").is_file()


def test_every_command_takes_it(converted, command_line, tmp_path):
    save_picture(tmp_path / "photo.png")
    model = ("--model", str(converted))
    assert command_line.json("info", converted)["class"] == "NextFlowPipeline"
    command_line.run("chat", "hello", "--max-new-tokens", "2", *model)
    command_line.run("edit", "a", "--image", "photo.png", "--output", "edited.png", *model)
    command_line.run("reconstruct", "photo.png", *model)


# --- TokenFlow


@pytest.fixture(params=[("clip", 16, (1, 2, 4)), ("siglip", 17, (1, 3, 5))], ids=["clip", "siglip"])
def tokenflow(request, tmp_path, monkeypatch):
    """A small checkpoint: of 16 pixels a side and 4 cells, or of 17, which 5 cells do not divide."""
    encoder, size, sides = request.param
    monkeypatch.setitem(from_tokenflow.SCALE_SIDES, (encoder, size), sides)
    monkeypatch.setitem(from_tokenflow.DEFAULT_IMAGE_SIZE, encoder, size)
    torch.save({"model": tiny_checkpoint(encoder, cells=3 if encoder == "clip" else 5)}, tmp_path / "tokenflow.pt")
    return size


def test_a_tokenflow_tokenizer_encodes_and_decodes(tokenflow, command_line, tmp_path):
    """Alone, and, its file named as it is, in a pipeline: images of its one size, in its own scales."""
    save_picture(tmp_path / "photo.png", size=(40, 30))
    save_qwen(tmp_path / "qwen")
    command_line.run("convert", "tokenflow", "tokenflow.pt", "tokenizer")
    for index, source in enumerate(("tokenizer", "tokenflow.pt")):
        command_line.run("convert", "qwen", "qwen", f"model{index}", "--vision-tokenizer", source)
    for index, model in enumerate(("tokenizer", "model0", "model1")):
        said = command_line.json("reconstruct", "photo.png", "--model", model, "--output", f"{index}.png")
        assert (said["images"][0]["width"], said["images"][0]["height"]) == (tokenflow, tokenflow)
    assert pixels("0.png") == pixels("1.png") == pixels("2.png")
    command_line.run("generate", "a", "--model", "model0", "--output", "drawn.png")
    assert pixels("drawn.png")[0] == (tokenflow, tokenflow)
    processor = NextFlowPipeline.from_pretrained("model1").processor
    assert processor.image_processor.resolution == tokenflow and len(processor.image_processor.schedule.buckets) == 1
    said = command_line.mistake("generate", "a", "--model", "tokenizer")
    assert "`nextflow-hf convert qwen QWEN FOLDER --vision-tokenizer tokenizer` puts it into a pipeline" in said


# --- export


def write_yaml(path: str, values: dict) -> str:
    Path(path).write_text(yaml.safe_dump(values))
    return path


def save_run(folder: Path, kind: str, model: Path, **recipe) -> Path:
    """What a training of `kind` leaves beside its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["nextflow-hf", "train", kind, "sft_512", f"model_name_or_path={model}"]
    notes = {
        "kind": kind,
        "recipe": {"train_codes": ["/data/codes"], **recipe},
        "model": str(model),
        "command": command,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(notes))
    history = [{"loss": 3.0, "step": 1}, {"loss": 2.5, "step": 7}, {"train_loss": 0.4, "step": 7}]  # a mean
    state = {"global_step": 7, "epoch": 1.5, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def changed(folder: Path, model: Path, seed: int) -> NextFlowForCausalLM:
    """The transformer of `model` with other weights, saved in `folder`."""
    transformer = NextFlowForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in transformer.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    transformer.save_pretrained(folder)
    return transformer


def is_equal(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def runs(converted, tmp_path_factory) -> dict[str, Path]:
    """One run of every kind, as training leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    full = save_run(folder / "full", "transformer", converted)
    changed(full, converted, 1), changed(full / "checkpoint-5", converted, 2)
    later = save_run(folder / "later", "grpo", full)  # from the run before it, which is no pipeline
    changed(later, full, 3)
    runs = {"full": full, "later": later}
    for name, options in {"lora": {}, "lora with whole parts": {"modules_to_save": IMAGE_MODULES}}.items():
        model = NextFlowForCausalLM.from_pretrained(converted)
        if options:
            options = {**options, "trainable_token_indices": image_token_rows(model.config)}
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05)
        runs[name] = save_run(folder / name, "transformer", converted)
        model.save_pretrained(runs[name], save_embedding_layers=False)
    runs["tokenizer"] = save_run(folder / "tokenizer", "tokenizer", converted)
    tokenizer = NextFlowVisionTokenizer.from_pretrained(converted, subfolder="vision_tokenizer")
    tokenizer.pixel_decoder.conv_in.weight.data.add_(0.1)  # the decoder alone: the codes stay
    tokenizer.save_pretrained(runs["tokenizer"])
    NextFlowImageProcessorPil(**NUMBERS).save_pretrained(runs["tokenizer"])
    return runs


@pytest.mark.parametrize(
    ("run", "options"),
    [("full", []), ("full", ["--checkpoint", "5"]), ("later", []), ("lora", []), ("lora with whole parts", [])],
)
def test_export_of_a_transformer(run, options, runs, converted, command_line):
    command_line.run("export", runs[run], "--output", "exported", *options)
    pipe = NextFlowPipeline.from_pretrained("exported")
    base = NextFlowPipeline.from_pretrained(converted)
    assert is_equal(pipe.vision_tokenizer, base.vision_tokenizer)
    assert not is_equal(pipe.transformer, base.transformer)
    if "lora" in run:
        trained = PeftModel.from_pretrained(base.transformer, runs[run]).merge_and_unload()
    else:
        trained = NextFlowForCausalLM.from_pretrained(runs[run] / "checkpoint-5" if options else runs[run])
    assert is_equal(pipe.transformer, trained)
    card = Path("exported", "README.md").read_text()
    assert "| Steps | 7, 1.5 epochs |" in card and "| Last `loss` | 2.5 |" in card and "| Data | `codes` |" in card
    assert "nextflow-hf train" in card and "## Licence" in card and "library_name: transformers" in card
    assert "train_loss" not in card
    assert str(converted.parent) not in card
    command_line.run("generate", "a", "--model", "exported", "--seed", "1", "--output", "drawn.png")


def test_export_has_the_processor_that_the_recipe_names(converted, command_line, tmp_path):
    processor = NextFlowPipeline.from_pretrained(converted).processor
    usual, other = processor.image_processor.resolution, processor.image_processor.schedule.resolutions[0]
    processor.image_processor.resolution = other
    processor.save_pretrained(tmp_path / "processor")
    recipe = {"processor_name_or_path": str(tmp_path / "processor")}
    run = save_run(tmp_path / "run", "transformer", converted, **recipe)
    changed(run, converted, 1)
    for expected, options in ((other, []), (usual, ["--model", converted])):
        command_line.run("export", run, "--output", str(expected), *options)
        assert NextFlowPipeline.from_pretrained(str(expected)).processor.image_processor.resolution == expected
    assert usual != other


def test_export_has_the_vision_tokenizer_of_the_model_that_is_named(runs, converted, command_line, tmp_path):
    run = save_run(tmp_path / "run", "transformer", converted, vision_tokenizer_name_or_path=str(runs["tokenizer"]))
    changed(run, converted, 1)
    trained = NextFlowVisionTokenizer.from_pretrained(runs["tokenizer"])
    usual = NextFlowPipeline.from_pretrained(converted).vision_tokenizer
    for name, expected, options in (("recipe", trained, []), ("model", usual, ["--model", converted])):
        command_line.run("export", run, "--output", name, *options)
        assert is_equal(NextFlowPipeline.from_pretrained(name).vision_tokenizer, expected)


def test_export_with_texts_defaults_and_all_stages(runs, converted, command_line, tmp_path):
    """A card of a model that ships: what people say of it, and the command and seconds of every stage."""
    tokenizer = save_run(tmp_path / "stages" / "tokenizer", "tokenizer", converted)
    Image.new("RGB", (8, 8)).save(tokenizer / "loss.png")
    log = [{"loss": 3.0, "step": 1, "train_seconds": 40.2}, {"step": 7, "train_runtime": 9, "train_seconds": 81.4}]
    run = save_run(tmp_path / "stages" / "last", "transformer", runs["full"], vision_tokenizer=str(tokenizer))
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": log}))
    changed(run, converted, 5)
    card = {"title": "Mine", "use": "Call it.", "limits": "Many.", "credits": "Theirs.", "license": "mit"}
    options = ["--without-code", "--card", write_yaml("card.yaml", card)]
    options += ["--set", "resolution=16", "guidance_scale=2.5", "top_k=3"]
    command_line.run("export", run, "--output", "exported", *options)
    pipe = NextFlowPipeline.from_pretrained("exported")
    settings = pipe.get_image_settings()
    assert settings["guidance_scale"] == 2.5 and settings["top_k"] == 3
    assert pipe.processor.image_processor.resolution == 16 and not list(Path("exported").rglob("*.py"))
    text = Path("exported", "README.md").read_text()
    assert text.count("## ") == text.count("\n## ") == 6 and "# Mine\n" in text and "license: mit" in text
    order = ["## Use\n\nCall it.\n\n## Model", "| `full` |", "| `tokenizer` |", "| `last` | transformer | 7 | 81 |"]
    order += ["![Losses of the stage tokenizer](loss_tokenizer.png)", "## Limits\n\nMany.\n\n## Credits\n\nTheirs.\n"]
    assert [text.find(part) for part in order] == sorted(text.index(part) for part in order)
    assert Path("exported", "loss_tokenizer.png").is_file() and text.count("nextflow-hf train transformer") == 2
    assert str(tmp_path) not in text and "/data/codes" not in text
    command_line.run("export", runs["full"], "--vision-tokenizer", runs["tokenizer"], "--output", "other")
    assert "| `tokenizer` | tokenizer | 7 |" in Path("other", "README.md").read_text()
    wrong = {
        ("--card", write_yaml("wrong.yaml", {"colour": 1})): "'colour'], expected some of",
        ("--set", "colour=1"): "'colour'], expected some of",
        ("--set", "resolution=17"): "resolution is 17",
        ("--set", "resolution=0"): "resolution is 0",
        ("--standalone", "--without-code"): "not allowed with argument",
    }
    for option, said in wrong.items():
        assert said in command_line.mistake("export", run, "--output", "wrong", *option)
        assert not Path("wrong").exists()


def test_a_card_has_the_stages_of_the_exported_model_before_it(runs, converted, command_line, tmp_path):
    """Also of what started from a checkpoint; each stage once, in order, with its plot."""
    first = save_run(tmp_path / "first", "transformer", converted)
    changed(first, converted, 4)
    Image.new("RGB", (8, 8)).save(first / "loss.png")
    command_line.run("export", first, "--output", "middle")
    again = save_run(tmp_path / "again", "transformer", Path("middle").resolve())
    changed(again, converted, 5), changed(again / "checkpoint-5", converted, 6)
    last = save_run(tmp_path / "last", "grpo", again / "checkpoint-5", also=str(first))
    changed(last, converted, 7)
    command_line.run("export", last, "--output", "exported", "--model", converted)
    stages = json.loads(Path("exported", "stages.json").read_text())
    assert [(one["name"], one["kind"], one["steps"]) for one in stages] == [
        ("first", "transformer", 7),
        ("again", "transformer", 7),
        ("last", "grpo", 7),
    ]
    text = Path("exported", "README.md").read_text()
    assert text.count("| `first` |") == 1 and "![Losses of the stage first](loss_first.png)" in text
    assert Path("exported", "loss_first.png").is_file() and str(tmp_path) not in json.dumps(stages)
    Path("middle", "stages.json").write_text('[{"name": 3}]')
    assert "middle/stages.json is no list of stages" in command_line.mistake("export", again, "--output", "wrong")


def test_export_of_an_adapter_alone(runs, converted, command_line):
    command_line.run("export", runs["lora"], "--adapter", "--output", "adapter")
    drawn = {}
    for name, path in (("exported", "adapter"), ("trained", runs["lora"])):
        command_line.run("generate", "a", "--model", converted, "--lora", path, "--seed", 1, "--output", f"{name}.png")
        drawn[name] = pixels(f"{name}.png")
    assert drawn["exported"] == drawn["trained"]
    assert "base_model: your-name/model" in Path("adapter", "README.md").read_text()
    assert "is no adapter: leave out --adapter" in command_line.mistake(
        "export", runs["full"], "--adapter", "--output", "other"
    )


def test_export_of_a_vision_tokenizer(runs, converted, command_line, tmp_path):
    save_picture(tmp_path / "photo.png")
    trained = NextFlowVisionTokenizer.from_pretrained(runs["tokenizer"])
    command_line.run("export", runs["tokenizer"], "--output", "alone")
    assert is_equal(NextFlowVisionTokenizer.from_pretrained("alone"), trained)
    command_line.run("export", runs["tokenizer"], "--model", converted, "--output", "whole")
    assert is_equal(NextFlowPipeline.from_pretrained("whole").vision_tokenizer, trained)
    drawn = []
    for index, model in enumerate(
        [("--model", "alone"), ("--model", "whole"), ("--model", converted, "--vision-tokenizer", runs["tokenizer"])]
    ):
        command_line.run("reconstruct", "photo.png", *model, "--output", f"{index}.png")
        drawn.append(pixels(f"{index}.png"))
    assert drawn[0] == drawn[1] == drawn[2]
    assert command_line.json("info", "alone")["class"] == "NextFlowVisionTokenizer"


def test_a_vision_tokenizer_of_an_unfinished_run_has_the_schedule_it_was_trained_with(
    runs, converted, command_line, tmp_path
):
    """The checkpoint has it: the folder of a run gets its own at the end."""
    run = save_run(tmp_path / "run", "tokenizer", converted)
    shutil.copytree(runs["tokenizer"], run / "checkpoint-5", ignore=shutil.ignore_patterns("run.yaml"))
    command_line.run("export", run, "--checkpoint", "5", "--output", "alone")
    assert NextFlowImageProcessorPil.from_pretrained("alone").scale_bases == [*NUMBERS["scale_bases"]]


@pytest.mark.parametrize(("run", "options"), [("lora", ["--adapter"]), ("tokenizer", [])])
def test_a_part_alone_has_the_texts_of_its_card_and_refuses_what_it_would_ignore(run, options, runs, command_line):
    card = write_yaml("card.yaml", {"title": "Mine", "limits": "Many.", "license": "mit"})
    command_line.run("export", runs[run], *options, "--card", card, "--output", "alone")
    text = Path("alone", "README.md").read_text()
    assert "# Mine\n" in text and "## Limits\n\nMany." in text and "license: mit" in text and "## Licence" not in text
    ignored = [("--set", "top_k=3"), ("--standalone",), ("--without-code",), ("--decoder", "x")]
    ignored += [("--vision-tokenizer", "x"), *([("--dtype", "float32"), ("--transformer", "x")] if options else [])]
    for option in ignored:
        said = command_line.mistake("export", runs[run], *options, *option, "--output", "other")
        assert f"alone, which takes no {option[0]}" in said and not Path("other").exists()


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_export_of_a_diffusion_decoder(family, converted, command_line, tmp_path):
    """All of it, or a LoRA on its base model, as its training saves them."""
    toy_base_model(family).save_pretrained("base")
    pipe = NextFlowPipeline.from_pretrained(converted)
    arguments = DecoderArguments(base_model="base", denoiser="unet" if family == "unet" else "transformer")
    made = build_decoder_pipeline(arguments, pipe.vision_tokenizer, pipe.processor.image_processor)
    decoder, run = made.diffusion_decoder, tmp_path / "decoder"
    if family == "flux":
        decoder.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for parameter in decoder.parameters():
        parameter.data.add_(0.02) if parameter.requires_grad else None
    if family == "flux":
        metadata = decoder.peft_config["default"].to_dict()
        NextFlowDiffusionDecoderPipeline.save_lora_weights(
            run, transformer_lora_layers=lora_state_dict(decoder), transformer_lora_adapter_metadata=metadata
        )
    else:
        decoder.save_pretrained(run)
    recipe = {"base_model": "base", "denoiser": arguments.denoiser, "model": str(converted), "data": "data.yaml"}
    notes = {"kind": "decoder", "model": None, "recipe": recipe, "command": ["nextflow-hf"]}
    write_yaml(str(run / "run.yaml"), notes)
    command_line.run("export", run, "--output", "whole")
    loaded = NextFlowPipeline.from_pretrained("whole")
    assert is_equal(loaded.transformer, pipe.transformer) and loaded.decoder_scheduler is not None
    options = ("--decoder", "diffusion", "--decoder-num-inference-steps", "1", "--seed", "1")
    command_line.run("generate", "a", "--model", "whole", *options, "--output", "drawn.png")
    noise = {"num_inference_steps": 1, "output_type": "pt"}
    codes, grids = pipe.encode_images(save_picture(tmp_path / "photo.png"))
    images = [
        one(codes, grids, generator=torch.Generator().manual_seed(0), **noise).images
        for one in (made, loaded.diffusion_decoder_pipeline)
    ]
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)
    assert "no run.yaml" in command_line.mistake("export", "whole/diffusion_decoder", "--model", converted, "-o", "x")
    assert "--decoder is other, but that is what" in command_line.mistake(
        "export", run, "--decoder", "other", "-o", "x"
    )


def test_parts_in_the_place_of_the_models_own(runs, converted, command_line):
    command_line.run("export", runs["full"], "--output", "exported")
    drawn = []
    for index, model in enumerate([("exported",), (converted, "--transformer", runs["full"])]):
        command_line.run("generate", "a", "--model", *model, "--seed", "1", "--output", f"{index}.png")
        drawn.append(pixels(f"{index}.png"))
    assert drawn[0] == drawn[1]
    command_line.run("generate", "--from-image", "1.png", "--output", "again.png")
    assert pixels("again.png") == drawn[0]
    # an adapter with whole weights is merged
    command_line.run("export", runs["lora with whole parts"], "--output", "merged")
    lora = ("--lora", runs["lora with whole parts"])
    command_line.run("generate", "a", "--model", "merged", "--seed", "1", "--output", "merged.png")
    command_line.run("generate", "a", "--model", converted, *lora, "--seed", "1", "--output", "lora.png")
    assert pixels("merged.png") == pixels("lora.png")


def test_what_is_no_pipeline_is_refused_with_the_command_that_makes_it_one(runs, converted, command_line, tmp_path):
    qwen, tokenizer = converted.parent / "qwen", converted.parent / "tokenizer"
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "manifest.json").write_text("{}")
    expected = {
        runs["full"]: f"`nextflow-hf export {runs['full']} --output FOLDER`",
        runs["full"] / "checkpoint-5": "nextflow-hf export",
        runs["lora"]: f"`nextflow-hf export {runs['lora']} --output FOLDER`",
        tokenizer: f"`nextflow-hf convert qwen QWEN FOLDER --vision-tokenizer {tokenizer}`",
        qwen: f"`nextflow-hf convert qwen {qwen} FOLDER",
        tmp_path / "codes": "`nextflow-hf train transformer RECIPE train_codes=",
    }
    for folder, command in expected.items():
        said = command_line.mistake("generate", "a", "--model", folder)
        assert command in said and said.count("\n") == 1, said
    for argv, reason in {
        ("export", qwen, "--output", "x"): "is a Qwen checkpoint, expected a run",
        ("export", runs["full"], "--checkpoint", "6", "--output", "x"): "--checkpoint takes one of [5]",
        ("export", runs["full"], "--output", converted): "exists and is not an empty folder",
        ("export", runs["full"], "--transformer", converted, "--output", "x"): "but that is what",
        ("export", "nowhere", "--output", "x"): "there is no folder nowhere",
        ("generate", "a", "--model", converted, "--transformer", tokenizer): "expected a transformer",
        ("generate", "a", "--model", converted, "--vision-tokenizer", qwen): "expected a vision tokenizer",
        ("push", runs["full"], "toy/x"): "nextflow-hf export",
    }.items():
        said = command_line.mistake(*argv)
        assert reason in said and said.count("\n") == 1, said
    assert not Path("x").exists()


# --- the Hub, and places without the package


@pytest.fixture
def hub(monkeypatch):
    with ToyHub() as hub:
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made anew, with this address
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def test_push_of_an_adapter_names_its_base(runs, command_line, hub):
    command_line.run("export", runs["lora"], "--adapter", "--output", "nameless")
    assert "an adapter of your-name/model, which is no repo" in command_line.mistake("push", "nameless", "toy/adapter")
    command_line.run("export", runs["lora"], "--adapter", "--model", "toy/base", "--output", "adapter")
    command_line.run("push", "adapter", "toy/adapter")
    files = hub.files["toy/adapter"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "toy/base"
    assert b"base_model: toy/base" in files["README.md"] and b"your-name" not in files["README.md"]


def test_a_push_that_fails_leaves_the_card_for_another_name(runs, command_line, hub, monkeypatch):
    command_line.run("export", runs["full"], "--output", "exported")

    def refuse(*args, **options):
        raise OSError("not logged in")

    monkeypatch.setattr(hf_api.HfApi, "create_repo", refuse)
    assert "not logged in" in command_line.mistake("push", "exported", "toy/wrong")
    assert "your-name/exported" in Path("exported", "README.md").read_text()


def test_push(runs, command_line, hub):
    command_line.run("export", runs["full"], "--output", "exported")
    assert f"{hub.url}/toy/drawn/commit/" in command_line.run("push", "exported", "toy/drawn", "--private")
    hub.files["toy/public"] = {}
    assert "toy/public exists and is public" in command_line.mistake("push", "exported", "toy/public", "--private")
    assert hub.files["toy/public"] == {}
    files = hub.files["toy/drawn"]
    assert {"model_index.json", "model.safetensors", "vision_tokenizer/model.safetensors"} <= set(files)
    assert b"toy/drawn" in files["README.md"] and b"your-name" not in files["README.md"]
    requests = len(hub.requests)
    Path("exported", "vision_tokenizer", "model.safetensors").unlink()
    assert "the files of the vision_tokenizer" in command_line.mistake("push", "exported", "toy/drawn")
    Path("exported", "README.md").unlink()
    assert "has no card" in command_line.mistake("push", "exported", "toy/drawn")
    assert len(hub.requests) == requests


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["nextflow_hf"] = None  # its import fails
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
torch.save(pipe("a", generator=torch.Generator().manual_seed(0), output_type="codes").image_codes, "codes.pt")
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("code ran without trust")
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def without_the_package(source: str, folder: Path, **environment: str) -> torch.Tensor:
    """Codes that `DiffusionPipeline` draws where the package is missing."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, source],
        env=inherited | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Do you wish to run" not in result.stdout
    return torch.load("codes.pt")


def drawn_codes(source: str) -> torch.Tensor:
    """The same by the package, which asks for no trust."""
    pipe = NextFlowPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a", generator=torch.Generator().manual_seed(0), output_type="codes").image_codes


def test_a_standalone_export_loads_without_the_package(runs, command_line, tmp_path):
    command_line.run("export", runs["full"], "--output", "exported", "--standalone")
    card = Path("exported", "README.md").read_text()
    assert "library_name: diffusers" in card and "DiffusionPipeline.from_pretrained(" in card
    assert torch.equal(without_the_package("exported", tmp_path), drawn_codes("exported"))
    assert command_line.json("info", "exported")["class"] == "NextFlowPipeline"
    command_line.run("generate", "a", "--model", "exported", "--output", "drawn.png")


def test_so_it_does_from_the_hub(runs, command_line, tmp_path, hub):
    command_line.run("export", runs["full"], "--output", "exported", "--standalone")
    command_line.run("push", "exported", "toy/standalone")
    expected = drawn_codes("exported")
    assert torch.equal(without_the_package("toy/standalone", tmp_path, HF_ENDPOINT=hub.url), expected)
    loaded = NextFlowPipeline.from_pretrained("toy/standalone", cache_dir=tmp_path / "cache")
    assert is_equal(loaded.transformer, NextFlowForCausalLM.from_pretrained("exported"))


# --- the whole way

TRAINING = {
    "max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2, "global_batch_size": 2, "learning_rate": 1e-3,
    "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
REWARD = '''"""How red an image is."""

import numpy as np


def redness(images, **columns):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
'''


def test_the_whole_way(command_line, tmp_path):
    """From a Qwen and captioned images to a model that is aligned, exported and loaded without the package."""
    save_qwen(tmp_path / "qwen"), save_tokenizer(tmp_path / "tokenizer"), (tmp_path / "images").mkdir()
    for index in range(60):
        save_picture(tmp_path / "images" / f"{index}.png", seed=index)
        (tmp_path / "images" / f"{index}.txt").write_text(f"image {index}")
    command_line.run("convert", "qwen", "qwen", "model", "--vision-tokenizer", "tokenizer")

    source = {"path": "images", "format": "captioned_folder", "task": "text_to_image"}
    data = write_yaml("data.yaml", {"model": "model", "sources": [source], "output_dir": "codes"})
    command_line.run("extract", data)

    image_processor = NextFlowImageProcessorPil(**NUMBERS).to_dict()
    image_processor = {name: image_processor[name] for name in NUMBERS}
    tokenizer = {**TRAINING, "stage": "decoder", "data": "images", "image_processor": image_processor}
    tokenizer |= {"vision_tokenizer_name_or_path": "model", "perceptual_loss_weight": 0.0}
    command_line.run("train", "tokenizer", write_yaml("tokenizer.yaml", tokenizer), "output_dir=runs/tokenizer")
    recipe = write_yaml("transformer.yaml", {**TRAINING, "model_name_or_path": "model", "train_codes": ["codes"]})
    command_line.run("train", "transformer", recipe, "output_dir=runs/full")
    command_line.run("train", "transformer", recipe, "output_dir=runs/lora", "use_peft=true", "lora_r=2")

    command_line.run("export", "runs/full", "--vision-tokenizer", "runs/tokenizer", "--output", "full")
    command_line.run("export", "runs/full", "--checkpoint", "2", "--output", "checkpoint")
    command_line.run("export", "runs/lora", "--output", "merged")
    command_line.run("generate", "image 1", "--model", "full", "--seed", "1", "--output", "drawn.png")
    command_line.run("generate", "a", "--model", "model", "--lora", "runs/lora", "--seed", "1", "--output", "lora.png")
    command_line.run("generate", "a", "--model", "merged", "--seed", "1", "--output", "merged.png")
    command_line.run("edit", "image 2", "--image", "drawn.png", "--model", "full", "--output", "edited.png")
    command_line.run("chat", "hello", "--max-new-tokens", "2", "--model", "full")
    command_line.run("reconstruct", "drawn.png", "--model", "full")

    Path("my_rewards.py").write_text(REWARD)
    Path("prompts.txt").write_text("".join(f"image {index}\n" for index in range(8)))
    grpo = {**TRAINING, "model": "full", "prompts": "prompts.txt", "rewards": ["my_rewards:redness"], "bf16": False}
    grpo |= {"num_generations": 2, "prefix_scales": 2}
    command_line.run("train", "grpo", write_yaml("grpo.yaml", grpo), "output_dir=runs/grpo")
    command_line.run("export", "runs/grpo", "--standalone", "--output", "aligned")
    codes, expected = without_the_package("aligned", tmp_path), drawn_codes("aligned")
    assert torch.equal(codes, expected)
    card = Path("aligned", "README.md").read_text()
    assert "| What | grpo |" in card and "| Started from | `full` |" in card and str(tmp_path) not in card
