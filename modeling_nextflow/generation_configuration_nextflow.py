"""What `generate` does where a call says nothing: transformers' settings for text, ours for images."""

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .sampling_nextflow import PerScale, scale_plan


# Where neither the call nor the generation config says anything; there the names have `image_` in front.
IMAGE_DEFAULTS = {
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}
# How the paper samples in reinforcement learning (§3.2.5; VAR-RL, arXiv:2601.02256): VAR's ramp to its cfg 5, which is
# a guidance of 6 in the definition of `guide`.
PAPER_SAMPLING = {
    "image_guidance_scale": 6.0,
    "image_guidance_schedule": "linear",
    "image_temperature": 1.0,
    "image_top_k": 2,
    "image_top_p": 0.9,
}
DEFAULT_MAX_IMAGES = 4


class NextFlowGenerationConfig(GenerationConfig):
    r"""
    A `GenerationConfig` that also says how images are drawn. The settings of images have names of their own: text and
    images are sampled differently. Those "per scale" are a number for all scales or a list with an entry for each.

    Args:
        image_guidance_scale (`float` or `list[float]`, *optional*, defaults to 1.0):
            Classifier-free guidance, per scale. 1 is none; anything else needs an unconditional prompt.
        image_guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            `"linear"` lets a single guidance grow from 1 at the first scale to its value at the last.
        image_temperature (`float` or `list[float]`, *optional*, defaults to 1.0): Per scale. 0 takes the best code.
        image_top_k (`int` or `list[int]`, *optional*, defaults to 0): Codes to sample from, per scale. 0 is all.
        image_top_p (`float` or `list[float]`, *optional*, defaults to 1.0): Mass to sample from, per scale.
        image_target_grids (`list[list[int]]`, *optional*):
            (height, width) of every scale of an image to draw, where neither the call nor an image before it says.
        max_images (`int`, *optional*, defaults to 4): Images that a row may begin in `generation_mode="interleaved"`.
        kwargs: Everything of `GenerationConfig`.
    """

    def __init__(
        self,
        *,
        image_guidance_scale: PerScale = None,
        image_guidance_schedule: str | None = None,
        image_temperature: PerScale = None,
        image_top_k: PerScale = None,
        image_top_p: PerScale = None,
        image_target_grids: Sequence[Sequence[int]] | None = None,
        max_images: int | None = None,
        **kwargs,
    ):
        self.image_guidance_scale = image_guidance_scale
        self.image_guidance_schedule = image_guidance_schedule
        self.image_temperature = image_temperature
        self.image_top_k = image_top_k
        self.image_top_p = image_top_p
        self.image_target_grids = image_target_grids
        self.max_images = max_images
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs) -> None:
        super().validate(*args, **kwargs)
        settings = {name: getattr(self, f"image_{name}") for name in IMAGE_DEFAULTS}
        settings = {name: value for name, value in settings.items() if value is not None}
        lengths = {name: len(value) for name, value in settings.items() if isinstance(value, (list, tuple))}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"image settings per scale must have one length, got {lengths}")
        scale_plan([(1, 1)] * max(lengths.values(), default=1), prefix="image_", **settings)
        if self.max_images is not None and self.max_images < 0:
            raise ValueError(f"max_images is {self.max_images}, expected at least 0")
        if self.image_target_grids is not None and list(self.image_target_grids[0]) != [1, 1]:
            raise ValueError(f"image_target_grids must start with [1, 1], got {self.image_target_grids[0]}")

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "NextFlowGenerationConfig":
        return cls.from_plain(GenerationConfig.from_model_config(model_config))

    @classmethod
    def from_plain(cls, generation_config: GenerationConfig) -> "NextFlowGenerationConfig":
        """The same settings as one of ours, which does not forget those of images when it is saved and loaded."""
        return cls(**{**generation_config.to_dict(), "_from_model_config": None})

    def to_diff_dict(self) -> dict[str, Any]:
        """Without what is unset; transformers does that for its own names only."""
        unset = {*(f"image_{name}" for name in IMAGE_DEFAULTS), "image_target_grids", "max_images"}
        settings = super().to_diff_dict()
        return {name: value for name, value in settings.items() if value is not None or name not in unset}


__all__ = ["DEFAULT_MAX_IMAGES", "IMAGE_DEFAULTS", "PAPER_SAMPLING", "NextFlowGenerationConfig"]
