"""Keys and values in memory that is reserved ahead, and where a cache ends on the rotary axes.

Knows shapes; no weights, no tokens.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .configuration_nextflow import NextFlowConfig


PLACE = "nextflow_place"  # attribute of a cache that holds its [`CachePlace`]


class NextFlowCacheLayer(DynamicLayer):
    """
    A dynamic layer whose keys and values fill the front of memory that is reserved for those to come: a block is
    written in place, and nothing is copied.

    What replaces `keys` and `values` (beams, offloading, a gather) works as on transformers' layer; it leaves no room
    behind them, and the next update makes some.

    Args:
        reserved (`int`, *optional*, defaults to 0): Tokens that the first update makes room for.
    """

    room = 256  # tokens that are added to what is needed, where not enough was reserved

    def __init__(self, reserved: int = 0):
        self.reserved = reserved
        self.length = self.num_values = 0
        super().__init__()

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
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
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
    cache.layers[:] = [NextFlowCacheLayer(length) for _ in cache.layers]
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
        return getattr(cache, PLACE, None)

    @classmethod
    def mark(cls, cache: Cache, position: torch.Tensor) -> None:
        """Let the cache know the positions (3 or 4, batch) of its last token."""
        length = cache.get_seq_length() + 0  # a copy: a static cache counts in one tensor, in place
        vars(cache)[PLACE] = cls(length, position)

    def steps_ahead(self, cache: Cache, batch: int) -> torch.Tensor | int:
        """Steps of the rotary text axis less tokens, (batch, 1)."""
        # With the rotary axes alone (3), or other rows by now, nothing says how far each row is ahead.
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
