"""Model cards, the export to the Hub, and the small models that ship with the package."""

from importlib.resources import files
from pathlib import Path


SHIPPED = ("nextflow-shapes", "nextflow-emoji")  # the first is what commands load by default


def shipped_model_path(name: str) -> Path:
    """
    Folder of a model that ships with the package, laid out as a Hub repository: what every `from_pretrained` takes.

    Args:
        name (`str`): One of [`SHIPPED`].

    Raises:
        FileNotFoundError: The installation has no such model.
    """
    path = _path(name)
    if not _is_there(path):
        raise FileNotFoundError(
            f"no {name} at {path}: this installation comes without it. Name another model, or train one by "
            f"`make -C examples/{name.removeprefix('nextflow-')}`"
        )
    return path


def shapes_model_path() -> Path:
    """Folder of the shipped Shapes model, see [`shipped_model_path`]."""
    return shipped_model_path("nextflow-shapes")


def emoji_model_path() -> Path:
    """Folder of the shipped Emoji model, see [`shipped_model_path`]."""
    return shipped_model_path("nextflow-emoji")


def installed_models() -> list[str]:
    """Those of [`SHIPPED`] that this installation has."""
    return [name for name in SHIPPED if _is_there(_path(name))]


def _path(name: str) -> Path:
    # `Path(...)`: the loaders want files on disk, so an installation inside a zip archive counts as having none.
    return Path(str(files(__name__) / name))


def _is_there(path: Path) -> bool:
    return (path / "model_index.json").is_file()
