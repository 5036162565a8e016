"""Where images go: names that say what they are, and nothing overwritten that was not named."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import write_file


if TYPE_CHECKING:
    import PIL.Image

SLUG_LENGTH = 48
PREVIEW_FPS = 4
PREVIEW_HOLD = 6  # frames that the last one stays


class Output:
    """
    Paths of the images of one command.

    Args:
        path (`Path`, *optional*): A .png, numbered where there are several images, or a folder. By default names are
            made of prompt and seed, in this folder.
        count (`int`): How many images there will be.
        sources (`Sequence[Path]`): Images that they are made of, which none may overwrite.
    """

    def __init__(self, path: Path | None, *, count: int, sources: Sequence[Path] = ()):
        self.count = count
        self.folder, self.file = Path(), None
        self._given = 0
        if path is None:
            return
        if path.is_dir() or not path.suffix:
            self.folder = folder_for(path, "")
        elif path.suffix.lower() != ".png":
            raise ValueError(f"--output is {path}, expected a .png, which alone holds how it was made, or a folder")
        else:
            self.file = path
            files = {numbered(path, number, count).resolve() for number in range(1, count + 1)}
            if overwritten := [source for source in sources if source.resolve() in files]:
                raise ValueError(
                    f"--output is {path}, which would overwrite the source {overwritten[0]}: name another"
                )

    def path(self, prompt: str | None, seed: int) -> Path:
        """The path of the next image."""
        self._given += 1
        if self.file is not None:
            return numbered(self.file, self._given, self.count)
        return unused(self.folder / f"{slug(prompt)}-{seed}.png")


def slug(text: str | None) -> str:
    """A file's name of a text."""
    words = re.sub(r"[^\w]+", "-", text or "", flags=re.UNICODE).strip("-_").lower()
    return words[:SLUG_LENGTH].rstrip("-") or "image"


def unused(path: Path) -> Path:
    """`path`, or where that exists `path-2`, `path-3`, ..."""
    free, number = path, 2
    while free.exists():
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return free


def numbered(path: Path, number: int, count: int) -> Path:
    """`path` for the only one, `path-1`, `path-2`, ... for several."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{str(number).zfill(len(str(count)))}{path.suffix}")


def check_video(path: Path) -> None:
    """Raises `ImportError` where `path` is an .mp4, and nothing here writes one."""
    if path.suffix.lower() == ".mp4":
        from ..pipelines.outputs_nextflow import check_video_writer

        check_video_writer()


def preview_path(path: Path, number: int = 1, count: int = 1) -> Path:
    """Where the preview of image `number` of `count` goes; raises `ValueError` for other formats."""
    if path.suffix.lower() not in (".gif", ".mp4", ".png"):
        raise ValueError(f"--preview is {path}, expected a .gif, a .mp4 or, for all scales side by side, a .png")
    check_video(path)
    return numbered(path, number, count)


def save_preview(images: list["PIL.Image.Image"], path: Path) -> Path:
    """An image as it grew: scale after scale, or side by side."""
    from ..pipelines import NextFlowFramesOutput, save_strip

    if path.suffix.lower() == ".png":
        write_file(path, lambda temporary: save_strip(images, temporary))
    else:
        frames = NextFlowFramesOutput([*images, *images[-1:] * PREVIEW_HOLD])
        write_file(path, lambda temporary: frames.save(temporary, fps=PREVIEW_FPS))
    return path


def folder_for(path: Path | None, name: str) -> Path:
    """A folder for several files: `path`, or a new one of that name here."""
    if path is not None:
        if path.is_file():
            raise NotADirectoryError(f"--output is the file {path}, expected a folder")
        return path
    return unused(Path(name))
