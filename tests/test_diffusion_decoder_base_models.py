"""The diffusion decoder on whole pipelines of diffusers: before training it draws what they draw, captions and all."""

import pytest
import torch
from diffusers import FluxPipeline
from toy_decoder import CONDITION, FAMILIES, toy_base_model, toy_decoder_pipeline, toy_denoiser, toy_qwen

from nextflow_hf import NextFlowDiffusionDecoder, NextFlowDiffusionDecoderPipeline
from nextflow_hf.training.diffusion_decoder.build import DecoderArguments, build_decoder_pipeline


DENOISER = {"unet": "unet", "flux": "transformer", "sd3": "transformer", "qwen": "transformer"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Family -> its base model as diffusers loads it, and what a recipe makes of it."""

    def build(family: str):
        if family not in pairs:
            folder = tmp_path_factory.mktemp(family)
            toy_base_model(family).save_pretrained(folder)
            plain = toy_decoder_pipeline(family)
            recipe = DecoderArguments(base_model=str(folder), denoiser=DENOISER[family])
            pipe = build_decoder_pipeline(recipe, plain.vision_tokenizer, plain.image_processor)
            pairs[family] = type(toy_base_model(family)).from_pretrained(folder), pipe
            for each in pairs[family]:
                each.set_progress_bar_config(disable=True)
        return pairs[family]

    pairs: dict = {}
    return build


def codes_of(pipe: NextFlowDiffusionDecoderPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    schedule = pipe.image_processor.schedule
    grids = torch.tensor(schedule.image_grids([schedule.grids((2, 8), 4)] * 2))
    return torch.randint(24, (int(grids.prod(-1).sum()),), generator=torch.Generator().manual_seed(0)), grids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_before_training_it_draws_what_the_base_model_draws(built, family, guidance):
    if guidance != 1 and family in ("flux", "qwen"):
        pytest.skip("their pipelines guide in another way")
    base, pipe = built(family)
    assert pipe.has_text_encoder and pipe.vae is not None
    noise = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(1))
    prompts, options = ["a b", "b"], {"num_inference_steps": 3, "output_type": "latent"}
    given = FluxPipeline._pack_latents(noise, *noise.shape) if pipe.diffusion_decoder.family.is_packed else noise
    guiding = {"true_cfg_scale" if family == "qwen" else "guidance_scale": guidance}
    expected = base(prompts, height=8, width=32, latents=given, **guiding, **options).images
    if pipe.diffusion_decoder.family.is_packed:
        expected = FluxPipeline._unpack_latents(expected, 8, 32, 2)
    drawn = pipe(*codes_of(pipe), prompt=prompts, latents=noise, guidance_scale=guidance, **options).images
    torch.testing.assert_close(drawn, expected, atol=2e-4, rtol=1e-3)
    without = pipe(*codes_of(pipe), latents=noise, guidance_scale=guidance, **options).images
    assert (drawn - without).abs().max() > 2e-3  # the captions were read


def test_captions_of_qwen_image():
    """The states of the prompt's own tokens: what the template says before it is cut off, the rest padded."""
    encoder, tokenizer = toy_qwen()
    plain = toy_decoder_pipeline("qwen")
    parts = {**plain.components, "text_encoder": encoder, "tokenizer": tokenizer}
    pipe = NextFlowDiffusionDecoderPipeline(**parts)
    with torch.no_grad():
        prompt = pipe.encode_prompt(["a b", "b"])
    mask = prompt["encoder_hidden_states_mask"]
    lengths = mask.sum(1)
    assert lengths[0] == lengths[1] + 1 == prompt["encoder_hidden_states"].shape[1]
    template = toy_base_model("qwen").prompt_template_encode
    for index, text in enumerate(["a b", "b"]):
        ids = tokenizer(template.format(text), return_tensors="pt").input_ids
        with torch.no_grad():
            states = encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, 34:]
        torch.testing.assert_close(
            prompt["encoder_hidden_states"][index, : lengths[index]], states, atol=1e-5, rtol=1e-4
        )


def test_a_guidance_distilled_base_is_told_its_guidance(tmp_path):
    """FLUX.1-dev wants to know its guidance scale; the decoder keeps to one number, saved with it."""
    base = toy_denoiser("flux", guidance_embeds=True)
    base.save_pretrained(tmp_path / "base")
    options = {"condition_channels": CONDITION, "embedded_guidance": 2.5}
    made = NextFlowDiffusionDecoder.from_pretrained_denoiser(tmp_path / "base", **options)
    made.save_pretrained(tmp_path / "decoder")
    decoder = NextFlowDiffusionDecoder.from_pretrained(tmp_path / "decoder").eval()
    latents, timestep, prompt = torch.randn(2, 4, 4, 4), torch.tensor([500.0, 20.0]), decoder.empty_prompt(2)
    with torch.no_grad():
        predicted = decoder(latents, timestep, torch.randn(2, CONDITION, 2, 2), **prompt).sample
        expected, other = (
            base(
                FluxPipeline._pack_latents(latents, *latents.shape),
                timestep=timestep / 1000,
                guidance=torch.full((2,), guidance),
                img_ids=FluxPipeline._prepare_latent_image_ids(1, 2, 2, "cpu", torch.float32),
                txt_ids=torch.zeros(1, 3),
                **prompt,
            ).sample
            for guidance in (2.5, 1.0)
        )
    unpacked = FluxPipeline._unpack_latents(expected, 8, 8, 2)
    torch.testing.assert_close(predicted, unpacked, atol=1e-5, rtol=1e-4)
    assert (expected - other).abs().max() > 1e-3
