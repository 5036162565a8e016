"""OpenAI's API on a model: images, edits, conversations.

nextflow-hf serve                          # the shipped model, at http://127.0.0.1:8000/v1
nextflow-hf serve path/to/pipeline --host 0.0.0.0 --port 8000    # with NEXTFLOW_API_KEY in the environment
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..serving.addresses import is_loopback
from . import loading
from .console import Console, run
from .options import SHIPPED_MODEL, add_model_options, new_parser, whole


API_KEY = "NEXTFLOW_API_KEY"
DRAIN_SECONDS = 60
MAX_WAIT_MS = 60_000
EXAMPLES = """\
  nextflow-hf serve
  NEXTFLOW_API_KEY=secret nextflow-hf serve path/to/pipeline --host 0.0.0.0 --device cuda
  curl http://127.0.0.1:8000/v1/images/generations -H "Content-Type: application/json" \\
    -d '{"prompt": "a red circle", "seed": 1}'
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("serve", "OpenAI's API: images, edits, conversations, streamed scale by scale.", EXAMPLES)
    parser.add_argument("model", nargs="?", help=f"folder or Hub id; default: {SHIPPED_MODEL}, shipped")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s, for this machine only"
    )
    group.add_argument(
        "--port", type=whole(1, 2**16 - 1), default=8000, help="port to listen on; default: %(default)s"
    )
    group.add_argument("--api-key", help=f"key that clients have to send; default: {API_KEY} of the environment")
    group.add_argument("--served-name", help="name of the model for clients; default: the folder's name or the Hub id")
    group.add_argument(
        "--max-queue", type=whole(), default=64, metavar="N", help="most requests that wait; default: %(default)s"
    )
    group.add_argument(
        "--max-batch",
        type=whole(),
        default=8,
        metavar="N",
        help="most images of several requests sampled at once; default: %(default)s",
    )
    group.add_argument(
        "--max-wait-ms",
        type=float,
        default=10,
        metavar="MS",
        help="time that a request waits for others; default: %(default)s",
    )
    group.add_argument(
        "--max-images", type=whole(), default=10, metavar="N", help="most images of a request; default: %(default)s"
    )
    group.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="seconds for a request; default: %(default)s"
    )
    add_model_options(parser, names_model=False)
    parser.set_defaults(json=False, quiet=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The server, until it is terminated; returns the exit status."""
    return run("serve", make_parser().parse_args(argv), serve)


def serve(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Serve until a signal ends it; returns what `--json` prints."""
    args.api_key = args.api_key or os.environ.get(API_KEY)
    if args.api_key is None and not is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} lets in everyone who reaches this machine: pass --api-key, or set {API_KEY}"
        )
    app = load_app(args)
    host = f"[{args.host}]" if ":" in args.host else args.host
    console.show(f"{app.state.name} on {args.device} is at http://{host}:{args.port}/v1  (Ctrl-C stops it)")
    app.state.run(host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=DRAIN_SECONDS)
    app.state.worker.stop()  # after a second Ctrl-C it may still sample, and Python would abort in its midst
    cut = app.state.metrics.num_unanswered
    console.say(f"stopped, with {'all' if cut == 0 else f'all but {cut}'} requests answered")
    return {}


def load_app(args: argparse.Namespace) -> Any:
    """The application of `args`, with its model loaded; `app.state.run` serves it."""
    try:
        import uvicorn

        from ..serving.app import make_app
        from ..serving.protocol import Limits
    except ModuleNotFoundError as error:
        raise ImportError(f'the server needs {error.name}: pip install "nextflow-hf[serve]"') from error
    if not args.timeout >= 1:
        raise ValueError(f"--timeout is {args.timeout}, expected at least 1")
    if not 0 <= args.max_wait_ms <= MAX_WAIT_MS:
        raise ValueError(f"--max-wait-ms is {args.max_wait_ms}, expected 0 to {MAX_WAIT_MS}")
    app = make_app(
        loading.load_pipeline(args),
        name=args.served_name or served_name(args.model),
        api_key=args.api_key,
        limits=Limits(images=args.max_images),
        seconds=args.timeout,
        max_queue=args.max_queue,
        max_batch=args.max_batch,
        max_wait=args.max_wait_ms / 1000,
        decodes_beside=not args.offload,
    )
    app.state.run = functools.partial(uvicorn.run, app)
    return app


def served_name(model: str) -> str:
    """What clients call a model: never a path of this machine."""
    return Path(model).name if Path(model).is_dir() else model


if __name__ == "__main__":
    sys.exit(main())
