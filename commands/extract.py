"""A description of data as shards of tokens and codes, before training:

    nextflow-hf extract data.yaml model=MODEL output_dir=codes
    nextflow-hf extract data.yaml model=MODEL output_dir=codes_eval purpose=evaluation
    torchrun --nproc-per-node 8 -m nextflow_hf.cli extract data.yaml

training/recipes/data_example.yaml has every key of the file; `key=value` replaces one. The same command goes on after
an interruption, with any number of processes. `load_codes("codes")` reads the result.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .console import OneLineParser, one_line_mistakes
from .train import leave_processes


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="nextflow-hf extract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", help="YAML file with the sources and other keys")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


@one_line_mistakes("extract")
def main(argv: Sequence[str] | None = None) -> int:
    """Extract; returns the exit status."""
    args = make_parser().parse_args(argv)
    if args.data is None:
        raise ValueError("got no data: name the YAML file with the sources")

    import torch
    from transformers.utils import logging

    from ..modeling_nextflow.pixel_cnn_nextflow import convolution_layout
    from ..training.common.processes import process_state
    from ..training.data.description import load_rows, read_description
    from ..training.data.extraction import extract_rows
    from ..training.data.preview import NUMBERS, preview_reconstruction
    from ..training.data.shards import BAD_ROWS

    logger = logging.get_logger(__name__)
    data = read_description(args.data, *args.overrides)
    output_dir = data.model.output_dir
    if output_dir is None:
        raise ValueError("got no output_dir: name a folder for the shards, as in output_dir=codes")
    state = process_state()
    processor = data.model.load_processor()
    for resolution in (data.settings.resolution, *(source.resolution for source in data.mixture.sources)):
        if resolution is not None:
            processor.image_processor.schedule.num_scales(resolution)  # raises where there is no such
    vision_tokenizer = data.model.load_vision_tokenizer()
    vision_tokenizer = vision_tokenizer.to(state.device, memory_format=convolution_layout(state.device))
    torch.backends.cudnn.allow_tf32 = False  # else the convolutions of "float32" would keep 10 bits of mantissa
    rows, output_dir = load_rows(data, data.settings.purpose), Path(output_dir)
    parts = {"processor": processor, "vision_tokenizer": vision_tokenizer, "settings": data.settings}
    if state.is_main_process and not (output_dir / NUMBERS).exists():
        preview_reconstruction(rows, output_dir, **parts)
    try:
        num_rows = extract_rows(rows, output_dir, **parts, data=data.mixture.to_dict())
        leave_processes()
    except KeyboardInterrupt:
        logger.warning(f"{output_dir} keeps the shards that are written, and the same command goes on from them")
        raise
    if num_rows == 0:
        logger.error(f"{output_dir} has no rows: all were bad, see {output_dir / BAD_ROWS}")
        return 1
    return 0
