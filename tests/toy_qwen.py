"""Tiny Qwens with their text tokenizers, as transformers writes them, and a vision tokenizer as its training does."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_pipeline import NUMBERS, toy_vision_tokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nextflow_hf.processing import NextFlowImageProcessorPil


WORDS = 280  # rows of the language model: 256 bytes, Qwen's control tokens, and padding
TEXT = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
QWENS = {
    "qwen2.5-vl": lambda: Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
            vision_config=dict(VISION),
            image_token_id=261, video_token_id=260, vision_start_token_id=259, vision_end_token_id=260,
        )
    ),
    "qwen2.5": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, rope_parameters=dict(ROPE), tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=16, rope_parameters=dict(ROPE))),
}  # fmt: skip


def save_qwen(folder: Path, family: str = "qwen2.5-vl") -> Path:
    """A tiny Qwen with its text tokenizer and the chat template of its own model, as transformers writes them."""
    torch.manual_seed(0)
    QWENS[family]().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512)
    tokenizer.add_tokens(CONTROL, special_tokens=True)
    tokenizer.chat_template = "{{ 'You are Qwen. <|vision_start|><|image_pad|><|vision_end|>' }}"
    tokenizer.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """A vision tokenizer as its training saves it."""
    toy_vision_tokenizer().save_pretrained(folder)
    NextFlowImageProcessorPil(**NUMBERS).save_pretrained(folder)
    return folder
