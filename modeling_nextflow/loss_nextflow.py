"""What every position is trained to predict, with what weight, and the cross-entropy that never holds all logits.

One place for targets and weights: the model's loss, the trainer's counts, evaluation and reinforcement learning read
them here. Knows token ids, grids, hidden states and a head; nothing of the model before it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .grids_nextflow import ImageLayout


IGNORE_INDEX = -100


def scale_weights(image_grids: torch.Tensor, alpha: float) -> torch.Tensor:
    """Weight of one code at every scale, (n_images, max_scales): `(h * w) ** -alpha`, normalised per image so that its
    codes weigh together what they would weigh unweighted (equation 2). Zero past the last scale."""
    cells = image_grids.prod(-1).float()
    # Where there is no scale `cells` is 0, and 0 ** -alpha would be infinite.
    weight = torch.where(cells > 0, cells.clamp(min=1) ** -alpha, 0.0)
    return weight * cells.sum(-1, keepdim=True) / (weight * cells).sum(-1, keepdim=True).clamp(min=1e-12)


def get_targets(
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    layout: ImageLayout | None = None,
    image_codes: torch.Tensor | None = None,
    image_grids: torch.Tensor | None = None,
    *,
    text_vocab_size: int,
    alpha: float,
    is_shifted: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target token id (`-100` where none) and loss weight of every position, both (batch, length).

    Text predicts the next token's label. `<boi>` predicts the 1x1 scale and every cell its own code (no shift), if the
    label at `<boi>` is not -100. `<eoi>` is forced in generation and has no loss; its slot predicts the text after it.

    Args:
        image_codes: the target codes of all images, (total_codes,), every scale of every image.
        is_shifted: whether `labels` stand where they are predicted already, one place before their tokens.
    """
    # `targets` stand where they are predicted, `labels` where their tokens are: `<boi>` is asked by its own label.
    if is_shifted:
        targets, labels = labels, F.pad(labels[:, :-1], (1, 0), value=IGNORE_INDEX)
    else:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    weights = torch.ones(targets.shape, device=targets.device)
    if layout is None:
        return targets, weights

    is_slot = layout.is_slot
    num_slots = int(is_slot.sum())
    if image_codes is None or image_grids is None or len(image_codes) != num_slots:
        got = 0 if image_codes is None else len(image_codes)
        raise ValueError(f"labels need the codes of every scale of every image: got {got} codes, expected {num_slots}")
    # In reading order, `<boi>` and the cells after it are the codes of the image, one to one.
    # Code `c` is token `text_vocab_size + c` of the one head.
    code_targets = torch.full_like(targets, IGNORE_INDEX).masked_scatter(is_slot, image_codes + text_vocab_size)
    boi_labels = labels[layout.scale == 1]
    # (batch, length); `image_index` is -1 before the first image, where nothing is a slot.
    trained = (boi_labels != IGNORE_INDEX)[layout.image_index.clamp(min=0)]
    # The last cell predicts its own code, so nothing is trained to predict `<eoi>`.
    targets = torch.where(is_slot, torch.where(trained, code_targets, IGNORE_INDEX), targets)
    scale = (layout.scale - 1).clamp(min=0)
    weights = torch.where(is_slot, scale_weights(image_grids, alpha)[layout.image_index.clamp(min=0), scale], weights)
    return targets, weights


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    *,
    chunk_size: int,
) -> torch.Tensor:
    """Cross-entropy (tokens,) of `head(hidden_states)`, hidden_states (tokens, hidden), in fp32. For any head.

    Beyond `chunk_size` tokens the logits of a chunk are made, used and dropped, and made again for the gradient: the
    logits of the whole sequence never exist at once.
    """

    def chunk_loss(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="none")

    if len(targets) <= chunk_size:
        return chunk_loss(hidden_states, targets)
    chunks = zip(hidden_states.split(chunk_size), targets.split(chunk_size))
    # Not reentrant: the head may need a gradient where hidden states need none.
    return torch.cat([checkpoint(chunk_loss, hidden, target, use_reentrant=False) for hidden, target in chunks])


def weighted_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    parts: list[tuple[int, slice]],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the tokens' cross-entropies, and each of them (tokens,), detached.

    The gradient is made with the logits, a chunk at a time, as the weights of the tokens are known by then: no logits
    are kept or made twice, as [`linear_cross_entropy`] must. Under autocast it multiplies in autocast's dtype;
    softmax and sums are in fp32.

    Args:
        hidden_states, targets, token_weights: (tokens, hidden), (tokens,), (tokens,).
        weight: the head's, (vocabulary, hidden).
        parts: how many tokens, one after the other, are predicted among which rows of the head.
        chunk_size: tokens whose logits exist at the same time.
    """
    return _WeightedCrossEntropy.apply(
        hidden_states, weight, targets, token_weights, parts, chunk_size, torch.is_grad_enabled()
    )


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, targets, token_weights, parts, chunk_size, with_gradients):
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        hidden_needed, weight_needed = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        # Every row of the one is written below; rows of the head without a target keep a gradient of zero.
        hidden_gradient = torch.empty_like(hidden_states) if hidden_needed else None
        weight_gradient = torch.zeros_like(weight) if weight_needed else None
        # In float32, as everything that is summed here.
        losses = torch.empty(targets.shape, device=targets.device)
        end = 0
        # The dtype is chosen above, for all products alike: autocast does not reach the in-place `addmm_`.
        with torch.autocast(device, enabled=False):
            for count, rows in parts:
                first, end = end, end + count
                matrix = weight[rows].to(dtype)
                for start in range(first, end, chunk_size):
                    chunk = slice(start, min(start + chunk_size, end))
                    hidden = hidden_states[chunk].to(dtype)
                    target = (targets[chunk] - rows.start)[:, None]
                    scores = (hidden @ matrix.T).float()  # (chunk, rows), and reused for all that follows
                    # Against overflow; softmax does not change.
                    scores -= scores.amax(-1, keepdim=True)
                    target_score = scores.gather(1, target)
                    total = scores.exp_().sum(-1, keepdim=True)
                    losses[chunk] = (total.log() - target_score)[:, 0]
                    if not (hidden_needed or weight_needed):
                        continue
                    token_weight = token_weights[chunk, None]
                    # The gradient of a cross-entropy: weight * (softmax - one-hot).
                    gradient = scores.mul_(token_weight / total).scatter_add_(1, target, -token_weight).to(dtype)
                    if hidden_gradient is not None:
                        hidden_gradient[chunk] = gradient @ matrix
                    if weight_gradient is not None and weight.dtype == dtype:
                        weight_gradient[rows].addmm_(gradient.T, hidden)
                    # Master weights in float32 with half-precision products: the sum over chunks stays in float32.
                    elif weight_gradient is not None:
                        weight_gradient[rows] += gradient.T @ hidden
        ctx.gradients = hidden_gradient, weight_gradient
        # For reports: no gradient was made for the tokens one by one.
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss are gone: it can go backward once, retain_graph or not")
        # In place and then forgotten: the head's gradient is the largest tensor of a step.
        gradients = [gradient if gradient is None else gradient.mul_(loss_gradient) for gradient in ctx.gradients]
        ctx.gradients = None
        return *gradients, None, None, None, None, None


@torch.no_grad()
def token_scores(
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    *,
    parts: list[tuple[torch.Tensor, slice]],
    chunk_size: int,
) -> torch.Tensor:
    """Cross-entropy, entropy, and 1 where the target is the most likely, of every token: (3, tokens).

    `parts` are the targets, one after the other, and the rows of the head among which they are predicted.
    """
    scores, groups = [], hidden_states.split([len(targets) for targets, _ in parts])
    for group, (targets, rows) in zip(groups, parts):
        for hidden, target in zip(group.split(chunk_size), (targets - rows.start).split(chunk_size)):
            # (tokens of a chunk, rows)
            log_probs = head(hidden)[..., rows].float().log_softmax(-1)
            loss = F.nll_loss(log_probs, target, reduction="none")
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            scores.append(torch.stack([loss, entropy, (log_probs.argmax(-1) == target).float()]))
    return torch.cat(scores, dim=1)


class TokenLosses(torch.autograd.Function):
    """The losses of the tokens that add up to `total`, with the gradient of their sum.

    The gradient of `total` was made with the weights of the tokens in it: a trainer that weighs them again is refused.
    """

    @staticmethod
    def forward(ctx, total: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # One number for all tokens, or the gradient made in `forward` is not theirs.
        first = gradient.flatten()[0]
        if (gradient != first).any():
            raise ValueError(
                "the trainer weighs the tokens of the loss anew, which have the weights of their scales: only TRL's "
                "SFTTrainer with loss_type='nll' trains this model"
            )
        return first, None


def mean_by_scale(losses: torch.Tensor, scale: torch.Tensor, max_scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of `losses` (tokens,) at scale 0 (text) and at each image scale, (max_scales + 1,), and their counts."""
    count = torch.bincount(scale, minlength=max_scales + 1)
    # A scale without tokens has mean 0 and count 0.
    total = torch.zeros(max_scales + 1, device=losses.device).index_add_(0, scale, losses.detach().float())
    return total / count.clamp(min=1), count
