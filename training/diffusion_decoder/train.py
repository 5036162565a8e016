"""`nextflow-hf train decoder`: a diffusion decoder for the codes of a model (§3.3), one stage at a time.

Images of less than twice the size of their codes teach the upsampling stage nothing: leave such sources out.
"""

from dataclasses import dataclass

import torch
from transformers import set_seed

from ..common.checkpoints import train_to_the_end
from ..common.run import BatchArguments
from ..data.decoder_rows import NextFlowDecoderDataset
from ..data.description import DataDescription, load_rows_by_id, read_description
from ..data.shards import load_codes
from .build import DecoderArguments, build_decoder_pipeline
from .trainer import NextFlowDiffusionDecoderTrainer, NextFlowDiffusionDecoderTrainingArguments


@dataclass
class DecoderDataArguments:
    """
    What it is trained on.

    Args:
        data (`str`):
            File that `nextflow-hf extract` has made codes of: it names the sources of the images, and by default the
            model and the folder of the codes.
        model (`str`, *optional*): Repository with the processor and the vision tokenizer, instead of that of `data`.
        codes (`str`, *optional*): Folder of the extracted shards, instead of `output_dir` of `data`.
    """

    data: str
    model: str | None = None
    codes: str | None = None


GROUPS = (DecoderArguments, DecoderDataArguments, BatchArguments, NextFlowDiffusionDecoderTrainingArguments)
MODEL = "decoder_name_or_path"


def train(
    decoder_args: DecoderArguments,
    data_args: DecoderDataArguments,
    batch_args: BatchArguments,
    args: NextFlowDiffusionDecoderTrainingArguments,
    *,
    checkpoint: str | None = None,
) -> NextFlowDiffusionDecoderTrainer:
    """Train from `checkpoint` on, and save the decoder, or its LoRA, in `output_dir`."""
    dtype = getattr(torch, decoder_args.frozen_dtype)
    data = describe(data_args)
    tokenizer, image_processor = (
        data.model.load_vision_tokenizer(dtype=dtype),
        data.model.load_processor().image_processor,
    )
    rows = NextFlowDecoderDataset(load_codes(data.model.output_dir, vision_tokenizer=tokenizer), load_rows_by_id(data))
    set_seed(args.seed)
    is_lora = args.lora_rank is not None
    pipeline = build_decoder_pipeline(decoder_args, tokenizer, image_processor, dtype=dtype if is_lora else None)
    trainer = NextFlowDiffusionDecoderTrainer(pipeline, args, train_dataset=rows)
    train_to_the_end(trainer, checkpoint, lambda: trainer.save_model(args.output_dir))
    return trainer


def plan(
    decoder_args: DecoderArguments,
    data_args: DecoderDataArguments,
    batch_args: BatchArguments,
    args: NextFlowDiffusionDecoderTrainingArguments,
) -> list[str]:
    """What a training would read, for `--dry-run`."""
    codes = describe(data_args).model.output_dir
    return [f"data    {codes}: {len(load_codes(codes)):,} rows of {data_args.data}"]


def describe(args: DecoderDataArguments) -> DataDescription:
    """The description of data, with the recipe's model and codes."""
    given = {"model": args.model, "output_dir": args.codes}
    data = read_description(args.data, *(f"{key}={value}" for key, value in given.items() if value is not None))
    if data.model.output_dir is None:
        raise ValueError(f"{args.data} has no output_dir: name the folder of the codes with codes=...")
    return data
