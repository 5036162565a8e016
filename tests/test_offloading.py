"""Weights that are elsewhere until they are needed: no entry point of the pipeline reads one that is not there."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from PIL import Image
from torch import nn
from toy_decoder import FAMILIES, toy_decoder_pipeline
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowForConditionalGeneration, NextFlowPipeline


CPU = torch.device("cpu")  # not "cpu:0", which makes tensors of accelerate's parameters
IMAGE = Image.new("RGB", (20, 12), "red")


def everything(pipe: NextFlowPipeline) -> list[torch.Tensor]:
    """Every way into the components: draw with guidance, edit, preview, decode."""
    previews = []

    def preview(pipe, step, scale, kwargs):
        codes = kwargs["image_codes"].flatten()
        previews.extend(pipe.decode_codes(codes, kwargs["image_grids"], num_scales=scale + 1, output_type="pt"))

    options = {"guidance_scale": 3.0, "output_type": "pt"}
    drawn = pipe(["a", "blue"], generator=torch.Generator().manual_seed(0), **options)
    edited = pipe(
        "b",
        image=IMAGE,
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=preview,
        callback_on_step_end_tensor_inputs=["image_codes", "image_grids"],
        **options,
    )
    return [drawn.image_codes, *drawn.images, edited.image_codes, *edited.images, *previews]


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor]):
    assert len(results) == len(expected) > 5
    for one, other in zip(results, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    results = everything(toy_pipeline())
    assert all(tensor.isfinite().all() for tensor in results)
    return results


class Poison(ModelHook):
    """The weights of a component are NaN until its hook has run, as those of a model on another device."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        for tensor in module.state_dict().values():
            tensor.fill_(torch.nan)
        return module

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        module.load_state_dict(self.weights)
        return args, kwargs


def test_every_entry_point_runs_the_hook_of_model_offload(expected):
    pipe = toy_pipeline()
    for model in (pipe.transformer, pipe.vision_tokenizer):
        add_hook_to_module(model, Poison())
    assert_same(everything(pipe), expected)


def test_the_poison_shows():
    pipe = toy_pipeline()
    add_hook_to_module(pipe.vision_tokenizer, Poison())
    with torch.no_grad():
        grids = torch.tensor([[[1, 1], [2, 2], [3, 3], [4, 4]]])
        pixels = pipe.vision_tokenizer.decode(torch.zeros(30, dtype=torch.long), grids)
    assert pixels.isnan().all()


def test_sequential_offload(expected):
    """As `enable_sequential_cpu_offload` does it, which takes no CPU for the device that computes."""
    pipe = toy_pipeline()
    for model in (pipe.transformer, pipe.vision_tokenizer):
        cpu_offload(model, CPU)
    for _ in range(2):
        assert_same(everything(pipe), expected)
        weights = [*pipe.transformer.parameters(), *pipe.vision_tokenizer.parameters()]
        assert all(weight.device.type == "meta" for weight in weights)
    pipe.remove_all_hooks()
    assert_same(everything(pipe), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_offload_of_the_diffusion_decoder(family):
    """With the caption that there is without a text encoder."""
    parts = {name: part for name, part in toy_pipeline().components.items() if part is not None}
    standalone = toy_decoder_pipeline(family)
    pipe = NextFlowPipeline(
        **parts,
        diffusion_decoder=standalone.diffusion_decoder,
        decoder_scheduler=standalone.scheduler,
        decoder_vae=standalone.vae,
    )

    def draw() -> torch.Tensor:
        options = {"decoder": "diffusion", "decoder_num_inference_steps": 2, "output_type": "pt"}
        return pipe("a", generator=torch.Generator().manual_seed(0), **options).images

    expected = draw()
    for model in (pipe.transformer, pipe.vision_tokenizer, pipe.diffusion_decoder, pipe.decoder_vae):
        cpu_offload(model, CPU)
    torch.testing.assert_close(draw(), expected, rtol=0, atol=1e-5)


def test_sequential_offload_of_self_correction_without_a_generator():
    tokenizer, grids = toy_pipeline().vision_tokenizer, torch.tensor([[[1, 1], [2, 2], [3, 3], [4, 4]]])
    cpu_offload(tokenizer, CPU)
    with torch.no_grad():
        codes = tokenizer.encode(torch.zeros(1, 3, 16, 16), grids, self_correction=True).image_target_codes
    assert codes.shape == (30,)


def test_sequential_offload_of_the_composite(tmp_path):
    pipe = toy_pipeline()
    pipe.transformer.save_pretrained(tmp_path)
    pipe.vision_tokenizer.save_pretrained(tmp_path / "vision_tokenizer")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path)
    inputs = pipe.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "a"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        generation_mode="text",
    )

    def everything() -> list[torch.Tensor]:
        written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        drawn = model.generate(**inputs, generation_mode="image", image_temperature=0.0)
        return [written, drawn.image_codes, model.decode_image_tokens(drawn)]

    expected = everything()
    cpu_offload(model, CPU)
    for one, other in zip(everything(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.fixture
def empty_is_nan(monkeypatch):
    """Weights that were offloaded to disk leave an uninitialised tensor behind: here one of NaN."""
    empty_like = torch.empty_like

    def nans(tensor: torch.Tensor, **kwargs) -> torch.Tensor:
        return empty_like(tensor, **kwargs).fill_(torch.nan if tensor.is_floating_point() else 0)

    monkeypatch.setattr(torch, "empty_like", nans)


LEVELS = {
    "leaf": {"offload_type": "leaf_level"},
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
}


@pytest.mark.parametrize("level", LEVELS)
def test_group_offload_to_disk(level, expected, tmp_path, empty_is_nan):
    pipe = toy_pipeline()
    for name in ("transformer", "vision_tokenizer"):
        apply_group_offloading(
            getattr(pipe, name), CPU, CPU, offload_to_disk_path=str(tmp_path / name), **LEVELS[level]
        )
    assert len(list(tmp_path.rglob("*.safetensors"))) > 20
    for model in (pipe.transformer.model.layers[0].mlp, pipe.vision_tokenizer.pixel_decoder.levels[0]):
        assert all(weight.isnan().all() for weight in model.parameters())
    assert_same(everything(pipe), expected)


def test_blocks_are_layers_not_whole_models(tmp_path):
    """Else nothing is saved: a block is what diffusers finds directly in a component or under given names."""
    pipe = toy_pipeline()
    for model in (pipe.transformer, pipe.vision_tokenizer):
        apply_group_offloading(model, CPU, CPU, offload_to_disk_path=str(tmp_path), **LEVELS["block"])
        sizes = {}
        for module in model.modules():
            hook = vars(module).get("_diffusers_hook")
            hook = None if hook is None else hook.get_hook("group_offloading")
            if hook is not None:
                group = hook.group
                tensors = {*group.parameters, *(p for one in group.modules for p in one.parameters())}
                sizes[group.group_id] = sum(tensor.numel() for tensor in tensors)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert len(sizes) > 5 and max(sizes.values()) < 0.5 * total


def test_pipeline_level_group_offload(expected):
    pipe = toy_pipeline()
    pipe.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    assert pipe._execution_device == CPU
    assert_same(everything(pipe), expected)


def test_layerwise_casting():
    """What `enable_layerwise_casting` of diffusers' own models does, for a model of transformers."""
    pipe = toy_pipeline().to(torch.bfloat16)
    apply_layerwise_casting(
        pipe.transformer.model.layers, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=("norm",)
    )
    assert pipe.transformer.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    assert all(tensor.isfinite().all() for tensor in everything(pipe))


def test_model_offload_needs_an_accelerator():
    if torch.cuda.is_available():
        pytest.skip("a machine with an accelerator")
    with pytest.raises(RuntimeError, match="requires accelerator"):
        toy_pipeline().enable_model_cpu_offload()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="weights move to a GPU and back")


@needs_cuda
@pytest.mark.parametrize("level", [*LEVELS, "model", "sequential"])
def test_on_a_gpu(level):
    expected = everything(toy_pipeline().to("cuda"))
    pipe = toy_pipeline()
    if level == "model":
        pipe.enable_model_cpu_offload()
    elif level == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(torch.device("cuda"), CPU, **LEVELS[level])
    results = everything(pipe)
    assert [one.shape for one in results] == [one.shape for one in expected]
    assert torch.equal(results[0].cpu(), expected[0].cpu())
    if level != "model":
        assert not any(weight.is_cuda for weight in pipe.transformer.model.layers.parameters())


@needs_cuda
@pytest.mark.parametrize("level", LEVELS)
def test_group_offload_with_a_stream(level):
    expected = everything(toy_pipeline().to("cuda"))
    pipe = toy_pipeline()
    pipe.enable_group_offload(torch.device("cuda"), CPU, use_stream=True, **LEVELS[level])
    assert torch.equal(everything(pipe)[0].cpu(), expected[0].cpu())


@needs_cuda
def test_balanced_device_map(tmp_path):
    toy_pipeline().save_pretrained(tmp_path)
    pipe = NextFlowPipeline.from_pretrained(tmp_path, device_map="balanced")
    assert pipe.hf_device_map and len(pipe("a").images) == 1
