"""A mixture of data sets as shards of tokens and codes, before training:

    nextflow-hf extract data.yaml --output-dir codes
    accelerate launch -m nextflow_hf.training.data.extract data.yaml --output-dir codes
    torchrun --nproc-per-node 8 -m nextflow_hf.training.data.extract data.yaml --output-dir codes

The file has the sources and whatever else differs from the defaults (recipes/data_example.yaml); every option may
also be given as `--name value`, which wins. The same command goes on after an interruption, with any number of
processes. `load_codes("codes")` reads the result.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import PROCESSOR_NAME, cached_file, logging

from ...commands.console import one_line_mistakes
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...modeling_nextflow.pixel_cnn_nextflow import convolution_layout
from ...processing.processing_nextflow import NextFlowProcessor
from ..common.recipe import OneLineParser, read_recipe, set_defaults
from .extraction import ExtractionSettings, extract_rows
from .mixture import MixtureArguments, load_mixture
from .shards import BAD_ROWS


logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class ModelArguments:
    """
    What encodes, and where the codes go.

    Args:
        model (`str`, *optional*):
            Folder or Hub id with the processor, at its root or in `processor/`, and, in `vision_tokenizer/`, its
            tokenizer: what the exporter writes, and what the pipeline's `save_pretrained` writes.
        vision_tokenizer, processor (`str`, *optional*): Folders or Hub ids in the place of those of `model`.
        revision (`str`, *optional*): Of `model`, `vision_tokenizer` and `processor` on the Hub.
        output_dir (`str`): Folder of the shards.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the encoder; the quantiser computes in float32. `"bfloat16"` is faster and gives another code where two
            are nearly as near: 0.9% of the last scale's codes for the 128 of Shapes, 4 to 16% for 32,768 random ones.
            The shards remember it, and an extraction only goes on with the same.
        self_correction_top_k, self_correction_ratio (`int`, `float`, *optional*):
            Candidates of a sampled code (§2.2), and the share of the codes that are sampled (§3.2.1). Default to the
            tokenizer's config: 10 and 0.6, the paper's share.
    """

    model: str | None = None
    vision_tokenizer: str | None = None
    processor: str | None = None
    revision: str | None = None
    output_dir: str | None = None
    dtype: str = "float32"
    self_correction_top_k: int | None = None
    self_correction_ratio: float | None = None

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("got no output_dir: name a folder for the shards")
        if self.model is None and (self.vision_tokenizer is None or self.processor is None):
            raise ValueError("got no model: name a repository, or its vision_tokenizer and its processor")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}, expected bfloat16, float16 or float32")


def parse(argv: Sequence[str] | None) -> tuple[ModelArguments, MixtureArguments, ExtractionSettings]:
    """The options of the command line, over those of its YAML file, over the defaults."""
    groups = (ModelArguments, MixtureArguments, ExtractionSettings)
    parser = OneLineParser(
        groups,
        prog="nextflow-hf extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file with the sources and other options")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    config, _ = parser.parse_known_args(argv, argparse.Namespace())
    values = read_recipe(config.config)
    set_defaults(parser, groups, values)
    *arguments, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return tuple(arguments)


def load_processor(model: ModelArguments, **revision: str) -> NextFlowProcessor:
    """The processor that the arguments name."""
    if model.processor is not None:
        return NextFlowProcessor.from_pretrained(model.processor, **revision)
    at_root = cached_file(model.model, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **revision)
    where = {} if at_root else {"subfolder": "processor"}
    return NextFlowProcessor.from_pretrained(model.model, **where, **revision)


@one_line_mistakes("extract")
def main(argv: Sequence[str] | None = None) -> int:
    """Extract; returns the exit status."""
    model, mixture, settings = parse(argv)
    state = PartialState(cpu=not torch.accelerator.is_available())
    revision = {} if model.revision is None else {"revision": model.revision}
    processor = load_processor(model, **revision)
    sampling = {
        name: getattr(model, name)
        for name in ("self_correction_top_k", "self_correction_ratio")
        if getattr(model, name) is not None
    }
    where = {} if model.vision_tokenizer else {"subfolder": "vision_tokenizer"}
    vision_tokenizer = NextFlowVisionTokenizer.from_pretrained(
        model.vision_tokenizer or model.model, dtype=getattr(torch, model.dtype), **where, **sampling, **revision
    )
    vision_tokenizer = vision_tokenizer.eval().to(state.device, memory_format=convolution_layout(state.device))
    torch.backends.cudnn.allow_tf32 = False  # else the convolutions of "float32" would keep 10 bits of mantissa
    try:
        num_rows = extract_rows(
            load_mixture(mixture),
            model.output_dir,
            processor=processor,
            vision_tokenizer=vision_tokenizer,
            settings=settings,
            data=mixture.to_dict(),
        )
    except KeyboardInterrupt:
        logger.warning(f"{model.output_dir} keeps the shards that are written, and the same command goes on from them")
        raise
    if num_rows == 0:
        logger.error(f"{model.output_dir} has no rows: all were bad, see {Path(model.output_dir) / BAD_ROWS}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
