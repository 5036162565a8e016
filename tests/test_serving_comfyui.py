"""The nodes of integrations/comfyui, by what ComfyUI asks of nodes and gives to them."""

import importlib.util
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_pipeline import toy_pipeline


FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"
TYPES = {"INT", "FLOAT", "STRING", "IMAGE", "MASK", "NEXTFLOW"}
SAMPLING = {"negative_prompt": "", "seed": 1, "batch_size": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's modules, as far as nodes use them."""
    shown: list[tuple] = []

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            shown.append((value, total, preview))

    management = types.SimpleNamespace(
        get_torch_device=lambda: torch.device("cpu"), throw_exception_if_processing_interrupted=lambda: None
    )
    package = types.ModuleType("comfy")
    package.model_management, package.utils = management, types.SimpleNamespace(ProgressBar=ProgressBar)
    modules = {"comfy": package, "comfy.model_management": management, "comfy.utils": package.utils}
    sys.modules.update(modules)
    yield types.SimpleNamespace(shown=shown, management=management)
    for name in modules:
        del sys.modules[name]


@pytest.fixture(scope="module")
def nodes(comfy):
    """Imported as ComfyUI does: a package by the path of its folder."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_nextflow", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS, module.NODE_DISPLAY_NAME_MAPPINGS


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


def test_the_contract_of_nodes(nodes):
    classes, names = nodes
    assert classes.keys() == names.keys()
    for node in classes.values():
        inputs = node.INPUT_TYPES()
        given = {**inputs["required"], **inputs.get("optional", {})}
        assert all(isinstance(kind[0], list) or kind[0] in TYPES for kind in given.values())
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        named = {name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD} - {"self"}
        assert named <= given.keys() and isinstance(node.RETURN_TYPES, tuple) and node.CATEGORY


def test_generate_shows_every_scale(nodes, comfy, pipe):
    comfy.shown.clear()
    (images,) = nodes[0]["NextFlowGenerate"]().generate(pipe, "a", 28, 8, **SAMPLING)
    assert images.shape == (2, 8, 28, 3) and images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
    generator = torch.Generator().manual_seed(1)
    expected = pipe("a", width=28, height=8, num_images_per_prompt=2, guidance_scale=2.0, generator=generator).images
    to_batch = sys.modules["custom_nodes_nextflow.nodes"].to_batch
    assert torch.equal(images, to_batch(expected))
    assert [(value, total) for value, total, _ in comfy.shown] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(kind == "JPEG" and isinstance(image, Image.Image) for _, _, (kind, image, _) in comfy.shown)


def test_edit_takes_references_and_a_mask(nodes, pipe):
    image, mask = torch.rand(1, 16, 16, 3), torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    edit = nodes[0]["NextFlowEdit"]().edit
    (images,) = edit(pipe, image, "a", references=torch.rand(1, 8, 28, 3), image_guidance_scale=1.5, **SAMPLING)
    assert images.shape == (2, 16, 16, 3)
    (images,) = edit(pipe, image, "a", mask=mask, image_guidance_scale=1.0, **SAMPLING)
    assert images.shape == (2, 16, 16, 3)


def test_stopping_ends_between_two_scales(nodes, comfy, pipe, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    comfy.shown.clear()
    monkeypatch.setattr(comfy.management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(KeyboardInterrupt):
        nodes[0]["NextFlowGenerate"]().generate(pipe, "a", 16, 16, **SAMPLING)
    assert not comfy.shown


def test_load_and_chat(nodes, model_folder):
    (pipe,) = nodes[0]["NextFlowLoad"]().load(model_folder, "float32")
    assert pipe.dtype == torch.float32
    (answer,) = nodes[0]["NextFlowChat"]().chat(pipe, "a", 4, images=torch.rand(1, 16, 16, 3))
    assert isinstance(answer, str)
