"""What a recipe of the vision tokenizer names: the tokenizer before its first step, its teacher, and the images."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, Siglip2Model, Siglip2VisionModel

from ...conversion.assemble import load_vision_tokenizer
from ...modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.image_processing_nextflow import NextFlowImageProcessor
from ..common.folders import VISION_TOKENIZERS, check_source
from ..common.recipe import check_fields
from ..common.refusals import check_numbers
from ..data.description import load_images, read_description
from ..data.images import NextFlowImageDataset


@dataclass
class VisionTokenizerArguments:
    r"""
    What is trained; without any, a tokenizer of the paper's size from nothing.

    Args:
        vision_tokenizer_name_or_path (`str`, *optional*):
            Weights to start from: a tokenizer, or a NextFlow repository with one, by folder or Hub id.
        vision_tokenizer_parts (`list[str]`, *optional*):
            What is taken of it, its first-level modules by name; by default everything. The rest starts from nothing.
        semantic_teacher (`str`, *optional*):
            SigLIP2 to distil from, by folder or Hub id. A semantic encoder that is not taken from the tokenizer above
            starts as the teacher.
        config_overrides (`dict`, *optional*):
            Fields of [`NextFlowVisionTokenizerConfig`] that differ from the tokenizer's above, or from the defaults.
        merge_codes (`int`, *optional*):
            After the last step, merge codes that are nearly the same until so many are left, of two the less used one
            into the other. Train the pixel decoder after that: it has learnt the old codes.
        merge_images (`int`, *optional*, defaults to 2048): Training images on which the use of the codes is counted.
    """

    vision_tokenizer_name_or_path: str | None = None
    vision_tokenizer_parts: list[str] | None = None
    semantic_teacher: str | None = None
    config_overrides: dict | None = None
    merge_codes: int | None = None
    merge_images: int = 2048

    def __post_init__(self):
        check_numbers(self, {"merge_codes": 1, "merge_images": 1})


@dataclass
class ImageArguments:
    r"""
    What it is trained on.

    Args:
        data (`str`):
            The YAML file that `nextflow-hf extract` reads (training/recipes/data_example.yaml): the images of all its
            sources. A folder of images, or folder or Hub id of a data set with a column `image`, is one source.
        eval_data (`str`, *optional*):
            Another such file to evaluate on. By default the rows that `data` holds out by `eval_fraction`; without
            them nothing is evaluated.
        max_eval_images (`int`, *optional*): The first so many of them.
        image_processor (`dict`, *optional*):
            Fields of [`NextFlowImageProcessor`] that differ from its defaults, such as `resolution`.
        random_crop (`float`, *optional*, defaults to 1.0): Least share of a side that a random crop keeps.
        random_flip (`bool`, *optional*, defaults to `False`): Whether every second image is mirrored.
    """

    data: str
    eval_data: str | None = None
    max_eval_images: int | None = None
    image_processor: dict | None = None
    random_crop: float = 1.0
    random_flip: bool = False

    def __post_init__(self):
        check_numbers(self, {"max_eval_images": 1})


def build_tokenizer(args: VisionTokenizerArguments) -> tuple[NextFlowVisionTokenizer, Siglip2VisionModel | None]:
    """The tokenizer before its first step, and the teacher if there is one."""
    check_fields(args.config_overrides, NextFlowVisionTokenizerConfig, "config_overrides")
    check_source("vision_tokenizer_name_or_path", args.vision_tokenizer_name_or_path, *VISION_TOKENIZERS, "pipeline")
    check_source("semantic_teacher", args.semantic_teacher, "run of a teacher", "siglip2", "siglip2_vision_model")
    teacher = None if args.semantic_teacher is None else load_teacher(args.semantic_teacher)
    if args.vision_tokenizer_name_or_path is None:
        parts, given, config = [], None, {}
    else:
        # Parts saved in bfloat16 would be made in it, beside others in float32.
        given = load_vision_tokenizer(args.vision_tokenizer_name_or_path, dtype=torch.float32)
        names = [name for name, _ in given.named_children()]
        parts = names if args.vision_tokenizer_parts is None else args.vision_tokenizer_parts
        if set(parts) - set(names):
            wrong = sorted(set(parts) - set(names))
            raise ValueError(f"vision_tokenizer_parts has {wrong}, expected some of {names}")
        config = given.config.to_dict()
    teaches = teacher is not None and "semantic_encoder" not in parts
    if teaches:
        config["semantic_config"] = teacher.config.to_dict()
    tokenizer = NextFlowVisionTokenizer(NextFlowVisionTokenizerConfig(**{**config, **(args.config_overrides or {})}))
    if teaches:  # the last layer and the last norm, which it does not have, are left out (§2.1)
        own = tokenizer.semantic_encoder.state_dict()
        tokenizer.semantic_encoder.load_state_dict(
            {name: value for name, value in teacher.state_dict().items() if name in own}
        )
    for name in parts:
        try:
            tokenizer.get_submodule(name).load_state_dict(given.get_submodule(name).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"{name} of {args.vision_tokenizer_name_or_path} does not fit config_overrides: leave it out of "
                f"vision_tokenizer_parts. {error}"
            ) from error
    return tokenizer, teacher


def build_image_processor(fields: dict | None) -> NextFlowImageProcessor:
    """The image processor of a recipe's fields. A name that it does not have it would take and forget."""
    known = NextFlowImageProcessor.valid_kwargs.__annotations__
    notes = {"auto_map", "image_processor_type", "processor_class"}  # of a saved one, whose fields may be given
    if unknown := sorted(set(fields or {}) - set(known) - notes):
        raise ValueError(f"image_processor has unknown keys {unknown}, expected some of {sorted(known)}")
    processor = NextFlowImageProcessor(**(fields or {}))
    if processor.resolution is not None:
        processor.schedule.num_scales(processor.resolution)  # raises where there is no such
    return processor


def load_teacher(source: str) -> Siglip2VisionModel:
    """The vision part of a SigLIP2 in float32; the source may be the whole model or the vision part alone."""
    # An encoder that starts as a teacher of fewer bits would train in them, where most steps round to nothing.
    options = {"dtype": torch.float32}
    if AutoConfig.from_pretrained(source).model_type == "siglip2":
        return Siglip2Model.from_pretrained(source, **options).vision_model
    return Siglip2VisionModel.from_pretrained(source, **options)


def build_datasets(
    args: ImageArguments, image_processor: NextFlowImageProcessor, *, seed: int
) -> tuple[NextFlowImageDataset, NextFlowImageDataset | None]:
    """Images to train on and, if there are some, to evaluate on."""
    data, limit = read_description(args.data), {"max_pixels": image_processor.max_pixels}
    augmentation = {"random_crop": args.random_crop, "random_flip": args.random_flip, "seed": seed}
    train = NextFlowImageDataset(load_images(data, **limit), image_processor, **augmentation)
    if args.eval_data is not None:
        data = read_description(args.eval_data)
    elif not data.has_evaluation:
        return train, None
    images = load_images(data, "evaluation", **limit)
    if args.max_eval_images is not None:
        images = images.select(args.max_eval_images)
    return train, NextFlowImageDataset(images, image_processor)
