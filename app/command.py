"""The pipeline in the browser: draw, edit, watch images grow, talk.

    nextflow-hf app

Opens at http://127.0.0.1:7860, for this machine only.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence


# For the shipped model.
TALKS = (
    "a red circle left of a blue square",
    "a story: a red circle on a white background moves from left to right",
    "what color is the background",
)
MISTAKE = 2  # exit status, as argparse's


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nextflow-hf app", description="Draw, edit and talk in the browser.")
    parser.add_argument("--model", help="folder or Hub id of a NextFlowPipeline; default: the shipped Shapes model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; default: the accelerator, where there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; default: float32 on a CPU, else bfloat16",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, for this machine only")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also at a public address, through gradio.app")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The app, until it is interrupted; returns the exit status."""
    args = make_parser().parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        _run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"nextflow-hf app: {error}", file=sys.stderr)
        return MISTAKE
    return 0


def _run(args: argparse.Namespace) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError('the app needs Gradio: pip install "nextflow-hf[app]"') from error
    import torch

    from nextflow_hf import NextFlowPipeline
    from nextflow_hf.app.interface import App
    from nextflow_hf.app.server import serve, warnings_about
    from nextflow_hf.app.studio import Studio
    from nextflow_hf.hub_cards import shapes_model_path
    from nextflow_hf.hub_cards.demo import PROMPTS

    for warning in warnings_about(args.host, args.share):
        print(f"nextflow-hf app: warning: {warning}", file=sys.stderr)
    try:
        model = args.model or shapes_model_path()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}\nThis installation comes without the model: train one "
            "(`python -m nextflow_hf.training.train_shapes`), or pass --model."
        ) from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = args.device or ("cpu" if accelerator is None else accelerator.type)
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    pipe = NextFlowPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
    examples = {} if args.model else {"prompts": PROMPTS[:4], "talks": TALKS}
    with tempfile.TemporaryDirectory(prefix="nextflow-app-") as folder:
        name = f"{os.path.basename(os.path.normpath(model))} on {device}"
        page = App(Studio(pipe), folder, name=name, **examples).build()
        address = serve(page, host=args.host, port=args.port, share=args.share)
        print(f"NextFlow is at {address}  (Ctrl-C stops it)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    sys.exit(main())
