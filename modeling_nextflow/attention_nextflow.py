"""What attention adds to Qwen's (§2.2): the mask, for each implementation of transformers, the rotary embedding, and
keys and values in memory that is reserved ahead.

A query sees a key of its own document iff `block_id[key] <= block_id[query]`: text is causal, the cells of a scale see
each other. Knows shapes, positions and the layout of images; no weights, no tokens.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_bidirectional_mask,
    create_causal_mask,
    find_packed_sequence_indices,
    flash_attention_mask,
)
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from .configuration_nextflow import NextFlowConfig, default_mrope_section
from .grids_nextflow import ImageLayout
from .unrounded_nextflow import UnroundedModule


# diffusers' names of attention backends -> transformers' implementations. Its flash and sage kernels take no mask,
# which a prompt with images needs, and xformers has no counterpart: engines that try several go on to the next.
ATTENTION_BACKENDS = {
    **dict.fromkeys(("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"), "sdpa"),
    "flex": "flex_attention",
    **{name: name for name in ("sdpa", "flex_attention", "eager")},
}
PLACE = "nextflow_place"  # attribute of a cache that holds its [`CachePlace`]


# ---- mask


@dataclass(frozen=True)
class RowRuns:
    """
    Replaces the mask of a block on top of a cache: runs of rows (first, end, padding) whose left padding is equally
    long. Each run attends in one call, without a mask.
    """

    runs: tuple[tuple[int, int, int], ...]

    def split(self, query: torch.Tensor, *keys_and_values: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """
        `query` and each of `keys_and_values`, run by run: the rows of a run, keys and values without its padding.
        """
        # The padding of a run has one length: cut off the keys, it leaves nothing to mask.
        for first, end, padding in self.runs:
            yield query[first:end], *(states[first:end, :, padding:] for states in keys_and_values)


def get_attention_mask(
    config: NextFlowConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    layout: ImageLayout | None,
    *,
    is_causal: bool = True,
) -> torch.Tensor | BlockMask | None:
    """The mask that the layers take: none wherever the rule needs none.

    `is_causal=False` is one block on top of a cache: it sees everything but padding. Packed documents are told apart
    by the restarts of `position_ids[0]`, and take no `attention_mask`. Raises `ValueError` where the attention
    implementation would silently compute something else.
    """
    if inputs_embeds.dtype == torch.float64:  # its least number is -inf in the softmax of eager attention
        inputs_embeds = inputs_embeds.float()
    implementation = config._attn_implementation or "eager"
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    static_cache = past_key_values if past_key_values is not None and past_key_values.is_compileable else None
    if isinstance(past_key_values, DynamicCache) and not past_length:
        # transformers looks for packed documents only where there is no cache; an empty one changes nothing else.
        past_key_values = None
    text_positions = position_ids[0] if position_ids is not None and len(position_ids) == 4 else None
    # Without cells the rule is plain causality, which sdpa and flash kernels do without a mask.
    block_ids = layout.block_ids if is_causal and layout is not None and bool(layout.is_cell.any()) else None
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    # Flash kernels know padding and causality, and an implementation without a mask function gets no mask at all.
    if mask_function is None or mask_function is flash_attention_mask:
        packed = text_positions if attention_mask is None and past_key_values is None else None
        _check_needs_no_mask(implementation, block_ids is not None, attention_mask, packed)
    if static_cache is not None:
        attention_mask = _mask_of_static_cache(config, inputs_embeds, attention_mask, static_cache, is_causal)
    if not is_causal and attention_mask is None:
        return None
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
    }
    if not is_causal:
        return create_bidirectional_mask(**arguments)  # padding alone
    if block_ids is not None:
        block_ids = F.pad(block_ids, (int(past_length), 0), value=-1)  # cached keys are in no block of these queries
    return create_causal_mask(**arguments, position_ids=text_positions, block_sequence_ids=block_ids)


def _check_needs_no_mask(
    implementation: str, has_blocks: bool, attention_mask: torch.Tensor | None, positions: torch.Tensor | None
) -> None:
    """Raises `ValueError` where an implementation that takes no mask would need one. `positions` may be packed."""
    if has_blocks:
        _refuse(implementation, "the cells of a scale, which see each other")
    if attention_mask is not None and attention_mask.ndim == 4:
        _refuse(implementation, "a 4D attention_mask")
    # In one row, flash kernels read the documents off the positions themselves.
    if positions is not None and len(positions) > 1 and find_packed_sequence_indices(positions) is not None:
        _refuse(implementation, f"packed documents in {len(positions)} rows; it can in one row")


def _mask_of_static_cache(
    config: NextFlowConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache,
    is_causal: bool,
) -> torch.Tensor | None:
    """`attention_mask`, else one that hides the slots of a static cache that are not written yet, where it must."""
    implementation = config._attn_implementation
    if implementation == "flex_attention":
        raise ValueError(
            "flex_attention reads the length of a static cache only after it has grown, and masks by it: use 'sdpa' "
            "or 'eager' with a static cache, or flex_attention with a dynamic one"
        )
    # Flash kernels cut the keys to the mask's length.
    takes_padding_only = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) is flash_attention_mask
    # A causal mask already hides the slots behind the newest token. A block that sees everything would see them, too.
    if attention_mask is not None or (is_causal and not takes_padding_only):
        return attention_mask
    # Layers write before they attend: the new tokens count as written.
    length = cache.get_seq_length() + inputs_embeds.shape[1]
    slots, _ = cache.get_mask_sizes(inputs_embeds.shape[1], 0)
    written = torch.arange(int(length) if takes_padding_only else slots, device=inputs_embeds.device) < length
    return written.expand(len(inputs_embeds), -1)


def _refuse(implementation: str, pattern: str) -> None:
    raise ValueError(
        f"{implementation!r} takes no custom mask, so it would attend causally. It cannot express {pattern}: use "
        "'flex_attention' (for training, on a GPU), 'sdpa' or 'eager'. Text, and images from text, need no mask"
    )


# ---- rotary embedding


class NextFlowRotaryEmbedding(UnroundedModule, Qwen2RotaryEmbedding):
    """Qwen2's rotary embedding with its frequencies dealt out in turn to (scale, row, column).

    Equal coordinates, as text has them, give plain RoPE for any split, so the language model is kept exactly. The
    frequencies stay float32 however the model is cast: rounded to bfloat16 they are radians off at position 8,000.
    """

    is_signed = False  # whether the sine of the first half of a head is negative, as fused layers take it

    def __init__(self, config):
        super().__init__(config)
        # The config fills it in; not so in `rope_parameters` that were assigned later, to scale RoPE.
        default = default_mrope_section(2 * len(self.inv_freq))
        parameters: dict[str, Any] = dict(config.rope_parameters or {})
        self.mrope_section = list(parameters.get("mrope_section", default))
        if sum(self.mrope_section) != len(self.inv_freq):
            raise ValueError(
                f"mrope_section {self.mrope_section} sums to {sum(self.mrope_section)}, expected half the head "
                f"dimension = {len(self.inv_freq)}"
            )
        # Interleaving deals frequency 3n + 1 to the row and 3n + 2 to the column: there must be as many.
        if any(axis + 3 * (self.mrope_section[axis] - 1) >= len(self.inv_freq) for axis in (1, 2)):
            raise ValueError(f"mrope_section {self.mrope_section} cannot be interleaved: its first entry is too small")

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (head_dim / 2,), and the factor of cos and sin."""
        # Overwritten to count in integers: while DeepSpeed shards what is made, `torch.arange` rounds floats.
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        parameters: dict[str, Any] = dict(config.rope_parameters or {})
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` (3, batch, length) -> cos, sin (batch, length, head_dim) in the dtype of `x`."""
        # (3, batch, length, head_dim / 2). In float32, as bfloat16 rounds whole positions from 257 on.
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = freqs[0].clone()
        # Of three neighbouring frequencies one turns with each axis, until the sections of row and column are used up;
        # the slowest are left to the scale. In Qwen2.5-VL's contiguous sections columns would have slow frequencies
        # alone, which hardly tell the cells of an image apart.
        for axis, first in ((1, 1), (2, 2)):
            own = slice(first, self.mrope_section[axis] * 3, 3)
            angles[..., own] = freqs[axis][..., own]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        # Both halves of a head turn by the same angles.
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin if self.is_signed else sin, sin], dim=-1)
        return cos.to(x.dtype), sin.to(x.dtype)


# ---- keys and values


class NextFlowCacheLayer(DynamicLayer):
    """
    A dynamic layer whose keys and values fill the front of memory that is reserved for those to come: a block is
    written in place, and nothing is copied.

    What replaces `keys` and `values` (beams, offloading, a gather) works as on transformers' layer; it leaves no room
    behind them, and the next update makes some.
    """

    room = 256  # tokens that are added to what is needed, where not enough was reserved
    reserved = 0  # tokens that there is room for or, before the first update, that it makes room for
    length = num_values = 0  # tokens that the memory holds

    # The properties and their setters are what transformers' methods (select, repeat, offload) read and assign.
    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._keys is None else self._keys[:, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._keys, self.length = keys, 0 if keys is None else keys.shape[-2]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._values is None else self._values[:, :, : self.num_values]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._values, self.num_values = values, 0 if values is None else values.shape[-2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (batch, heads, new, head_dim) in place; returns those of all tokens so far."""
        start, end = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            # Empty, but with the number of heads and the dtype that memory is reserved with.
            self._keys, self._values = key_states[:, :, :0], value_states[:, :, :0]
        assert self._keys is not None and self._values is not None
        if end > self._keys.shape[2]:
            # More than was asked for where that is used up, so that text does not copy the cache at every token.
            self.reserve((self.reserved if self.reserved >= end else end + self.room) - start)
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_states, value_states
        self.length = self.num_values = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens."""
        self.reserved = self.length + count
        if self._keys is None or self._values is None or self._keys.shape[2] >= self.reserved:
            return
        larger = []
        for old in (self._keys, self._values):
            # Not zeroed: nothing reads behind `length`.
            larger.append(old.new_empty(*old.shape[:2], self.reserved, old.shape[3]))
            larger[-1][:, :, : self.length] = old[:, :, : self.length]
        self._keys, self._values = larger

    def resize(self, length: int) -> None:
        """Set how many tokens of the memory count as cached."""
        self.length = self.num_values = length

    def get_seq_length(self) -> int:
        """Number of tokens whose keys are in the cache."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, as in transformers; the memory stays reserved."""
        # transformers cuts the tensors. The setters take the new length from that; the memory itself stays reserved.
        memory = self._keys, self._values
        super().crop(tokens_to_remove)
        self._keys, self._values = memory

    def part(self, rows: slice, padding: int) -> "NextFlowCacheLayer":
        """Some rows without their first `padding` tokens, in the same memory."""
        part = copy.copy(self)
        assert self._keys is not None and self._values is not None
        # Views: what the part appends is written to the whole cache's memory, but only the part counts it.
        part._keys, part._values = self._keys[rows, :, padding:], self._values[rows, :, padding:]
        part.resize(self.length - padding)
        part.reserved = self.reserved - padding
        return part


def layers_of(cache: Cache) -> list[NextFlowCacheLayer]:
    """The layers of a cache that grows in place."""
    return [layer for layer in cache.layers if isinstance(layer, NextFlowCacheLayer)]


def reserved_cache(config: NextFlowConfig, length: int = 0) -> DynamicCache:
    """A dynamic cache that grows in place, with room for `length` tokens from the first update on."""
    cache = DynamicCache(config=config)
    layers = [NextFlowCacheLayer() for _ in cache.layers]
    for layer in layers:
        layer.reserve(length)
    cache.layers[:] = layers
    return cache


def reserve(cache: DynamicCache, count: int) -> None:
    """Let a dynamic cache grow in place, with room for `count` more tokens. Offloaded layers stay as they are."""
    # transformers moves the tensors of offloaded layers itself, so they would not stay in reserved memory.
    for index, layer in enumerate(() if cache.offloading else cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = own = NextFlowCacheLayer()
            # All that transformers keeps on a layer; `keys` and `values` are properties here, and set below.
            vars(own).update({name: value for name, value in vars(layer).items() if name not in ("keys", "values")})
            own.keys, own.values = layer.keys, layer.values
    for layer in layers_of(cache):
        layer.reserve(count)


def part_of(cache: DynamicCache, rows: slice, padding: int = 0) -> DynamicCache:
    """Some rows of a cache without their first `padding` tokens, in the same memory."""
    part = copy.copy(cache)
    layers: list[Any] = [layer.part(rows, padding) for layer in layers_of(cache)]
    part.layers = layers
    return part


def caches_of_layers(past_key_values: Cache | None, count: int) -> list:
    """The cache that each layer is given: of a dynamic cache its own layer, which has the same `update`, else the
    whole. A layer finds its part of the whole by an index, for each of which torch.compile would compile it anew."""
    if type(past_key_values) is DynamicCache and not past_key_values.offloading:
        if len(past_key_values.layers) >= count:
            return past_key_values.layers[:count]
    return [past_key_values] * count


@dataclass
class CachePlace:
    """Where a cache ends: its length in tokens, and the last token's positions (3 or 4, batch).

    Travels on the cache, so that more text or images can be put on top of images without position ids.
    """

    length: int
    position: torch.Tensor

    @classmethod
    def of(cls, cache: Cache | None) -> "CachePlace | None":
        """The place that a cache was marked with, or `None`."""
        return getattr(cache, PLACE, None)

    @classmethod
    def mark(cls, cache: Cache, position: torch.Tensor) -> None:
        """Let the cache know the positions (3 or 4, batch) of its last token."""
        length = cache.get_seq_length() + 0  # a copy: a static cache counts in one tensor, in place
        vars(cache)[PLACE] = cls(length, position)

    def steps_ahead(self, cache: Cache, batch: int) -> torch.Tensor | int:
        """Steps of the rotary text axis less tokens, (batch, 1)."""
        # Without the token axis, or with other rows than before, it is not known how far each row is ahead.
        if len(self.position) == 4 and self.position.shape[1] == batch:
            ahead = (self.position[1] - self.position[0])[:, None]
            # Where no row is ahead there was no image, and cutting tokens changes nothing.
            if cache.get_seq_length() == self.length or not ahead.any():
                return ahead
        raise ValueError(
            "where this cache ends on the rotary axes is not known (it was cropped, its rows were selected, or it was "
            "written with rotary positions alone): pass position_ids, the last of get_position_ids(...) over all of "
            "input_ids and image_grids"
        )
