"""What every position is trained to predict, with what weight, and the cross-entropy that never holds all logits.

One place for targets and weights: the model's loss, the trainer's counts, evaluation and reinforcement learning read
them here. Knows token ids, grids and hidden states; no modules.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .rope_nextflow import ImageLayout


IGNORE_INDEX = -100


def scale_weights(image_grids: torch.LongTensor, alpha: float) -> torch.FloatTensor:
    """Weight of one code at every scale, (n_images, max_scales): `(h * w) ** -alpha`, normalised per image so that its
    codes weigh together what they would weigh unweighted (equation 2). Zero past the last scale."""
    cells = image_grids.prod(-1).float()
    weight = torch.where(cells > 0, cells.clamp(min=1) ** -alpha, 0.0)
    return weight * cells.sum(-1, keepdim=True) / (weight * cells).sum(-1, keepdim=True).clamp(min=1e-12)


def get_targets(
    input_ids: torch.LongTensor,
    labels: torch.LongTensor,
    layout: ImageLayout | None = None,
    image_codes: torch.LongTensor | None = None,
    image_grids: torch.LongTensor | None = None,
    *,
    text_vocab_size: int,
    alpha: float,
    is_shifted: bool = False,
) -> tuple[torch.LongTensor, torch.FloatTensor]:
    """Target token id (`-100` where none) and loss weight of every position, both (batch, length).

    Text predicts the next token's label. `<boi>` predicts the 1x1 scale and every cell its own code (no shift), if the
    label at `<boi>` is not -100. `<eoi>` is forced in generation and has no loss; its slot predicts the text after it.

    Args:
        image_codes: the target codes of all images, (total_codes,), every scale of every image.
        is_shifted: whether `labels` stand where they are predicted already, one place before their tokens.
    """
    if is_shifted:
        targets, labels = labels, F.pad(labels[:, :-1], (1, 0), value=IGNORE_INDEX)
    else:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    weights = torch.ones(targets.shape, device=targets.device)
    if layout is None:
        return targets, weights

    is_slot = layout.is_slot
    num_slots = int(is_slot.sum())
    if image_codes is None or len(image_codes) != num_slots:
        got = 0 if image_codes is None else len(image_codes)
        raise ValueError(f"labels need the codes of every scale of every image: got {got} codes, expected {num_slots}")
    # In reading order, `<boi>` and the cells after it are the codes of the image, one to one.
    code_targets = torch.full_like(targets, IGNORE_INDEX).masked_scatter(is_slot, image_codes + text_vocab_size)
    boi_labels = labels[layout.scale == 1]
    trained = (boi_labels != IGNORE_INDEX)[layout.image_index.clamp(min=0)]
    targets = torch.where(is_slot, torch.where(trained, code_targets, IGNORE_INDEX), targets)
    scale = (layout.scale - 1).clamp(min=0)
    weights = torch.where(is_slot, scale_weights(image_grids, alpha)[layout.image_index.clamp(min=0), scale], weights)
    return targets, weights


def linear_cross_entropy(
    hidden_states: torch.FloatTensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.LongTensor,
    *,
    chunk_size: int,
) -> torch.FloatTensor:
    """Cross-entropy (tokens,) of `head(hidden_states)`, hidden_states (tokens, hidden), in fp32.

    Beyond `chunk_size` tokens the logits of a chunk are made, used and dropped, and made again for the gradient: the
    logits of the whole sequence never exist at once.
    """

    def chunk_loss(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="none")

    if len(targets) <= chunk_size:
        return chunk_loss(hidden_states, targets)
    chunks = zip(hidden_states.split(chunk_size), targets.split(chunk_size))
    return torch.cat([checkpoint(chunk_loss, hidden, target, use_reentrant=False) for hidden, target in chunks])


def mean_by_scale(
    losses: torch.FloatTensor, scale: torch.LongTensor, max_scales: int
) -> tuple[torch.FloatTensor, torch.LongTensor]:
    """Mean of `losses` (tokens,) at scale 0 (text) and at each image scale, (max_scales + 1,), and their counts."""
    count = torch.bincount(scale, minlength=max_scales + 1)
    total = torch.zeros(max_scales + 1, device=losses.device).index_add_(0, scale, losses.detach().float())
    return total / count.clamp(min=1), count
