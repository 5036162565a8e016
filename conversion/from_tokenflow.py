"""A released TokenFlow tokenizer becomes a [`NextFlowVisionTokenizer`] with the same codes and images (§2.1).

A table of what goes where, and the sizes read off the checkpoint's shapes. Works on any tensors: on the meta device it
plans a conversion. Checkpoints are read without running anything that they contain.
"""

import argparse
import math
import os
import re
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ..modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from .checks import check_whole, first_of


# Theirs -> ours; the first row that matches counts. `@` is encoder or decoder, `#` a number, `?` one of q, k, v, `*`
# the rest of the name. Where ours has `{qkv}`, theirs is the three below each other. Embeddings are not only renamed,
# see `_convert_embeddings`.
KEYS = {
    # pixel branch
    "@.conv_blocks.#.res.#.nin_shortcut.*": "pixel_@.levels.#.blocks.#.shortcut.*",
    "@.conv_blocks.#.res.#.*": "pixel_@.levels.#.blocks.#.*",
    "@.conv_blocks.#.attn.#.?.*": "pixel_@.levels.#.attentions.#.?_proj.*",
    "@.conv_blocks.#.attn.#.proj_out.*": "pixel_@.levels.#.attentions.#.out_proj.*",
    "@.conv_blocks.#.attn.#.norm.*": "pixel_@.levels.#.attentions.#.norm.*",
    "@.conv_blocks.#.downsample.*": "pixel_@.levels.#.resample.*",
    "@.conv_blocks.#.upsample.*": "pixel_@.levels.#.resample.*",
    "@.mid.#.?.*": "pixel_@.middle.#.?_proj.*",
    "@.mid.#.proj_out.*": "pixel_@.middle.#.out_proj.*",
    "@.mid.#.*": "pixel_@.middle.#.*",
    "@.conv_in.*": "pixel_@.conv_in.*",
    "@.norm_out.*": "pixel_@.norm_out.*",
    "@.conv_out.*": "pixel_@.conv_out.*",
    "quant_conv.*": "quant_conv.*",
    "post_quant_conv.*": "post_quant_conv.*",
    # quantiser
    "quantize.embedding_vqkd.weight": "quantizer.semantic_codebook.weight",
    "quantize.embedding_vqgan.weight": "quantizer.pixel_codebook.weight",
    # semantic encoder: CLIP's own names
    "encoder_vqkd.conv1.weight": "semantic_encoder.embeddings.patch_embedding.weight",
    "encoder_vqkd.class_embedding": "semantic_encoder.embeddings.class_token",
    "encoder_vqkd.positional_embedding": "semantic_encoder.embeddings.position_embedding.weight",
    "encoder_vqkd.ln_pre.*": "semantic_encoder.embeddings.pre_layernorm.*",
    "encoder_vqkd.transformer.resblocks.#.ln_1.*": "semantic_encoder.encoder.layers.#.layer_norm1.*",
    "encoder_vqkd.transformer.resblocks.#.attn.in_proj_*": "semantic_encoder.encoder.layers.#.self_attn.{qkv}_proj.*",
    "encoder_vqkd.transformer.resblocks.#.attn.out_proj.*": "semantic_encoder.encoder.layers.#.self_attn.out_proj.*",
    "encoder_vqkd.transformer.resblocks.#.ln_2.*": "semantic_encoder.encoder.layers.#.layer_norm2.*",
    "encoder_vqkd.transformer.resblocks.#.mlp.c_fc.*": "semantic_encoder.encoder.layers.#.mlp.fc1.*",
    "encoder_vqkd.transformer.resblocks.#.mlp.c_proj.*": "semantic_encoder.encoder.layers.#.mlp.fc2.*",
    "encoder_vqkd.ln_post.*": "semantic_encoder.post_layernorm.*",
    # semantic encoder: SigLIP's names, without the `vision_model.` that transformers 4 wrote
    "encoder_vqkd.embeddings.*": "semantic_encoder.embeddings.*",
    "encoder_vqkd.encoder.layers.#.*": "semantic_encoder.encoder.layers.#.*",
    "encode_task_layer.*": "encode_task_layer.*",
    # semantic decoder: BEiT's names
    "decoder_vqkd.patch_embed.proj.*": "semantic_decoder.embeddings.patch_embedding.*",
    "decoder_vqkd.cls_token": "semantic_decoder.embeddings.class_token",
    "decoder_vqkd.pos_embed": "semantic_decoder.embeddings.position_embedding.weight",
    "decoder_vqkd.blocks.#.norm1.*": "semantic_decoder.encoder.layers.#.layer_norm1.*",
    "decoder_vqkd.blocks.#.attn.qkv.*": "semantic_decoder.encoder.layers.#.self_attn.{qkv}_proj.*",
    "decoder_vqkd.blocks.#.attn.q_bias": "semantic_decoder.encoder.layers.#.self_attn.q_proj.bias",
    "decoder_vqkd.blocks.#.attn.v_bias": "semantic_decoder.encoder.layers.#.self_attn.v_proj.bias",
    "decoder_vqkd.blocks.#.attn.proj.*": "semantic_decoder.encoder.layers.#.self_attn.out_proj.*",
    "decoder_vqkd.blocks.#.norm2.*": "semantic_decoder.encoder.layers.#.layer_norm2.*",
    "decoder_vqkd.blocks.#.mlp.*": "semantic_decoder.encoder.layers.#.mlp.*",
    "decoder_vqkd.fc_norm.*": "semantic_decoder.post_layernorm.*",
    "decode_task_layer.*": "decode_task_layer.*",
}

# Stored by them and read by nothing that encodes or decodes; so is SigLIP's last layer, see `target_names`.
LEFT_BEHIND = (
    "quantize.codebook_used",  # statistics of the training
    "quantize.embedding_vqkd.initted",  # of a codebook trained by k-means
    "quantize.embedding_vqkd.cluster_size",
    "quantize.embedding_vqkd.embed_avg",
    "quantize.embedding_vqgan.initted",
    "quantize.embedding_vqgan.cluster_size",
    "quantize.embedding_vqgan.embed_avg",
    "scaling_layer.*",  # [-1, 1] to [0, 1] and back
    "encoder_vqkd.proj",  # CLIP's: the teacher's features are projected with it
    "encoder_vqkd.post_layernorm.*",  # SigLIP's: the features are those before its last layer
    "encoder_vqkd.head.*",
)

# Sides of the square grids, by the semantic encoder and the size of the image.
SCALE_SIDES = {
    ("clip", 224): (1, 2, 4, 6, 8, 10, 12, 14),
    ("clip", 256): (1, 2, 4, 6, 8, 10, 12, 14, 16),
    ("siglip", 384): (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
}
# Layers of their semantic encoder and decoder, by width: a checkpoint that ends early is not taken for a shorter one.
KNOWN_DEPTHS = {768: (12, 3), 1152: (27, 3)}
# Of CLIP the released weights are used at 256 pixels, two cells a side more than its position tables have.
DEFAULT_IMAGE_SIZE = {"clip": 256, "siglip": 384}


def from_tokenflow(
    checkpoint: str | os.PathLike,
    *,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    config_overrides: dict | None = None,
) -> NextFlowVisionTokenizer:
    """
    A TokenFlow tokenizer, with CLIP or SigLIP as its semantic encoder and either pixel decoder.

    Args:
        checkpoint (`str` or `os.PathLike`): `tokenflow_clipb_32k_enhanced.pt`, `tokenflow_siglip_32k.pt`, one trained
            with their code, or its weights as a safetensors file.
        image_size (`int`, *optional*): Side of the images in pixels: 224 or 256 (the default) with CLIP, 384 with
            SigLIP. Their position tables are resized to it once, here.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Codebooks stay float32.
        config_overrides (`dict`, *optional*):
            Fields of [`NextFlowVisionTokenizerConfig`] instead of those read off the checkpoint.

    Raises:
        `ValueError`: on a file that is not such a tokenizer, or not a whole one, naming what is missing.
    """
    state = load_tokenflow(checkpoint)
    config = config_from_tokenflow(state, image_size=image_size, **(config_overrides or {}))
    model = empty_tokenizer(config)
    model.load_state_dict(convert_tokenflow(state, model), assign=True)
    return cast(model, dtype).eval()


def empty_tokenizer(config: NextFlowVisionTokenizerConfig) -> NextFlowVisionTokenizer:
    """The tokenizer without weights: names and shapes."""
    with torch.device("meta"):
        return NextFlowVisionTokenizer(config)


def cast(model: NextFlowVisionTokenizer, dtype: torch.dtype) -> NextFlowVisionTokenizer:
    """`model` itself in `dtype`, its codebooks in float32."""
    model.quantizer.float()  # which stays where it is when the rest is cast
    model.to(dtype)  # pyright: ignore[reportArgumentType]  # transformers' decorator hides that it is bound
    model.config.dtype = dtype
    return model


def load_tokenflow(checkpoint: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: `ema` where there is one, else `model` or `state_dict`, else all of it."""
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a TokenFlow checkpoint, .pt or .safetensors")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Nothing but tensors and containers, and the plain attributes of the arguments of their training script.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # bytes that are something else can fail in any way
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(
            f"{path} is no checkpoint of tensors alone and is not loaded ({reason}). If you trust it, save its "
            "weights as safetensors."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")
    state = next((content[name] for name in ("ema", "model", "state_dict") if name in content), content)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} has {first_of(content)} at its top, expected ema, model or state_dict with tensors")
    # transformers 4 had one module more around SigLIP.
    return {name.replace("encoder_vqkd.vision_model.", "encoder_vqkd."): value for name, value in state.items()}


def config_from_tokenflow(
    state: Mapping[str, torch.Tensor], *, image_size: int | None = None, **overrides
) -> NextFlowVisionTokenizerConfig:
    """The config of the tokenizer in `state`. `overrides` are fields of [`NextFlowVisionTokenizerConfig`]."""
    try:
        values = _read_fields(state, image_size, known_size="scale_sides" not in overrides)
    except KeyError as error:
        raise ValueError(
            f"not a whole TokenFlow tokenizer: {error.args[0]} is missing among {first_of(state)}"
        ) from None
    return NextFlowVisionTokenizerConfig(**{**values, **overrides})


def _read_fields(state: Mapping[str, torch.Tensor], image_size: int | None, *, known_size: bool) -> dict:
    codebook_size, semantic_code_dim = state["quantize.embedding_vqkd.weight"].shape
    if "encoder_vqkd.class_embedding" in state:
        encoder, semantic = "clip", _clip_fields(state)
    elif "encoder_vqkd.embeddings.patch_embedding.weight" in state:
        encoder, semantic = "siglip", _siglip_fields(state)
    else:
        found = first_of(name for name in state if name.startswith("encoder_vqkd."))
        raise ValueError(f"the semantic encoder has {found}, expected CLIP's or SigLIP's: ViTamin is not supported")
    image_size = DEFAULT_IMAGE_SIZE[encoder] if image_size is None else image_size
    if known_size and (encoder, image_size) not in SCALE_SIDES:
        sizes = [size for known, size in SCALE_SIDES if known == encoder]
        raise ValueError(f"image_size is {image_size}, expected one of {sizes} for a tokenizer with {encoder}")
    cells = (image_size // semantic["patch_size"]) ** 2
    width = len(state["decoder_vqkd.fc_norm.weight"])
    decoder = {
        "hidden_size": width,
        "intermediate_size": len(state["decoder_vqkd.blocks.0.mlp.fc1.weight"]),
        "num_hidden_layers": KNOWN_DEPTHS.get(width, (0, _count(state, "decoder_vqkd.blocks")))[1],
        "num_attention_heads": 12,
        "num_patches": cells,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "class_token": True,
    }
    levels = _count(state, "encoder.conv_blocks")
    encoder_channels = len(state["encoder.conv_in.weight"])
    encoder_widths, decoder_widths = (
        [len(state[f"{part}.conv_blocks.{level}.res.0.conv1.weight"]) for level in range(levels)]
        for part in ("encoder", "decoder")
    )
    decoder_channels = math.gcd(*decoder_widths)
    return {
        "semantic_config": {**semantic, "num_patches": cells, "vision_use_head": False},
        "semantic_layer": -1 if encoder == "clip" else -2,
        "semantic_feature_size": len(state["decode_task_layer.2.weight"]),
        "semantic_decoder_config": decoder,
        "semantic_decoder_layers": decoder["num_hidden_layers"],
        "clamp_semantic_pixels": encoder == "siglip",
        "image_size": image_size,
        "scale_sides": SCALE_SIDES.get((encoder, image_size)),
        "codebook_size": codebook_size,
        "semantic_code_dim": semantic_code_dim,
        "pixel_code_dim": state["quantize.embedding_vqgan.weight"].shape[1],
        "latent_channels": len(state["encoder.conv_out.weight"]),
        "encoder_channels": encoder_channels,
        "encoder_res_blocks": _count(state, "encoder.conv_blocks.0.res"),
        "decoder_channels": decoder_channels,
        "decoder_res_blocks": _count(state, "decoder.conv_blocks.0.res") - 1,
        "channel_multipliers": [width // encoder_channels for width in encoder_widths],
        "decoder_channel_multipliers": [width // decoder_channels for width in reversed(decoder_widths)],
        "norm_num_groups": 32,
        "norm_min_group_channels": 0,
        "accumulated_loss_weight": 0.0,
    }


def convert_tokenflow(state: Mapping[str, torch.Tensor], model: NextFlowVisionTokenizer) -> dict[str, torch.Tensor]:
    """`model`'s state dict out of `state`, every tensor checked against its shape in `model`."""
    converted: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        targets = target_names(name, model.config)
        if targets is None:
            unknown.append(name)
        elif targets:
            parts = tensor.chunk(3) if len(targets) == 3 else (tensor,)
            converted.update(zip(targets, parts, strict=True))
    if unknown:
        raise ValueError(f"{len(unknown)} tensors belong to no part of a TokenFlow tokenizer: {first_of(unknown)}")

    for part in ("semantic_encoder", "semantic_decoder"):
        _convert_embeddings(converted, f"{part}.embeddings", math.isqrt(getattr(model, part).config.num_patches))
    for name in [name for name in converted if name.startswith("semantic_decoder.") and name.endswith("q_proj.bias")]:
        # No bias: on the keys it would cancel in the softmax.
        converted[name.replace("q_proj", "k_proj")] = torch.zeros_like(converted[name])

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_whole(converted, expected, what="TokenFlow tokenizer")
    return {name: converted[name].contiguous() for name in expected}


def target_names(name: str, config: NextFlowVisionTokenizerConfig) -> list[str] | None:
    """Where a tensor of theirs goes: to three places, to one, to none (left behind); `None` if it is not known."""
    last_layer = f"encoder_vqkd.encoder.layers.{config.semantic_vit_config.num_hidden_layers - 1}.*"
    if any(_pattern(row).fullmatch(name) for row in (*LEFT_BEHIND, last_layer)):
        return []
    for theirs, ours in KEYS.items():
        match = _pattern(theirs).fullmatch(name)
        if match:
            target = ours
            for value in match.groups():
                target = re.sub(r"[@#?*]", value, target, count=1)
            return [target.replace("{qkv}", letter) for letter in "qkv"] if "{qkv}" in target else [target]
    return None


def resize_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """
    A square table of positions (cells, hidden) for `side` x `side` cells. Bicubic, and not by size but by the ratio of
    the sides with a tenth of a cell added, as they do: it moves every sample, and by size other codes come out.
    """
    known = math.isqrt(len(table))
    if known == side:
        return table
    # (cells, hidden) -> (1, hidden, rows, columns) and back
    square = table.float().T.unflatten(1, (known, known))[None]
    ratio = (side + 0.1) / math.sqrt(len(table))
    return F.interpolate(square, scale_factor=(ratio, ratio), mode="bicubic")[0].flatten(1).T.to(table.dtype)


def _convert_embeddings(converted: dict[str, torch.Tensor], prefix: str, side: int) -> None:
    """Patches as a linear layer; the class token's position in the token; the others resized to `side` x `side`."""
    weight, token, positions, bias = (
        f"{prefix}.{name}"
        for name in ("patch_embedding.weight", "class_token", "position_embedding.weight", "patch_embedding.bias")
    )
    if weight not in converted or positions not in converted:
        return  # the caller names what is missing
    # (hidden, channels, height, width) -> (hidden, height * width * channels)
    converted[weight] = converted[weight].permute(0, 2, 3, 1).flatten(1)
    converted.setdefault(bias, torch.zeros_like(converted[weight][:, 0]))
    if token in converted:
        table = converted[positions].flatten(0, -2)
        converted[token] = converted[token].flatten() + table[0]
        converted[positions] = resize_positions(table[1:], side)


def _clip_fields(state: Mapping[str, torch.Tensor]) -> dict:
    weight = state["encoder_vqkd.conv1.weight"]
    return {
        "hidden_size": len(weight),
        "intermediate_size": len(state["encoder_vqkd.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": KNOWN_DEPTHS.get(len(weight), (_count(state, "encoder_vqkd.transformer.resblocks"),))[0],
        "num_attention_heads": len(weight) // 64,  # as in all of OpenAI's
        "patch_size": weight.shape[-1],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "class_token": True,
        "pre_layernorm": True,
    }


def _siglip_fields(state: Mapping[str, torch.Tensor]) -> dict:
    weight = state["encoder_vqkd.embeddings.patch_embedding.weight"]
    return {
        "hidden_size": len(weight),
        "intermediate_size": len(state["encoder_vqkd.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": KNOWN_DEPTHS.get(len(weight), (_count(state, "encoder_vqkd.encoder.layers"),))[0],
        "num_attention_heads": 16,
        "patch_size": weight.shape[-1],
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


@cache
def _pattern(row: str) -> re.Pattern:
    values = {r"@": "(encoder|decoder)", r"\#": r"(\d+)", r"\?": "([qkv])", r"\*": "(.+)"}
    return re.compile(re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], re.escape(row)))


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name[len(prefix) + 1 :].split(".")[0] for name in state if name.startswith(f"{prefix}.")})
