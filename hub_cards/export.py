"""Repositories for the Hub: a pipeline that transformers and diffusers load by one name, and each of its parts alone.

The transformer and the processor's files lie at the root, where transformers looks; the vision tokenizer, and what a
diffusion decoder has where there is one, in sub-folders. diffusers takes a component without a folder from the root.

The code lies there, too: transformers loads the repository with `trust_remote_code=True` where `nextflow_hf` is not
installed. `save_pretrained` alone writes the code of the object it saves (registration.py), and so does a plain
`push_to_hub`; what only the whole repository can know is added here. diffusers' own loader needs the package, unless
the repository is `standalone`: see [`write_standalone_code`].
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import ModelMixin
from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import ImageProcessingMixin, PreTrainedModel

from ..atomic import replaced_folder, write_text
from ..modeling_nextflow.modeling_nextflow import NextFlowForCausalLM, NextFlowModel
from ..modeling_nextflow.modeling_nextflow_conditional_generation import NextFlowForConditionalGeneration
from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..pipelines.pipeline_nextflow import NextFlowPipeline
from .cards import PLACEHOLDER_OWNER


if TYPE_CHECKING:
    from peft import PeftModel

ROOT_COMPONENTS = ("transformer", "processor")
AUTO_CLASSES = {
    "AutoModel": NextFlowModel,
    "AutoModelForCausalLM": NextFlowForCausalLM,
    "AutoModelForMultimodalLM": NextFlowForConditionalGeneration,
    "AutoModelForImageTextToText": NextFlowForConditionalGeneration,
}
HUB_PACKAGES = ("modeling_nextflow", "processing", "pipelines")


def export_pipeline(
    pipeline: NextFlowPipeline,
    output_dir: str | Path,
    card: ModelCard,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    max_shard_size: str = "5GB",
    include_code: bool = True,
    standalone: bool = False,
) -> Path:
    """
    Writes `pipeline` as one Hub repository, for `NextFlowPipeline`, `DiffusionPipeline`, `AutoModelForCausalLM` and
    `AutoProcessor` alike.

    Args:
        pipeline ([`NextFlowPipeline`]): It is left as it is.
        output_dir (`str` or `Path`):
            Created where missing. An older repository in it is replaced as a whole, other files stay.
        card (`ModelCard`): See [`~hub_cards.cards.create_card`].
        dtype (`torch.dtype` or `dict[str, torch.dtype]`, *optional*):
            Dtype of the weights in the files, or one for each component and `"default"`, as diffusers writes it.
            Modules that their class keeps in float32 stay so. By default weights are saved as they are.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Largest size of one file of weights.
        include_code (`bool`, *optional*, defaults to `True`):
            See [`write_code`]. Without, the repository is one for places that have the package.
        standalone (`bool`, *optional*, defaults to `False`):
            Whether `DiffusionPipeline` loads it without the package, see [`write_standalone_code`].

    Returns:
        `Path`: `output_dir`.
    """
    with replaced_folder(output_dir, without=code_files()) as folder:
        _write_repository(pipeline, folder, card, dtype=dtype, max_shard_size=max_shard_size)
        if include_code or standalone:
            write_code(folder)
            if standalone:
                write_standalone_code(folder)
        else:  # `save_pretrained` has written that of the components
            for path in [path for name in code_files() for path in folder.rglob(name)]:
                path.unlink()
    return Path(output_dir)


def _write_repository(
    pipeline: NextFlowPipeline,
    output_dir: Path,
    card: ModelCard,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None,
    max_shard_size: str,
) -> None:
    for name, component in pipeline.components.items():
        if component is None:  # an optional one
            continue
        folder = output_dir if name in ROOT_COMPONENTS else output_dir / name
        if isinstance(component, (PreTrainedModel, ModelMixin)):
            component_dtype = dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype
            component = component if component_dtype is None else cast_copy(component, component_dtype)
            component.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            component.save_pretrained(folder)
        forget_source(folder)
    # What is marked as derived from the model's config is derived again on loading, without our `image_*` settings.
    generation_config = copy.deepcopy(pipeline.transformer.generation_config)
    generation_config._from_model_config = None
    generation_config.save_pretrained(output_dir)
    (output_dir / "model_index.json").write_text(model_index(pipeline), encoding="utf-8")
    card.save(output_dir / "README.md")


def export_vision_tokenizer(
    vision_tokenizer: NextFlowVisionTokenizer,
    image_processor: ImageProcessingMixin,
    output_dir: str | Path,
    card: ModelCard,
    *,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a vision tokenizer with the image processor of its schedule, and a card; returns `output_dir`."""
    with replaced_folder(output_dir) as folder:
        vision_tokenizer.save_pretrained(folder, max_shard_size=max_shard_size)
        image_processor.save_pretrained(folder)
        forget_source(folder)
        card.save(folder / "README.md")
    return Path(output_dir)


def forget_source(folder: Path) -> None:
    """Take out of a saved config from where the model was loaded here, which diffusers writes down."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload NextFlow",
) -> CommitInfo:
    """
    Uploads a repository that was exported, in one commit.

    `pipeline.push_to_hub` uploads diffusers' own layout instead, a folder for each component, which only
    `NextFlowPipeline` loads.

    Args:
        folder (`str` or `Path`): Its card says the repository's name from then on.
        repo_id (`str`): `"user/name"`; created where it does not exist.
        private (`bool`, *optional*): Whether a new repository is private; an old one that is not is then refused.
        token (`str` or `bool`, *optional*): Defaults to the one of `hf auth login`.
        commit_message (`str`, *optional*): Message of the commit.
    """
    card = Path(folder, "README.md")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists and is public, and only a new repository is made private: nothing was uploaded. Make "
            "it private on the Hub, or push without `private`"
        )
    # Only now: the card of a push that fails is left for another name.
    text = card.read_text(encoding="utf-8")
    write_text(card, re.sub(rf"\b{PLACEHOLDER_OWNER}/[\w.-]+", repo_id, text))
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)


def export_adapter(
    model: "PeftModel | str | Path", output_dir: str | Path, card: ModelCard, *, base_model: str
) -> Path:
    """
    Writes the adapters of `model`, with their rows of the embedding and of the head, and a card of kind `"adapter"`.

    `model.save_pretrained` alone would note where this machine loaded the model from.

    Args:
        model (`PeftModel`, `str` or `Path`):
            Wraps a [`NextFlowForCausalLM`] and is left as it is; or a folder with a saved adapter.
        output_dir (`str` or `Path`): Created where missing. An older adapter in it is replaced as a whole.
        card (`ModelCard`): See [`~hub_cards.cards.create_card`].
        base_model (`str`): `"user/name"` of the model that the adapter goes on.

    Returns:
        `Path`: `output_dir`.
    """
    with replaced_folder(output_dir) as folder:
        if isinstance(model, (str, Path)):
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(Path(model, name), folder / name)
        else:
            # The rows are in the adapter: PEFT need not ask the Hub whether the vocabulary has grown.
            model.save_pretrained(folder, save_embedding_layers=False)
        for config_file in folder.rglob("adapter_config.json"):
            config = json.loads(config_file.read_text(encoding="utf-8"))
            # With its task named, `AutoPeftModelForCausalLM` finds the class through the model's own repository.
            config |= {"base_model_name_or_path": base_model, "task_type": "CAUSAL_LM", "auto_mapping": None}
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        card.save(folder / "README.md")
    return Path(output_dir)


def code_files() -> dict[str, Path]:
    """Every module of these packages by its file name, which is unique: one flat folder holds them all."""
    paths = [Path(str(path)) for package in HUB_PACKAGES for path in files(f"nextflow_hf.{package}").iterdir()]
    return {path.name: path for path in paths if path.suffix == ".py" and path.name != "__init__.py"}


def write_code(folder: str | Path) -> None:
    """
    Puts into the repository `folder` what [`~PreTrainedModel.save_pretrained`] of its parts leaves out.

    At the root lies the code of every class, also that of the vision tokenizer, since the Hub's loader looks there for
    `subfolder="vision_tokenizer"`, and that of the pipeline. A model class has one auto class for which its
    configuration is saved: the others are added, for the transformer without its head and for both parts in one.
    """
    folder = Path(folder)
    for name, path in code_files().items():
        shutil.copyfile(path, folder / name)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for auto_class, model_class in AUTO_CLASSES.items():
        config["auto_map"][auto_class] = f"{model_class.__module__.split('.')[-1]}.{model_class.__name__}"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_standalone_code(folder: Path) -> None:
    """
    Lets `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` load the repository `folder` without the
    package. diffusers runs `pipeline.py` first, which puts the parts' classes where its loader looks for those of
    transformers and diffusers. Without `trust_remote_code=True`, `DiffusionPipeline` refuses such a repository, even
    where the package is installed; [`NextFlowPipeline`] does not.
    """
    names = sorted(Path(name).stem for name in code_files())
    code = Path(__file__).with_name("standalone_pipeline.txt").read_text(encoding="utf-8")
    imports = "\n".join(f"from .{name} import __name__ as _{name}  # noqa: F401" for name in names)
    (folder / "pipeline.py").write_text(code.replace("# IMPORTS", imports), encoding="utf-8")
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] == "nextflow_hf":
            index[name] = ["diffusers" if name == "diffusion_decoder" else "transformers", entry[1]]
    index["_class_name"] = ["pipeline", index["_class_name"]]
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_index(pipeline: NextFlowPipeline) -> str:
    """`model_index.json`: diffusers' own, with our classes under the package's name and no trace of the source."""
    index = json.loads(pipeline.to_json_string())
    index.pop("_name_or_path", None)
    for name, component in pipeline.components.items():
        if component is None:
            index.pop(name)
        elif type(component).__module__.startswith("nextflow_hf."):
            index[name] = ["nextflow_hf", type(component).__name__]
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def cast_copy(model: PreTrainedModel | ModelMixin, dtype: torch.dtype) -> PreTrainedModel | ModelMixin:
    """A copy of `model` in `dtype`, but for the modules that its class keeps in float32 whatever it is loaded in."""
    model = copy.deepcopy(model)
    if isinstance(model, ModelMixin):  # whole names of modules and parameters, whatever the precision
        kept = {rf"(^|\.){re.escape(name)}(\.|$)" for name in model._keep_in_fp32_modules or ()}
    else:
        kept = set(model._keep_in_fp32_modules_strict)
        if dtype == torch.float16:
            kept |= set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(re.search(pattern, name) for pattern in kept):
            parameter.data = parameter.data.to(dtype)
    return model


__all__ = [
    "cast_copy",
    "export_adapter",
    "export_pipeline",
    "export_vision_tokenizer",
    "model_index",
    "push_folder",
    "write_code",
    "write_standalone_code",
]
