"""The pipeline in the browser: generate and edit images, watch them grow, chat.

    nextflow-hf app

Opens at http://127.0.0.1:7860, for this machine only.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands import images, loading, options, records
from ..commands.console import Console, run
from ..commands.options import add_model_options, new_parser


if TYPE_CHECKING:
    import PIL.Image

    from .. import NextFlowPipeline
    from .studio import ImageRequest

EXAMPLE_PROMPTS = 4  # of the model's own
EXAMPLES = """\
  nextflow-hf app
  nextflow-hf app --model path/to/pipeline --device cuda --port 8000
"""


def make_parser() -> argparse.ArgumentParser:
    """The options of `nextflow-hf app`."""
    parser = new_parser("app", "Generate and edit images in the browser, watch them grow, and chat.", EXAMPLES)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s, for this machine only"
    )
    group.add_argument(
        "--port",
        type=options.whole(1, 2**16 - 1),
        help="port to listen on; default: the first free one from 7860 on",
    )
    group.add_argument("--share", action="store_true", help="also serve at a public address, through gradio.app")
    add_model_options(parser)
    # `run` reads both of every command.
    parser.set_defaults(json=False, quiet=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The app, until it is interrupted; returns the exit status."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    return run("app", make_parser().parse_args(argv), open_app)


def open_app(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Load the pipeline and serve the page until it is interrupted."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError('the app needs Gradio: pip install "nextflow-hf[app]"') from error

    from ..commands.demo import read_demo
    from .interface import App
    from .server import serve, warnings_about
    from .studio import Studio

    for warning in warnings_about(args.host, args.share):
        console.warn(f"warning: {warning}")
    pipe = loading.load_pipeline(args)
    demo = read_demo(loading.find_model(args.model))
    examples = {"prompts": demo.get("prompts", ())[:EXAMPLE_PROMPTS], "conversations": demo.get("conversations", ())}
    with tempfile.TemporaryDirectory(prefix="nextflow-app-") as folder:
        name = f"{Path(args.model).name} on {args.device}"
        page = App(Studio(pipe), folder, save=saver(args, pipe), name=name, **examples).build()
        address = serve(page, host=args.host, port=args.port, share=args.share)
        console.show(f"NextFlow is at {address}  (Ctrl-C stops it)")
        page.block_thread()
    return {}


def saver(
    args: argparse.Namespace, pipe: "NextFlowPipeline"
) -> "Callable[[PIL.Image.Image, Path, ImageRequest], None]":
    """Return what saves an image with its record, from which `generate --from-image` or `edit` makes it again."""
    args.no_metadata = False
    modules = loading.image_modules(pipe)
    recorders = {
        command: records.Recorder(command, args, images.RECORDED, modules) for command in ("generate", "edit")
    }

    def save(image: "PIL.Image.Image", path: Path, request: "ImageRequest") -> None:
        own = pipe.get_image_settings()
        settings = {**{name: own[name] for name in options.SAMPLING}, **request.settings}
        recorders["edit" if request.references else "generate"].save(
            image,
            path,
            batch={"seeds": [request.seed], "index": 0},
            **settings,
            prompt=request.prompt,
            seed=request.seed,
            image=[Path(reference) for reference in request.references] or None,
        )

    return save


if __name__ == "__main__":
    sys.exit(main())
