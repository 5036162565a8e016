"""The decoder's layers with the fewest operators: for sampling where each pass is bound by launching kernels.

The same weights and results as Qwen2.5's and Qwen3's layers, which stay the reference: queries, keys and values in one
product, gate and up in another, one rotation for queries and keys, residuals added within products. A layer is changed
in place, module by module, so its weights exist once. Every weight is read in its own module's call, as offloading
needs it. Knows layers, not what runs through them.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2RMSNorm,
    eager_attention_forward,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

from .attention_nextflow import RowRuns


BLOCK = 512  # rows of a weight that a thread of a CPU multiplies at once


class Decoder(Protocol):
    """What has layers to fuse."""

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def norm(self) -> nn.Module: ...

    @property
    def rotary_emb(self) -> Any: ...


class FusedRMSNorm(Qwen2RMSNorm):
    """RMSNorm as one kernel, which rounds once."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def linear_in_blocks(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    `F.linear(states, weight)`. A CPU in float32 multiplies a weight of many rows in blocks of them, which stay in its
    caches (benchmarks/RESULTS.md has what that gives).
    """
    rows = BLOCK * torch.get_num_threads()
    if (
        len(weight) < 2 * rows
        or states.numel() == states.shape[-1]  # one token reads a weight once, whatever the order
        or not weight.device.type == states.device.type == "cpu"
        or not weight.dtype == states.dtype == torch.float32
        or type(weight) not in (nn.Parameter, torch.Tensor)
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(states, weight)
    matrix = states.flatten(0, -2)
    product = matrix.new_empty(len(matrix), len(weight))
    for columns, block in zip(product.split(rows, dim=1), weight.split(rows)):
        torch.mm(matrix, block.t(), out=columns)
    return product.unflatten(0, states.shape[:-1])


class FusedLinear(nn.Linear):
    """Linear layers of one input, joined: their weights are stacked by rows, `sizes` rows for each name."""

    sizes: dict[str, int]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear_in_blocks(input, self.weight) if self.bias is None else super().forward(input)

    @classmethod
    def of(cls, layers: dict[str, nn.Linear]) -> "FusedLinear":
        """One layer of these layers of equal input, in their order, by name."""
        first, *_ = layers.values()
        sizes = {name: layer.out_features for name, layer in layers.items()}
        # On meta, so the rows put in below are its only memory.
        joined = cls(first.in_features, sum(sizes.values()), bias=first.bias is not None, device="meta")
        joined.sizes = sizes
        for kind, weight in first.named_parameters():
            rows = torch.cat([getattr(layer, kind).detach() for layer in layers.values()])
            setattr(joined, kind, nn.Parameter(rows, requires_grad=weight.requires_grad))
        return joined

    def parts(self) -> dict[str, nn.Linear]:
        """The layers that this one was made of, by name; each with memory of its own."""
        parts, start = {}, 0
        for name, size in self.sizes.items():
            parts[name] = part = nn.Linear(self.in_features, size, bias=self.bias is not None, device="meta")
            for kind, joined in self.named_parameters():
                # A view would keep the memory of all parts alive, and safetensors refuses to save shared memory.
                rows = joined.detach()[start : start + size].clone()
                setattr(part, kind, nn.Parameter(rows, requires_grad=joined.requires_grad))
            start += size
        return parts


class ResidualLinear(nn.Linear):
    """A linear layer whose product is added to a residual of its shape."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        # `addmm` adds within the product's kernel, and takes matrices only.
        total = residual if self.bias is None else residual + self.bias
        return torch.addmm(total.flatten(0, -2), input.flatten(0, -2), self.weight.t()).view_as(residual)


class FusedAttention(Qwen2Attention):
    """Qwen's attention with one product for queries, keys and values; the residual is added in the last product."""

    qkv_proj: FusedLinear
    q_norm: nn.Module  # Qwen3's
    k_norm: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | RowRuns | None,
        past_key_values=None,
        *,
        residual: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # (batch, tokens, rows of the product) -> (batch, heads, tokens, head_dim), of queries, keys and values
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        num_queries, num_keys, _ = (size // self.head_dim for size in self.qkv_proj.sizes.values())
        turned, value = heads.split([num_queries + num_keys, num_keys], dim=1)
        if self.config.qk_norm:
            # Qwen3 norms each head before it is rotated.
            query, key = turned.split([num_queries, num_keys], dim=1)
            turned = torch.cat([self.q_norm(query), self.k_norm(key)], dim=1)
        cos, sin = position_embeddings  # of the first half of a head the sine is negative
        # Rotating is x * cos + [-second, first] * sin. With the sign in the sine the halves only change places.
        first, second = turned.chunk(2, dim=-1)
        turned = torch.addcmul(turned * cos[:, None], torch.cat([second, first], dim=-1), sin[:, None])
        query, key = turned.split([num_queries, num_keys], dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        # SDPA's flash kernel takes no mask, so a few calls without one beat a single call with one.
        if isinstance(attention_mask, RowRuns):
            runs = [attend(self, *part, None, **kwargs)[0] for part in attention_mask.split(query, key, value)]
            attended, weights = torch.cat(runs), None
        else:
            attended, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(attended.flatten(2), residual), weights


class FusedMLP(Qwen2MLP):
    """Qwen's MLP with one product for gate and up; the residual is added in the last product."""

    gate_up_proj: FusedLinear

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        # In the order in which `JOINED` names them.
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up, residual)


class FusedDecoderLayer(Qwen2DecoderLayer):
    """A layer of Qwen's decoder whose parts add their own residuals."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=normed, residual=hidden_states, **kwargs)
        return self.mlp(self.post_attention_layernorm(hidden_states), hidden_states)


# Part of a layer -> the name of the joined module in it, and what that is joined of.
JOINED = {
    "self_attn": ("qkv_proj", ["q_proj", "k_proj", "v_proj"]),
    "mlp": ("gate_up_proj", ["gate_proj", "up_proj"]),
}
QWEN2 = {
    Qwen2DecoderLayer: FusedDecoderLayer,
    Qwen2Attention: FusedAttention,
    Qwen2MLP: FusedMLP,
    Qwen2RMSNorm: FusedRMSNorm,
    nn.Linear: ResidualLinear,
}
QWEN3 = {
    Qwen3DecoderLayer: FusedDecoderLayer,
    Qwen3Attention: FusedAttention,
    Qwen3MLP: FusedMLP,
    Qwen3RMSNorm: FusedRMSNorm,
    nn.Linear: ResidualLinear,
}


def is_plain(module: nn.Module) -> bool:
    """
    The rule for what is fused, asked of every module of a decoder: what has weights is transformers' or PyTorch's own
    class, and nothing quantises, adapts, shards, offloads or watches it.
    """
    # accelerate's offloading replaces `forward` on the instance, and a module that is joined is never called again.
    has_hooks = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    weights = list(module.parameters())
    # An adapter's layers, and most quantised ones, are classes of their own; other quantised and sharded weights are
    # not plain `Parameter`s.
    is_own = not weights or type(module) in {**QWEN2, **QWEN3}
    return is_own and not has_hooks and all(type(weight) is nn.Parameter for weight in weights)


def can_be_fused(decoder: Decoder) -> bool:
    """Whether all modules of the layers are plain: not quantised, adapted, sharded, offloaded or hooked."""
    return all(is_plain(module) for part in (*decoder.layers, decoder.norm) for module in part.modules())


def fuse(decoder: Decoder, *, qk_norm: bool) -> None:
    """Change a decoder in place: its layers, Qwen3's with `qk_norm`, else Qwen2.5's; its last norm; its rotations."""
    classes = QWEN3 if qk_norm else QWEN2
    # Part by part, so that the separate weights of one part are freed before the next is joined.
    for layer in decoder.layers:
        for part, (joined, names) in JOINED.items():
            owner = getattr(layer, part)
            setattr(owner, joined, FusedLinear.of({name: owner._modules.pop(name) for name in names}))
        _change_classes(layer, classes)
    decoder.norm.__class__ = FusedRMSNorm
    # The fused layers share the rotary embedding of the decoder, so all of them switch together.
    decoder.rotary_emb.is_signed = True


def unfuse(decoder: Decoder, *, qk_norm: bool) -> None:
    """Undo [`fuse`]."""
    classes = {fused: plain for plain, fused in (QWEN3 if qk_norm else QWEN2).items()}
    for layer in decoder.layers:
        for part, (joined, _) in JOINED.items():
            owner = getattr(layer, part)
            for name, linear in owner._modules.pop(joined).parts().items():
                setattr(owner, name, linear)
        _change_classes(layer, classes)
    decoder.norm.__class__ = Qwen2RMSNorm
    decoder.rotary_emb.is_signed = False


def _change_classes(layer: nn.Module, classes: dict[type, type]) -> None:
    for module in layer.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


def separate_weights(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` of a model, fused or not, under the names that Qwen's files have."""
    state_dict = dict(state_dict)
    for prefix, module in model.named_modules():
        if isinstance(module, FusedLinear):
            for kind in module._parameters:
                joined = state_dict.pop(f"{prefix}.{kind}", None)
                if joined is not None:
                    owner = prefix.rpartition(".")[0]
                    pieces = zip(module.sizes, joined.split(list(module.sizes.values())))
                    state_dict |= {f"{owner}.{name}.{kind}": piece for name, piece in pieces}
    return state_dict
