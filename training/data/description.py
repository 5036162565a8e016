"""Rows of a description of data: the YAML file that `nextflow-hf extract` reads."""

from dataclasses import fields
from pathlib import Path

from datasets import Dataset as Rows
from torch.utils.data import Dataset

from ..common.recipe import parse_recipe, read_recipe
from .decoder_rows import caption_of
from .messages import BadRowError, open_image
from .mixture import MixtureArguments, load_mixture


def read_description(source: str | Path) -> MixtureArguments:
    """The sources that a file describes."""
    recipe = read_recipe(Path(source))
    for name in set(recipe) - {field.name for field in fields(MixtureArguments)}:  # those of the extraction
        del recipe[name]
    return parse_recipe(recipe, [MixtureArguments])[0]


def load_rows(data: MixtureArguments) -> Rows:
    """The rows of all sources, with `messages` and `images`."""
    return load_mixture(data)


class ImageRows(Dataset):
    """Items `{"image": upright RGB image, "caption": str}` of the rows of [`load_rows`]."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        if row["error"] is not None or not row["images"]:
            raise BadRowError(f"row {row['row_id']} of {row['source']} is bad: {row['error'] or 'it has no image'}")
        return {"image": open_image(row["images"][0], 10**9), "caption": caption_of(row["messages"])}


def load_images(data: MixtureArguments) -> ImageRows:
    return ImageRows(load_rows(data))


__all__ = ["ImageRows", "load_images", "load_rows", "read_description"]
