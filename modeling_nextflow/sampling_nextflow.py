"""How one scale is drawn: settings fanned out to scales, guidance, sampling. Pure functions of numbers and logits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch


GUIDANCE_SCHEDULES = ("constant", "linear", "early")
PerScale = float | int | None | Sequence[float | int | None]


@dataclass(frozen=True)
class ScaleStep:
    """How one scale is drawn. `guidance_scale` 1 and `image_guidance_scale` 1 need no unconditional pass;
    `temperature` 0 takes the best code; `top_k` 0 and `top_p` 1 leave all codes."""

    grid: tuple[int, int]
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float
    image_guidance_scale: float = 1.0

    @property
    def num_conditions(self) -> int:
        """Prompts that guidance compares: the prompt alone, without its text, and without its source images."""
        if self.image_guidance_scale != 1:
            return 3
        return 1 if self.guidance_scale == 1 else 2


def scale_plan(
    grids: Sequence[tuple[int, int]],
    *,
    guidance_scale: PerScale = 1.0,
    guidance_schedule: str = "constant",
    temperature: PerScale = 1.0,
    top_k: PerScale = 0,
    top_p: PerScale = 1.0,
    image_guidance_scale: PerScale = 1.0,
    names: Mapping[str, str] = {},
) -> list[ScaleStep]:
    """Fan scalars or per-scale lists out to one [`ScaleStep`] a scale.

    `guidance_schedule="linear"` is VAR's ramp: a scalar guidance grows from 1 at the first scale to its value at the
    last (VAR's own `cfg` is this value minus 1). `"early"` leaves scalar guidance out on the last two scales, where
    most of the time goes (Switti, arXiv:2412.01819). `names` are what errors call the settings.

    Raises:
        `ValueError`: on lists of another length, and on entries that are no numbers of the setting's range.
    """
    if guidance_schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule is {guidance_schedule!r}, expected one of {list(GUIDANCE_SCHEDULES)}")
    last = len(grids) - 1
    settings = {
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "image_guidance_scale": image_guidance_scale,
    }
    plan = []
    for index, grid in enumerate(grids):
        step = {name: _setting_of(name, value, index, len(grids), names) for name, value in settings.items()}
        for name in ("guidance_scale", "image_guidance_scale"):
            if isinstance(settings[name], (list, tuple)):
                continue
            if guidance_schedule == "early" and index >= max(1, last - 1):
                step[name] = 1.0
            elif guidance_schedule == "linear" and name == "guidance_scale":
                step[name] = 1 + (step[name] - 1) * index / max(last, 1)
        plan.append(ScaleStep((grid[0], grid[1]), **step))
    return plan


def _setting_of(name: str, value: Any, index: int, count: int, names: Mapping[str, str]) -> Any:
    """The setting of one of `count` scales, as the type of its default; NumPy's scalars are numbers, too."""
    shown = names.get(name, name)
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{shown} has {len(value)} entries, expected one for each of the {count} scales")
        value = value[index]
    default, high = (0, math.inf) if name == "top_k" else (1.0, 1.0 if name == "top_p" else math.inf)
    if value is None:
        return default
    if not _is_number(value):
        raise ValueError(
            f"{shown} is {value!r} ({type(value).__name__}), expected a number or a list with one a scale"
        )
    if not (0 <= value <= high and math.isfinite(value)):
        raise ValueError(f"{shown} is {value}, expected a number in [0, {high}]")
    if type(default)(value) != value:
        raise ValueError(f"{shown} is {value}, expected a whole number")
    return type(default)(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def guides(scale: PerScale) -> bool:
    """Whether a guidance scale asks for an unconditional pass at any scale."""
    return any(value not in (None, 1) for value in (scale if isinstance(scale, (list, tuple)) else [scale]))


def guide(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    scale: float,
    *,
    imageless: torch.Tensor | None = None,
    image_scale: float = 1.0,
) -> torch.Tensor:
    """
    Classifier-free guidance: `unconditional + scale * (logits - unconditional)`. Where `unconditional` lacks the text
    alone, and `imageless` the source images as well, text and images are guided apart (InstructPix2Pix,
    arXiv:2211.09800, eq. 3): `imageless + image_scale * (unconditional - imageless) + scale * (logits -
    unconditional)`.
    """
    if unconditional is None:
        return logits
    guided = unconditional.lerp(logits, scale)
    return guided if imageless is None else guided + (image_scale - 1) * (unconditional - imageless)


def sample_codes(logits: torch.Tensor, step: ScaleStep, numbers: torch.Tensor | None) -> torch.Tensor:
    """Sample one code per cell from logits (batch, cells, codebook_size), in fp32. `numbers` as in [`pick`]; without
    them, and at temperature 0, the best code."""
    if step.temperature == 0 or numbers is None:
        return logits.argmax(-1)
    scores, vocabulary = logits.float(), None
    if 0 < step.top_k < scores.shape[-1]:
        scores, vocabulary = scores.topk(step.top_k, dim=-1)
    elif step.top_p < 1:
        scores, vocabulary = scores.sort(dim=-1, descending=True)
    scores = scores / step.temperature
    if step.top_p < 1:  # keep the codes before which less than top_p of the mass lies, always the first
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities.cumsum(-1) - probabilities > step.top_p, -math.inf)
    return pick(scores, numbers, vocabulary)


def largest_score(logits: torch.Tensor, step: ScaleStep) -> torch.Tensor:
    """The largest absolute score that [`sample_codes`] computes with: NaN or infinite where any score is."""
    low, high = logits.aminmax()  # a CPU takes 20 times as long for `vector_norm`
    return torch.maximum(-low, high) / (step.temperature or 1)


def random_numbers(
    generators: Sequence[torch.Generator | None], batch: int, cells: int, device: torch.device
) -> torch.Tensor:
    """Numbers (batch, cells, 1) for [`pick`], of each row's own generator. A CPU generator works for any device."""
    return torch.stack(
        [
            torch.randint(2**63 - 1, (cells, 1), generator=one, device=one.device if one else device).to(device)
            for one in (generators if len(generators) else [None] * batch)
        ]
    )


def sample(scores: torch.Tensor, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
    """One sample (batch, cells) of each softmax of `scores` (batch, cells, choices); see [`pick`]."""
    return pick(scores, random_numbers(generators, scores.shape[0], scores.shape[1], scores.device))


def pick(scores: torch.Tensor, numbers: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """
    One sample (batch, cells) of each softmax of `scores` (batch, cells, choices), by the Gumbel-max trick. `ids` are
    those of the choices, by default their places.

    The noise of a choice comes from its cell's number (batch, cells, 1) and its id: a sample depends neither on the
    other rows of its batch nor on the order of the choices. Where rounding changes the scores, it changes only if the
    two best are as close as that, noise included. (By inverse transform, every change of order or mass among the
    choices before it would move a sample.)
    """
    choices = torch.arange(scores.shape[-1], device=scores.device) if ids is None else ids
    uniform = _splitmix(numbers, choices).float() * 2.0**-63
    choice = (scores - (-torch.log1p(-uniform)).log()).argmax(-1)
    return choice if ids is None else ids.gather(-1, choice[..., None])[..., 0]


def _splitmix(seeds: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Number `indices` of SplitMix64's sequence from `seeds`, in [0, 2**63): on any device, without a state."""

    bits = seeds + (indices + 1) * (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (64 - shift) - 1))  # with a logical shift
        bits.mul_(factor)
    return bits.bitwise_and_(2**63 - 1)


__all__ = [
    "PerScale",
    "ScaleStep",
    "guide",
    "guides",
    "largest_score",
    "pick",
    "random_numbers",
    "sample",
    "sample_codes",
    "scale_plan",
]
