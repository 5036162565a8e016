"""The settings of `generate`: transformers' for text, ours for images, and what a mode refuses by name.

Knows settings, not models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from .image_settings_nextflow import CONFIG_NAMES, FORMAT, in_this_format
from .sampling_nextflow import scale_plan


logger = logging.get_logger(__name__)

# Settings of text that callers pass to every mode: an image ignores them.
_OF_NO_CONSEQUENCE = {
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "num_beams",
    "pad_token_id",
    "return_dict_in_generate",
}


class NextFlowGenerationConfig(GenerationConfig):
    r"""
    A `GenerationConfig` that also says how images are sampled. `temperature`, `top_k` and `top_p` are transformers',
    for text; images have settings of their own. Those "per scale" are a number for all scales or a list with an entry
    for each.

    Args:
        guidance_scale (`float` or `list[float]`, *optional*, defaults to 1.0):
            Classifier-free guidance of images towards the text, per scale. 1 is none; anything else needs an
            unconditional prompt. Text is sampled without it.
        guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            `"linear"` lets a single guidance grow from 1 at the first scale to its value at the last; `"early"` leaves
            it out at the last two scales, which take most of the time.
        image_guidance_scale (`float` or `list[float]`, *optional*, defaults to 1.0):
            Guidance of images towards the source images, per scale. It applies where the prompt has any, and needs an
            unconditional prompt without them.
        image_temperature (`float` or `list[float]`, *optional*, defaults to 1.0): Per scale. 0 takes the best code.
        image_top_k (`int` or `list[int]`, *optional*, defaults to 0): Codes to sample from, per scale. 0 is all.
        image_top_p (`float` or `list[float]`, *optional*, defaults to 1.0): Mass to sample from, per scale.
        image_target_grids (`list[list[int]]`, *optional*):
            (height, width) of every scale of an image to sample, where neither the call nor an image before it says.
        max_images (`int`, *optional*, defaults to 4): Images that a row may begin in `generation_mode="interleaved"`.
        nextflow_format (`int`, *optional*, defaults to 2):
            Version of these names. Files without it are of version 1, whose names [`from_dict`] translates.
        kwargs: Everything of `GenerationConfig`.
    """

    def __init__(
        self,
        *,
        image_target_grids: Sequence[Sequence[int]] | None = None,
        max_images: int | None = None,
        nextflow_format: int = FORMAT,
        **kwargs,
    ):
        if nextflow_format != FORMAT:
            raise ValueError(f"nextflow_format is {nextflow_format}, expected {FORMAT}: update nextflow-hf")
        for name in CONFIG_NAMES.values():  # left in `kwargs`: transformers has a `guidance_scale`, too
            setattr(self, name, kwargs.get(name))
        self.image_target_grids = image_target_grids
        self.max_images = max_images
        self.nextflow_format = nextflow_format
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs) -> None:
        """
        Check the settings, those of images included.

        Raises:
            `ValueError`: for a setting out of its range, for lists per scale of different lengths, for a negative
            `max_images`, and for `image_target_grids` that do not begin with a single cell.
        """
        super().validate(*args, **kwargs)
        settings = {name: getattr(self, own) for name, own in CONFIG_NAMES.items()}
        settings = {name: value for name, value in settings.items() if value is not None}
        lengths = {
            CONFIG_NAMES[name]: len(value) for name, value in settings.items() if isinstance(value, (list, tuple))
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"image settings per scale must have one length, got {lengths}")
        scale_plan([(1, 1)] * max(lengths.values(), default=1), CONFIG_NAMES, **settings)
        if self.max_images is not None and self.max_images < 0:
            raise ValueError(f"max_images is {self.max_images}, expected at least 0")
        if self.image_target_grids is not None and list(self.image_target_grids[0]) != [1, 1]:
            raise ValueError(f"image_target_grids must start with [1, 1], got {self.image_target_grids[0]}")

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "NextFlowGenerationConfig":
        """transformers' method, with a result of this class."""
        return cls.from_plain(GenerationConfig.from_model_config(model_config))

    @classmethod
    def from_plain(cls, generation_config: GenerationConfig) -> "NextFlowGenerationConfig":
        """The same settings as an object of this class, which keeps those of images when it is saved and loaded."""
        return cls(**{**generation_config.to_dict(), "_from_model_config": None})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "NextFlowGenerationConfig":
        """
        The settings of a file. In version 1 `image_guidance_scale` and `image_guidance_schedule` were the guidance
        towards the text. A `guidance_scale` was transformers', of text, which only a call can ask for now: a warning
        says that it is left out.
        """
        if config_dict.get("nextflow_format", 1) == 1:
            if (scale := config_dict.get("guidance_scale")) not in (None, 1):
                logger.warning(f"left out guidance_scale={scale} of an old generation config: pass it to `generate`")
        config = super().from_dict(in_this_format(config_dict), **kwargs)
        return config  # pyright: ignore[reportReturnType]  # it is a `cls`

    def to_diff_dict(self) -> dict[str, Any]:
        """Without what is unset; transformers does that for its own names only."""
        unset = {*CONFIG_NAMES.values(), "image_target_grids", "max_images"}
        settings = super().to_diff_dict()
        return {name: value for name, value in settings.items() if value is not None or name not in unset}


def refuse_options(options: Mapping[str, Any], mode: str, names: Sequence[str]) -> None:
    """Raise where a call has options that mean nothing in this mode."""
    names = ("assistant_model", "custom_generate", "prefix_allowed_tokens_fn", "synced_gpus", *names)
    for name in names:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"generation_mode={mode!r} does not go with {name}")


def refuse_text_settings(options: Mapping[str, Any]) -> None:
    """
    Raise where a call for an image has settings of text. The generation config may have some, for text.
    """
    names = vars(GenerationConfig()).keys() - _OF_NO_CONSEQUENCE
    for name in sorted(names & options.keys()):
        value, default = options[name], name == "use_cache"
        if not (value is None or value is default or (value == 1 and value is not True)):  # penalties of 1 are none
            raise ValueError(f"generation_mode='image' does not go with {name}, got {value!r}: it is about text")


def refuse_config(config: GenerationConfig, mode: str) -> None:
    """Raise where a generation config asks for what this mode cannot do."""
    if config.num_beams > 1:
        raise ValueError(f"generation_mode={mode!r} does not go with beams, got num_beams={config.num_beams}")
    names = ["prompt_lookup_num_tokens", "assistant_early_exit"]
    if mode == "interleaved":
        # Undefined with images in between: per-step scores, token lengths, fixed-size caches.
        names += ["output_scores", "output_logits", "output_attentions", "output_hidden_states"]
        names += ["min_length", "min_new_tokens", "forced_eos_token_id", "exponential_decay_length_penalty"]
        names += ["cache_implementation", "prefill_chunk_size", "token_healing"]
        if config.use_cache is False:
            raise ValueError("generation_mode='interleaved' does not go without a cache, got use_cache=False")
    for name in names:
        value = getattr(config, name, None)
        if value and (name, value) != ("cache_implementation", "dynamic"):
            raise ValueError(f"generation_mode={mode!r} does not go with {name}, got {value!r}")
