"""Rollouts for reinforcement learning: from a data set's row to an image, sampled whole and with guidance (§3.2.5).

Images are sampled by the pipeline. The thought before an image is sampled here: from the distribution that
`score_targets` scores, where `pipe(think=True)` turns the end of the turn into the beginning of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ...modeling_nextflow.sampling_nextflow import sample
from ...pipelines.pipeline_nextflow import NextFlowImagePrompt, NextFlowPipeline
from ...pipelines.prompts_nextflow import group_prompts
from ..rewards.checks import one_line


@dataclass
class Rollout:
    """
    One image sampled.

    Args:
        prompt ([`NextFlowImagePrompt`]): What it was sampled from, with the text before it.
        codes (`torch.Tensor` of shape `(codes,)`): Its codes, on the CPU.
        thoughts (`range`):
            Places in the prompt of the text before the image, which was sampled; `<boi>` is among them if it was.
    """

    prompt: NextFlowImagePrompt
    codes: torch.Tensor
    thoughts: range = range(0)


def conversation_of(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages and the source images of a data set's row: `prompt` is a text or messages, `images` (or `image`)
    are shown before the text, or stand where the messages have image parts without data."""
    images = row.get("images") if row.get("images") is not None else row.get("image")
    images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    if isinstance(row["prompt"], str):
        return NextFlowPipeline.build_messages(row["prompt"], images)[0], images
    messages, spare = [], iter(images)
    shown = []
    for turn in row["prompt"]:
        content = turn["content"]
        if not isinstance(content, str):
            # `datasets` gives each part the keys of all parts.
            content = [{name: value for name, value in part.items() if value is not None} for part in content]
            for part in content:
                if part["type"] == "image":
                    if "image" not in part:
                        part["image"] = next(spare, None)
                    shown.append(part["image"])
        messages.append({**turn, "content": content})
    if any(image is None for image in shown) or next(spare, None) is not None:
        raise ValueError(f"the messages of a row have {len(shown)} image parts, but `images` holds {len(images)}")
    return messages, shown


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    are_parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    return isinstance(content, str) or are_parts


def check_prompt(row: dict[str, Any], sample: int) -> None:
    """Raises `ValueError` where the `prompt` of a data set's row is neither a text nor messages."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_message, prompt))):
        return
    found = one_line(prompt) if "prompt" in row else "missing"
    columns = {name: value for name, value in row.items() if name != "prompt"}
    raise ValueError(
        f"the `prompt` of sample {sample} is {found}, expected a text or messages with `role` and `content`: mend or "
        f"filter out the row, whose other columns are {one_line(columns)}"
    )


def encode_rows(
    pipeline: NextFlowPipeline, rows: Sequence[dict[str, Any]], *, guided: bool, thinks: bool = False, **size: Any
) -> list[NextFlowImagePrompt]:
    """
    The rows' prompts as the pipeline's call encodes them; neighbours with one prompt (a group) once. With `thinks` a
    prompt asks for a thought, and guidance is that of the prompt without it.
    """
    conversations, owners = [], []
    for index, row in enumerate(rows):
        check_prompt(row, index)
        if index == 0 or not _same_prompt(row, rows[index - 1]):
            conversations.append(conversation_of(row)[0])
        owners.append(len(conversations) - 1)
    unconditional = pipeline.processor.unconditional_messages
    negative = [unconditional(conversation) for conversation in conversations] if guided else None
    if thinks:
        conversations = list(map(pipeline.processor.with_thinking_prompt, conversations))
    prompts = pipeline.encode_messages(conversations, negative, keep_first_size=not size, **size)
    # On the CPU, as the tokens are: processes exchange them.
    prompts = [replace(prompt, image_codes=prompt.image_codes.cpu()) for prompt in prompts]
    return [prompts[owner] for owner in owners]


def _same_prompt(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row.get(name) == other.get(name) for name in ("prompt", "image", "images"))


def sample_codes(
    pipeline: NextFlowPipeline,
    prompts: Sequence[NextFlowImagePrompt],
    *,
    prefixes: Sequence[torch.Tensor] | None = None,
    num_scales: int | None = None,
    batch_size: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
    **settings: Any,
) -> list[torch.Tensor]:
    """
    Codes (codes,) of an image per prompt, those of `prefixes`, its first scales, included; only `num_scales` scales
    where given. `generators` has one for each prompt.
    """
    if prefixes is not None:
        prompts = [replace(prompt, prefix_codes=codes) for prompt, codes in zip(prompts, prefixes, strict=True)]
    sampled: list[torch.Tensor | None] = [None] * len(prompts)

    def stop(scale: int, step: Any, codes: torch.Tensor) -> list | None:
        # Without steps for the scales to come, sampling ends here.
        return [] if scale + 1 == num_scales else None

    for members in group_prompts(prompts):
        for start in range(0, len(members), batch_size or len(members)):
            chunk = members[start : start + (batch_size or len(members))]
            own = None if generators is None else [generators[index] for index in chunk]
            codes = pipeline.generate_codes(
                [prompts[index] for index in chunk], generators=own, callback=stop, **settings
            )
            for index, row in zip(chunk, codes.cpu()):
                sampled[index] = row
    return sampled


def decode(pipeline: NextFlowPipeline, rollouts: Sequence[Rollout], batch_size: int | None = None) -> list:
    """The images (PIL) of whole rollouts."""
    images = []
    for start in range(0, len(rollouts), batch_size or len(rollouts)):
        chunk = rollouts[start : start + (batch_size or len(rollouts))]
        grids = torch.stack([rollout.prompt.image_grids[-1] for rollout in chunk])
        images += pipeline.decode_codes(torch.cat([rollout.codes for rollout in chunk]), grids)
    return images


def sample_thoughts(
    pipeline: NextFlowPipeline,
    prompts: Sequence[NextFlowImagePrompt],
    *,
    max_tokens: int,
    temperature: float,
    generators: Sequence[torch.Generator] = (),
) -> list[tuple[NextFlowImagePrompt, range]]:
    """
    Sample text between each prompt and its image, until the model begins the image, or until there are `max_tokens`
    and it is begun for it. Returns the longer prompts and the places of what was sampled.
    """
    model = pipeline.transformer
    device, config = model.device, model.config
    rows = [prompt.input_ids[:-1].to(device) for prompt in prompts]  # without the `<boi>`
    pad = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence(rows, padding_value=config.pad_token_id, **pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], **pad)
    sources = torch.cat([prompt.image_grids[:-1] for prompt in prompts]).to(device)
    codes = torch.cat([prompt.image_codes for prompt in prompts]).to(device)
    images = {"image_grids": sources, "image_codes": codes} if len(sources) else {}
    positions = model.model.get_position_ids(ids, image_grids=images.get("image_grids"), attention_mask=mask)
    allowed, cache = model.get_text_ids(), DynamicCache(config=config)
    inputs = {"input_ids": ids, **images}
    thoughts: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_tokens):
        hidden = model.model(
            **inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        # The choices that `score_targets` scores, at its temperature.
        scores = model.lm_head(hidden)[:, allowed].float() / temperature
        tokens = allowed[sample(scores[:, None], generators)]
        for thought, token in zip(thoughts, tokens[:, 0].tolist()):
            if thought[-1:] != [config.boi_token_id]:
                thought.append(token)
        if all(thought[-1] == config.boi_token_id for thought in thoughts):
            break
        # A row that has ended continues with padding, whose outputs are not read.
        inputs = {"input_ids": tokens.masked_fill(tokens == config.boi_token_id, config.pad_token_id)}
        # Text takes one step on every axis.
        positions = positions[:, :, -1:] + 1
        mask = F.pad(mask, (0, 1), value=1)
    return [_with_thought(prompt, thought, config.boi_token_id) for prompt, thought in zip(prompts, thoughts)]


def _with_thought(
    prompt: NextFlowImagePrompt, thought: list[int], boi_token_id: int
) -> tuple[NextFlowImagePrompt, range]:
    """The prompt with its thought, closed by `<boi>` where that was not sampled, and the places of the thought."""
    start = len(prompt.input_ids) - 1
    # A `<boi>` that was put there is not among the thoughts: the policy did not choose it, and is not taught it.
    closed = thought if thought[-1] == boi_token_id else [*thought, boi_token_id]
    input_ids = torch.cat([prompt.input_ids[:-1], torch.tensor(closed)])
    return replace(prompt, input_ids=input_ids), range(start, start + len(thought))
