"""`nextflow-hf generate` and `edit`: from options, or from an image that says how it was made, to images on disk."""

import argparse
import copy
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import loading, options, records
from .console import Console
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
    parser.add_argument("--seed", type=int, help="of the first image, the next ones count on; default: a random one")
    parser.add_argument("--num-images", type=int, metavar="N", help="how many, with seeds that count on; default: 1")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="images drawn at once; default: %(default)s"
    )
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="PATH",
        help="a .png or a folder; default: named by prompt and seed, here",
    )
    parser.add_argument(
        "--preview", type=Path, metavar="PATH", help="also the image as it grows, scale by scale: .gif, .mp4, .png"
    )
    options.add_size_options(parser)
    options.add_sampling_options(parser)
    group = parser.add_argument_group("what comes before, and when it ends")
    group.add_argument(
        "--think", action=argparse.BooleanOptionalAction, help="write before drawing, and draw with that in view"
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="with --think: where it has to begin drawing")
    group.add_argument("--num-scales", type=int, metavar="N", help="only the first N scales: a fast preview")
    options.add_decoder_options(parser)
    options.add_model_options(parser)
    options.add_recall_options(parser)
    options.add_console_options(parser)


def generate_images(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All images that the options of `console.name` ask for, saved; what is said of each in JSON."""
    import torch

    # 1. What to draw
    if args.messages is not None:
        args.messages = read_messages(args.messages)
    for name in ("num_images", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    recalled = records.recall(args, console.name, RECORDED)
    prompts = _read_prompts(args)
    args.seed = options.choose_seed(args.seed)
    count = args.num_images or 1
    output = Output(args.output, count=count * len(prompts))
    if args.preview is not None and preview_path(args.preview) == args.output:
        raise ValueError(f"--output and --preview are both {args.output}: give them different names")

    # 2. The model
    start = time.perf_counter()
    pipe = loading.load_pipeline(args)
    recorder = records.Recorder(console.name, args, RECORDED, loading.drawing_modules(pipe, args.decoder), recalled)
    load_seconds = time.perf_counter() - start

    # 3. The images, on disk as they come. Redraw in the original batch: float rounding depends on batch size.
    seeds, wanted = range(args.seed, args.seed + count), None
    batches = [seeds[first : first + args.batch_size] for first in range(0, count, args.batch_size)]
    if recalled is not None and not recalled.changes and args.num_images is None:
        seeds, wanted = _batch_of(recalled, args.batch_size)
        batches = [seeds]
    saved = []
    start = time.perf_counter()
    for prompt, batch in itertools.product(prompts, batches):
        call = _call(pipe, args, prompt)
        grown = [[] for _ in batch]
        drawn = pipe(
            **call,
            **(_previews(grown) if args.preview is not None else {}),
            num_images_per_prompt=len(batch),
            generator=[torch.Generator().manual_seed(seed) for seed in batch],
        )
        for index in range(len(batch)) if wanted is None else [wanted]:
            image, seed, results = drawn.images[index], batch[index], _results(drawn, index)
            path = output.path(prompt, seed)
            recorder.save(
                image,
                path,
                batch={"seeds": list(batch), "index": index},
                results=results,
                **{name: value for name, value in call.items() if name in SETTINGS},
                prompt=prompt,
                seed=seed,
            )
            size = {"width": image.width, "height": image.height}
            one = {"path": str(path), "prompt": prompt, "seed": seed, **size, **results}
            if args.preview is not None:
                if args.decoder == "diffusion" or not grown[index]:
                    grown[index].append(image)
                preview = preview_path(args.preview, len(saved) + 1, output.count)
                one["preview"] = str(save_preview(grown[index], preview))
            if recalled is not None:
                one["identical"] = recalled.compare(image, console) if wanted is not None else None
            saved.append(one)
            _show(one, console)
    return {
        "model": args.model,
        "device": args.device,
        "dtype": args.loaded_dtype,
        "load_seconds": round(load_seconds, 3),
        "seconds": round(time.perf_counter() - start, 3),
        "images": saved,
    }


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
        raise ValueError('got no prompt: say what to draw, such as "a red circle", or pass --from-image')
    return [args.prompt]


def _batch_of(recalled: records.Recalled, most: int) -> tuple[list[int], int]:
    """Seeds of the images that were drawn together with the one that is recalled, and its place among them."""
    batch, seed = recalled.record.batch or {}, recalled.record.arguments.get("seed")
    seeds, index = batch.get("seeds", []), batch.get("index", 0)
    if seeds[index : index + 1] != [seed]:
        raise ValueError(
            f"the metadata of {recalled.path} cannot be used: its seed is {seed}, expected entry {index} of its batch"
        )
    if len(seeds) > most:
        raise ValueError(
            f"{recalled.path} is one of {len(seeds)} images that were drawn at once, more than --batch-size {most}: "
            f"pass --batch-size {len(seeds)} to repeat it among as many, or --num-images 1 to draw it alone, where "
            "rounding may differ"
        )
    return seeds, index


def _call(pipe: "NextFlowPipeline", args: argparse.Namespace, prompt: str | None) -> dict[str, Any]:
    """Arguments of the pipeline's call, but for those that tell one image of a prompt from the next."""
    call = records.call_settings(args, SETTINGS, pipe)
    if args.messages is not None:
        return call | {"messages": conversation(prompt, args.image, copy.deepcopy(args.messages))}
    sources = {"image": [existing_file(path) for path in args.image]} if args.image else {}
    return call | {"prompt": prompt, **sources}


def _previews(grown: list[list]) -> dict[str, Any]:
    """A callback for the pipeline that keeps each image as it is after every scale."""

    def keep(pipe: "NextFlowPipeline", step: int, scale: int, tensors: dict[str, Any]) -> dict[str, Any]:
        codes, grids = tensors["image_codes"].flatten(), tensors["image_grids"]
        for images, image in zip(grown, pipe.decode_codes(codes, grids, num_scales=scale + 1), strict=True):
            images.append(image)
        return tensors

    return {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["image_codes", "image_grids"]}


def _results(drawn: "NextFlowPipelineOutput", index: int) -> dict[str, Any]:
    if drawn.thoughts is None:
        return {}
    return {"thought": drawn.thoughts[index], "final_prompt": drawn.final_prompts[index]}


def _show(saved: dict[str, Any], console: Console) -> None:
    console.show(f"{saved['path']}  {saved['width']} x {saved['height']}, seed {saved['seed']}")
    for name in ("thought", "final_prompt", "preview"):
        if name in saved:
            console.show(f"  {name.replace('_', ' ')}: {saved[name]}")
