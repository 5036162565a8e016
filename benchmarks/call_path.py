"""How far a prompt travels: the functions of this package that `pipe("a red circle")` runs, and the files they are in.

    python benchmarks/call_path.py [--list | --show]

Prints the distinct functions, their files, the consecutive calls whose file differs, and the deepest stack of this
package's own frames. Loading is not counted; one call warms up before.
"""

import argparse
import functools
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import torch

import nextflow_hf
from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path


PACKAGE = str(Path(nextflow_hf.__file__).parent)
UNNAMED = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>")


@functools.cache
def is_ours(file: str) -> bool:
    """Whether a file is of this package, and not of an environment that lies in its folder."""
    return file.startswith(PACKAGE) and "site-packages" not in file.removeprefix(PACKAGE)


class CallPath:
    """A profile function: counts the calls of named functions of this package."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []  # (file, function), in order
        self.depths: list[int] = []  # of the stack at each of them
        self.depth = self.deepest = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or code.co_name in UNNAMED or not is_ours(code.co_filename):
            return
        if event == "call":
            self.calls.append((code.co_filename, code.co_qualname))
        self.depth += 1 if event == "call" else -1
        if event == "call":
            self.depths.append(self.depth)
        self.deepest = max(self.deepest, self.depth)

    def counts(self) -> dict[str, int]:
        files = [file for file, _ in self.calls]
        changes = sum(before != after for before, after in zip(files, files[1:], strict=False))
        found = {"functions": len(set(self.calls)), "files": len(set(files)), "changes of file": changes}
        return {**found, "depth": self.deepest}


def trace() -> CallPath:
    """The path of one prompt, with the model that ships."""
    pipe = NextFlowPipeline.from_pretrained(shapes_model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe("a red circle", generator=torch.Generator().manual_seed(0))
    path = CallPath()
    sys.setprofile(path)
    try:
        pipe("a red circle", generator=torch.Generator().manual_seed(0))
    finally:
        sys.setprofile(None)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every function with its number of calls")
    parser.add_argument("--show", action="store_true", help="print every call in order, indented by its depth")
    args = parser.parse_args()
    path = trace()
    print(", ".join(f"{name} {count}" for name, count in path.counts().items()))
    if args.show:
        files = [None, *(file for file, _ in path.calls)]
        for (file, function), before, depth in zip(path.calls, files, path.depths, strict=False):
            print(f"{'' if file == before else Path(file).stem:40}{'  ' * depth}{function}")
    if args.list:
        for (file, function), count in Counter(path.calls).items():
            print(f"{count:5}  {Path(file).relative_to(PACKAGE)}  {function}")


if __name__ == "__main__":
    main()
