"""A repository that was uploaded or saved loads where `nextflow_hf` is missing, and draws the same codes there."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants, hf_api
from PIL import Image
from toy_hub import ToyHub
from toy_pipeline import toy_pipeline
from transformers import AutoModelForCausalLM

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import code_files, export_pipeline, push_folder


# Runs in this process with the installed classes and, word for word, in one without them.
DRAW = """
def draw(model, vision_tokenizer, processor):
    image = Image.new("RGB", (20, 12), "red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "a"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "generation_mode": "image"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    source = vision_tokenizer.encode(inputs.pop("pixel_values"), inputs["image_grids"][:-1]).image_codes
    generator = torch.Generator().manual_seed(0)
    output = model.generate(**inputs, image_codes=source, generation_mode="image", generator=generator)
    pixels = vision_tokenizer.decode(output.image_codes, output.image_grids)
    images = processor.image_processor.post_process_images(pixels, output.image_grids, output_type="pt")
    return [source, output.image_codes, *images]

def draw_with_pixels(model, processor):
    image = Image.new("RGB", (20, 12), "red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "a"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "generation_mode": "image"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    output = model.generate(**inputs, generation_mode="image", generator=torch.Generator().manual_seed(0))
    images = processor.post_process_multimodal_output(
        model.decode_image_tokens(output), generation_mode="image", image_grids=output.image_grids, output_type="pt"
    )
    return [output.image_codes, *images]
"""
WITHOUT_THE_PACKAGE = f"""
import json, sys
sys.modules["nextflow_hf"] = None  # its import fails
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
{DRAW}
local, plain, repo, drawn_file = sys.argv[1:]
trust = {{"trust_remote_code": True}}
drawn, loaded = {{}}, {{}}
for name, root, vision_tokenizer in [
    ("local", local, AutoModel.from_pretrained(local + "/vision_tokenizer", **trust)),
    ("plain", plain, AutoModel.from_pretrained(plain + "/vision_tokenizer", **trust)),
    ("hub", repo, AutoModel.from_pretrained(repo, subfolder="vision_tokenizer", **trust)),
]:
    model = AutoModelForCausalLM.from_pretrained(root, **trust)
    processor = AutoProcessor.from_pretrained(root, **trust)
    drawn[name] = draw(model, vision_tokenizer, processor)
    objects = [AutoConfig.from_pretrained(root, **trust), model, vision_tokenizer, processor]
    objects += [processor.image_processor, AutoImageProcessor.from_pretrained(root, **trust)]
    loaded[name] = [(type(one).__module__, type(one).__name__) for one in objects]
for name, root in (("local", local), ("hub", repo)):
    both = AutoModelForMultimodalLM.from_pretrained(root, **trust)
    drawn[name + ", both in one"] = draw_with_pixels(both, AutoProcessor.from_pretrained(root, **trust))
    loaded[name + ", both in one"] = type(AutoModelForImageTextToText.from_pretrained(root, **trust)).__name__
loaded["base"] = [type(AutoModel.from_pretrained(root, **trust)).__name__ for root in (local, repo)]
refused = []
for load in (AutoModelForCausalLM, AutoProcessor):
    try:
        load.from_pretrained(local, trust_remote_code=False)
    except ValueError as error:
        refused.append("trust_remote_code=True" in str(error))
loaded["refused"] = refused
assert "diffusers" not in sys.modules

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
card = open(hf_hub_download(repo, "README.md"), encoding="utf-8").read()
exec(card.split("```python\\n")[2].split("```")[0])  # its snippet for here makes `pipe`
pipe.set_progress_bar_config(disable=True)
options = {{"generator": torch.Generator().manual_seed(0), "output_type": "codes"}}
drawn["pipeline"] = [pipe("a", image=Image.new("RGB", (20, 12), "red"), **options).image_codes]
try:
    DiffusionPipeline.from_pretrained(repo, **trust)
except ValueError as error:
    loaded["diffusers"] = str(error)
torch.save(drawn, drawn_file)
print(json.dumps(loaded))
"""
TOKEN = "hf_thisIsNoToken"


def draw(model, vision_tokenizer, processor) -> list[torch.Tensor]:
    scope = {"torch": torch, "Image": Image}
    exec(DRAW, scope)
    return scope["draw"](model, vision_tokenizer, processor)


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    pipe = toy_pipeline()
    pipe.vision_tokenizer.requires_grad_(False)
    return pipe


@pytest.fixture(scope="module")
def hub(pipe, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, ToyHub() as hub:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made anew, with this address
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        card = create_card("model", repo_id="your-name/nextflow")
        folder = export_pipeline(pipe, tmp_path_factory.mktemp("pushed"), card, max_shard_size="60KB")
        push_folder(folder, "toy/nextflow", token=TOKEN)
        yield hub


@pytest.fixture(scope="module")
def without_the_package(pipe, hub, tmp_path_factory) -> tuple[dict, dict]:
    """What a process without the package drew and loaded, from an export, plain saves and the Hub."""
    folder = tmp_path_factory.mktemp("remote")
    local = export_pipeline(pipe, folder / "a model.v1", create_card("model", repo_id="toy/nextflow"))
    plain = folder / "plain"
    pipe.transformer.save_pretrained(plain)
    pipe.processor.save_pretrained(plain)
    pipe.vision_tokenizer.save_pretrained(plain / "vision_tokenizer")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    arguments = [str(local), str(plain), "toy/nextflow", str(folder / "drawn.pt")]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "drawn.pt"), json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("source", ["local", "plain", "hub"])
def test_it_loads_and_draws_the_same_without_the_package(pipe, without_the_package, source):
    drawn, loaded = without_the_package
    names = ["NextFlowConfig", "NextFlowForCausalLM", "NextFlowVisionTokenizer", "NextFlowProcessor"]
    image_processor = type(pipe.processor.image_processor).__name__
    assert [name for _, name in loaded[source]] == [*names, image_processor, image_processor]
    assert all(module.startswith("transformers_modules.") for module, _ in loaded[source])
    expected = draw(pipe.transformer, pipe.vision_tokenizer, pipe.processor)
    assert len(drawn[source]) == len(expected) == 3
    assert all(torch.equal(one, other) for one, other in zip(drawn[source], expected))


@pytest.mark.parametrize("source", ["local", "hub"])
def test_so_does_the_model_that_takes_pixels(without_the_package, source):
    drawn, loaded = without_the_package
    assert loaded[source + ", both in one"] == "NextFlowForConditionalGeneration"
    both, apart = drawn[source + ", both in one"], drawn[source][1:]
    assert len(both) == len(apart) == 2
    assert all(torch.equal(one, other) for one, other in zip(both, apart))


def test_the_transformer_without_its_head_has_its_auto_class(without_the_package):
    assert without_the_package[1]["base"] == ["NextFlowModel", "NextFlowModel"]


def test_code_runs_only_where_it_is_trusted(without_the_package):
    assert without_the_package[1]["refused"] == [True, True]


def test_the_cards_snippet_makes_the_pipeline_without_the_package(pipe, without_the_package):
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "codes"}
    expected = pipe("a", image=Image.new("RGB", (20, 12), "red"), **options).image_codes
    assert torch.equal(without_the_package[0]["pipeline"][0], expected)


def test_diffusers_own_loader_needs_the_package(without_the_package):
    """It looks for code in a component's folder: see hub_cards/export.py. When this fails, the card can say more."""
    assert "nextflow_hf.py as defined in `model_index.json` does not exist" in without_the_package[1]["diffusers"]


def test_an_upload_is_one_whole_repository(hub, pipe):
    files = hub.files["toy/nextflow"]
    assert [path for method, path in hub.requests if "/commit/" in path] == ["/api/models/toy/nextflow/commit/main"]
    assert {"README.md", "model_index.json", "config.json", "generation_config.json", "tokenizer.json"} <= set(files)
    for folder in ("", "vision_tokenizer/"):  # every shard, and every class that is named
        index = json.loads(files[f"{folder}model.safetensors.index.json"])
        shards = {folder + name for name in index["weight_map"].values()}
        assert len(shards) > 1 and shards <= set(files)
        classes = json.loads(files[f"{folder}config.json"])["auto_map"]
        for name, reference in classes.items():
            module, class_name = reference.split(".")
            assert f"class {class_name}(".encode() in files[f"{folder}{module}.py"], name
    references = json.loads(files["processor_config.json"])
    references = references["auto_map"] | references["image_processor"]["auto_map"]
    assert {f"{reference.split('.')[0]}.py" for reference in references.values()} <= set(files)
    assert b'"toy/nextflow"' in files["README.md"]  # the snippet loads this repository


def test_code_is_that_of_the_package(hub):
    files = hub.files["toy/nextflow"]
    assert {name for name in files if name.endswith(".py") and "/" not in name} == set(code_files())
    for name, content in files.items():
        if name.endswith(".py"):
            assert content == code_files()[name.split("/")[-1]].read_bytes()


def test_nothing_of_this_machine_is_uploaded(hub):
    home, here = os.path.expanduser("~"), os.getcwd()
    for name, content in hub.files["toy/nextflow"].items():
        for secret in (TOKEN, "/tmp", here, home if len(home) > 1 else here, hub.url):
            assert secret.encode() not in content, (name, secret)


@pytest.mark.parametrize("loader", [NextFlowPipeline, DiffusionPipeline])
def test_the_package_loads_it_from_the_hub(hub, pipe, loader, tmp_path):
    loaded = loader.from_pretrained("toy/nextflow", cache_dir=tmp_path)
    assert type(loaded) is NextFlowPipeline
    expected = draw(pipe.transformer, pipe.vision_tokenizer, pipe.processor)
    drawn = draw(loaded.transformer, loaded.vision_tokenizer, loaded.processor)
    assert all(torch.equal(one, other) for one, other in zip(drawn, expected))


@pytest.mark.parametrize("trust", [None, True])
def test_the_package_is_preferred_to_the_code_in_the_repository(hub, pipe, trust, tmp_path):
    model = AutoModelForCausalLM.from_pretrained("toy/nextflow", cache_dir=tmp_path, trust_remote_code=trust)
    assert type(model) is type(pipe.transformer)


def test_plain_uploads_of_the_parts_are_whole(hub, pipe):
    pipe.transformer.push_to_hub("toy/plain")
    pipe.processor.push_to_hub("toy/plain")
    pipe.vision_tokenizer.push_to_hub("toy/tokenizer")
    code = {name for name in hub.files["toy/plain"] if name.endswith(".py")}
    assert {"modeling_nextflow.py", "configuration_nextflow.py", "processing_nextflow.py"} | {
        "scale_schedule_nextflow.py"
    } <= code
    assert json.loads(hub.files["toy/tokenizer"]["config.json"])["auto_map"] == {
        "AutoConfig": "configuration_nextflow.NextFlowVisionTokenizerConfig",
        "AutoModel": "modeling_nextflow_vision_tokenizer.NextFlowVisionTokenizer",
    }
    assert "modeling_nextflow_vision_tokenizer.py" in hub.files["toy/tokenizer"]
