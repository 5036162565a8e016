"""LoRA on the transformer, under the names of diffusers' pipelines: `load_lora_weights`, `set_adapters`, `fuse_lora`.

diffusers' mixin does most of it for any model. Here is what it does for its own denoisers alone: which layouts come
in, and how they get into a transformers model. PEFT does that: transformers' `load_adapter` drops DoRA's magnitudes.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.utils.import_utils import is_peft_available
from diffusers.utils.peft_utils import get_adapter_name
from torch import nn

from .helpers_nextflow import NextFlowBasePipeline


PEFT_PREFIX = "base_model.model."  # of the keys in a folder that PEFT wrote
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class NextFlowLoraLoaderMixin(CogVideoXLoraLoaderMixin, NextFlowBasePipeline):
    """
    Loads, weighs, fuses and saves low-rank adapters of `transformer`. CogVideoX's mixin is the plainest of diffusers':
    one transformer, no old layouts. Those of the diffusion decoder go to `pipe.diffusion_decoder_pipeline`, which has
    the same methods.
    """

    transformer: Any

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    _fused_scale = 1.0
    _hotswap_options: dict[str, Any] | None = None

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | PathLike | dict[str, torch.Tensor],
        *,
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """
        The matrices of an adapter under the names of diffusers, `transformer.*`, and its configuration likewise.
        Arguments as in [`~NextFlowLoraLoaderMixin.load_lora_weights`].
        """
        _require_peft()
        source = pretrained_model_name_or_path_or_dict
        source = source if isinstance(source, dict) else str(source)
        state_dict, metadata = super().lora_state_dict(source, return_lora_metadata=True, **kwargs)
        # PEFT's layout, whose configuration lies beside the weights and not in their file.
        if any(name.startswith(PEFT_PREFIX) for name in state_dict):
            if not isinstance(source, dict):
                metadata = {f"transformer.{name}": value for name, value in _peft_config(source, **kwargs).items()}
            state_dict = {f"transformer.{name.removeprefix(PEFT_PREFIX)}": value for name, value in state_dict.items()}
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Puts an adapter into the transformer and makes it the active one.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `PathLike` or `dict[str, torch.Tensor]`):
                A Hub id, a folder or a file: what PEFT saved (`adapter_model.safetensors` with its configuration) or
                diffusers' (`pytorch_lora_weights.safetensors`); or the matrices under the names of either. Matrices
                alone do not tell their scale: without a configuration it is 1.
            adapter_name (`str`, *optional*): For `set_adapters`. By default `"default_0"`, `"default_1"`, ...
            hotswap (`bool`, *optional*, defaults to `False`):
                Replace the matrices of the adapter `adapter_name`; a compiled transformer is not compiled again. Where
                ranks or scales differ, call `enable_lora_hotswap` before the first is loaded.
            kwargs: `weight_name`, `subfolder`, `revision` and the like, as for diffusers' other pipelines.

        Raises:
            `ValueError`: on an adapter that has no place in the transformer, or more than low-rank matrices; the
            transformer is then as it was.
        """
        source = pretrained_model_name_or_path_or_dict
        with _naming(source):
            found: Any = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        state_dict, metadata = found
        others = [name for name in state_dict if not name.startswith("transformer.")]
        if others or not state_dict:
            raise ValueError(
                f"the LoRA has the weights {others[:3]}, expected names like "
                "'transformer.model.layers.0.self_attn.q_proj.lora_A.weight' or, from PEFT, "
                f"'{PEFT_PREFIX}model.layers...'"
            )
        state_dict = {name.removeprefix("transformer."): value for name, value in state_dict.items()}
        if metadata is not None:
            metadata = {name.removeprefix("transformer."): value for name, value in metadata.items()}
        with _naming(source):
            config = _lora_config(state_dict, metadata)
        loaded = self.get_list_adapters().get("transformer", [])
        adapter_name = adapter_name or get_adapter_name(self.transformer)
        if hotswap and adapter_name not in loaded:
            raise ValueError(
                f"`hotswap` is True, but of the adapters {loaded} none is {adapter_name!r}: load it first"
            )
        if adapter_name in loaded and not hotswap:
            raise ValueError(
                f"there is an adapter {adapter_name!r} already: delete it first, take another name, or pass "
                "`hotswap=True`"
            )

        # With the hooks of offloading, new matrices would lie on another device than the old ones.
        device = self._execution_device
        with_models, with_layers, with_groups = self._optionally_disable_offloading(self)
        try:
            with _naming(source):
                if hotswap:
                    _swap_adapter(self.transformer, config, state_dict, adapter_name)
                else:
                    _add_adapter(self.transformer, config, state_dict, adapter_name)
                    self._prepare_hotswap(config)
        except Exception:
            if not hotswap and adapter_name in self.get_list_adapters().get("transformer", []):
                self.delete_adapters(adapter_name)  # the transformer is as it was
            raise
        finally:
            if with_models:
                self.enable_model_cpu_offload(device=device)
            elif with_layers:
                self.enable_sequential_cpu_offload(device=device)
            elif with_groups:
                _regroup(self.transformer)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """
        Lets `load_lora_weights(hotswap=True)` take adapters of other ranks and scales than the first. Call it before
        that is loaded; the transformer may be compiled afterwards.

        Args:
            target_rank (`int`, *optional*, defaults to 128): The highest rank of them all.
            check_compiled (`str`, *optional*, defaults to `"error"`):
                What to do about a transformer that is compiled already: `"error"`, `"warn"` or `"ignore"`.

        Raises:
            `ValueError`: where an adapter is loaded already.
        """
        _require_peft()
        if loaded := self.get_list_adapters().get("transformer", []):
            raise ValueError(f"the adapters {loaded} are loaded: call `enable_lora_hotswap` before the first")
        self._hotswap_options = {"target_rank": target_rank, "check_compiled": check_compiled}

    def _prepare_hotswap(self, config: Any) -> None:
        if self._hotswap_options is not None:
            from peft.utils.hotswap import prepare_model_for_compiled_hotswap

            prepare_model_for_compiled_hotswap(self.transformer, config=config, **self._hotswap_options)
            # Once: later adapters are swapped into the matrices that were padded here.
            self._hotswap_options = None

    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """
        Adds the adapters to the weights, where they cost nothing. [`~NextFlowLoraLoaderMixin.unfuse_lora`] undoes it.

        Args:
            components (`list[str]`, *optional*, defaults to `("transformer",)`): There is no other.
            lora_scale (`float`, *optional*, defaults to 1.0): On top of the weights that `set_adapters` gave.
            safe_fusing (`bool`, *optional*, defaults to `False`): Refuse weights that are not finite.
            adapter_names (`list[str]`, *optional*): By default those that are active.

        Raises:
            `ValueError`: where adapters are fused already.
        """
        if self.num_fused_loras:
            raise ValueError(f"{sorted(self.fused_loras)} are fused already: call `unfuse_lora` first")
        # diffusers would scale the active adapters, whatever `adapter_names` says, and leave them so for good.
        names = adapter_names or self.get_active_adapters()
        self._scale_adapters(lora_scale, names)
        try:
            super().fuse_lora(components=list(components), safe_fusing=safe_fusing, adapter_names=adapter_names)
        except Exception:
            super().unfuse_lora(components=list(components))  # the layers before the one that was refused
            self._scale_adapters(1 / lora_scale, names)
            raise
        self._fused_scale = lora_scale

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """Takes the adapters out of the weights again; they stay active."""
        names = list(self.fused_loras)
        super().unfuse_lora(components=list(components))
        # Back from what `fuse_lora` multiplied, so that they weigh the same when they are active again.
        self._scale_adapters(1 / self._fused_scale, names)
        self._fused_scale = 1.0

    def unload_lora_weights(self) -> None:
        """Takes the adapters out of the transformer. What is fused stays in its weights for good."""
        super().unload_lora_weights()
        # Else the next adapter would count as fused, and `unfuse_lora` would change its weight.
        self._merged_adapters, self._fused_scale = set(), 1.0

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters in use. Overwritten: diffusers 0.40 looks for them in its own models alone."""
        _require_peft()
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = (module for module in self.transformer.modules() if isinstance(module, BaseTunerLayer))
        return next((layer.active_adapters for layer in layers), [])

    def _scale_adapters(self, scale: float, names: list[str]) -> None:
        if scale == 0:
            raise ValueError("`lora_scale` is 0, expected another number: `disable_lora` switches adapters off")
        for module in self.transformer.modules():
            for name in names if hasattr(module, "lora_A") else []:
                if name in module.scaling:
                    module.scaling[name] *= scale

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """As [`~diffusers.DiffusionPipeline.save_pretrained`]. Raises `ValueError` where adapters are loaded."""
        if self.get_list_adapters():
            # Of a model with adapters, transformers would save these alone.
            raise ValueError(
                f"the transformer has the adapters {self.get_list_adapters()['transformer']}: save them with "
                "`save_lora_weights`, and the pipeline after `unload_lora_weights` (with `fuse_lora` before it, they "
                "stay in the weights)"
            )
        super().save_pretrained(save_directory, **kwargs)


def _require_peft() -> None:
    if not is_peft_available():
        raise ImportError("LoRA needs `peft`: pip install 'nextflow-hf[train]'")


@contextmanager
def _naming(source: str | PathLike | dict[str, torch.Tensor]) -> Iterator[None]:
    """Errors of parsing an adapter as one line that names `source`: PEFT says neither what nor where."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        name = f"of {len(source)} matrices" if isinstance(source, dict) else source
        reason = str(error).strip().splitlines()[0] if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"the LoRA {name} cannot be used: {reason}") from error


def _peft_config(source: str | PathLike, **kwargs: Any) -> dict[str, Any]:
    """`adapter_config.json` beside the weights `source`: a Hub id, a folder, or a file in one."""
    from peft import PeftConfig

    options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS and value is not None}
    source = Path(source).parent if Path(source).is_file() else source
    return PeftConfig.from_pretrained(str(source), **options).to_dict()


def _lora_config(state_dict: dict[str, torch.Tensor], metadata: dict[str, Any] | None) -> Any:
    """The `LoraConfig` of these matrices: what was saved with them, or what can be read off them."""
    from peft import LoraConfig

    if metadata:
        config = LoraConfig.from_peft_type(**metadata)
        if not isinstance(config, LoraConfig):
            raise ValueError(f"the adapter is a {type(config).__name__}, expected a LoraConfig")
        more = {name: getattr(config, name) for name in ("modules_to_save", "trainable_token_indices")}
        more = [name for name, value in more.items() if value] + (["bias"] if config.bias != "none" else [])
        if more:
            raise ValueError(
                f"the adapter has more than low-rank matrices ({', '.join(more)}), and whole weights can neither be "
                "weighed nor switched: merge it into the transformer with "
                "`pipe.transformer = PeftModel.from_pretrained(pipe.transformer, folder).merge_and_unload()`"
            )
        return config
    ranks = {
        name.removesuffix(".lora_B.weight"): value.shape[1]
        for name, value in state_dict.items()
        if name.endswith(".lora_B.weight")
    }
    if not ranks:
        raise ValueError(f"the LoRA has the weights {list(state_dict)[:3]}, expected names in 'lora_A' and 'lora_B'")
    # Layers may differ in rank. With alpha = rank each has a scale of 1.
    rank = max(ranks.values())
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        use_dora=any("lora_magnitude_vector" in name for name in state_dict),
    )


def _add_adapter(model: Any, config: Any, state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # Our model also unfuses its layers here: an adapter knows Qwen's names.
    model.add_adapter(config, adapter_name)
    # PEFT need not ask the Hub whether the vocabulary has grown: embeddings are not in the adapter.
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    _check_names(own, state_dict)
    for name, value in state_dict.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"the LoRA does not fit the transformer: {name} has the shape {tuple(value.shape)}, expected "
                f"{tuple(own[name].shape)}"
            )
    set_peft_model_state_dict(model, state_dict, adapter_name=adapter_name)


def _check_names(expected: Iterable[str], found: Iterable[str]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"the LoRA does not fit the transformer: of its weights {unknown[:3]} have no place there, and "
            f"{missing[:3]} are missing"
        )


def _swap_adapter(model: Any, config: Any, state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Replace the adapter's matrices by those of `state_dict`; PEFT checks before it changes any."""
    from peft import get_peft_model_state_dict
    from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict

    check_hotswap_configs_compatible(model.peft_config[adapter_name], config)
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    _check_names(own, state_dict)
    for name, value in state_dict.items():
        # Where the rank stands in the shape. A lower one is padded with zeros by PEFT.
        rank = 0 if "lora_A" in name else 1
        if (
            value.ndim != 2
            or value.shape[rank] > own[name].shape[rank]
            or value.shape[1 - rank] != own[name].shape[1 - rank]
        ):
            raise ValueError(
                f"the LoRA does not fit the adapter {adapter_name!r}: {name} has the shape {tuple(value.shape)}, "
                f"expected {tuple(own[name].shape)} or, with `enable_lora_hotswap` before the first, a lower rank"
            )
    weights = {name.replace(".weight", f".{adapter_name}.weight"): value for name, value in state_dict.items()}
    hotswap_adapter_from_state_dict(model, weights, adapter_name, config)


def _regroup(model: nn.Module) -> None:
    """Group offloading holds on to tensors: it is applied anew where modules have come in."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(model)
