"""The optional diffusion decoder (§2.3): a denoiser of diffusers that also sees what the codes say of every cell.

No new denoiser. The codes' two embeddings and the decoded semantic feature are concatenated on the token grid, go
through one projection, and enter through columns added to the denoiser's own input layer. These start at zero, so
that the first step is the base model, bit for bit; the caption keeps the denoiser's text branch to itself.
"""

from os import PathLike
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.auto_model import AutoModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from .helpers_nextflow import check_fingerprint
from .latents_nextflow import pack_latents, spread, unpack_latents


class DenoiserFamily(NamedTuple):
    """How a class of denoisers takes in the condition and captions."""

    input_layer: str  # the layer that gets more columns
    is_packed: bool  # whether it takes 2x2 patches of the latents as a sequence
    projection_type: str  # of the condition: one layer (UNet) or an MLP (transformers), as in the paper
    text_encoders: tuple[str, ...]  # those that its own pipeline cannot do without, by their suffix


FAMILIES = {
    "UNet2DConditionModel": DenoiserFamily("conv_in", False, "linear", ("",)),
    "FluxTransformer2DModel": DenoiserFamily("x_embedder", True, "mlp", ("", "_2")),
    "SD3Transformer2DModel": DenoiserFamily("pos_embed.proj", False, "mlp", ("", "_2")),
    "QwenImageTransformer2DModel": DenoiserFamily("img_in", True, "mlp", ("",)),
}


def decoder_condition(
    semantic_embeds: torch.Tensor, pixel_embeds: torch.Tensor, semantic_features: torch.Tensor
) -> torch.Tensor:
    """What the vision tokenizer's `decode_features` says of every cell, as one map (n, channels, rows, columns)."""
    # Quantised maps are float32; the semantic decoder computes in the tokenizer's dtype.
    return torch.cat([semantic_embeds, pixel_embeds, semantic_features.to(semantic_embeds.dtype)], dim=1)


class NextFlowDiffusionDecoder(ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    A denoiser of diffusers under the condition of the vision tokenizer's codes. Made from a pretrained one with
    [`~NextFlowDiffusionDecoder.from_denoiser`] or [`~NextFlowDiffusionDecoder.from_pretrained_denoiser`].

    Args:
        denoiser_class (`str`):
            `"UNet2DConditionModel"`, `"FluxTransformer2DModel"`, `"SD3Transformer2DModel"` or
            `"QwenImageTransformer2DModel"`.
        denoiser_config (`dict`): Its configuration, input channels already widened by `projection_dim`.
        condition_channels (`int`):
            Channels of the condition: the vision tokenizer's `config.condition_channels`.
        projection_dim (`int`): Channels that the condition is projected to.
        projection_type (`str`, *optional*, defaults to `"linear"`): `"linear"`, or `"mlp"`: two layers and a GELU.
        upscale_factor (`int`, *optional*, defaults to 1):
            Side of the image that it was trained to make, in units of what the VQ decoder makes: 1, or 2 after the
            second training stage (§3.3).
        embedded_guidance (`float`, *optional*, defaults to 1.0):
            What a guidance-distilled denoiser is told, in training as in sampling. Others ignore it.
        vision_tokenizer_fingerprint (`str`, *optional*):
            Fingerprint of the vision tokenizer whose codes it knows: those of another one are refused.
    """

    config: Any  # diffusers types it as a plain dict; its entries are attributes, too
    denoiser: Any

    _supports_gradient_checkpointing = True
    _no_split_modules = [
        "BasicTransformerBlock",
        "FluxSingleTransformerBlock",
        "FluxTransformerBlock",
        "JointTransformerBlock",
        "QwenImageTransformerBlock",
        "ResnetBlock2D",
    ]
    _repeated_blocks = [
        "BasicTransformerBlock",
        "FluxSingleTransformerBlock",
        "FluxTransformerBlock",
        "JointTransformerBlock",
        "QwenImageTransformerBlock",
    ]
    _group_offload_block_modules = ["denoiser"]
    _skip_layerwise_casting_patterns = ["condition_projection", "norm", "pos_embed"]

    @register_to_config
    def __init__(
        self,
        denoiser_class: str,
        denoiser_config: dict[str, Any],
        condition_channels: int,
        projection_dim: int,
        projection_type: str = "linear",
        upscale_factor: int = 1,
        embedded_guidance: float = 1.0,
        vision_tokenizer_fingerprint: str | None = None,
    ):
        super().__init__()
        if denoiser_class not in FAMILIES:
            raise ValueError(f"denoiser_class is {denoiser_class!r}, expected one of {sorted(FAMILIES)}")
        if upscale_factor not in (1, 2):
            raise ValueError(f"upscale_factor is {upscale_factor}, expected 1 or 2")
        self.denoiser = getattr(diffusers, denoiser_class).from_config(denoiser_config)
        self.condition_projection = _projection(projection_type, condition_channels, projection_dim)

    @classmethod
    def from_pretrained_denoiser(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *,
        condition_channels: int,
        subfolder: str | None = None,
        projection_dim: int | None = None,
        upscale_factor: int = 1,
        embedded_guidance: float = 1.0,
        **kwargs,
    ) -> "NextFlowDiffusionDecoder":
        """
        [`~NextFlowDiffusionDecoder.from_denoiser`] on a checkpoint of diffusers: a Hub id or a folder, of the denoiser
        itself or, with `subfolder` (`"unet"`, `"transformer"`), of a whole pipeline. `kwargs` go to its
        `from_pretrained`.
        """
        denoiser: Any = AutoModel.from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        return cls.from_denoiser(
            denoiser,
            condition_channels=condition_channels,
            projection_dim=projection_dim,
            upscale_factor=upscale_factor,
            embedded_guidance=embedded_guidance,
        )

    @classmethod
    def from_denoiser(
        cls,
        denoiser: Any,
        *,
        condition_channels: int,
        projection_dim: int | None = None,
        upscale_factor: int = 1,
        embedded_guidance: float = 1.0,
    ) -> "NextFlowDiffusionDecoder":
        """
        A decoder that so far ignores its condition: the base denoiser with a wider input layer, new columns zero.

        Args:
            denoiser (`ModelMixin`): A model of one of the four classes. It is taken over, not copied.
            condition_channels (`int`): See [`NextFlowDiffusionDecoder`].
            projection_dim (`int`, *optional*): Defaults to the width of the input layer.
            upscale_factor (`int`, *optional*, defaults to 1): See [`NextFlowDiffusionDecoder`].
            embedded_guidance (`float`, *optional*, defaults to 1.0): See [`NextFlowDiffusionDecoder`].

        Raises:
            `ValueError`: for a denoiser of another class.
        """
        name = type(denoiser).__name__
        if name not in FAMILIES:
            raise ValueError(f"the denoiser is a {name}, expected one of {sorted(FAMILIES)}")
        _check_denoiser(denoiser, name)
        family = FAMILIES[name]
        layer = denoiser.get_submodule(family.input_layer)
        width: int = projection_dim or layer.weight.shape[0]
        old_channels = layer.weight.shape[1]
        wide = _widened(layer, width)  # with zeros: the base model at first
        parent, _, attribute = family.input_layer.rpartition(".")
        setattr(denoiser.get_submodule(parent), attribute, wide)
        # Where `out_channels` was left to follow `in_channels`, it no longer may.
        out_channels = denoiser.config.out_channels or old_channels
        denoiser.register_to_config(in_channels=old_channels + width, out_channels=out_channels)
        config = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
        with torch.device("meta"):  # the real parts are put in place below
            model = cls(
                denoiser_class=name,
                denoiser_config=config,
                condition_channels=condition_channels,
                projection_dim=width,
                projection_type=family.projection_type,
                upscale_factor=upscale_factor,
                embedded_guidance=embedded_guidance,
            )
        model.denoiser = denoiser
        projection = _projection(family.projection_type, condition_channels, width)
        model.condition_projection = projection.to(wide.weight.device, wide.weight.dtype)
        return model

    @property
    def family(self) -> DenoiserFamily:
        """How the denoiser's class takes in the condition and captions."""
        return FAMILIES[self.config.denoiser_class]

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that it denoises."""
        own = self.denoiser.config.in_channels - self.config.projection_dim
        return own // 4 if self.family.is_packed else own

    def check_codes(self, vision_tokenizer: PreTrainedModel) -> None:
        """Raises `ValueError` where it knows the codes of another vision tokenizer."""
        check_fingerprint("diffusion decoder", self.config.vision_tokenizer_fingerprint, vision_tokenizer)

    def check_parts(
        self, vision_tokenizer: Any, *, vae_channels: int, pixels_per_cell: int, pixels_per_latent: int
    ) -> None:
        """Raises `ValueError` where the vision tokenizer, or the latents of a VAE, do not fit the decoder."""
        channels = vision_tokenizer.config.condition_channels
        if channels != self.config.condition_channels:
            raise ValueError(
                f"the diffusion decoder wants {self.config.condition_channels} channels of condition, but the "
                f"vision tokenizer has {channels}"
            )
        self.check_codes(vision_tokenizer)
        if vae_channels != self.latent_channels:
            raise ValueError(
                f"the diffusion decoder's latents have {self.latent_channels} channels, those of the VAE "
                f"{vae_channels}"
            )
        is_unet = self.config.denoiser_class == "UNet2DConditionModel"
        needed = pixels_per_latent if is_unet else 2 * pixels_per_latent  # of transformers 2x2 latents are a token
        if pixels_per_cell % needed:
            raise ValueError(
                f"a cell is {pixels_per_cell} pixels wide, expected a multiple of {needed}: of the VAE's "
                f"{pixels_per_latent} pixels for a latent, with a {self.config.denoiser_class}"
            )

    def empty_prompt(self, batch_size: int) -> dict[str, torch.Tensor]:
        """
        The text branch's inputs without a text encoder: one token of zeros. On the CPU: an offloaded decoder does not
        say where it computes.
        """
        config = self.denoiser.config
        is_unet = self.config.denoiser_class == "UNet2DConditionModel"
        text_dim = config.cross_attention_dim if is_unet else config.joint_attention_dim
        prompt = {"encoder_hidden_states": torch.zeros(batch_size, 1, text_dim, dtype=self.dtype)}
        if self.config.denoiser_class in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
            prompt["pooled_projections"] = torch.zeros(batch_size, config.pooled_projection_dim, dtype=self.dtype)
        return prompt

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        What the denoiser predicts, noise, velocity or flow, as its scheduler has it.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, latent_channels, height, width)`): Noisy latents.
            timestep (`torch.Tensor` of shape `(batch,)`): The scheduler's, from 0 to 1000.
            condition (`torch.Tensor` of shape `(batch, condition_channels, rows, columns)`):
                [`decoder_condition`] of the image; height and width are the same multiple of rows and columns. Zeros
                mean none.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, tokens, text_dim)`): The caption.
            pooled_projections (`torch.Tensor` of shape `(batch, pooled_dim)`, *optional*): For FLUX and SD3.
            encoder_hidden_states_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): For Qwen-Image.
            return_dict (`bool`, *optional*, defaults to `True`): Else a tuple.
        """
        height, width = hidden_states.shape[-2:]
        hidden_states = hidden_states.to(self.dtype)
        visual = self.condition_projection(condition.to(self.dtype))  # (batch, projection_dim, rows, columns)
        if self.family.is_packed:  # a cell is a token, or 2x2 tokens after the second stage
            visual = spread(visual, (height // 2, width // 2)).flatten(2).transpose(1, 2)
            hidden_states = torch.cat([pack_latents(hidden_states), visual], dim=2)
        else:
            hidden_states = torch.cat([hidden_states, spread(visual, (height, width))], dim=1)

        # The text encoder may be of another precision.
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states.to(self.dtype)
        if pooled_projections is not None:
            pooled_projections = pooled_projections.to(self.dtype)
        inputs = {"encoder_hidden_states": encoder_hidden_states, "return_dict": False}
        name = self.config.denoiser_class
        if name == "UNet2DConditionModel":
            sample = self.denoiser(hidden_states, timestep, **inputs)[0]
        elif name == "SD3Transformer2DModel":
            sample = self.denoiser(hidden_states, timestep=timestep, pooled_projections=pooled_projections, **inputs)[
                0
            ]
        elif name == "FluxTransformer2DModel":
            assert encoder_hidden_states is not None  # of FLUX it is no option
            sample = self.denoiser(
                hidden_states,
                timestep=timestep / 1000,  # from 0 to 1, as its own pipeline passes it
                guidance=self._guidance(timestep),
                pooled_projections=pooled_projections,
                img_ids=_grid_positions(height // 2, width // 2, hidden_states.device),
                txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, device=hidden_states.device),
                **inputs,
            )[0]
        else:
            sample = self.denoiser(
                hidden_states,
                timestep=timestep / 1000,  # likewise
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                img_shapes=[[(1, height // 2, width // 2)]] * len(hidden_states),
                **inputs,
            )[0]
        if self.family.is_packed:
            sample = unpack_latents(sample, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _guidance(self, timestep: torch.Tensor) -> torch.Tensor | None:
        if not self.denoiser.config.guidance_embeds:
            return None
        return torch.full_like(timestep, self.config.embedded_guidance, dtype=torch.float32)


def encode_captions(
    decoder: NextFlowDiffusionDecoder,
    components: dict[str, Any],
    prompts: list[str],
    device: torch.device,
    max_sequence_length: int | None,
) -> dict[str, torch.Tensor | None]:
    """Captions as the inputs of the denoiser's text branch, by the pipeline that the denoiser comes from."""
    # Here, not above: they take long to import.
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    options: dict[str, Any] = {"device": device}
    options |= {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    unused: dict[str, Any] = {"vae": None, "scheduler": None, "transformer": decoder.denoiser}  # for its config
    parts = {name: components[name] for name in components if name.startswith(("text_", "tokenizer"))}
    # SD3 has up to three text encoders, FLUX two, the UNet and Qwen-Image one.
    two = {name: part for name, part in parts.items() if not name.endswith("_3")}
    first = {name: part for name, part in two.items() if not name.endswith("_2")}
    name = decoder.config.denoiser_class
    if name == "UNet2DConditionModel":
        unused = {"vae": None, "scheduler": None, "unet": None, "safety_checker": None, "feature_extractor": None}
        stock = StableDiffusionPipeline(**first, **unused, requires_safety_checker=False)
        embeds, _ = stock.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}
    if name == "QwenImageTransformer2DModel":
        embeds, mask = QwenImagePipeline(**first, **unused).encode_prompt(prompts, **options)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}
    if name == "SD3Transformer2DModel":
        options |= {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
        embeds, _, pooled, _ = StableDiffusion3Pipeline(**parts, **unused).encode_prompt(prompts, **options)
    else:
        embeds, pooled, _ = FluxPipeline(**two, **unused).encode_prompt(prompts, **options)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _projection(projection_type: str, channels: int, projection_dim: int) -> nn.Module:
    """Convolutions of one cell: a linear layer for every cell of a map."""
    if projection_type == "linear":
        return nn.Conv2d(channels, projection_dim, 1)
    if projection_type == "mlp":
        return nn.Sequential(
            nn.Conv2d(channels, projection_dim, 1), nn.GELU(), nn.Conv2d(projection_dim, projection_dim, 1)
        )
    raise ValueError(f"projection_type is {projection_type!r}, expected 'linear' or 'mlp'")


def _widened(layer: nn.Linear | nn.Conv2d, extra: int) -> nn.Linear | nn.Conv2d:
    """The same layer with `extra` more inputs, whose weights are zero."""
    options = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    out_channels, in_channels = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        wide = nn.Linear(in_channels + extra, out_channels, **options)
    else:
        shape = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding")}
        wide = nn.Conv2d(in_channels + extra, out_channels, **shape, **options)
    with torch.no_grad():
        # Zeros rather than noise: the first training step starts from the base model's predictions.
        wide.weight.zero_()
        wide.weight[:, :in_channels] = layer.weight
        if layer.bias is not None and wide.bias is not None:
            wide.bias.copy_(layer.bias)
    return wide


def _check_denoiser(denoiser: Any, name: str) -> None:
    config = denoiser.config
    if name == "UNet2DConditionModel":
        for field in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if config[field] is not None:
                raise ValueError(
                    f"the UNet has {field} {config[field]!r}, expected None: it wants more than a caption"
                )
        if not isinstance(config.cross_attention_dim, int):
            raise ValueError(f"the UNet's cross_attention_dim is {config.cross_attention_dim}, expected one number")
    elif name == "SD3Transformer2DModel" and config.patch_size != 2:
        raise ValueError(f"the transformer's patch_size is {config.patch_size}, expected 2")
    elif FAMILIES[name].is_packed and config.in_channels % 4:
        raise ValueError(
            f"the transformer has {config.in_channels} input channels, expected 2x2 patches: 4 per latent"
        )


def _grid_positions(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """FLUX's positions of an image, (rows * columns, 3): 0, row, column."""
    axes = [torch.arange(length, device=device, dtype=torch.float32) for length in (1, rows, columns)]
    return torch.cartesian_prod(*axes)
