"""The settings of sampling images: defaults, ranges, and their names in a generation config.

Knows numbers and names only; imports no torch, so that a file can be read without it.
"""

import math
from typing import NamedTuple


class ImageSetting(NamedTuple):
    """A setting of images: a number in [0, highest] for every scale, of the type of its default, or a word."""

    default: float | int | str  # where neither the call nor the generation config has a value
    highest: float = math.inf
    words: tuple[str, ...] = ()


IMAGE_SETTINGS = {
    "guidance_scale": ImageSetting(1.0),
    "guidance_schedule": ImageSetting("constant", words=("constant", "linear", "early")),
    "temperature": ImageSetting(1.0),
    "top_k": ImageSetting(0),
    "top_p": ImageSetting(1.0, highest=1.0),
    "image_guidance_scale": ImageSetting(1.0),
}
IMAGE_DEFAULTS = {name: setting.default for name, setting in IMAGE_SETTINGS.items()}
# Names in the generation config, where `temperature`, `top_k` and `top_p` are transformers', for text.
CONFIG_NAMES = {
    name: f"image_{name}" if name in ("temperature", "top_k", "top_p") else name for name in IMAGE_DEFAULTS
}
# How the paper samples in reinforcement learning (§3.2.5; VAR-RL, arXiv:2601.02256): VAR's ramp to its cfg 5, which is
# a guidance of 6 in the definition of `guide`.
PAPER_SAMPLING = {
    "guidance_scale": 6.0,
    "guidance_schedule": "linear",
    "image_temperature": 1.0,
    "image_top_k": 2,
    "image_top_p": 0.9,
}
DEFAULT_MAX_IMAGES = 4
FORMAT = 2
FORMAT_1_NAMES = {"image_guidance_scale": "guidance_scale", "image_guidance_schedule": "guidance_schedule"}


def in_this_format(saved: dict) -> dict:
    """The settings of a file of any version, under the names of this one."""
    if saved.get("nextflow_format", 1) != 1:
        return saved
    others = {name: value for name, value in saved.items() if name not in FORMAT_1_NAMES}
    return {**others, **{new: saved.get(old) for old, new in FORMAT_1_NAMES.items()}, "nextflow_format": FORMAT}
