"""What made an image, inside the image: one JSON object in a text chunk of the PNG, which any tool can read and this
package can repeat.

    nextflow-hf info out.png
    nextflow-hf generate --from-image out.png

Files that went in (source images, masks) are named by path and SHA-256: they are found again, and refused where they
have changed. A record may come from anybody: what it holds is checked against the table of options.py before it is
used, and which model is loaded is for the user to say.
"""

import argparse
import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_file
from ..hub_cards import SHIPPED
from . import loading, options, rules
from .console import Console


if TYPE_CHECKING:
    import PIL.Image
    from torch import nn

    from .. import NextFlowPipeline

CHUNK = "nextflow"  # keyword of the text chunk
FORMAT = 1
# The options that say where weights come from, and those that decide them.
SOURCES = ("model", "transformer", "vision_tokenizer", "revision", "lora")
WEIGHTS = {*SOURCES, "dtype", "quantize"}
MOST_CHARACTERS = 2**20  # of a record
MOST_PIXELS = 2**26  # of an image that is repeated
MOST_BYTES = 2**28  # of a file that went in

ARGUMENTS = {name: option.rule for name, option in options.OPTIONS.items()}
RESULTS = {
    "thought": rules.PROMPT,
    "final_prompt": rules.PROMPT,
    "number": rules.either(rules.NOTHING, rules.integer(0, 4096)),
}
RECORD = {
    "format": rules.integer(1, 1),
    "command": rules.one_of("generate", "edit", "interleave", "frames", "chat", "reconstruct"),
    "weights": rules.mapping(rules.VERSION, 32),
    "environment": rules.mapping(rules.VERSION, 32),
    "batch": rules.either(
        rules.NOTHING, rules.table(seeds=rules.listed(rules.SEED, 4096, 1), index=rules.integer(0, 4095))
    ),
}


@dataclass(kw_only=True)
class ImageRecord:
    """
    What made an image.

    Args:
        command (`str`): The command of `nextflow-hf` that made it.
        arguments (`dict`): Its options, those that the model's defaults settled included. A file is
            `{"path": ..., "sha256": ...}`.
        weights (`dict[str, str]`): Fingerprints of the components that the pixels come from.
        environment (`dict[str, str]`): Versions of the libraries.
        batch (`dict`, *optional*):
            `seeds` of the images that were sampled together, and the `index` of this one: rounding depends on the
            batch.
        results (`dict`, *optional*): What came out beside the pixels, such as the thought before an image.
        format (`int`): Version of the record.
    """

    command: str
    arguments: dict[str, Any]
    weights: dict[str, str]
    environment: dict[str, str]
    batch: dict[str, Any] | None = None
    results: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass
class Recalled:
    """
    An image that is repeated, and its record.

    Args:
        path (`Path`): File of the image.
        record ([`ImageRecord`]): How it was made.
        image (`PIL.Image.Image`): The image, which the output may be about to overwrite.
        given (`set[str]`): Options that were given beside `--from-image`.
        changes (`set[str]`): Those of them that differ from the record.
    """

    path: Path
    record: ImageRecord
    image: "PIL.Image.Image"
    given: set[str]
    changes: set[str]

    def check_weights(self, weights: Mapping[str, str]) -> None:
        """Refuse other weights, unless the options ask for them. The same ones may lie elsewhere by now."""
        others = {name for name, now in weights.items() if now != self.record.weights.get(name, now)}
        if not others:
            self.changes -= {*SOURCES}
        elif not self.given & WEIGHTS:
            model = self.record.arguments.get("model")
            raise ValueError(
                f"the weights of {model} are not those that made {self.path}: the {' and the '.join(sorted(others))} "
                f"changed. Pass --model with the place of the right ones, or `--model {model}` to use these"
            )
        else:
            self.changes.add("weights")

    def compare(self, image: "PIL.Image.Image | None", console: Console) -> bool | None:
        """
        Whether `image` is what it repeats, which is said, with status 1 where it is not. None where it is to be
        another.
        """
        if self.changes:
            return None
        if image is not None and (image.size, image.tobytes()) == (self.image.size, self.image.tobytes()):
            console.say(f"the same as {self.path}, pixel for pixel")
            return True
        now, then = loading.environment(), self.record.environment
        pairs = [(name, then.get(name), now.get(name)) for name in sorted({*now, *then})]
        causes = [f"{name} was {before} and is {after}" for name, before, after in pairs if before != after]
        console.warn(f"not quite the same as {self.path}: {'; '.join(causes) or 'the cause is not known'}")
        console.status = 1
        return False


class Recorder:
    """
    Writes the images of a command, each with its record.

    Args:
        command (`str`): Name of the command.
        args (`argparse.Namespace`): Its options.
        names (`Sequence[str]`): The options that are recorded.
        modules (`dict[str, nn.Module]`): The components that the pixels come from.
    """

    def __init__(
        self, command: str, args: argparse.Namespace, names: Sequence[str], modules: Mapping[str, "nn.Module"]
    ):
        self.command = command
        self.args = args
        self.names = names
        self.weights = {name: loading.weights_fingerprint(module) for name, module in modules.items()}

    def save(
        self,
        image: "PIL.Image.Image",
        path: Path,
        /,
        *,
        batch: dict[str, Any] | None = None,
        results: dict[str, Any] | None = None,
        **values: Any,
    ) -> None:
        """
        `image` as the PNG file `path`, with its record unless `--no-metadata` is given. `values` are those of options
        that were settled later.
        """
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        if not self.args.no_metadata:
            record = ImageRecord(
                command=self.command,
                arguments=given_arguments(argparse.Namespace(**{**vars(self.args), **values}), self.names),
                weights=self.weights,
                environment=loading.environment(),
                batch=batch,
                results=results or {},
            )
            chunks.add_text(CHUNK, json.dumps(asdict(record)))  # ASCII, which every version of the chunk can hold
        write_file(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=chunks))


def begin(
    command: str,
    args: argparse.Namespace,
    recorded: Sequence[str],
    settings: Sequence[str],
    recalled: Recalled | None,
) -> tuple["NextFlowPipeline", Recorder, dict[str, Any]]:
    """
    The pipeline of a command, what writes its images, and the arguments of the pipeline's call: those of the options
    `settings` that are given, and all of sampling, so that the record says it whatever the model's defaults become.
    """
    pipe = loading.load_pipeline(args)
    modules = loading.image_modules(pipe, getattr(args, "decoder", None))
    recorder = Recorder(command, args, recorded, modules)
    if recalled is not None:
        recalled.check_weights(recorder.weights)
    given = {name: getattr(args, name) for name in settings if getattr(args, name, None) is not None}
    own = pipe.get_image_settings(**{name: given.get(name) for name in options.SAMPLING})
    return pipe, recorder, given | {name: own[name] for name in options.SAMPLING}


# --- reading one


def check_record(record: Any) -> None:
    """Raises `ValueError` where `record`, an object of JSON, has what no record has, or lacks what each has."""
    tables = {"arguments": ARGUMENTS, "results": RESULTS}
    if not isinstance(record, dict) or record.keys() != {*RECORD, *tables}:
        raise ValueError(f"it is {reprlib.repr(record)}, expected an object with {sorted({*RECORD, *tables})}")
    rules.check("", {name: value for name, value in record.items() if name not in tables}, RECORD)
    for name, table in tables.items():
        rules.check(f"{name}.", record[name], table)


def read_record(path: Path) -> ImageRecord:
    """The record of a PNG file. `ValueError` where it has none, or one that cannot be used."""
    text = _read_chunk(path)
    if text is None:
        raise ValueError(f"{path} does not say how it was made: another program saved it, without the metadata")
    try:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it has {len(text)} characters, expected at most {MOST_CHARACTERS}")
        values = json.loads(text)
        if isinstance(values, dict) and values.get("format") != FORMAT:
            raise ValueError(f"it has format {values.get('format')!r:.80}, expected {FORMAT}: update nextflow-hf")
        check_record(values)
    except RecursionError:
        raise ValueError(f"the metadata of {path} cannot be used: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"the metadata of {path} cannot be used: {error}") from error
    return ImageRecord(**values)


def _read_chunk(path: Path) -> str | None:
    """The text of a PNG file's record. Pillow refuses chunks that unpack to more than a megabyte."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(CHUNK)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image in PNG format, so it does not say how it was made") from error
    except (ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


# --- files that went in


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> Any:
    """`value` with every `Path` in it, however deep, as the file's path and hash."""
    if isinstance(value, Path):
        return {"path": str(value.resolve()), "sha256": sha256(value)}
    if isinstance(value, dict):
        return {key: to_json(one) for key, one in value.items()}
    return [to_json(one) for one in value] if isinstance(value, (list, tuple)) else value


def from_json(value: Any, image: Path) -> Any:
    """The inverse of [`to_json`], for the record of `image`: every file is found again, as it was."""
    if isinstance(value, dict):
        if value.keys() == {"path", "sha256"}:
            return find_file(value, image)
        return {key: from_json(one, image) for key, one in value.items()}
    return [from_json(one, image) for one in value] if isinstance(value, list) else value


def find_file(entry: dict[str, str], image: Path) -> Path:
    """A file of the record of `image`: where it was, or beside the image under the same name."""
    was = Path(entry["path"])
    places = (was, image.parent / was.name)
    found = {path: sha256(path) for path in places if path.is_file() and 0 < path.stat().st_size <= MOST_BYTES}
    for path, digest in found.items():
        if digest == entry["sha256"]:
            return path
    if found:
        path, digest = next(iter(found.items()))
        raise ValueError(
            f"{path} is not what {image} was made from: its SHA-256 is {digest}, expected {entry['sha256']}. Name the "
            "file that it was, or this one to use it all the same"
        )
    raise ValueError(f"{was}, which {image} was made from, is missing: put it back, or beside {image}, or name it")


# --- options


def given_arguments(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options `names` that are given, as a record has them."""
    return {name: to_json(getattr(args, name)) for name in names if getattr(args, name, None) is not None}


def recall(args: argparse.Namespace, command: str, names: Sequence[str]) -> Recalled | None:
    """Fill the options `names` that are not given with those that made `args.from_image`, if that is given."""
    if args.from_image is None:
        return None
    from ..processing.image_loading_nextflow import load_image

    record = read_record(args.from_image)
    image = load_image(args.from_image, MOST_PIXELS)
    if record.command != command:
        raise ValueError(f"{args.from_image} was made by `nextflow-hf {record.command}`, not by `{command}`")
    if unknown := sorted(set(record.arguments) - set(names)):
        raise ValueError(f"the metadata of {args.from_image} has {unknown}, which this version does not know")
    given = given_arguments(args, names)
    if given.get("model", record.arguments.get("model")) != record.arguments.get("model"):
        record.arguments.pop("revision", None)  # it is one of the recorded model
    _check_sources(record.arguments, given, args)
    changes = {name for name, value in given.items() if not _same(value, record.arguments.get(name))}
    if "lora" in given and _scales(given["lora"]) != _scales(record.arguments.get("lora", [])):
        changes.add("scale of a LoRA")  # the fingerprint is that of its file alone
    dropped = set(options.SIZE) if changes & set(options.SIZE) else set()  # of two sizes, the one that is given
    if "decoder" in changes:
        dropped |= set(options.DECODING)
    for name, value in record.arguments.items():
        if name not in given and name not in dropped:
            setattr(args, name, from_json(value, args.from_image))
    return Recalled(args.from_image, record, image, set(given), changes)


def _check_sources(recorded: Mapping[str, Any], given: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Refuse weights that a record names, wherever they are: they are the user's to choose."""
    named = {name: recorded[name] for name in SOURCES if name in recorded and name not in given}
    if named.get("model") in SHIPPED:
        del named["model"]
    if named and not args.allow_model:
        wanted = "; ".join(f"--{name.replace('_', '-')} {value!r:.200}" for name, value in named.items())
        raise ValueError(
            f"{args.from_image} was made with {wanted}: pass the ones to use, or --allow-model to load what the image "
            "names, if you trust where it is from"
        )


def _scales(loras: Sequence[str]) -> list[str]:
    """The scales of `PATH=SCALE`, as they are written."""
    return [lora.rpartition("=")[2] if "=" in lora else "1" for lora in loras]


def _same(given: Any, recorded: Any) -> bool:
    """Whether two values of an option are one; a file is one wherever it lies."""
    if isinstance(given, dict) and isinstance(recorded, dict) and "sha256" in given:
        return given["sha256"] == recorded.get("sha256")
    if isinstance(given, list) and isinstance(recorded, list):
        return len(given) == len(recorded) and all(map(_same, given, recorded))
    return given == recorded
