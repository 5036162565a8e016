"""The arithmetic of group-relative policy optimisation over scales (§3.2.5 and its companion, arXiv:2601.02256).

Pure functions of tensors: weights of codes, the clipped objective, advantages, middle returns, masks. No model and no
trainer.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ...modeling_nextflow.loss_nextflow import scale_weights
from ...processing.scale_schedule_nextflow import num_cells


def code_weights(grids: Sequence[tuple[int, int]], alpha: float) -> torch.Tensor:
    """Loss weight of every code of the scales `grids`, (codes,): `(h * w) ** -alpha` (PANW), with mean 1.

    Summed over a grid, a weight `k_t` on every per-code ratio has on-policy the gradient of `k_t` times the paper's
    ratio of whole grids (a product of up to thousands of factors, which no clip can hold once it is off-policy).
    """
    # Normalised over the scales that are trained: a shorter prefix gets no smaller loss.
    schedule = torch.tensor([list(grids)])
    cells = schedule[0].prod(-1)
    return scale_weights(schedule, alpha)[0].repeat_interleave(cells)


def mask_to_cells(mask: np.ndarray | None, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which codes of the scales `grids` a boolean pixel mask (height, width) concerns, (codes,).

    Carried from fine to coarse: a cell is active where it overlaps an active cell of the next finer scale, a cell of
    the finest scale where it overlaps an active pixel. An empty mask, or none, leaves every cell active.
    """
    if mask is None or not mask.any():
        return torch.ones(num_cells(grids), dtype=torch.bool)
    active = torch.from_numpy(mask).float()[None, None]
    levels = []
    for grid in reversed(grids):
        # Adaptive windows overlap where sizes do not divide, so no active pixel falls between two cells.
        active = F.adaptive_max_pool2d(active, grid)
        levels.append(active.flatten() > 0)
    return torch.cat(levels[::-1])


def combine_rewards(
    rewards: torch.Tensor, weights: torch.Tensor, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (samples, functions) -> the same without failures, and their weighted sum (samples,).

    NaN: the function does not apply to the sample. Infinite: it failed. A sample is left out (NaN) where a function
    failed, where none applies, and where one applies to others of its group only: a missing term is no zero.
    """
    failed = torch.isinf(rewards)
    rewards = rewards.masked_fill(failed, torch.nan)
    missing = torch.isnan(rewards)
    # A function that applies to nobody in a group adds 0 to all of it, which leaves the group comparable.
    unused = missing.view(-1, num_generations, rewards.shape[1]).all(1, keepdim=True) & ~failed.view(
        -1, num_generations, rewards.shape[1]
    ).any(1, keepdim=True)
    unused = unused.expand(-1, num_generations, -1).reshape_as(missing)
    total = (rewards * weights).masked_fill(unused, 0.0).sum(1)
    # Where no function applies there is no reward, rather than one of 0.
    return rewards, total.masked_fill(unused.all(1), torch.nan)


def middle_return(rewards: torch.Tensor, eta: float) -> torch.Tensor:
    """Value of a prefix from the rewards (suffixes, samples) of its suffixes (VMR): `eta * log mean exp(R / eta)`.

    Suffixes whose reward is NaN are left out; a sample has NaN if all are. One suffix has its reward.
    """
    if len(rewards) == 1:
        return rewards[0]
    known = ~torch.isnan(rewards)
    # A suffix without a reward adds exp(-inf) = 0 to the sum, and is not counted below.
    exponents = torch.where(known, rewards / eta, -math.inf)
    value = eta * (torch.logsumexp(exponents, 0) - known.sum(0).clamp(min=1).log())
    return value.masked_fill(~known.any(0), torch.nan)


def group_advantages(
    rewards: torch.Tensor, num_generations: int, scale: str = "group"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (samples,) of rewards (samples,), groups one after the other, and the deviation (groups,) of each.

    `(R - mean of the group) / (standard deviation + 1e-4)`, the deviation taken over the group or, with `scale`
    `"batch"`, over all samples; `"none"` does not divide. NaN rewards are left out and have advantage 0.
    """
    groups = rewards.view(-1, num_generations)
    # With equal rewards, rounding can shift the mean; Adam would turn that noise into a full step.
    alike = ((groups == groups.nan_to_num(-math.inf).amax(1, keepdim=True)) | torch.isnan(groups)).all(1)
    centered = (groups - groups.nanmean(1, keepdim=True)).masked_fill(alike[:, None], 0.0)
    deviation = _deviation(groups, dim=1).masked_fill(alike, 0.0)
    advantages = centered
    if scale == "group":
        # As in TRL; rewards that differ by less than this are damped instead of blown up.
        advantages = centered / (deviation[:, None] + 1e-4)
    elif scale == "batch":
        advantages = centered / (_deviation(rewards, dim=0) + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale_rewards is {scale!r}, expected 'group', 'batch' or 'none'")
    return advantages.flatten().nan_to_num(0.0), deviation


def group_advantages_by_function(
    rewards: torch.Tensor, weights: torch.Tensor, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`group_advantages`], of rewards (samples, functions) that are each normalised in the group, then summed with
    their weights and normalised over all samples (TRL's `"normalize_then_sum"`)."""
    _, total = combine_rewards(rewards, weights, num_generations)
    # Normalised one by one, no function outweighs the others by its spread.
    columns = [group_advantages(column, num_generations)[0] for column in rewards.unbind(1)]
    summed = (torch.stack(columns, 1) * weights).sum(1).masked_fill(torch.isnan(total), torch.nan)
    advantages = (summed - summed.nanmean()) / (_deviation(summed, dim=0) + 1e-4)
    return advantages.nan_to_num(0.0), _deviation(total.view(-1, num_generations), dim=1)


def gated_advantages(advantages: Callable, rewards: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """
    Advantages (samples, codes) where masks gate the rewards: a code gets a reward only if the mask of that reward
    covers the code.

    The group of a code are then the samples whose masks cover it. A reward that does not look at a code is missing
    there, and a missing reward is no zero: it would make codes better or worse for being looked at.

    Args:
        advantages (`Callable`):
            Makes advantages (samples,), and something else, of rewards (samples, suffixes or functions).
        rewards (`torch.Tensor` of shape `(samples, suffixes or functions)`): Groups one after the other.
        gates (`torch.Tensor` of shape `(samples, suffixes or 1, codes)`): Which codes the masks cover.
    """
    # (samples, suffixes or functions, codes)
    gated = torch.where(gates, rewards[..., None], torch.nan)
    return torch.vmap(lambda of_code: advantages(of_code)[0], in_dims=-1, out_dims=-1)(gated)


def token_advantages(advantages: torch.Tensor, of_codes: torch.Tensor | None, scale_ids: torch.Tensor) -> torch.Tensor:
    """Advantages of tokens (samples, length): of codes (`scale_ids` above 0) in their order, of text those of the
    samples (samples,). Without `of_codes` the samples' own."""
    if of_codes is None:
        return advantages
    is_code = scale_ids > 0
    # (samples, length), the place of each token's code among the codes of its sample
    index = (is_code.cumsum(1) - 1).clamp(min=0)
    return torch.where(is_code, of_codes.gather(1, index), advantages[:, None])


def _deviation(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Standard deviation with Bessel's correction over the values that are not NaN; 0 where fewer than two are."""
    count = (~torch.isnan(values)).sum(dim)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim)
    return torch.where(count > 1, squares / (count - 1).clamp(min=1), 0.0).sqrt()


def clipped_loss(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    *,
    epsilon_low: torch.Tensor | float,
    epsilon_high: torch.Tensor | float,
    delta: float | None = None,
) -> torch.Tensor:
    """`-min(r A, clip(r, 1 - low, 1 + high) A)` per token. `delta` also bounds r where A is negative."""
    # Where A is negative the minimum is the unclipped term, which grows with r without a bound.
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(bounded * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)


def kl_to_reference(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """The estimator `exp(d) - d - 1` of KL(policy || reference) per token, d = log reference - log policy; never
    negative."""
    # Schulman's k3: unbiased for samples of the policy, with less variance than the log-ratio.
    difference = reference_logps - logps
    return difference.exp() - difference - 1


def chunked_log_probs(
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    *,
    temperature: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under `softmax(head(hidden_states) / temperature)` and the entropy, (tokens,).

    Beyond `chunk_size` tokens the logits of a chunk are made, used and dropped, and made again for the gradient.
    Entropies carry no gradient.
    """

    def chunk(hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # At the temperature of sampling, for old, new and reference alike: ratios compare one distribution.
        log_probs = (head(hidden).float() / temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, target[:, None])[:, 0], entropy.detach()

    if len(targets) == 0:
        return (hidden_states.new_zeros(0, dtype=torch.float),) * 2
    if len(targets) <= chunk_size:
        return chunk(hidden_states, targets)
    # Made again in the backward pass: logits (chunk, vocabulary) are the largest tensors of an update.
    parts = [
        checkpoint(chunk, hidden, target, use_reentrant=False)
        for hidden, target in zip(hidden_states.split(chunk_size), targets.split(chunk_size))
    ]
    return torch.cat([logps for logps, _ in parts]), torch.cat([entropies for _, entropies in parts])
