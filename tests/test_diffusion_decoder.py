"""The diffusion decoder: its first step is the base model, its condition lies where the codes lie."""

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FluxPipeline, QwenImagePipeline, SD3Transformer2DModel
from PIL import Image
from toy_decoder import (
    CONDITION,
    FAMILIES,
    toy_clip,
    toy_decoder,
    toy_decoder_pipeline,
    toy_denoiser,
    toy_t5,
    toy_vae,
)
from toy_pipeline import toy_pipeline, toy_processor

from nextflow_hf import NextFlowDiffusionDecoder, NextFlowDiffusionDecoderPipeline, NextFlowPipeline
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import export_pipeline
from nextflow_hf.pipelines.latents_nextflow import (
    decode_latents,
    encode_latents,
    pack_latents,
    predict_in_tiles,
    unpack_latents,
)


BUCKETS = [(4, 4), (3, 5), (5, 3), (2, 7), (7, 2), (2, 8), (8, 2)]  # of the toy schedule


def base_prediction(family, denoiser, latents, timestep, prompt):
    """The base model called as its own pipeline calls it."""
    height, width = latents.shape[2:]
    if family == "unet":
        return denoiser(latents, timestep, **prompt).sample
    if family == "sd3":
        return denoiser(latents, timestep=timestep, **prompt).sample
    patches = FluxPipeline._pack_latents(latents, *latents.shape)
    if family == "flux":
        ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
        text_ids = torch.zeros(prompt["encoder_hidden_states"].shape[1], 3)
        sample = denoiser(patches, timestep=timestep / 1000, img_ids=ids, txt_ids=text_ids, **prompt).sample
        return FluxPipeline._unpack_latents(sample, 8 * height, 8 * width, 8)
    shapes = [[(1, height // 2, width // 2)]] * len(latents)
    sample = denoiser(patches, timestep=timestep / 1000, img_shapes=shapes, **prompt).sample
    return QwenImagePipeline._unpack_latents(sample, 8 * height, 8 * width, 8)[:, :, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_is_the_base_model(family, tmp_path):
    toy_denoiser(family).save_pretrained(tmp_path / "transformer")
    base = toy_denoiser(family)
    decoder = NextFlowDiffusionDecoder.from_pretrained_denoiser(
        tmp_path, subfolder="transformer", condition_channels=CONDITION
    ).eval()
    latents, timestep = torch.randn(2, 4, 6, 10), torch.tensor([700.0, 20.0])
    prompt = {name: torch.randn_like(value) for name, value in decoder.empty_prompt(2).items()}
    with torch.no_grad():
        predicted = decoder(latents, timestep, torch.randn(2, CONDITION, 3, 5), **prompt).sample
        expected = base_prediction(family, base, latents, timestep, prompt)
    torch.testing.assert_close(predicted, expected, atol=1e-6, rtol=1e-6)
    assert predicted.abs().max() > 1e-3
    own, wide = base.config, decoder.denoiser.config
    layer = decoder.denoiser.get_submodule(decoder.family.input_layer)
    assert wide.in_channels == own.in_channels + layer.weight.shape[0] and decoder.latent_channels == 4
    assert not any(parameter.is_meta for parameter in decoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same_to_the_bit(family, tmp_path):
    decoder = toy_decoder(family)
    decoder.save_pretrained(tmp_path)
    loaded = NextFlowDiffusionDecoder.from_pretrained(tmp_path).eval()
    inputs = torch.randn(1, 4, 4, 8), torch.tensor([300.0]), torch.randn(1, CONDITION, 2, 4)
    with torch.no_grad():
        expected = decoder(*inputs, **decoder.empty_prompt(1)).sample
        predicted = loaded(*inputs, **decoder.empty_prompt(1)).sample
        without = decoder(inputs[0], inputs[1], torch.zeros_like(inputs[2]), **decoder.empty_prompt(1)).sample
    weights = decoder.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    # Not to the bit: a convolution's kernel is chosen by how its weights lie in memory.
    torch.testing.assert_close(predicted, expected, atol=1e-6, rtol=1e-6)
    assert (without - expected).abs().max() > 1e-3


def test_a_cell_of_the_condition_lies_on_its_latents():
    """In the input of the transformer's first layer, token for token; 2x2 tokens a cell in the second stage."""
    decoder = toy_decoder("flux")
    decoder.condition_projection = torch.nn.Conv2d(CONDITION, 6, 1)
    seen = []
    decoder.denoiser.x_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    condition = torch.randn(1, CONDITION, 2, 3)
    latents = torch.arange(8 * 12.0).view(1, 1, 8, 12).expand(1, 4, 8, 12)
    with torch.no_grad():
        decoder(latents, torch.tensor([1.0]), condition, **decoder.empty_prompt(1))
        projected = decoder.condition_projection(condition)
    tokens = seen[0].view(4, 6, -1)
    for row, column in ((0, 0), (1, 4), (3, 5)):
        token = tokens[row, column]
        torch.testing.assert_close(token[-6:], projected[0, :, row // 2, column // 2])
        assert (
            token[:4].tolist() == latents[0, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten().tolist()
        )


def test_pack_and_unpack_are_inverse():
    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(unpack_latents(pack_latents(latents), 4, 6), latents)
    assert torch.equal(pack_latents(latents), FluxPipeline._pack_latents(latents, 2, 3, 4, 6))


@pytest.mark.parametrize("family", ["unet", "qwen"])
def test_latents_are_the_vaes(family):
    vae, pixels = toy_vae(family), torch.rand(1, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        latents = encode_latents(vae, pixels)
        if family == "qwen":
            mean, std = (torch.tensor(vae.config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
            raw = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
            expected, decoded = (raw - mean) / std, vae.decode(raw[:, :, None]).sample[:, :, 0]
        else:
            raw = vae.encode(pixels).latent_dist.mode()
            expected, decoded = (raw - 0.1) * 0.7, vae.decode(raw).sample
        torch.testing.assert_close(latents, expected)
        torch.testing.assert_close(decode_latents(vae, latents), decoded, atol=1e-5, rtol=1e-4)


def test_tiles_of_what_needs_no_neighbours_are_the_whole():
    latents, condition = torch.randn(2, 3, 18, 10), torch.randn(2, 3, 9, 5)
    spread = condition.repeat_interleave(2, 2).repeat_interleave(2, 3)
    sizes = []

    def predict(latents, condition):
        sizes.append(tuple(condition.shape[2:]))
        return latents + condition.repeat_interleave(2, 2).repeat_interleave(2, 3)

    torch.testing.assert_close(predict_in_tiles(predict, latents, condition, tile=4), latents + spread)
    assert set(sizes) == {(4, 4)} and len(sizes) == 3 * 2


@pytest.fixture(scope="module")
def pipes():
    return {family: toy_decoder_pipeline(family) for family in FAMILIES}


def codes_of(pipe, *buckets):
    schedule = pipe.image_processor.schedule
    schedules = [schedule.grids(bucket, 4) for bucket in buckets]
    image_grids = torch.tensor(schedule.image_grids(schedules))
    count = int(image_grids.prod(-1).sum())
    return torch.randint(24, (count,), generator=torch.Generator().manual_seed(count)), image_grids


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bucket_and_batch_is_single_and_seeded(pipes, family):
    pipe = pipes[family]
    codes, grids = codes_of(pipe, *BUCKETS, (4, 4))
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    state = torch.get_rng_state()
    images = pipe(codes, grids, generator=generators(*range(8)), **options).images
    assert torch.equal(torch.get_rng_state(), state)
    for image, (rows, columns) in zip(images, BUCKETS):
        assert image.shape == (3, 4 * rows, 4 * columns)
    alone = pipe(*codes_of_one(codes, grids, 7), generator=generators(7), **options).images
    torch.testing.assert_close(alone[0], images[7], atol=1e-4, rtol=1e-4)
    again = pipe(*codes_of_one(codes, grids, 7), generator=generators(7), **options).images
    assert torch.equal(alone, again)
    other = pipe(*codes_of_one(codes, grids, 7), generator=generators(8), **options).images
    assert not torch.equal(alone, other)


def codes_of_one(codes, grids, index):
    counts = grids.prod(-1).sum(-1).tolist()
    return codes.split(counts)[index], grids[index : index + 1]


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_strength_begins_with_the_vq_image_or_another(pipes, family, tmp_path, monkeypatch):
    pipe = pipes[family]
    codes, grids = codes_of(pipe, (3, 5))
    options = {"num_inference_steps": 4, "strength": 0.5, "generator": generators(0)}
    steps = []
    pipe(codes, grids, **options, callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(timestep))
    assert len(steps) == 2 and pipe.num_timesteps == 2 and steps[0] < 700
    with torch.no_grad():
        vq = pipe.vision_tokenizer.decode(codes, grids)
    start = pipe.encode_start(codes, grids)
    torch.testing.assert_close(start, encode_latents(pipe.vae, vq))
    red = Image.new("RGB", (30, 18), "red")
    given = pipe.encode_start(codes, grids, init_image=[red])
    for mode in ("P", "RGBA"):
        torch.testing.assert_close(pipe.encode_start(codes, grids, init_image=[red.convert(mode)]), given)
    red.save(tmp_path / "red.png")
    path = str(tmp_path / "red.png")
    monkeypatch.setattr(pipe, "image_processor", toy_processor().image_processor)
    assert torch.equal(pipe.encode_start(codes, grids, init_image=[path]), given)
    # An opened file is what its path is: upright, and on white where it is transparent
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 18, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation
    tall.save(path, exif=exif)
    expected = pipe.encode_start(codes, grids, init_image=[path])
    assert torch.equal(pipe.encode_start(codes, grids, init_image=[Image.open(path)]), expected)
    monkeypatch.setattr(pipe, "image_processor", None)
    turned, exif[0x0112] = Image.new("RGB", (18, 30), "red"), 6
    turned.paste("blue", (0, 0, 18, 15))
    turned.save(path, exif=exif)
    lying = [turned.transpose(Image.Transpose.ROTATE_270)]
    assert torch.equal(
        pipe.encode_start(codes, grids, init_image=[Image.open(path)]),
        pipe.encode_start(codes, grids, init_image=lying),
    )
    with pytest.raises(ValueError, match="which needs `image_processor`: pass a PIL image"):
        pipe(image_codes=codes, image_grids=grids, init_image=path, strength=0.5)
    pixels = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 12, 20)
    torch.testing.assert_close(given, encode_latents(pipe.vae, pixels), atol=1e-4, rtol=1e-3)
    timestep = pipe.prepare_timesteps(pipe.scheduler, 4, 0.5, (6, 10))[0]
    noise = torch.randn(1, 4, 6, 10)
    begun = pipe.prepare_latents(pipe.scheduler, timestep, 1, (6, 10), noise=noise, start=start)
    if family == "flux":
        sigma = pipe.scheduler.sigmas[2]
        expected = (1 - sigma) * start + sigma * noise
    else:
        alpha = pipe.scheduler.alphas_cumprod[int(timestep)]
        expected = alpha.sqrt() * start + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(begun, expected)


def test_an_image_is_its_codes_and_twice_the_size_is_twice_the_size(pipes):
    pipe = toy_decoder_pipeline("sd3", upscale_factor=2)
    image = Image.effect_mandelbrot((20, 12), (-2, -1, 1, 1), 20).convert("RGB")
    codes, grids = pipe.encode_image(image)
    options = {"num_inference_steps": 1, "output_type": "np"}
    first = pipe(image=image, generator=generators(0), **options).images
    second = pipe(codes, grids, generator=generators(0), **options).images
    assert first.shape == (1, 24, 40, 3) and (first == second).all()
    tiled = pipe(codes, grids, generator=generators(0), tile_size=32, **options).images
    assert tiled.shape == first.shape and not (tiled == first).all()


def test_guidance_leads_away_from_no_condition(pipes):
    pipe = pipes["unet"]
    decoder, latents, timestep = pipe.diffusion_decoder, torch.randn(1, 4, 4, 4), torch.tensor(500)
    condition, prompt = torch.randn(1, CONDITION, 2, 2), decoder.empty_prompt(1)
    pipe._guidance_scale = 3.0
    with torch.no_grad():
        guided = pipe.predict(
            pipe.scheduler, latents, timestep, condition, {"encoder_hidden_states": torch.zeros(2, 1, 8)}
        )
        conditional = decoder(latents, timestep, condition, **prompt).sample
        without = decoder(latents, timestep, torch.zeros_like(condition), **prompt).sample
    torch.testing.assert_close(guided, without + 3 * (conditional - without), atol=1e-5, rtol=1e-4)


def test_callback_changes_latents_and_stops(pipes):
    pipe = pipes["qwen"]
    codes, grids = codes_of(pipe, (2, 7))
    options = {"num_inference_steps": 3, "output_type": "latent", "generator": generators(0)}

    def clear(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert not pipe(codes, grids, **options, callback_on_step_end=clear).images.any()
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True

    assert pipe(codes, grids, **options, callback_on_step_end=stop).images.any() and steps == [0]


def test_prompts_are_read_by_the_denoisers_own_text_encoder(tmp_path):
    encoder, tokenizer = toy_clip()
    parts = {"text_encoder": encoder, "tokenizer": tokenizer}
    plain = toy_decoder_pipeline("unet")
    pipe = NextFlowDiffusionDecoderPipeline(**{**plain.components, **parts})
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        embeds = pipe.encode_prompt(["a b", "b"])["encoder_hidden_states"]
        ids = tokenizer(["a b", "b"], padding="max_length", return_tensors="pt").input_ids
        torch.testing.assert_close(embeds, encoder(ids)[0])
    codes, grids = codes_of(pipe, (2, 7))

    def draw(pipe, prompt):
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 1, "generator": generators(0), "output_type": "latent"}
        return pipe(codes, grids, prompt=prompt, **options).images

    first, second = draw(pipe, "a"), draw(pipe, "b")
    assert not torch.equal(first, second)
    pipe.save_pretrained(tmp_path)
    loaded = NextFlowDiffusionDecoderPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(draw(loaded, "b"), second, atol=1e-3, rtol=1e-4)
    assert loaded.vision_tokenizer is not None and loaded.text_encoder_2 is None
    half = NextFlowDiffusionDecoderPipeline(**{**plain.components, "tokenizer": tokenizer})
    with pytest.raises(ValueError, match="text_encoder"):
        half(codes, grids)


def test_prompts_of_transformers(pipes):
    """FLUX: pooled CLIP and T5's tokens. SD3: two pooled CLIPs, and zeros for a T5 that is not there."""
    texts = ["a b", "b"]
    (clip, tokenizer), (t5, words) = toy_clip(), toy_t5()
    parts = {"text_encoder": clip, "tokenizer": tokenizer, "text_encoder_2": t5, "tokenizer_2": words}
    flux = NextFlowDiffusionDecoderPipeline(**{**pipes["flux"].components, **parts})
    ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        prompt = flux.encode_prompt(texts, max_sequence_length=5)
        torch.testing.assert_close(prompt["pooled_projections"], clip(ids).pooler_output)
        padded = torch.tensor([[2, 3, 0, 0, 0], [3, 0, 0, 0, 0]])
        torch.testing.assert_close(prompt["encoder_hidden_states"], t5(padded)[0])
        clip, _ = toy_clip(4, projection=True)
        parts = {"text_encoder": clip, "tokenizer": tokenizer, "text_encoder_2": clip, "tokenizer_2": tokenizer}
        sd3 = NextFlowDiffusionDecoderPipeline(**{**pipes["sd3"].components, **parts})
        prompt = sd3.encode_prompt(texts, max_sequence_length=3)
        embeds = clip(ids, output_hidden_states=True)
        torch.testing.assert_close(prompt["pooled_projections"], torch.cat([embeds.text_embeds] * 2, -1))
        tokens = prompt["encoder_hidden_states"]
        torch.testing.assert_close(tokens[:, :7], torch.cat([embeds.hidden_states[-2]] * 2, -1))
        assert tokens.shape == (2, 7 + 3, 8) and not tokens[:, 7:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of `image_codes` and `image`, got neither"),
        ({"image_codes": True}, "go together"),
        ({"image_codes": True, "image_grids": True, "image": Image.new("RGB", (4, 4))}, "got both"),
        ({"image": Image.new("RGB", (16, 16)), "prompt": "a"}, "no text encoder"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 1.5}, "strength` is 1.5"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 0.01}, "strength` is 0.01 of 25"),
        ({"image": Image.new("RGB", (16, 16)), "num_inference_steps": 0}, "num_inference_steps` is 0"),
        ({"image": Image.new("RGB", (16, 16)), "init_image": Image.new("RGB", (4, 4))}, "`strength` is 1"),
        ({"image": Image.new("RGB", (16, 16)), "tile_size": 6}, "multiple of 4 pixels, at least 16"),
        ({"image": Image.new("RGB", (16, 16)), "output_type": "jpg"}, "output_type` is 'jpg'"),
        ({"image": Image.new("RGB", (16, 16)), "callback_on_step_end_tensor_inputs": ["x"]}, r"\['x'\]"),
        ({"image": [Image.new("RGB", (16, 16))] * 2, "generator": generators(0)}, "1 entries for 2 images"),
        ({"image": Image.new("RGB", (16, 16)), "latents": torch.zeros(1, 4, 4, 4)}, r"expected \(1, 4, 8, 8\)"),
        ({"image_codes": True, "image_grids": True, "num_scales": 2}, "has 31 codes, `image_grids` asks for 5"),
    ],
)
def test_bad_calls_are_refused(pipes, options, message):
    codes, grids = codes_of(pipes["unet"], (4, 4))
    if options.get("image_codes"):
        options = {**options, "image_codes": torch.cat([codes, codes[:1]])}
    if options.get("image_grids"):
        options = {**options, "image_grids": grids}
    with pytest.raises(ValueError, match=message):
        pipes["unet"](**options)


def test_bad_decoders_are_refused():
    with pytest.raises(ValueError, match="is a AutoencoderKL, expected one of"):
        NextFlowDiffusionDecoder.from_denoiser(toy_vae("unet"), condition_channels=4)
    patched = SD3Transformer2DModel(patch_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    with pytest.raises(ValueError, match="patch_size is 4, expected 2"):
        NextFlowDiffusionDecoder.from_denoiser(patched, condition_channels=4)
    with pytest.raises(ValueError, match="upscale_factor is 3, expected 1 or 2"):
        toy_decoder("unet", upscale_factor=3)
    decoder = toy_decoder("unet")
    with pytest.raises(ValueError, match=r"\(5, 4\), expected a multiple of the condition's \(2, 2\)"):
        decoder(torch.zeros(1, 4, 5, 4), torch.tensor([1]), torch.zeros(1, CONDITION, 2, 2))
    pipe = toy_decoder_pipeline("flux")
    pipe.vae = toy_vae("unet").__class__(block_out_channels=(4, 4, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)  # fmt: skip
    codes, grids = codes_of(pipe, (4, 4))
    with pytest.raises(ValueError, match="a cell is 4 pixels wide, expected a multiple of 8"):
        pipe(codes, grids)
    pipe.vae = None
    with pytest.raises(ValueError, match="latents have 4 channels, those of the VAE 3"):
        pipe(codes, grids)
    pipe.vision_tokenizer.config.pixel_code_dim = 5
    with pytest.raises(ValueError, match="wants 26 channels of condition, but the vision tokenizer has 27"):
        pipe(codes, grids)
    pipe.vision_tokenizer.config.semantic_feature_size = 3  # other than the encoder's width
    with pytest.raises(ValueError, match="wants 26 channels of condition, but the vision tokenizer has 14"):
        pipe(codes, grids)


def test_without_a_vae_it_denoises_pixels():
    pipe = toy_decoder_pipeline("unet", channels=3)
    pipe = NextFlowDiffusionDecoderPipeline(**{**pipe.components, "vae": None})
    codes, grids = codes_of(pipe, (3, 5))
    images = pipe(codes, grids, num_inference_steps=1, generator=generators(0), output_type="latent").images
    assert images.shape == (1, 3, 12, 20)
    with torch.no_grad():
        assert torch.equal(pipe.encode_start(codes, grids), pipe.vision_tokenizer.decode(codes, grids))


@pytest.fixture(scope="module")
def whole(pipes) -> NextFlowPipeline:
    pipe, standalone = toy_pipeline(), pipes["sd3"]
    parts = {"decoder_scheduler": standalone.scheduler, "decoder_vae": standalone.vae}
    pipe = NextFlowPipeline(**{**pipe.components, **parts, "diffusion_decoder": standalone.diffusion_decoder})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_delegates(whole, pipes):
    options = {"aspect_ratio": "5:3", "generator": generators(1), "output_type": "np"}
    vq = whole("a", **options)
    drawn = whole("a", **{**options, "generator": generators(1)}, decoder="diffusion", decoder_num_inference_steps=2)
    assert torch.equal(vq.image_codes, drawn.image_codes)
    assert vq.images.shape == drawn.images.shape == (1, 12, 20, 3) and not (vq.images == drawn.images).all()
    own = {"decoder": "diffusion", "decoder_num_inference_steps": 2, "decoder_strength": 0.5}
    other = whole("a", **{**options, "generator": generators(1)}, **own, decoder_generator=generators(9)).images
    noise = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=generators(9)[0])))
    alone = pipes["sd3"](
        vq.image_codes, vq.image_grids, num_inference_steps=2, strength=0.5, generator=[noise], output_type="np"
    ).images
    assert (alone == other).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "gan"}, "`decoder` is 'gan'"),
        ({"decoder_strength": 0.5}, r"\['decoder_strength'\] with `decoder='vq'`"),
        ({"decoder": "diffusion", "output_type": "codes"}, "codes are not decoded"),
        ({"decoder": "diffusion", "decoder_prompt": "a cat"}, "no text encoder"),
        ({"decoder": "diffusion", "decoder_strength": 2.0}, "strength` is 2.0"),
    ],
)
def test_the_pipeline_refuses_early(whole, options, message):
    with pytest.raises(ValueError, match=message):
        whole("a", **options)


def test_a_pipeline_without_decoder_says_so():
    with pytest.raises(ValueError, match="this pipeline has no diffusion decoder"):
        toy_pipeline()("a", decoder="diffusion")


def test_every_entry_point_calls_the_offload_hook(whole):
    class Recorder(ModelHook):
        def __init__(self, name: str):
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            order.append(self.name)
            return args, kwargs

    order: list[str] = []
    names = ("transformer", "vision_tokenizer", "diffusion_decoder", "decoder_vae")
    for name in names:
        add_hook_to_module(whole.components[name], Recorder(name))
    try:
        whole("a", decoder="diffusion", decoder_num_inference_steps=2, decoder_strength=0.5)
    finally:
        for name in names:
            remove_hook_from_module(whole.components[name])
    decoding = ["vision_tokenizer", "vision_tokenizer", "decoder_vae", "diffusion_decoder", "decoder_vae"]
    assert order == ["transformer", *decoding]
    known = [name for name in whole.model_cpu_offload_seq.split("->") if whole.components[name] is not None]
    assert set(known) == set(names)


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_half_precision(family):
    pipe = toy_decoder_pipeline(family).to(torch.bfloat16)
    codes, grids = codes_of(pipe, (4, 4))
    options = {"num_inference_steps": 2, "strength": 0.5, "guidance_scale": 2.0, "output_type": "pt"}
    images = pipe(codes, grids, generator=generators(0), **options).images
    assert images.dtype == torch.float32 and images.isfinite().all()


def test_export_puts_the_decoder_into_sub_folders(whole, tmp_path):
    card = create_card("model", repo_id="toy/nextflow")
    folder = export_pipeline(whole, tmp_path / "toy", card, dtype={"diffusion_decoder": torch.bfloat16})
    assert (folder / "diffusion_decoder" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = NextFlowPipeline.from_pretrained(folder, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.decoder_text_encoder is None
    for name, value in loaded.diffusion_decoder.named_parameters():
        assert torch.equal(value, whole.diffusion_decoder.get_parameter(name).bfloat16().float()), name
    options = {"generator": generators(1), "decoder": "diffusion", "decoder_num_inference_steps": 1}
    assert loaded("a", **options).images[0].size == (16, 16)
    without = NextFlowPipeline.from_pretrained(folder, diffusion_decoder=None)
    assert without.diffusion_decoder is None
