"""The pipeline on toy components: one image is the same however it is asked for, and mistakes are named."""

import logging

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline
from PIL import Image
from toy_decoder import toy_whole_pipeline
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow.image_settings_nextflow import CONFIG_NAMES
from nextflow_hf.pipelines import helpers_nextflow


GUIDED = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 8}


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    return toy_pipeline()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def codes_of(pipe, prompt=None, *, seed=0, **kwargs) -> list[int]:
    generator = [seeded(one) for one in seed] if isinstance(seed, list) else seeded(seed)
    return pipe(prompt, generator=generator, output_type="codes", **{**GUIDED, **kwargs}).image_codes.tolist()


# --- precision


def test_positions_and_codebooks_are_float32_however_a_pipeline_is_cast(tmp_path):
    toy_pipeline().save_pretrained(tmp_path)
    cast = {
        "to": toy_pipeline().to(torch.bfloat16),
        "from_pipe": NextFlowPipeline.from_pipe(toy_pipeline(), dtype=torch.bfloat16),
        "from_pretrained": NextFlowPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16),
    }
    exact = toy_pipeline()
    for name, pipe in cast.items():
        assert pipe.transformer.lm_head.weight.dtype == torch.bfloat16, name
        assert torch.equal(pipe.transformer.model.rotary_emb.inv_freq, exact.transformer.model.rotary_emb.inv_freq), (
            name
        )
        assert torch.equal(pipe.vision_tokenizer.codebook, exact.vision_tokenizer.codebook), name


# --- what comes out


def test_output_types(pipe):
    outputs = {
        kind: pipe("a", generator=seeded(0), num_images_per_prompt=2, output_type=kind, **GUIDED)
        for kind in ("pil", "np", "pt", "codes")
    }
    assert [image.size for image in outputs["pil"].images] == [(16, 16)] * 2
    array, tensor = outputs["np"].images, outputs["pt"].images
    assert array.shape == (2, 16, 16, 3) and array.dtype == np.float32 and array.min() >= 0 and array.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(outputs["pil"].images[1]), np.rint(array[1] * 255))
    codes = outputs["codes"]
    assert codes.images is None and codes[0] is codes.image_codes
    assert codes.image_codes.shape == (60,) and codes.image_codes.max() < 24
    assert codes.image_grids.tolist() == [[[1, 1], [2, 2], [3, 3], [4, 4]]] * 2
    for output in outputs.values():
        assert torch.equal(output.image_codes, codes.image_codes)
    assert outputs["pil"][0] is outputs["pil"].images

    decoded = pipe.vae.decode(codes.image_codes, codes.image_grids)
    torch.testing.assert_close(tensor, decoded / 2 + 0.5)


def test_tuple(pipe):
    images, image_codes, image_grids = pipe("a", return_dict=False)
    assert len(images) == 1 and image_codes.shape == (30,) and image_grids.shape == (1, 4, 2)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({}, (16, 16)),
        ({"height": 12, "width": 20}, (20, 12)),
        ({"aspect_ratio": "5:3"}, (20, 12)),
        ({"aspect_ratio": "3:5"}, (12, 20)),
        ({"resolution": 8}, (8, 8)),
    ],
    ids=str,
)
def test_size(pipe, size, expected):
    (image,) = pipe("a", **size).images
    assert image.size == expected


def test_size_that_no_bucket_has_is_named(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        (image,) = pipe("a", height=13, width=21, **GUIDED).images
    assert image.size == (20, 12)
    assert len(caplog.messages) == 1 and "12 x 20" in caplog.text and "13 x 21" in caplog.text


# --- the same image in any company


PROMPTS = ["a", "two blue squares", "red"]


def test_prompts_of_unequal_length_in_one_batch(pipe):
    single = [codes_of(pipe, prompt, seed=index) for index, prompt in enumerate(PROMPTS)]
    assert codes_of(pipe, PROMPTS, seed=[0, 1, 2]) == sum(single, [])


def test_edits_of_unequal_shape_in_one_batch(pipe):
    wide, square = picture(20, 12), picture()
    images = [[wide], [square, wide], None, wide]
    prompts = [*PROMPTS, "wide again"]
    single = [
        codes_of(pipe, prompt, image=image, seed=index)
        for index, (prompt, image) in enumerate(zip(prompts, images, strict=True))
    ]
    output = pipe(prompts, image=images, generator=[seeded(index) for index in range(4)], output_type="np", **GUIDED)
    assert output.image_codes.tolist() == sum(single, [])
    assert [image.shape[:2] for image in output.images] == [(12, 20), (16, 16), (16, 16), (12, 20)]
    assert output.image_grids[:, -1].tolist() == [[3, 5], [4, 4], [4, 4], [3, 5]]


def test_num_images_per_prompt(pipe):
    many = codes_of(pipe, PROMPTS[:2], num_images_per_prompt=2, seed=[0, 1, 2, 3])
    single = [codes_of(pipe, PROMPTS[index // 2], seed=index) for index in range(4)]
    assert many == sum(single, [])
    assert single[0] != single[1]


def test_single_generator(pipe):
    both = codes_of(pipe, PROMPTS[:2], seed=5)
    assert both[:30] == codes_of(pipe, PROMPTS[0], seed=5) == codes_of(pipe, PROMPTS[0], seed=[5])
    assert codes_of(pipe, PROMPTS[:2], seed=5) == both
    same = codes_of(pipe, PROMPTS[0], num_images_per_prompt=2, seed=5)
    assert same[:30] == both[:30] != same[30:]
    generator = seeded(5)
    first, second = (pipe("a", generator=generator, output_type="codes").image_codes for _ in range(2))
    assert not torch.equal(first, second)


def test_global_random_state(pipe):
    state = torch.get_rng_state()
    codes_of(pipe, PROMPTS[:2], image=picture(), seed=[0, 1])
    assert torch.equal(state, torch.get_rng_state())
    pipe("a")
    assert not torch.equal(state, torch.get_rng_state())


def test_image_inputs(pipe, tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    expected = codes_of(pipe, "a", image=image)
    for same in (tmp_path / "image.png", str(tmp_path / "image.png"), array, array[None], [image], [[image]]):
        assert codes_of(pipe, "a", image=same) == expected
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}]}]
    assert codes_of(pipe, messages=messages) == expected
    assert codes_of(pipe, messages=[messages, messages], seed=[0, 0]) == expected * 2
    assert codes_of(pipe, ["a", "a"], image=image, seed=[0, 0]) == expected * 2
    assert messages[0]["content"][0]["image"] is image  # the caller's messages are left as they are


def test_source_images_matter(pipe):
    one, other = picture(seed=1), picture(seed=2)
    edits = [codes_of(pipe, "a", image=image) for image in (None, one, other, [one, other], [other, one])]
    assert len(set(map(tuple, edits))) == 5


def test_size_of_an_edit(pipe):
    wide, tall = picture(20, 12), picture(12, 20)
    assert pipe("a", image=[wide, tall]).images[0].size == (20, 12)
    assert pipe("a", image=[wide, tall], height=16, width=16).images[0].size == (16, 16)
    assert pipe("a", image=wide, aspect_ratio="1:1").images[0].size == (16, 16)
    assert pipe("a", image=wide, resolution=8).images[0].size == (8, 8)
    # In a conversation the last image, as the processor has it
    content = [{"type": "image", "image": wide}, {"type": "image", "image": tall}]
    assert pipe(messages=[{"role": "user", "content": content}]).images[0].size == (12, 20)


# --- guidance


def count_rows(pipe, monkeypatch) -> list[int]:
    """Batch size of every pass of the transformer's decoder."""
    rows, forward = [], pipe.transformer.model.forward

    def counting(*args, **kwargs):
        output = forward(*args, **kwargs)
        rows.append(len(output.last_hidden_state))
        return output

    monkeypatch.setattr(pipe.transformer.model, "forward", counting)
    return rows


def test_guidance_1_has_no_unconditional_pass(pipe, monkeypatch):
    rows = count_rows(pipe, monkeypatch)
    codes_of(pipe, "a", guidance_scale=1)
    assert rows == [1] * 4 and not pipe.do_classifier_free_guidance
    rows.clear()
    codes_of(pipe, "a", guidance_scale=2.0)
    assert rows == [2] * 4 and pipe.do_classifier_free_guidance
    rows.clear()
    codes_of(pipe, "a", guidance_scale=[2.0, 2.0, 1, 1])
    assert rows == [2, 2, 1, 1] and pipe.do_classifier_free_guidance


def test_guidance_0_is_the_negative_prompt(pipe):
    image = picture()
    for sources in ({}, {"image": image}):
        unguided = codes_of(pipe, "blue", guidance_scale=1.0, **sources)
        assert codes_of(pipe, "a", negative_prompt="blue", guidance_scale=0.0, **sources) == unguided
        assert codes_of(pipe, "a", guidance_scale=0.0, **sources) == codes_of(pipe, "", guidance_scale=1.0, **sources)


def test_negative_prompt_changes_the_image(pipe):
    plain = codes_of(pipe, "a")
    assert codes_of(pipe, "a", negative_prompt="") == plain
    negative = codes_of(pipe, "a", negative_prompt="blue and green")
    assert negative != plain
    both = codes_of(pipe, ["a", "a"], negative_prompt=["", "blue and green"], seed=[0, 0])
    assert both == plain + negative


def test_settings_come_from_the_generation_config(pipe, monkeypatch):
    expected = codes_of(pipe, "a", guidance_scale=4.0, temperature=0.7, top_k=3)
    for name, value in {"guidance_scale": 4.0, "temperature": 0.7, "top_k": 3}.items():
        monkeypatch.setattr(pipe.transformer.generation_config, CONFIG_NAMES[name], value)
    settings = {"guidance_scale": None, "temperature": None, "top_k": None}
    assert codes_of(pipe, "a", **settings) == expected
    assert pipe.guidance_scale == 4.0


# --- callback and progress


def test_callback_sees_every_scale(pipe):
    seen = []

    def callback(pipe, step, scale, kwargs):
        preview = pipe.decode_codes(kwargs["image_codes"].flatten(), kwargs["image_grids"], num_scales=scale + 1)
        seen.append((step, scale, pipe.num_timesteps, *kwargs["image_codes"].shape, [one.size for one in preview]))

    pipe(
        ["a", "b", "c"],
        image=[None, picture(20, 12), picture()],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["image_codes", "image_grids"],
    )
    square = [(step, step, 8, 2, count, [(16, 16)] * 2) for step, count in enumerate((1, 5, 14, 30))]
    grids = [(1, 1), (2, 2), (2, 4), (3, 5)]
    wide = np.cumsum([height * width for height, width in grids]).tolist()
    assert seen == square + [(4 + step, step, 8, 1, count, [(20, 12)]) for step, count in enumerate(wide)]


def test_interrupt(pipe):
    def callback(pipe, step, scale, kwargs):
        pipe._interrupt = step == 1

    whole = pipe("a", generator=seeded(0), output_type="pt", **GUIDED)
    part = pipe("a", generator=seeded(0), output_type="pt", callback_on_step_end=callback, **GUIDED)
    assert pipe.interrupt
    assert part.image_codes.tolist() == whole.image_codes[:5].tolist()
    assert part.image_grids.tolist() == [[[1, 1], [2, 2], [0, 0], [0, 0]]]
    preview = pipe.vision_tokenizer.decode(whole.image_codes, whole.image_grids, num_scales=2)
    torch.testing.assert_close(part.images, preview / 2 + 0.5)
    pipe("a")
    assert not pipe.interrupt


def test_guidance_changed_by_the_callback(pipe):
    def callback(pipe, step, scale, kwargs):
        if scale == 1:
            pipe._guidance_scale = [9.0, 9.0, 1.5, None]

    settings = {"temperature": [1.0, 0.5, None, 2.0], "top_k": [8, 7, 6, 5], "top_p": 0.95}
    expected = codes_of(pipe, "a", guidance_scale=[3.0, 3.0, 1.5, 1.0], **settings)
    assert codes_of(pipe, "a", **settings) != expected
    assert codes_of(pipe, "a", callback_on_step_end=callback, **settings) == expected


@pytest.mark.parametrize("guidance", [1.0, [3.0, 3.0, 1.0, 1.0]])
def test_guidance_cannot_begin_after_the_first_scale(pipe, guidance):
    def callback(pipe, step, scale, kwargs):
        if scale == 2:
            pipe._guidance_scale = 2.0

    with pytest.raises(ValueError, match="guidance of scale 4 compares 2 prompts, but only 1 went through"):
        pipe("a", guidance_scale=guidance, callback_on_step_end=callback)


def test_progress_shows_the_grid(pipe, capfd):
    pipe.set_progress_bar_config()
    try:
        pipe("a")
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert "4/4" in (err := capfd.readouterr().err) and "4x4" in err


# --- errors


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "exactly one of `prompt` and `messages`, got neither"),
        ({"prompt": "a", "messages": [{}]}, ValueError, "got both"),
        ({"messages": []}, ValueError, "got 0 messages, expected at least 1"),
        ({"messages": [{"role": "user", "content": "a"}], "image": 0}, ValueError, "`image` goes with `prompt`"),
        ({"prompt": []}, TypeError, "`prompt` is \\[\\]"),
        ({"prompt": 3}, TypeError, "`prompt` is 3"),
        ({"prompt": "a", "negative_prompt": ["b", "c"], "guidance_scale": 2.0}, ValueError, "2 entries for 1 prompts"),
        ({"prompt": "a", "output_type": "latents"}, ValueError, "'latents', expected one of \\['pil'"),
        ({"prompt": "a", "height": 16}, ValueError, "got only height, expected height and width"),
        (
            {"prompt": "a", "height": 16, "width": 16, "aspect_ratio": "1:1"},
            ValueError,
            "expected one of target_grids, aspect_ratio, or height and width",
        ),
        ({"prompt": "a", "num_images_per_prompt": 0}, ValueError, "is 0, expected at least 1"),
        ({"prompt": ["a", "b"], "generator": [seeded(0)]}, ValueError, "1 entries for 2 images"),
        ({"prompt": ["a", "b"], "image": [picture()]}, ValueError, "1 entries for 2 prompts"),
        ({"prompt": "a", "image": [[picture()], [picture()]]}, ValueError, "2 entries for 1 prompts"),
        ({"prompt": "a", "image": "missing.png"}, FileNotFoundError, "missing.png"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["logits"]}, ValueError, "\\['logits'\\], expected"),
        ({"prompt": "a", "temperature": [1.0, 2.0]}, ValueError, "2 entries, expected one for each of the 4 scales"),
    ],
)
def test_errors(pipe, kwargs, error, message):
    with pytest.raises(error, match=message):
        pipe(**kwargs)


def test_more_steps_than_scales_sample_all_with_one_warning(pipe, caplog):
    helpers_nextflow.warn_once.cache_clear()
    expected = codes_of(pipe, "a")
    assert codes_of(pipe, "a", num_inference_steps=30) == codes_of(pipe, "a", num_inference_steps=30) == expected
    assert caplog.text.count("`num_inference_steps` is 30, more than the scales of an image: all are sampled") == 1
    assert codes_of(pipe, "a", num_inference_steps=2) == expected[:5]


def test_an_unknown_resolution_is_the_nearest_with_one_warning(pipe, caplog):
    helpers_nextflow.warn_once.cache_clear()
    assert codes_of(pipe, "a", resolution=640) == codes_of(pipe, "a", resolution=640) == codes_of(pipe, "a")
    assert caplog.text.count("the nearest is taken, 16") == 1
    sized = {"height": 8, "width": 8}
    assert codes_of(pipe, "a", resolution=640, **sized) == codes_of(pipe, "a", **sized)


def test_callbacks_read_latents_by_default_as_in_diffusers(pipe):
    seen = []
    pipe("a", callback_on_step_end=lambda pipe, step, scale, tensors: seen.append(tensors["latents"].shape[1]))
    assert seen == [1, 5, 14, 30]


def test_a_call_does_not_walk_over_modules_to_find_where_it_computes(pipe, monkeypatch):
    asked = []
    original = DiffusionPipeline._execution_device
    monkeypatch.setattr(
        DiffusionPipeline, "_execution_device", property(lambda self: asked.append(0) or original.fget(self))
    )
    pipe("a", image=picture())
    assert not asked
    # Where there is an accelerator, what lies on the CPU may be offloaded: diffusers looks for its hooks.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    pipe.encode_images(picture())
    assert asked


# --- diffusers' machinery


def test_components(pipe):
    present = {name for name, component in pipe.components.items() if component is not None}
    assert present == {"transformer", "vision_tokenizer", "processor"}
    assert set(pipe.components) - present == set(pipe._optional_components)
    assert pipe.vae is pipe.vision_tokenizer
    with pytest.raises(AttributeError):
        pipe.vae = None
    other = NextFlowPipeline.from_pipe(pipe)
    assert all(other.components[name] is component for name, component in pipe.components.items())


def test_one_pipeline_samples_codes_and_another_decodes_them(pipe):
    whole = pipe("a", generator=seeded(0))
    sampling = NextFlowPipeline(**{**pipe.components, "vision_tokenizer": None})
    found = sampling("a", generator=seeded(0), output_type="codes")
    assert torch.equal(found.image_codes, whole.image_codes)
    decoding = NextFlowPipeline(**{**pipe.components, "transformer": None})
    codes = {"image_codes": found.image_codes, "image_grids": found.image_grids}
    assert decoding(**codes).images[0].tobytes() == whole.images[0].tobytes()
    with pytest.raises(ValueError, match="`output_type` is 'pil', expected 'codes': `vision_tokenizer` is None"):
        sampling("a")
    with pytest.raises(ValueError, match="`transformer` is None: without it `image_codes` are decoded"):
        decoding("a")
    with pytest.raises(ValueError, match="`transformer` is None: without it images are decoded, and no text"):
        decoding.chat([{"role": "user", "content": "a"}])


def test_pipelines_on_shared_components_keep_their_dtypes():
    pipe = toy_whole_pipeline()
    pipe.transformer.to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    other = NextFlowPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer and pipe.dtype == torch.bfloat16
    assert pipe.vision_tokenizer.dtype == torch.float32
    decoder = pipe.diffusion_decoder_pipeline
    decoder.diffusion_decoder.to(torch.bfloat16)
    made = type(decoder).from_pipe(decoder)
    assert made.diffusion_decoder is decoder.diffusion_decoder
    assert made.diffusion_decoder.dtype == torch.bfloat16
    assert NextFlowPipeline.from_pipe(pipe, diffusion_decoder=None).diffusion_decoder is None
    assert NextFlowPipeline.from_pipe(pipe, dtype=torch.float32).dtype == torch.float32  # on request


def test_every_entry_point_calls_the_offload_hook(pipe):
    """`enable_model_cpu_offload` brings a component to the device in its hook's `pre_forward`."""

    class Recorder(ModelHook):
        def __init__(self, name: str):
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            order.append(self.name)
            return args, kwargs

    order: list[str] = []
    models = {"transformer": pipe.transformer, "vision_tokenizer": pipe.vision_tokenizer}
    for name, model in models.items():
        add_hook_to_module(model, Recorder(name))
    try:
        pipe("a", image=picture())
    finally:
        for model in models.values():
            remove_hook_from_module(model)
    assert order == ["vision_tokenizer", "transformer", "vision_tokenizer"]


def test_half_precision(pipe):
    half = toy_pipeline().to(torch.bfloat16)
    assert {half.transformer.dtype, half.vision_tokenizer.dtype} == {torch.bfloat16}
    image = half("a", image=picture(), output_type="pt", **GUIDED).images
    assert image.dtype == torch.float32 and image.isfinite().all()


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model_index.json",
        "processor",
        "transformer",
        "vision_tokenizer",
    }
    expected = codes_of(pipe, "a", image=picture())
    for loader in (NextFlowPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is NextFlowPipeline
        loaded.set_progress_bar_config(disable=True)
        assert codes_of(loaded, "a", image=picture()) == expected


def test_the_last_scale_of_a_source_is_seen_where_it_is_appended():
    pipe = toy_pipeline()
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "a"}]}]

    def drawn(appended: bool) -> list[torch.Tensor]:
        """Logits of the first scale, with the source's codes as they are and with others in the last scale."""
        pipe.processor.append_last_scale = appended
        (prompt,) = pipe.encode_messages([messages], keep_first_size=True)
        assert prompt.grids == [(1, 1), (2, 2), (3, 3), (4, 4)]
        changed = prompt.image_codes.clone()
        changed[14:30] = (changed[14:30] + 1) % 24
        inputs = {"input_ids": prompt.input_ids[None], "image_grids": prompt.image_grids}
        return [pipe.transformer(**inputs, image_codes=codes).logits[0, -1] for codes in (prompt.image_codes, changed)]

    with torch.no_grad():
        torch.testing.assert_close(*drawn(False), rtol=0, atol=0)
        assert not torch.allclose(*drawn(True))
    # A batch of an edit and an edit at another size equals the two alone, as without the appended scale.
    sources = [picture(seed=1), picture(16, 28, seed=2)]
    together = codes_of(pipe, ["a", "b"], image=sources, seed=[1, 2])
    assert together == codes_of(pipe, "a", image=sources[0], seed=1) + codes_of(pipe, "b", image=sources[1], seed=2)
