"""Sampling a scale: the distribution and its cuts, what a sample depends on, and what is refused."""

import math

import numpy as np
import pytest
import torch
from toy import BOI, CODES, SQUARE, grids_tensor, toy_model

from nextflow_hf import NextFlowGenerationConfig
from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.modeling_nextflow import generation_image_nextflow
from nextflow_hf.modeling_nextflow.image_settings_nextflow import (
    CONFIG_NAMES,
    IMAGE_DEFAULTS,
    PAPER_SAMPLING,
)
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.modeling_nextflow.sampling_nextflow import (
    ScaleStep,
    _splitmix,
    guide,
    random_numbers,
    sample,
    sample_codes,
    scale_plan,
    top_codes,
)


NEUTRAL = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
PROMPT = {"input_ids": torch.tensor([[5, 6, BOI]]), "image_grids": grids_tensor(SQUARE)}


@pytest.fixture(scope="module")
def model() -> NextFlowForCausalLM:
    return toy_model()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(cells: int) -> torch.Tensor:
    return random_numbers([seeded()], 1, cells, torch.device("cpu"))


def test_sampling_follows_the_distribution_and_its_cuts():
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = probabilities.log().expand(1, 40000, 5)

    def frequencies(**settings):
        step = ScaleStep((1, 1), **{**NEUTRAL, **settings})
        codes = sample_codes(logits, step, numbers(40000))
        return torch.bincount(codes[0], minlength=5) / 40000

    torch.testing.assert_close(frequencies(), probabilities, atol=0.01, rtol=0)
    two = torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65
    torch.testing.assert_close(frequencies(top_k=2), two, atol=0.01, rtol=0)
    three = torch.tensor([0, 0.4, 0, 0.25, 0.2]) / 0.85  # 0.4 + 0.25 < 0.7 <= 0.85
    torch.testing.assert_close(frequencies(top_p=0.7), three, atol=0.01, rtol=0)
    cold = (probabilities**2) / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(temperature=0.5), cold, atol=0.01, rtol=0)
    assert frequencies(temperature=0.0).tolist() == [0, 1, 0, 0, 0]


def test_the_noise_of_a_choice_is_splitmix64():
    def reference(seed: int, index: int) -> int:
        whole = 2**64 - 1
        bits = (seed + (index + 1) * 0x9E3779B97F4A7C15) & whole
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & whole
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & whole
        return (bits ^ (bits >> 31)) & (2**63 - 1)

    seeds, indices = torch.tensor([0, 5, 2**62 + 7, 123456789]), torch.tensor([0, 1, 31, 32767])
    assert _splitmix(seeds, indices).tolist() == [
        reference(*pair) for pair in zip(seeds.tolist(), indices.tolist(), strict=True)
    ]


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_sample_does_not_depend_on_the_order_of_near_ties(cut):
    """Rounding that depends on the batch turns the order of codes that are nearly tied."""
    step = ScaleStep((1, 1), **{**NEUTRAL, **cut})
    logits = torch.full((1, 2000, 6), -20.0)
    logits[..., :3] = torch.tensor([1.0, 1.0, 0.0])
    rounding = 1e-4 * torch.randn(logits.shape, generator=seeded(1))
    codes = sample_codes(logits, step, numbers(2000))
    assert (sample_codes(logits + rounding, step, numbers(2000)) != codes).float().mean() < 0.002
    assert codes.unique().tolist() == [0, 1, 2]


def test_a_change_far_from_a_sample_leaves_it():
    scores = torch.zeros(1, 500, 8)
    before = sample(scores, [seeded()])
    scores[..., 0] = -math.inf  # its mass goes to all others; who had another sample keeps it
    after = sample(scores, [seeded()])
    assert torch.equal(before[before != 0], after[before != 0]) and (after != 0).all()


@pytest.mark.parametrize("count", [1, 7, 300])
def test_top_codes_are_those_of_topk(count):
    scores = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 4], scores[1, 1, 7:] = math.nan, -math.inf
    best, places = top_codes(scores, count)
    torch.testing.assert_close(best, scores.topk(count, dim=-1).values, equal_nan=True)
    torch.testing.assert_close(scores.gather(-1, places), best, equal_nan=True)
    assert all(row.unique().numel() == count for row in places.flatten(0, 1))


def test_scale_plan_fans_out():
    plan = scale_plan(SQUARE, guidance_scale=5.0, guidance_schedule="linear", top_k=[4, 3, 2, 1], temperature=0.5)
    assert [step.guidance_scale for step in plan] == pytest.approx([1, 1 + 4 / 3, 1 + 8 / 3, 5])
    assert [step.top_k for step in plan] == [4, 3, 2, 1]
    assert [step.grid for step in plan] == SQUARE and {step.temperature for step in plan} == {0.5}
    early = scale_plan(SQUARE, guidance_scale=5.0, guidance_schedule="early", image_guidance_scale=[2, 2, 2, 1])
    assert [step.guidance_scale for step in early] == [5, 5, 1, 1]
    assert [step.num_conditions for step in early] == [3, 3, 3, 1]  # a list is taken as it is
    with pytest.raises(ValueError, match="top_p has 2 entries, expected one for each of the 4 scales"):
        scale_plan(SQUARE, top_p=[0.5, 0.6])
    with pytest.raises(ValueError, match=r"guidance_schedule is 'cosine', expected one of \['constant'"):
        scale_plan(SQUARE, guidance_schedule="cosine")


def test_a_setting_that_there_is_not_names_those_there_are(model):
    message = r"got \['top_q'\], expected settings of images: \['guidance_scale', .*'top_p'"
    with pytest.raises(TypeError, match=message):
        scale_plan(SQUARE, top_q=0.5)
    with pytest.raises(TypeError, match=message):
        model.get_image_settings(top_q=0.5)
    with pytest.raises(TypeError, match=message):
        model.generate_images(**PROMPT, top_q=0.5)


def test_the_papers_guidance_is_vars():
    """VAR: `(1 + t) * logits - t * unconditional` with t from 0 to its cfg, 5 in the paper."""
    logits, unconditional = torch.randn(2, 1, 1, CODES, generator=seeded())
    for index, step in enumerate(scale_plan(SQUARE, guidance_scale=6.0, guidance_schedule="linear")):
        t = 5 * index / (len(SQUARE) - 1)
        expected = (1 + t) * logits - t * unconditional
        torch.testing.assert_close(guide(logits, unconditional, step.guidance_scale), expected)
    names = [CONFIG_NAMES[name] for name in IMAGE_DEFAULTS if name != "image_guidance_scale"]
    assert PAPER_SAMPLING.keys() == set(names) and PAPER_SAMPLING["guidance_scale"] == 6
    shipped = NextFlowGenerationConfig.from_pretrained(shapes_model_path())
    assert all(getattr(shipped, name) is not None for name in names)


def test_numpy_scalars_are_numbers():
    step = scale_plan(SQUARE, guidance_scale=np.float32(1.5), top_k=[np.int64(3), None, 2.0, 1])[0]
    assert (step.guidance_scale, step.top_k) == (1.5, 3)
    assert type(step.guidance_scale) is float and type(step.top_k) is int


BAD_SETTINGS = {
    "fraction": ({"top_k": 2.5}, r"top_k is 2.5, expected a whole number"),
    "bool": ({"guidance_scale": True}, r"guidance_scale is True \(bool\), expected a number"),
    "NumPy bool": ({"top_p": np.True_}, r"top_p is .*True.* \(bool.*\), expected a number"),
    "string": ({"temperature": "1"}, r"temperature is '1' \(str\), expected a number"),
    "list of strings": ({"temperature": ["1"] * 4}, r"temperature is '1' \(str\), expected a number"),
    "array": ({"guidance_scale": np.ones(4)}, r"guidance_scale is array.* \(ndarray\), expected a number"),
    "tensor": ({"guidance_scale": torch.ones(4)}, r"guidance_scale is tensor.* \(Tensor\), expected a number"),
    "NaN": ({"temperature": math.nan}, r"temperature is nan, expected a number in \[0, inf\]"),
    "infinite": ({"guidance_scale": math.inf}, "guidance_scale is inf, expected a number"),
    "negative": ({"top_k": -1}, "top_k is -1, expected a number in"),
    "too much mass": ({"top_p": 2}, r"top_p is 2, expected a number in \[0, 1.0\]"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_of_another_type_are_refused_by_name(model, case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        scale_plan(SQUARE, **settings)
    with pytest.raises(ValueError, match=message):
        model.generate_images(**PROMPT, **settings)


# ---- numbers that are not finite

NOT_FINITE = {
    "guidance": ({"guidance_scale": [1.0, 1.0, 1e38, 1.0], "temperature": 1e-3}, "scale 3"),
    "temperature": ({"temperature": [1.0, 1e-39, 1.0, 1.0]}, "scale 2"),
}


@pytest.mark.parametrize("at_once", [True, False], ids=["CPU", "accelerator"])
@pytest.mark.parametrize("case", NOT_FINITE)
def test_logits_that_are_not_finite_are_refused_with_their_scale(model, monkeypatch, case, at_once):
    monkeypatch.setattr(generation_image_nextflow, "SYNCHRONOUS", {"cpu"} if at_once else ())
    settings, scale = NOT_FINITE[case]
    seen = []
    with pytest.raises(ValueError, match=f"the logits of {scale} .* are not finite with guidance_scale"):
        model.generate_images(
            **PROMPT,
            negative_input_ids=torch.tensor([[9, BOI]]),
            callback=lambda index, *_: seen.append(index),
            **settings,
        )
    assert len(seen) == (int(scale[-1]) - 1 if at_once else len(SQUARE) - 1)


def test_weights_that_are_not_finite_are_refused(monkeypatch):
    broken = toy_model()
    broken.lm_head.weight.data[:, 0] = math.nan
    for cut in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"scale 1 \(1x1\) are not finite"):
            broken.generate_images(**PROMPT, **cut)
    with pytest.raises(ValueError, match="text token 1 are not finite"):
        broken.generate(
            torch.tensor([[5, 6]]), generation_mode="interleaved", max_images=0, max_new_tokens=4, do_sample=True
        )
    # An accelerator is asked after the last scale that there is, also where a callback ends the image early.
    monkeypatch.setattr(generation_image_nextflow, "SYNCHRONOUS", ())
    with pytest.raises(ValueError, match=r"scale 1 \(1x1\) are not finite"):
        broken.generate_images(**PROMPT, callback=lambda *_: [])


@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sampling_what_is_not_finite_gives_an_index_that_exists(cut, value):
    """It is refused later; until then an accelerator must not stop at an index out of range."""
    codes = sample_codes(torch.full((1, 3, CODES), value), ScaleStep((1, 3), **{**NEUTRAL, **cut}), numbers(3))
    assert ((codes >= 0) & (codes < CODES)).all()


# ---- codes of no codebook

PREFIXES = {
    "beyond": (torch.tensor([[CODES]]), r"prefix_codes must lie in \[0, 24\), got 24 to 24"),
    "negative": (torch.tensor([[-1]]), r"prefix_codes must lie in \[0, 24\), got -1 to -1"),
    "floats": (torch.tensor([[1.0]]), "prefix_codes are torch.float32, expected integers"),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_prefix_codes_out_of_range_are_refused(model, case):
    codes, message = PREFIXES[case]
    with pytest.raises(ValueError, match=message):
        model.generate_images(**PROMPT, prefix_codes=codes)
    everywhere = torch.ones_like(codes, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        model.generate_images(**PROMPT, prefix_codes=codes, prefix_mask=everywhere)


def test_codes_that_a_callback_puts_back_are_checked(model):
    scales = model.stream_images(**PROMPT)
    scale = next(scales)
    scale.image_codes = torch.full_like(scale.image_codes, CODES)
    with pytest.raises(ValueError, match=r"image_codes must lie in \[0, 24\), got 24 to 24"):
        next(scales)
