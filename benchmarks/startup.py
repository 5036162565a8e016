"""Seconds of `nextflow-hf generate` up to one sampled and saved scale, beside what it cannot do without.

That is importing transformers and diffusers, and reading the weights.

    python benchmarks/startup.py [--model FOLDER] [--repeats 3]

Prints the fastest of several processes, by the clock and by the processor, which other work disturbs less.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nextflow_hf.hub_cards import shapes_model_path


LIBRARIES = """
from diffusers import DiffusionPipeline
import transformers
from pathlib import Path
from safetensors.torch import load_file
weights = [load_file(path) for path in Path({model!r}).rglob("*.safetensors")]
"""
GENERATE = ["-m", "nextflow_hf.cli", "generate", "a red circle", "--num-scales", "1", "--seed", "0", "--quiet"]


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Of one process of Python: by the clock, and of the processor."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start, before = time.perf_counter(), used()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start, used() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a pipeline; default: the Shapes model")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each; default: %(default)s")
    args = parser.parse_args()
    model = str((args.model or shapes_model_path()).resolve())
    with tempfile.TemporaryDirectory() as folder:
        generate = [*GENERATE, "--model", model, "--output", str(Path(folder, "image.png"))]
        pairs = [(seconds(["-c", LIBRARIES.format(model=model)]), seconds(generate)) for _ in range(args.repeats)]
    for index, name in enumerate(("clock", "processor")):
        libraries, whole = (min(pair[which][index] for pair in pairs) for which in (0, 1))
        print(
            f"{name:9}  libraries and weights {libraries:.2f} s, generate {whole:.2f} s, ratio {whole / libraries:.2f}"
        )


if __name__ == "__main__":
    main()
