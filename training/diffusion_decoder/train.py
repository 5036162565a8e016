"""`nextflow-hf train decoder`: a diffusion decoder for the codes of a model (§3.3), one stage at a time.

Images of less than twice the size of their codes teach the upsampling stage nothing: leave such sources out.
"""

from dataclasses import dataclass

import torch
from transformers import ImageProcessingMixin, set_seed

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..common.checkpoints import train_to_the_end
from ..common.run import BatchArguments
from ..data import extract
from ..data.decoder_rows import NextFlowDecoderDataset
from ..data.extraction import load_codes
from ..data.mixture import MixtureRows
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
    data, tokenizer, image_processor = load_data(data_args, dtype)
    set_seed(args.seed)
    is_lora = args.lora_rank is not None
    pipeline = build_decoder_pipeline(decoder_args, tokenizer, image_processor, dtype=dtype if is_lora else None)
    trainer = NextFlowDiffusionDecoderTrainer(pipeline, args, train_dataset=data)
    train_to_the_end(trainer, checkpoint, lambda: trainer.save_model(args.output_dir))
    return trainer


def plan(
    decoder_args: DecoderArguments,
    data_args: DecoderDataArguments,
    batch_args: BatchArguments,
    args: NextFlowDiffusionDecoderTrainingArguments,
) -> list[str]:
    """What a training would read, for `--dry-run`."""
    model, _ = read_data(data_args)
    return [f"data    {model.output_dir}: {len(load_codes(model.output_dir)):,} rows of {data_args.data}"]


def read_data(args: DecoderDataArguments) -> tuple:
    """The arguments of the extraction: its model, and its mixture of sources."""
    given = {"--model": args.model, "--output_dir": args.codes}
    given = [part for name, value in given.items() if value is not None for part in (name, value)]
    return extract.parse([args.data, *given])[:2]


def load_data(
    args: DecoderDataArguments, dtype: torch.dtype
) -> tuple[NextFlowDecoderDataset, NextFlowVisionTokenizer, ImageProcessingMixin]:
    """Images beside their codes, and the vision tokenizer and image processor that made these."""
    model, mixture = read_data(args)
    options = {} if model.revision is None else {"revision": model.revision}
    processor = extract.load_processor(model, **options)
    where = {} if model.vision_tokenizer else {"subfolder": "vision_tokenizer"}
    tokenizer = NextFlowVisionTokenizer.from_pretrained(
        model.vision_tokenizer or model.model, dtype=dtype, **where, **options
    ).eval()
    codes = load_codes(model.output_dir, vision_tokenizer=tokenizer)
    return NextFlowDecoderDataset(codes, MixtureRows(mixture)), tokenizer, processor.image_processor


__all__ = ["GROUPS", "MODEL", "DecoderDataArguments", "plan", "train"]
