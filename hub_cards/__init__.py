"""Model cards, the export to the Hub, and the small model that ships with the package."""

from importlib.resources import files
from pathlib import Path


def shapes_model_path() -> Path:
    """
    Folder of the shipped Shapes model, laid out as a Hub repository: what every `from_pretrained` takes.

    Raises:
        FileNotFoundError: The installation has no such model.
    """
    # `Path(...)`: the loaders want files on disk, so an installation inside a zip archive counts as having none.
    path = Path(str(files(__name__) / "nextflow-shapes"))
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no Shapes model at {path}: this installation comes without it. Name another model, or train one by "
            "`make -C examples/shapes`"
        )
    return path
