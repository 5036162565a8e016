"""Watching images grow: the same images as of the call, one scale at a time, and only as far as one looks."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.pipelines import NextFlowPreview, save_strip


GUIDED = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 8}


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    return toy_pipeline()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wide() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))


def count_passes(pipe, monkeypatch) -> list[int]:
    passes, forward = [], pipe.transformer.model.forward
    monkeypatch.setattr(pipe.transformer.model, "forward", lambda *a, **k: (passes.append(1), forward(*a, **k))[1])
    return passes


def test_previews_grow_into_the_image_of_the_call(pipe):
    call = {"prompt": "a", "num_images_per_prompt": 2, "output_type": "pt", **GUIDED}
    whole = pipe(**call, generator=seeded(0))
    previews = list(pipe.preview(**call, generator=seeded(0)))
    assert [(one.scale, one.num_scales, one.grid) for one in previews] == [
        (1, 4, (1, 1)),
        (2, 4, (2, 2)),
        (3, 4, (3, 3)),
        (4, 4, (4, 4)),
    ]
    codes = whole.image_codes.view(2, -1)
    for preview, cells in zip(previews, (1, 5, 14, 30), strict=True):
        assert preview.indices == [0, 1] and preview.images.shape == (2, 3, 16, 16)
        assert torch.equal(preview.image_codes, codes[:, :cells].flatten())
        expected = pipe.vision_tokenizer.decode(whole.image_codes, whole.image_grids, num_scales=preview.scale)
        torch.testing.assert_close(preview.images, expected / 2 + 0.5)
    assert torch.equal(previews[-1].images, whole.images) and torch.equal(previews[-1].image_grids, whole.image_grids)


def test_a_scale_is_drawn_when_it_is_asked_for(pipe, monkeypatch):
    passes = count_passes(pipe, monkeypatch)
    previews = pipe.preview("a", guidance_scale=1.0)
    for count in (1, 2, 3):
        assert next(previews).scale == count == len(passes)
        assert torch.is_grad_enabled()
    previews.close()
    assert len(passes) == 3


def test_a_preview_is_cancelled_and_finished_later(pipe):
    seen = []
    for preview in pipe.preview("a", generator=seeded(0), **GUIDED):
        seen.append(preview)
        pipe._interrupt = preview.scale == 2
    assert [one.scale for one in seen] == [1, 2] and pipe.interrupt
    last = seen[-1]
    given = {"image_codes": last.image_codes, "image_grids": last.image_grids}
    settings = {**GUIDED, "temperature": 0.0}
    finished = list(pipe.preview("a", **given, **settings))
    assert [one.scale for one in finished] == [1, 2, 3, 4]
    assert finished[1].images[0].tobytes() == last.images[0].tobytes()
    assert torch.equal(finished[-1].image_codes, pipe("a", **given, **settings).image_codes)


def test_what_is_given_in_full_is_one_preview(pipe):
    whole = pipe("a", generator=seeded(0))
    given = {"image_codes": whole.image_codes, "image_grids": whole.image_grids}
    for prompt in ({"prompt": "a"}, {}):
        (preview,) = pipe.preview(**prompt, **given)
        assert preview.images[0].tobytes() == whole.images[0].tobytes() and preview.scale == preview.num_scales == 4


def test_guidance_can_change_between_previews(pipe):
    expected = pipe("a", generator=seeded(0), **{**GUIDED, "guidance_scale": [3.0, 3.0, 7.0, 7.0]}).image_codes
    for preview in pipe.preview("a", generator=seeded(0), **GUIDED):
        if preview.scale == 2:
            pipe._guidance_scale = 7.0
    assert torch.equal(preview.image_codes, expected)


def test_a_call_that_fails_between_previews_changes_nothing(pipe):
    expected = pipe("a", generator=seeded(0), **GUIDED).image_codes
    previews = pipe.preview("a", generator=seeded(0), **GUIDED)
    next(previews)
    with pytest.raises(FileNotFoundError):
        pipe("b", image="missing.png", guidance_scale=1.0)
    assert torch.equal([*previews][-1].image_codes, expected)


def test_images_of_two_sizes_follow_each_other(pipe):
    steps = []
    call = {"prompt": ["a", "b", "c"], "image": [None, wide(), None]}
    previews = list(
        pipe.preview(**call, num_scales=3, callback_on_step_end=lambda pipe, step, scale, kwargs: steps.append(step))
    )
    assert [(one.indices, one.scale, one.images[0].size) for one in previews] == [
        *(([0, 2], scale, (16, 16)) for scale in (1, 2, 3)),
        *(([1], scale, (20, 12)) for scale in (1, 2, 3)),
    ]
    assert steps == list(range(6)) and previews[-1].num_scales == 4


def test_mistakes_are_named_before_the_first_preview(pipe):
    with pytest.raises(ValueError, match="exactly one of `prompt` and `messages`"):
        pipe.preview()
    with pytest.raises(ValueError, match="`output_type` is 'codes', expected 'pil', 'np' or 'pt'"):
        pipe.preview("a", output_type="codes")
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        pipe.preview("a", steps=3)


def test_strip(pipe, tmp_path):
    previews = list(pipe.preview("a", num_images_per_prompt=2, generator=seeded(0)))
    strip = save_strip(previews, tmp_path / "strip.png")
    assert strip.size == (64, 32)
    for column, preview in enumerate(previews):
        for row, image in enumerate(preview.images):
            left, top = 16 * column, 16 * row
            assert strip.crop((left, top, left + 16, top + 16)).tobytes() == image.tobytes()
    assert Image.open(tmp_path / "strip.png").tobytes() == strip.tobytes()
    assert save_strip([preview.images[0] for preview in previews]).size == (64, 16)
    with pytest.raises(ValueError, match="at least one preview"):
        save_strip([])
    with pytest.raises(ValueError, match="of PIL images"):
        save_strip(list(pipe.preview("a", output_type="np")))
    with pytest.raises(ValueError, match="images of one size"):
        save_strip([*previews, wide()])
    assert isinstance(previews[0], NextFlowPreview)
