"""Rollouts for reinforcement learning: from a data set's row to a picture, drawn whole and with guidance (§3.2.5).

Drawing itself is the pipeline's. Text before the picture is sampled here, from the policy as it is: no guidance.
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
from ..rewards.combination import one_line


@dataclass
class Rollout:
    """
    One picture drawn.

    Args:
        prompt ([`NextFlowImagePrompt`]): What it was drawn from, the text before it included.
        codes (`torch.Tensor` of shape `(codes,)`): Its codes, on the CPU.
        thoughts (`range`):
            Places in the prompt of the text before the picture, which was sampled; `<boi>` is among them if it was.
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
        parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": row["prompt"]}]
        return [{"role": "user", "content": parts}], images
    messages, spare = [], iter(images)
    shown = []
    for message in row["prompt"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [{name: value for name, value in part.items() if value is not None} for part in content]
            for part in content:
                if part["type"] == "image":
                    if "image" not in part:
                        part["image"] = next(spare, None)
                    shown.append(part["image"])
        messages.append({**message, "content": content})
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
    pipeline: NextFlowPipeline, rows: Sequence[dict[str, Any]], *, guided: bool, **size: Any
) -> list[NextFlowImagePrompt]:
    """The rows' prompts as the pipeline's call encodes them; neighbours with one prompt (a group) once."""
    conversations, owners = [], []
    for index, row in enumerate(rows):
        check_prompt(row, index)
        if index == 0 or not _same_prompt(row, rows[index - 1]):
            conversations.append(conversation_of(row)[0])
        owners.append(len(conversations) - 1)
    unconditional = pipeline.processor.unconditional_messages
    negative = [unconditional(conversation) for conversation in conversations] if guided else None
    prompts = pipeline.encode_messages(conversations, negative, keep_first_size=not size, **size)
    # On the CPU, as the tokens are: processes exchange them.
    prompts = [replace(prompt, image_codes=prompt.image_codes.cpu()) for prompt in prompts]
    return [prompts[owner] for owner in owners]


def _same_prompt(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row.get(name) == other.get(name) for name in ("prompt", "image", "images"))


def draw(
    pipeline: NextFlowPipeline,
    prompts: Sequence[NextFlowImagePrompt],
    *,
    prefixes: Sequence[torch.Tensor] | None = None,
    num_scales: int | None = None,
    batch_size: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
    **settings: Any,
) -> list[torch.Tensor]:
    """Codes (codes,) of an image per prompt: after `prefixes`, the codes of its first scales, where given; stopping
    after `num_scales` scales. `generators` has one for each prompt."""
    groups: dict[tuple, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt.grids), []).append(index)
    drawn: list[torch.Tensor | None] = [None] * len(prompts)

    def stop(scale: int, step: Any, codes: torch.Tensor) -> list | None:
        return [] if scale + 1 == num_scales else None

    for members in groups.values():
        for start in range(0, len(members), batch_size or len(members)):
            chunk = members[start : start + (batch_size or len(members))]
            given = {}
            if prefixes is not None:
                given["prefix_codes"] = torch.stack([prefixes[index] for index in chunk]).to(
                    pipeline.transformer.device
                )
            if generators is not None:
                given["generators"] = [generators[index] for index in chunk]
            codes = pipeline.generate_codes(
                [prompts[index] for index in chunk], callback=stop, **given, **settings
            ).cpu()
            for index, row in zip(chunk, codes):
                drawn[index] = row
    return drawn


def decode(pipeline: NextFlowPipeline, rollouts: Sequence[Rollout], batch_size: int | None = None) -> list:
    """The pictures (PIL) of whole rollouts."""
    images = []
    for start in range(0, len(rollouts), batch_size or len(rollouts)):
        chunk = rollouts[start : start + (batch_size or len(rollouts))]
        grids = torch.stack([rollout.prompt.image_grids[-1] for rollout in chunk])
        images += pipeline.decode_codes(torch.cat([rollout.codes for rollout in chunk]), grids)
    return images


def think(
    pipeline: NextFlowPipeline,
    prompts: Sequence[NextFlowImagePrompt],
    *,
    max_tokens: int,
    temperature: float,
    generators: Sequence[torch.Generator] = (),
) -> list[tuple[NextFlowImagePrompt, range]]:
    """Sample text between each prompt and its picture, until the model opens the picture, or until `max_tokens` are
    written and it is opened for it. Returns the longer prompts and the places of what was sampled."""
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
        scores = model.lm_head(hidden)[:, allowed].float() / temperature
        tokens = allowed[sample(scores[:, None], generators)]
        for thought, token in zip(thoughts, tokens[:, 0].tolist()):
            if thought[-1:] != [config.boi_token_id]:
                thought.append(token)
        if all(thought[-1] == config.boi_token_id for thought in thoughts):
            break
        # A row that is done goes on with padding, which nobody reads.
        inputs = {"input_ids": tokens.masked_fill(tokens == config.boi_token_id, config.pad_token_id)}
        positions = positions[:, :, -1:] + 1
        mask = F.pad(mask, (0, 1), value=1)
    longer = []
    for prompt, thought in zip(prompts, thoughts):
        closed = thought if thought[-1] == config.boi_token_id else [*thought, config.boi_token_id]
        start = len(prompt.input_ids) - 1
        input_ids = torch.cat([prompt.input_ids[:-1], torch.tensor(closed)])
        longer.append((replace(prompt, input_ids=input_ids), range(start, start + len(thought))))
    return longer
