"""How one scale is sampled: settings, guidance, sampling, and what the transformer offers for it (§2.2, §3.2.5).

Pure functions of numbers and logits, and [`NextFlowSamplingInterface`]: embed the next scale, place its block, and
sample, guide or score codes. The sampling loop, reinforcement learning and the pipeline need nothing else, and no
place in the vocabulary. Knows the head and the codes, no prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import GenerationConfig
from transformers.utils import logging

from .configuration_nextflow import NextFlowConfig
from .fused_nextflow import linear_in_blocks
from .grids_nextflow import cell_coordinates, check_codes
from .image_settings_nextflow import CONFIG_NAMES, IMAGE_DEFAULTS, IMAGE_SETTINGS


if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel as Host  # what `GenerationMixin` asks of its class

    from . import backbone_nextflow, graphs_nextflow  # not `from .file import`: diffusers' loader would go in a circle

    NextFlowModel = backbone_nextflow.NextFlowModel
    PassGraphs = graphs_nextflow.PassGraphs
else:
    Host = object

logger = logging.get_logger(__name__)

CHOICES_IN_CACHE = 2**19  # scores that are selected from at once on a CPU: 2 MiB, and 4 MiB of places
PerScale = float | int | None | Sequence[float | int | None]


@dataclass(frozen=True)
class ScaleStep:
    """How one scale is sampled. `guidance_scale` 1 and `image_guidance_scale` 1 need no unconditional pass;
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


def scale_plan(grids: Sequence[tuple[int, int]], names: Mapping[str, str] = {}, /, **settings: Any) -> list[ScaleStep]:
    """Fan `settings`, those of [`IMAGE_SETTINGS`], out to one [`ScaleStep`] a scale: scalars or per-scale lists.

    `guidance_schedule="linear"` is VAR's ramp: a scalar guidance grows from 1 at the first scale to its value at the
    last (VAR's own `cfg` is this value minus 1). `"early"` leaves scalar guidance out on the last two scales, where
    most of the time goes (Switti, arXiv:2412.01819). `names` are what errors call the settings.

    Raises:
        `ValueError`: on lists of another length, and on entries that are no numbers of the setting's range.
        `TypeError`: on a setting that there is not.
    """
    if unknown := settings.keys() - IMAGE_SETTINGS.keys():
        raise TypeError(f"got {sorted(unknown)}, expected settings of images: {list(IMAGE_SETTINGS)}")
    settings = {**IMAGE_DEFAULTS, **settings}
    guidance_schedule, known = settings.pop("guidance_schedule"), IMAGE_SETTINGS["guidance_schedule"].words
    if guidance_schedule not in known:
        raise ValueError(f"guidance_schedule is {guidance_schedule!r}, expected one of {list(known)}")
    last, plan = len(grids) - 1, []
    for index, grid in enumerate(grids):
        step = {name: _setting_of(name, value, index, len(grids), names) for name, value in settings.items()}
        for name in ("guidance_scale", "image_guidance_scale"):
            if isinstance(settings[name], (list, tuple)):
                continue
            # A list has a value for each scale already.
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
    default, high, _ = IMAGE_SETTINGS[name]
    if value is None:
        return default
    # `bool` is a number to Python, and almost always a mistake here.
    if value is True or value is False or not issubclass(type(value), Real):
        raise ValueError(
            f"{shown} is {value!r} ({type(value).__name__}), expected a number or a list with one a scale"
        )
    if not (0 <= value <= high and math.isfinite(value)):
        raise ValueError(f"{shown} is {value}, expected a number in [0, {high}]")
    if type(default)(value) != value:
        raise ValueError(f"{shown} is {value}, expected a whole number")
    return type(default)(value)


@dataclass
class SampledScale:
    """
    What is there after a scale was sampled.

    Attributes:
        index: Number of the scale, from 0.
        step: How it was sampled.
        image_codes:
            (images, codes so far), scale-major. May be replaced by others: the next scale is sampled from the codes of
            this one. What was sampled from those before it stays.
        plan:
            The steps of all scales. Those after `index` may be replaced, to change how they are sampled, or removed,
            to stop.
        image_grids: (images, max_scales, 2), the schedules of the whole images.
    """

    index: int
    step: ScaleStep
    image_codes: torch.Tensor
    plan: list[ScaleStep]
    image_grids: torch.Tensor

    def change_guidance(self, **scales: PerScale) -> None:
        """
        Sample the scales to come with another `guidance_scale` or `image_guidance_scale`: a number, or a list with an
        entry for each scale.
        """
        for index in range(self.index + 1, len(self.plan)):
            own = {name: value[index] if isinstance(value, (list, tuple)) else value for name, value in scales.items()}
            own = {name: 1.0 if scale is None else scale for name, scale in own.items()}
            self.plan[index] = replace(self.plan[index], **own)


@dataclass
class ScaleInput:
    """
    What is known of a scale before the first is sampled.

    Attributes:
        generators: One an image.
        given: Codes (images, cells) that are taken as they are; `None` where there are none.
        is_given: (images, cells), which of them are; `None` for all.
        numbers: The randomness (images, cells, 1) of the others, see [`pick`]; `None` until it is needed.
    """

    generators: Sequence[torch.Generator | None]
    given: torch.Tensor | None = None
    is_given: torch.Tensor | None = None
    numbers: torch.Tensor | None = None


def prepare_scales(inputs: Sequence[ScaleInput], plan: Sequence[ScaleStep], device: torch.device) -> None:
    """Fill in the `numbers` that are needed: none for the best code, nor for a row that has all codes."""
    for own, step in zip(inputs, plan):
        # Numbers that exist are kept: a callback that changes later steps must not change the noise.
        if own.numbers is not None or not step.temperature or (own.given is not None and own.is_given is None):
            continue
        batch, cells = len(own.generators), math.prod(step.grid)
        if own.is_given is None:
            own.numbers = random_numbers(own.generators, batch, cells, device)
            continue
        own.numbers = torch.zeros(batch, cells, 1, dtype=torch.long, device=device)
        # A row that has all codes takes no numbers, as it would alone, where the scale has no mask.
        for row in (~own.is_given.all(dim=1)).nonzero()[:, 0].tolist():
            own.numbers[row] = random_numbers([own.generators[row]], 1, cells, device)[0]


def split_prefix(
    codes: torch.Tensor | None,
    mask: torch.Tensor | None,
    grids: Sequence[tuple[int, int]],
    batch: int,
    codebook_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Codes (batch, codes) of the first scales, and which are taken as they are, scale by scale."""
    if codes is None and mask is None:
        return []
    if codes is None:
        raise ValueError("prefix_mask is given without prefix_codes, expected both or prefix_codes alone")
    ends = torch.tensor([height * width for height, width in grids]).cumsum(0).tolist()
    if codes.ndim != 2 or len(codes) != batch or codes.shape[1] not in ends:
        raise ValueError(f"prefix_codes are {tuple(codes.shape)}, expected {batch} rows of one of {ends} codes")
    if mask is not None and (mask.shape != codes.shape or mask.dtype != torch.bool):
        raise ValueError(f"prefix_mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(codes.shape)}")
    # Places that are sampled again may hold anything.
    check_codes(codes if mask is None else codes[mask], codebook_size, "prefix_codes")
    ends = ends[: ends.index(codes.shape[1])]
    scales = codes.tensor_split(ends, dim=1)
    if mask is None:
        return [(scale, None) for scale in scales]
    # A scale that is given in full is not sampled: no logits, no random numbers.
    masks = [None if part.all() else part for part in mask.tensor_split(ends, dim=1)]
    return list(zip(scales, masks))


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
    # One kernel, and exactly `logits` at a scale of 1.
    guided = unconditional.lerp(logits, scale)
    return guided if imageless is None else guided + (image_scale - 1) * (unconditional - imageless)


def sample_codes(
    logits: torch.Tensor,
    step: ScaleStep,
    numbers: torch.Tensor | None,
    given: torch.Tensor | None = None,
    is_given: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Sample one code a cell from logits (batch, cells, codebook_size), in fp32. `numbers` as in [`pick`]; without them,
    and at temperature 0, the best code. Codes `given` (batch, cells) stay where `is_given`.
    """
    if step.temperature == 0 or numbers is None:
        codes = logits.argmax(-1)
    else:
        scores, vocabulary = logits.float(), None
        # Either way the scores descend, as top-p needs; temperature does not change their order.
        if 0 < step.top_k < scores.shape[-1]:
            scores, vocabulary = top_codes(scores, step.top_k)
        elif step.top_p < 1:
            scores, vocabulary = scores.sort(dim=-1, descending=True)
        scores = scores / step.temperature
        if step.top_p < 1:  # keep the codes before which less than top_p of the mass lies, always the first
            probabilities = scores.softmax(-1)
            scores = scores.masked_fill(probabilities.cumsum(-1) - probabilities > step.top_p, -math.inf)
        codes = pick(scores, numbers, vocabulary)
    return codes if given is None or is_given is None else given.where(is_given, codes)


def top_codes(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best of scores (batch, cells, choices) and their places, both (batch, cells, count), descending."""
    if scores.device.type != "cpu" or count == 1:
        return scores.topk(count, dim=-1)
    # NumPy selects and sorts with vector instructions, faster while a block stays in a cache: 900 of 32,768 take a
    # fifth of the time of PyTorch's topk.
    rows = scores.detach().numpy().reshape(-1, scores.shape[-1])
    found = []
    for block in np.array_split(rows, math.ceil(rows.size / CHOICES_IN_CACHE)):
        places = np.argpartition(block, -count)[:, -count:]
        best = np.take_along_axis(block, places, -1)
        order = np.argsort(best)[:, ::-1]
        found.append((np.take_along_axis(best, order, -1), np.take_along_axis(places, order, -1)))
    best, places = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found))
    return best.view(*scores.shape[:-1], count), places.view(*scores.shape[:-1], count)


def one_per_row(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[torch.Generator | None]:
    """A generator for each row: those of the list, or the same one for all."""
    generators: list[torch.Generator | None]
    generators = [*generator] if isinstance(generator, Sequence) else [generator] * batch
    if len(generators) != batch:
        raise ValueError(f"got {len(generators)} generators for a batch of {batch}: pass one, or one per image")
    return generators


def random_numbers(
    generators: Sequence[torch.Generator | None], batch: int, cells: int, device: torch.device
) -> torch.Tensor:
    """Numbers (batch, cells, 1) for [`pick`], of each row's own generator. A CPU generator works for any device."""
    return torch.stack(
        [
            # One number a cell, not one a choice: 32,768 codes would take as many numbers, and top-k would reorder
            # them.
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
    # Noise is a function of (number of the cell, id of the choice), so any subset in any order gets the same.
    uniform = _splitmix(numbers, choices).float() * 2.0**-63
    # Gumbel noise is -log(-log(1 - u)). `log1p` keeps small u exact, and these make the large noise that decides.
    choice = (scores - (-torch.log1p(-uniform)).log()).argmax(-1)
    return choice if ids is None else ids.gather(-1, choice[..., None])[..., 0]


def _splitmix(seeds: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Number `indices` of SplitMix64's sequence from `seeds`, in [0, 2**63): on any device, without a state."""

    # Constants of SplitMix64, as signed 64-bit integers, which wrap around as unsigned ones do.
    bits = seeds + (indices + 1) * (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (64 - shift) - 1))  # with a logical shift
        bits.mul_(factor)
    return bits.bitwise_and_(2**63 - 1)


def check_finite(scores: dict[int, torch.Tensor], plan: Sequence[ScaleStep]) -> None:
    """Raise where the largest score of a scale is not finite; empties `scores`."""
    # One copy to the host for all scales.
    found = torch.stack(list(scores.values())).isfinite().tolist()
    for (index, _), is_finite in zip(scores.items(), found, strict=True):
        if not is_finite:
            step = plan[index]
            raise ValueError(
                f"the logits of scale {index + 1} ({step.grid[0]}x{step.grid[1]}) are not finite with guidance_scale "
                f"{step.guidance_scale:g} and temperature {step.temperature:g}: expected a lower guidance, a higher "
                "temperature, or weights without NaN"
            )
    scores.clear()


class NextFlowSamplingInterface(Host):
    """Methods of [`NextFlowForCausalLM`] for sampling and scoring, of which none knows how prompts look."""

    config: NextFlowConfig
    generation_config: GenerationConfig
    sample_scale = staticmethod(sample_codes)
    if TYPE_CHECKING:  # transformers evaluates what it finds
        model: NextFlowModel
        lm_head: nn.Linear
        code_rows: slice
        graphs: PassGraphs | None

        @property
        def is_fused(self) -> bool: ...

    def get_image_settings(
        self,
        config: GenerationConfig | None = None,
        is_guided: bool = True,
        is_image_guided: bool = True,
        **given: Any,
    ) -> dict[str, Any]:
        """
        How images are sampled.

        Args:
            config ([`GenerationConfig`], *optional*): Defaults to the model's. It need not be one of ours.
            is_guided, is_image_guided (`bool`, *optional*, defaults to `True`):
                Whether there are unconditional prompts, and unconditional prompts without images. Guidance that only
                the config asks for is left out without them.
            given: `guidance_scale`, `guidance_schedule`, `image_guidance_scale`, `temperature`, `top_k`, `top_p`. What
                is missing or `None` comes from the config, else from [`IMAGE_DEFAULTS`].

        Raises:
            `ValueError`: on a setting that is no number in its range.
            `TypeError`: on a setting that there is not.
        """
        config, settings = self.generation_config if config is None else config, {**IMAGE_DEFAULTS, **given}
        for name, default in IMAGE_DEFAULTS.items():
            candidates = (given.get(name), getattr(config, CONFIG_NAMES[name], None), default)
            settings[name] = next(value for value in candidates if value is not None)
        if not is_image_guided and given.get("image_guidance_scale") is None:
            settings["image_guidance_scale"] = 1.0
        if not is_guided and given.get("guidance_scale") is None and guides(settings["guidance_scale"]):
            logger.warning_once(
                f"the generation config has guidance_scale={settings['guidance_scale']}, but without "
                "negative_input_ids the image is sampled without guidance: pass the unconditional prompt, which the "
                "processor makes (`apply_chat_template(..., generation_mode=...)`), or set the guidance to 1"
            )
            settings["guidance_scale"] = 1.0
        lengths = [len(value) for value in settings.values() if isinstance(value, (list, tuple))]
        scale_plan([(1, 1)] * max(lengths, default=1), **settings)  # checks them
        return settings

    def get_scale_terms(self, image_grids: torch.Tensor) -> torch.Tensor:
        """
        What the inputs of each scale of images (images, max_scales, 2) have in common, (images, max_scales, hidden):
        the embedding of the scale and the encoding of their number, which is part of the input.
        """
        scales = torch.arange(self.config.max_scales, device=image_grids.device)
        return self.model.scale_embedding(scales) + self.model.scale_length_encoding(image_grids)[:, None]

    def embed_next_scale(
        self, codes: torch.Tensor, grid: tuple[int, int], next_grid: tuple[int, int], terms: torch.Tensor
    ) -> torch.Tensor:
        """
        Inputs (images, cells, hidden) of the scale of `next_grid`, from `codes` (images, codes of all scales so far),
        the last of which are those of `grid`, and the scale's own `terms` (images, hidden), see [`get_scale_terms`].
        """
        # Only the last scale's codes are an input: the sequence has the others in its cache.
        features = self.model.image_codebook(codes[:, -grid[0] * grid[1] :])
        embeds = self.model.connector(self.model.upsampled_features(features, grid, next_grid))
        # The connector may stay in float32 where the layers are in half precision.
        return (embeds + terms[:, None]).to(self.model.norm.weight.dtype)

    def get_block_positions(self, step: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Rotary positions (3, rows, cells) of consecutive blocks, the first of which takes `step` (rows, 1) of the
        text axis. Made without waiting for the device."""
        # On the CPU, then copied once: with repeats counted on the device the host would wait for their sum.
        sides, counts = torch.tensor(grids), torch.tensor([height * width for height, width in grids])
        height, width = sides.repeat_interleave(counts, dim=0).T
        cell = torch.cat([torch.arange(count) for count in counts.tolist()])
        extent = self.config.spatial_rope_extent
        row, column = cell_coordinates(cell // width, cell % width, height, width, extent=extent)
        ahead = torch.arange(len(grids)).repeat_interleave(counts).float()
        ahead, row, column = torch.stack([ahead, row, column]).to(step.device, non_blocking=True)
        step = step + ahead
        return torch.stack([step, row.expand_as(step), column.expand_as(step)])

    def image_logits(self, hidden_states: torch.Tensor, multiply: Callable = F.linear) -> torch.Tensor:
        """Scores (..., codebook_size) by the code rows of the head alone, as `multiply(states, weight)` gives them."""
        codes = self.code_rows
        return with_weight(
            self.lm_head,
            hidden_states,
            lambda hidden, weight: multiply(hidden, weight[codes]),
            lambda hidden: self.lm_head(hidden)[..., codes],
        )

    def guided_logits(
        self, hidden_states: Sequence[torch.Tensor], step: ScaleStep, num_images: int, is_fused: bool
    ) -> torch.Tensor:
        """
        Scores (images, cells, codebook_size) of one scale in fp32, from the hidden states of the prompts and of those
        that guide them, `num_images` each, one after the other.

        The head is linear: where layers are fused (`is_fused`) and compute in fp32, hidden states are guided, for one
        product instead of one a condition. In half precision guided states would be rounded more than guided scores.
        """
        guides_states = is_fused and hidden_states[0].dtype == torch.float32
        scores = list(hidden_states) if guides_states else [self.image_logits(states) for states in hidden_states]
        # Guidance extrapolates: rounding errors of half precision would grow with its scale.
        scores = (torch.cat(scores) if len(scores) > 1 else scores[0]).float()
        # Up to three conditions, in the order of the prompts' rows.
        scores, unconditional, imageless, *_ = [*scores.split(num_images), None, None]
        guided = guide(
            scores, unconditional, step.guidance_scale, imageless=imageless, image_scale=step.image_guidance_scale
        )
        return self.image_logits(guided, linear_in_blocks) if guides_states else guided

    def get_text_ids(self) -> torch.Tensor:
        """The tokens that text before an image is made of: text without the end of the turn, and `<boi>`, its end."""
        config = self.config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        excluded = torch.tensor([config.image_token_id, config.pad_token_id, *ends], device=self.device)
        ids = torch.arange(config.text_vocab_size + 1, device=self.device)
        ids[-1] = config.boi_token_id
        return ids[~torch.isin(ids, excluded)]

    def score_targets(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, score: Callable[..., tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        """
        What `score(states, head, targets)` gives of every target, float32 of the shape of `targets`, 0 where there is
        none. A code competes with codes alone and text with text, as where they are sampled.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): What the targets are predicted from.
            targets (`torch.Tensor` of shape `(batch, length)`): Token ids of text and codes, negative for none.
            score (`Callable`):
                From states (tokens, hidden), a head that maps them to logits, and targets (tokens,) among these logits
                to tensors (tokens,), such as log-probabilities and entropies.
        """
        # Sorted ids, so a binary search finds a target's place among them.
        codes, ids = self.code_rows, self.get_text_ids()
        is_code = (targets >= codes.start) & (targets < codes.stop)
        is_text = (targets >= 0) & ~is_code
        own_targets = targets[is_code] - codes.start, torch.searchsorted(ids, targets[is_text])

        def score_both(states: Sequence[torch.Tensor], code_head: Callable, text_head: Callable) -> list[Any]:
            heads = code_head, lambda hidden: text_head(hidden)[..., ids]
            return [score(*part) for part in zip(states, heads, own_targets)]

        def score_with_weight(states: Sequence[torch.Tensor], weight: torch.Tensor) -> list[Any]:
            heads = (lambda hidden: F.linear(hidden, weight[codes])), (lambda hidden: F.linear(hidden, weight))
            return score_both(states, *heads)

        # Both kinds in one call of the head: a process may have tokens of one kind alone, and others wait for its
        # calls.
        of_codes, of_text = with_weight(
            self.lm_head,
            [hidden_states[is_code], hidden_states[is_text]],
            score_with_weight,
            lambda states: score_both(states, self.image_logits, self.lm_head),
        )
        # `masked_scatter` fills in reading order, in which the boolean indices above have taken the states.
        blank = torch.zeros(targets.shape, device=hidden_states.device)
        return tuple(
            blank.masked_scatter(is_code, code).masked_scatter(is_text, text)
            for code, text in zip(of_codes, of_text, strict=True)
        )


def with_weight(
    head: nn.Module, hidden_states: Any, function: Callable[..., Any], otherwise: Callable[..., Any]
) -> Any:
    """
    Use a head's matrix itself, `function(hidden_states, weight)`, or `otherwise(hidden_states)` where a head has its
    weights in its call alone: with an adapter, quantised or offloaded. Where hooks gather a sharded matrix for a call
    (DeepSpeed, FSDP2), `function` runs in one call of the head, so that all processes gather it as often, however many
    tokens each has.
    """
    if not isinstance(head, nn.Linear) or head.bias is not None or "forward" in vars(head):
        return otherwise(hidden_states)
    # A weight of another type is quantised or a shard: only the head's own call knows how to multiply it.
    is_plain = type(head.weight) is nn.Parameter
    if type(head) is not nn.Linear:  # joined of rows that are trained and rows that are not; or FSDP2's class
        is_plain = is_parametrized(head, "weight") or type(head).forward is nn.Linear.forward
    if not is_plain:
        return otherwise(hidden_states)
    if not head._forward_pre_hooks:
        return function(hidden_states, head.weight)
    # On the instance, and called through `__call__`, so that the hooks around it run.
    head.forward = lambda input: function(input, head.weight)
    try:
        return head(hidden_states)
    finally:
        del head.forward
