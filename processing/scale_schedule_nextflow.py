"""The scale schedule: which grids an image is sampled on, coarse to fine (§2.1, appendix A.1, table 14).

Two lines of arithmetic, exact for all 41 rows of the paper's table. The only owner of the rule: everything else gets
its result as data (`image_grids`). Knows numbers only: no tensors, no images, no tokens.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScaleSchedule:
    """
    Grids of every scale for every aspect ratio. A *bucket* `(a, b)` is an aspect ratio `a : b` (height : width), a
    *grid* `(h, w)` counts the cells of one scale, a *resolution* is the side in pixels of a
    square image.

    Args:
        scale_bases (`tuple[int, ...]`, *optional*, defaults to `(1, 2, ..., 48, 64)`): Side of each square grid.
        patch_size (`int` or `float`, *optional*, defaults to 16):
            Pixels per cell of the last grid, along each axis. Not whole where the cells of a fixed size are not.
        bucket_area (`int`, *optional*, defaults to 256):
            Largest `a * b`. A square number: its root is the side at which a bucket is its own grid.
        min_bucket_fill (`float`, *optional*, defaults to 0.9): Smallest share of `bucket_area` that `a * b` fills.
        max_aspect_ratio (`float`, *optional*, defaults to 4.0): Largest `max(a / b, b / a)`.
    """

    scale_bases: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
    patch_size: int | float = 16
    bucket_area: int = 256
    min_bucket_fill: float = 0.9
    max_aspect_ratio: float = 4.0

    def __post_init__(self):
        object.__setattr__(self, "scale_bases", tuple(self.scale_bases))  # JSON gives lists
        if self.scale_bases[:1] != (1,) or any(a >= b for a, b in pairwise(self.scale_bases)):
            raise ValueError(f"scale_bases must increase strictly from 1, got {self.scale_bases}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        if self.bucket_area < 1 or math.isqrt(self.bucket_area) ** 2 != self.bucket_area:
            raise ValueError(f"bucket_area must be a square number, got {self.bucket_area}")
        if not 0 < self.min_bucket_fill <= 1:
            raise ValueError(f"min_bucket_fill must be in (0, 1], got {self.min_bucket_fill}")
        if self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio must be at least 1, got {self.max_aspect_ratio}")

    @cached_property
    def max_scales(self) -> int:
        """Length of the longest schedule: the number of rows of an image in `image_grids`."""
        return len(self.scale_bases)

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """All aspect ratios `(a, b)` (height : width), from the widest to the tallest."""
        found = [
            (a, b)
            for a in range(1, self.bucket_area + 1)
            for b in range(1, self.bucket_area // a + 1)
            if a * b >= self.min_bucket_fill * self.bucket_area and max(a, b) <= self.max_aspect_ratio * min(a, b)
        ]
        if not found:
            raise ValueError(
                f"no bucket: no a * b in [{self.min_bucket_fill} * {self.bucket_area}, {self.bucket_area}] has a "
                f"ratio of at most {self.max_aspect_ratio}"
            )
        return tuple(sorted(found, key=lambda bucket: Fraction(*bucket)))

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Sides in pixels of the square images that end exactly on a scale."""
        return tuple(round(base * self.patch_size) for base in self.scale_bases)

    def num_scales(self, resolution: int) -> int:
        """
        Number of scales of a resolution, e.g. 12, 16, 18 for 256, 512, 1024 pixels. `ValueError` where there is none.
        """
        if resolution not in self.resolutions:
            raise ValueError(f"resolution is {resolution}, expected one of {list(self.resolutions)}")
        return self.resolutions.index(resolution) + 1

    def grids(self, bucket: tuple[int, int], num_scales: int) -> list[tuple[int, int]]:
        """The `num_scales` grids `(h, w)` of a bucket, coarse to fine."""
        if not 1 <= num_scales <= self.max_scales:
            raise ValueError(f"num_scales is {num_scales}, expected 1 to {self.max_scales}")
        reference = math.isqrt(self.bucket_area)
        # `round` of a Fraction is exact and half to even, as the table is; the first scale is one cell in every ratio.
        rows, columns = (
            [max(1, round(Fraction(side * base, reference))) for base in self.scale_bases[1:num_scales]]
            for side in bucket
        )
        return [(1, 1), *zip(rows, columns)]

    def pixel_size(self, bucket: tuple[int, int], num_scales: int) -> tuple[int, int]:
        """`(height, width)` in pixels of an image of this bucket: `patch_size` times its last grid."""
        height, width = self.grids(bucket, num_scales)[-1]
        return round(height * self.patch_size), round(width * self.patch_size)

    # Schedules are frozen and few, so it does no harm that the cache keeps them alive.
    @lru_cache(maxsize=1024)  # noqa: B019
    def nearest_bucket(self, height: float, width: float) -> tuple[int, int]:
        """
        The bucket whose ratio is nearest to `height : width` on a logarithmic scale. A ratio beyond `max_aspect_ratio`
        gets the outermost bucket; beyond five times that (`ValueError`) too little of the image would be left.
        """
        if not (height > 0 and width > 0 and math.isfinite(height) and math.isfinite(width)):
            raise ValueError(f"height and width must be positive, got {height} and {width}")
        ratio = max(height, width) / min(height, width)
        if ratio > 5 * self.max_aspect_ratio:
            raise ValueError(
                f"aspect ratio of {height} x {width} (height x width) is {ratio:.4g}, expected at most "
                f"{5 * self.max_aspect_ratio:g} (five times the widest bucket)"
            )

        def distance(bucket: tuple[int, int]) -> tuple[Fraction, int, Fraction]:
            # Exact, so that a transposed image gets the transposed bucket even where two are equally near: then the
            # one with more cells, then the squarer one.
            (a, b), true = bucket, Fraction(height) / Fraction(width)
            apart = Fraction(a, b) / true
            return max(apart, 1 / apart), -a * b, Fraction(max(a, b), min(a, b))

        return min(self.buckets, key=distance)

    def bucket_from_aspect_ratio(self, aspect_ratio: str) -> tuple[int, int]:
        """
        The bucket nearest to a ratio written the way screens are sold, `"width:height"`: `"16:9"` is wide. (Table 14
        prints height : width, and some of its labels disagree with their own grids, so no label is special here.)
        """
        try:
            width, height = (float(side) for side in aspect_ratio.split(":"))
        except ValueError:
            raise ValueError(f'aspect_ratio is {aspect_ratio!r}, expected "width:height" such as "16:9"') from None
        return self.nearest_bucket(height, width)

    def check_grids(self, grids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """`grids` as pairs of ints, or `ValueError`: 1 to `max_scales` pairs that start at (1, 1) and never shrink."""
        pairs = [(int(height), int(width)) for height, width in grids]
        if not 1 <= len(pairs) <= self.max_scales:
            raise ValueError(f"got {len(pairs)} grids, expected 1 to {self.max_scales}")
        if pairs[0] != (1, 1):
            raise ValueError(f"the first grid is {pairs[0]}, expected (1, 1)")
        for previous, current in pairwise(pairs):
            if current[0] < previous[0] or current[1] < previous[1]:
                raise ValueError(f"grids must not shrink, got {current} after {previous}")
        return pairs

    def image_grids(self, schedules: Sequence[Sequence[tuple[int, int]]]) -> list[list[list[int]]]:
        """One row per image, `(images, max_scales, 2)` as nested lists; rows after an image's last scale are zero."""
        return [
            [list(grid) for grid in grids] + [[0, 0]] * (self.max_scales - len(grids))
            for grids in map(self.check_grids, schedules)
        ]


def num_cells(grids: Sequence[Sequence[int]]) -> int:
    """Number of image codes of a schedule, zero rows included for free: the cells of all its grids."""
    return sum(int(height) * int(width) for height, width in grids)


@lru_cache
def square_grids(schedule: ScaleSchedule, resolution: int) -> tuple[tuple[int, int], ...]:
    """The grids of a square image."""
    return tuple(schedule.grids(schedule.nearest_bucket(1, 1), schedule.num_scales(resolution)))


def grids_of_size(
    schedule: ScaleSchedule, height: int, width: int, *, resolution: int | None, default: int
) -> list[tuple[int, int]]:
    """
    The schedule of a size in pixels: the nearest bucket, at `resolution` if given, else at the resolution that has
    exactly this size, else at the `default` or the halving of it that is nearest in area.
    """
    bucket = schedule.nearest_bucket(height, width)
    sizes = {side: schedule.pixel_size(bucket, schedule.num_scales(side)) for side in schedule.resolutions}
    exact = [side for side, size in sizes.items() if size == (height, width)]
    if resolution is None and exact:
        # Small grids of neighbouring resolutions may be equal after rounding: take the one with more scales.
        resolution = exact[-1]
    elif resolution is None:
        halvings = range(default.bit_length())
        sides = [side for side in schedule.resolutions if any(side << n == default for n in halvings)]

        def distance(side: int) -> float:
            area = sizes[side][0] * sizes[side][1]
            return max(area / (height * width), height * width / area)

        resolution = min(sides, key=distance)
    if sizes[resolution] != (height, width):
        logger.warning(
            f"the image to sample is {sizes[resolution][0]} x {sizes[resolution][1]} pixels (height x width), the "
            f"size of the bucket nearest to the {height} x {width} asked for"
        )
    return schedule.grids(bucket, schedule.num_scales(resolution))
