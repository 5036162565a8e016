"""What a folder holds, the command that makes a pipeline of it, and the runs of training among them.

Reads configurations alone; weights and torch stay where they are.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


RUN_FILE = "run.yaml"
STAGES_FILE = "stages.json"  # of an exported folder: the trainings that its card lists
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PROCESSOR_FILE = "processor_config.json"
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "diffusion_pytorch_model*", "pytorch_lora_weights*")
# By `model_type`.
MODELS = {"nextflow": "transformer", "nextflow_vision_tokenizer": "vision tokenizer"}
# What `nextflow-hf train` was told -> what the run is of.
TRAININGS = {"tokenizer": "vision tokenizer", "decoder": "diffusion decoder", "grpo": "transformer"}
EXPORT = "`nextflow-hf export {folder} --output FOLDER` makes a pipeline of it"
VISION_TOKENIZERS = ("vision tokenizer", "run of a vision tokenizer")
PROCESSORS = ("processor", "run of a text tokenizer")
TRANSFORMERS = ("transformer", "adapter", "run of a transformer", "run of an adapter")
# What a folder is -> the command that makes a pipeline of it, or that takes it.
COMMANDS = {
    "pipeline": "--model takes it, and `nextflow-hf push {folder} REPO_ID` uploads it",
    "run of a transformer": EXPORT + "; beside --model, --transformer {folder} takes it",
    "run of an adapter": EXPORT + "; beside --model, --lora {folder} takes it",
    "run of a vision tokenizer": EXPORT + "; beside --model, --vision-tokenizer {folder} takes it",
    "run of a diffusion decoder": EXPORT,
    "run of a teacher": "`nextflow-hf train tokenizer RECIPE semantic_teacher={folder}` uses it",
    "run of a text tokenizer": "`nextflow-hf train transformer RECIPE processor_name_or_path={folder}` uses it",
    "unfinished run": "`nextflow-hf export {folder} --checkpoint STEP --output FOLDER` makes a pipeline of one",
    "transformer": EXPORT + "; beside --model, --transformer {folder} takes it",
    "adapter": EXPORT + "; beside --model, --lora {folder} takes it",
    "diffusion decoder": EXPORT,
    "vision tokenizer": "`nextflow-hf convert qwen QWEN FOLDER --vision-tokenizer {folder}` puts it into a pipeline",
    "processor": "`nextflow-hf train transformer RECIPE processor_name_or_path={folder}` uses it",
    "Qwen checkpoint": "`nextflow-hf convert qwen {folder} FOLDER --vision-tokenizer PATH` makes a pipeline of it",
    "data set of codes": "`nextflow-hf train transformer RECIPE train_codes=[{folder}]` trains on it",
    None: "`nextflow-hf convert` and `nextflow-hf export` write pipelines",
}


def kind_of(folder: Path) -> str | None:
    """What `folder` holds: a key of [`COMMANDS`], or the class of something else."""
    if (folder / "model_index.json").is_file():
        name = _read_json(folder / "model_index.json").get("_class_name")
        name = name[-1] if isinstance(name, list) else name
        return "pipeline" if name == "NextFlowPipeline" else name
    kind = _kind_of_result(folder)
    if not (folder / RUN_FILE).is_file() and not checkpoints(folder):
        return kind
    if kind is None and checkpoints(folder):
        return "unfinished run"
    training = _notes(folder).get("kind") or kind
    name = "adapter" if kind == "adapter" else TRAININGS.get(training, str(training).replace("_", " "))
    return f"run of {_article(name)} {name}"


def without_folders(text: str) -> str:
    """Text, such as a word of a command, in which absolute paths are names alone: for what leaves this machine."""
    return re.sub(r"(?<![\w./:])/(?:[^/,\[\]{}]+/)*", "", text)


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _kind_of_result(folder: Path) -> str | None:
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return "diffusion decoder"
    if (folder / "manifest.json").is_file():
        return "data set of codes"
    if not (folder / "config.json").is_file():
        return "processor" if (folder / PROCESSOR_FILE).is_file() else None
    config = _read_json(folder / "config.json")
    if config.get("_class_name") == "NextFlowDiffusionDecoder":
        return "diffusion decoder"
    model_type = str(config.get("model_type") or config.get("_class_name"))
    return "Qwen checkpoint" if model_type.startswith("qwen") else MODELS.get(model_type, model_type)


def check_folder(folder: str | Path, expected: str, *others: str) -> None:
    """
    Raises `ValueError` where a folder holds neither `expected` nor any of `others`, keys of [`COMMANDS`], and says
    which command makes a pipeline of it or uses it. What is no folder is left to the loader: a file or a Hub id.
    """
    folder = Path(folder)
    kind = kind_of(folder) if folder.is_dir() else expected
    if kind not in (expected, *others):
        found = f"is {_article(kind)} {kind}" if kind else f"holds no model: {folder / 'model_index.json'} is missing"
        advice = COMMANDS.get(kind, COMMANDS[None]).format(folder=folder)
        raise ValueError(f"{folder} {found}, expected {_article(expected)} {expected}: {advice}")


def check_source(key: str, source: str | None, expected: str, *others: str, file: str | None = None) -> None:
    """
    [`check_folder`] for the value of a recipe's key, which may be unset.

    Args:
        file (`str`, *optional*): A folder with this file is taken, whatever else it holds.

    Raises:
        `FileNotFoundError`: where there is no such folder or file, and no repository of a Hub can have this name.
    """
    if source is None or (file is not None and (Path(source) / file).is_file()):
        return
    if Path(source).exists():
        try:
            return check_folder(source, expected, *others)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        raise FileNotFoundError(
            f"{key} is {source!r}, where there is no folder, and it is no repository of a Hub: is what makes it, such "
            "as the stage before this one, finished?"
        ) from None


@dataclass(kw_only=True, frozen=True)
class Stage:
    """
    A training that a model went through, as its card names it.

    Args:
        name (`str`): Name of its folder.
        kind (`str`): What `nextflow-hf train` was told.
        steps (`int`, *optional*): That it took.
        seconds (`str`): That they took, in words.
        command (`list[str]`): That started it, without the folders of the machine.
        plot (`Path`, *optional*): Plot of its losses.
    """

    name: str
    kind: str
    steps: int | None = None
    seconds: str = ""
    command: list[str] = field(default_factory=list)
    plot: Path | None = field(default=None, compare=False)

    @property
    def plot_name(self) -> str:
        """Name of the plot beside a card."""
        return f"loss_{Path(self.name).name}.png"


@dataclass(kw_only=True)
class Run:
    """
    A training and one of its results.

    Args:
        folder (`Path`): Folder of the run.
        result (`Path`): Folder of the weights: that of the run, or a checkpoint in it.
        kind (`str`): `"transformer"`, `"tokenizer"`, `"decoder"`, `"grpo"`, ...: what `nextflow-hf train` was told.
        recipe (`dict`): Its keys.
        model (`str`, *optional*): What it started from.
        command (`list[str]`): That started it.
    """

    folder: Path
    result: Path
    kind: str
    recipe: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    command: list[str] = field(default_factory=list)

    @property
    def is_adapter(self) -> bool:
        """Whether the result is an adapter, and not a whole model."""
        return (self.result / "adapter_config.json").is_file()

    def ancestors(self) -> Iterator[str]:
        """What it started from, what that started from, and so on: folders and Hub ids."""
        model, seen = self.model, {str(self.folder)}
        while model is not None and model not in seen:
            seen.add(model)
            yield model
            model = _notes(Path(model)).get("model")

    @property
    def base_pipeline(self) -> str | None:
        """The nearest pipeline among [`ancestors`]; a decoder's run names the model of its codes."""
        for model in filter(None, (self.recipe.get("model"), *self.ancestors())):
            if kind_of(Path(model)) == "pipeline" if Path(model).is_dir() else HUB_ID.fullmatch(model):
                return model
        return None

    def stages(self) -> list[Stage]:
        """The trainings that it is made of, by what their recipes name, each after those it needs; itself last."""
        found: list[Stage] = []
        _add_stages(self, found, set())
        named: dict[str, Stage] = {}
        for stage in found:
            name, number = stage.name, 2
            while name in named:  # folders of one name in different places: their plots lie beside each other
                name, number = f"{stage.name}_{number}", number + 1
            named[name] = replace(stage, name=name)
        return list(named.values())

    def state(self) -> dict[str, Any]:
        """`Trainer`'s record of its steps and losses; empty where there is none."""
        files = [self.result / "trainer_state.json", self.folder / "trainer_state.json"]
        return next((_read_json(file) for file in files if file.is_file()), {})

    def stage(self) -> Stage:
        """This run as a stage of the runs that start from it."""
        state, plot = self.state(), self.folder / "loss.png"
        return Stage(
            name=self.folder.name,
            kind=self.kind,
            steps=state.get("global_step"),
            seconds=_seconds(state.get("log_history", ())),
            command=list(map(without_folders, self.command)),
            plot=plot if plot.is_file() else None,
        )


def _seconds(history: Sequence[Mapping[str, Any]]) -> str:
    """What the log has: of all starts of a training, else of the last one; both on whatever machine it ran."""
    for name, remark in (("train_seconds", ""), ("train_runtime", " since its last start")):
        if found := [entry[name] for entry in history if name in entry]:
            return f"{found[-1]:,.0f}{remark}"
    return ""


def _add_stages(run: Run, found: list[Stage], seen: set[Path]) -> None:
    seen.add(run.folder.resolve())
    for source in (run.model, *run.recipe.values()):
        if not _is_folder(source) or (folder := Path(source)).resolve() in seen:
            continue
        if (folder / STAGES_FILE).is_file():
            found += [stage for stage in _read_stages(folder) if stage not in found]
        elif (run_folder := _run_folder(folder)).resolve() not in seen and (run_folder / RUN_FILE).is_file():
            _add_stages(_run(run_folder, folder), found, seen)
        seen.add(folder.resolve())
    if (stage := run.stage()) not in found:
        found.append(stage)


def _read_stages(folder: Path) -> list[Stage]:
    """The stages of an exported folder, with the plots that lie there."""
    try:
        stages = [
            Stage(
                name=str(entry["name"]),
                kind=str(entry["kind"]),
                steps=None if entry["steps"] is None else int(entry["steps"]),
                seconds=str(entry["seconds"]),
                command=list(map(str, entry["command"])),
            )
            for entry in _read_json(folder / STAGES_FILE)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / STAGES_FILE} is no list of stages, as `nextflow-hf export` writes it") from error
    plots = [folder / stage.plot_name for stage in stages]
    return [replace(stage, plot=plot) if plot.is_file() else stage for stage, plot in zip(stages, plots, strict=True)]


def _run_folder(folder: Path) -> Path:
    """The folder of the run that `folder` is, or is a checkpoint of."""
    return folder.parent if folder.name.startswith("checkpoint-") and not (folder / RUN_FILE).is_file() else folder


def read_run(source: str | Path, checkpoint: int | None = None) -> Run:
    """
    The run in a folder, its checkpoint `checkpoint` or its finished result; also of a folder of weights alone, whose
    configuration then says what it is.

    Raises:
        `ValueError`: where there are no such weights, naming the checkpoints that there are.
    """
    folder = result = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {source}")
    folder = _run_folder(folder)
    if checkpoint is not None:
        result = folder / f"checkpoint-{checkpoint}"
    if not any(path for pattern in WEIGHTS for path in result.glob(pattern)):
        steps = checkpoints(folder)
        found = f"--checkpoint takes one of {steps}" if steps else "nor has it checkpoints"
        raise ValueError(f"{result} has no weights, {found}")
    return _run(folder, result)


def _run(folder: Path, result: Path) -> Run:
    notes = _notes(result)
    return Run(
        folder=folder,
        result=result,
        kind=notes.get("kind") or _inferred_kind(result),
        recipe=notes.get("recipe") or {},
        model=notes.get("model"),
        command=notes.get("command") or [],
    )


def _notes(result: Path) -> dict[str, Any]:
    """The contents of `run.yaml` of the run that saved the weights in `result`; for an adapter alone, its base."""
    for file in (result / RUN_FILE, result.parent / RUN_FILE):
        if file.is_file():
            from .recipe import read_recipe  # not above: `--help` of a command would wait for the Hub's library

            notes = read_recipe(file)
            directory, recipe = notes.get("directory"), notes.get("recipe") or {}
            found = {name: _from_here(value, directory) for name, value in recipe.items()}
            return {**notes, "recipe": found, "model": _from_here(notes.get("model"), directory)}
    if (result / "adapter_config.json").is_file():
        return {"model": _read_json(result / "adapter_config.json").get("base_model_name_or_path")}
    return {}


def _from_here(name: Any, directory: Any) -> Any:
    """The name of a folder, which was relative to the training's working directory, as it is from this one."""
    if not isinstance(directory, str) or not isinstance(name, str) or _is_folder(name):
        return name
    there = os.path.join(directory, name)
    return there if _is_folder(there) else name


def _is_folder(name: Any) -> bool:
    return isinstance(name, str) and os.path.isdir(name)  # of any text: `Path` raises for a long one


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return sorted(int(name) for name in names if name.isdigit())


def _inferred_kind(result: Path) -> str:
    kinds = {
        "transformer": "transformer",
        "adapter": "transformer",
        "vision tokenizer": "tokenizer",
        "diffusion decoder": "decoder",
        "NextFlowDiffusionDecoderPipeline": "decoder",
    }
    kind = _kind_of_result(result) if not (result / "model_index.json").is_file() else kind_of(result)
    if kind not in kinds:
        raise ValueError(f"{result} holds {kind or 'nothing of NextFlow'}, expected a run of `nextflow-hf train`")
    return kinds[kind]


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
