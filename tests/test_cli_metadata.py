"""How an image was made, in the image: read back, repeated to the pixel, changed; and what is refused."""

import json
import shutil

import pytest
from command_line import pixels, save_picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from toy_pipeline import toy_pipeline

import nextflow_hf
from nextflow_hf.commands import records
from nextflow_hf.commands.loading import weights_fingerprint
from nextflow_hf.commands.records import CHUNK, read_record


SAMPLING = {
    "guidance_scale": 3.0,
    "guidance_schedule": "constant",
    "temperature": [1.0, 1.0, 0.5, 0.5],
    "top_k": 8,
    "top_p": 1.0,
}
DRAWING = ["--guidance-scale", 3, "--temperature", "1,1,.5,.5", "--top-k", 8]


def rewrite(path, change) -> None:
    """The record of a PNG file as `change` makes it."""
    with Image.open(path) as image:
        record = json.loads(image.info[CHUNK])
        image.load()
    chunks = PngInfo()
    chunks.add_text(CHUNK, json.dumps(change(record)))
    image.save(path, pnginfo=chunks)


def test_what_an_image_says(command_line, model_folder):
    """Any tool can read it: one text chunk, whose keyword is "nextflow", with an object of JSON."""
    run = ["generate", "é 円", "--model", model_folder, "--seed", 7, "--aspect-ratio", "5:3", *DRAWING]
    command_line.run(*run, "--output", "a.png")
    with Image.open("a.png") as image:
        assert list(image.text) == ["nextflow"] and image.text["nextflow"].isascii()
        record = json.loads(image.text["nextflow"])
    pipe = toy_pipeline()
    assert record == {
        "format": 1,
        "command": "generate",
        "arguments": {
            "prompt": "é 円",
            "seed": 7,
            "model": model_folder,
            "device": "cpu",
            "dtype": "auto",
            "aspect_ratio": "5:3",
            **SAMPLING,
        },
        "weights": {name: weights_fingerprint(getattr(pipe, name)) for name in ("transformer", "vision_tokenizer")},
        "environment": record["environment"],
        "batch": {"seeds": [7], "index": 0},
        "results": {},
    }
    assert record["environment"]["nextflow-hf"] == nextflow_hf.__version__
    assert {"torch", "transformers", "diffusers"} < set(record["environment"])


def test_repeated_to_the_pixel_with_one_record(command_line, model_folder):
    run = ["generate", "a red circle", "--model", model_folder, "--seed", 7, *DRAWING, "--negative-prompt", "b"]
    command_line.run(*run, "--output", "a.png")
    said = command_line.json("generate", "--from-image", "a.png", "--output", "b.png")
    assert said["images"] == [
        {"path": "b.png", "prompt": "a red circle", "seed": 7, "width": 16, "height": 16, "identical": True}
    ]
    assert "the same as a.png, pixel for pixel" in command_line.errors
    assert pixels("a.png") == pixels("b.png") and read_record("a.png") == read_record("b.png")


def test_one_of_a_batch_is_repeated_in_its_company(command_line, model_folder, monkeypatch):
    command_line.run("generate", "a", "--model", model_folder, "--seed", 3, "--num-images", 3, "--output", "a.png")
    assert read_record("a-2.png").batch == {"seeds": [3, 4, 5], "index": 1}
    counts = []
    call = nextflow_hf.NextFlowPipeline.__call__

    def counted(self, *args, **kwargs):
        counts.append(kwargs["num_images_per_prompt"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nextflow_hf.NextFlowPipeline, "__call__", counted)
    (image,) = command_line.json("generate", "--from-image", "a-2.png", "--output", "b.png")["images"]
    assert counts == [3] and image["identical"] and image["seed"] == 4
    assert pixels("b.png") == pixels("a-2.png") and read_record("b.png") == read_record("a-2.png")
    # With a change it is drawn alone, and with others where that is asked for.
    (image,) = command_line.json("generate", "--from-image", "a-2.png", "--top-k", 2, "--output", "c.png")["images"]
    assert counts[1:] == [1] and image["seed"] == 4 and image["identical"] is None
    images = command_line.json("generate", "--from-image", "a-2.png", "--num-images", 2, "--output", "d.png")["images"]
    assert counts[2:] == [2] and [one["seed"] for one in images] == [4, 5]


def test_changes(command_line, model_folder):
    run = ["generate", "a", "--model", model_folder, "--seed", 7, "--height", 12, "--width", 20, *DRAWING]
    command_line.run(*run, "--output", "a.png")
    assert pixels("a.png")[0] == (20, 12)
    options = ["--seed", 8, "--aspect-ratio", "1:1", "--guidance-scale", 1]
    (image,) = command_line.json("generate", "b", "--from-image", "a.png", *options, "--output", "b.png")["images"]
    assert (image["prompt"], image["seed"], image["width"], image["identical"]) == ("b", 8, 16, None)
    run = ["generate", "b", "--model", model_folder, *options, "--temperature", "1,1,.5,.5", "--top-k", 8]
    command_line.run(*run, "--output", "c.png")
    assert pixels("b.png") == pixels("c.png") and read_record("b.png") == read_record("c.png")
    # What is said once more is no change.
    run = ["generate", "a", "--from-image", "a.png", "--seed", 7, "--height", 12, "--guidance-scale", 3]
    assert command_line.json(*run, "--output", "d.png")["images"][0]["identical"] is True


def test_thinking_is_repeated_and_turned_off(command_line, model_folder):
    run = ["generate", "a", "--model", model_folder, "--seed", 1, "--think", "--max-new-tokens", 6]
    command_line.run(*run, "--output", "a.png")
    assert command_line.json("generate", "--from-image", "a.png", "--output", "b.png")["images"][0]["identical"]
    assert read_record("a.png").results == read_record("b.png").results != {}
    assert "without `think=True`" in command_line.mistake("generate", "--from-image", "a.png", "--no-think")


def test_an_edit_names_its_sources(command_line, model_folder, tmp_path):
    (tmp_path / "in").mkdir()
    source, mask = save_picture(tmp_path / "in" / "source.png"), tmp_path / "in" / "mask.png"
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 8, 16))
    half.save(mask)
    run = [
        "edit",
        "a",
        "--image",
        "in/source.png",
        "--mask-image",
        "in/mask.png",
        "--model",
        model_folder,
        "--seed",
        1,
    ]
    command_line.run(*run, "--output", "out/a.png")
    arguments = read_record("out/a.png").arguments
    assert arguments["image"] == [{"path": str(source), "sha256": records.sha256(source)}]
    assert arguments["mask_image"] == {"path": str(mask), "sha256": records.sha256(mask)}

    def again(*options, output="b.png"):
        return command_line.json("edit", "--from-image", "out/a.png", *options, "--output", output)["images"][0]

    assert again()["identical"] and pixels("b.png") == pixels("out/a.png")
    source.rename(tmp_path / "out" / "source.png")  # beside the image
    assert again()["identical"]
    (tmp_path / "out" / "source.png").rename(tmp_path / "elsewhere.png")
    said = command_line.mistake("edit", "--from-image", "out/a.png")
    assert f"{source}, which out/a.png was made from, is missing" in said
    assert again("--image", "elsewhere.png")["identical"]  # the same file is no change
    save_picture(source, seed=1)
    said = command_line.mistake("edit", "--from-image", "out/a.png")
    assert f"{source} is not what out/a.png was made from: its SHA-256 is {records.sha256(source)}" in said
    assert again("--image", source, output="c.png")["identical"] is None
    assert pixels("c.png") != pixels("out/a.png")
    mask.unlink()
    assert "mask.png" in command_line.mistake("edit", "--from-image", "out/a.png", "--image", "elsewhere.png")


def test_a_conversation_names_its_images(command_line, model_folder, tmp_path):
    source = save_picture(tmp_path / "source.png")
    content = [{"type": "image", "path": "source.png"}, {"type": "text", "text": "a"}]
    (tmp_path / "messages.json").write_text(json.dumps([{"role": "user", "content": content}]))
    run = ["generate", "--messages", "messages.json", "--model", model_folder, "--seed", 1]
    command_line.run(*run, "--output", "a.png")
    (tmp_path / "messages.json").unlink()  # what it said is in the image
    assert command_line.json("generate", "--from-image", "a.png", "--output", "b.png")["images"][0]["identical"]
    save_picture(source, seed=1)
    assert "source.png is not what a.png was made from" in command_line.mistake("generate", "--from-image", "a.png")


def test_other_weights_are_refused(command_line, tmp_path):
    toy_pipeline().save_pretrained(tmp_path / "model")
    command_line.run("generate", "a", "--model", "model", "--seed", 1, "--output", "a.png")
    shutil.move(tmp_path / "model", tmp_path / "moved")
    other = toy_pipeline()
    other.transformer.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    other.save_pretrained(tmp_path / "model")
    said = command_line.mistake("generate", "--from-image", "a.png")
    assert "the transformer changed" in said and "--model" in said
    # The right ones may lie elsewhere, and the wrong ones may be wanted.
    run = ["generate", "--from-image", "a.png", "--output", "b.png"]
    assert command_line.json(*run, "--model", "moved")["images"][0]["identical"] is True
    assert command_line.json(*run, "--model", tmp_path / "model")["images"][0]["identical"] is None


def test_a_repetition_that_is_none_says_why(command_line, model_folder):
    command_line.run("generate", "a", "--model", model_folder, "--seed", 1, "--output", "a.png")

    def change(record):
        record["environment"]["torch"] = "1.0"
        record["arguments"]["seed"] = 2
        record["batch"]["seeds"] = [2]
        return record

    rewrite("a.png", change)
    said = command_line.json("generate", "--from-image", "a.png", "--output", "b.png", status=1)
    assert said["images"][0]["identical"] is False
    assert "not quite the same as a.png: torch was 1.0 and is" in command_line.errors
    # It is compared with what it was, also where it is overwritten.
    command_line.run("generate", "--from-image", "a.png", "--output", "a.png", status=1)
    assert pixels("a.png") == pixels("b.png")


def test_a_device_that_is_not_here_is_refused(command_line, model_folder):
    command_line.run("generate", "a", "--model", model_folder, "--seed", 1, "--output", "a.png")
    rewrite("a.png", lambda record: record | {"arguments": record["arguments"] | {"device": "cuda:99"}})
    assert "--device is 'cuda:99'" in command_line.mistake("generate", "--from-image", "a.png")
    run = ["generate", "--from-image", "a.png", "--device", "cpu", "--output", "b.png"]
    assert command_line.json(*run)["images"][0]["identical"] is None
    assert pixels("a.png") == pixels("b.png")


def test_without_metadata(command_line, model_folder):
    run = ["generate", "a", "--model", model_folder, "--seed", 1, "--output", "a.png", "--no-metadata"]
    command_line.run(*run)
    with Image.open("a.png") as image:
        assert not image.text
    assert "a.png does not say how it was made" in command_line.mistake("generate", "--from-image", "a.png")
    assert "a.png does not say how it was made" in command_line.mistake("info", "a.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record | {"format": 2}, "it has format 2, expected 1: update nextflow-hf"),
        (lambda record: [], "cannot be used"),
        (lambda record: {"format": 1}, "cannot be used"),
        (lambda record: record | {"command": "edit"}, "was made by `nextflow-hf edit`, not by `generate`"),
        (lambda record: record | {"arguments": {"trust": 1}}, "has ['trust'], which this version does not know"),
        (lambda record: record | {"arguments": 1}, "cannot be used"),
        (lambda record: record | {"batch": None}, "cannot be used"),
        (lambda record: record | {"batch": {"seeds": [1], "index": 1}}, "cannot be used"),
    ],
)
def test_metadata_that_cannot_be_used(command_line, model_folder, change, message):
    command_line.run("generate", "a", "--model", model_folder, "--seed", 1, "--output", "a.png")
    rewrite("a.png", change)
    assert message in command_line.mistake("generate", "--from-image", "a.png")


def test_files_that_are_no_image_of_ours(command_line, tmp_path):
    assert "No such file" in command_line.mistake("generate", "--from-image", "none.png")
    (tmp_path / "text.png").write_text("text")
    assert "text.png is not an image" in command_line.mistake("generate", "--from-image", "text.png")
    save_picture(tmp_path / "picture.jpg")
    assert "does not say how it was made" in command_line.mistake("generate", "--from-image", "picture.jpg")


def test_fingerprints_tell_weights_apart():
    first, second = toy_pipeline().transformer, toy_pipeline().transformer
    assert weights_fingerprint(first) == weights_fingerprint(second)
    second.fuse_qkv_projections()
    assert second.is_fused and weights_fingerprint(first) == weights_fingerprint(second)
    second.model.norm.weight.data[3] += 1e-3
    assert weights_fingerprint(first) != weights_fingerprint(second)
    assert weights_fingerprint(first) != weights_fingerprint(first.bfloat16())
