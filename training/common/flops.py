"""What a document costs: floating-point operations of the transformer by its length and its images.

Arithmetic on a config and grids; no tensors, no weights. As usual a multiplication with its addition counts two, and
norms, activations and softmax are left out.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from ...modeling_nextflow.configuration_nextflow import NextFlowConfig


_Count = int | np.ndarray
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
    pairs = attended_pairs(length, image_grids) - attended_pairs(length)
    return flops_of_counts(config, length, len(image_grids), codes, pairs, frozen=frozen)


def flops_of_counts(
    config: NextFlowConfig, length: _Count, images: _Count, codes: _Count, pairs: _Count, *, frozen: bool = False
) -> float | np.ndarray:
    """[`training_flops`] of one document or, with arrays, of many: their tokens, images, codes, and the pairs that
    they see within scales besides the causal ones."""
    linear = length * (config.num_hidden_layers * _layer_parameters(config))
    linear = linear + (codes - images) * _connector_parameters(config)  # the 1x1 scale is no cell
    code_rows = config.vocab_size if config.joint_image_loss else config.codebook_size
    # `<boi>` and the cells predict codes and nothing else.
    linear = linear + config.hidden_size * (codes * code_rows + (length - codes) * config.vocab_size)
    # Scores and their sum of values, each a product of the width of all heads.
    attention = (attended_pairs(length) + pairs) * (2 * config.num_attention_heads * config.head_dim)
    attention = attention * config.num_hidden_layers
    backward = attention * 2 + linear * (1 if frozen else 2)
    return 2.0 * (linear + attention + backward)


def _layer_parameters(config: NextFlowConfig) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # queries and outputs, keys and values
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def _connector_parameters(config: NextFlowConfig) -> int:
    return config.hidden_size * (config.semantic_code_dim + config.pixel_code_dim + config.hidden_size)


__all__ = ["attended_pairs", "flops_of_counts", "training_flops"]
