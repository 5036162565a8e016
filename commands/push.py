"""`nextflow-hf push`: a folder that `export` or `convert` wrote, as a repository on the Hub."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..training.common.folders import HUB_ID, check_folder, kind_of
from .console import one_line_mistakes
from .options import new_parser


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "push",
        "Upload a folder to the Hub, after a check that it has a card and that its weights are those that its\n"
        "configurations describe. Log in by `hf auth login`, or set HF_TOKEN.",
        "  nextflow-hf push my-model user/my-model --private\n",
    )
    parser.add_argument("folder", type=Path, help="folder to upload, as `nextflow-hf export` writes it")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; created where it does not exist")
    parser.add_argument(
        "--private", action="store_true", help="make the new repository private; an old one that is public is refused"
    )
    return parser


@one_line_mistakes("push")
def main(argv: Sequence[str] | None = None) -> int:
    """Check and upload; returns the exit status."""
    args = make_parser().parse_args(argv)
    if not HUB_ID.fullmatch(args.repo_id):
        raise ValueError(f"REPO_ID is {args.repo_id!r}, expected user/name")
    check_repository(args.folder)

    from ..hub_cards.export import push_folder

    commit = push_folder(args.folder, args.repo_id, private=args.private or None)
    print(f"uploaded: {commit.commit_url}")
    return 0


def check_repository(folder: Path) -> None:
    """Raises `ValueError` where a folder is not whole, or has no card."""
    from ..hub_cards.cards import PLACEHOLDER_OWNER
    from .checkpoint import check_weights

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    check_folder(folder, "pipeline", "vision tokenizer", "adapter")
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no card: README.md is missing. `nextflow-hf export` writes one")
    if kind_of(folder) == "adapter":
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError(f"{folder} lacks adapter_model.safetensors")
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        if str(base).startswith(f"{PLACEHOLDER_OWNER}/"):
            raise ValueError(
                f"{folder} is an adapter of {base}, which is no repository: push its base model, and export it again "
                "with --adapter --model REPO_ID of that"
            )
    else:
        check_weights(folder)
