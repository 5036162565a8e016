"""`nextflow-hf evaluate`: a suite of questions to a model, with a report; an interrupted run goes on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import one_line_mistakes
from .loading import load_pipeline
from .options import add_model_options, new_parser, whole
from .train import leave_processes


if TYPE_CHECKING:
    from ..pipelines.pipeline_nextflow import NextFlowPipeline
    from ..training.evaluation.runner import EvaluationRun
    from ..training.evaluation.suite import Suite

EXAMPLES = """
  nextflow-hf evaluate nextflow_hf.worlds.shapes:suite nextflow-shapes count=20
  nextflow-hf evaluate my_module:suite runs/mine/pipeline --output-dir evaluations/mine --set guidance_scale=3
  nextflow-hf evaluate geneval2 runs/mine/pipeline --prompts GenEval2 --judge Qwen/Qwen3-VL-8B-Instruct
  nextflow-hf evaluate gedit runs/mine/pipeline --judge http://localhost:8000/v1 --judge-model Qwen2.5-VL-72B-Instruct
  nextflow-hf evaluate reconstruction runs/mine/pipeline data=path/to/images
  nextflow-hf evaluate understanding runs/mine/pipeline tasks=[mme,mmmu_val]
  nextflow-hf evaluate card runs/mine/pipeline
  torchrun --nproc_per_node 8 -m nextflow_hf.cli evaluate emoji runs/mine/pipeline --generate-only
"""
# Arguments of the suites that are options of their own; the second decide the scores, and no answer.
PROMPTS, SCORING = ("prompts",), ("judge", "judge_model", "judge_prompts", "results")
# What else decides the answers.
WEIGHTS = ("transformer", "vision_tokenizer", "lora", "dtype", "quantize", "revision")
ACTIONS = {
    "understanding": "lmms-eval's tasks, with the model `nextflow`",
    "card": "one page of all evaluations of MODEL, and its model-index",
}


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("evaluate", "Ask a model what a suite asks, and score its answers.", EXAMPLES)
    parser.add_argument("suite", nargs="?", help="short name (--list), or my_module:function")
    parser.add_argument("model", nargs="?", help="folder or Hub id of a NextFlowPipeline")
    parser.add_argument("options", nargs="*", metavar="key=value", help="arguments of the suite")
    parser.add_argument("--output-dir", type=Path, help="folder of the evaluation; default: evaluations/SUITE/MODEL")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="key=value",
        help="settings of sampling, for every call of the pipeline",
    )
    parser.add_argument(
        "--prompts", metavar="FOLDER", help="prompts of a benchmark: a folder, or a data set on the Hub"
    )
    parser.add_argument(
        "--judge", metavar="URL|MODEL", help="judge by an OpenAI-compatible server, or by a vision language model"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="name of the judge's model on its server")
    parser.add_argument("--judge-prompts", metavar="FOLDER", help="ask the benchmark's own questions instead of ours")
    parser.add_argument(
        "--sheet-samples",
        type=whole(1),
        default=36,
        metavar="N",
        help="how many samples of a group its contact sheet shows; default: %(default)s",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of the sampling; default: %(default)s")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--generate-only", action="store_true", help="write the answers, and score none")
    which.add_argument("--score-only", action="store_true", help="score the answers that are there, and write none")
    which.add_argument("--list", action="store_true", help="list the suites of this package")
    parser.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    add_model_options(parser, names_model=False)
    return parser


@one_line_mistakes("evaluate")
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_intermixed_args(argv)  # key=value anywhere
    args.command = ["nextflow-hf", "evaluate", *argv]
    from ..training.common.recipe import parse_assignments
    from ..training.evaluation.suite import SUITES

    if args.list:
        print("\n".join(f"{name:16} {what}" for name, what in {**SUITES, **ACTIONS}.items()))
        return 0
    if args.suite is None or args.model is None:
        raise ValueError("SUITE and MODEL are missing, see --help and --list")
    options = parse_assignments(args.options)
    options |= {name: getattr(args, name) for name in (*PROMPTS, *SCORING[:3]) if getattr(args, name) is not None}
    folder = args.output_dir or Path("evaluations", _file_name(args.suite), _file_name(args.model))
    work = {"understanding": _understand, "card": _write_card}.get(args.suite, _evaluate)
    for file in work(args, options, folder):
        print(file)
    return 0


def _evaluate(args: argparse.Namespace, options: dict[str, Any], folder: Path) -> list[Path]:
    from ..training.common.recipe import parse_assignments
    from ..training.evaluation.benchmark import Benchmark
    from ..training.evaluation.report import write_report
    from ..training.evaluation.runner import EvaluationRun
    from ..training.evaluation.suite import make_suite

    suite = make_suite(args.suite, options)
    if isinstance(suite, Benchmark) and not args.generate_only:
        suite.check_judge()
    scoring = {name: options.pop(name) for name in SCORING if name in options}
    description = {
        "suite": args.suite,
        "model": args.model,
        "options": options,
        "settings": parse_assignments(args.set),
        "seed": args.seed,
        **{name: getattr(args, name) for name in WEIGHTS if getattr(args, name)},
    }
    run = EvaluationRun(suite, folder, description)
    if not args.score_only:
        _generate(run, args)
    files = [suite.lay_out(run)] if isinstance(suite, Benchmark) and run.state.is_main_process else []
    if not args.generate_only:
        run.score(scoring, _judged_by(suite))
        if run.state.is_main_process:
            _, written = write_report(run, description, args.command, args.sheet_samples)
            print(written[1].read_text(encoding="utf-8"))
            files += written
    leave_processes()
    return files


def _generate(run: "EvaluationRun", args: argparse.Namespace) -> None:
    from ..training.evaluation.answering import answer_sample
    from ..training.evaluation.report import ORIGIN
    from .loading import environment
    from .measuring import peak_memory, reset_peak_memory

    if args.device is None and run.state.num_processes > 1:
        args.device = str(run.state.device)
    pipe = load_pipeline(args, without=getattr(run.suite, "without", ()))
    pipe.set_progress_bar_config(disable=True)
    device = pipe._execution_device
    reset_peak_memory(device)
    # A model of the same name may have been trained on: its answers are not mixed with older ones.
    origin = _origin(pipe, run.settings.get("decoder"))
    origin = {"command": args.command, **origin, "environment": environment()}
    run.claim(ORIGIN, origin, decides=["weights"])
    run.generate(lambda sample, seed: answer_sample(pipe, sample, seed, run.settings), lambda: peak_memory(device)[0])


def _origin(pipe: "NextFlowPipeline", decoder: str | None) -> dict[str, Any]:
    """What the figures are of: the weights, with those of a decoder that is asked for, and the hardware."""
    import torch

    from .loading import image_modules, weights_fingerprint
    from .measuring import peak_memory

    device = pipe._execution_device
    return {
        "weights": {name: weights_fingerprint(module) for name, module in image_modules(pipe, decoder).items()},
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "memory_of": peak_memory(device)[1],
    }


def _judged_by(suite: "Suite") -> dict[str, str]:
    """Hashes of what decides the scores, see [`Suite`]."""
    import hashlib
    import json

    from torch import nn

    from .loading import weights_fingerprint

    def fingerprint(part: Any) -> str:
        if isinstance(part, nn.Module):
            return weights_fingerprint(part)
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]

    return {name: fingerprint(part) for name, part in getattr(suite, "judged_by", {}).items()}


def _understand(args: argparse.Namespace, options: dict[str, Any], folder: Path) -> list[Path]:
    from ..training.evaluation.suite import bind
    from ..training.evaluation.understanding import evaluate_understanding

    if given := [name for name in (*WEIGHTS, "set") if getattr(args, name)]:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"understanding takes no {option}: lmms-eval loads the pipeline {args.model} as it is")
    return bind(
        args.suite, evaluate_understanding, {"model": args.model, "folder": folder, "command": args.command, **options}
    )


def _write_card(args: argparse.Namespace, options: dict[str, Any], folder: Path) -> list[Path]:
    from ..training.evaluation.card import write_card
    from ..training.evaluation.suite import bind

    folders = options.pop("folders", None)
    found = sorted(folder.parent.parent.glob(f"*/{_file_name(args.model)}")) if folders is None else map(Path, folders)
    evaluated = [path for path in found if (path / "report.json").is_file()]
    if options.get("update"):
        _check_weights(args, evaluated)
    return bind(args.suite, write_card, {"model": args.model, "folders": evaluated, "output": folder, **options})


def _check_weights(args: argparse.Namespace, evaluated: Sequence[Path]) -> None:
    """Refuse evaluations of other weights: a model's card has no figures of another one."""
    import json

    reports = {folder: json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in evaluated}
    for dtype in {report.get("dtype") for report in reports.values()}:
        args.dtype = dtype
        weights = _origin(load_pipeline(args), "diffusion")["weights"]
        for folder, report in reports.items():
            measured = report["provenance"].get("weights", {})
            if report.get("dtype") == dtype and not measured.items() <= weights.items():
                raise ValueError(f"{folder} has an evaluation of other weights than {args.model}: evaluate this model")


def _file_name(name: str) -> str:
    """A suite or a model as the name of a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name.strip("./"))


if __name__ == "__main__":
    sys.exit(main())
