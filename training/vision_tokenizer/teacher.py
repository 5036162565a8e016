"""`nextflow-hf train teacher`: a small SigLIP2 (NaFlex form) for the semantic branch, on images and their captions.

The paper's tokenizer is distilled from SigLIP2-so400m; images that look like none of its own need a teacher of their
own. Class, loss and file format are those of transformers' `Siglip2Model`: whatever takes the real teacher takes this.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Siglip2Config,
    Siglip2Model,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import logging

from ...atomic import write_json
from ...conversion.assemble import subfolder_of
from ...modeling_nextflow.vit_nextflow import patchify
from ...processing.image_processing_nextflow import NextFlowImageProcessor
from ..common.checkpoints import StagedCheckpointsMixin, train_to_the_end
from ..common.folders import PROCESSORS, check_source
from ..common.processes import check_processes
from ..common.refusals import check_arguments, check_numbers
from ..common.run import BatchArguments
from ..data.description import load_captioned_images, read_description
from .recipe import build_image_processor


logger = logging.get_logger(__name__)

SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4}


@dataclass
class TeacherArguments:
    """
    What is trained, and on what.

    Args:
        data (`str`):
            Description of data as `nextflow-hf extract` reads it: sources of images with captions.
        text_tokenizer_name_or_path (`str`): Tokenizer of the captions.
        image_processor (`dict`, *optional*):
            Fields of [`NextFlowImageProcessor`] that differ from its defaults. Its `patch_size` is the teacher's.
        vision_config, text_config (`dict`, *optional*):
            Fields of `Siglip2VisionConfig` and `Siglip2TextConfig`. By default a model of 0.5M parameters.
        max_caption_tokens (`int`, *optional*, defaults to 32): Longer captions are cut.
        num_eval (`int`, *optional*, defaults to 512):
            The last so many images are not trained on; how many of them find their own among 64 captions is measured.
    """

    data: str
    text_tokenizer_name_or_path: str
    image_processor: dict | None = None
    vision_config: dict | None = None
    text_config: dict | None = None
    max_caption_tokens: int = 32
    num_eval: int = 512

    def __post_init__(self):
        check_numbers(self, {"max_caption_tokens": 1, "num_eval": 0})


@dataclass
class TeacherTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`]. Each process contrasts the images of its own batch."""

    def __post_init__(self) -> None:
        check_arguments(self)
        super().__post_init__()
        self.remove_unused_columns = False  # the collator makes the model's inputs


GROUPS = (TeacherArguments, BatchArguments, TeacherTrainingArguments)
MODEL = None


@dataclass
class ContrastiveCollator:
    """
    Items `{"image", "caption"}` to the inputs of [`~transformers.Siglip2Model`], with its loss asked for. An image
    without a caption is left out: it has nothing to be contrasted with.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: NextFlowImageProcessor
    max_caption_tokens: int = 32

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor | bool]:
        items = [item for item in items if item["caption"]]
        if not items:
            raise ValueError("no image of the batch has a caption: are the sources of the task text_to_image?")
        patch_size = self.image_processor.patch_size
        inputs = self.image_processor([item["image"] for item in items], return_tensors="pt")
        shapes = torch.stack([grids[grids.prod(-1) > 0][-1] for grids in inputs["image_grids"]])  # (n, 2) in patches
        patches = torch.zeros(len(items), int(shapes.prod(-1).max()), 3 * patch_size**2)
        mask = torch.zeros(patches.shape[:2], dtype=torch.long)
        for index, (pixels, shape) in enumerate(zip(inputs["pixel_values"], shapes.tolist())):
            rows, columns = (patch_size * cells for cells in shape)
            own = patchify(pixels[None, :, :rows, :columns], patch_size)[0]
            patches[index, : len(own)], mask[index, : len(own)] = own, 1
        # SigLIP reads the last token, and was trained with padding up to a fixed length.
        text = self.tokenizer(
            [item["caption"] for item in items],
            padding="max_length",
            truncation=True,
            max_length=self.max_caption_tokens,
            return_tensors="pt",
        )
        return {
            "input_ids": text["input_ids"],
            "pixel_values": patches,
            "pixel_attention_mask": mask,
            "spatial_shapes": shapes,
            "return_loss": True,
        }


class TeacherTrainer(StagedCheckpointsMixin, Trainer):
    """transformers' Trainer with whole checkpoints."""


def build_teacher(
    args: TeacherArguments, tokenizer: PreTrainedTokenizerBase, image_processor: NextFlowImageProcessor
) -> Siglip2Model:
    """An untrained teacher for images of about the processor's resolution."""
    num_patches = (image_processor.resolution // image_processor.patch_size) ** 2
    vision = {**SMALL, "num_hidden_layers": 4, "patch_size": image_processor.patch_size, "num_patches": num_patches}
    text = {
        **SMALL,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": args.max_caption_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = Siglip2Model(
        Siglip2Config(
            vision_config={**vision, **(args.vision_config or {})}, text_config={**text, **(args.text_config or {})}
        )
    )
    with torch.no_grad():  # SigLIP's own start, so that the many negatives do not dominate
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-10.0)
    return model


@torch.no_grad()
def retrieval_accuracy(trainer: Trainer, held_out: Dataset, batch_size: int = 64) -> float:
    """How often the right one of `batch_size` captions is the nearest to an image."""
    model, correct, count = trainer.model.eval(), 0, 0
    for start in range(0, len(held_out), batch_size):
        batch = [held_out[index] for index in range(start, min(start + batch_size, len(held_out)))]
        batch = [item for item in batch if item["caption"]]
        inputs = {key: value for key, value in trainer.data_collator(batch).items() if key != "return_loss"}
        nearest = model(**trainer._prepare_inputs(inputs)).logits_per_image.argmax(-1).tolist()
        # Equal captions are equally right.
        correct += sum(batch[row]["caption"] == batch[column]["caption"] for row, column in enumerate(nearest))
        count += len(batch)
    return correct / count


def train(
    teacher_args: TeacherArguments,
    batch_args: BatchArguments,
    args: TeacherTrainingArguments,
    *,
    checkpoint: str | None = None,
) -> Trainer:
    """Train with SigLIP's sigmoid loss from `checkpoint` on, and save the model and its tokenizer in `output_dir`."""
    set_seed(args.seed)
    source = teacher_args.text_tokenizer_name_or_path
    check_source("text_tokenizer_name_or_path", source, *PROCESSORS, "pipeline", file=TOKENIZER_CONFIG_FILE)
    tokenizer = AutoTokenizer.from_pretrained(source, **subfolder_of(source, "processor", TOKENIZER_CONFIG_FILE))
    image_processor = build_image_processor(teacher_args.image_processor)
    images = load_captioned_images(read_description(teacher_args.data))
    num_train = len(images) - teacher_args.num_eval
    if num_train < 1:
        raise ValueError(
            f"{teacher_args.data} has {len(images)} images, expected more than num_eval={teacher_args.num_eval}"
        )
    trainer = TeacherTrainer(
        build_teacher(teacher_args, tokenizer, image_processor),
        args,
        ContrastiveCollator(tokenizer, image_processor, teacher_args.max_caption_tokens),
        train_dataset=Subset(images, range(num_train)),
        processing_class=tokenizer,
    )
    check_processes(trainer)

    def save() -> None:
        if teacher_args.num_eval and trainer.is_world_process_zero():
            accuracy = retrieval_accuracy(trainer, Subset(images, range(num_train, len(images))))
            logger.warning(f"{accuracy:.1%} of {teacher_args.num_eval} held-out images find their caption among 64")
            write_json(Path(args.output_dir, "eval_results.json"), {"eval_accuracy": accuracy})
        trainer.save_model(args.output_dir)

    train_to_the_end(trainer, checkpoint, save)
    return trainer


def plan(teacher_args: TeacherArguments, batch_args: BatchArguments, args: TeacherTrainingArguments) -> list[str]:
    """What a training would read, for `--dry-run`."""
    return [f"data    {teacher_args.data}: {len(load_captioned_images(read_description(teacher_args.data))):,} images"]
