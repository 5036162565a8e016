"""An edition of EditCanvas in a world's images: held-out edits and subjects in the format of `evaluate edit_canvas`.

    python -m nextflow_hf.worlds.edit_canvas emoji data/emoji --output-dir edit_canvas_emoji --count 20

It covers the tasks of the paper's taxonomy that a world knows. `metadata.jsonl` has a row for each sample: `images`,
`task`, `instruction`, and `target`, one right answer, which the suite does not need.
"""

import argparse
import importlib
import json
from pathlib import Path
from random import Random

from PIL import Image

from ..atomic import write_file, write_text
from .edits import sample_edit, sample_subject
from .sampling import Context, is_held_out
from .scene import Canvas, Scene, canvases, render
from .sprites import Sprites


# Kind of a world's edit -> the task of the taxonomy that it is.
TASKS = {
    "add": "Edit/local_edit/object_add",
    "remove": "Edit/local_edit/object_remove",
    "replace": "Edit/local_edit/object_replace",
    "move": "Edit/local_edit/object_position",
    "swap": "Edit/local_edit/object_position",
    "resize": "Edit/local_edit/object_size",
    "style": "Edit/local_edit/object_texture",
    "tone": "Edit/local_edit/object_color",
    "background": "Edit/global_edit/background",
    "count": "SubjectDrivenGeneration/common_object/object_quantity",
    "subject": "SubjectDrivenGeneration/common_object/object_place",
}


def write_edition(sprites: Sprites, folder: Path, sizes: list[Canvas], *, count: int = 20, seed: int = 0) -> Path:
    """
    Writes `count` samples of each kind that the world knows; the `metadata.jsonl`.

    Args:
        sprites ([`Sprites`]): Sprites of the world.
        folder (`Path`): Gets `images/`, `targets/` and `metadata.jsonl`.
        sizes (`list[tuple[int, int]]`): Heights and widths of the images.
        count (`int`, *optional*, defaults to 20): Samples of each kind.
        seed (`int`, *optional*, defaults to 0): Seed of everything.
    """
    rows = []
    for kind in (*(kind for kind in TASKS if kind in sprites.dialect.edits), "subject"):
        for number in range(count):
            rng = Random(f"edit canvas/{seed}/{kind}/{number}")
            canvas = rng.choice(sizes)
            instruction, sources, target = _sample(Context(sprites, rng, canvas), kind)
            names = [f"images/{len(rows):05d}-{index}.png" for index in range(len(sources))]
            row = {"images": names, "task": TASKS[kind], "instruction": instruction}
            row["target"] = f"targets/{len(rows):05d}.png"
            for name, scene in zip([*names, row["target"]], [*sources, target], strict=True):
                write_file(folder / name, Image.fromarray(render(scene, sprites, canvas)).save)
            rows.append(row)
    write_text(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    return folder / "metadata.jsonl"


def _sample(context: Context, kind: str) -> tuple[str, tuple[Scene, ...], Scene]:
    """An instruction, its sources and its target, a held-out scene that no training saw."""
    while True:
        if kind == "subject":
            subject = sample_subject(context)
            instruction, sources, target = subject.instruction, subject.sources, subject.target
        else:
            edit = sample_edit(context, kind)
            instruction, sources, target = edit.instruction, (edit.source,), edit.target
        if is_held_out(json.dumps(target.to_json())):
            return instruction, sources, target


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("world", choices=("emoji", "shapes"))
    parser.add_argument("data", type=Path, help="folder of the world's data: its rasters")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20, help="samples of each kind of edit (20)")
    parser.add_argument("--resolution", type=int, default=64, help="side of a square image (64)")
    parser.add_argument("--concepts", type=int, help="the first N of the world's list")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world = importlib.import_module(f"{__package__}.{args.world}")
    sprites = world.load(args.data, concepts=args.concepts)
    sizes = canvases(args.resolution, ratios=sprites.dialect.ratios)
    print(write_edition(sprites, args.output_dir, sizes, count=args.count, seed=args.seed))


if __name__ == "__main__":
    main()
