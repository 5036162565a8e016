"""How one scale is drawn: settings fanned out to scales, guidance, sampling. Pure functions of numbers and logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


PerScale = float | int | None | Sequence[float | int | None]


@dataclass(frozen=True)
class ScaleStep:
    """How one scale is drawn. `guidance_scale` 1 and `source_guidance_scale` 1 need no unconditional pass;
    `temperature` 0 takes the best code; `top_k` 0 and `top_p` 1 leave all codes."""

    grid: tuple[int, int]
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float
    source_guidance_scale: float = 1.0

    @property
    def num_conditions(self) -> int:
        """Prompts that guidance compares: the prompt alone, without its text, and without its source images."""
        if self.source_guidance_scale != 1:
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
    source_guidance_scale: PerScale = 1.0,
) -> list[ScaleStep]:
    """Fan scalars or per-scale lists out to one [`ScaleStep`] a scale.

    `guidance_schedule="linear"` is VAR's ramp: a scalar guidance grows from 1 at the first scale to its value at the
    last (VAR's own `cfg` is this value minus 1).
    """
    num_scales = len(grids)

    def per_scale(name: str, value: PerScale, default: float, low: float, high: float) -> list[float]:
        values = list(value) if isinstance(value, Sequence) else [value] * num_scales
        if len(values) != num_scales:
            raise ValueError(f"{name} has {len(values)} entries, expected one for each of the {num_scales} scales")
        values = [default if entry is None else entry for entry in values]
        for entry in values:
            if not low <= entry <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {entry}")
        return values

    guidance = per_scale("guidance_scale", guidance_scale, 1.0, 0.0, float("inf"))
    if guidance_schedule == "linear":
        if not isinstance(guidance_scale, Sequence):
            guidance = [1 + (g - 1) * k / max(num_scales - 1, 1) for k, g in enumerate(guidance)]
    elif guidance_schedule != "constant":
        raise ValueError(f"guidance_schedule must be 'constant' or 'linear', got {guidance_schedule!r}")
    columns = (
        guidance,
        per_scale("temperature", temperature, 1.0, 0.0, float("inf")),
        per_scale("top_k", top_k, 0, 0, float("inf")),
        per_scale("top_p", top_p, 1.0, 0.0, 1.0),
        per_scale("source_guidance_scale", source_guidance_scale, 1.0, 0.0, float("inf")),
    )
    return [ScaleStep(tuple(grid), *settings) for grid, *settings in zip(grids, *columns)]


def guide(
    logits: torch.FloatTensor,
    unconditional: torch.FloatTensor | None,
    scale: float,
    *,
    imageless: torch.FloatTensor | None = None,
    source_scale: float = 1.0,
) -> torch.FloatTensor:
    """
    Classifier-free guidance: `unconditional + scale * (logits - unconditional)`. Where `unconditional` lacks the text
    alone, and `imageless` the source images as well, text and images are guided apart (InstructPix2Pix,
    arXiv:2211.09800, eq. 3): `imageless + source_scale * (unconditional - imageless) + scale * (logits -
    unconditional)`.
    """
    if unconditional is None:
        return logits
    guided = unconditional.lerp(logits, scale)
    return guided if imageless is None else guided + (source_scale - 1) * (unconditional - imageless)


def sample_codes(
    logits: torch.FloatTensor, step: ScaleStep, generators: Sequence[torch.Generator | None]
) -> torch.LongTensor:
    """Draw one code per cell from logits (batch, cells, codebook_size), in fp32.

    By inverse transform with one uniform number a cell from the row's own generator: a row's codes do not depend on
    the rows beside it, and a CPU generator works for any device.
    """
    if step.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / step.temperature
    vocabulary = None
    if 0 < step.top_k < scores.shape[-1]:
        scores, vocabulary = scores.topk(step.top_k, dim=-1)
    elif step.top_p < 1:
        scores, vocabulary = scores.sort(dim=-1, descending=True)
    probabilities = scores.softmax(-1)
    if step.top_p < 1:  # keep the codes before which less than top_p of the mass lies, always the first
        probabilities = probabilities.masked_fill(probabilities.cumsum(-1) - probabilities > step.top_p, 0)
    choice = inverse_transform(probabilities, generators)
    return choice if vocabulary is None else vocabulary.gather(-1, choice[..., None])[..., 0]


def fill_codes(
    logits: torch.FloatTensor,
    step: ScaleStep,
    generators: Sequence[torch.Generator | None],
    given: torch.LongTensor,
    is_given: torch.BoolTensor,
) -> torch.LongTensor:
    """Codes (batch, cells): `given` where `is_given`, elsewhere drawn. No number is drawn for a row that has all."""
    rows = (~is_given.all(dim=1)).nonzero()[:, 0]
    drawn = sample_codes(logits[rows], step, [generators[row] for row in rows.tolist()])
    return given.where(is_given, given.index_copy(0, rows, drawn))


def inverse_transform(
    probabilities: torch.FloatTensor, generators: Sequence[torch.Generator | None]
) -> torch.LongTensor:
    """One draw (batch, cells) from each of the weights (batch, cells, choices), which need not sum to one."""
    batch, cells = probabilities.shape[:2]
    device = probabilities.device
    uniform = torch.stack(
        [
            torch.rand(cells, 1, generator=generator, device=generator.device if generator else device).to(device)
            for generator in (generators if len(generators) else [None] * batch)
        ]
    )
    cumulative = probabilities.cumsum(-1)
    total = cumulative[..., -1:].contiguous()
    choice = torch.searchsorted(cumulative, uniform * total, right=True)
    # Rounding can put the number on the total itself; the choice that reaches it is then meant.
    return torch.minimum(choice, torch.searchsorted(cumulative, total))[..., 0]


__all__ = ["PerScale", "ScaleStep", "fill_codes", "guide", "inverse_transform", "sample_codes", "scale_plan"]
