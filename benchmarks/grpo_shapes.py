"""Reinforcement learning on the Shapes model: what the prefix, PANW, VMR and mask propagation are worth (§3.4).

    python benchmarks/grpo_shapes.py compare --model DIR --transformer CHECKPOINT --output-dir benchmarks/grpo_shapes
    python benchmarks/grpo_shapes.py memory --model DIR --output-dir benchmarks/grpo_shapes

`compare` trains every arm with every seed from one checkpoint, best an early one of the transformer's training, at
equal samples, and writes `runs/*.json`, `results.md`, `reward.png` and `judge.png`. What is finished is not repeated.
`memory` measures seconds and memory of an update against the number of rollouts, and states the arithmetic for 7B.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from nextflow_hf import NextFlowConfig, NextFlowForCausalLM, NextFlowPipeline
from nextflow_hf.processing.scale_schedule import ScaleSchedule, num_cells
from nextflow_hf.training.evaluation.shapes import evaluate_shapes, pipeline_functions
from nextflow_hf.training.grpo import load_recipe, make_trainer
from nextflow_hf.training.rewards.shapes import clean_shapes
from nextflow_hf.training.train_shapes import reconstruct


VMR = {"vmr_num_suffixes": 2, "prefix_updates_per_suffix": 3}
ARMS = {
    "prefix": {},
    "vanilla": {"prefix_scales": None, "scale_loss_alpha": 0.0},
    "whole, alpha 0.6": {"prefix_scales": None},
    "prefix, alpha 0": {"scale_loss_alpha": 0.0},
    "prefix, alpha 1": {"scale_loss_alpha": 1.0},
    "prefix, VMR": VMR,
    "prefix, masks": {"mask_propagation": True},
}
COLORS = ("#0b6e4f", "#c1121f", "#3a5ba0", "#e09f3e", "#7b2d8b", "#00a6a6", "#7f7f7f")


def judge(pipeline: NextFlowPipeline, num_prompts: int, seed: int, guidance_scale: float, top_k: int) -> dict:
    """Held-out scores of a pipeline: the judge's, how clean the shapes are, and the PSNR in dB of the pictures to what
    the vision tokenizer makes of them, which falls where pictures leave what its codes can say."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.eval()
    functions = pipeline_functions(pipeline, seed, guidance_scale=guidance_scale, top_k=top_k)
    report = evaluate_shapes(functions, {"prompt": num_prompts}, seed=seed)
    pictures = [item.pictures[0] for item in report.results]
    psnr, _ = reconstruct(pipeline, np.stack([np.asarray(picture) for picture in pictures]))
    return {
        "overall": report.to_dict()["prompt"]["overall"],
        "clean": statistics.mean(clean_shapes(images=pictures)),
        "psnr_to_codes": psnr,
    }


def assemble(model: str, transformer: str | None, folder: Path) -> Path:
    """The repository to start from: `model`, with the weights of `transformer` where given."""
    if transformer is not None and not folder.exists():
        pipeline = NextFlowPipeline.from_pretrained(model, dtype=torch.float32)
        weights = NextFlowForCausalLM.from_pretrained(transformer, dtype=torch.float32)
        weights.generation_config = pipeline.transformer.generation_config
        pipeline.register_modules(transformer=weights)
        pipeline.save_pretrained(folder)
    return Path(model) if transformer is None else folder


def run_arm(arm: str, seed: int, start: Path, args: argparse.Namespace) -> dict:
    """One training: its rewards, what an update costs, and the held-out scores before and after."""
    recipe = load_recipe("shapes_grpo")
    folder = args.output_dir / "work"
    numbers = {**ARMS[arm], "seed": seed, "data_seed": seed, "save_strategy": "no", "max_steps": args.max_steps}
    trainer = make_trainer(start, recipe, folder, use_cpu=not torch.accelerator.is_available(), **numbers)
    if ARMS[arm].get("vmr_num_suffixes", 1) > 1:  # equal samples: K pictures a prefix, half as many prefixes
        samples = trainer.args.max_steps * recipe["training"]["per_device_train_batch_size"]
        trainer.args.max_steps = samples // (recipe["training"]["per_device_train_batch_size"] * 2)
    sampling = {"guidance_scale": trainer.args.guidance_scale, "top_k": trainer.args.top_k}
    before = judge(trainer.pipeline, args.num_prompts, 1000 + seed, **sampling)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "arm": arm,
        "seed": seed,
        "before": before,
        "after": judge(trainer.pipeline, args.num_prompts, 1000 + seed, **sampling),
        "rewards": [entry["reward"] for entry in entries],
        "seconds_per_update": seconds / len(entries),
        "seconds_of_step": statistics.median(entry["step_time"] for entry in entries),
    }


def compare(args: argparse.Namespace) -> None:
    start = assemble(args.model, args.transformer, args.output_dir / "start")
    (args.output_dir / "runs").mkdir(parents=True, exist_ok=True)
    runs = []
    for arm in args.arms:
        for seed in args.seeds:
            file = args.output_dir / "runs" / f"{arm.replace(', ', '_').replace(' ', '_')}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(run_arm(arm, seed, start, args)))
            runs.append(json.loads(file.read_text()))
    (args.output_dir / "results.md").write_text(results_table(runs, args))
    curves = {arm: [smooth(run["rewards"]) for run in runs if run["arm"] == arm] for arm in args.arms}
    draw_curves(
        args.output_dir / "reward.png", curves, "share of the judge's checks that hold, over equal numbers of pictures"
    )
    scores = {
        arm: [[run[w]["overall"] for w in ("before", "after")] for run in runs if run["arm"] == arm]
        for arm in args.arms
    }
    draw_curves(args.output_dir / "judge.png", scores, "held-out judge, before and after")


def smooth(values: Sequence[float], window: int = 8) -> list[float]:
    """Running mean over the last `window` values."""
    return [statistics.mean(values[max(0, index + 1 - window) : index + 1]) for index in range(len(values))]


def results_table(runs: list[dict], args: argparse.Namespace) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""

    def over_seeds(values: list[float], digits: int = 3) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"

    lines = [
        f"Seeds {args.seeds}, {args.max_steps} updates of 64 pictures (VMR: half as many updates of 128), held-out "
        f"prompts: {args.num_prompts}. Mean and standard deviation over the seeds.",
        "",
        "| arm | judge before | judge after | gain | clean shapes | PSNR to codes | mean reward | s / update |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in args.arms:
        own = [run for run in runs if run["arm"] == arm]
        cells = [
            over_seeds([run["before"]["overall"] for run in own]),
            over_seeds([run["after"]["overall"] for run in own]),
            over_seeds([run["after"]["overall"] - run["before"]["overall"] for run in own]),
            over_seeds([run["after"]["clean"] for run in own]),
            over_seeds([run["after"]["psnr_to_codes"] for run in own], 2),
            over_seeds([statistics.mean(run["rewards"]) for run in own]),
            over_seeds([run["seconds_per_update"] for run in own], 2),
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    clean = [run["before"]["clean"] for run in runs]
    psnr = [run["before"]["psnr_to_codes"] for run in runs]
    lines += ["", f"Before training: clean shapes {over_seeds(clean)}, PSNR to codes {over_seeds(psnr, 2)}.", ""]
    return "\n".join(lines)


def draw_curves(
    path: Path, curves: dict[str, list[list[float]]], title: str, size: tuple[int, int] = (900, 520)
) -> None:
    """Every seed as a thin line, their mean as a thick one, one colour an arm. No plotting library is needed."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 40, size[0] - 230, size[1] - 50
    values = [value for lines in curves.values() for line in lines for value in line]
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    length = max(len(line) for lines in curves.values() for line in lines)

    def point(index: int, count: int, value: float) -> tuple[float, float]:
        # Arms of fewer, larger updates have the same length: the axis is samples.
        x = left + (right - left) * index / max(count - 1, 1)
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    draw.text((left, 14), title, fill="black")
    for tick in range(6):
        value = low + (high - low) * tick / 5
        y = point(0, 1, value)[1]
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((left - 48, y - 6), f"{value:.3f}", fill="black")
    draw.text((left, bottom + 12), "0", fill="black")
    draw.text((right - 30, bottom + 12), str(length), fill="black")
    for row, ((name, lines), color) in enumerate(zip(curves.items(), COLORS)):
        mean = [statistics.mean(column) for column in zip(*lines)]
        for line, width in [*((line, 1) for line in lines), (mean, 4)]:
            draw.line([point(i, len(line), value) for i, value in enumerate(line)], fill=color, width=width)
        draw.line([(right + 16, top + 24 * row + 6), (right + 40, top + 24 * row + 6)], fill=color, width=4)
        draw.text((right + 48, top + 24 * row), name, fill="black")
    image.save(path)


def measure(args: argparse.Namespace) -> None:
    """One process of `memory`: prints seconds per update and peak memory in MiB."""
    numbers = {"max_steps": 3, "save_strategy": "no", "per_device_train_batch_size": args.rollouts}
    numbers |= {"prefix_scales": args.prefix_scales, "use_cpu": not torch.accelerator.is_available()}
    trainer = make_trainer(args.model, load_recipe("shapes_grpo"), args.output_dir / "work", **numbers)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trainer.train()
    if torch.cuda.is_available():
        idle, peak = 0.0, torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]
    print(json.dumps({"seconds": min(steps), "peak": peak, "idle": idle}))


def memory(args: argparse.Namespace) -> None:
    recipe = load_recipe("shapes_grpo")["training"]
    lines = [
        "| rollouts an update | trained | s / update | peak MiB | above the loaded model |",
        "|---:|---|---:|---:|---:|",
    ]
    for rollouts in (8, 16, 32, 64, 128):
        for scales, name in ((recipe["prefix_scales"], "prefix"), (None, "whole")):
            command = [sys.executable, __file__, "measure", "--model", args.model, "--output-dir", args.output_dir]
            command += ["--rollouts", rollouts] + ([] if scales is None else ["--prefix-scales", scales])
            result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
            found = json.loads(result.stdout.strip().splitlines()[-1])
            lines.append(
                f"| {rollouts} | {name} | {found['seconds']:.2f} | {found['peak']:.0f} | "
                f"{found['peak'] - found['idle']:.0f} |"
            )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "memory.md").write_text("\n".join([*lines, "", memory_arithmetic(), ""]))


def memory_arithmetic(rank: int = 64, group: int = 16, prompt: int = 100, drawn_together: int = 4) -> str:
    """GiB of LoRA on the 7B model at 1024 pixels, bf16 weights, as Markdown: rollouts and updates take turns."""
    config, schedule = NextFlowConfig(), ScaleSchedule()
    bucket = schedule.nearest_bucket(1, 1)
    grids = {scales: schedule.grids(bucket, scales) for scales in (8, 12, 18)}
    hidden, layers = config.hidden_size, config.num_hidden_layers
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    shapes += [(hidden, config.intermediate_size)] * 2 + [(config.intermediate_size, hidden)]
    weights = layers * sum(rows * columns for rows, columns in shapes) + 2 * config.vocab_size * hidden
    adapters = layers * rank * sum(rows + columns for rows, columns in shapes)
    whole = num_cells(grids[18])
    last = grids[18][-1][0] * grids[18][-1][1]
    cached = 2 * drawn_together * (whole + prompt)
    rows = [
        (f"weights, bf16 ({weights / 1e9:.2f} B)", 2 * weights),
        (f"LoRA r = {rank} on all projections ({adapters / 1e6:.0f} M): fp32, gradient, AdamW", 16 * adapters),
        (f"rollout: keys and values of {drawn_together} pictures, guided", cached * 2 * 2 * layers * keys),
        (
            "rollout: logits of the last scale, fp32, three copies",
            2 * drawn_together * last * config.codebook_size * 12,
        ),
    ]
    for scales, cells in ((number, num_cells(grids[number])) for number in grids):
        tokens = cells + prompt
        kept = layers * tokens * hidden * 2  # checkpoints, one a layer
        inside = tokens * (3 * config.intermediate_size + 6 * hidden) * 2  # one layer, computed again
        logits = min(cells, 4096) * config.codebook_size * 4 * 3
        rows.append((f"update, one picture, {scales} scales ({cells} codes)", kept + inside + logits))
    lines = ["| 7B, 1024 pixels | GiB |", "|---|---:|", *(f"| {name} | {size / 2**30:.2f} |" for name, size in rows)]
    fixed, rollout = rows[0][1] + rows[1][1], rows[2][1] + rows[3][1]
    lines += [
        "",
        f"A group of {group} is drawn {drawn_together} at a time: peak {(fixed + rollout) / 2**30:.1f} GiB. An update "
        f"of 12 scales, 4 pictures at a time: {(fixed + 4 * rows[5][1]) / 2**30:.1f} GiB; of the whole sequence: "
        f"{(fixed + 4 * rows[6][1]) / 2**30:.1f} GiB. Both leave room on 80 GB; the reward models come on top.",
    ]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("compare", compare), ("memory", memory), ("measure", measure)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--model", required=True, help="folder or Hub id of a NextFlowPipeline")
        command.add_argument("--output-dir", type=Path, required=True)
    comparison = commands.choices["compare"]
    comparison.add_argument("--transformer", help="checkpoint to start from instead of the model's own transformer")
    comparison.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    comparison.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    comparison.add_argument("--max-steps", type=int, default=load_recipe("shapes_grpo")["training"]["max_steps"])
    comparison.add_argument("--num-prompts", type=int, default=240)
    commands.choices["measure"].add_argument("--rollouts", type=int, required=True)
    commands.choices["measure"].add_argument("--prefix-scales", type=int)
    return parser


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    arguments.function(arguments)
