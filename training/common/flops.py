"""What a document costs: floating-point operations of the transformer by its length and its images.

Arithmetic on a config and grids; no weights. As usual a multiplication with its addition counts two, and
norms, activations and softmax are left out.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ...modeling_nextflow.configuration_nextflow import NextFlowConfig


PEAK_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}

_Count = int | float | np.ndarray | torch.Tensor
Grids = Sequence[Sequence[int]]  # (height, width) of every scale of an image; zeros past the last


def attended_pairs(length: int, image_grids: Iterable[Grids] = ()) -> int:
    """Pairs of a query and a key that it sees: causal, and all within each scale (§2.2)."""
    pairs = length * (length + 1) // 2
    for grids in image_grids:
        for height, width in grids[1:]:
            cells = int(height) * int(width)
            pairs += cells * (cells - 1) // 2  # those that come later in the same scale
    return pairs


def training_flops(
    config: NextFlowConfig, length: int, image_grids: Iterable[Grids] = (), *, frozen: bool = False
) -> float:
    """FLOPs of one document, forward and backward, with every token supervised. Attention ends at the document.

    Recomputed activations do not count: this is the model's work, the numerator of its utilisation.

    Args:
        length: tokens, cells of images included.
        image_grids: the schedules of the document's images.
        frozen: whether the weights are (as under LoRA, whose own matrices are left out): then the backward pass has
            one product for each of the forward pass, that of the activations, and not two.
    """
    image_grids = list(image_grids)
    codes = sum(int(height) * int(width) for grids in image_grids for height, width in grids)
    pairs = attended_pairs(length, image_grids)
    return flops_of_counts(config, length, len(image_grids), codes, pairs, frozen=frozen)


def flops_of_counts(
    config: NextFlowConfig, length: _Count, images: _Count, codes: _Count, pairs: _Count, *, frozen: bool = False
) -> _Count:
    """[`training_flops`] from counts: numbers, or arrays or tensors of many documents; `pairs` as in
    [`attended_pairs`]."""
    linear = length * (config.num_hidden_layers * _layer_parameters(config))
    linear = linear + (codes - images) * _connector_parameters(config)  # the 1x1 scale is no cell
    # The head multiplies the rows that a token is predicted among.
    code_rows = config.vocab_size if config.joint_image_loss else config.codebook_size
    # `<boi>` and the cells predict codes and nothing else.
    linear = linear + config.hidden_size * (codes * code_rows + (length - codes) * config.vocab_size)
    # Scores and their sum of values, each a product of the width of all heads.
    attention = pairs * (2 * config.num_attention_heads * config.head_dim) * config.num_hidden_layers
    # A product has two in the backward pass, one for each of its factors. Frozen weights need none.
    backward = attention * 2 + linear * (1 if frozen else 2)
    return 2.0 * (linear + attention + backward)


def batch_flops(config: NextFlowConfig, batch: dict[str, torch.Tensor], *, frozen: bool = False) -> torch.Tensor:
    """
    [`training_flops`] of the documents of a batch, as a float64 scalar on its device: nothing waits for it. Padding
    counts only at the end of a pack, where it is a document.

    Args:
        batch (`dict[str, torch.Tensor]`): From one of our collators, with codes; images in pixels are not counted.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if (positions := batch.get("position_ids")) is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    # A token at place p of its document sees p + 1 keys: packed documents restart, and so end what is seen.
    seen = (positions.double() + 1) * (1 if mask is None else mask)
    length = ids.numel() if mask is None else mask.sum().double()
    if (grids := batch.get("image_grids")) is None:
        return flops_of_counts(config, length, 0, 0, seen.sum(), frozen=frozen)
    cells = grids.prod(-1).double()
    pairs = seen.sum() + (cells * (cells - 1) / 2)[:, 1:].sum()
    return flops_of_counts(config, length, len(grids), cells.sum(), pairs, frozen=frozen)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its data sheet, or None where it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def _layer_parameters(config: NextFlowConfig) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # queries and outputs, keys and values
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def _connector_parameters(config: NextFlowConfig) -> int:
    return config.hidden_size * (config.semantic_code_dim + config.pixel_code_dim + config.hidden_size)
