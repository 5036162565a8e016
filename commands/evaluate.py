"""`nextflow-hf evaluate`: a suite of questions to a model, with a report; an interrupted run goes on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import one_line_mistakes
from .loading import load_pipeline
from .options import add_model_options, new_parser


EXAMPLES = """
  nextflow-hf evaluate nextflow_hf.worlds.shapes:suite nextflow-shapes count=20
  nextflow-hf evaluate my_module:suite runs/mine/pipeline --output-dir evaluations/mine --set guidance_scale=3
  nextflow-hf evaluate reconstruction runs/mine/pipeline data=path/to/images
  torchrun --nproc_per_node 8 -m nextflow_hf.cli evaluate emoji runs/mine/pipeline --generate-only
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("evaluate", "Ask a model what a suite asks, and score its answers.", EXAMPLES)
    parser.add_argument("suite", nargs="?", help="short name (--list), or my_module:function")
    parser.add_argument("model", nargs="?", help="folder or Hub id of a NextFlowPipeline")
    parser.add_argument("options", nargs="*", metavar="key=value", help="arguments of the suite")
    parser.add_argument("--output-dir", type=Path, help="default: evaluations/SUITE/MODEL")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="how to sample, in every call")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--generate-only", action="store_true", help="only the answers: they can be scored elsewhere")
    which.add_argument("--score-only", action="store_true", help="only the scores of the answers that are there")
    which.add_argument("--list", action="store_true", help="the suites of this package")
    parser.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    add_model_options(parser, names_model=False)
    return parser


def parse_values(assignments: Sequence[str]) -> dict[str, Any]:
    """`key=value` as a recipe reads them: values are YAML."""
    import yaml

    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"got {assignment!r}, expected key=value")
        found[key] = yaml.safe_load(value)
    return found


@one_line_mistakes("evaluate")
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    args = make_parser().parse_args(argv)
    from ..training.evaluation.suite import SUITES, make_suite

    if args.list:
        print("\n".join(f"{name:16} {path}" for name, path in SUITES.items()))
        return 0
    if args.suite is None or args.model is None:
        raise ValueError("SUITE and MODEL are missing, see --help and --list")
    options, settings = parse_values(args.options), parse_values(args.set)
    suite = make_suite(args.suite, options)
    named = args.model
    folder = args.output_dir or Path("evaluations", _file_name(args.suite), _file_name(named))

    from ..training.evaluation.report import write_report
    from ..training.evaluation.runner import EvaluationRun

    weights = {
        name: getattr(args, name)
        for name in ("transformer", "vision_tokenizer", "lora", "dtype")
        if getattr(args, name, None)
    }
    description = {
        "suite": args.suite,
        "model": named,
        "options": options,
        "settings": settings,
        "seed": args.seed,
        **weights,
    }
    run = EvaluationRun(suite, folder, description)
    if not args.score_only:
        from ..training.evaluation.answering import answer_sample

        if args.device is None and run.state.num_processes > 1:
            args.device = str(run.state.device)
        pipe = load_pipeline(args)
        pipe.set_progress_bar_config(disable=True)
        run.generate(lambda sample, seed: answer_sample(pipe, sample, seed, settings))
    if not args.generate_only:
        run.score()
        if run.state.is_main_process:
            summary, files = write_report(run, description)
            print(files[1].read_text(encoding="utf-8"))
            print("\n".join(map(str, files)))
    return 0


def _file_name(name: str) -> str:
    """A suite or a model as the name of a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name.strip("./"))


if __name__ == "__main__":
    sys.exit(main())
