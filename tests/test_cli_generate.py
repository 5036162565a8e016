"""`nextflow-hf generate` and `edit`: what the pipeline draws, as files."""

import inspect
import json

import pytest
import torch
from command_line import pixels, save_picture, use_pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from toy_decoder import toy_whole_pipeline
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.commands import edit, generate
from nextflow_hf.commands.images import SETTINGS
from nextflow_hf.commands.records import read_record


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load(model_folder: str) -> NextFlowPipeline:
    pipe = NextFlowPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_settings_are_the_pipelines_arguments_and_options_of_a_command():
    known = set(inspect.signature(NextFlowPipeline.__call__).parameters)
    assert set(SETTINGS) <= known
    options = {action.dest for make in (generate.make_parser, edit.make_parser) for action in make()._actions}
    assert set(SETTINGS) <= options


def test_an_image_is_the_one_of_the_pipeline(command_line, model_folder):
    settings = {"guidance_scale": [3.0, 2.0, 1.0, 1.5], "temperature": 0.9, "top_k": 8, "negative_prompt": "b"}
    said = command_line.run(
        *("generate", "a", "--model", model_folder, "--seed", 5, "--output", "out/a.png", "--aspect-ratio", "5:3"),
        *("--guidance-scale", "3,2,1,1.5", "--temperature", 0.9, "--top-k", 8, "--negative-prompt", "b"),
    )
    expected = load(model_folder)("a", aspect_ratio="5:3", generator=seeded(5), **settings).images[0]
    assert pixels("out/a.png") == (expected.size, expected.tobytes())
    assert said == f"out/a.png  {expected.width} x {expected.height}, seed 5\n"
    assert "scale" in command_line.errors and "4/4" in command_line.errors  # the bar over the scales


def test_commands_sample_by_fused_layers(command_line, model_folder, monkeypatch):
    pipe = load(model_folder)
    use_pipeline(monkeypatch, pipe)
    command_line.run("generate", "a", "--model", model_folder, "--output", "a.png")
    assert pipe.transformer.is_fused
    pipe.transformer.unfuse_qkv_projections()
    pipe.transformer.bfloat16()  # which rounds otherwise
    command_line.run("generate", "a", "--model", model_folder, "--output", "b.png")
    assert not pipe.transformer.is_fused
    pipe.transformer.float().add_adapter(LoraConfig(r=4, target_modules=["v_proj"]))
    command_line.run("generate", "a", "--model", model_folder, "--output", "b.png")
    assert not pipe.transformer.is_fused and "fused" not in command_line.errors


def test_the_command_line_and_python_load_what_was_saved(command_line, tmp_path):
    """One rule for both: without a dtype, each component in the one that it was saved in."""
    whole = toy_pipeline()
    whole.transformer.to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "half")
    half = load(tmp_path / "half")
    assert (half.dtype, half.vision_tokenizer.dtype) == (torch.bfloat16, torch.float32)
    run = ["generate", "a", "--model", tmp_path / "half", "--seed", 3, "--guidance-scale", 2, "--output", "a.png"]
    assert command_line.json(*run)["dtype"] == "bfloat16"
    expected = half("a", guidance_scale=2.0, generator=seeded(3)).images[0]
    assert pixels("a.png") == (expected.size, expected.tobytes())
    assert command_line.json(*run, "--dtype", "float32")["dtype"] == "float32"
    expected = NextFlowPipeline.from_pretrained(tmp_path / "half", dtype=torch.float32)
    expected = expected("a", guidance_scale=2.0, generator=seeded(3)).images[0]
    assert pixels("a.png") == (expected.size, expected.tobytes())


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_cpu_that_is_slow_in_bfloat16_is_said(command_line, tmp_path, monkeypatch, saved, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    toy_pipeline().to(saved).save_pretrained(tmp_path / "saved")
    run = ["generate", "a", "--model", tmp_path / "saved", "--device", "cpu", "--output", "a.png"]
    command_line.run(*run)
    is_slow = saved == torch.bfloat16 and capability == "AVX2"
    assert ("no instructions for bfloat16" in command_line.errors) == is_slow
    for answer in (["--dtype", "float32"], ["--quiet"]):
        command_line.run(*run, *answer)
        assert "instructions" not in command_line.errors


def test_json(command_line, model_folder):
    said = command_line.json("generate", "a", "--model", model_folder, "--seed", 1, "--output", "a.png")
    assert {name: type(value) for name, value in said.items()} == {
        "command": str,
        "model": str,
        "device": str,
        "dtype": str,
        "load_seconds": float,
        "seconds": float,
        "images": list,
    }
    assert (said["command"], said["model"], said["device"], said["dtype"]) == (
        "generate",
        model_folder,
        "cpu",
        "float32",
    )
    assert said["images"] == [{"path": "a.png", "prompt": "a", "seed": 1, "width": 16, "height": 16}]


def test_quiet_says_nothing_but_the_result(command_line, model_folder, caplog):
    assert (
        command_line.run("generate", "a", "--model", model_folder, "--seed", 1, "--quiet")
        == "a-1.png  16 x 16, seed 1\n"
    )
    assert "scale" not in command_line.errors and "nextflow-hf" not in command_line.errors


def test_several_images_count_their_seeds_on(command_line, model_folder):
    run = ["generate", "a", "--model", model_folder, "--seed", 3, "--num-images", 3, "--batch-size", 2]
    said = command_line.json(*run, "--output", "a.png")
    assert [(one["path"], one["seed"]) for one in said["images"]] == [("a-1.png", 3), ("a-2.png", 4), ("a-3.png", 5)]
    for one in said["images"]:  # each is the one that its seed draws alone
        command_line.run("generate", "a", "--model", model_folder, "--seed", one["seed"], "--output", "alone.png")
        assert pixels("alone.png") == pixels(one["path"])


def test_names_overwrite_nothing(command_line, model_folder):
    run = ["generate", "A red circle, please!", "--model", model_folder, "--seed", 3]
    names = [command_line.json(*run)["images"][0]["path"] for _ in range(2)]
    names += [command_line.json(*run, "--output", "folder")["images"][0]["path"]]
    assert names == [
        "a-red-circle-please-3.png",
        "a-red-circle-please-3-2.png",
        "folder/a-red-circle-please-3.png",
    ]


def test_a_random_seed_is_told(command_line, model_folder):
    seeds = {command_line.json("generate", "a", "--model", model_folder)["images"][0]["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_prompts_of_a_file(command_line, model_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n\n  b  \n")
    run = [
        "generate",
        "--prompts",
        "prompts.txt",
        "--model",
        model_folder,
        "--seed",
        1,
        "--num-images",
        2,
        "--output",
        "x.png",
    ]
    images = command_line.json(*run)["images"]
    assert [(one["prompt"], one["seed"]) for one in images] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert [one["path"] for one in images] == ["x-1.png", "x-2.png", "x-3.png", "x-4.png"]
    command_line.run("generate", "b", "--model", model_folder, "--seed", 2, "--output", "b.png")
    assert pixels("b.png") == pixels("x-4.png")


def test_a_preview_grows_into_the_image(command_line, model_folder):
    run = ["generate", "a", "--model", model_folder, "--seed", 1, "--num-images", 2, "--output", "a.png"]
    images = command_line.json(*run, "--preview", "grow.png")["images"]
    assert [one["preview"] for one in images] == ["grow-1.png", "grow-2.png"]
    for one in images:
        strip = Image.open(one["preview"])
        assert strip.size == (4 * 16, 16)
        assert strip.crop((48, 0, 64, 16)).tobytes() == pixels(one["path"])[1]
    previews = list(load(model_folder).preview("a", generator=seeded(1)))
    assert Image.open("grow-1.png").crop((16, 0, 32, 16)).tobytes() == previews[1].images[0].tobytes()
    command_line.run(*run[:6], "--output", "a.png", "--preview", "grow.gif")
    assert Image.open("grow.gif").n_frames >= 4


def test_fewer_scales(command_line, model_folder):
    command_line.run("generate", "a", "--model", model_folder, "--seed", 1, "--num-scales", 2, "--output", "a.png")
    expected = load(model_folder)("a", num_scales=2, generator=seeded(1)).images[0]
    assert pixels("a.png")[1] == expected.tobytes()


def test_thinking_is_told_and_recorded(command_line, model_folder):
    run = [
        "generate",
        "a",
        "--model",
        model_folder,
        "--seed",
        1,
        "--think",
        "--max-new-tokens",
        6,
        "--output",
        "a.png",
    ]
    (image,) = command_line.json(*run)["images"]
    output = load(model_folder)("a", think=True, max_new_tokens=6, generator=seeded(1))
    expected = {"thought": output.thoughts[0], "final_prompt": output.final_prompts[0]}
    assert {name: image[name] for name in expected} == expected == read_record("a.png").results
    assert pixels("a.png")[1] == output.images[0].tobytes()


def test_a_conversation_is_shown_first(command_line, model_folder, tmp_path):
    """In-context learning: the image parts are paths beside the file."""
    (tmp_path / "shown").mkdir()
    before, after = (save_picture(tmp_path / "shown" / f"{index}.png", index) for index in range(2))
    content = [
        {"type": "image", "path": "0.png"},
        {"type": "text", "text": "is to"},
        {"type": "image", "path": "1.png"},
    ]
    (tmp_path / "shown" / "pairs.json").write_text(json.dumps([{"role": "user", "content": content}]))
    run = ["generate", "--model", model_folder, "--seed", 1, "--messages", "shown/pairs.json"]
    command_line.run(*run, "--output", "a.png")
    parts = [{"type": "image", "image": before}, content[1], {"type": "image", "image": after}]
    messages = [{"role": "user", "content": parts}]
    expected = load(model_folder)(messages=messages, generator=seeded(1)).images[0]
    assert pixels("a.png")[1] == expected.tobytes()

    command_line.run(*run, "and now", "--output", "b.png")
    messages.append({"role": "user", "content": [{"type": "text", "text": "and now"}]})
    expected = load(model_folder)(messages=messages, generator=seeded(1)).images[0]
    assert pixels("b.png")[1] == expected.tobytes()


def test_an_edit_of_two_images(command_line, model_folder, tmp_path):
    wide, square = save_picture(tmp_path / "wide.png", size=(20, 12)), save_picture(tmp_path / "square.png", 1)
    command_line.run(
        *("edit", "a", "--image", wide, "--image", square, "--model", model_folder, "--seed", 2, "--output", "a.png"),
        *("--image-guidance-scale", 1.5, "--guidance-scale", 2),
    )
    options = {"image_guidance_scale": 1.5, "guidance_scale": 2.0, "generator": seeded(2)}
    expected = load(model_folder)("a", image=[wide, square], **options).images[0]
    assert pixels("a.png") == ((20, 12), expected.tobytes())


def test_an_edit_does_not_overwrite_its_source(command_line, model_folder, tmp_path):
    image, mask = (save_picture(tmp_path / f"{name}.png") for name in ("a-2", "mask"))
    run = ["edit", "a", "--model", model_folder, "--image", "a-2.png", "--mask-image", "mask.png", "--output"]
    for wrong, source, more in (("./a-2.png", "a-2", []), ("a.png", "a-2", ["--num-images", 2]), (mask, "mask", [])):
        said = command_line.mistake(*run, wrong, *more)
        assert f"which would overwrite the source {source}.png" in said
    command_line.run("edit", "a", "--model", model_folder, "--image", image, "--output", "a.png")


def test_an_edit_of_a_part(command_line, model_folder, tmp_path):
    source = save_picture(tmp_path / "source.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    mask.save(tmp_path / "mask.png")
    run = [
        "edit",
        "a",
        "--image",
        source,
        "--model",
        model_folder,
        "--seed",
        2,
        "--keep-scales",
        1,
        "--output",
        "a.png",
    ]
    command_line.run(*run, "--mask-image", "mask.png", "--mask-coverage", 0.5)
    options = {"keep_scales": 1, "mask_image": mask, "mask_coverage": 0.5, "generator": seeded(2)}
    expected = load(model_folder)("a", image=source, **options).images[0]
    assert pixels("a.png")[1] == expected.tobytes()


def test_a_lora(command_line, model_folder, tmp_path):
    adapted = toy_pipeline().transformer
    adapted.add_adapter(LoraConfig(r=4, target_modules=["v_proj", "up_proj"], init_lora_weights=False))
    NextFlowPipeline.save_lora_weights(
        tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(adapted, save_embedding_layers=False)
    )
    run = ["generate", "a", "--model", model_folder, "--seed", 1, "--guidance-scale", 2]
    command_line.run(*run, "--lora", "lora=3.5", "--output", "a.png")
    pipe = load(model_folder)
    plain = pipe("a", guidance_scale=2.0, generator=seeded(1), output_type="pt").images
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="x")
    pipe.set_adapters(["x"], [3.5])
    adapted = pipe("a", guidance_scale=2.0, generator=seeded(1), output_type="pt").images
    assert not torch.equal(plain, adapted)
    assert pixels("a.png")[1] == pipe("a", guidance_scale=2.0, generator=seeded(1)).images[0].tobytes()
    assert read_record("a.png").arguments["lora"] == [f"{tmp_path / 'lora'}=3.5"]
    again = ["generate", "--from-image", "a.png", "--output", "b.png", "--lora"]
    assert command_line.json(*again, "lora=3.5")["images"][0]["identical"] is True
    assert command_line.json(*again, "lora=0.12345678")["images"][0]["identical"] is None  # another one is asked for
    assert read_record("b.png").arguments["lora"] == [f"{tmp_path / 'lora'}=0.12345678"]
    assert "expected PATH or PATH=SCALE" in command_line.mistake(*run, "--lora", "lora=much")


def test_a_quantised_transformer(command_line, tmp_path):
    blocks = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    toy_pipeline(**blocks).save_pretrained(tmp_path / "wide")
    run = ["generate", "a", "--model", "wide", "--quantize", "4bit", "--dtype", "bfloat16", "--seed", 1]
    assert command_line.json(*run, "--output", "a.png")["dtype"] == "bfloat16"
    assert command_line.json("generate", "--from-image", "a.png", "--output", "b.png")["images"][0]["identical"]


def test_the_diffusion_decoder(command_line, monkeypatch):
    pipe = toy_whole_pipeline()
    use_pipeline(monkeypatch, pipe)
    run = ["generate", "a", "--model", "toy/model", "--seed", 1, "--preview", "grow.png", "--output", "a.png"]
    command_line.run(*run, "--decoder", "diffusion", "--decoder-num-inference-steps", 2)
    pipe.set_progress_bar_config(disable=True)
    options = {"decoder": "diffusion", "decoder_num_inference_steps": 2, "generator": seeded(1)}
    expected = pipe("a", **options).images[0]
    assert pixels("a.png") == (expected.size, expected.tobytes())
    record = read_record("a.png")
    assert {name: record.arguments[name] for name in ("decoder", "decoder_num_inference_steps")} == {
        "decoder": "diffusion",
        "decoder_num_inference_steps": 2,
    }
    with Image.open("grow.png") as strip:  # four scales, then the decoder's
        assert strip.width == 5 * expected.width
    assert command_line.json("generate", "--from-image", "a.png", "--output", "b.png")["images"][0]["identical"]
    other = command_line.json("generate", "--from-image", "a.png", "--decoder", "vq", "--output", "c.png")
    assert other["images"][0]["identical"] is None
    assert pixels("c.png")[1] == pipe("a", generator=seeded(1)).images[0].tobytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate"], "got no prompt"),
        (["generate", "a", "red", "circle"], 'expected one, in quotes: "a red circle"'),
        (["generate", "a", "--num-images", 0], "--num-images: 0 is out of range, expected 1 to"),
        (["generate", "a", "--seed", -1], "--seed is -1, expected 0 to"),
        (["generate", "a", "--output", "a.jpg"], "expected a .png"),
        (["generate", "a", "--preview", "a.avi"], "--preview is a.avi, expected a .gif"),
        (["generate", "a", "--preview", "a.png", "--output", "a.png"], "--output and --preview are both a.png"),
        (["generate", "a", "--height", 16], "got only height, expected height and width"),
        (["generate", "a", "--aspect-ratio", "wide"], "aspect_ratio is 'wide'"),
        (["generate", "a", "--num-scales", 9], "`num_scales` is 9, expected at most 4"),
        (["generate", "a", "--guidance-scale", "much"], "argument --guidance-scale: invalid float, or a comma"),
        (["generate", "a", "--decoder", "diffusion"], "this pipeline has no diffusion decoder"),
        (["generate", "a", "--max-new-tokens", 3], "without `think=True`"),
        (["generate", "a", "--device", "cuda:7"], "--device is 'cuda:7', but here there is"),
        (["generate", "a", "--revision", "v2"], "--revision is 'v2', but"),
        (["generate", "a", "--device", "toaster"], "--device is 'toaster', expected cpu, cuda"),
        (["generate", "a", "--device", "cpu", "--offload"], "--offload needs an accelerator"),
        (["generate", "a", "--prompts", "none.txt"], "--prompts goes with neither"),
        (["generate", "--prompts", "none.txt"], "none.txt"),
        (["generate", "--messages", "none.json"], "none.json"),
        (["edit", "a"], "got no image"),
        (["edit", "a", "--image", "none.png"], "none.png does not exist"),
        (["edit", "a", "--image", "."], "the image . is a folder"),
    ],
)
def test_mistakes(command_line, model_folder, argv, message):
    assert message in command_line.mistake(*argv, "--model", model_folder)


def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_is_sampled(command_line, model_folder, tmp_path):
    (tmp_path / "file").touch()
    said = command_line.mistake("generate", "a", "--model", model_folder, "--output", "file")
    assert "--output is the file file, expected a folder" in said


def test_mistakes_in_json(command_line, model_folder):
    said = command_line.json("generate", "a", "--model", model_folder, "--height", 16, status=2)
    assert said["error"]["type"] == "ValueError" and "expected height and width" in said["error"]["message"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no conversation"),
        ('[{"role": "user"}]', "holds no conversation"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "an image part is"),
        ('[{"role": "user", "content": [{"type": "image", "path": "none.png"}]}]', "none.png does not exist"),
    ],
)
def test_mistakes_in_a_conversation(command_line, model_folder, tmp_path, text, message):
    (tmp_path / "messages.json").write_text(text)
    assert message in command_line.mistake("generate", "--messages", "messages.json", "--model", model_folder)


def test_a_shipped_model_is_named_for_its_parts_too(command_line):
    said = command_line.mistake("generate", "a", "--vision-tokenizer", "nextflow-emoji")
    assert "knows the codes of the vision tokenizer" in said  # it was loaded, and is not that of Shapes


def test_a_model_that_is_none(command_line, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "model_index.json is missing" in command_line.mistake("generate", "a", "--model", "empty")
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "is a FluxPipeline" in command_line.mistake("generate", "a", "--model", "empty")
    assert "neither a folder nor a Hub id" in command_line.mistake("generate", "a", "--model", "none")

    def unreachable(*args, **kwargs):
        raise OSError("nobody answers")

    monkeypatch.setattr(NextFlowPipeline, "from_pretrained", unreachable)
    said = command_line.mistake("generate", "a", "--model", "some/one")
    assert "'some/one' is no folder here, and it was not loaded from the Hub: nobody answers" in said


def test_out_of_memory_says_what_helps_and_a_bug_keeps_its_traceback(command_line, model_folder, monkeypatch):
    for error, kind in ((torch.OutOfMemoryError("too much"), "OutOfMemoryError"), (RuntimeError("a bug"), None)):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(NextFlowPipeline, "__call__", fail)
        if kind is None:
            with pytest.raises(RuntimeError, match="a bug"):
                command_line.run("generate", "a", "--model", model_folder)
        else:
            said = command_line.mistake("generate", "a", "--model", model_folder)
            assert "too much" in said and "--quantize 4bit" in said


def test_an_interruption(command_line, model_folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(NextFlowPipeline, "__call__", interrupt)
    command_line.run("generate", "a", "--model", model_folder, status=130)
    assert "interrupted" in command_line.errors
