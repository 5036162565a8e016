"""Time and peak memory of everything that the pipeline does, as one Markdown table:

    python benchmarks/capabilities.py                          # the shipped Shapes model
    python benchmarks/capabilities.py --model path/to/model --device cuda --dtype bfloat16

Each capability runs in a process of its own, so that none profits from what another left behind. Source images
are plain (a disc on white), as the numbers do not depend on what they show.

- first: the first call after loading; warm: the median of `--repeats` calls after it.
- loaded: memory with the model loaded and nothing done. Peak: the most during all calls. On a CPU both are of the
  whole process, Python and libraries included; on a GPU, of tensors on it.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextflow_hf.atomic import write_json


PROMPT = "a red circle"
EDIT = "make the circle blue"
IMPLIED = "a circle in the color of grass"
QUESTION = "what color is the circle"
STORY = "a story: a red circle on a white background moves from left to right"
# What runs, in words.
CAPABILITIES = {
    "text-to-image": "one image",
    "batch of 4": "four images of one prompt",
    "edit": "one image of another",
    "think": "reasoning, then one image",
    "chat": "a question about an image",
    "interleave": "a story of text and up to 3 images",
    "frames": "a storyline of 3 images",
    "in-context": "one image after an example pair",
    "preview": "one image, decoded after every scale",
    "keep scales": "one image that keeps half the scales of another",
    "regional edit": "the left half of an image anew",
    "reconstruct": "an image to codes and back",
    "diffusion decoder": "one image through the diffusion decoder",
}


def work_of(name: str, pipe: Any, image: Any, max_new_tokens: int) -> Callable[[], Any]:
    """One call of a capability."""
    import torch

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def part(value: Any) -> dict[str, Any]:
        kind = "text" if isinstance(value, str) else "image"
        return {"type": kind, kind: value}

    def user(*values: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [part(value) for value in values]}]

    def codes() -> dict[str, torch.Tensor]:
        return dict(zip(("image_codes", "image_grids"), pipe.encode_images(image), strict=True))

    half = torch.zeros(image.height, image.width)
    half[:, : image.width // 2] = 1
    schedule, resolution = pipe.processor.image_processor.schedule, pipe.processor.image_processor.resolution
    written = {"max_new_tokens": max_new_tokens}
    return {
        "text-to-image": lambda: pipe(PROMPT, generator=seeded()),
        "batch of 4": lambda: pipe(PROMPT, num_images_per_prompt=4, generator=seeded()),
        "edit": lambda: pipe(EDIT, image=image, generator=seeded()),
        "think": lambda: pipe(IMPLIED, think=True, generator=seeded(), **written),
        "chat": lambda: pipe.chat(user(image, QUESTION), generator=seeded(), **written),
        "interleave": lambda: pipe.interleave(user(STORY), max_images=3, generator=seeded(), **written),
        "frames": lambda: pipe.frames(STORY, num_frames=3, generator=seeded(), **written),
        "in-context": lambda: pipe(messages=user(image, "is to", image, "as", image, "is to"), generator=seeded()),
        "preview": lambda: list(pipe.preview(PROMPT, generator=seeded())),
        "keep scales": lambda: pipe(
            PROMPT, **codes(), keep_scales=schedule.num_scales(resolution) // 2, generator=seeded()
        ),
        "regional edit": lambda: pipe(PROMPT, **codes(), mask_image=half, generator=seeded()),
        "reconstruct": lambda: pipe(**codes()),
        "diffusion decoder": lambda: pipe(PROMPT, decoder="diffusion", generator=seeded()),
    }[name]


def plain_image(pipe: Any) -> Any:
    """A disc on white, of the model's own size."""
    from PIL import Image, ImageDraw

    processor = pipe.processor.image_processor
    scales = processor.schedule.num_scales(processor.resolution)
    height, width = processor.schedule.pixel_size(processor.schedule.nearest_bucket(1, 1), scales)
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width * 3 // 4, height * 3 // 4), fill="red")
    return image


def measure_one(name: str, pipe: Any, *, repeats: int, max_new_tokens: int) -> dict[str, Any]:
    """Seconds and bytes of one capability, in this process."""
    from nextflow_hf.commands.measuring import peak_memory, reset_peak_memory, timed

    if name == "diffusion decoder" and pipe.diffusion_decoder is None:
        return {"missing": "this model has none"}
    device = pipe._execution_device
    work = work_of(name, pipe, plain_image(pipe), max_new_tokens)
    is_reset = reset_peak_memory(device)
    loaded, _ = peak_memory(device)
    first = timed(work, device)
    warm = statistics.median(timed(work, device) for _ in range(repeats))
    peak, of = peak_memory(device)
    return {"first": first, "warm": warm, "loaded": loaded, "peak": peak, "of": of, "is_reset": is_reset}


def load(args: argparse.Namespace) -> tuple[Any, argparse.Namespace]:
    """The pipeline, and the options with what was chosen."""
    from nextflow_hf.commands.loading import load_pipeline

    chosen = argparse.Namespace(**{**vars(args), "revision": None, "quiet": True, "vision_tokenizer": None})
    return load_pipeline(chosen), chosen


def describe(pipe: Any, chosen: argparse.Namespace) -> dict[str, str]:
    """What to say of the model and of the machine."""
    import torch

    from nextflow_hf.commands.loading import environment

    device = platform.processor() or platform.machine()
    if chosen.device.startswith("cuda"):
        device = torch.cuda.get_device_name(chosen.device)
    elif Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        device = models[0].partition(": ")[2] if models else device
    image = plain_image(pipe)
    codes, _ = pipe.encode_images(image)
    extras = [chosen.quantize] * bool(chosen.quantize) + ["offloaded"] * chosen.offload
    return {
        "device": device,
        "model": ", ".join(
            [chosen.model, f"{pipe.transformer.num_parameters():,} parameters in {chosen.dtype}", *extras]
        ),
        "images": f"{image.width} x {image.height} pixels, {len(codes)} codes",
        "versions": ", ".join(f"{library} {version}" for library, version in environment().items()),
    }


def run_one(name: str, argv: list[str]) -> dict[str, Any]:
    """[`measure_one`] in a process of its own."""
    command = [sys.executable, __file__, *argv, "--child", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} failed with status {result.returncode}:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| capability | | first (s) | warm (s) | loaded (MB) | peak (MB) | on top (MB) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        if "missing" in result:
            lines.append(f"| {name} | {result['missing']} | | | | | |")
            continue
        seconds = f"{result['first']:.3f} | {result['warm']:.3f}"
        megabytes = [result["loaded"] / 1e6, result["peak"] / 1e6, (result["peak"] - result["loaded"]) / 1e6]
        numbers = " | ".join(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in megabytes)
        lines.append(f"| {name} | {CAPABILITIES[name]} | {seconds} | {numbers} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default: the shipped Shapes model")
    parser.add_argument("--device", help="default: the accelerator, where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantize", choices=("4bit", "8bit"))
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--only", action="append", choices=CAPABILITIES, help="repeat for several; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="warm calls; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of a text; default: %(default)s")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    parser.add_argument("--child", choices=CAPABILITIES, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    argv = sys.argv[1:]
    args = make_parser().parse_args(argv)
    if args.repeats < 1:
        raise SystemExit(f"--repeats is {args.repeats}, expected at least 1")
    if args.child is not None:
        pipe, chosen = load(args)
        result = measure_one(args.child, pipe, repeats=args.repeats, max_new_tokens=args.max_new_tokens)
        print(json.dumps({**result, "facts": describe(pipe, chosen)}))
        return
    results = {}
    for name in args.only or CAPABILITIES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = run_one(name, argv)
    facts = next(iter(results.values()))["facts"]
    measured = [result for result in results.values() if "missing" not in result]
    print("\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if measured:
        print(f"- memory: of {measured[0]['of']}; warm: the median of {args.repeats} calls")
    if not all(result["is_reset"] for result in measured):
        print("- this system knows only the peak of a process's life: loaded and peak include loading")
    print(f"\n{table(results)}")
    if args.output is not None:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
