"""The pipeline that a command's options name, and how to recognise its weights again."""

import argparse
import hashlib
import importlib.util
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .options import SHIPPED_MODEL


if TYPE_CHECKING:
    from torch import nn

    from .. import NextFlowPipeline

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SAMPLED_VALUES = 256  # of each tensor, for a fingerprint


def find_model(model: str | None) -> str:
    """What `from_pretrained` takes for `--model`: a folder that has a pipeline, or a Hub id."""
    if model in (None, SHIPPED_MODEL):
        from ..hub_cards import shapes_model_path

        try:
            return str(shapes_model_path())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}\nThis installation comes without the model: train one "
                "(`python -m nextflow_hf.training.train_shapes`), or pass --model."
            ) from None
    folder = Path(model)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise ValueError(
                f"{model} is no pipeline: {index} is missing. `pipe.save_pretrained` and "
                "`hub_cards.export.export_pipeline` write one"
            )
        found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        if found != "NextFlowPipeline":
            raise ValueError(f"{model} is a {found}, expected a NextFlowPipeline")
        return str(folder.resolve())
    if folder.exists() or not HUB_ID.fullmatch(model):
        raise ValueError(f"{model!r} is neither a folder nor a Hub id (user/name)")
    return model


def choose_device(name: str | None) -> str:
    """The device that is named, if it is here; else the accelerator, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}, expected cpu, cuda, cuda:0, mps or the like") from None
    counts = {"cpu": 1, **({} if accelerator is None else {accelerator.type: torch.accelerator.device_count()})}
    if (device.index or 0) >= counts.get(device.type, 0):
        here = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise ValueError(f"--device is {name!r}, but here there is {here}")
    return name


def load_pipeline(args: argparse.Namespace, *, without: Sequence[str] = ()) -> "NextFlowPipeline":
    """
    The pipeline of [`~commands.options.add_model_options`], on its device. `args.model`, `args.device` and
    `args.dtype` then name what was chosen, and `args.loaded_dtype` what the transformer was loaded in.

    Args:
        without (`Sequence[str]`, *optional*): Components that are not loaded.
    """
    found = find_model(args.model)
    args.model = SHIPPED_MODEL if args.model is None else args.model
    if Path(found).is_dir() and args.model != SHIPPED_MODEL:
        args.model = found
    args.device = choose_device(args.device)
    args.dtype = args.dtype or "auto"
    if args.offload and args.device == "cpu":
        raise ValueError("--offload needs an accelerator to spare, and the device is the CPU: leave it out")

    import torch

    from .. import NextFlowPipeline

    options: dict[str, Any] = dict.fromkeys(without)
    if args.revision is not None:
        options["revision"] = args.revision
    if args.dtype != "auto":  # else as in Python: each component as it was saved
        options["dtype"] = getattr(torch, args.dtype)
    if getattr(args, "quantize", None) is not None:
        options["quantization_config"] = _quantization(args.quantize, args.dtype)
    try:
        pipe = NextFlowPipeline.from_pretrained(found, **options)
    except OSError as error:
        if Path(found).is_dir():
            raise
        raise OSError(f"{found!r} is no folder here, and it was not loaded from the Hub: {error}") from error
    if getattr(args, "lora", None):
        args.lora = _load_loras(pipe, args.lora)
    if args.offload:
        pipe.enable_model_cpu_offload(device=args.device)
    else:
        pipe.to(args.device)
    pipe.set_progress_bar_config(desc="scale", disable=args.quiet)
    args.loaded_dtype = str(pipe.dtype).removeprefix("torch.")
    return pipe


def _quantization(kind: str, dtype: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError('--quantize needs bitsandbytes: pip install "nextflow-hf[quant]"')

    import torch
    from diffusers import PipelineQuantizationConfig

    bits = {"load_in_8bit": True}
    if kind == "4bit":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        }
    return PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{kind}", quant_kwargs=bits, components_to_quantize=["transformer"]
    )


def _load_loras(pipe: "NextFlowPipeline", loras: Sequence[str]) -> list[str]:
    """Adapters as `--lora` names them, and the same with paths that hold in every folder."""
    paths, names, scales = [], [], []
    for index, lora in enumerate(loras):
        path, _, scale = lora.rpartition("=") if "=" in lora else (lora, "", "1")
        try:
            scales.append(float(scale))
        except ValueError:
            raise ValueError(f"--lora is {lora!r}, expected PATH or PATH=SCALE, such as {path}=0.8") from None
        paths.append(str(Path(path).resolve()) if Path(path).exists() else path)
        names.append(f"lora_{index}")
        pipe.load_lora_weights(path, adapter_name=names[-1])
    pipe.set_adapters(names, scales)
    return [f"{path}={scale:g}" for path, scale in zip(paths, scales, strict=True)]


def drawing_modules(pipe: "NextFlowPipeline", decoder: str | None = None) -> dict[str, "nn.Module"]:
    """The components that pixels come from."""
    from torch import nn

    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in modules.items() if "decoder" not in name or decoder == "diffusion"}


def weights_fingerprint(module: "nn.Module") -> str:
    """Hash of some values of every tensor of `module`: other weights have another, and the largest take no time."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        if not flat.numel():
            continue
        places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), SAMPLED_VALUES), dtype=torch.float64)
        values = flat[places.long().to(flat.device)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, str]:
    """Versions of all that decides pixels."""
    import diffusers
    import torch
    import transformers

    libraries = {"torch": torch, "transformers": transformers, "diffusers": diffusers}
    return {
        "nextflow-hf": __version__,
        **{name: library.__version__ for name, library in libraries.items()},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),  # the order of sums on a CPU
    }
