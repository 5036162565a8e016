"""Configurations of the transformer (`nextflow`) and of the vision tokenizer (`nextflow_vision_tokenizer`).

Inert data. Defaults are the paper's model: Qwen2.5-VL-7B's language model with 32,768 image codes. Where the paper is
silent the docstring says so; every such choice is a named field.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen2Config, Siglip2VisionConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_rope_utils import RopeParameters


def default_mrope_section(head_dim: int) -> list[int]:
    """Frequencies that turn with (scale, row, column): 24, 20, 20 of 64, and the same shares of another head."""
    frequencies = head_dim // 2
    spatial = frequencies * 20 // 64
    return [frequencies - 2 * spatial, spatial, spatial]


@strict
class NextFlowViTConfig(Siglip2VisionConfig):
    r"""
    Configuration of [`NextFlowViT`]: SigLIP2's, and what CLIP and BEiT have besides.

    Args:
        class_token (`bool`, *optional*, defaults to `False`): Whether a learned token stands before the patches.
        pre_layernorm (`bool`, *optional*, defaults to `False`): Whether a norm precedes the first layer, as in CLIP.
    """

    patch_size: int = 16
    class_token: bool = False
    pre_layernorm: bool = False


@strict
class NextFlowVisionTokenizerConfig(PreTrainedConfig):
    r"""
    Configuration of [`NextFlowVisionTokenizer`]: dual-codebook multi-scale residual tokenizer after TokenFlow (§2.1).

    Args:
        semantic_config (`NextFlowViTConfig` or `dict`, *optional*):
            The semantic encoder. Defaults to SigLIP2-so400m-patch16-naflex without its pooling head. Its `patch_size`
            must equal the pixel branch's stride, `2 ** (len(channel_multipliers) - 1)`, unless there is an
            `image_size`.
        semantic_layer (`int`, *optional*, defaults to -2):
            Which of its hidden states is the feature: -2, the input of its last layer, as it is; -1, the output of
            its last layer, through its last norm (TokenFlow's CLIP).
        semantic_feature_size (`int`, *optional*):
            Width of the features that the semantic decoder predicts. Defaults to the encoder's hidden size.
        semantic_decoder_config (`NextFlowViTConfig` or `dict`, *optional*):
            The semantic decoder where it is not the encoder's layers, `semantic_decoder_layers` of them, on cells.
        clamp_semantic_pixels (`bool`, *optional*, defaults to `False`):
            Whether the semantic encoder sees pixels limited to [-1, 1], as TokenFlow's SigLIP does.
        image_size (`int`, *optional*):
            Side in pixels of the only, square images that a tokenizer of fixed size takes and gives. The pixel branch
            works at its stride times the semantic encoder's grid; where that is another size, images are resized to
            it and back bicubically. By default every image is the stride times its last grid.
        scale_sides (`list[int]`, *optional*):
            Sides of the square grids that a tokenizer of fixed size was trained with, coarse to fine: what
            [`~NextFlowVisionTokenizer.get_image_grids`] gives.
        codebook_size (`int`, *optional*, defaults to 32768): Number of codes; one index addresses both codebooks.
        semantic_code_dim (`int`, *optional*, defaults to 32): Width of the semantic codebook.
        pixel_code_dim (`int`, *optional*, defaults to 8): Width of the pixel codebook.
        semantic_distance_weight (`float`, *optional*, defaults to 1.0): Weight of the semantic distance in the search.
        pixel_distance_weight (`float`, *optional*, defaults to 1.0): Weight of the pixel distance in the search.
        semantic_decoder_layers (`int`, *optional*, defaults to 3): Blocks of the semantic decoder.
        latent_channels (`int`, *optional*, defaults to 256): Channels between the CNN and the 1x1 quant convolutions.
        encoder_channels (`int`, *optional*, defaults to 128): Base channels of the pixel encoder.
        encoder_res_blocks (`int`, *optional*, defaults to 2): Residual blocks a level of the pixel encoder.
        decoder_channels (`int`, *optional*, defaults to 256): Base channels of the pixel decoder (128 is TokenFlow's
            plain decoder; 256 with 4 blocks the enhanced one that §3.1 calls doubled).
        decoder_res_blocks (`int`, *optional*, defaults to 4): Residual blocks a level of the pixel decoder (one more
            is built, as usual in this family).
        channel_multipliers (`list[int]`, *optional*, defaults to `[1, 1, 2, 2, 4]`): Channels of each level.
        decoder_channel_multipliers (`list[int]`, *optional*):
            Those of the pixel decoder, also from the finest level on. Defaults to the encoder's.
        norm_num_groups (`int`, *optional*, defaults to 32):
            Groups of the CNN's GroupNorm; 0 leaves it out. A narrow CNN has so few channels a group that the
            statistics carry a flat image's colour away.
        norm_min_group_channels (`int`, *optional*, defaults to 4):
            Narrow levels take so many fewer groups that each has at least so many channels. With 0 every level has
            `norm_num_groups`, as in TokenFlow, and one whose channels these do not divide is refused.
        self_correction_top_k (`int`, *optional*, defaults to 10): Codes among which self-correction samples (§2.2).
        self_correction_ratio (`float`, *optional*, defaults to 0.6): Share of the tokens of a scale that are sampled.
        scale_dropout (`float`, *optional*, defaults to 0.5): Probability that training drops a scale that is neither
            first nor last (§3.1; the paper gives the share, not the procedure).
        quantizer_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the codebook term.
        commitment_loss_weight (`float`, *optional*, defaults to 0.25): Weight of the commitment term.
        accumulated_loss_weight (`float`, *optional*, defaults to 1.0):
            Share of the squared error between the features and the accumulated codes in the codebook and in the
            commitment term, as in VAR (not specified by the paper; TokenFlow's tokenizer is 0).
        semantic_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the distillation term (1 - cosine).
        search_chunk_size (`int`, *optional*, defaults to 512):
            Tokens whose distances exist at the same time: few enough for a CPU's cache.
        codes_fingerprint (`str`, *optional*):
            What [`~NextFlowVisionTokenizer.get_codes_fingerprint`] gives for the saved weights. Saving writes it.
    """

    model_type = "nextflow_vision_tokenizer"
    sub_configs_defaults = {
        "semantic_config": SubConfigSpec(config_class=NextFlowViTConfig),
        "semantic_decoder_config": SubConfigSpec(config_class=NextFlowViTConfig, optional=True),
    }

    semantic_config: dict | PreTrainedConfig | None = None
    semantic_layer: int = -2
    semantic_feature_size: int | None = None
    semantic_decoder_config: dict | PreTrainedConfig | None = None
    clamp_semantic_pixels: bool = False
    image_size: int | None = None
    scale_sides: list[int] | tuple[int, ...] | None = None
    codebook_size: int = 32768
    semantic_code_dim: int = 32
    pixel_code_dim: int = 8
    semantic_distance_weight: float | int = 1.0
    pixel_distance_weight: float | int = 1.0
    semantic_decoder_layers: int = 3
    latent_channels: int = 256
    encoder_channels: int = 128
    encoder_res_blocks: int = 2
    decoder_channels: int = 256
    decoder_res_blocks: int = 4
    channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_channel_multipliers: list[int] | tuple[int, ...] | None = None
    norm_num_groups: int = 32
    norm_min_group_channels: int = 4
    self_correction_top_k: int = 10
    self_correction_ratio: float | int = 0.6
    scale_dropout: float | int = 0.5
    quantizer_loss_weight: float | int = 1.0
    commitment_loss_weight: float | int = 0.25
    accumulated_loss_weight: float | int = 1.0
    semantic_loss_weight: float | int = 1.0
    search_chunk_size: int = 512
    codes_fingerprint: str | None = None
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if self.semantic_config is None:
            self.semantic_config = {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "patch_size": 16,
                "num_patches": 256,
            }
        for name in ("semantic_config", "semantic_decoder_config"):
            value = getattr(self, name)
            if isinstance(value, Siglip2VisionConfig) and not isinstance(value, NextFlowViTConfig):
                value = value.to_dict()
            if isinstance(value, dict):
                value = NextFlowViTConfig(**value)
            if value is not None:
                value.vision_use_head = False  # it would pool what is to stay a map
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """The fields as a dictionary, with an `auto_map` that loads outside of the package."""
        output = super().to_dict()
        # transformers takes a class with "Tokenizer" in its name for one of text, and maps it to (slow, fast) classes.
        for name, reference in output.get("auto_map", {}).items():
            if not isinstance(reference, str):
                output["auto_map"][name] = reference[0]
        return output

    @property
    def semantic_vit_config(self) -> NextFlowViTConfig:
        """`semantic_config`, which is complete once the configuration is made."""
        assert isinstance(self.semantic_config, NextFlowViTConfig)
        return self.semantic_config

    @property
    def semantic_decoder_vit_config(self) -> NextFlowViTConfig | None:
        """`semantic_decoder_config`, which is complete once the configuration is made."""
        assert self.semantic_decoder_config is None or isinstance(self.semantic_decoder_config, NextFlowViTConfig)
        return self.semantic_decoder_config

    @property
    def patch_size(self) -> int:
        """The pixel branch's stride: its pixels per cell of the last grid, along each axis."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def feature_size(self) -> int:
        """Width of the features that the semantic decoder predicts."""
        return self.semantic_feature_size or self.semantic_vit_config.hidden_size

    @property
    def condition_channels(self) -> int:
        """Channels of all maps that `decode_features` gives: the condition of a diffusion decoder."""
        return self.semantic_code_dim + self.pixel_code_dim + self.feature_size

    def check_sizes(self) -> None:
        """Raises `ValueError` where a model of this configuration cannot be made."""
        encoder, levels = self.semantic_vit_config, len(self.channel_multipliers)
        if self.semantic_layer not in (-1, -2):
            raise ValueError(f"semantic_layer is {self.semantic_layer}, expected -1 or -2")
        if self.semantic_layer == -2 and encoder.num_hidden_layers < 2:
            raise ValueError(
                f"semantic_config.num_hidden_layers is {encoder.num_hidden_layers}, expected at least 2: the features "
                "are those before the last layer"
            )
        if self.decoder_channel_multipliers is not None and len(self.decoder_channel_multipliers) != levels:
            raise ValueError(
                f"decoder_channel_multipliers has {len(self.decoder_channel_multipliers)} levels, expected the "
                f"encoder's {levels}: both have one stride"
            )
        if self.image_size is None and encoder.patch_size != self.patch_size:
            raise ValueError(
                f"semantic_config.patch_size is {encoder.patch_size}, expected the pixel branch's stride "
                f"2 ** (len(channel_multipliers) - 1) = {self.patch_size}"
            )
        if self.image_size is not None and (self.image_size // encoder.patch_size) ** 2 != encoder.num_patches:
            raise ValueError(
                f"image_size {self.image_size} has {self.image_size // encoder.patch_size} patches of "
                f"{encoder.patch_size} pixels a side, expected the square root of semantic_config.num_patches = "
                f"{encoder.num_patches}"
            )


@strict
class NextFlowConfig(Qwen2Config):
    r"""
    Configuration of [`NextFlowModel`]: a Qwen2.5 decoder whose vocabulary is text, image codes, `<boi>`, `<eoi>`.

    Args:
        vocab_size (`int`, *optional*, defaults to 184834):
            `text_vocab_size + codebook_size + 2`: one embedding table and one head for both modalities (§2.2). More
            where the embeddings were resized: added tokens come last.
        head_dim (`int`, *optional*):
            Width of an attention head. Defaults to `hidden_size // num_attention_heads`.
        qk_norm (`bool`, *optional*, defaults to `False`):
            Whether the layers are Qwen3's, which norm queries and keys, instead of Qwen2.5's.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether Qwen3's projections have a bias. Qwen2.5's queries, keys and values always have one.
        text_vocab_size (`int`, *optional*, defaults to 152064):
            Rows of the language model the text part comes from, its padding included. Image code `c` is token
            `text_vocab_size + c`.
        codebook_size (`int`, *optional*, defaults to 32768):
            Number of image codes (not specified by the paper; TokenFlow's releases).
        semantic_code_dim (`int`, *optional*, defaults to 32): Width of the semantic codebook.
        pixel_code_dim (`int`, *optional*, defaults to 8): Width of the pixel codebook.
        boi_token_id (`int`, *optional*, defaults to 184832): `<boi>`, begin of image. Its slot predicts the 1x1 scale.
        eoi_token_id (`int`, *optional*, defaults to 184833): `<eoi>`, end of image.
        image_token_id (`int`, *optional*, defaults to 151655):
            Placeholder in `input_ids` for every cell of scales 2..K.
        rope_parameters (`dict`, *optional*):
            As everywhere in transformers, with `mrope_section`: how many of the rotary frequencies turn with the
            scale, the row and the column. Defaults to 24, 20, 20 for the 64 frequencies of the paper's model, and to
            the same shares of another head dimension (not specified by the paper).
        max_scales (`int`, *optional*, defaults to 18):
            Rows of the scale embedding and of an image in `image_grids`: the longest schedule (table 14), and one more
            where given images have their last grid twice (the processor's `append_last_scale`).
        scale_length_counts_repeats (`bool`, *optional*, defaults to `False`):
            Whether the scale-length term counts a last grid that stands there twice as two scales. Without it, an
            image has the same number of scales as a source and as a target. Models that were saved before this field
            existed were trained with repeats counted, so their configurations load with `True`.
        spatial_rope_extent (`float`, *optional*, defaults to 64.0):
            C of equation 1: row and column coordinates of a square image span [0, C] at every resolution (value not
            specified by the paper).
        scale_loss_alpha (`float`, *optional*, defaults to 0.9):
            Scale reweight `k_s = (h_s * w_s) ** -alpha` (§2.2, §3.2.3). 0 weighs every code alike.
        joint_image_loss (`bool`, *optional*, defaults to `True`):
            Whether the loss of an image code is over the whole vocabulary of the one head, as that of text always is
            (not specified by the paper). `False`: over the codes alone, among which it is sampled; at the sizes of the
            7B model that takes 5.6 times less of the head's work.
        connector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the connector's two layers (not specified by the paper; TokenFlow).
        boi_scale_embedding (`bool`, *optional*, defaults to `True`):
            Whether `<boi>` receives the embedding of scale 1, which it predicts (not specified by the paper).
        train_codebook (`bool`, *optional*, defaults to `True`):
            Whether the transformer's own copy of the codebook is trained (not specified by the paper).
        vision_tokenizer_fingerprint (`str`, *optional*):
            What [`~NextFlowVisionTokenizer.get_codes_fingerprint`] gives for the vision tokenizer whose codes the
            model knows: with it, the codes of another one are refused, in training and wherever the two meet.
        vision_tokenizer_config (`NextFlowVisionTokenizerConfig` or `dict`, *optional*):
            Config of the vision tokenizer at the transformer's side, for [`NextFlowForConditionalGeneration`] alone.
    """

    model_type = "nextflow"
    sub_configs_defaults = {
        "vision_tokenizer_config": SubConfigSpec(config_class=NextFlowVisionTokenizerConfig, optional=True)
    }
    default_theta = 1_000_000.0
    ignore_keys_at_rope_validation = {"mrope_section"}
    # Outputs that are no predictions: `compute_metrics` of a trainer gets the logits alone.
    keys_to_ignore_at_inference = ["past_key_values", "scale_losses", "scale_counts"]

    vocab_size: int = 184834
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 128000
    rope_parameters: RopeParameters | dict | None = None
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = 151643

    head_dim: int | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    text_vocab_size: int = 152064
    codebook_size: int = 32768
    semantic_code_dim: int = 32
    pixel_code_dim: int = 8
    boi_token_id: int = 184832
    eoi_token_id: int = 184833
    image_token_id: int = 151655
    max_scales: int = 18
    scale_length_counts_repeats: bool = False
    spatial_rope_extent: float | int = 64.0
    scale_loss_alpha: float | int = 0.9
    joint_image_loss: bool = True
    connector_hidden_act: str = "gelu"
    boi_scale_embedding: bool = True
    train_codebook: bool = True
    vision_tokenizer_fingerprint: str | None = None
    vision_tokenizer_config: dict | PreTrainedConfig | None = None

    # Stages in the order they run; the cells of images are embedded where the text is.
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "image_codebook": (["image_codes"], ["inputs_embeds"]),
        "connector": (["image_codes"], ["inputs_embeds"]),
        "scale_embedding": (["image_grids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        assert self.rope_parameters is not None  # transformers has filled in its defaults
        self.rope_parameters = {"mrope_section": default_mrope_section(self.head_dim), **self.rope_parameters}
        smallest = self.text_vocab_size + self.codebook_size + 2
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, expected text_vocab_size + codebook_size + 2 = {smallest} or, with "
                "added tokens, more"
            )
        images = self.image_vocabulary
        marks = (self.boi_token_id, self.eoi_token_id)
        if marks != (images.stop - 2, images.stop - 1):
            raise ValueError(
                f"boi_token_id and eoi_token_id are {marks}, expected {(images.stop - 2, images.stop - 1)}: behind "
                f"{self.text_vocab_size} tokens of text and {self.codebook_size} image codes"
            )
        if not 0 <= self.image_token_id < self.vocab_size or images.start <= self.image_token_id < images.stop:
            raise ValueError(
                f"image_token_id is {self.image_token_id}, expected a token of the {self.vocab_size} outside of the "
                f"image codes, {images.start} to {images.stop - 1}"
            )
        if "sliding_attention" in (self.layer_types or ()):
            raise ValueError("a scale attends to the whole sequence before it: NextFlow has no sliding window")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The configuration of a file; one from before `scale_length_counts_repeats` counts repeats."""
        # Overwritten: what was saved without the field is a model that was trained with repeats counted.
        return super().from_dict({"scale_length_counts_repeats": True, **config_dict}, **kwargs)

    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:
        """The vision tokenizer's where it is there: transformers takes those that it finds here for configurations."""
        return {} if self.vision_tokenizer_config is None else super().sub_configs

    @property
    def code_vocabulary(self) -> slice:
        """Tokens of the image codes, in their order."""
        return slice(self.text_vocab_size, self.text_vocab_size + self.codebook_size)

    @property
    def image_vocabulary(self) -> slice:
        """Tokens that are no text: the image codes, `<boi>` and `<eoi>`. What a resize adds comes after them."""
        return slice(self.text_vocab_size, self.text_vocab_size + self.codebook_size + 2)


__all__ = ["NextFlowConfig", "NextFlowViTConfig", "NextFlowVisionTokenizerConfig"]
