"""Files and folders that are whole at every moment, whatever kills the process that writes them.

They are written under another name, flushed to the disk and renamed. Knows nothing of what is in them.
"""

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any


# A folder that lacks them does not load: they come last.
_ENTRY_FILES = ("config.json", "adapter_config.json", "preprocessor_config.json", "model_index.json")
# As `save_pretrained` of transformers, PEFT and diffusers names them, in one file or in several with an index.
_WEIGHTS = re.compile(
    r"(model|adapter_model|diffusion_pytorch_model|pytorch_lora_weights)[-.].*safetensors(\.index\.json)?"
)
_STAGING = ".unfinished"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write_file(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """`write(path)` under another name with the same suffix, then renamed: the old file, if any, or the new one."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a pipe, or standard output, has nothing to lose
        write(path)
        return
    # No number of a process: two containers may have the same, and write the same file of a shared folder.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to a file in UTF-8, see [`write_file`]."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` to a file as indented JSON, see [`write_file`]."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def replaced_folder(
    folder: str | os.PathLike,
    *,
    without: Collection[str] = (),
    writes: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """
    An empty folder to write into, which at the end of the context takes the place of `folder` in one step.

    Other entries of `folder` stay, except weights where there are new ones beside them. After an error or a kill,
    `folder` is what it was. Where its files cannot be exchanged in one step (other systems than Linux, network file
    systems, the working directory), new files replace old ones one by one, and the configuration comes last.

    Args:
        folder (`str` or `os.PathLike`): Created where missing.
        without (`Collection[str]`, *optional*): Names of old entries that do not stay.
        writes (`bool`, *optional*, defaults to `True`): Whether this process is the one that creates and moves.
        wait (`Callable`, *optional*): Barrier of all processes that come here.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder")
    # Inside an old folder: its parent may be another file system.
    staging = folder / _STAGING if folder.is_dir() else folder.with_name(f".{folder.name}{_STAGING}")
    wait()
    if writes:
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        staging.mkdir(parents=True)
        if (folder / "README.md").is_file() and "README.md" not in without:  # a card is updated, not written anew
            shutil.copy2(folder / "README.md", staging)
    wait()
    try:
        yield staging
        wait()
        if writes:
            flush_tree(staging)
            _take_place(staging, folder, without)
    finally:
        if writes:
            shutil.rmtree(staging, ignore_errors=True)
    wait()


def _take_place(new: Path, folder: Path, without: Collection[str]) -> None:
    if not folder.exists():
        os.rename(new, folder)
    elif not any((folder / path.name).exists() for path in new.iterdir()) or not _exchange(new, folder, without):
        _merge(new, folder, without)
    flush(folder.parent)


def _exchange(new: Path, folder: Path, without: Collection[str]) -> bool:
    """Whether `new` could be put into the place of `folder` in one step, with what it lacked."""
    if sys.platform != "linux" or Path.cwd().is_relative_to(folder):  # a process would stay in the old one
        return False
    beside = folder.with_name(f".{folder.name}{_STAGING}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        os.rename(new, beside)
    except OSError:  # `folder` is mounted, or its parent is read-only
        return False
    _add_missing(folder, beside, without)
    names = [os.fsencode(path) for path in (beside, folder)]
    if ctypes.CDLL(None).renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        _merge(beside, folder, without)
    shutil.rmtree(beside)
    return True


def _add_missing(old: Path, new: Path, without: Collection[str]) -> None:
    """The other entries of `old` as links in `new`, so that both folders are whole."""
    for path in _staying(old, new, without):
        target = new / path.name
        if path.is_dir() and not path.is_symlink():
            target.mkdir(exist_ok=True)
            _add_missing(path, target, ())
            shutil.copystat(path, target)  # checkpoints are ordered by their times
        elif not target.exists():
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(path, target, follow_symlinks=False)


def _staying(old: Path, new: Path, without: Collection[str]) -> list[Path]:
    has_weights = any(_WEIGHTS.fullmatch(path.name) for path in new.iterdir())
    return [
        path
        for path in old.iterdir()
        if path.name not in without and not (has_weights and _WEIGHTS.fullmatch(path.name))
    ]


def _merge(new: Path, folder: Path, without: Collection[str]) -> None:
    staying = {*_staying(folder, new, without), *(folder / path.name for path in new.iterdir())}
    gone = [path for path in folder.iterdir() if path not in staying and path != new]
    for path in sorted(new.iterdir(), key=lambda path: path.name in _ENTRY_FILES):
        target = folder / path.name
        if path.is_dir() and target.is_dir() and path.name not in without:
            _merge(path, target, ())
        else:
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush_tree(folder: Path) -> None:
    """Wait until a folder, with all files and folders in it, is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["flush", "flush_tree", "replaced_folder", "write_file", "write_json", "write_text"]
