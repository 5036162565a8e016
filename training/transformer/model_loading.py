"""The transformer that a recipe trains: a saved one or a new one, quantised or not, with an adapter or without."""

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.peft_utils import find_adapter_config_file

from ...conversion.assemble import (
    load_processor,
    load_vision_tokenizer,
    merge_adapter,
    subfolder_of,
    transformer_fields,
)
from ...modeling_nextflow.configuration_nextflow import NextFlowConfig
from ...modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..common.folders import PROCESSOR_FILE, PROCESSORS, TRANSFORMERS, VISION_TOKENIZERS, check_source
from ..common.recipe import check_fields
from .adapters import IMAGE_MODULES, image_token_rows
from .arguments import ModelArguments


if TYPE_CHECKING:
    from peft import LoraConfig


def load_model(args: ModelArguments, *, in_bfloat16: bool = False) -> PreTrainedModel:
    """The model of a recipe, which computes `in_bfloat16` or not; with `use_peft` it is PEFT's around it."""
    check_sources(args)
    check_fields(args.config_overrides, NextFlowConfig, "config_overrides")
    dtype = args.dtype or ("bfloat16" if args.use_peft and in_bfloat16 else "float32")
    if args.model_name_or_path is None:
        model = new_transformer(
            load_processor(args.processor_name_or_path),
            load_vision_tokenizer(args.vision_tokenizer_name_or_path),
            attn_implementation=args.attn_implementation,
            **args.config_overrides or {},
        )
        if dtype != "auto":
            model = model.to(getattr(torch, dtype))
        return add_adapter(model, args) if args.use_peft else model
    adapter = saved_adapter(args.model_name_or_path)
    base = args.model_name_or_path if adapter is None else adapter.base_model_name_or_path
    subfolder = subfolder_of(base, "transformer")
    model = NextFlowForCausalLM.from_pretrained(
        base,
        **subfolder,
        # As keywords of this call, its fields would become settings of the generation config, too.
        config=NextFlowConfig.from_pretrained(base, **subfolder, **args.config_overrides or {}),
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        quantization_config=quantization_config(args, dtype),
    )
    _check_head(model, base)
    if adapter is None:
        return add_adapter(model, args) if args.use_peft else model
    if args.use_peft:
        check_adapter(adapter, args)
        return import_peft().PeftModel.from_pretrained(model, args.model_name_or_path, is_trainable=True)
    # A stage that trains all weights starts from those that the adapter made.
    return merge_adapter(model, args.model_name_or_path).requires_grad_(True)


def _check_head(model: NextFlowForCausalLM, base: str) -> None:
    """
    Give a head that `config_overrides` untie the weights that it had, those of the embedding: transformers gives it
    random ones. Raise `ValueError` where they tie a head with weights of its own, which transformers does not do.
    """
    was_tied = NextFlowConfig.from_pretrained(base, **subfolder_of(base, "transformer")).tie_word_embeddings
    if model.config.tie_word_embeddings and not was_tied:
        raise ValueError(
            f"config_overrides has tie_word_embeddings: true, but the head of {base} has weights of its own: leave "
            "it out"
        )
    if was_tied and not model.config.tie_word_embeddings:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "config_overrides has tie_word_embeddings: false, but ZeRO-3 shards the embedding: use ZeRO-2 or DDP"
            )
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)


def check_sources(args: ModelArguments) -> None:
    """Refuse folders that hold something else, with the command that takes them."""
    check_source("model_name_or_path", args.model_name_or_path, *TRANSFORMERS, "pipeline")
    check_source("processor_name_or_path", args.processor_name_or_path, *PROCESSORS, "pipeline", file=PROCESSOR_FILE)
    check_source("vision_tokenizer_name_or_path", args.vision_tokenizer_name_or_path, *VISION_TOKENIZERS, "pipeline")


def saved_adapter(name_or_path: str) -> "LoraConfig | None":
    """The configuration of the adapter that a folder or a repository holds instead of a model."""
    if find_adapter_config_file(name_or_path) is None:
        return None
    return import_peft().PeftConfig.from_pretrained(name_or_path)


def check_adapter(adapter: "LoraConfig", args: ModelArguments) -> None:
    """Refuse to train on an adapter of another shape than the recipe's."""
    found = {
        "lora_r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "lora_train_image_parts": adapter.trainable_token_indices is not None,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
    }
    expected = {name: getattr(args, name) for name in found}
    if args.lora_target_modules is not None:  # else PEFT has chosen them
        found["lora_target_modules"] = sorted(adapter.target_modules or [])
        expected["lora_target_modules"] = sorted(args.lora_target_modules)
    if differing := [name for name in found if found[name] != expected[name]]:
        raise ValueError(
            f"{args.model_name_or_path} is an adapter with { {name: found[name] for name in differing} }, expected "
            f"{ {name: expected[name] for name in differing} }: the training goes on with the adapter as it is"
        )


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
    fields = transformer_fields(processor, vision_tokenizer)
    fields["max_position_embeddings"] = processor.tokenizer.model_max_length
    config = NextFlowConfig(**{**fields, **config_fields})
    model = NextFlowForCausalLM._from_config(config, attn_implementation=attn_implementation)
    # The visual embedding starts from the tokenizer's codebook (§2.2). So does the head, through a random projection:
    # what is learnt of one code then holds for its neighbours too, among which the finer scales often choose.
    with torch.no_grad():
        codebook = vision_tokenizer.codebook
        model.model.image_codebook.weight.copy_(codebook)
        projection = torch.randn(codebook.shape[1], config.hidden_size) * config.initializer_range
        model.lm_head.weight[config.text_vocab_size :][: len(codebook)] = codebook @ projection
    return model


def quantization_config(args: ModelArguments, dtype: str) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration by the recipe, or `None` where nothing is quantised."""
    if args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
            bnb_4bit_quant_storage=args.bnb_4bit_quant_storage,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if args.load_in_8bit else None


def import_peft() -> ModuleType:
    """PEFT; raises `ImportError` with the command that installs it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need PEFT: pip install 'nextflow-hf[train]'") from error
    return peft


def add_adapter(model: NextFlowForCausalLM, args: ModelArguments) -> PreTrainedModel:
    """PEFT's model around this one."""
    peft = import_peft()
    # Without `prepare_model_for_kbit_training`, which turns what is not quantised, the head above all, to float32: the
    # norms and the loss compute in it anyway, and recomputing activations needs no gradient of a layer's input.
    modules_to_save, token_indices = args.lora_modules_to_save, None
    if args.lora_train_image_parts:
        modules_to_save = sorted({*(modules_to_save or []), *IMAGE_MODULES})
        token_indices = image_token_rows(model.config)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
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
    for parameter in model.parameters():
        if parameter.requires_grad:  # as PEFT has its matrices; the copies of modules have the base's dtype
            parameter.data = parameter.data.float()
    return model
