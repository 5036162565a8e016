"""What shows a model of a world: requests that no training saw, sampled and not picked, and a list of all it can know.

`demo.json` is what `nextflow-hf demo` and the app read (commands/demo.py); `concepts.txt` is for people.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..atomic import write_text
from .dataset import sample_row, shares, test_splits
from .sprites import Sprites


PROMPTS = {"test": 8, "held_out": 4}  # of each split
EDITS, STORIES = 4, 2


def write_demo(
    sprites: Sprites,
    folder: Path,
    resolution: int,
    *,
    tasks: Collection[str] | None = None,
    categories: Collection[str] | None = None,
    seed: int = 0,
) -> list[Path]:
    """
    Writes `demo.json` and `concepts.txt`; their paths.

    Args:
        sprites ([`Sprites`]): Sprites of the world, of the concepts that the model was trained on.
        folder (`Path`): Folder of the model.
        resolution (`int`): Side of its images, which are square.
        tasks (`Collection[str]`, *optional*): Those that the model was trained for; all of the world by default.
        categories (`Collection[str]`, *optional*): Ask only for images of these categories, such as "single".
        seed (`int`, *optional*, defaults to 0): Seed of the requests.
    """
    tasks = shares(sprites) if tasks is None else tasks

    def sample(task: str, number: int, split: str = "test", **options: Any):
        key = f"{seed}/demo/{number}"
        return sample_row(sprites, task, key, [(resolution, resolution)], split=split, people=False, **options)

    prompts = [
        sample("text_to_image", number, split, categories=categories)[0].columns["text"]
        for split in test_splits(sprites)
        for number in range(PROMPTS[split])
    ]
    demo: dict[str, list] = {"prompts": prompts}
    if "edit" in tasks:  # each of an image that the model makes itself
        rows = [sample("edit", number) for number in range(EDITS)]
        demo["edits"] = [[len(prompts) + number, row.columns["instruction"]] for number, (row, _) in enumerate(rows)]
        prompts += [context.say.describe(row.scenes[0], context.canvas) for row, context in rows]
    if "story" in tasks:
        told = [sample("story", number)[0].columns["messages"] for number in range(STORIES)]
        demo["stories"] = [messages[0]["content"][0]["text"] for messages in told]
    if "questions" in tasks:
        asked = sample("questions", 0)[0].columns["conversations"][0]["value"]
        demo["conversations"] = [prompts[0], *demo.get("stories", [])[:1], asked.removeprefix("<image>\n")]
    files = [folder / "demo.json", folder / "concepts.txt"]
    write_text(files[0], json.dumps(demo, indent=2) + "\n")
    write_text(files[1], list_concepts(sprites))
    return files


def list_concepts(sprites: Sprites) -> str:
    """A line for each concept with its styles; one in brackets is held out with this concept."""
    lines, pairs = [], 0
    for concept, styles in sprites.styles_of.items():
        pairs += len(styles)
        said = [f"[{style}]" if (concept, style) in sprites.held_out else style for style in styles]
        lines.append(f"{concept}: {', '.join(said)}")
    heading = (
        f"# {len(lines)} concepts in {pairs} pairs with a style; no training saw the {len(sprites.held_out)} in []"
    )
    return "\n".join([heading, *lines]) + "\n"
