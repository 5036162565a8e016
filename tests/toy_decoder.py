"""A tiny random denoiser of every family, a VAE, and the diffusion decoder's pipeline around the toy tokenizer."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_pipeline import toy_pipeline, toy_processor, toy_vision_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from nextflow_hf import NextFlowDiffusionDecoder, NextFlowDiffusionDecoderPipeline, NextFlowPipeline


FAMILIES = ("unet", "flux", "sd3", "qwen")
CONDITION = 6 + 4 + 16  # the toy tokenizer's two codes and its semantic features


def toy_denoiser(family: str, channels: int = 4, **options) -> ModelMixin:
    """The input channels are those of latents with `channels`."""
    torch.manual_seed(3)
    if family == "unet":
        return UNet2DConditionModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            **options,
        ).eval()
    if family == "flux":
        return FluxTransformer2DModel(
            in_channels=4 * channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
            **options,
        ).eval()
    if family == "sd3":
        return SD3Transformer2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=64,
        ).eval()
    return QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def toy_decoder(family: str, channels: int = 4, **options) -> NextFlowDiffusionDecoder:
    """Every weight is random, also those that start at zero, so that the condition shows."""
    options = {"projection_dim": 6, **options}
    denoiser = toy_denoiser(family, channels)
    decoder = NextFlowDiffusionDecoder.from_denoiser(denoiser, condition_channels=CONDITION, **options).eval()
    with torch.no_grad():
        wide = decoder.denoiser.get_submodule(decoder.family.input_layer).weight
        wide[:, -6:].normal_(std=0.3)
    return decoder


def toy_vae(family: str) -> AutoencoderKL | AutoencoderKLQwenImage:
    """Two pixels a latent: with the toy tokenizer's four pixels a cell, a cell is one 2x2 patch of latents."""
    torch.manual_seed(4)
    if family == "qwen":
        return AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[1.5, 0.5, 1.0, 2.0],
        ).eval()
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.1,
        scaling_factor=0.7,
    ).eval()


def toy_scheduler(family: str) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    if family == "unet":
        return DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=family == "flux")


def toy_decoder_pipeline(family: str, **options) -> NextFlowDiffusionDecoderPipeline:
    pipe = NextFlowDiffusionDecoderPipeline(
        toy_decoder(family, **options),
        toy_scheduler(family),
        toy_vision_tokenizer(),
        toy_processor().image_processor,
        toy_vae(family),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def toy_clip(hidden_size: int = 8, *, projection: bool = False) -> tuple[PreTrainedModel, CLIPTokenizer]:
    """A text encoder that knows the words a and b."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=7)
    config = CLIPTextConfig(
        vocab_size=6,
        hidden_size=hidden_size,
        intermediate_size=8,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(5)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval(), tokenizer


def toy_words() -> PreTrainedTokenizerFast:
    """A number for every word and every mark."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def toy_t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    config = T5Config(vocab_size=4, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    torch.manual_seed(6)
    return T5EncoderModel(config).eval(), toy_words()


def toy_qwen() -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """A text encoder of Qwen-Image's kind."""
    text = {
        "vocab_size": 4,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    torch.manual_seed(7)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return model.eval(), toy_words()


def toy_base_model(family: str) -> DiffusionPipeline:
    """A whole pipeline of diffusers of that family, as a hub has it, without its denoiser's twin of ours."""
    parts = {"scheduler": toy_scheduler(family), "vae": toy_vae(family)}
    parts["unet" if family == "unet" else "transformer"] = toy_denoiser(family)
    if family == "qwen":
        parts["text_encoder"], parts["tokenizer"] = toy_qwen()
        return QwenImagePipeline(**parts)
    if family == "sd3":
        for suffix in ("", "_2"):
            parts[f"text_encoder{suffix}"], parts[f"tokenizer{suffix}"] = toy_clip(4, projection=True)
        parts["text_encoder_3"], parts["tokenizer_3"] = toy_t5()
        return StableDiffusion3Pipeline(**parts)
    parts["text_encoder"], parts["tokenizer"] = toy_clip()
    if family == "flux":
        parts["text_encoder_2"], parts["tokenizer_2"] = toy_t5()
        return FluxPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def toy_whole_pipeline() -> NextFlowPipeline:
    """The toy pipeline with a diffusion decoder, and every part of it that a UNet has."""
    text_encoder, tokenizer = toy_clip()
    return NextFlowPipeline(
        **{name: part for name, part in toy_pipeline().components.items() if part is not None},
        diffusion_decoder=toy_decoder("unet"),
        decoder_scheduler=toy_scheduler("unet"),
        decoder_vae=toy_vae("unet"),
        decoder_text_encoder=text_encoder,
        decoder_tokenizer=tokenizer,
    )
