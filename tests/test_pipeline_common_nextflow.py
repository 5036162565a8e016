"""What diffusers asks of any pipeline, check by check under the names of its `PipelineTesterMixin`, in our own words.

diffusers does not ship that suite; it is written for pipelines that denoise. Where a check has no meaning for one that
draws scale by scale, `SKIPPED` says in a line why, and what stands in for it.
"""

import inspect
import json
import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionMixin
from torch import nn
from toy_decoder import toy_clip, toy_decoder, toy_scheduler, toy_vae
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline


SKIPPED = {
    "test_attention_slicing_forward_pass": "transformers' attention has no slices; it has implementations",
    "test_encode_prompt_works_in_isolation": "no `encode_prompt`: the transformer itself reads prompts, as tokens",
    "test_freeu, test_fused_qkv_projections, test_ip_adapter": "for UNets",
    "test_float16_inference": "needs an accelerator there; here it is `test_half_precision_inference_no_nan`",
    "test_karras_schedulers_shape": "there is no scheduler; that of the diffusion decoder is an optional part",
    "test_latents_input": "no `image_latents` are taken: images become codes of the vision tokenizer",
    "test_layerwise_casting_inference": "a method of diffusers' models; test_offloading.py applies the hook instead",
    "test_lora_scale_kwargs_match_fusion": "no `attention_kwargs`: `set_adapters` weighs (test_pipeline_lora.py)",
    "test_logs_info_when_no_lora_keys_found": "a LoRA without a matrix for the transformer is an error, not a warning",
    "test_multi_vae": "the vision tokenizer is not exchangeable: its codes are the transformer's vocabulary",
    "test_pyramid_attention_broadcast, test_faster_cache, test_first_block_cache, test_taylorseer_cache, "
    "test_mag_cache": "they reuse one step's features in the next: here every step has a grid of its own",
    "test_save_load_float16": "needs an accelerator there; here it has its own",
    "test_StableDiffusionMixin_component": "for pipelines of a UNet",
    "test_xformers_attention_forwardGenerator_pass": "transformers' models choose attention themselves",
}
SEED = 0


def get_dummy_components() -> dict:
    """Every optional part is there."""
    text_encoder, tokenizer = toy_clip()
    return {
        **toy_pipeline().components,
        "diffusion_decoder": toy_decoder("unet"),
        "decoder_scheduler": toy_scheduler("unet"),
        "decoder_vae": toy_vae("unet"),
        "decoder_text_encoder": text_encoder,
        "decoder_tokenizer": tokenizer,
    }


def get_pipeline(**components) -> NextFlowPipeline:
    pipe = NextFlowPipeline(**(components or get_dummy_components()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def get_dummy_inputs(**changes) -> dict:
    generator = torch.Generator().manual_seed(SEED)
    return {"prompt": "a red circle", "generator": generator, "guidance_scale": 2.0, "output_type": "pt", **changes}


def run(pipe: DiffusionPipeline, **changes) -> torch.Tensor:
    return pipe(**get_dummy_inputs(**changes))[0]


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    return get_pipeline()


@pytest.fixture(scope="module")
def base_pipe_output(pipe) -> torch.Tensor:
    return run(pipe)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def test_no_skipped_check_stands_here_too():
    here = {name for name in globals() if name.startswith("test_")}
    assert not {name for name in SKIPPED if name in here} - {"test_save_load_float16"}
    assert not hasattr(NextFlowPipeline, "encode_prompt") and not issubclass(NextFlowPipeline, StableDiffusionMixin)
    assert "attention_kwargs" not in inspect.signature(NextFlowPipeline.__call__).parameters


def test_output(base_pipe_output):
    assert base_pipe_output.shape == (1, 3, 16, 16) and base_pipe_output.std() > 0.01


def test_save_load_local(folder, base_pipe_output, caplog):
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger.name):
            loaded = NextFlowPipeline.from_pretrained(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert all(name in caplog.text for name in set(loaded.components) - set(loaded._optional_components))
    torch.testing.assert_close(run(loaded), base_pipe_output, rtol=0, atol=1e-5)


def test_pipeline_call_signature():
    parameters = inspect.signature(NextFlowPipeline.__call__).parameters
    wanted = {"prompt", "image", "height", "width", "guidance_scale", "negative_prompt", "num_images_per_prompt"}
    wanted |= {"generator", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    wanted |= {"num_inference_steps", "latents"}
    assert wanted <= set(parameters)
    assert all(one.default is not inspect.Parameter.empty for name, one in parameters.items() if name != "self")


@pytest.mark.parametrize("batch_size", [2, 3])
def test_inference_batch_consistent(pipe, batch_size):
    prompts = ["a red circle"[: 12 // count] for count in range(1, batch_size)] + [30 * "very long"]
    generators = [torch.Generator().manual_seed(index) for index in range(batch_size)]
    assert len(run(pipe, prompt=prompts, generator=generators)) == batch_size


def test_inference_batch_single_identical(pipe, base_pipe_output):
    prompts = ["a red circle", "a red", 30 * "very long"]
    output = run(pipe, prompt=prompts, generator=[torch.Generator().manual_seed(index) for index in range(3)])
    assert output.shape[0] == 3
    torch.testing.assert_close(output[0], base_pipe_output[0], rtol=0, atol=1e-4)


def test_dict_tuple_outputs_equivalent(pipe, base_pipe_output):
    torch.testing.assert_close(run(pipe, return_dict=False), base_pipe_output, rtol=0, atol=0)


def test_components_function(pipe):
    assert set(pipe.components) == set(get_dummy_components())
    assert set(pipe.components) == set(inspect.signature(NextFlowPipeline.__init__).parameters) - {"self"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inference_no_nan(dtype):
    output = run(get_pipeline().to(dtype))
    assert output.isfinite().all() and output.std() > 0.01


def test_save_load_float16(tmp_path):
    pipe = get_pipeline().to(torch.float16)
    pipe.save_pretrained(tmp_path)
    loaded = NextFlowPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    for name, component in loaded.components.items():
        assert getattr(component, "dtype", torch.float16) == torch.float16, name
    # Modules that the classes keep in float32 were rounded before they were saved: loading adds nothing to that.
    torch.testing.assert_close(run(loaded), run(pipe), rtol=0, atol=1e-2)


def test_save_load_optional_components(base_pipe_output, tmp_path):
    pipe = get_pipeline()
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    torch.testing.assert_close(run(pipe), base_pipe_output, rtol=0, atol=0)
    pipe.save_pretrained(tmp_path)
    loaded = NextFlowPipeline.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) is None for name in pipe._optional_components)
    torch.testing.assert_close(run(loaded), base_pipe_output, rtol=0, atol=1e-5)


def devices(pipe: DiffusionPipeline) -> set[str]:
    return {part.device.type for part in pipe.components.values() if isinstance(part, nn.Module)}


def test_to_device():
    pipe = get_pipeline().to("meta")
    assert devices(pipe) == {"meta"} and pipe.device.type == "meta"
    pipe = get_pipeline().to("cpu")
    assert devices(pipe) == {"cpu"} and run(pipe).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="from the CPU to a GPU and back")
def test_to_a_gpu(base_pipe_output):
    pipe = get_pipeline().to("cuda")
    assert devices(pipe) == {"cuda"}
    torch.testing.assert_close(run(pipe).cpu(), base_pipe_output, rtol=0, atol=1e-2)
    assert devices(pipe.to("cpu")) == {"cpu"}


def test_to_dtype():
    pipe = get_pipeline()
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert {part.dtype for part in parts} == {torch.float32}
    pipe.to(dtype=torch.float16)
    assert {part.dtype for part in parts} == {torch.float16}


def test_dtype_dict(folder):
    """New in 0.42: a dtype for each component."""
    dtype = {"vision_tokenizer": torch.bfloat16, "default": torch.float16}
    loaded = NextFlowPipeline.from_pretrained(folder, dtype=dtype)
    for name, part in loaded.components.items():
        if isinstance(part, nn.Module):
            assert part.dtype == dtype.get(name, torch.float16), name


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_num_images_per_prompt(pipe, batch_size, num_images_per_prompt):
    prompts = ["a red circle"] * batch_size
    output = run(pipe, prompt=prompts, num_images_per_prompt=num_images_per_prompt)
    assert output.shape[0] == batch_size * num_images_per_prompt


def test_cfg(pipe):
    unguided, guided = run(pipe, guidance_scale=1.0), run(pipe, guidance_scale=7.5)
    assert guided.shape == unguided.shape and not torch.equal(guided, unguided)


@pytest.mark.parametrize("names", [["latents"], NextFlowPipeline._callback_tensor_inputs, []], ids=str)
def test_callback_inputs(pipe, names):
    seen = []

    def callback(pipe, step, scale, kwargs):
        seen.append(set(kwargs))
        return kwargs

    run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, output_type="latent")
    assert seen == [set(names)] * pipe.num_timesteps
    with pytest.raises(ValueError, match="noise"):
        run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])


def test_callback_inputs_zeroed_latents(pipe):
    def zero_the_last(pipe, step, scale, kwargs):
        if step == pipe.num_timesteps - 1:
            kwargs["latents"] = torch.zeros_like(kwargs["latents"])
        return kwargs

    options = {"callback_on_step_end": zero_the_last, "callback_on_step_end_tensor_inputs": ["latents"]}
    assert run(pipe, **options, output_type="latent").abs().sum() == 0
    assert not torch.equal(run(pipe, **options), run(pipe))


def test_callback_cfg(pipe):
    def callback(pipe, step, scale, kwargs):
        pipe._guidance_scale += 1.0
        return kwargs

    raised = run(pipe, callback_on_step_end=callback)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    expected = run(pipe, guidance_scale=[2.0, 3.0, 4.0, 5.0])
    torch.testing.assert_close(raised, expected, rtol=0, atol=1e-5)


def test_serialization_with_variants(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            assert name in index
            weights = [path.name for path in (tmp_path / name).glob("*.safetensors")]
            assert weights and all(".fp16." in name for name in weights)


def test_loading_with_variants(pipe, base_pipe_output, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = NextFlowPipeline.from_pretrained(tmp_path, variant="fp16")
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            expected = dict(part.named_parameters())
            found = dict(loaded.components[name].named_parameters())
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in found.items()), name
    torch.testing.assert_close(run(loaded), base_pipe_output, rtol=0, atol=1e-5)


def test_loading_with_incorrect_variants_raises_error(folder):
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        NextFlowPipeline.from_pretrained(folder, variant="fp16")


def test_pipeline_with_accelerator_device_map(folder, base_pipe_output):
    loaded = NextFlowPipeline.from_pretrained(folder, device_map="cpu")
    torch.testing.assert_close(run(loaded), base_pipe_output, rtol=0, atol=1e-5)


def test_pt_np_pil_outputs_equivalent(pipe, base_pipe_output):
    array, (picture,) = run(pipe, output_type="np"), run(pipe, output_type="pil")
    np.testing.assert_allclose(base_pipe_output.permute(0, 2, 3, 1).numpy(), array, atol=1e-4)
    np.testing.assert_allclose(np.asarray(picture), array[0] * 255, atol=1)


def test_pt_np_pil_inputs_equivalent(pipe):
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    array = np.asarray(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    first, *others = [run(pipe, image=image) for image in (picture, array, tensor)]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-4)
    assert not torch.equal(first, run(pipe))


def test_vae_slicing(base_pipe_output):
    pipe = get_pipeline()
    generators = [torch.Generator().manual_seed(index) for index in range(4)]
    whole = run(pipe, prompt=["a red circle"] * 4, generator=generators)
    pipe.vae.enable_slicing()
    generators = [torch.Generator().manual_seed(index) for index in range(4)]
    sliced = run(pipe, prompt=["a red circle"] * 4, generator=generators)
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)


def test_vae_tiling(base_pipe_output):
    pipe = get_pipeline()
    pipe.vae.enable_tiling()
    torch.testing.assert_close(run(pipe), base_pipe_output, rtol=0, atol=1e-5)  # smaller than a tile


def test_from_pipe_consistent_forward_pass(pipe, base_pipe_output):
    torch.testing.assert_close(run(NextFlowPipeline.from_pipe(pipe)), base_pipe_output, rtol=0, atol=0)
    assert NextFlowPipeline.from_pipe(pipe).config == pipe.config
