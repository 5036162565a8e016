"""Keys and values in memory that is reserved ahead, and where a cache ends on the rotary axes.

Knows shapes; no weights, no tokens.
"""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class NextFlowCacheLayer(DynamicLayer):
    """
    A dynamic layer whose keys and values fill the front of memory that is reserved for those to come: a block is
    written in place, and nothing is copied.

    What replaces `keys` and `values` (beams, offloading, a gather) works as on transformers' layer; it leaves no room
    behind them, and the next update makes some.
    """

    room = 256  # tokens that are added to what is needed, where nothing was reserved

    def __init__(self) -> None:
        self.length = self.num_values = self.reserved = 0
        super().__init__()

    @classmethod
    def of(cls, layer: DynamicLayer) -> "NextFlowCacheLayer":
        """A layer that goes on from what `layer` holds."""
        own = cls()
        if layer.is_initialized:
            own.dtype, own.device, own.is_initialized = layer.dtype, layer.device, True
            own.keys, own.values = layer.keys, layer.values
        return own

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

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens: at once or, in an empty layer, with the first of them."""
        self.reserved = self.length + count
        if self._keys is not None and self._keys.shape[2] < self.reserved:
            self._move(self.reserved)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if end > self._keys.shape[2]:
            self._move(self.reserved if self.reserved >= end else end + self.room)
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_states, value_states
        self.length = self.num_values = end
        return self.keys, self.values

    def _move(self, capacity: int) -> None:
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        memory = self._keys, self._values
        super().crop(tokens_to_remove)
        self._keys, self._values = memory

    def part(self, rows: slice, padding: int) -> "NextFlowCacheLayer":
        """Some rows without their first `padding` tokens, in the same memory."""
        part = copy.copy(self)
        part._keys, part._values = self._keys[rows, :, padding:], self._values[rows, :, padding:]
        part.length = part.num_values = self.length - padding
        part.reserved = self.reserved - padding
        return part


def reserve(cache: DynamicCache, count: int = 0) -> None:
    """Let a dynamic cache grow in place, with room for `count` more tokens. Offloaded layers stay as they are."""
    if cache.offloading:
        return
    cache.layers = [NextFlowCacheLayer.of(one) if type(one) is DynamicLayer else one for one in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = NextFlowCacheLayer
    for layer in cache.layers:
        layer.reserve(count)


def part_of(cache: DynamicCache, rows: slice, padding: int = 0) -> DynamicCache:
    """Some rows of a cache without their first `padding` tokens, in the same memory."""
    part = copy.copy(cache)
    part.layers = [layer.part(rows, padding) for layer in cache.layers]
    return part


def caches_of_layers(past_key_values: Cache | None, count: int) -> list:
    """What each layer is given as its cache: its own layer of a dynamic one, which has the same `update`, else the
    whole. To find its part a layer reads its index, and torch.compile would make code for every one of them."""
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
    def after(cls, position_ids: torch.Tensor, cache: Cache) -> "CachePlace":
        return cls(cache.get_seq_length() + 0, position_ids[:, :, -1])  # + 0: a static cache's length is one tensor

    def steps_ahead(self, cache: Cache, batch: int) -> torch.Tensor | int:
        """Steps of the rotary text axis less tokens, (batch, 1)."""
        if len(self.position) == 4 and self.position.shape[1] == batch:
            ahead = (self.position[1] - self.position[0])[:, None]
            if cache.get_seq_length() == self.length or not ahead.any():
                return ahead
        raise ValueError(
            "where this cache ends on the rotary axes is not known (it was cropped, its rows were selected, or it was "
            "written with rotary positions alone): pass position_ids, the last of get_position_ids(...) over all of "
            "input_ids and image_grids"
        )


__all__ = ["CachePlace", "NextFlowCacheLayer", "caches_of_layers", "part_of", "reserve"]
