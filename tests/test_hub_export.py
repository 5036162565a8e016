"""The exported repository: both libraries load the same bits from it, offline, and the demo draws with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from toy_decoder import toy_decoder_pipeline
from toy_pipeline import toy_pipeline
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, PreTrainedModel

from nextflow_hf import NextFlowPipeline, cli, hub_cards
from nextflow_hf.commands.demo import contact_sheet
from nextflow_hf.hub_cards.cards import create_card, pipeline_facts
from nextflow_hf.hub_cards.export import cast_copy, export_pipeline


RESULT = EvalResult(
    task_type="text-to-image",
    dataset_type="toy/prompts",
    dataset_name="Toy prompts",
    metric_type="accuracy",
    metric_value=0.6,
)
CARD = create_card("model", repo_id="toy/nextflow")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("tried to reach the network"))


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    pipe = toy_pipeline()
    pipe.transformer.generation_config.guidance_scale = 2.5
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    return export_pipeline(pipe, tmp_path_factory.mktemp("export") / "nextflow-toy", CARD)


def assert_equal_weights(model: PreTrainedModel, expected: PreTrainedModel):
    assert type(model) is type(expected)
    weights = expected.state_dict()
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name


def draw(pipe: NextFlowPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (20, 12), "red")
    return pipe("a", image=image, generator=torch.Generator().manual_seed(0), output_type="codes").image_codes


def test_layout(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "model_index.json", "README.md"} <= files
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= files
    assert {name for name in files if "/" in name and not name.endswith(".py")} == {
        "vision_tokenizer/config.json",
        "vision_tokenizer/model.safetensors",
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "NextFlowPipeline",
        "processor": ["nextflow_hf", "NextFlowProcessor"],
        "transformer": ["nextflow_hf", "NextFlowForCausalLM"],
        "vision_tokenizer": ["nextflow_hf", "NextFlowVisionTokenizer"],
    }


@pytest.mark.parametrize("loader", [NextFlowPipeline, DiffusionPipeline])
def test_diffusers_loads_it(pipe, folder, loader):
    loaded = loader.from_pretrained(folder)
    assert type(loaded) is NextFlowPipeline
    assert_equal_weights(loaded.transformer, pipe.transformer)
    assert_equal_weights(loaded.vision_tokenizer, pipe.vision_tokenizer)
    assert torch.equal(draw(loaded), draw(pipe))
    assert loaded.guidance_scale == 2.5


def test_transformers_loads_it(pipe, folder):
    assert_equal_weights(AutoModelForCausalLM.from_pretrained(folder), pipe.transformer)
    assert_equal_weights(AutoModel.from_pretrained(folder / "vision_tokenizer"), pipe.vision_tokenizer)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is type(pipe.processor)
    messages = [{"role": "user", "content": "a"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "generation_mode": "image"}
    inputs = processor.apply_chat_template(messages, **options)
    expected = pipe.processor.apply_chat_template(messages, **options)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


def test_a_second_export_and_a_nested_copy_are_the_same(pipe, folder, tmp_path):
    loaded = NextFlowPipeline.from_pretrained(folder)
    export_pipeline(loaded, tmp_path / "again", CARD)
    for path in folder.rglob("*"):
        # But for what transformers notes in a configuration on loading it
        if path.is_file() and path.parent == folder and path.name != "tokenizer_config.json":
            assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name
    loaded.save_pretrained(tmp_path / "nested")
    nested = DiffusionPipeline.from_pretrained(tmp_path / "nested")
    assert_equal_weights(nested.transformer, pipe.transformer)
    assert torch.equal(draw(nested), draw(pipe))


def test_without_code(pipe, folder, tmp_path):
    bare = export_pipeline(pipe, tmp_path, CARD, include_code=False)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    left = {path.relative_to(bare).as_posix() for path in bare.rglob("*") if path.is_file()}
    assert left == {name for name in files if not name.endswith(".py")} != files
    assert torch.equal(draw(NextFlowPipeline.from_pretrained(bare)), draw(pipe))


def test_float16_keeps_what_loading_in_float16_keeps(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    copied = cast_copy(pipe.transformer, torch.float16)
    assert len({parameter.dtype for parameter in copied.parameters()}) == 2
    assert_equal_weights(copied, loaded)


def test_shards(pipe, tmp_path):
    export_pipeline(pipe, tmp_path, CARD, max_shard_size="60KB")
    for name, part in [("", pipe.transformer), ("vision_tokenizer", pipe.vision_tokenizer)]:
        shards = list((tmp_path / name).glob("model-*-of-*.safetensors"))
        assert len(shards) > 1 and not (tmp_path / name / "model.safetensors").exists()
        assert_equal_weights(type(part).from_pretrained(tmp_path, subfolder=name), part)
    loaded = NextFlowPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded), draw(pipe))
    loaded.save_pretrained(tmp_path / "nested", max_shard_size="60KB")  # diffusers' own layout
    nested = NextFlowPipeline.from_pretrained(tmp_path / "nested")
    assert len(list((tmp_path / "nested" / "transformer").glob("model-*"))) > 1
    assert_equal_weights(nested.transformer, pipe.transformer)
    assert_equal_weights(nested.vision_tokenizer, pipe.vision_tokenizer)


def test_no_local_path_is_written(folder, tmp_path):
    loaded = NextFlowPipeline.from_pretrained(folder)
    export_pipeline(loaded, tmp_path / "again", CARD)
    for path in (tmp_path / "again").rglob("*"):
        if path.is_file():
            assert str(folder.parent).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, {"transformer": torch.bfloat16}], ids=["all", "transformer"])
def test_half_precision(pipe, dtype, tmp_path):
    loaded = NextFlowPipeline.from_pretrained(export_pipeline(pipe, tmp_path, CARD, dtype=dtype))
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.vision_tokenizer.dtype == (torch.bfloat16 if dtype is torch.bfloat16 else torch.float32)
    for name, parameter in loaded.vision_tokenizer.named_parameters():
        expected = pipe.vision_tokenizer.get_parameter(name)
        if name.startswith("quantizer."):  # the codebooks lose nothing
            assert torch.equal(parameter, expected)
        assert torch.equal(parameter, expected.to(parameter.dtype))
    assert pipe.transformer.dtype == torch.float32
    assert draw(loaded).shape == (1 + 2 * 2 + 2 * 4 + 3 * 5,)


def read_card(card: ModelCard, tmp_path) -> tuple[dict, str]:
    """Metadata and text as the Hub reads them from the file."""
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    text = loaded.content.replace("\r\n", "\n")
    assert "{{" not in text and "{%" not in text and "None" not in text and "\n\n\n" not in text
    return loaded.data.to_dict(), text


KINDS = {
    "model": ("transformers", "any-to-any", "finetune"),
    "vision_tokenizer": ("transformers", "image-feature-extraction", None),
    "adapter": ("peft", "any-to-any", "adapter"),
    "decoder": ("nextflow-hf", "image-to-image", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_card_of_every_kind(kind, tmp_path):
    result = EvalResult(
        task_type="text-to-image",
        dataset_type="toy/prompts",
        dataset_name="Toy prompts",
        metric_type="accuracy",
        metric_value=0.625,
    )
    card = create_card(
        kind,
        repo_id="toy/made",
        facts={"Width": "32"},
        training="Twice.",
        results=[result],
        limits="Many.",
        images={"a.png": "An image"},
        license="mit",
        base_model="toy/base",
        datasets=["toy/data"],
        tags=["more"],
    )
    metadata, text = read_card(card, tmp_path)
    library, pipeline_tag, relation = KINDS[kind]
    assert (metadata["library_name"], metadata["pipeline_tag"]) == (library, pipeline_tag)
    assert metadata.get("base_model_relation") == relation
    assert (metadata["base_model"], metadata["license"], metadata["datasets"]) == ("toy/base", "mit", ["toy/data"])
    assert {"nextflow", "arxiv:2601.02204", "more"} <= set(metadata["tags"])
    assert metadata["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.625}]
    for part in (
        "# made\n",
        "| Width | 32 |\n",
        "\n\n## Training\n\nTwice.\n\n",
        "| Toy prompts | accuracy | 0.625 |",
    ):
        assert part in text
    assert "![An image](a.png)" in text and "\n## Limits\n\nMany.\n" in text and text.endswith("```\n")
    assert '"toy/made"' in text
    assert ("toy/base" in text.split("---")[2]) == (kind in ("adapter", "decoder"))


def test_a_card_says_only_what_it_was_told(pipe, tmp_path):
    metadata, text = read_card(create_card("model", repo_id="toy/plain", facts=pipeline_facts(pipe)), tmp_path)
    assert set(metadata) == {"language", "library_name", "pipeline_tag", "tags"}
    assert "Evaluation" not in text and "Training" not in text and "Limits" not in text
    assert f"{pipe.transformer.num_parameters():,} parameters, 2 layers, width 32" in text


def test_the_snippet_of_a_decoder_draws(folder, tmp_path):
    toy_decoder_pipeline("unet").save_pretrained(tmp_path / "decoder")
    card = create_card("decoder", repo_id=str(tmp_path / "decoder"), base_model=str(folder), example="a")
    scope = {}
    exec(card.content.split("```python\n")[1].split("```")[0], scope)
    assert scope["image"].size == (16, 16)
    assert scope["decoder"].vision_tokenizer is scope["pipe"].vision_tokenizer


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lora", {}, "kind is 'lora', expected one of"),
        ("adapter", {}, "needs base_model"),
        ("decoder", {}, "needs base_model"),
    ],
)
def test_a_card_lacks_nothing_that_it_says(kind, options, message):
    with pytest.raises(ValueError, match=message):
        create_card(kind, repo_id="toy/made", **options)


DEMO = {"prompts": ["a red circle", "a blue ring"], "edits": [[1, "make the ring red"]], "stories": ["a circle moves"]}


@pytest.fixture
def shown(folder, tmp_path):
    """The toy with what it is shown with."""
    shown = shutil.copytree(folder, tmp_path / "shipped" / "nextflow-emoji")
    (shown / "demo.json").write_text(json.dumps(DEMO))
    return shown


def test_demo(shown, tmp_path, monkeypatch, capsys):
    assert cli.main(["demo", "--model", str(shown), "--output-dir", str(tmp_path / "first")]) == 0
    output = capsys.readouterr()
    sheet = tmp_path / "first" / "nextflow-emoji" / "contact_sheet.png"
    assert "2 prompts, 1 edits, 1 stories in" in output.out and str(sheet) in output.out
    assert "2 images, scale" in output.err and "1 edits, scale" in output.err and "4x4" in output.err
    files = sorted(sheet.parent.iterdir())
    assert [file.name for file in files[:3]] == [
        "01-a-red-circle.png",
        "02-a-blue-ring.png",
        "03-make-the-ring-red.png",
    ]
    assert Image.open(files[0]).size == (64, 64)
    monkeypatch.setattr(hub_cards, "files", lambda package: shown.parent)  # one of the two is installed
    assert hub_cards.emoji_model_path() == shown
    assert cli.main(["demo", "--output-dir", str(tmp_path / "second")]) == 0
    for file in files:
        assert (tmp_path / "second" / "nextflow-emoji" / file.name).read_bytes() == file.read_bytes()


def test_a_shipped_model_is_named_and_its_images_are_made_again(shown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub_cards, "files", lambda package: shown.parent)
    made, again = (str(tmp_path / name) for name in ("made.png", "again.png"))
    assert cli.main(["generate", "a", "--model", "nextflow-emoji", "--seed", "1", "--output", made]) == 0
    assert cli.main(["generate", "--from-image", made, "--output", again]) == 0, capsys.readouterr().err
    assert Image.open(made).tobytes() == Image.open(again).tobytes()


def test_demo_shows_only_what_the_model_is_said_to_do(shown, tmp_path, capsys):
    (shown / "demo.json").write_text(json.dumps({"prompts": DEMO["prompts"]}))
    assert cli.main(["demo", "--model", str(shown), "--output-dir", str(tmp_path)]) == 0
    assert len(list((tmp_path / "nextflow-emoji").iterdir())) == 3
    assert "edits" not in "".join(capsys.readouterr())
    assert cli.main(["demo", "--model", str(shown), "--output-dir", str(tmp_path), "--device", "cuda:99"]) == 2
    assert "--device is 'cuda:99', but here there is" in capsys.readouterr().err
    (shown / "demo.json").unlink()
    assert cli.main(["demo", "--model", str(shown), "--output-dir", str(tmp_path)]) == 2
    assert "has no demo.json, which says what a model is shown with" in capsys.readouterr().err


def test_a_sheet_has_room_for_its_texts_and_for_answers_without_images():
    image = Image.new("RGB", (16, 8), "red")
    short = contact_sheet([([image], "a"), ([image] * 3, "b"), ([], "c")])
    long = contact_sheet([([image], "word " * 30), ([image] * 3, "b"), ([], "c")])
    assert short.width == long.width and long.height - short.height == 17 * (6 - 2)
    assert short.getpixel((100, 100)) == (255, 0, 0) != short.getpixel((100, 30))  # as wide as the tile, not as high


def test_demo_without_the_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hub_cards, "files", lambda package: tmp_path)
    assert cli.main(["demo", "--output-dir", str(tmp_path / "out")]) == 2
    assert "no nextflow-shapes at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", hub_cards.SHIPPED)
def test_shipped_models_say_what_they_are_shown_with(name):
    if name not in hub_cards.installed_models():
        pytest.skip(f"{name} is not shipped")
    demo = json.loads((hub_cards.shipped_model_path(name) / "demo.json").read_text())
    assert demo["prompts"] and all(index < len(demo["prompts"]) for index, _ in demo.get("edits", ()))


@pytest.mark.parametrize("name", hub_cards.SHIPPED)
def test_shipped_models_are_small(name):
    folder = Path(hub_cards.__file__).parent / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40e6
