"""Liger's Triton kernels for the transformer: what `TrainingArguments(use_liger_kernel=True)` applies to it.

Norms, rotary embedding, SwiGLU and the loss of one model instance; no class and no other model is touched. Liger is
imported when they are applied.
"""

import importlib.metadata
import os
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from packaging import version
from torch import nn


MODEL_TYPE = "nextflow"
# Before it, the gradient of a loss without reduction ignored the weights of the tokens (linkedin/Liger-Kernel#1298).
MINIMUM_VERSION = "0.8.2"


def apply_liger_kernel_to_nextflow(
    rope: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    model: nn.Module | None = None,
) -> None:
    """
    Put Liger's kernels into a model. `TrainingArguments(liger_kernel_config={...})` passes the first five on.

    Args:
        rope (`bool`, *optional*, defaults to `True`):
            The rotary embedding. The kernel takes cosines and sines of every position, so multiscale 3D positions
            need none of their own.
        rms_norm (`bool`, *optional*, defaults to `True`): RMSNorm, those of queries and keys included.
        swiglu (`bool`, *optional*, defaults to `True`): The activation of the MLP.
        cross_entropy (`bool`, *optional*, defaults to `False`): Not supported: it takes the logits of a sequence.
        fused_linear_cross_entropy (`bool`, *optional*, defaults to `True`):
            The loss, where the head is a plain matrix. Any other head is called a chunk at a time, as without Liger.
        model ([`NextFlowForCausalLM`] or [`NextFlowModel`]): The instance.
    """
    if model is None:
        raise ValueError("Liger's kernels are applied to an instance of NextFlow: pass model")
    if cross_entropy:
        raise ValueError("cross_entropy=True needs all logits at once: use fused_linear_cross_entropy=True")
    if not torch.accelerator.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Liger's kernels need a GPU, and there is none: leave use_liger_kernel out. The loss holds no logits "
            "of a whole sequence without it either"
        )
    found = importlib.metadata.version("liger-kernel")
    if version.parse(found) < version.parse(MINIMUM_VERSION):
        raise ImportError(
            f"liger-kernel {found} has no gradient for weighted tokens: install liger-kernel>={MINIMUM_VERSION}, as "
            "pip install 'nextflow-hf[liger]' does"
        )
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
    from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module, _patch_swiglu_module

    decoder = getattr(model, model.base_model_prefix, model)
    if swiglu and decoder.config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"SwiGLU takes hidden_act 'silu', got {decoder.config.hidden_act!r}: pass swiglu=False")
    for layer in decoder.layers:
        if rope:
            layer.self_attn.forward = _forward_with_rotary(layer.self_attn, liger_rotary_pos_emb)
        if swiglu:
            _patch_swiglu_module(layer.mlp, LigerSwiGLUMLP)
        if rms_norm:
            _patch_rms_norm_module(layer.input_layernorm)
            _patch_rms_norm_module(layer.post_attention_layernorm)
            if decoder.config.qk_norm:
                _patch_rms_norm_module(layer.self_attn.q_norm)
                _patch_rms_norm_module(layer.self_attn.k_norm)
    if rms_norm:
        _patch_rms_norm_module(decoder.norm)
    if fused_linear_cross_entropy and model is not decoder:
        model.weighted_cross_entropy = liger_weighted_cross_entropy


def _forward_with_rotary(attention: nn.Module, rotary: Callable) -> MethodType:
    """The attention's own forward, with another function where it names `apply_rotary_pos_emb`.

    That name is a global of transformers' module: replaced there, it would change every model of that kind.
    """
    forward = type(attention).forward
    if "apply_rotary_pos_emb" not in forward.__code__.co_names:
        raise RuntimeError(f"{type(attention).__name__}.forward calls no apply_rotary_pos_emb: pass rope=False")
    names = {**forward.__globals__, "apply_rotary_pos_emb": rotary}
    function = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(function, attention)


def liger_weighted_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    parts: list[tuple[int, slice]],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`loss_nextflow.weighted_cross_entropy`] by Liger, which finds its own `chunk_size`.

    Without a reduction, so that a token's weight reaches its gradient: Liger's own weights are those of classes, and
    its `use_token_scaling` weighs a token by its probability.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    counts = [count for count, _ in parts]
    losses = []
    with torch.autocast(device, enabled=False):
        for hidden, target, (count, rows) in zip(hidden_states.split(counts), targets.split(counts), parts):
            hidden, matrix = hidden.to(dtype), weight[rows].to(dtype)
            if count == 0:  # nothing to launch a kernel for, but the head has a gradient all the same: zero
                losses.append(F.linear(hidden, matrix[:1])[:, 0].float())
                continue
            losses.append(
                # The head's gradient is a sum over chunks, which half precision would round at each of them.
                liger_fused_linear_cross_entropy(
                    hidden, matrix, target - rows.start, reduction="none", accum_dtype=torch.float32
                )
            )
    losses = torch.cat(losses)
    return (losses * token_weights).sum(), losses.detach()
