"""The numbers that the diffusion decoder's benchmark reports, on pictures whose numbers are known."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_decoder import toy_decoder_pipeline

from nextflow_hf import NextFlowDiffusionDecoderPipeline
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


def load_benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "diffusion_decoder_shapes.py"
    spec = importlib.util.spec_from_file_location("diffusion_decoder_shapes", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def test_the_benchmark_writes_its_tables_and_picture(tmp_path, monkeypatch):
    """Of a decoder of the pictures' size, and of one of twice that, which is judged at both."""
    for factor in (1, 2):
        parts = toy_decoder_pipeline("unet", channels=3, upscale_factor=factor).components
        NextFlowDiffusionDecoderPipeline(**{**parts, "vae": None}).save_pretrained(tmp_path / f"decoder_{factor}")
    arguments = ["--decoder", tmp_path / "decoder_1", tmp_path / "decoder_2", "--output-dir", tmp_path / "out"]
    sizes = ["--num-images", 3, "--num-edits", 8, "--steps", 2]
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, [*arguments, *sizes])])
    load_benchmark().main()
    titles = [
        [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")]
        for part in (tmp_path / "out" / "tables.md").read_text().split("32 x 32 pixels")
    ]
    starts = ("noise", "the VQ picture at strength 0.5")
    diffusion = [f"diffusion {factor}x, 2 steps, from {start}" for factor in (1, 2) for start in starts]
    enlarged = [f"VQ, enlarged by a {name} filter" for name in ("bicubic", "Lanczos")]
    assert titles == [["decoder", "VQ", *diffusion], ["decoder", *enlarged, *diffusion[2:]]]
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert all(math.isfinite(v) for rows in numbers["rows"].values() for row in rows.values() for v in row.values())
    vq = numbers["rows"]["16"]["VQ"]
    assert vq["nearer"] == 0 and vq["psnr"] == pytest.approx(sum(numbers["pictures"]["16: VQ"]["psnr"]) / 3)
    assert Image.open(tmp_path / "out" / "pictures.png").size == (6 * 256, 5 * (256 + 16))


def test_the_benchmark_measures_what_it_says(tmp_path):
    """A decoder that gives back the truth is perfect where edits leave it alone, and enlarging blurs."""
    benchmark = load_benchmark()
    rng = np.random.default_rng(0)
    edits = [benchmark.sample_edit(rng) for _ in range(20)]
    edits = [edit for edit in edits if edit.source.background == edit.target.background]
    sources, targets = (benchmark.draw([getattr(edit, name) for edit in edits], 128) for name in ("source", "target"))
    same = (sources == targets).all(1)
    numbers = benchmark.measure(targets, targets, targets, (sources, same), None)
    assert (numbers["untouched"] == 100).all() and (numbers["psnr"] == 100).all() and (numbers["gmsd"] < 1e-6).all()
    for name in benchmark.FILTERS:
        small = benchmark.draw([edit.target for edit in edits], 64)
        numbers = benchmark.measure(benchmark.resized(small, 128, name), targets, targets, (sources, same), None)
        assert (numbers["sharpness"] < 0.9).all() and (numbers["gmsd"] > 1e-3).all()
    reduced = benchmark.resized(targets, 64)
    assert reduced.shape[-1] == 64 and peak_signal_to_noise(reduced, small).mean() > 40
