"""The numbers that the diffusion decoder's benchmark reports, on pictures whose numbers are known."""

import math

import pytest
import torch

from nextflow_hf.training.evaluation.reconstruction import (
    edge_steepness,
    gradient_similarity_deviation,
    peak_signal_to_noise,
)


def edge(width: int) -> torch.Tensor:
    """Black to white over `width` pixels, (1, 3, 16, 32)."""
    ramp = ((torch.arange(32) - 8) / width).clamp(0, 1)
    return ramp.expand(1, 3, 16, 32)


def test_an_edge_of_twice_the_width_is_half_as_steep():
    values = [edge_steepness(edge(width)).item() for width in (1, 2, 4, 8)]
    assert values == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])
    assert edge_steepness(edge(2).roll(5, -1)[..., 5:]).item() == pytest.approx(1 / 2)


def test_psnr_inside_a_mask():
    true = torch.zeros(1, 3, 4, 4)
    decoded = true.clone()
    decoded[..., :2] = 0.5
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[..., 1:3] = True
    assert peak_signal_to_noise(decoded, true).item() == pytest.approx(-10 * math.log10(0.125))
    assert peak_signal_to_noise(decoded, true, mask).item() == pytest.approx(-10 * math.log10(0.125))
    assert peak_signal_to_noise(decoded, true, ~mask.roll(1, -1)).item() == pytest.approx(-10 * math.log10(0.25))
    assert peak_signal_to_noise(true, true).item() == 100
    with pytest.raises(ValueError, match="mask is empty"):
        peak_signal_to_noise(decoded, true, torch.zeros_like(mask))


def test_gmsd_is_the_deviation_of_gradient_similarity():
    true, blurred = edge(1), edge(6)
    value = gradient_similarity_deviation(blurred, true).item()

    def magnitudes(picture):
        gray = [[sum(picture[0, 0, 2 * r + i, 2 * c + j].item() for i in (0, 1) for j in (0, 1)) / 4
                 for c in range(16)] for r in range(8)]  # fmt: skip
        get = lambda r, c: gray[r][c] if 0 <= r < 8 and 0 <= c < 16 else 0.0  # noqa: E731
        rows = []
        for r in range(8):
            for c in range(16):
                x = sum(get(r + k, c - 1) - get(r + k, c + 1) for k in (-1, 0, 1)) / 3
                y = sum(get(r - 1, c + k) - get(r + 1, c + k) for k in (-1, 0, 1)) / 3
                rows.append(math.hypot(x, y))
        return rows

    constant = 170 / 255**2
    pairs = zip(magnitudes(blurred), magnitudes(true))
    similar = [(2 * a * b + constant) / (a * a + b * b + constant) for a, b in pairs]
    mean = sum(similar) / len(similar)
    expected = math.sqrt(sum((one - mean) ** 2 for one in similar) / len(similar))
    assert value == pytest.approx(expected, rel=1e-4) and value > 0.01
    assert gradient_similarity_deviation(true, true).item() == pytest.approx(0, abs=1e-6)
