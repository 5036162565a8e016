"""What the policy is asked in reinforcement learning: rows that end with the last scale that is taught, and the
log-probabilities of what was sampled, over the code rows of the head alone (§3.2.5).

They are computed inside the model's `forward`, because distributed wrappers and adapters act on nothing else.
"""

import functools
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ...modeling_nextflow.configuration_nextflow import NextFlowConfig
from ...modeling_nextflow.loss_nextflow import IGNORE_INDEX
from ...modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from ...processing.scale_schedule_nextflow import num_cells
from .objective import chunked_log_probs, code_weights
from .rollout import Rollout


def policy_row(
    rollout: Rollout,
    config: NextFlowConfig,
    *,
    scales: range,
    alpha: float,
    thinking_weight: float = 1.0,
    cell_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    A [`Rollout`] as a row that teaches the scales `scales` (counted from 0), and the text before it if 0 is among
    them.

    Returns `input_ids`, up to the cells of the last of the scales; the `image_codes` and `image_grids` in it; and per
    token `targets` (-100 where nothing is taught), `scale_ids` (0 for text) and `loss_weights`: of codes PANW's, whose
    sum is 1 before `cell_mask` (codes of the scales,) takes its share away; of text alike, with the sum
    `thinking_weight`.
    """
    prompt, grids = rollout.prompt, rollout.prompt.grids
    seen, skipped = num_cells(grids[: scales.stop]), num_cells(grids[: scales.start])
    inputs = seen - num_cells(grids[scales.stop - 1 : scales.stop])  # the last scale is predicted, but not read
    input_ids = torch.cat([prompt.input_ids, torch.full((seen - 1,), config.image_token_id)])  # scale 1 has no cell
    length, first = len(input_ids), len(prompt.input_ids) - 1  # `<boi>` predicts the first code
    targets = torch.full((length,), IGNORE_INDEX)
    scale_ids = torch.zeros(length, dtype=torch.long)
    loss_weights = torch.zeros(length)

    codes = slice(first + skipped, first + seen)
    weights = code_weights(grids[scales.start : scales.stop], alpha)
    targets[codes] = rollout.codes[skipped:seen] + config.code_vocabulary.start
    cells = torch.tensor([num_cells([grid]) for grid in grids[scales.start : scales.stop]])
    scale_ids[codes] = (torch.arange(scales.start, scales.stop) + 1).repeat_interleave(cells)
    thoughts = rollout.thoughts if scales.start == 0 else range(0)  # taught with the prefix
    loss_weights[codes] = weights / len(weights) * (1 if cell_mask is None else cell_mask.cpu())  # they sum to 1
    if thoughts:  # a token is predicted by the one before it
        targets[thoughts.start - 1 : thoughts.stop - 1] = prompt.input_ids[thoughts.start : thoughts.stop]
        loss_weights[thoughts.start - 1 : thoughts.stop - 1] = thinking_weight / len(thoughts)
    return {
        "input_ids": input_ids,
        "image_codes": torch.cat([prompt.image_codes.cpu(), rollout.codes[:inputs]]),  # no finer scale is run
        "image_grids": prompt.image_grids,
        "targets": targets,
        "scale_ids": scale_ids,
        "loss_weights": loss_weights,
    }


def pad_rows(
    rows: Sequence[dict[str, torch.Tensor]], *, pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Rows as one batch, padded on the right. Codes and grids stay lists: their lengths differ, and TRL shuffles and
    splits what is as long as the batch."""
    fillers = {"input_ids": pad_token_id, "targets": IGNORE_INDEX, "scale_ids": 0, "loss_weights": 0.0}
    batch: dict[str, Any] = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=filler).to(device)
        for name, filler in fillers.items()
    }
    lengths = [torch.ones_like(row["input_ids"]) for row in rows]
    batch["attention_mask"] = pad_sequence(lengths, batch_first=True).to(device)
    for name in ("image_codes", "image_grids"):
        batch[name] = [row[name].to(device) for row in rows]
    return batch


def policy_inputs(batch: dict[str, Any], rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Arguments of the policy's `forward` for some rows of a batch, cut to the longest of them."""
    mask = batch["attention_mask"][rows]
    # Rows are padded for the whole generation batch, of which these may be the short ones.
    length = int(mask.sum(1).max())
    return {
        "input_ids": batch["input_ids"][rows, :length],
        "attention_mask": None if mask[:, :length].all() else mask[:, :length],
        "image_codes": torch.cat(batch["image_codes"][rows]),
        "image_grids": torch.cat(batch["image_grids"][rows]),
        "policy_targets": batch["targets"][rows, :length],
    }


def add_policy_forward(model: NextFlowForCausalLM, *, temperature: float, chunk_size: int) -> None:
    """
    Teach `model.forward` the argument `policy_targets` (batch, length), token ids or -100: it then returns the
    `logps` of these targets and the `entropies`, both (batch, length) with 0 elsewhere, instead of logits.

    A code competes with codes alone and text with text, as where they are sampled. Without the argument the forward
    is the class's own. It lives on this instance: a copy of the module (`copy.deepcopy`) would run its weights.
    """

    @functools.wraps(type(model).forward)
    def forward(
        self, input_ids=None, attention_mask=None, image_codes=None, image_grids=None, policy_targets=None, **kwargs
    ):
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_codes": image_codes,
            "image_grids": image_grids,
        }
        if policy_targets is None:
            return type(self).forward(self, **inputs, **kwargs)
        # Hidden states rather than logits: only what is taught goes through the head, a chunk at a time.
        hidden_states = self.model(**inputs, use_cache=False).last_hidden_state
        score = functools.partial(chunked_log_probs, temperature=temperature, chunk_size=chunk_size)
        logps, entropies = self.score_targets(hidden_states, policy_targets, score)
        return {"logps": logps, "entropies": entropies}

    model.forward = MethodType(forward, model)
