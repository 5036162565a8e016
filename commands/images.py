"""`nextflow-hf generate` and `edit`: from options, or from an image that says how it was made, to images on disk."""

import argparse
import copy
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options, records
from .console import Console
from .loading import loaded
from .messages import conversation, existing_file, read_messages
from .output import Output, preview_path, save_preview


if TYPE_CHECKING:
    from .. import NextFlowPipeline, NextFlowPipelineOutput

# Arguments of the pipeline's call that are options of their own names.
SETTINGS = (
    "negative_prompt",
    *options.SIZE,
    *options.SAMPLING,
    "num_scales",
    "think",
    "max_new_tokens",
    *options.DECODING,
    "image_guidance_scale",
    "keep_scales",
    "mask_image",
    "mask_coverage",
)
# What is recorded of an image: the options that decide its pixels.
RECORDED = (*options.MODEL, "prompt", "messages", "image", "seed", *SETTINGS)
BATCH_SIZE = 8


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Those that `generate` and `edit` have in common."""
    options.add_options(parser, None, "seed")
    parser.add_argument("--num-images", type=options.whole(), metavar="N", help="images of each prompt; default: 1")
    parser.add_argument(
        "--batch-size",
        type=options.whole(),
        default=BATCH_SIZE,
        metavar="N",
        help="images sampled at once; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="PATH",
        help="a .png, or a folder; default: a file here, named by the prompt and the seed",
    )
    parser.add_argument(
        "--preview", type=Path, metavar="PATH", help="also save the image scale by scale, as a .gif, .mp4 or .png"
    )
    options.add_image_settings(parser)
    options.add_options(parser, "before the image, and where it ends", "think", "max_new_tokens", "num_scales")
    options.add_options(parser, "pixels", *options.DECODING)
    options.add_model_options(parser)
    options.add_recall_options(parser)
    options.add_console_options(parser)


def generate_images(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All images that the options of `console.name` ask for, saved; what is said of each in JSON."""
    # 1. What to sample
    if args.messages is not None:
        args.messages = read_messages(args.messages)
    recalled = records.recall(args, console.name, RECORDED)
    prompts = _read_prompts(args)
    args.seed = options.choose_seed(args.seed)
    count = args.num_images or 1
    sources = [*(args.image or ()), *filter(None, [getattr(args, "mask_image", None)])]
    output = Output(args.output, count=count * len(prompts), sources=sources)
    if args.preview is not None and preview_path(args.preview) == args.output:
        raise ValueError(f"--output and --preview are both {args.output}: give them different names")

    # 2. The model
    start = time.perf_counter()
    pipe, recorder, settings = records.begin(console.name, args, RECORDED, SETTINGS, recalled)
    load_seconds = time.perf_counter() - start

    # 3. The images, on disk as they come. Repeat one in its original batch: rounding depends on the batch size.
    seeds, wanted = range(args.seed, args.seed + count), None
    batches = [seeds[first : first + args.batch_size] for first in range(0, count, args.batch_size)]
    if recalled is not None and not recalled.changes and args.num_images is None:
        seeds, wanted = _batch_of(recalled, args.batch_size)
        batches = [seeds]
    saved: list[dict[str, Any]] = []
    start = time.perf_counter()
    for prompt, batch in itertools.product(prompts, batches):
        sampled, grown = _sample(pipe, args, prompt, batch, settings)
        for index in range(len(batch)) if wanted is None else [wanted]:
            image, seed, results = sampled.images[index], batch[index], _results(sampled, index)
            path = output.path(prompt, seed)
            place = {"seeds": list(batch), "index": index}
            recorder.save(image, path, batch=place, results=results, **settings, prompt=prompt, seed=seed)
            size = {"width": image.width, "height": image.height}
            one = {"path": str(path), "prompt": prompt, "seed": seed, **size, **results}
            if args.preview is not None:
                preview = preview_path(args.preview, len(saved) + 1, output.count)
                one["preview"] = str(save_preview(grown[index], preview))
            if recalled is not None:
                one["identical"] = recalled.compare(image, console) if wanted is not None else None
            saved.append(one)
            _show(one, console)
    seconds = time.perf_counter() - start
    return {**loaded(args), "load_seconds": round(load_seconds, 3), "seconds": round(seconds, 3), "images": saved}


def _read_prompts(args: argparse.Namespace) -> list[str | None]:
    """The prompt, or those of a file, one a line; `None` where a conversation is all there is."""
    file = getattr(args, "prompts", None)
    if file is not None:
        if args.prompt is not None or args.messages is not None or args.from_image is not None:
            raise ValueError("--prompts goes with neither a prompt, nor --messages, nor --from-image")
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{file} has no prompts, expected one a line")
        return prompts
    if args.prompt is None and args.messages is None:
        raise ValueError('got no prompt: say what the image shows, such as "a red circle", or pass --from-image')
    return [args.prompt]


def _batch_of(recalled: records.Recalled, most: int) -> tuple[list[int], int]:
    """Seeds of the images that were sampled together with the one that is recalled, and its place among them."""
    batch, seed = recalled.record.batch or {}, recalled.record.arguments.get("seed")
    seeds, index = batch.get("seeds", []), batch.get("index", 0)
    if seeds[index : index + 1] != [seed]:
        raise ValueError(
            f"the metadata of {recalled.path} cannot be used: its seed is {seed}, expected entry {index} of its batch"
        )
    if len(seeds) > most:
        raise ValueError(
            f"{recalled.path} is one of {len(seeds)} images that were sampled at once, more than --batch-size {most}: "
            f"pass --batch-size {len(seeds)} to repeat it in its batch, or --num-images 1 to sample it alone, where "
            "rounding may differ"
        )
    return seeds, index


def _sample(
    pipe: "NextFlowPipeline",
    args: argparse.Namespace,
    prompt: str | None,
    seeds: Sequence[int],
    settings: dict[str, Any],
) -> tuple["NextFlowPipelineOutput", list[list]]:
    """The images of one prompt, and with `--preview` each as it is after every scale, and after the decoder."""
    import torch

    call = dict(settings)
    if args.messages is not None:
        call["messages"] = conversation(prompt, args.image, copy.deepcopy(args.messages))
    else:
        call |= {"prompt": prompt} | ({"image": list(map(existing_file, args.image))} if args.image else {})
    grown: list[list] = [[] for _ in seeds]

    def keep(pipe: "NextFlowPipeline", step: int, scale: int, tensors: dict[str, Any]) -> dict[str, Any]:
        codes, grids = tensors["image_codes"].flatten(), tensors["image_grids"]
        for images, image in zip(grown, pipe.decode_codes(codes, grids, num_scales=scale + 1), strict=True):
            images.append(image)
        return tensors

    if args.preview is not None:
        tensors = ["image_codes", "image_grids"]
        call |= {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": tensors}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampled = pipe(**call, num_images_per_prompt=len(seeds), generator=generators)
    for images, image in zip(grown, sampled.images, strict=True):
        if args.decoder == "diffusion" or not images:
            images.append(image)
    return sampled, grown


def _results(sampled: "NextFlowPipelineOutput", index: int) -> dict[str, Any]:
    if sampled.thoughts is None:
        return {}
    return {"thought": sampled.thoughts[index], "final_prompt": sampled.final_prompts[index]}


def _show(saved: dict[str, Any], console: Console) -> None:
    console.show(f"{saved['path']}  {saved['width']} x {saved['height']}, seed {saved['seed']}")
    for name in ("thought", "final_prompt", "preview"):
        if name in saved:
            console.show(f"  {name.replace('_', ' ')}: {saved[name]}")
