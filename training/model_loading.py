"""The transformer that a recipe trains: a saved one or a new one, quantised or not, with an adapter or without."""

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, ProcessorMixin

from ..modeling_nextflow.configuration_nextflow import NextFlowConfig
from ..modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..processing.processing_nextflow import NextFlowProcessor
from .adapters import IMAGE_MODULES, image_token_rows
from .arguments import ModelArguments
from .data.extraction import codes_fingerprint


def load_model(args: ModelArguments) -> PreTrainedModel:
    """The model of a recipe; with `use_peft` it is PEFT's around it."""
    if args.model_name_or_path is None:
        model = new_transformer(
            NextFlowProcessor.from_pretrained(args.processor_name_or_path),
            NextFlowVisionTokenizer.from_pretrained(args.vision_tokenizer_name_or_path),
            attn_implementation=args.attn_implementation,
            **args.config_overrides or {},
        )
        if args.dtype != "auto":
            model = model.to(getattr(torch, args.dtype))
    else:
        model = NextFlowForCausalLM.from_pretrained(
            args.model_name_or_path,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            quantization_config=quantization_config(args),
            **args.config_overrides or {},
        )
    return add_adapter(model, args) if args.use_peft else model


def new_transformer(
    processor: ProcessorMixin,
    vision_tokenizer: NextFlowVisionTokenizer,
    *,
    attn_implementation: str | None = None,
    **config_fields,
) -> NextFlowForCausalLM:
    """
    A transformer with random weights for these tokens and codes.

    Args:
        config_fields: The fields of [`NextFlowConfig`] that neither component knows: its sizes.
    """
    tokenizer = processor.tokenizer
    vocabulary, codes = len(tokenizer), vision_tokenizer.config.codebook_size
    config = NextFlowConfig(
        **{
            "vocab_size": vocabulary,
            "text_vocab_size": vocabulary - codes - 2,
            "codebook_size": codes,
            "semantic_code_dim": vision_tokenizer.config.semantic_code_dim,
            "pixel_code_dim": vision_tokenizer.config.pixel_code_dim,
            "max_scales": processor.max_scales,
            "boi_token_id": processor.boi_token_id,
            "eoi_token_id": processor.eoi_token_id,
            "image_token_id": processor.image_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "max_position_embeddings": tokenizer.model_max_length,
            "vision_tokenizer_fingerprint": codes_fingerprint(vision_tokenizer),
            **config_fields,
        }
    )
    model = NextFlowForCausalLM._from_config(config, attn_implementation=attn_implementation)
    # The visual embedding starts from the tokenizer's codebook (§2.2). So does the head, through a random projection:
    # what is learnt of one code then holds for its neighbours too, among which the finer scales often choose.
    with torch.no_grad():
        codebook = vision_tokenizer.codebook
        model.model.image_codebook.weight.copy_(codebook)
        projection = torch.randn(codebook.shape[1], config.hidden_size) * config.initializer_range
        model.lm_head.weight[config.text_vocab_size :][: len(codebook)] = codebook @ projection
    return model


def quantization_config(args: ModelArguments) -> BitsAndBytesConfig | None:
    if args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype="bfloat16" if args.dtype == "auto" else args.dtype,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
            bnb_4bit_quant_storage=args.bnb_4bit_quant_storage,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if args.load_in_8bit else None


def add_adapter(model: NextFlowForCausalLM, args: ModelArguments) -> PreTrainedModel:
    """PEFT's model around this one."""
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise ImportError("use_peft needs PEFT: pip install nextflow-hf[train]") from error

    if args.load_in_4bit or args.load_in_8bit:
        # The trainer turns activation checkpointing on where the recipe says so.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    modules_to_save, token_indices = args.lora_modules_to_save, None
    if args.lora_train_image_parts:
        modules_to_save = sorted({*(modules_to_save or []), *IMAGE_MODULES})
        token_indices = image_token_rows(model.config)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules,
            modules_to_save=modules_to_save,
            trainable_token_indices=token_indices,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
        ),
    )


__all__ = ["add_adapter", "load_model", "new_transformer", "quantization_config"]
