"""What is in a folder of weights, from its configurations and the headers of its files: nothing is loaded.

Modules are built on the meta device, where a parameter is a shape.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from ..modeling_nextflow.configuration_nextflow import NextFlowConfig
from ..modeling_nextflow.generation_configuration_nextflow import (
    CONFIG_NAMES,
    IMAGE_DEFAULTS,
    NextFlowGenerationConfig,
)
from ..processing.image_processing_nextflow import NextFlowImageProcessorPil
from ..processing.scale_schedule_nextflow import num_cells
from .folders import HUB_ID, kind_of, read_run
from .loading import find_model


# Names of types in safetensors' headers.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# The two models that lie in folders of their own after training or conversion, by `model_type`.
ALONE = {
    "nextflow": ("transformer", ["nextflow_hf", "NextFlowForCausalLM"]),
    "nextflow_vision_tokenizer": ("vision_tokenizer", ["nextflow_hf", "NextFlowVisionTokenizer"]),
}


def read_checkpoint(model: str | None, *, revision: str | None = None) -> Path:
    """The folder of a model: itself, or what the Hub has of it but the weights."""
    if (
        model is not None
        and Path(model).is_dir()
        and kind_of(Path(model)) in ("run", "transformer", "vision tokenizer")
    ):
        run = read_run(model)
        if not run.is_adapter:
            return run.result
    found = find_model(model)
    if Path(found).is_dir() or not HUB_ID.fullmatch(found):
        return Path(found)
    return Path(snapshot_download(found, revision=revision, allow_patterns=["*.json"]))


def describe(folder: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """
    What the model in `folder` is, in JSON.

    Args:
        dtype (`str`, *optional*): That it is to be loaded in, for the memory it takes. By default as it is saved.
    """
    index, class_name = _model_index(folder)
    components = [_describe_component(folder, name, *entry) for name, entry in index.items()]
    described: dict[str, Any] = {"class": class_name, "components": components}
    loaded = [part for part in components if part["parameters"] is not None]
    chosen = dtype or _common([part["dtype"] for part in loaded])
    described["memory"] = {
        "dtype": chosen,
        "weights_bytes": sum(
            part["bytes"] if dtype is None else part["parameters"] * _itemsize(dtype) for part in loaded
        ),
    }
    if "transformer" in index:
        where = _component_folder(folder, "transformer")
        config = NextFlowConfig.from_pretrained(where)
        described |= _describe_transformer(config)
        described["drawing"] = _drawing_defaults(where)
        saved = next(part["dtype"] for part in components if part["name"] == "transformer")
        described["memory"]["kv_cache_bytes_per_token"] = _cache_bytes(config, dtype or saved)
    processor = _component_folder(folder, "processor")
    if (processor / "processor_config.json").is_file():
        described |= _describe_sizes(
            NextFlowImageProcessorPil.from_pretrained(processor), described["memory"].get("kv_cache_bytes_per_token")
        )
    return described


def _model_index(folder: Path) -> tuple[dict[str, list[str]], str]:
    """Library and class of every component, and the class of the whole."""
    file = folder / "model_index.json"
    if file.is_file():
        index = json.loads(file.read_text(encoding="utf-8"))
        class_name = index.pop("_class_name")
        entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and all(entry)}
        return dict(sorted(entries.items())), class_name[-1] if isinstance(class_name, list) else class_name
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in ALONE:
        raise ValueError(f"{folder} is a {kind}, expected a NextFlow pipeline, transformer or vision tokenizer")
    name, entry = ALONE[kind]
    return {name: entry}, entry[1]


def _component_folder(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _describe_component(folder: Path, name: str, library: str, class_name: str) -> dict[str, Any]:
    described = {"name": name, "class": class_name, "parameters": None, "dtype": None, "bytes": None}
    where = _component_folder(folder, name)
    module = _build(where, library, class_name)
    if module is None:
        return described
    parameters = {id(parameter): parameter.numel() for parameter in module.parameters()}  # tied ones once
    described["parameters"] = sum(parameters.values())
    sizes = _sizes_in_files(where)
    if not sizes:  # only the configurations are there
        config = json.loads((where / "config.json").read_text(encoding="utf-8"))
        sizes = {config.get("dtype") or config.get("torch_dtype") or "float32": described["parameters"]}
    described["dtype"] = _common(sizes)
    described["bytes"] = int(sum(count * _itemsize(dtype) for dtype, count in sizes.items()))
    return described


def _build(folder: Path, library: str, class_name: str) -> nn.Module | None:
    """The module without its weights; None of what is no module."""
    import diffusers
    import transformers

    import nextflow_hf

    libraries = {"nextflow_hf": nextflow_hf, "diffusers": diffusers, "transformers": transformers}
    if library.split(".")[0] not in libraries:
        raise ValueError(f"model_index.json has a {class_name} of {library}, expected one of {sorted(libraries)}")
    # A standalone repository names ours as classes of transformers and diffusers.
    is_ours = class_name in nextflow_hf.__all__
    component = getattr(nextflow_hf if is_ours else libraries[library.split(".")[0]], class_name)
    with torch.device("meta"):
        if issubclass(component, PreTrainedModel):
            return component(component.config_class.from_pretrained(folder))
        if issubclass(component, ModelMixin):
            return component.from_config(component.load_config(folder))
    return None


def check_weights(folder: Path) -> None:
    """Raises `ValueError` where the files of a component of ours lack tensors that its configuration describes."""
    for name, entry in _model_index(folder)[0].items():
        where = _component_folder(folder, name)
        module = _build(where, *entry) if entry[1].startswith("NextFlow") else None
        if module is None:
            continue
        saved = {tensor: entry["shape"] for tensor, entry in _tensors_in_files(where)}
        tied = getattr(module, "_tied_weights_keys", None) or {}
        missing = [
            key
            for key, tensor in module.state_dict().items()
            if saved.get(key) != list(tensor.shape) and key not in tied
        ]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"the files of the {name} in {where} lack {', '.join(missing[:3])}{more}")


def _tensors_in_files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and description of every tensor in the weights of a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        yield from ((name, tensor) for name, tensor in header.items() if name != "__metadata__")


def _sizes_in_files(folder: Path) -> Counter:
    """How many numbers of each type the weights in a folder have."""
    sizes: Counter = Counter()
    for _, tensor in _tensors_in_files(folder):
        sizes[DTYPES.get(tensor["dtype"], tensor["dtype"])] += math.prod(tensor["shape"])
    return sizes


def _common(names: Mapping[str, int] | list[str]) -> str:
    """The one name, or the most frequent and that there are others."""
    counts = Counter(names)
    (first, _), *others = counts.most_common()
    return first if not others else f"{first} and others"


def _itemsize(dtype: str) -> float:
    return getattr(torch, dtype.split()[0]).itemsize


def _describe_transformer(config: NextFlowConfig) -> dict[str, Any]:
    return {
        "vocabulary": {
            "total": config.vocab_size,
            "text": config.text_vocab_size,
            "image_codes": config.codebook_size,
            "other": config.vocab_size - config.text_vocab_size - config.codebook_size,
            "semantic_code_dim": config.semantic_code_dim,
            "pixel_code_dim": config.pixel_code_dim,
        },
        "attention": {
            "implementation": config._attn_implementation or "sdpa",
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "longest_sequence": config.max_position_embeddings,
        },
    }


def _drawing_defaults(folder: Path) -> dict[str, Any]:
    if not (folder / "generation_config.json").is_file():
        return dict(IMAGE_DEFAULTS)
    config = NextFlowGenerationConfig.from_pretrained(folder)
    given = {name: getattr(config, own) for name, own in CONFIG_NAMES.items()}
    return {name: IMAGE_DEFAULTS[name] if value is None else value for name, value in given.items()}


def _cache_bytes(config: NextFlowConfig, dtype: str) -> int:
    """Keys and values of one token."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * _itemsize(dtype))


def _describe_sizes(image_processor: NextFlowImageProcessorPil, cache_bytes: int | None) -> dict[str, Any]:
    schedule, resolution = image_processor.schedule, image_processor.resolution
    square = schedule.nearest_bucket(1, 1)
    levels = []
    for side in schedule.resolutions:
        scales = schedule.num_scales(side)
        codes = num_cells(schedule.grids(square, scales))
        levels.append({"resolution": side, "scales": scales, "codes": codes})
        if cache_bytes is not None:
            # Its `<boi>` and the cells of all scales but the first, which that predicts: as many tokens as codes.
            levels[-1] |= {"kv_cache_bytes": codes * cache_bytes, "kv_cache_bytes_guided": 2 * codes * cache_bytes}
    sizes = [schedule.pixel_size(bucket, schedule.num_scales(resolution)) for bucket in schedule.buckets]
    buckets = [{"width": width, "height": height} for height, width in sizes]
    return {"resolution": resolution, "levels": levels, "buckets": buckets}
