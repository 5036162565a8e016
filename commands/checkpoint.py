"""What is in a folder of weights, from its configurations and the headers of its files: nothing is loaded.

Neither is torch, but for what only our classes know: the sizes of a model whose weights are not there, and whether
files are whole. Modules are then built on the meta device, where a parameter is a shape.
"""

import importlib.util
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from huggingface_hub import parse_local_safetensors_file_metadata, snapshot_download

from ..training.common.folders import check_folder
from .loading import check_revision, find_model


if TYPE_CHECKING:
    from torch import nn

# Types in safetensors' headers, as torch names them.
DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U8": "uint8", "BOOL": "bool"},
}
# The two models that lie in folders of their own after training or conversion, by `model_type`.
ALONE = {
    "nextflow": ("transformer", ["nextflow_hf", "NextFlowForCausalLM"]),
    "nextflow_vision_tokenizer": ("vision_tokenizer", ["nextflow_hf", "NextFlowVisionTokenizer"]),
}


# What is said of a transformer -> the key of its configuration.
VOCABULARY = {
    "total": "vocab_size",
    "text": "text_vocab_size",
    "image_codes": "codebook_size",
    "semantic_code_dim": "semantic_code_dim",
    "pixel_code_dim": "pixel_code_dim",
}
ATTENTION = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "longest_sequence": "max_position_embeddings",
}


def read_checkpoint(model: str | None, *, revision: str | None = None) -> Path:
    """The folder of a model: itself, or what the Hub has of it but the weights."""
    if model is not None and Path(model).is_dir():
        check_revision(model, revision)
        alone = ("transformer", "run of a transformer", "vision tokenizer", "run of a vision tokenizer")
        check_folder(model, "pipeline", *alone)
        return Path(model)
    found = find_model(model)
    if Path(found).is_dir():
        check_revision(found, revision)
        return Path(found)
    return Path(snapshot_download(found, revision=revision, allow_patterns=["*.json"]))


def describe(folder: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """
    What the model in `folder` is, in JSON.

    Args:
        folder (`Path`): A pipeline, or one of its components.
        dtype (`str`, *optional*): The dtype that memory is stated for. By default that of the files.
    """
    index, class_name = _model_index(folder)
    components = [_describe_component(folder, name, *entry) for name, entry in index.items()]
    described: dict[str, Any] = {"class": class_name, "components": components}
    loaded = [part for part in components if part["parameters"] is not None]
    described["memory"] = {
        "dtype": dtype or _common([part["dtype"] for part in loaded]),
        "weights_bytes": sum(
            part["bytes"] if dtype is None else part["parameters"] * _itemsize(dtype) for part in loaded
        ),
    }
    if "transformer" in index:
        where = _component_folder(folder, "transformer")
        config = _transformer_config(where)
        described |= _describe_transformer(config)
        described["sampling"] = _sampling_defaults(where)
        saved = next(part["dtype"] for part in components if part["name"] == "transformer")
        if "quantization_config" in config:  # the files have bytes, and it computes in what its configuration says
            saved = config.get("dtype") or config.get("torch_dtype") or saved
        described["memory"]["kv_cache_bytes_per_token"] = _cache_bytes(config, dtype or saved)
    file = _component_folder(folder, "processor") / "processor_config.json"
    if file.is_file():
        cache_bytes = described["memory"].get("kv_cache_bytes_per_token")
        described |= _describe_sizes(_read(file)["image_processor"], cache_bytes)
    return described


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _model_index(folder: Path) -> tuple[dict[str, list[str]], str]:
    """Library and class of every component, and the class of the whole."""
    file = folder / "model_index.json"
    if file.is_file():
        index = _read(file)
        class_name = index.pop("_class_name")
        entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and all(entry)}
        return dict(sorted(entries.items())), class_name[-1] if isinstance(class_name, list) else class_name
    name, entry = ALONE[_read(folder / "config.json")["model_type"]]
    return {name: entry}, entry[1]


def _component_folder(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _describe_component(folder: Path, name: str, library: str, class_name: str) -> dict[str, Any]:
    described = {"name": name, "class": class_name, "parameters": None, "dtype": None, "bytes": None}
    where = _component_folder(folder, name)
    if name == "processor" or not (where / "config.json").is_file():  # beside the transformer, or a scheduler
        return described
    config = _read(where / "config.json")
    sizes: Counter = Counter()
    for _, tensor in _tensors_in_files(where):
        sizes[DTYPES.get(tensor.dtype, tensor.dtype)] += math.prod(tensor.shape)
    count = sizes.total()
    if not sizes or "quantization_config" in config:  # packed, or the configurations alone
        parameters = {
            id(parameter): parameter.numel() for parameter in _build(where, library, class_name).parameters()
        }
        count = sum(parameters.values())  # tied ones once
    if not sizes:
        sizes[config.get("dtype") or config.get("torch_dtype") or "float32"] = count
    described |= {"parameters": count, "dtype": _common(sizes)}
    described["bytes"] = int(sum(number * _itemsize(dtype) for dtype, number in sizes.items()))
    return described


def _build(folder: Path, library: str, class_name: str) -> "nn.Module":
    """The module without its weights."""
    import diffusers
    import torch
    import transformers

    import nextflow_hf

    libraries = {"nextflow_hf": nextflow_hf, "diffusers": diffusers, "transformers": transformers}
    if library.split(".")[0] not in libraries:
        raise ValueError(f"model_index.json has a {class_name} of {library}, expected one of {sorted(libraries)}")
    # A standalone repository names ours as classes of transformers and diffusers.
    is_ours = class_name in nextflow_hf.__all__
    component = getattr(nextflow_hf if is_ours else libraries[library.split(".")[0]], class_name)
    with torch.device("meta"):
        if issubclass(component, transformers.PreTrainedModel):
            return component(component.config_class.from_pretrained(folder))
        return component.from_config(component.load_config(folder))


def check_weights(folder: Path) -> None:
    """Raises `ValueError` where the files of a component of ours lack tensors that its configuration describes."""
    for name, entry in _model_index(folder)[0].items():
        where = _component_folder(folder, name)
        if not entry[1].startswith("NextFlow") or name == "processor":
            continue
        module = _build(where, *entry)
        saved = {tensor: tuple(info.shape) for tensor, info in _tensors_in_files(where)}
        tied = getattr(module, "all_tied_weights_keys", {})
        missing = [
            key
            for key, tensor in module.state_dict().items()
            if saved.get(key) != tuple(tensor.shape) and key not in tied
        ]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"the files of the {name} in {where} lack {', '.join(missing[:3])}{more}")


def _tensors_in_files(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and description of every tensor in the weights of a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        yield from parse_local_safetensors_file_metadata(path).tensors.items()


def _common(names: Mapping[str, int] | list[str]) -> str:
    """The one name, or the most frequent and that there are others."""
    counts = Counter(names)
    (first, _), *others = counts.most_common()
    return first if not others else f"{first} and others"


def _itemsize(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else int(bits[0]) / 8  # a bool takes a byte


def _transformer_config(folder: Path) -> dict[str, Any]:
    config = _read(folder / "config.json")
    if any(config.get(name) is None for name in (*VOCABULARY.values(), *ATTENTION.values())):  # of an early version
        from ..modeling_nextflow.configuration_nextflow import NextFlowConfig

        config = NextFlowConfig.from_pretrained(folder).to_dict()
    return config


def _describe_transformer(config: dict[str, Any]) -> dict[str, Any]:
    words = {name: config[key] for name, key in VOCABULARY.items()}
    words["other"] = words["total"] - words["text"] - words["image_codes"]
    return {
        "vocabulary": words,
        "attention": {"implementation": "sdpa", **{name: config[key] for name, key in ATTENTION.items()}},
    }


def _sampling_defaults(folder: Path) -> dict[str, Any]:
    """How images are sampled where a call does not say it."""
    names = _without_torch("modeling_nextflow/image_settings_nextflow.py")
    file = folder / "generation_config.json"
    saved = names.in_this_format(_read(file)) if file.is_file() else {}
    given = {name: saved.get(own) for name, own in names.CONFIG_NAMES.items()}
    return {name: names.IMAGE_DEFAULTS[name] if value is None else value for name, value in given.items()}


def _cache_bytes(config: dict[str, Any], dtype: str) -> int:
    """Keys and values of one token."""
    values = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return int(2 * values * _itemsize(dtype))


def _describe_sizes(image_processor: dict[str, Any], cache_bytes: int | None) -> dict[str, Any]:
    module, resolution = _without_torch("processing/scale_schedule_nextflow.py"), image_processor["resolution"]
    names = {field.name for field in fields(module.ScaleSchedule)}
    options = {name: value for name, value in image_processor.items() if name in names}
    schedule = module.ScaleSchedule(**options | {"scale_bases": tuple(options["scale_bases"])})
    square = schedule.nearest_bucket(1, 1)
    resolutions = []
    for side in schedule.resolutions:
        scales = schedule.num_scales(side)
        codes = module.num_cells(schedule.grids(square, scales))
        resolutions.append({"resolution": side, "scales": scales, "codes": codes})
        if cache_bytes is not None:
            # Its `<boi>` and the cells of all scales but the first, which that predicts: as many tokens as codes.
            resolutions[-1] |= {
                "kv_cache_bytes": codes * cache_bytes,
                "kv_cache_bytes_guided": 2 * codes * cache_bytes,
            }
    sizes = [schedule.pixel_size(bucket, schedule.num_scales(resolution)) for bucket in schedule.buckets]
    buckets = [{"width": width, "height": height} for height, width in sizes]
    return {"resolution": resolution, "resolutions": resolutions, "buckets": buckets}


def _without_torch(path: str) -> ModuleType:
    """A module of the package that imports nothing, without the package around it, which imports torch."""
    file = Path(__file__).parents[1] / path
    if file.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)  # where dataclasses look it up
        spec.loader.exec_module(module)
    return sys.modules[file.stem]
