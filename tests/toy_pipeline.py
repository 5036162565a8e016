"""A toy pipeline: the toy transformer with a text vocabulary of 300, a vision tokenizer of its codes, a processor."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy import toy_model
from transformers import PreTrainedTokenizerFast

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from nextflow_hf.processing import NextFlowImageProcessorPil, NextFlowProcessor, extend_tokenizer


TEXT_VOCAB, CODES = 300, 24
# A square is 1 + 4 + 9 + 16 codes and 16 pixels wide; the buckets are 4:4, 3:5, 5:3, 2:7, 7:2, 2:8, 8:2.
NUMBERS = {"scale_bases": (1, 2, 3, 4), "patch_size": 4, "bucket_area": 16, "min_bucket_fill": 0.85, "resolution": 16}


def toy_processor() -> NextFlowProcessor:
    """Byte-level, without merges: one token a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512)
    extend_tokenizer(tokenizer, text_vocab_size=TEXT_VOCAB, codebook_size=CODES)
    return NextFlowProcessor(NextFlowImageProcessorPil(**NUMBERS), tokenizer)


def toy_vision_tokenizer() -> NextFlowVisionTokenizer:
    torch.manual_seed(1)
    config = NextFlowVisionTokenizerConfig(
        semantic_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "num_patches": 16,
            "vision_use_head": False,
        },
        codebook_size=CODES,
        semantic_code_dim=6,
        pixel_code_dim=4,
        semantic_decoder_layers=1,
        latent_channels=8,
        encoder_channels=8,
        encoder_res_blocks=1,
        decoder_channels=8,
        decoder_res_blocks=1,
        channel_multipliers=(1, 1, 1),
    )
    return NextFlowVisionTokenizer(config).eval()


def toy_pipeline(**overrides) -> NextFlowPipeline:
    processor = toy_processor()
    tokenizer = processor.tokenizer
    transformer = toy_model(
        text_vocab_size=TEXT_VOCAB,
        vocab_size=TEXT_VOCAB + CODES + 2,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **overrides,
    )
    pipe = NextFlowPipeline(transformer, toy_vision_tokenizer(), processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spelling_pipeline() -> NextFlowPipeline:
    """
    A toy that writes small letters, and draws now and then: where `b` is the likeliest of them, an image is likelier.
    """
    pipe = toy_pipeline()
    tokenizer, boi = pipe.processor.tokenizer, pipe.processor.boi_token_id
    letters = tokenizer.encode("abcdefghijklmnopqrstuvwxyz")
    (begins,) = tokenizer.encode("b")

    def spell(module, args, logits):
        changed = torch.full_like(logits, -1e4)
        changed[..., letters] = logits[..., letters]
        best = changed.max(-1)
        changed[..., boi] = best.values + torch.where(best.indices == begins, 1.0, -1e4)
        return changed

    pipe.transformer.lm_head.register_forward_hook(spell)
    return pipe
