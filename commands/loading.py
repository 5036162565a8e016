"""The pipeline that a command's options name, and how to recognise its weights again."""

import argparse
import hashlib
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, hub_cards
from ..hub_cards import SHIPPED
from ..training.common.folders import HUB_ID, TRANSFORMERS, VISION_TOKENIZERS, check_folder, kind_of, read_run
from .options import SHIPPED_MODEL


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from .. import NextFlowPipeline

SAMPLED_VALUES = 256  # of each tensor, for a fingerprint


def find_model(model: str | None) -> str:
    """What `from_pretrained` takes for `--model`: a folder that has a pipeline, or a Hub id."""
    if model is None or model in SHIPPED:
        return str(hub_cards.shipped_model_path(model or SHIPPED_MODEL))
    folder = Path(model)
    if folder.is_dir():
        check_folder(folder, "pipeline")
        return str(folder.resolve())
    if folder.exists() or not HUB_ID.fullmatch(model):
        raise ValueError(f"{model!r} is neither a folder nor a Hub id (user/name)")
    return model


def check_revision(found: str, revision: str | None) -> None:
    """Refuse a revision of what lies in a folder: it would be ignored."""
    if revision is not None and Path(found).is_dir():
        raise ValueError(
            f"--revision is {revision!r}, but {found} is a folder here and no model of the Hub: leave it out"
        )


def loaded(args: argparse.Namespace) -> dict[str, str]:
    """What [`load_pipeline`] chose, for the result of a command."""
    return {"model": args.model, "device": args.device, "dtype": args.loaded_dtype}


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
    is_tokenizer = (
        "transformer" in without and args.model is not None and kind_of(Path(args.model)) in VISION_TOKENIZERS
    )
    found = args.model if is_tokenizer else find_model(args.model)
    check_revision(found, args.revision)
    import torch

    from ..modeling_nextflow.fused_nextflow import can_be_fused

    args.model = args.model or SHIPPED_MODEL
    args.model = args.model if args.model in SHIPPED else _place(args.model)
    args.device = choose_device(args.device)
    args.dtype = args.dtype or "auto"
    if args.offload and args.device == "cpu":
        raise ValueError("--offload needs an accelerator to spare, and the device is the CPU: leave it out")

    silence_loading()
    pipe = _vision_tokenizer_alone(args) if is_tokenizer else _load_components(args, found, without)
    if getattr(args, "lora", None):
        args.lora = _load_loras(pipe, args.lora)
    # In half precision fused layers round otherwise, and on a CPU, where they gain little, a seed keeps its images.
    pays = pipe.transformer is not None and (args.device != "cpu" or pipe.transformer.dtype == torch.float32)
    if pays and can_be_fused(pipe.transformer.model):
        pipe.transformer.fuse_qkv_projections()
    if args.offload:
        pipe.enable_model_cpu_offload(device=args.device)
    else:
        pipe.to(args.device)
    pipe.set_progress_bar_config(desc="scale", disable=args.quiet)
    args.loaded_dtype = str(pipe.dtype).removeprefix("torch.")
    if args.device == "cpu" and args.dtype == "auto" and not args.quiet:
        _warn_of_bfloat16(pipe)
    return pipe


def _warn_of_bfloat16(pipe: "NextFlowPipeline") -> None:
    """Say that this CPU is slow in the type that weights were saved in."""
    import torch

    parts = [getattr(part, "dtype", None) for part in pipe.components.values()]
    if torch.bfloat16 not in parts:
        return
    from ..training.common.processes import computes_bfloat16

    if not computes_bfloat16(on_cpu=True):
        print(
            "nextflow-hf: this CPU has no instructions for bfloat16, in which the weights were saved: --dtype float32 "
            "is many times faster, and rounds otherwise",
            file=sys.stderr,
        )


def silence_loading() -> None:
    """Leave out the progress bars of loading: the only one is that of the scales."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _load_components(args: argparse.Namespace, found: str, without: Sequence[str]) -> "NextFlowPipeline":
    """The pipeline `found`, with the parts of `--transformer` and `--vision-tokenizer` instead of its own."""
    import torch

    from .. import NextFlowPipeline
    from ..conversion.assemble import load_vision_tokenizer

    # By default as in Python: each component as it was saved.
    dtype = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
    options: dict[str, Any] = dict.fromkeys(without) | dtype
    if args.revision is not None:
        options["revision"] = args.revision
    quantization = {}
    if getattr(args, "quantize", None) is not None:
        quantization = {"quantization_config": _quantization(args.quantize, args.dtype)}
    if getattr(args, "transformer", None) is not None:
        args.transformer = _place(args.transformer)
        options["transformer"] = load_transformer(args.transformer, **dtype, **quantization)
    elif quantization:
        from diffusers import PipelineQuantizationConfig

        mapping = {"transformer": quantization["quantization_config"]}
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    if args.vision_tokenizer is not None:
        args.vision_tokenizer = _place(args.vision_tokenizer)
        check_folder(args.vision_tokenizer, *VISION_TOKENIZERS, "pipeline")
        options["vision_tokenizer"] = load_vision_tokenizer(args.vision_tokenizer, **dtype)
    try:
        return NextFlowPipeline.from_pretrained(found, **options)
    except OSError as error:
        if Path(found).is_dir():
            raise
        raise OSError(f"{found!r} is no folder here, and it was not loaded from the Hub: {error}") from error


def _place(source: str) -> str:
    """A path that holds in every folder, that of a shipped model for its name; a Hub id as it is."""
    if source in SHIPPED:
        return str(hub_cards.shipped_model_path(source))
    return str(Path(source).resolve()) if Path(source).exists() else source


def load_transformer(source: str, **options: Any) -> "PreTrainedModel":
    """A transformer by folder or Hub id: alone, of a pipeline, or of a run, whose adapter is merged into its base."""
    from ..conversion.assemble import merge_adapter, subfolder_of
    from ..modeling_nextflow.modeling_nextflow import NextFlowForCausalLM

    check_folder(source, *TRANSFORMERS, "pipeline")
    if not Path(source).is_dir() or kind_of(Path(source)) == "pipeline":
        if not HUB_ID.fullmatch(source) and not Path(source).is_dir():
            raise ValueError(f"{source!r} is neither a folder nor a Hub id (user/name)")
        return NextFlowForCausalLM.from_pretrained(source, **subfolder_of(source, "transformer"), **options).eval()
    run = read_run(source)
    if not run.is_adapter:
        return NextFlowForCausalLM.from_pretrained(run.result, **options).eval()
    if run.model is None:
        raise ValueError(f"{source} is an adapter of an unknown model: its adapter_config.json names none")
    return merge_adapter(load_transformer(run.model, **options), run.result)


def _vision_tokenizer_alone(args: argparse.Namespace) -> "NextFlowPipeline":
    """A pipeline around a vision tokenizer, which encodes and decodes: its processor knows images, and no text."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from .. import NextFlowPipeline
    from ..conversion.assemble import load_image_processor, load_vision_tokenizer
    from ..processing.processing_nextflow import NextFlowProcessor

    dtype = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
    vision_tokenizer = load_vision_tokenizer(args.model, **dtype)
    tokens = {token: index for index, token in enumerate(("<|image_pad|>", "<boi>", "<eoi>"))}
    processor = NextFlowProcessor(
        load_image_processor(args.model, vision_tokenizer.config),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(tokens))),
    )
    return NextFlowPipeline(None, vision_tokenizer, processor)


def _quantization(kind: str, dtype: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError('--quantize needs bitsandbytes: pip install "nextflow-hf[quant]"')

    import torch
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _load_loras(pipe: "NextFlowPipeline", loras: Sequence[str]) -> list[str]:
    """
    Adapters as `--lora` names them, and the same with paths that hold in every folder. One with whole weights beside
    its matrices is merged into the transformer.
    """
    from ..conversion.assemble import merge_adapter

    places, scales = [], {}
    for index, lora in enumerate(loras):
        path, _, number = lora.rpartition("=") if "=" in lora else (lora, "", "1")
        try:
            scale = float(number)
        except ValueError:
            raise ValueError(f"--lora is {lora!r}, expected PATH or PATH=SCALE, such as {path}=0.8") from None
        places.append(f"{_place(path)}={number}")
        # A file of `save_lora_weights` is named as a diffusion decoder's.
        check_folder(path, "adapter", "run of an adapter", "diffusion decoder")
        if _has_whole_weights(path):
            if scale != 1 or scales:
                raise ValueError(f"--lora {lora} has whole weights, which are merged: name it first, without a scale")
            pipe.transformer = merge_adapter(pipe.transformer, path)
        else:
            scales[f"lora_{index}"] = scale
            pipe.load_lora_weights(path, adapter_name=f"lora_{index}")
    if scales:
        pipe.set_adapters(list(scales), list(scales.values()))
    return places


def _has_whole_weights(source: str) -> bool:
    """Whether PEFT's adapter has more than low-rank matrices: modules or rows that were trained whole."""
    from ..conversion.assemble import find_file

    if Path(source).is_file():
        return False
    file = find_file(source, "adapter_config.json")
    config = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    return bool(config.get("modules_to_save") or config.get("trainable_token_indices"))


def image_modules(pipe: "NextFlowPipeline", decoder: str | None = None) -> dict[str, "nn.Module"]:
    """The components that pixels come from."""
    from torch import nn

    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in modules.items() if "decoder" not in name or decoder == "diffusion"}


def weights_fingerprint(module: "nn.Module") -> str:
    """Hash of some values of every tensor of `module`, fused or not: other weights have another, and the largest take
    no time."""
    import torch

    from ..modeling_nextflow.fused_nextflow import separate_weights

    digest = hashlib.sha256()
    for name, tensor in sorted(separate_weights(module, module.state_dict()).items()):
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
