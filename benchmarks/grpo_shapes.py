"""Reinforcement learning on the Shapes model: what the prefix, PANW, VMR and mask propagation are worth (§3.2.5).

    python benchmarks/grpo_shapes.py compare --model DIR --transformer CHECKPOINT --output-dir runs/grpo_shapes
    python benchmarks/grpo_shapes.py ceiling --model DIR --transformer CHECKPOINT --output-dir runs/grpo_shapes
    python benchmarks/grpo_shapes.py memory --model DIR --output-dir runs/grpo_shapes

`compare` trains every arm with every seed from one checkpoint, best an early one of the transformer's training, at
equal numbers of pictures, and writes `results.md`, `reward.png` and `judge.png` after each. `ceiling` draws several
prefixes a prompt and several pictures a prefix: what the best prefixes have over all of them is about what a training
of the prefix alone can gain. `memory` measures the cost of an update against the number of rollouts, and states the
arithmetic for 7B. `compare` and `memory` go on where they were interrupted.
Times are seconds of the processor, which neighbours on the machine do not change.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import TrainerCallback

from nextflow_hf import NextFlowConfig, NextFlowForCausalLM, NextFlowPipeline
from nextflow_hf.atomic import replaced_folder, write_file, write_json, write_text
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule, num_cells
from nextflow_hf.training.common.checkpoints import last_checkpoint
from nextflow_hf.training.evaluation.shapes import evaluate_shapes, pipeline_functions
from nextflow_hf.training.grpo.config import NextFlowGRPOConfig
from nextflow_hf.training.grpo.train import load_recipe, make_config, make_trainer
from nextflow_hf.training.rewards.shapes import clean_shapes
from nextflow_hf.training.shapes import CATEGORIES, sample_prompt
from nextflow_hf.training.shapes.judge import judge_prompt
from nextflow_hf.training.train_shapes import reconstruct
from nextflow_hf.training.transformer.memory import training_memory


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
COLD = 0.3  # a temperature
COLORS = ("#0b6e4f", "#c1121f", "#3a5ba0", "#e09f3e", "#7b2d8b", "#00a6a6", "#7f7f7f")


def draw_held_out(
    pipeline: NextFlowPipeline, num_prompts: int, seed: int, sampling: dict[str, float], categories: list[str] | None
) -> tuple[float, list[Image.Image]]:
    """The judge's score of held-out prompts, the same for the same seed, and the pictures. The score is the mean of
    `categories`, or of all."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.eval()
    functions = pipeline_functions(pipeline, 1000 + seed, **sampling)
    report = evaluate_shapes(functions, {"prompt": num_prompts}, seed=1000 + seed)
    rates = report.to_dict()["prompt"]["categories"]
    score = statistics.mean(rates[category]["rate"] for category in categories or CATEGORIES)
    return score, [item.pictures[0] for item in report.results]


def judge(
    pipeline: NextFlowPipeline, num_prompts: int, seed: int, sampling: dict[str, float], categories: list[str] | None
) -> dict:
    """Held-out scores of a pipeline: the judge's, how clean the shapes are, and the PSNR in dB of the pictures to what
    the vision tokenizer makes of them, which falls where pictures leave what its codes can say. And the judge's of
    pictures that are drawn cold: what a sharper policy gains, that gives without training."""
    overall, pictures = draw_held_out(pipeline, num_prompts, seed, sampling, categories)
    psnr, _ = reconstruct(pipeline, np.stack([np.asarray(picture) for picture in pictures]))
    cold, _ = draw_held_out(pipeline, num_prompts, seed, {**sampling, "temperature": COLD}, categories)
    clean = statistics.mean(clean_shapes(images=pictures))
    return {"overall": overall, "clean": clean, "psnr_to_codes": psnr, "cold": cold}


class JudgeCallback(TrainerCallback):
    """The judge's held-out score at each quarter of a training but the last, in `folder/judge-<quarter>.json`."""

    def __init__(self, pipeline: NextFlowPipeline, folder: Path, *judge_args):
        self.pipeline, self.folder, self.judge_args = pipeline, folder, judge_args
        self.seconds = 0.0

    def file(self, quarter: int) -> Path:
        return self.folder / f"judge-{quarter}.json"

    def on_step_end(self, args, state, control, **kwargs):
        began = time.process_time()
        for quarter in (1, 2, 3):
            if state.global_step == round(quarter * state.max_steps / 4):
                score, _ = draw_held_out(self.pipeline, *self.judge_args)
                write_json(self.file(quarter), score)
                self.pipeline.transformer.train()  # TRL logs what it measured under the mode that it finds
        self.seconds += time.process_time() - began

    def scores(self) -> list[float]:
        return [json.loads(self.file(quarter).read_text()) for quarter in (1, 2, 3)]


def once(file: Path, make: Callable[[], dict]) -> dict:
    """What `make` gives, from `file` where it was made before."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text())


def assemble(model: str, transformer: str | None, folder: Path) -> Path:
    """The repository to start from: `model`, with the weights of `transformer` where given."""
    if transformer is not None and not (folder / "model_index.json").exists():
        pipeline = NextFlowPipeline.from_pretrained(model, dtype=torch.float32)
        weights = NextFlowForCausalLM.from_pretrained(transformer, dtype=torch.float32)
        weights.generation_config = pipeline.transformer.generation_config
        pipeline.register_modules(transformer=weights)
        with replaced_folder(folder) as staging:
            pipeline.save_pretrained(staging)
    return Path(model) if transformer is None else folder


def num_updates(arm: str, seed_updates: int) -> int:
    """Updates of an arm that draw as many pictures as `seed_updates` updates of one picture a prefix: of every four
    generations with VMR, three draw K pictures a prefix and one draws one."""
    suffixes = ARMS[arm].get("vmr_num_suffixes", 1)
    turns = ARMS[arm].get("prefix_updates_per_suffix", 0)
    return round(seed_updates * (turns + 1) / (turns * suffixes + 1)) if suffixes > 1 else seed_updates


def run_arm(arm: str, seed: int, start: Path, folder: Path, args: argparse.Namespace) -> dict:
    """One training: its rewards, what an update costs, and the held-out scores after it."""
    numbers = {**ARMS[arm], "seed": seed, "data_seed": seed, "save_strategy": "steps", "save_steps": 10}
    numbers |= {"save_total_limit": 1, "max_steps": num_updates(arm, args.max_steps)}
    numbers |= {"use_cpu": not torch.accelerator.is_available(), "learning_rate": args.learning_rate}
    numbers |= {"per_device_train_batch_size": args.num_pictures}
    recipe = load_recipe("shapes_grpo")
    recipe["data"]["shapes"]["categories"] = args.categories
    trainer = make_trainer(start, recipe, make_config(recipe, folder, **numbers))
    judge_args = (args.num_prompts, seed, sampling_of(trainer.args), args.categories)
    middle = JudgeCallback(trainer.pipeline, folder, *judge_args)
    trainer.add_callback(middle)
    checkpoint = last_checkpoint(folder)
    began = time.process_time()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.process_time() - began - middle.seconds
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]  # one for every drawing
    done_now = trainer.state.global_step - (int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0)
    names = ("reward", "kl", "entropy", "frac_reward_zero_std", "vmr/suffix_std", "reward_std")
    result = {
        "arm": arm,
        "seed": seed,
        "middle": middle.scores(),
        "after": judge(trainer.pipeline, *judge_args),
        "seconds_per_update": seconds / done_now if done_now else float("nan"),
        **{name: [entry[name] for entry in entries if name in entry] for name in names},
    }
    shutil.rmtree(folder)
    return result


def sampling_of(args: NextFlowGRPOConfig) -> dict[str, float]:
    """How held-out pictures are drawn: as the rollouts, which is the policy that is trained."""
    return {"guidance_scale": args.guidance_scale, "temperature": args.temperature, "top_k": args.top_k}


def recipe_numbers() -> NextFlowGRPOConfig:
    use_cpu = not torch.accelerator.is_available()
    return NextFlowGRPOConfig("unused", use_cpu=use_cpu, **load_recipe("shapes_grpo")["training"])


def judge_start(start: Path, seed: int, args: argparse.Namespace) -> dict:
    pipeline = NextFlowPipeline.from_pretrained(start, dtype=torch.float32)
    return judge(pipeline, args.num_prompts, seed, sampling_of(recipe_numbers()), args.categories)


def compare(args: argparse.Namespace) -> None:
    start = assemble(args.model, args.transformer, args.output_dir / "start")
    runs = []
    for seed in args.seeds:  # every arm once before any twice
        for arm in args.arms:
            name = f"{arm.replace(', ', '_').replace(' ', '_')}-{seed}"
            results, work = args.output_dir / "runs", args.output_dir / "work" / name
            before = once(results / f"start-{seed}.json", partial(judge_start, start, seed, args))
            run = once(results / f"{name}.json", partial(run_arm, arm, seed, start, work, args))
            runs.append({**run, "before": before})
            report(runs, args)


def ceiling(args: argparse.Namespace) -> None:
    """Share of pictures that pass: of all prefixes, and of each prompt's best and worst, which half of a prefix's
    pictures choose and the other half judge."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    numbers = recipe_numbers()
    start = assemble(args.model, args.transformer, args.output_dir / "start")
    pipeline = NextFlowPipeline.from_pretrained(start, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    draw = partial(pipeline, num_images_per_prompt=args.num_prefixes, generator=generator, **sampling_of(numbers))
    results = []
    for index in range(args.num_prompts):
        prompt = sample_prompt(random, CATEGORIES[index % len(CATEGORIES)])
        first = draw(prompt.text)
        passed = []
        for codes, grids in zip(first.image_codes.chunk(args.num_prefixes), first.image_grids):
            kept = {"image_codes": codes, "image_grids": grids[None], "keep_scales": numbers.prefix_scales}
            passed.append([judge_prompt(image, prompt).passed for image in draw(prompt.text, **kept).images])
        passed = np.array(passed, float)
        choosing, judging = np.split(passed, [args.num_prefixes // 2], axis=1)
        rank = choosing.mean(1)
        results.append((prompt.category, passed.mean(), judging[rank.argmax()].mean(), judging[rank.argmin()].mean()))
    lines = ["| prompts | all prefixes | the best | the worst |", "|---|---:|---:|---:|"]
    for name in ("all", *CATEGORIES):
        own = np.mean([row[1:] for row in results if name in ("all", row[0])], axis=0)
        lines.append(f"| {name.replace('_', ' ')} | {own[0]:.3f} | {own[1]:.3f} | {own[2]:.3f} |")
    write_text(args.output_dir / "ceiling.md", "\n".join([*lines, ""]))
    print(*lines, sep="\n")


def report(runs: list[dict], args: argparse.Namespace) -> None:
    """The table and the pictures of the runs so far."""
    write_text(args.output_dir / "results.md", results_table(runs, args))
    arms = [arm for arm in args.arms if any(run["arm"] == arm for run in runs)]
    curves = {arm: [smooth(run["reward"]) for run in runs if run["arm"] == arm] for arm in arms}
    draw_curves(args.output_dir / "reward.png", curves, "share of the judge's checks that hold in training")
    scores = {
        arm: [[run["before"]["overall"], *run["middle"], run["after"]["overall"]] for run in runs if run["arm"] == arm]
        for arm in arms
    }
    draw_curves(args.output_dir / "judge.png", scores, "share of held-out prompts that the judge passes")


def smooth(values: Sequence[float], window: int = 8) -> list[float]:
    """Running mean over the last `window` values."""
    return [statistics.mean(values[max(0, index + 1 - window) : index + 1]) for index in range(len(values))]


def results_table(runs: list[dict], args: argparse.Namespace) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""

    def over_seeds(values: list[float], digits: int = 3) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"

    start = {run["seed"]: run["before"] for run in runs}.values()
    lines = [
        f"{args.max_steps} updates of {args.num_pictures} pictures (VMR: as many pictures in all), learning rate "
        f"{args.learning_rate}, trained and judged on {', '.join(args.categories or ['every category'])} "
        f"(of {args.num_prompts} held-out prompts of all). Mean and standard deviation over the seeds.",
        "",
        f"| arm | seeds | judge | gain | judge at temperature {COLD} | clean shapes | PSNR to codes | mean reward "
        "| CPU s / update |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| before | "
        + " | ".join(
            [str(len(start)), over_seeds([scores["overall"] for scores in start]), ""]
            + [over_seeds([scores[name] for scores in start]) for name in ("cold", "clean")]
            + [over_seeds([scores["psnr_to_codes"] for scores in start], 2), "", ""]
        )
        + " |",
    ]
    for arm in args.arms:
        own = [run for run in runs if run["arm"] == arm]
        if own:
            cells = [
                str(len(own)),
                over_seeds([run["after"]["overall"] for run in own]),
                over_seeds([run["after"]["overall"] - run["before"]["overall"] for run in own]),
                *(over_seeds([run["after"][name] for run in own]) for name in ("cold", "clean")),
                over_seeds([run["after"]["psnr_to_codes"] for run in own], 2),
                over_seeds([statistics.mean(run["reward"]) for run in own]),
                over_seeds([run["seconds_per_update"] for run in own], 2),
            ]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


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
    draw.text((left, bottom + 12), "start", fill="black")
    draw.text((right - 190, bottom + 12), "end, after equal numbers of pictures", fill="black")
    for row, ((name, lines), color) in enumerate(zip(curves.items(), COLORS)):
        mean = [statistics.mean(column) for column in zip(*lines)]
        for line, width in [*((line, 1) for line in lines), (mean, 4)]:
            draw.line([point(i, len(line), value) for i, value in enumerate(line)], fill=color, width=width)
        draw.line([(right + 16, top + 24 * row + 6), (right + 40, top + 24 * row + 6)], fill=color, width=4)
        draw.text((right + 48, top + 24 * row), name, fill="black")
    write_file(path, image.save)


def measure(args: argparse.Namespace) -> None:
    """One process of `memory`: prints seconds per update and peak memory in MiB."""
    # Every update with a drawing of its own.
    numbers = {
        "max_steps": 2,
        "num_iterations": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": args.rollouts,
    }
    numbers |= {"prefix_scales": args.prefix_scales, "use_cpu": not torch.accelerator.is_available()}
    recipe = load_recipe("shapes_grpo")
    trainer = make_trainer(args.model, recipe, make_config(recipe, args.output_dir / "work", **numbers))
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.process_time()
    trainer.train()
    seconds = (time.process_time() - began) / trainer.args.max_steps
    if torch.cuda.is_available():
        idle, peak = 0.0, torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "idle": idle}))


def last_line(command: Sequence) -> dict:
    """What a command prints last."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


def memory(args: argparse.Namespace) -> None:
    prefix = load_recipe("shapes_grpo")["training"]["prefix_scales"]
    lines = [
        "| rollouts an update | trained | CPU s / update | peak MiB | above the loaded model |",
        "|---:|---|---:|---:|---:|",
    ]
    for rollouts in (16, 32, 64, 128):
        for scales, name in ((prefix, "prefix"), (None, "whole")):
            command = [sys.executable, __file__, "measure", "--model", args.model, "--output-dir", args.output_dir]
            command += ["--rollouts", rollouts] + ([] if scales is None else ["--prefix-scales", scales])
            found = once(args.output_dir / "memory" / f"{name}-{rollouts}.json", partial(last_line, command))
            lines.append(
                f"| {rollouts} | {name} | {found['seconds']:.2f} | {found['peak']:.0f} | "
                f"{found['peak'] - found['idle']:.0f} |"
            )
    write_text(args.output_dir / "memory.md", "\n".join([*lines, "", memory_arithmetic(), ""]))


def memory_arithmetic(rank: int = 64, group: int = 16, prompt: int = 100, drawn_together: int = 4) -> str:
    """GiB of LoRA on the 7B model at 1024 pixels, bf16 weights, as Markdown: rollouts and updates take turns."""
    config, schedule = NextFlowConfig(), ScaleSchedule()
    bucket = schedule.nearest_bucket(1, 1)
    grids = {scales: schedule.grids(bucket, scales) for scales in (8, 12, 18)}
    training = partial(training_memory, config, trainable="lora", optim="adamw_torch_fused", lora_r=rank)
    model = training(tokens=0)
    weights = 2 * model.parameters
    adapters = model.weights - weights + model.gradients + model.optimizer
    cached = 2 * drawn_together * (num_cells(grids[18]) + prompt)
    keys = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    last = grids[18][-1][0] * grids[18][-1][1]
    rows = [
        (f"weights, bf16 ({model.parameters / 1e9:.2f} B)", weights),
        (
            f"LoRA r = {rank} on all projections ({model.trained_parameters / 1e6:.0f} M): fp32, gradient, AdamW",
            adapters,
        ),
        (f"rollout: keys and values of {drawn_together} pictures, guided", cached * 2 * 2 * keys),
        (
            "rollout: logits of the last scale, fp32, three copies",
            2 * drawn_together * last * config.codebook_size * 12,
        ),
    ]
    for scales, cells in ((number, num_cells(grids[number])) for number in grids):
        update = training(tokens=cells + prompt)
        logits = min(cells, 4096) * config.codebook_size * 4 * 3  # of codes alone; done before a layer is recomputed
        held = update.checkpoints + max(update.layer, logits)
        rows.append((f"update, one picture, {scales} scales ({cells} codes)", held))
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
    functions = {"compare": compare, "ceiling": ceiling, "memory": memory, "measure": measure}
    for name, function in functions.items():
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--model", required=True, help="folder or Hub id of a NextFlowPipeline")
        command.add_argument("--output-dir", type=Path, required=True)
    comparison = commands.choices["compare"]
    for name in ("compare", "ceiling"):
        commands.choices[name].add_argument(
            "--transformer", help="checkpoint to start from instead of the model's own transformer"
        )
    commands.choices["ceiling"].add_argument("--num-prompts", type=int, default=48)
    commands.choices["ceiling"].add_argument(
        "--num-prefixes", type=int, default=8, help="of a prompt, and pictures of a prefix"
    )
    comparison.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    comparison.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    training = load_recipe("shapes_grpo")["training"]
    comparison.add_argument("--max-steps", type=int, default=training["max_steps"])
    comparison.add_argument("--num-pictures", type=int, default=training["per_device_train_batch_size"])
    comparison.add_argument("--learning-rate", type=float, default=training["learning_rate"])
    comparison.add_argument("--num-prompts", type=int, default=240, help="held-out ones, of every category")
    comparison.add_argument("--categories", nargs="*", choices=CATEGORIES, help="that are trained and judged")
    commands.choices["measure"].add_argument("--rollouts", type=int, required=True)
    commands.choices["measure"].add_argument("--prefix-scales", type=int)
    return parser


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    arguments.function(arguments)
