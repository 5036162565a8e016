"""A map in overlapping tiles, for modules that enlarge it: less memory at once, and no seams.

Pure functions of maps and sizes. Knows nothing of what the module does, but that it multiplies both sides by one
factor.
"""

import math
from collections.abc import Callable

import torch


def in_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], maps: torch.Tensor, *, size: int, overlap: int
) -> torch.Tensor:
    """
    `function` of maps (n, channels, height, width), on tiles of at most `size` by `size` that overlap by at least
    `overlap`. Where tiles overlap, their results are blended: each fades out linearly towards its own border.
    """
    height, width = maps.shape[2:]
    total = weights = None
    for top in tile_starts(height, size=size, overlap=overlap):
        for left in tile_starts(width, size=size, overlap=overlap):
            result = function(maps[:, :, top : top + size, left : left + size])
            rows, columns = min(size, height), min(size, width)
            factor = result.shape[2] // rows
            if total is None:
                total = result.new_zeros(*result.shape[:2], factor * height, factor * width, dtype=torch.float32)
                weights = total.new_zeros(factor * height, factor * width)
            window = torch.outer(
                _fade(rows, top, height, overlap=overlap, factor=factor),
                _fade(columns, left, width, overlap=overlap, factor=factor),
            ).to(total.device)
            place = (slice(factor * top, factor * (top + rows)), slice(factor * left, factor * (left + columns)))
            total[:, :, *place] += result * window
            weights[place] += window
    return (total / weights).to(result.dtype)


def tile_starts(length: int, *, size: int, overlap: int) -> list[int]:
    """Where tiles begin along a side of `length`: as few as cover it, spread evenly, all of one size."""
    if length <= size:
        return [0]
    count = math.ceil((length - overlap) / (size - overlap))
    return [round(index * (length - size) / (count - 1)) for index in range(count)]


def _fade(cells: int, start: int, length: int, *, overlap: int, factor: int) -> torch.Tensor:
    """Weights (cells * factor,) along a side of a tile: rising from a border that is none of the map, and falling."""
    steps = (torch.arange(cells * factor) + 0.5) / max(overlap * factor, 1)
    weights = torch.ones(cells * factor)
    if start > 0:
        weights = torch.minimum(weights, steps)
    if start + cells < length:
        weights = torch.minimum(weights, steps.flip(0))
    return weights


__all__ = ["in_tiles", "tile_starts"]
