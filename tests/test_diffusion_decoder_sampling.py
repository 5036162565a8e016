"""The diffusion decoder's sampling: schedulers, real buckets, weights that are elsewhere, progress, and stopping."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.hooks import apply_group_offloading
from toy_decoder import CONDITION, FAMILIES, toy_clip, toy_decoder, toy_decoder_pipeline, toy_whole_pipeline
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowDiffusionDecoderPipeline, NextFlowPipeline
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule


CPU = torch.device("cpu")  # not "cpu:0", which makes tensors of accelerate's parameters


def codes_of(pipe, *buckets):
    schedule = pipe.image_processor.schedule
    grids = torch.tensor(schedule.image_grids([schedule.grids(bucket, 4) for bucket in buckets]))
    count = int(grids.prod(-1).sum())
    return torch.randint(24, (count,), generator=torch.Generator().manual_seed(count)), grids


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "pndm": PNDMScheduler(skip_prk_steps=True),
    "euler": EulerDiscreteScheduler(),
    "ancestral": EulerAncestralDiscreteScheduler(),
    "dpm": DPMSolverMultistepScheduler(),
    "unipc": UniPCMultistepScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "shifted flow": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_denoiser_that_knows_the_picture_draws_it(name, strength, monkeypatch):
    """With every scheduler, from noise and from another picture: steps, noise and scales of the input agree."""
    pipe = toy_decoder_pipeline("unet", channels=3)
    pipe = NextFlowDiffusionDecoderPipeline(**{**pipe.components, "vae": None, "scheduler": SCHEDULERS[name]})
    pipe.set_progress_bar_config(disable=True)
    codes, grids = codes_of(pipe, (4, 4))
    picture = torch.rand(1, 3, 16, 16, generator=seed(5)) * 2 - 1
    alphas = DDIMScheduler().alphas_cumprod

    def oracle(latents, timesteps, condition, **prompt):
        if "flow" in name:
            return ((latents - picture) / (timesteps / 1000).view(-1, 1, 1, 1),)
        # Times between two of training are those of Karras-like spacings.
        low, share = timesteps.long(), (timesteps % 1).view(-1, 1, 1, 1)
        levels = ((1 - alphas) / alphas).log()
        below, above = (levels[index].view(-1, 1, 1, 1) for index in (low, (low + 1).clamp(max=999)))
        level = (1 - share) * below + share * above
        alpha = 1 / (1 + level.exp())
        return ((latents - alpha.sqrt() * picture) / (1 - alpha).sqrt(),)

    monkeypatch.setattr(pipe.diffusion_decoder, "forward", oracle)
    options = {"num_inference_steps": 20, "strength": strength, "output_type": "latent"}
    drawn = pipe(codes, grids, generator=seed(), **options).images
    assert (drawn - picture).abs().max() < 0.1 and (drawn - picture).square().mean() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bucket_of_the_paper(family):
    """All 41 grids of the 256 level, also odd ones, at both sizes: what comes out is what went in, in size."""
    decoders = [toy_decoder(family, upscale_factor=1), toy_decoder(family, upscale_factor=2)]
    schedule = ScaleSchedule()
    assert len(schedule.buckets) == 41
    for bucket in schedule.buckets:
        rows, columns = schedule.grids(bucket, schedule.num_scales(256))[-1]
        for decoder in decoders if rows * columns < 240 else decoders[:1]:
            side = 2 * decoder.config.upscale_factor
            latents = torch.randn(1, 4, side * rows, side * columns)
            condition = torch.randn(1, CONDITION, rows, columns)
            with torch.no_grad():
                out = decoder(latents, torch.tensor([400.0]), condition, **decoder.empty_prompt(1)).sample
            assert out.shape == latents.shape and out.isfinite().all(), bucket


def everything(pipe: NextFlowDiffusionDecoderPipeline) -> list[torch.Tensor]:
    """Every way in: an image, codes, a caption, guidance, from noise and from the VQ picture."""
    codes, grids = codes_of(pipe, (3, 5))
    picture = torch.linspace(0, 1, 3 * 12 * 20).view(3, 12, 20)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    return [
        pipe(codes, grids, prompt="a", guidance_scale=2.0, generator=seed(1), **options).images,
        pipe(image=picture, strength=0.5, generator=seed(2), **options).images,
        pipe(image=picture, init_image=picture, strength=0.5, generator=seed(3), **options).images,
    ]


def captioned_pipeline() -> NextFlowDiffusionDecoderPipeline:
    encoder, tokenizer = toy_clip()
    parts = {**toy_decoder_pipeline("unet").components, "text_encoder": encoder, "tokenizer": tokenizer}
    pipe = NextFlowDiffusionDecoderPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    results = everything(captioned_pipeline())
    assert all(result.isfinite().all() for result in results)
    return results


@pytest.mark.parametrize("level", ["sequential", "leaf", "block"])
def test_offloading_changes_nothing(level, expected, tmp_path):
    pipe = captioned_pipeline()
    for name in ("vision_tokenizer", "text_encoder", "diffusion_decoder", "vae"):
        model = getattr(pipe, name)
        if level == "sequential":
            cpu_offload(model, CPU)
            assert all(weight.is_meta for weight in model.parameters())
        else:
            options = {"offload_type": f"{level}_level", "offload_to_disk_path": str(tmp_path / name)}
            if level == "block":
                options["num_blocks_per_group"] = 1
            apply_group_offloading(model, CPU, CPU, **options)
    for one, other in zip(everything(pipe), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_layers_not_the_whole_denoiser(family, tmp_path):
    model = toy_decoder(family)
    apply_group_offloading(
        model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    sizes = {}
    for module in model.modules():
        hook = vars(module).get("_diffusers_hook")
        hook = None if hook is None else hook.get_hook("group_offloading")
        if hook is not None:
            tensors = {*hook.group.parameters, *(p for one in hook.group.modules for p in one.parameters())}
            sizes[hook.group.group_id] = sum(tensor.numel() for tensor in tensors)
    assert len(sizes) > 2 and max(sizes.values()) < 0.75 * sum(parameter.numel() for parameter in model.parameters())


def test_progress_counts_the_steps_of_all_sizes(monkeypatch):
    pipe = toy_decoder_pipeline("unet")
    bars = []
    progress_bar = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda **options: bars.append(progress_bar(**options)) or bars[-1])
    pipe.set_progress_bar_config(mininterval=0, file=open("/dev/null", "w"))
    pipe(*codes_of(pipe, (4, 4), (3, 5), (4, 4)), num_inference_steps=4, strength=0.75, generator=seed())
    assert len(bars) == 1 and bars[0].n == bars[0].total == pipe.num_timesteps == 2 * 3


@pytest.fixture(scope="module")
def whole() -> NextFlowPipeline:
    standalone = captioned_pipeline()
    names = ("scheduler", "vae", "text_encoder", "tokenizer")
    parts = {f"decoder_{name}": standalone.components[name] for name in names}
    pipe = NextFlowPipeline(
        **{**toy_pipeline().components, **parts, "diffusion_decoder": standalone.diffusion_decoder}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def steps(whole, monkeypatch) -> list[int]:
    """The steps of the diffusion decoder, as they are made."""
    made: list[int] = []
    step = NextFlowDiffusionDecoderPipeline.step
    monkeypatch.setattr(
        NextFlowDiffusionDecoderPipeline, "step", lambda self, *args: made.append(len(made)) or step(self, *args)
    )
    return made


OPTIONS = {"decoder": "diffusion", "decoder_num_inference_steps": 4}


def test_interrupting_the_pipeline_stops_its_decoder(whole, steps, monkeypatch):
    predict = NextFlowDiffusionDecoderPipeline.predict

    def interrupting(self, *args, **options):
        whole._interrupt = len(steps) == 1
        return predict(self, *args, **options)

    monkeypatch.setattr(NextFlowDiffusionDecoderPipeline, "predict", interrupting)
    assert len(whole("a", generator=seed(), **OPTIONS).images) == 1 and steps == [0, 1]


def test_interrupting_the_drawing_does_not_stop_the_decoder(whole, steps):
    """What was drawn is decoded whole."""

    def stop(pipe, step, scale, tensors):
        pipe._interrupt = step == 1

    output = whole("a", generator=seed(), callback_on_step_end=stop, **OPTIONS)
    assert len(output.image_codes) == 1 + 4 and len(steps) == 4  # two scales


def test_the_prompt_is_the_decoders_caption_but_an_instruction_is_not(whole, monkeypatch):
    seen = []
    encode_prompt = NextFlowDiffusionDecoderPipeline.encode_prompt

    def spy(self, prompts, **options):
        seen.append(prompts)
        return encode_prompt(self, prompts, **options)

    monkeypatch.setattr(NextFlowDiffusionDecoderPipeline, "encode_prompt", spy)
    options = {**OPTIONS, "decoder_num_inference_steps": 1}
    image = whole("a", num_images_per_prompt=2, generator=seed(), **options).images[0]
    whole("b", image=image, generator=seed(), **options)
    whole(["a", "b"], decoder_prompt=["b", "b a"], generator=seed(), **options)
    each = {"num_images_per_prompt": 2, "decoder_prompt": ["a", "b", "a b", "b a"]}
    whole(["a", "b"], **each, generator=seed(), **options)
    assert seen == [["", "", "a", "a"], ["", ""], ["", "", "b", "b a"], [""] * 4 + each["decoder_prompt"]]
    for prompts, captions in ((["a"] * 4, 2), (["a"] * 2, 3)):  # pairs of prompts had one caption, or none had any
        with pytest.raises(ValueError, match=f"`decoder_prompt` has {captions} entries for {len(prompts)} prompts"):
            whole(prompts, decoder_prompt=["b"] * captions, generator=seed(), **options)


def test_codes_alone_are_decoded_by_the_diffusion_decoder(whole):
    drawn = whole("a", generator=seed(), output_type="codes")
    codes = {"image_codes": drawn.image_codes, "image_grids": drawn.image_grids}
    options = {**OPTIONS, "output_type": "pt"}
    again = whole(**codes, decoder_generator=seed(3), **options)
    own = seed(int(torch.randint(2**63 - 1, (), generator=seed(3))))  # each image has one of its own
    alone = whole.diffusion_decoder_pipeline(**codes, generator=own, num_inference_steps=4, output_type="pt").images
    assert torch.equal(again.images, alone)


def test_a_negative_prompt_without_text_encoder_is_refused():
    pipe = toy_decoder_pipeline("unet")
    with pytest.raises(ValueError, match="`negative_prompt` is 'a', expected None"):
        pipe(*codes_of(pipe, (4, 4)), negative_prompt="a", guidance_scale=2.0)


# --- threads


def in_turns(draw, count: int) -> list:
    """What `draw(number, callback)` gives for each number, in threads that take turns at every step."""
    turns = threading.Barrier(count, timeout=10)

    def callback(*args):
        turns.wait()
        return {}

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda number: draw(number, callback), range(count)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_thread_each_on_the_same_components(name):
    """A scheduler counts its steps: each call has a count of its own, and leaves the component as it was."""
    pipe = toy_decoder_pipeline("unet")
    pipe.scheduler = SCHEDULERS[name]
    before = copy.deepcopy(vars(pipe.scheduler))
    codes, grids = codes_of(pipe, (4, 4))

    def draw(number, callback=None):
        own = NextFlowDiffusionDecoderPipeline(**pipe.components)
        own.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 4, "output_type": "pt", "callback_on_step_end": callback}
        return own(codes, grids, generator=seed(number), **options).images

    expected = [draw(number) for number in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(in_turns(draw, 3), expected))
    assert not torch.equal(expected[0], expected[1])
    assert str(before) == str(vars(pipe.scheduler))


def test_whole_pipelines_on_the_same_components(monkeypatch):
    components = {**toy_whole_pipeline().components, "decoder_scheduler": EulerDiscreteScheduler()}
    turns, step = [], NextFlowDiffusionDecoderPipeline.step
    monkeypatch.setattr(NextFlowDiffusionDecoderPipeline, "step", lambda *args: (turns[-1](), step(*args))[1])

    def draw(number, callback=None):
        own = NextFlowPipeline(**components)
        own.set_progress_bar_config(disable=True)
        turns.append(callback or (lambda: None))
        options = {"decoder": "diffusion", "decoder_num_inference_steps": 5, "output_type": "pt"}
        return own("a", generator=seed(number), **options).images

    expected = [draw(number) for number in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(in_turns(draw, 3), expected))


def test_a_second_thread_is_turned_away():
    pipe, errors = toy_decoder_pipeline("unet"), []
    codes, grids = codes_of(pipe, (4, 4))

    def other() -> str:
        with pytest.raises(RuntimeError) as error:
            pipe(codes, grids, num_inference_steps=1)
        return str(error.value)

    def callback(*args):
        with ThreadPoolExecutor(1) as thread:
            errors.append(thread.submit(other).result())
        return {}

    pipe(codes, grids, num_inference_steps=1, callback_on_step_end=callback)
    assert "NextFlowDiffusionDecoderPipeline(**pipe.components)` (not with offloading" in errors[0]
