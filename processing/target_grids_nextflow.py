"""The schedule of an image to draw, as options of a call describe it. Knows sizes, not sequences."""

from collections.abc import Mapping
from typing import Any

from transformers.utils import logging

from .scale_schedule_nextflow import ScaleSchedule


logger = logging.get_logger(__name__)


def size_options(options: Mapping[str, Any]) -> list[str]:
    """Names of the options given that describe the image to draw."""
    names = ("target_grids", "aspect_ratio", "height", "width")
    return [name for name in names if options.get(name) is not None]


def requested_grids(
    schedule: ScaleSchedule, options: Mapping[str, Any], *, resolution: int | None, default: int
) -> list[list[int]]:
    """
    Row of `image_grids` that the options describe; without wishes a square's. Of the `resolution`, where one is given,
    else of the `default` or, for a size in pixels, of one that fits.
    """
    wishes = size_options(options)
    if len(wishes) > 1 and wishes != ["height", "width"]:
        raise ValueError(f"got {wishes}, expected one of target_grids, aspect_ratio, or height and width")
    num_scales = schedule.num_scales(resolution or default)
    if "target_grids" in wishes:
        grids = schedule.check_grids(options["target_grids"])
    elif "aspect_ratio" in wishes:
        grids = schedule.grids(schedule.bucket_from_aspect_ratio(options["aspect_ratio"]), num_scales)
    elif len(wishes) == 1:
        raise ValueError(f"got only {wishes[0]}, expected height and width")
    elif wishes:
        grids = grids_of_size(schedule, options["height"], options["width"], resolution=resolution, default=default)
    else:
        grids = schedule.grids(schedule.nearest_bucket(1, 1), num_scales)
    return schedule.image_grids([grids])[0]


def grids_of_size(
    schedule: ScaleSchedule, height: int, width: int, *, resolution: int | None, default: int
) -> list[tuple[int, int]]:
    """
    The schedule of a size in pixels: the nearest bucket, at `resolution` if given, else at the level that has exactly
    this size, else at the `default` level or the halving of it that is nearest in area.
    """
    bucket = schedule.nearest_bucket(height, width)
    sizes = {level: schedule.pixel_size(bucket, schedule.num_scales(level)) for level in schedule.resolutions}
    exact = [level for level, size in sizes.items() if size == (height, width)]
    if resolution is None and exact:
        resolution = exact[-1]
    elif resolution is None:
        halvings = range(default.bit_length())
        levels = [level for level in schedule.resolutions if any(level << n == default for n in halvings)]

        def distance(level: int) -> float:
            area = sizes[level][0] * sizes[level][1]
            return max(area / (height * width), height * width / area)

        resolution = min(levels, key=distance)
    if sizes[resolution] != (height, width):
        logger.warning(
            f"the image to draw is {sizes[resolution][0]} x {sizes[resolution][1]} pixels (height x width), the "
            f"size of the bucket nearest to the {height} x {width} asked for"
        )
    return schedule.grids(bucket, schedule.num_scales(resolution))


__all__ = ["grids_of_size", "requested_grids", "size_options"]
