"""The parts of a pipeline that no checkpoint of others has, and the whole that they make (§2.2, appendix A.1).

A processor is a text tokenizer, extended by the vision tokenizer's codes, with the image processor of that tokenizer's
schedule. `convert`, `export` and the training of new models put them together here.
"""

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME
from transformers.utils.hub import cached_file

from ..modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..processing.image_processing_nextflow import NextFlowImageProcessor
from ..processing.processing_nextflow import NextFlowProcessor
from ..processing.tokenizer_extension_nextflow import extend_tokenizer
from .from_tokenflow import from_tokenflow


def image_processor_for(config: NextFlowVisionTokenizerConfig) -> NextFlowImageProcessor:
    """
    The image processor of a vision tokenizer: the paper's schedule (table 14) at its stride, or, for a tokenizer of
    fixed size, the one square that it takes.
    """
    if config.image_size is None:
        patch_size, bases = config.patch_size, NextFlowImageProcessor.scale_bases
        assert bases is not None  # the paper's
        settings: dict[str, Any] = {"patch_size": patch_size, "resolution": patch_size * bases[-1]}
        return NextFlowImageProcessor(**settings)
    assert config.scale_sides is not None, "a vision tokenizer of fixed size has the schedule it was trained with"
    cells = config.scale_sides[-1]
    settings = {
        "resolution": config.image_size,
        "scale_bases": list(config.scale_sides),
        "patch_size": config.image_size / cells if config.image_size % cells else config.image_size // cells,
        "bucket_area": cells**2,
        "min_bucket_fill": 1.0,
        "max_aspect_ratio": 1.0,
    }
    return NextFlowImageProcessor(**settings)


def make_processor(
    image_processor: NextFlowImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_vocab_size: int,
    codebook_size: int,
    **options: Any,
) -> NextFlowProcessor:
    """
    The processor of a text tokenizer, which is extended in place, see [`extend_tokenizer`].

    The chat template is NextFlow's: Qwen's format, in which an image is `<boi><|image_pad|><eoi>`. The one that the
    tokenizer came with writes images as its own model reads them.
    """
    extend_tokenizer(tokenizer, text_vocab_size=text_vocab_size, codebook_size=codebook_size)
    tokenizer.chat_template = None
    return NextFlowProcessor(image_processor, tokenizer, **options)


def transformer_fields(processor: NextFlowProcessor, vision_tokenizer: NextFlowVisionTokenizer) -> dict[str, Any]:
    """The fields of [`NextFlowConfig`] that the two other parts of a pipeline decide."""
    tokenizer, config = processor.tokenizer, vision_tokenizer.config
    return {
        "vocab_size": len(tokenizer),
        "text_vocab_size": len(tokenizer) - config.codebook_size - 2,
        "codebook_size": config.codebook_size,
        "semantic_code_dim": config.semantic_code_dim,
        "pixel_code_dim": config.pixel_code_dim,
        "max_scales": processor.max_scales,
        "boi_token_id": processor.boi_token_id,
        "eoi_token_id": processor.eoi_token_id,
        "image_token_id": processor.image_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vision_tokenizer_fingerprint": vision_tokenizer.get_codes_fingerprint(),
    }


def load_text_tokenizer(source: str | os.PathLike, **options: Any) -> PreTrainedTokenizerBase:
    """The text tokenizer of a checkpoint, by folder or Hub id."""
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source} has no text tokenizer that loads: add its tokenizer.json and tokenizer_config.json ({reason})"
        ) from error


def find_file(source: str | os.PathLike, name: str, **options: Any) -> str | None:
    """Path of a file of a folder or of a Hub id, downloaded if need be; `None` where it has none of that name."""
    # The one use of two private options of transformers, which its own loaders take for files that may be absent.
    optional = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    return cached_file(source, name, **optional, **options)


def subfolder_of(source: str | os.PathLike, name: str, file: str = CONFIG_NAME, **options: Any) -> dict[str, str]:
    """`{"subfolder": name}` where the repository has that part there, nothing where the part lies at its root."""
    return {} if find_file(source, file, subfolder=name, **options) is None else {"subfolder": name}


def is_single_file(source: str | os.PathLike) -> bool:
    """Whether `source` is a file of TokenFlow's weights, and no folder or repository."""
    return Path(source).suffix in (".pt", ".pth", ".safetensors")


def load_vision_tokenizer(source: str | os.PathLike, **options: Any) -> NextFlowVisionTokenizer:
    """
    A vision tokenizer: of a folder or a Hub id, its own or that of the pipeline there, or TokenFlow's file of weights.

    Args:
        options: Passed to [`~NextFlowVisionTokenizer.from_pretrained`]; a file takes `dtype` alone.
    """
    if is_single_file(source):
        return from_tokenflow(source, **options)
    where = subfolder_of(source, "vision_tokenizer", **_hub_options(options))
    config, _ = PreTrainedConfig.get_config_dict(source, **where, **_hub_options(options))
    if config.get("model_type") != NextFlowVisionTokenizerConfig.model_type:
        raise ValueError(f"{source} has no vision tokenizer: its model_type is {config.get('model_type')!r}")
    return NextFlowVisionTokenizer.from_pretrained(source, **where, **options).eval()


def load_image_processor(
    source: str | os.PathLike, config: NextFlowVisionTokenizerConfig, **options: Any
) -> NextFlowImageProcessor:
    """The image processor saved with a vision tokenizer or in its pipeline, else [`image_processor_for`] it."""
    if is_single_file(source):
        return image_processor_for(config)
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
        for where in (subfolder_of(source, "processor", name, **options), {}):
            if find_file(source, name, **where, **options):
                return NextFlowImageProcessor.from_pretrained(source, **where, **options)
    return image_processor_for(config)


def load_processor(source: str | os.PathLike, **options: Any) -> NextFlowProcessor:
    """The processor of a pipeline, or one saved alone, by folder or Hub id."""
    return NextFlowProcessor.from_pretrained(
        source, **subfolder_of(source, "processor", PROCESSOR_NAME, **options), **options
    )


def merge_adapter(transformer: PreTrainedModel, adapter: str | os.PathLike) -> PreTrainedModel:
    """The transformer with PEFT's adapter, by folder or Hub id, in its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("adapters need PEFT: pip install 'nextflow-hf[train]'") from error
    return PeftModel.from_pretrained(transformer, str(adapter)).merge_and_unload().eval()


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}
