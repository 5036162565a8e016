"""Starting points: a NextFlow transformer out of a Qwen2.5-VL checkpoint and a vision tokenizer's codebook (§2.2).

Tables of what goes where. The language model is kept exactly: on text alone its logits do not change.
"""

import os

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from .configuration_nextflow import NextFlowConfig
from .modeling_nextflow import NextFlowForCausalLM


logger = logging.get_logger(__name__)

# Fields of Qwen2.5-VL's text config that the transformer takes over as they are.
QWEN_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
)

# Prefix in Qwen2.5-VL -> prefix here. Embedding and head follow by rows; the vision tower is left behind.
QWEN_PREFIXES = {
    "model.language_model.layers.": "model.layers.",
    "model.language_model.norm.": "model.norm.",
}
QWEN_EMBEDDING = "model.language_model.embed_tokens.weight"
QWEN_HEAD = "lm_head.weight"


def config_from_qwen2_5_vl(config: Qwen2_5_VLConfig, *, codebook_size: int, **overrides) -> NextFlowConfig:
    """The transformer's config for the language model of `config`. `overrides` are fields of [`NextFlowConfig`]."""
    text = config.text_config
    if text.use_sliding_window:
        raise ValueError("sliding-window attention cannot see a whole image: use_sliding_window must be False")
    head_dim = text.hidden_size // text.num_attention_heads
    # The paper's 24:20:20 split of the rotary frequencies, for whatever half head dimension there is.
    space = head_dim // 2 * 20 // 64
    rope = {
        "rope_type": "default",
        "rope_theta": text.rope_parameters["rope_theta"],
        "mrope_section": [head_dim // 2 - 2 * space, space, space],
    }
    values = {
        **{name: getattr(text, name) for name in QWEN_FIELDS},
        "text_vocab_size": text.vocab_size,
        "codebook_size": codebook_size,
        "vocab_size": text.vocab_size + codebook_size + 2,
        "boi_token_id": text.vocab_size + codebook_size,
        "eoi_token_id": text.vocab_size + codebook_size + 1,
        "image_token_id": config.image_token_id,
        "rope_parameters": rope,
        "bos_token_id": text.bos_token_id,
        "tie_word_embeddings": False,
    }
    # Released checkpoints name these two in their generation config only; Qwen's own ids are then meant.
    for name in ("eos_token_id", "pad_token_id"):
        known = getattr(NextFlowConfig, name) if getattr(NextFlowConfig, name) < text.vocab_size else None
        values[name] = known if getattr(text, name) is None else getattr(text, name)
    return NextFlowConfig(**{**values, **overrides})


@torch.no_grad()
def from_qwen2_5_vl(
    pretrained_model_name_or_path: str | os.PathLike,
    codebook: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    codebook_size: int | None = None,
    seed: int = 0,
    config_overrides: dict | None = None,
    **kwargs,
) -> NextFlowForCausalLM:
    """
    Build the transformer that alignment starts from.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): A Qwen2.5-VL checkpoint of any size.
        codebook (`torch.Tensor` of shape `(codebook_size, semantic_code_dim + pixel_code_dim)`, *optional*):
            `NextFlowVisionTokenizer.codebook`: where the visual embedding starts (§2.2). Random if absent.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): As in `from_pretrained`.
        codebook_size (`int`, *optional*): Needed without `codebook`, whose number of rows it is otherwise.
        seed (`int`, *optional*, defaults to 0): Of the new rows and modules.
        config_overrides (`dict`, *optional*): Fields of [`NextFlowConfig`], such as `semantic_code_dim`.
        kwargs: Further arguments of `Qwen2_5_VLForConditionalGeneration.from_pretrained`.

    The rows of image codes, `<boi>` and `<eoi>` in embedding and head are drawn from a normal distribution with the
    mean and the deviation of the text rows, per channel (not specified by the paper).
    """
    source = Qwen2_5_VLForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, dtype=dtype, **kwargs)
    overrides = dict(config_overrides or {})
    if codebook is not None:
        if codebook_size not in (None, len(codebook)):
            raise ValueError(f"codebook_size is {codebook_size}, the codebook has {len(codebook)} rows")
        codebook_size = len(codebook)
    if codebook_size is None:
        raise ValueError("pass the vision tokenizer's codebook, or codebook_size")
    config = config_from_qwen2_5_vl(source.config, codebook_size=codebook_size, **overrides)
    width = config.semantic_code_dim + config.pixel_code_dim
    if codebook is not None and codebook.shape[1] != width:
        raise ValueError(f"the codebook is {codebook.shape[1]} wide, expected semantic + pixel code dim = {width}")

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NextFlowForCausalLM._from_config(config, dtype=source.dtype)
        state = source.state_dict()
        ours = model.state_dict()
        for name, tensor in state.items():
            for theirs, here in QWEN_PREFIXES.items():
                if name.startswith(theirs):
                    ours[here + name[len(theirs) :]].copy_(tensor)
        embedding = state[QWEN_EMBEDDING]
        _copy_rows(ours["model.embed_tokens.weight"], embedding)
        _copy_rows(ours["lm_head.weight"], state.get(QWEN_HEAD, embedding))
    if codebook is not None:
        ours["model.image_codebook.weight"].copy_(codebook)
    logger.info(
        "kept %d layers and %d text rows, added %d image codes",
        config.num_hidden_layers, config.text_vocab_size, codebook_size,
    )  # fmt: skip
    return model.eval()


def _copy_rows(table: torch.Tensor, text_rows: torch.Tensor) -> None:
    """Text rows as they are; new rows normal around them."""
    known = len(text_rows)
    table[:known] = text_rows
    rows = text_rows.float()
    new = torch.randn(len(table) - known, table.shape[1], device=table.device) * rows.std(0) + rows.mean(0)
    table[known:] = new.to(table.dtype)


__all__ = ["config_from_qwen2_5_vl", "from_qwen2_5_vl"]
