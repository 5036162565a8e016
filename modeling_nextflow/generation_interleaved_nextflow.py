"""Text and images in one answer: text token by token until `<boi>`, then the scales, `<eoi>`, and text again (§2.2).

The batch has one cache. Its rows begin images at different times: a row that has begun one waits until all others
have, or are done, and the images are sampled together. A row that takes no part in a step gets padding, which nothing
attends to, so its answer is the one that it would get alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .attention_nextflow import CachePlace, layers_of, reserve
from .configuration_nextflow import NextFlowConfig
from .generation_image_nextflow import PromptRows, begin_images, check_context, prefill_rows, sample_scales
from .grids_nextflow import Schedule, count_codes, group_by_schedule, schedules_from_grids
from .prompt_rows_nextflow import split_images
from .sampling_nextflow import ScaleInput, ScaleStep, prepare_scales, sample


if TYPE_CHECKING:
    from . import modeling_nextflow  # not `from .file import`, which diffusers' loader would follow in a circle

    NextFlowForCausalLM = modeling_nextflow.NextFlowForCausalLM

logger = logging.get_logger(__name__)


@dataclass
class NextFlowInterleavedGenerationOutput(ModelOutput):
    r"""
    Text and images, as the processor lays them out and the model reads them: with more tokens behind `sequences`, the
    fields are `input_ids`, `attention_mask`, `image_codes`, `image_grids` and `past_key_values` of the next call.

    Args:
        sequences (`torch.Tensor` of shape `(batch, length)`):
            The prompts as they were given, then what was generated, padded on the right.
        attention_mask (`torch.Tensor` of shape `(batch, length)`): 0 at padding.
        image_codes (`torch.Tensor` of shape `(total_codes,)`): Codes of all images in `sequences`.
        image_grids (`torch.Tensor` of shape `(images, max_scales, 2)`): Their schedules.
        is_generated (`torch.Tensor` of shape `(images,)`): Which of the images are not the prompts'.
        prompt_length (`int`): Where in `sequences` the generated part begins.
        past_key_values (`Cache`, *optional*, returned with `return_dict_in_generate`): Keys and values of `sequences`.
    """

    sequences: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    image_codes: torch.Tensor | None = None
    image_grids: torch.Tensor | None = None
    is_generated: torch.Tensor | None = None
    prompt_length: int | None = None
    past_key_values: Cache | None = None

    def answer(self) -> "NextFlowInterleavedGenerationOutput":
        """The output without the prompts: what is shown to a user."""
        assert self.sequences is not None and self.attention_mask is not None  # as all that `generate` returned has
        assert self.image_codes is not None and self.image_grids is not None and self.is_generated is not None
        sizes = self.image_grids.prod(-1).sum(-1).tolist()
        codes = [codes for codes, new in zip(self.image_codes.split(sizes), self.is_generated.tolist()) if new]
        return NextFlowInterleavedGenerationOutput(
            sequences=self.sequences[:, self.prompt_length :],
            attention_mask=self.attention_mask[:, self.prompt_length :],
            image_codes=torch.cat(codes) if codes else self.image_codes[:0],
            image_grids=self.image_grids[self.is_generated],
            is_generated=self.is_generated[self.is_generated],
            prompt_length=0,
        )


class TextStreamer(BaseStreamer):
    """Hands a streamer the text of a row, and to its `put_image(image_codes, image_grids)`, if it has one, images."""

    def __init__(self, streamer: BaseStreamer, is_text: Callable[[torch.Tensor], torch.Tensor]):
        self.streamer = streamer
        self.is_text = is_text

    def put(self, value: torch.Tensor) -> None:
        """Pass on the text of a prompt (1, length) or of new tokens (n,), without the tokens of images."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"a streamer takes one row, got a batch of {len(value)}")
        text = value[self.is_text(value)]
        if value.ndim > 1 or len(text):  # the prompt is put even where it is empty: streamers count on it
            self.streamer.put(text.view(1, -1) if value.ndim > 1 else text)

    def put_image(self, image_codes: torch.Tensor, image_grids: torch.Tensor) -> None:
        """Give a sampled image to the streamer's `put_image`, where it has one."""
        put_image = getattr(self.streamer, "put_image", None)
        if put_image is not None:
            put_image(image_codes.cpu(), image_grids.cpu())

    def end(self) -> None:
        """Tell the streamer that the answer is complete."""
        self.streamer.end()


@dataclass
class ImagePlan:
    """How the images of an answer are sampled.

    Attributes:
        target_grids: (batch, max_scales, 2), the schedule of a row's images.
        plan_for: from a schedule to its steps.
        generators: one a row, for text and images alike; `None` is the global one.
        max_images: images that a row may begin.
        negative: the unconditional prompts, one a row, each ending in `<boi>`.
        stop_at_image: a row ends with the `<boi>` of its first image, which is left to be sampled.
    """

    target_grids: torch.Tensor
    plan_for: Callable[[Schedule], list[ScaleStep]]
    generators: Sequence[torch.Generator | None]
    max_images: int
    negative: PromptRows | None = None
    stop_at_image: bool = False


class _Answers:
    """The rows of one call: their tokens, and the cache that they share."""

    def __init__(
        self,
        model: "NextFlowForCausalLM",
        input_ids: torch.LongTensor,
        cache: DynamicCache,
        mask: torch.Tensor | None,
        position: torch.Tensor,
        pad: int,
    ):
        batch, self.prompt_length = input_ids.shape
        self.model = model
        self.pad = pad
        self.prompt = input_ids
        self.cache = cache
        self.mask = mask  # (batch, cached), or None where nothing is padding
        self.position = position  # (batch, 1) on the first rotary axis, of the next token to run
        # Every row's own tokens, ending at the right edge: what processors and criteria read
        self.ids: torch.LongTensor = input_ids  # the type that transformers' processors and criteria take
        self.length = input_ids.new_zeros(batch)  # of what was generated
        self.pending = input_ids.new_full((batch,), pad)  # a row's last token, where it has not run yet
        self.is_pending = torch.zeros_like(self.pending, dtype=torch.bool)
        self.images: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch)]

    def write(self, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        """`tokens` (batch, n) behind the `rows` (batch,); the others move one padding to the right."""
        count = tokens.shape[1]
        # All rows end at the right edge, where processors and criteria look.
        grown = torch.cat([self.ids, tokens], dim=1)
        moved = F.pad(self.ids, (count, 0), value=self.pad)
        self.ids = torch.where(rows[:, None], grown, moved)  # pyright: ignore[reportAttributeAccessIssue]  # of longs
        self.length = self.length + count * rows
        self.pending = torch.where(rows, tokens[:, -1], self.pending)

    def run_pending(self) -> torch.Tensor:
        """Logits (batch, vocabulary) behind every row's last token; those of rows without one mean nothing."""
        real = self.is_pending.long()
        if self.mask is not None:
            self.mask = torch.cat([self.mask, real[:, None]], dim=1)
        # Rows without a pending token run padding, which the mask hides for good. The axes of text are equal.
        outputs = self.model(
            input_ids=torch.where(self.is_pending, self.pending, self.pad)[:, None],
            attention_mask=self.mask,
            position_ids=self.position.expand(3, -1, -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.position = self.position + real[:, None]
        self.is_pending = torch.zeros_like(self.is_pending)
        return outputs.logits[:, -1]

    def sample_images(self, waiting: torch.Tensor, image_plan: ImagePlan, streamer: TextStreamer | None) -> None:
        """The images of the rows that are `waiting` (batch,) behind a `<boi>`, those of one schedule together."""
        waiting_rows = waiting.nonzero()[:, 0]
        schedules = schedules_from_grids(image_plan.target_grids[waiting_rows])
        for grids, members in group_by_schedule(schedules).items():
            codes = self._sample_group(grids, waiting_rows[members], image_plan)
            if streamer is not None:
                streamer.put_image(codes[0], image_plan.target_grids[waiting_rows[members[0]]])

    def _sample_group(self, grids: Schedule, rows: torch.Tensor, image_plan: ImagePlan) -> torch.Tensor:
        """Codes (images, codes) of `rows`, which share one schedule and end in a `<boi>` that has not run yet."""
        target_grids = image_plan.target_grids[rows]
        plan = image_plan.plan_for(grids)
        cells = count_codes(grids[1:])
        sampling = None if len(rows) == len(self.length) else rows
        # `<boi>` was chosen but has not run: its hidden state is what scale 1 is sampled from.
        own = begin_images(self.model, self.cache, self.mask, self.position, sampling, target_grids, cells)
        row_sets = [own]
        if image_plan.negative is not None and any(step.guidance_scale != 1 for step in plan):
            # Anew for every image, in a cache of its own: the unconditional prompt has nothing of the answer.
            negative = _select_rows(image_plan.negative, rows, target_grids, self.model)
            row_sets.append(prefill_rows(self.model, [negative], cells))
        inputs = [ScaleInput([image_plan.generators[row] for row in rows.tolist()]) for _ in plan]
        prepare_scales(inputs, plan, target_grids.device)
        *_, scale = sample_scales(self.model, row_sets, plan, target_grids, inputs)
        codes = scale.image_codes
        # Grown by the columns of the image.
        self.mask = own.mask
        for row, image_codes, image_grids in zip(rows.tolist(), codes, target_grids):
            self.images[row].append((image_codes, image_grids))

        # `<eoi>` is not sampled: it always follows the last scale, and runs with the next token.
        tokens = self.ids.new_full((len(self.length), cells + 1), self.model.config.image_token_id)
        tokens[:, -1] = self.model.config.eoi_token_id
        with_image = torch.zeros_like(self.is_pending).index_fill(0, rows, True)
        self.write(tokens, with_image)
        self.is_pending = self.is_pending | with_image
        # `<boi>` and K - 1 blocks take a step each; the next is that of `<eoi>`.
        self.position = self.position + len(grids) * with_image[:, None]
        return codes

    def finish(
        self,
        attention_mask: torch.Tensor | None,
        image_codes: torch.Tensor | None,
        image_grids: torch.Tensor | None,
        *,
        with_cache: bool,
    ) -> NextFlowInterleavedGenerationOutput:
        if (
            with_cache and len(self.length) > 1 and self.mask is not None
        ):  # rows end at different times: run what has not, and close the gaps
            if self.is_pending.any():
                self.run_pending()
            _close_gaps(self.cache, self.mask, self.prompt_length, self.prompt_length + int(self.length.max()))
        if with_cache:  # each step left the rotary positions alone there
            tokens = self.length.new_full(self.length.shape, self.cache.get_seq_length())
            steps = self.position[:, 0] - 1
            tokens = (tokens if self.mask is None else self.mask.sum(1)).to(steps.dtype) - 1
            CachePlace.mark(self.cache, torch.stack([tokens, *[steps] * 3]))
        # The generated part, moved from the right edge to the end of the prompts
        longest = int(self.length.max())
        place = torch.arange(longest, device=self.ids.device) - self.length[:, None] + self.ids.shape[1]
        is_real = place < self.ids.shape[1]
        generated = self.ids.gather(1, place.clamp(max=self.ids.shape[1] - 1)).where(is_real, self.pad)
        mask = torch.ones_like(self.prompt) if attention_mask is None else attention_mask

        # The images row by row, first the prompt's
        boi = self.model.config.boi_token_id
        codes, grids = [[self.prompt.new_zeros(0)]] * len(self.images), [[]] * len(self.images)
        if image_grids is not None:
            codes, grids = split_images(self.prompt, image_codes, image_grids, boi_token_id=boi)
            codes, grids = [[row] for row in codes], [list(row) for row in grids]
        all_codes, all_grids, is_generated = [], [], []
        for row, images in enumerate(self.images):
            all_codes += codes[row] + [image_codes for image_codes, _ in images]
            all_grids += grids[row] + [image_grids for _, image_grids in images]
            is_generated += [False] * len(grids[row]) + [True] * len(images)
        device = self.prompt.device
        no_grids = torch.zeros(0, self.model.config.max_scales, 2, dtype=torch.long, device=device)
        return NextFlowInterleavedGenerationOutput(
            sequences=torch.cat([self.prompt, generated], dim=1),
            attention_mask=torch.cat([mask, is_real.long()], dim=1),
            image_codes=torch.cat([part.to(device) for part in all_codes]),
            image_grids=torch.stack([part.to(device) for part in all_grids]) if all_grids else no_grids,
            is_generated=torch.tensor(is_generated, dtype=torch.bool, device=device),
            prompt_length=self.prompt_length,
            past_key_values=self.cache if with_cache else None,
        )


def generate_interleaved(
    model: "NextFlowForCausalLM",
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    image_plan: ImagePlan,
    streamer: TextStreamer | None = None,
    **model_kwargs: Any,
) -> NextFlowInterleavedGenerationOutput:
    """The decoding loop of `generate(generation_mode="interleaved")`, on inputs that `generate` has prepared."""
    # 1. The prompts
    mask = model_kwargs.get("attention_mask")
    lengths = input_ids.new_full((len(input_ids),), input_ids.shape[1]) if mask is None else mask.sum(1)
    check_context(model.config, int(lengths.max()), 1)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    cache, logits = outputs.past_key_values, outputs.logits[:, -1]
    if type(cache) is not DynamicCache:
        raise ValueError(f"interleaved generation grows a DynamicCache, got past_key_values of {type(cache).__name__}")
    reserve(cache, 0)
    batch = len(input_ids)
    if mask is None and batch > 1:
        mask = input_ids.new_ones(batch, cache.get_seq_length())
    pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
    position_ids = model_kwargs["position_ids"]
    position = (position_ids if position_ids.ndim == 2 else position_ids[1])[:, -1:].float().expand(batch, 1) + 1
    answers = _Answers(model, input_ids, cache, mask, position, pad)

    # 2. Until every row is done. Text alone counts towards the length: an image is one token, its `<boi>`
    criteria = StoppingCriteriaList(one for one in stopping_criteria if not isinstance(one, MaxLengthCriteria))
    max_tokens = generation_config.max_length - input_ids.shape[1]
    num_tokens, num_images = torch.zeros_like(answers.length), torch.zeros_like(answers.length)
    # What is left of the context for each row, and the tokens of its image: `<boi>`, the cells of scales 2..K, `<eoi>`
    room = model.config.max_position_embeddings - lengths
    image_tokens = image_plan.target_grids[:, 1:].prod(-1).sum(-1) + 2
    writing = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    waiting = torch.zeros_like(writing)
    while True:
        # 2a. A token for each row that writes
        scores = logits.to(dtype=torch.float32, device=input_ids.device)
        may_begin = num_images < image_plan.max_images
        fits = room - answers.length >= image_tokens
        scores = logits_processor(answers.ids, keep_text(scores, model.config, may_begin & fits))
        scores = keep_text(scores, model.config, may_begin)  # processors cannot allow a code either
        if not scores[writing].amax(-1).isfinite().all():
            raise ValueError(
                f"the logits of text token {int(num_tokens.max()) + 1} are not finite: expected a higher temperature, "
                "logits processors that leave a token, or weights without NaN"
            )
        tokens = _choose(scores, writing, image_plan.generators) if generation_config.do_sample else scores.argmax(-1)
        answers.write(tokens[:, None], writing)
        begun = writing & (tokens == model.config.boi_token_id)
        num_tokens, num_images = num_tokens + writing, num_images + begun
        if streamer is not None:
            streamer.put(tokens.cpu())
        is_full = answers.length >= room
        done = (num_tokens >= max_tokens) | is_full
        if len(criteria):
            done = done | (criteria(answers.ids, None) & ~begun)
        answers.is_pending = answers.is_pending | (writing & ~begun)  # `<boi>` runs with its image
        if not image_plan.stop_at_image:
            waiting = waiting | begun
        writing = writing & ~begun & ~done  # a row that began an image waits for the others

        # 2b. The images, once nobody writes
        if not writing.any() and waiting.any():
            for row in waiting.nonzero()[:, 0].tolist():  # a processor may ask for an image where there is no room
                tokens = int(lengths[row] + answers.length[row])
                check_context(model.config, tokens, int(image_tokens[row]) - 1)
            answers.sample_images(waiting, image_plan, streamer)
            is_full = is_full | (answers.length >= room)
            writing = waiting & (num_tokens < max_tokens) & ~is_full
            if len(criteria):  # who was told to stop meanwhile
                writing = writing & ~criteria(answers.ids, None)
            waiting = torch.zeros_like(waiting)
        if not writing.any():
            if is_full.any():
                logger.warning(
                    f"{int(is_full.sum())} of {batch} answers end where the model's context of "
                    f"{model.config.max_position_embeddings} tokens is full"
                )
            break
        logits = answers.run_pending()

    # 3. The answers
    if streamer is not None:
        streamer.end()
    return answers.finish(
        attention_mask=model_kwargs.get("attention_mask"),
        image_codes=model_kwargs.get("image_codes"),
        image_grids=model_kwargs.get("image_grids"),
        with_cache=bool(generation_config.return_dict_in_generate),
    )


def keep_text(scores: torch.Tensor, config: NextFlowConfig, may_begin: torch.Tensor | None = None) -> torch.Tensor:
    """Scores that leave text and, in rows that `may_begin` an image, `<boi>`; all other tokens are ruled out."""
    kept = scores.clone()
    kept[:, config.image_vocabulary] = kept[:, config.image_token_id] = -float("inf")
    if may_begin is not None:
        kept[:, config.boi_token_id] = scores[:, config.boi_token_id].where(may_begin, -float("inf"))
    return kept


def _choose(scores: torch.Tensor, writing: torch.Tensor, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
    """A token for each row that writes; the generators of the others stay where they are."""
    # A row's numbers must not depend on how long others write.
    rows = writing.nonzero()[:, 0]
    chosen = sample(scores[rows][:, None], [generators[row] for row in rows.tolist()])[:, 0]
    return scores.argmax(-1).index_copy(0, rows, chosen)


def _select_rows(
    prompts: PromptRows, rows: torch.Tensor, target_grids: torch.Tensor, model: "NextFlowForCausalLM"
) -> PromptRows:
    """The unconditional prompts of `rows`, with the schedules of the images that are sampled now."""
    boi = model.config.boi_token_id
    codes, grids = split_images(prompts.input_ids, prompts.image_codes, prompts.image_grids, boi_token_id=boi)
    return PromptRows(
        prompts.input_ids[rows],
        prompts.attention_mask[rows],
        torch.cat([codes[row] for row in rows.tolist()]),
        torch.cat([torch.cat([grids[row][:-1], own[None]]) for row, own in zip(rows.tolist(), target_grids)]),
    )


def _close_gaps(cache: DynamicCache, mask: torch.Tensor, prompt_length: int, length: int) -> None:
    """Move the generated columns of every row up to each other, behind its prompt, and cut at `length`."""
    column = torch.arange(mask.shape[1], device=mask.device)
    # A stable sort keeps tokens in order, and puts columns of padding behind them.
    order = torch.where(column < prompt_length, 0, 1 - mask).argsort(dim=1, stable=True)[:, :length]
    for layer in layers_of(cache):
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None  # of a cache that holds the prompt
        index = order[:, None, :, None].to(keys.device)
        layer.keys = keys.gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3]))
        layer.values = values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3]))
