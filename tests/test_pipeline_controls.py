"""What a call can ask for beyond a prompt: guidance of text and images apart, drafts, variations, redrawn regions."""

import copy
import doctest
import itertools
import logging
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from nextflow_hf.modeling_nextflow.sampling_nextflow import guide
from nextflow_hf.pipelines import pipeline_nextflow
from nextflow_hf.pipelines.inpainting_nextflow import cell_footprint, inpainted_cells
from nextflow_hf.training.data.messages import drop_condition


GUIDED = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 8}
SIZES = (1, 4, 9, 16)  # cells of the scales of a square


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    return toy_pipeline()


@pytest.fixture(scope="module")
def earlier(pipe):
    """A result to go on from."""
    return pipe("a", generator=seeded(0), output_type="codes", **GUIDED)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def codes_of(pipe, prompt=None, *, seed=0, **kwargs) -> list[int]:
    generator = [seeded(one) for one in seed] if isinstance(seed, list) else seeded(seed)
    return pipe(prompt, generator=generator, output_type="codes", **{**GUIDED, **kwargs}).image_codes.tolist()


def codes_in(output) -> dict:
    return {"image_codes": output.image_codes, "image_grids": output.image_grids}


def count_rows(pipe, monkeypatch) -> list[int]:
    """Batch size of every pass of the transformer's decoder."""
    rows, forward = [], pipe.transformer.model.forward

    def counting(*args, **kwargs):
        output = forward(*args, **kwargs)
        rows.append(len(output.last_hidden_state))
        return output

    monkeypatch.setattr(pipe.transformer.model, "forward", counting)
    return rows


# --- sizes


def test_every_bucket_at_every_level(pipe):
    schedule = pipe.processor.image_processor.schedule
    for bucket, resolution in itertools.product(schedule.buckets, schedule.resolutions):
        height, width = schedule.pixel_size(bucket, schedule.num_scales(resolution))
        output = pipe("a", aspect_ratio=f"{bucket[1]}:{bucket[0]}", resolution=resolution)
        assert output.images[0].size == (width, height)
        grids = schedule.grids(bucket, schedule.num_scales(resolution))
        assert output.image_grids[0, : len(grids)].tolist() == [list(grid) for grid in grids]


def test_a_snapped_size_is_named_once_a_call(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe(["a", "b"], height=12, width=20, **GUIDED)
        assert not caplog.messages
        pipe(["a", "b"], height=13, width=21, num_images_per_prompt=2, **GUIDED)
    assert len(caplog.messages) == 1 and "12 x 20" in caplog.text


# --- sampling and guidance


def test_sampling_settings_a_scale(pipe):
    best = codes_of(pipe, "a", temperature=0.0)
    assert codes_of(pipe, "a", temperature=[0, 0.0, 0, 0]) == best
    assert codes_of(pipe, "a", top_k=1) == codes_of(pipe, "a", top_k=[1, 1, 1, 1]) == best
    assert codes_of(pipe, "a", top_k=0, top_p=0.0) == codes_of(pipe, "a", top_k=0, top_p=[0.0] * 4) == best
    mixed = codes_of(pipe, "a", temperature=[0, 0, 1.0, 1.0])
    assert mixed[:5] == best[:5] and mixed != best
    assert codes_of(pipe, "a", temperature=[0, 0, 1.0, None]) == mixed


def test_guidance_of_text_and_images_by_hand():
    whole, imageless_text, nothing = torch.tensor([5.0, 2.0]), torch.tensor([3.0, 2.0]), torch.tensor([1.0, 4.0])
    found = guide(whole, imageless_text, 2.0, imageless=nothing, image_scale=3.0)
    assert found.tolist() == [1 + 3 * (3 - 1) + 2 * (5 - 3), 4 + 3 * (2 - 4) + 2 * (2 - 2)]
    assert guide(whole, imageless_text, 2.0, imageless=nothing).tolist() == guide(whole, imageless_text, 2.0).tolist()


def test_image_guidance_costs_a_third_row_where_it_is_used(pipe, monkeypatch):
    rows = count_rows(pipe, monkeypatch)
    edit = {"prompt": "a", "image": [picture(), picture(20, 12)]}
    codes_of(pipe, **edit, image_guidance_scale=1.0)
    assert rows == [2] * 4
    rows.clear()
    codes_of(pipe, **edit, image_guidance_scale=2.0)
    assert rows == [3] * 4 and pipe.image_guidance_scale == 2.0
    rows.clear()
    codes_of(pipe, **edit, guidance_scale=[2.0, 2.0, 2.0, 1.0], image_guidance_scale=[2.0, 2.0, 1.0, None])
    assert rows == [3, 3, 2, 1]
    rows.clear()
    codes_of(pipe, **edit, guidance_scale=1.0, image_guidance_scale=[1.0] * 4)
    assert rows == [1] * 4


def test_image_guidance_alone_and_equal_to_the_text(pipe):
    edit = {"prompt": "blue", "image": [picture(seed=1), picture(20, 12, seed=2)]}
    assert codes_of(pipe, **edit, image_guidance_scale=1.0) == codes_of(pipe, **edit)
    # Equal scales: plain guidance away from the prompt without text and images
    (messages,) = pipe.build_messages(**edit)
    nothing = pipe.encode_messages([[{"role": "user", "content": []}]])[0]
    (prompt,) = pipe.encode_messages([messages], keep_first_size=True)
    expected = pipe.transformer.generate_images(
        prompt.input_ids[None],
        image_grids=prompt.image_grids,
        image_codes=prompt.image_codes,
        negative_input_ids=nothing.input_ids[None],
        negative_image_grids=prompt.image_grids[-1:],
        negative_image_codes=prompt.image_codes[:0],
        generator=seeded(int(torch.randint(2**63 - 1, (), generator=seeded(0)))),
        **GUIDED,
    ).image_codes.tolist()
    assert codes_of(pipe, **edit, image_guidance_scale=3.0) == expected
    # No guidance towards the image at all: the prompt and its image count as much as nothing does
    assert codes_of(pipe, **edit, image_guidance_scale=6.0) != expected


def test_image_guidance_in_a_batch_and_in_a_conversation(pipe, tmp_path):
    images = [picture(seed=1), [picture(seed=2), picture(20, 12)]]
    alone = [
        codes_of(pipe, prompt, image=image, image_guidance_scale=2.0, negative_prompt="no", seed=seed)
        for seed, (prompt, image) in enumerate(zip(["a", "two squares"], images, strict=True))
    ]
    both = {"image": images, "image_guidance_scale": 2.0, "negative_prompt": "no", "seed": [0, 1]}
    assert codes_of(pipe, ["a", "two squares"], **both) == sum(alone, [])
    # An image of the assistant's stays where the user's go
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(seed=1)}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "image", "image": picture(seed=3)}]},
        {"role": "user", "content": "b"},
    ]
    guided = codes_of(pipe, messages=messages, image_guidance_scale=2.0)
    assert guided != codes_of(pipe, messages=messages)
    # As OpenAI's clients write an image
    picture(seed=1).save(tmp_path / "a.png")
    messages[0]["content"][0] = {"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}}
    assert codes_of(pipe, messages=messages, image_guidance_scale=2.0) == guided


def test_image_guidance_changed_by_the_callback(pipe):
    def callback(pipe, step, scale, kwargs):
        if scale == 1:
            pipe._image_guidance_scale, pipe._guidance_scale = 4.0, [0.0, 0.0, 2.0, 2.0]

    edit = {"prompt": "a", "image": picture()}
    changed = {"guidance_scale": [3.0, 3.0, 2.0, 2.0], "image_guidance_scale": [1.5, 1.5, 4.0, 4.0]}
    found = codes_of(pipe, **edit, image_guidance_scale=1.5, callback_on_step_end=callback)
    assert found == codes_of(pipe, **edit, **changed) != codes_of(pipe, **edit, image_guidance_scale=1.5)


def test_image_guidance_that_changes_leaves_the_schedule_of_the_text(pipe):
    def callback(pipe, step, scale, kwargs):
        if scale == 1:
            pipe._image_guidance_scale = 4.0

    edit = {"prompt": "a", "image": picture()}
    schedule = {"guidance_scale": 9.0, "guidance_schedule": "early", "image_guidance_scale": [1.5] * 4}
    expected = codes_of(pipe, **edit, guidance_scale=[9, 9, 1, 1], image_guidance_scale=[1.5, 1.5, 4.0, 4.0])
    assert codes_of(pipe, **edit, **schedule, callback_on_step_end=callback) == expected


def test_image_guidance_needs_images_of_the_user(pipe):
    for call in (
        {"prompt": "a"},
        {"prompt": ["a", "b"], "image": [picture(), None]},
        {"messages": [{"role": "assistant", "content": [{"type": "image", "image": picture()}]}]},
    ):
        with pytest.raises(ValueError, match=r"`image_guidance_scale` is 2.0, .* 1 of . prompts have none"):
            pipe(**call, image_guidance_scale=2.0)


def test_the_unconditional_prompts_are_those_of_training(pipe):
    images = [picture(seed=seed) for seed in range(3)]
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "first"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "image"}]},
        {"role": "user", "content": "second"},
    ]

    class Draw:
        def __init__(self, number: float):
            self.number = number

        def random(self) -> float:
            return self.number

    def tokens(messages, images):
        inputs = pipe.processor.apply_chat_template(
            messages, images=images, tokenize=True, return_dict=True, generation_mode="image"
        )
        return inputs["input_ids"].tolist(), inputs["pixel_values"].tolist()

    row = {"messages": messages, "images": images}
    for number, keep_images, kept in ((0.01, False, images[2:]), (0.06, True, images)):
        trained, trained_images = drop_condition(row, Draw(number), text_rate=0.1, image_rate=0.05)
        drawn = pipe.processor.unconditional_messages(messages, keep_images=keep_images)
        assert tokens(drawn, kept) == tokens(trained, trained_images) != tokens(messages, images)
    assert messages[3]["content"] == "second" and len(messages[1]["content"]) == 3


def test_unconditional_messages_end_in_the_negative_prompt(pipe):
    image = {"type": "image", "image": "cat.png"}
    conversation = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [image, {"type": "text", "text": "first"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "done"}, image]},
        {"role": "user", "content": "second"},
    ]
    last = {"role": "user", "content": [{"type": "text", "text": "ugly"}]}
    unconditional = pipe.processor.unconditional_messages
    expected = [conversation[0], {"role": "user", "content": [image]}, conversation[2], last]
    assert unconditional(conversation, "ugly") == expected
    expected[1] = {"role": "user", "content": []}
    assert unconditional(conversation, "ugly", keep_images=False) == expected
    assert conversation[1]["content"] == [image, {"type": "text", "text": "first"}]


# --- drafts


def test_a_draft_is_the_beginning_of_the_image(pipe, monkeypatch):
    whole = pipe("a", generator=seeded(0), output_type="pt", **GUIDED)
    rows = count_rows(pipe, monkeypatch)
    draft = pipe("a", generator=seeded(0), num_scales=3, output_type="pt", **GUIDED)
    assert rows == [2] * 3 and pipe.num_timesteps == 3
    assert draft.image_codes.tolist() == whole.image_codes[:14].tolist()
    assert draft.image_grids.tolist() == [[[1, 1], [2, 2], [3, 3], [0, 0]]]
    assert draft.images.shape == whole.images.shape
    preview = pipe.vision_tokenizer.decode(whole.image_codes, whole.image_grids, num_scales=3)
    torch.testing.assert_close(draft.images, preview / 2 + 0.5)


@pytest.mark.parametrize("size", [{}, {"aspect_ratio": "5:3"}], ids=["square", "wide"])
def test_a_draft_is_finished_as_it_would_have_been(pipe, size):
    settings = {**GUIDED, "temperature": 0.0, "output_type": "codes", **size}
    whole, draft = pipe(["a", "b"], **settings), pipe(["a", "b"], num_scales=2, **settings)
    finished = pipe(["a", "b"], **codes_in(draft), **settings)
    assert finished.image_codes.tolist() == whole.image_codes.tolist()
    assert torch.equal(finished.image_grids, whole.image_grids)


# --- an earlier result


def test_codes_in_pictures_out(pipe, monkeypatch):
    drawn = pipe(["a", "b"], image=[None, picture(20, 12)], generator=seeded(0), output_type="np", **GUIDED)
    rows = count_rows(pipe, monkeypatch)
    decoded = pipe(**codes_in(drawn), output_type="np")
    kept = pipe(["c", "d"], **codes_in(drawn), keep_scales=4, output_type="np")
    for output in (decoded, kept):
        assert torch.equal(output.image_codes, drawn.image_codes)
        assert torch.equal(output.image_grids, drawn.image_grids)
        for image, expected in zip(output.images, drawn.images, strict=True):
            np.testing.assert_array_equal(image, expected)
    assert not rows and pipe.num_timesteps == 0
    draft = pipe(**codes_in(drawn), num_scales=2)
    expected = pipe.decode_codes(drawn.image_codes, drawn.image_grids, num_scales=2)
    assert [image.tobytes() for image in draft.images] == [image.tobytes() for image in expected]


def test_codes_of_pictures_in(pipe):
    sources = [picture(20, 12), picture()]
    codes, grids = pipe.encode_images(sources)
    inputs = pipe.processor.image_processor(sources, return_tensors="pt")
    assert torch.equal(codes, pipe.vision_tokenizer.encode(**inputs).image_codes)
    assert [image.size for image in pipe(image_codes=codes, image_grids=grids).images] == [(20, 12), (16, 16)]
    assert pipe.encode_images(sources, resolution=8)[1][:, 1:].tolist() == [
        [[2, 2], [0, 0], [0, 0]],
        [[2, 2], [0, 0], [0, 0]],
    ]


def test_variations_keep_the_first_scales(pipe, earlier):
    given = earlier.image_codes.tolist()
    for keep in range(4):
        codes = codes_of(pipe, "b", **codes_in(earlier), keep_scales=keep, num_images_per_prompt=3, seed=[1, 2, 3])
        images = [codes[start : start + 30] for start in (0, 30, 60)]
        cells = sum(SIZES[:keep])
        assert all(image[:cells] == given[:cells] for image in images)
        assert len(set(map(tuple, images))) == 3
        # In any company, and with no number drawn for what is kept
        assert images[1] == codes_of(pipe, "b", **codes_in(earlier), keep_scales=keep, seed=2)
    assert codes_of(pipe, "b", **codes_in(earlier), keep_scales=0) == codes_of(pipe, "b")


def test_an_image_each_a_prompt_each_or_one_for_all(pipe, earlier):
    other = pipe("b", generator=seeded(3), output_type="codes", **GUIDED)
    first, second = ({**codes_in(image), "keep_scales": 2} for image in (earlier, other))
    both = {name: torch.cat([first[name], second[name]]) for name in ("image_codes", "image_grids")}
    alone = [codes_of(pipe, "c", seed=seed, **image) for seed, image in ((1, first), (2, second), (2, first))]
    assert codes_of(pipe, "c", **both, keep_scales=2, num_images_per_prompt=2, seed=[1, 2]) == alone[0] + alone[1]
    assert codes_of(pipe, ["c", "c"], **both, keep_scales=2, seed=[1, 2]) == alone[0] + alone[1]
    assert codes_of(pipe, ["c", "c"], **first, seed=[1, 2]) == alone[0] + alone[2]


def test_a_source_image_is_kept_without_its_codes(pipe):
    source = picture(20, 12)
    codes, grids = pipe.encode_images(source)
    given = {"image_codes": codes, "image_grids": grids}
    edit = {"prompt": "a", "image": [source, picture()], "keep_scales": 3}
    assert codes_of(pipe, **edit) == codes_of(pipe, **edit, **given)
    # In messages the image that says the size is the last
    content = [{"type": "image", "image": picture()}, {"type": "image", "image": source}]
    messages = [{"role": "user", "content": content}]
    assert codes_of(pipe, messages=messages, keep_scales=3)[:13] == codes[:13].tolist()


def test_an_image_that_was_drawn_is_kept_whole_where_given_ones_show_their_last_scale_twice():
    pipe = toy_pipeline()
    pipe.processor.append_last_scale = True
    shown = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "image", "image": picture()}]},
    ]
    messages = [*shown, {"role": "user", "content": "b"}]
    codes, _ = pipe.encode_images(picture())
    assert codes_of(pipe, messages=messages, keep_scales=4) == codes.tolist()


def test_numbers_of_numpy_are_settings(pipe):
    plain = codes_of(pipe, "a", guidance_scale=2.0, top_k=3, num_images_per_prompt=1)
    numbers = {"guidance_scale": np.float32(2), "top_k": np.int64(3), "num_images_per_prompt": np.int32(1)}
    numbers |= {"height": np.int64(16), "width": np.int32(16)}
    assert codes_of(pipe, "a", **numbers) == plain


def test_the_last_scale_that_is_shown_again_is_not_drawn():
    pipe = toy_pipeline()
    codes, _ = pipe.encode_images(picture())
    pipe.processor.append_last_scale = True
    output = pipe("a", image=picture(), keep_scales=4)
    assert torch.equal(output.image_codes, codes) and output.images[0].size == (16, 16)


# --- regions


def enlarged(pipe, codes, grids) -> torch.Tensor:
    return pipe.vision_tokenizer.quantizer.decode(codes.view(1, -1), grids)


def test_at_full_coverage_exactly_the_cells_that_reach_nothing_else_are_redrawn(pipe):
    """By trial: another code in any other cell changes the enlarged map outside of the mask."""
    grids = ((1, 1), (1, 3), (2, 6), (3, 11))
    mask = torch.zeros(48, 176, dtype=torch.bool)
    mask[:, : 16 * 7] = True
    redrawn = inpainted_cells(mask, grids, coverage=1.0, footprint=partial(cell_footprint, pipe.vision_tokenizer))
    assert [int(cells.sum()) for cells in redrawn] == [0, 0, 4, 21]
    sizes = [height * width for height, width in grids]
    codes = torch.zeros(sum(sizes), dtype=torch.long)
    with torch.no_grad():
        before = enlarged(pipe, codes, grids)[..., 7:]
        for cell, is_redrawn in enumerate(torch.cat(redrawn).tolist()):
            other = codes.clone()
            other[cell] = 5
            assert torch.allclose(enlarged(pipe, other, grids)[..., 7:], before, atol=1e-6) == is_redrawn, cell
    whole = inpainted_cells(
        torch.ones_like(mask), grids, coverage=1.0, footprint=partial(cell_footprint, pipe.vision_tokenizer)
    )
    assert all(cells.all() for cells in whole)


def test_coverage_is_a_share_of_the_weights(pipe):
    def nearest(grid, last_grid):
        """Cells that reach exactly what lies below them: their share is that of the mask."""
        cells = torch.eye(grid[0] * grid[1]).view(-1, *grid)
        return torch.nn.functional.interpolate(cells[None], last_grid, mode="nearest")[0]

    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:33, :1] = True  # 3 cells of the first column, one of them by a single row of pixels
    grids = [(1, 1), (2, 2), (4, 4)]
    for coverage, expected in ((1.0, [0, 0, 3]), (0.5, [0, 1, 3]), (0.25, [0, 2, 3]), (3 / 16, [1, 2, 3])):
        cells = inpainted_cells(mask, grids, coverage=coverage, footprint=nearest)
        assert [int(scale.sum()) for scale in cells] == expected
    assert cells[2].nonzero()[:, 0].tolist() == [0, 4, 8]


@pytest.fixture(scope="module")
def local_pipe() -> NextFlowPipeline:
    """Whose decoder sees two cells far: no norm over the whole image, and residual branches that are zero."""
    pipe = toy_pipeline()
    config = copy.deepcopy(pipe.vision_tokenizer.config)
    config.norm_num_groups = 0
    torch.manual_seed(2)
    pipe.register_modules(vision_tokenizer=NextFlowVisionTokenizer(config).eval())
    return pipe


def test_outside_of_the_mask_nothing_changes(local_pipe):
    pipe = local_pipe
    drawn = pipe("a", aspect_ratio="4:1", generator=seeded(0), output_type="pt", **GUIDED)
    mask = torch.zeros(8, 32)
    mask[:, :16] = 1
    settings = {**GUIDED, "generator": seeded(1), "output_type": "pt", "mask_image": mask, "mask_coverage": 1.0}
    redrawn = pipe("b", **codes_in(drawn), **settings)
    assert torch.equal(redrawn.image_grids, drawn.image_grids)
    grids = tuple(map(tuple, drawn.image_grids[0].tolist()))
    before, after = (enlarged(pipe, output.image_codes, grids) for output in (drawn, redrawn))
    assert torch.equal(before[..., 4:], after[..., 4:]) and not torch.equal(before[..., :4], after[..., :4])
    torch.testing.assert_close(drawn.images[..., 24:], redrawn.images[..., 24:], rtol=0, atol=1e-6)
    assert (drawn.images[..., :16] - redrawn.images[..., :16]).abs().max() > 0.01
    # And the same of a source image, which comes back as the vision tokenizer has it
    source = picture(32, 8)
    codes, image_grids = pipe.encode_images(source)
    (reconstruction,) = pipe.decode_codes(codes, image_grids, output_type="pt")
    edited = pipe("b", image=source, **{**settings, "generator": seeded(2)}).images[0]
    torch.testing.assert_close(edited[..., 24:], reconstruction[..., 24:], rtol=0, atol=1e-6)
    assert (edited[..., :16] - reconstruction[..., :16]).abs().max() > 0.01


def test_a_white_mask_redraws_all_and_scales_can_be_kept_beside(pipe, earlier):
    white, half = torch.ones(16, 16), torch.ones(16, 16)
    half[8:] = 0
    assert codes_of(pipe, "b", **codes_in(earlier), mask_image=white) == codes_of(pipe, "b")
    found = codes_of(pipe, "b", **codes_in(earlier), mask_image=white, keep_scales=2)
    assert found == codes_of(pipe, "b", **codes_in(earlier), keep_scales=2)
    found = torch.tensor(codes_of(pipe, "b", **codes_in(earlier), mask_image=half, keep_scales=3))
    assert torch.equal(found[:14], earlier.image_codes[:14]) and torch.equal(found[22:], earlier.image_codes[22:])
    assert not torch.equal(found[14:22], earlier.image_codes[14:22])


def test_masks_of_every_kind_and_a_mask_a_prompt(pipe, earlier, tmp_path):
    array = np.zeros((16, 16), np.uint8)
    array[4:12, 4:12] = 255
    expected = codes_of(pipe, "b", **codes_in(earlier), mask_image=array)
    Image.fromarray(array).save(tmp_path / "mask.png")
    tensor = torch.from_numpy(array) / 255
    kinds = [Image.fromarray(array), Image.fromarray(array).convert("RGB"), tmp_path / "mask.png", array > 0, tensor]
    kinds += [tensor[None], tensor[None, None], array[..., None], Image.fromarray(array).resize((64, 64)), [array]]
    for mask in kinds:
        assert codes_of(pipe, "b", **codes_in(earlier), mask_image=mask) == expected
    # Beside a mask that redraws every scale: one row has scales with nothing to draw, the other has not.
    white = np.full((16, 16), 255, np.uint8)
    alone = [codes_of(pipe, "b", **codes_in(earlier), mask_image=mask, seed=5) for mask in (array, white)]
    both = codes_of(pipe, ["b", "b"], **codes_in(earlier), mask_image=[array, white], seed=[5, 5])
    assert both == alone[0] + alone[1] and alone[0][0] == earlier.image_codes[0] != alone[1][0]


def test_a_mask_that_is_transparent_in_part_is_refused(pipe, earlier, tmp_path):
    array = np.zeros((16, 16, 4), np.uint8)
    array[4:12, 4:12] = 255  # white strokes on nothing
    Image.fromarray(array).save(tmp_path / "mask.png")
    for mask in (Image.fromarray(array), tmp_path / "mask.png"):
        with pytest.raises(ValueError, match="`mask_image` is transparent in part, expected white where"):
            codes_of(pipe, "b", **codes_in(earlier), mask_image=mask)
    array[..., 3] = 255
    flat = Image.fromarray(array).convert("L")
    found, expected = (
        codes_of(pipe, "b", **codes_in(earlier), mask_image=mask) for mask in (Image.fromarray(array), flat)
    )
    assert found == expected


# --- mistakes


CODES, GRIDS = torch.zeros(30, dtype=torch.long), torch.tensor([[[1, 1], [2, 2], [3, 3], [4, 4]]])
GIVEN = {"prompt": "a", "image_codes": CODES, "image_grids": GRIDS}
DRAFT = {"prompt": "a", "image_codes": CODES[:5], "image_grids": torch.tensor([[[1, 1], [2, 2], [0, 0], [0, 0]]])}
WHITE = np.full((16, 16), 255, np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": "a", "num_scales": 0}, "`num_scales` is 0, expected at least 1"),
        ({"prompt": "a", "num_inference_steps": 0}, "`num_inference_steps` is 0, expected at least 1"),
        ({"prompt": "a", "num_scales": 5}, "`num_scales` is 5, expected at most 4"),
        ({"prompt": "a", "image_codes": CODES}, "go together, got no `image_grids`"),
        ({**GIVEN, "image_codes": CODES[:7]}, r"has the shape \(7,\), expected \(30,\)"),
        ({**GIVEN, "prompt": ["a"] * 3, "image_grids": GRIDS.repeat(2, 1, 1), "image_codes": CODES.repeat(2)},
         "has 2 images, expected 1, one for each of 3 prompts"),
        ({**GIVEN, "keep_scales": 5}, "`keep_scales` is 5, expected at most 4"),
        ({**GIVEN, "keep_scales": -1}, "`keep_scales` is -1"),
        ({**GIVEN, "aspect_ratio": "5:3"}, "leave the size out"),
        ({**DRAFT, "aspect_ratio": "4:1"}, "that it was sampled with"),
        ({**DRAFT, "mask_image": WHITE}, "needs a whole image, got 2 of its 4 scales"),
        ({**GIVEN, "mask_image": WHITE // 255}, "no white pixel"),
        ({**GIVEN, "mask_image": WHITE[:8]}, "is 8 x 16 pixels .*, expected the shape of the image"),
        ({**GIVEN, "mask_image": [WHITE] * 2}, "2 entries for 1 prompts"),
        ({**GIVEN, "mask_image": WHITE, "mask_coverage": 0}, "`mask_coverage` is 0"),
        ({"prompt": "a", "mask_image": WHITE}, "there is none: pass `image`"),
        ({"prompt": "a", "keep_scales": 2}, "there is none: pass `image`"),
        ({**GIVEN, "prompt": None, "keep_scales": 2}, r"\['keep_scales'\] with `image_codes` and neither `prompt`"),
        ({**GIVEN, "image_codes": CODES + 24}, r"`image_codes` must lie in \[0, 24\), got 24 to 24"),
        ({**GIVEN, "image_codes": CODES - 1, "prompt": None, "output_type": "codes"}, "got -1 to -1"),
        ({**GIVEN, "image_codes": CODES.float()}, "`image_codes` is torch.float32, expected integers"),
        ({**GIVEN, "image_grids": GRIDS.float()}, "`image_grids` is torch.float32, expected integers"),
        ({"prompt": "a", "num_scales": 2.5}, r"`num_scales` is 2.5 \(float\), expected a whole number"),
        ({"prompt": "a", "num_images_per_prompt": True}, r"is True \(bool\), expected a whole number"),
        ({"prompt": "a", "height": "16", "width": 16}, r"`height` is '16' \(str\), expected a whole number"),
        ({**GIVEN, "mask_image": WHITE, "mask_coverage": np.nan}, "`mask_coverage` is nan"),
        ({"prompt": "a", "image_guidance_scale": "2"}, r"image_guidance_scale is '2' \(str\), expected a number"),
        ({"prompt": "a", "guidance_scale": np.ones(4)}, r"guidance_scale is array.*\(ndarray\), expected a number"),
        ({"prompt": "a", "top_k": [2, 2.5, 2, 2]}, r"top_k is 2.5, expected a whole number"),
        ({"prompt": "a", "temperature": np.nan}, r"temperature is nan, expected a number in \[0, inf\]"),
        ({"prompt": "a", "generator": 5}, "`generator` is 5, expected a torch.Generator or a list of them"),
        ({**GIVEN, "prompt": None, "num_images_per_prompt": 2}, r"\['num_images_per_prompt'\] with `image_codes`"),
    ],
)  # fmt: skip
def test_mistakes_are_named(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_mistakes_in_what_the_transformer_is_given(pipe):
    inputs = {"input_ids": torch.tensor([[5, pipe.processor.boi_token_id]]), "image_grids": GRIDS}
    with pytest.raises(ValueError, match="image_guidance_scale is not 1, which needs imageless_input_ids"):
        pipe.transformer.generate_images(
            **inputs, negative_input_ids=inputs["input_ids"], image_guidance_scale=2.0, guidance_scale=2.0
        )
    with pytest.raises(ValueError, match="prefix_mask is given without prefix_codes"):
        pipe.transformer.generate_images(**inputs, prefix_mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"prefix_mask is torch.bool \(1, 1\), expected torch.bool \(1, 5\)"):
        mask = torch.ones(1, 1, dtype=torch.bool)
        pipe.transformer.generate_images(**inputs, prefix_codes=CODES[None, :5], prefix_mask=mask)
    with pytest.raises(ValueError, match="num_scales is 5, expected 1 to 4"):
        pipe.transformer.generate_images(**inputs, num_scales=5)


# --- the documentation


def test_the_examples_of_the_documentation_run(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(NextFlowPipeline, "from_pretrained", lambda path: pipe)
    monkeypatch.setattr("nextflow_hf.hub_cards.shapes_model_path", lambda: None)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    parser = doctest.DocTestParser()
    for text in (pipeline_nextflow.EXAMPLE_DOC_STRING, NextFlowPipeline.preview.__doc__):
        for example in parser.get_examples(text):
            exec(example.source, names)
    assert len(names["variations"]) == 4 and names["whole"].size == names["half"].size == (16, 16)
    assert Image.open("growing.gif").n_frames == 4 and Image.open("growing.png").size == (64, 16)
    assert "keep_scales=3" in NextFlowPipeline.__call__.__doc__


@pytest.mark.parametrize("name", ["latents", "image_codes"])
def test_a_callback_may_change_the_codes(pipe, name):
    """Those of the first scale: what follows is then drawn as it is after a prefix of them."""
    plain = pipe("a red circle", temperature=0.0)
    codes, grids = (plain.image_codes[:1] + 1) % 24, plain.image_grids.clone()
    grids[:, 1:] = 0

    def change(pipe, step, scale, kwargs):
        return {name: codes[None]} if step == 0 else None

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": [name]}
    changed = pipe("a red circle", temperature=0.0, **options).image_codes
    expected = pipe("a red circle", temperature=0.0, image_codes=codes, image_grids=grids, height=16, width=16)
    assert torch.equal(changed, expected.image_codes) and not torch.equal(changed, plain.image_codes)
    codes = codes + 24
    with pytest.raises(ValueError, match=r"image_codes must lie in \[0, 24\), got 47 to 47"):
        pipe("a red circle", **options)


def test_diffusers_names(pipe):
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    steps = pipe("a red circle", num_inference_steps=2, **options)
    scales = pipe("a red circle", num_scales=2, generator=torch.Generator().manual_seed(0), output_type="codes")
    assert torch.equal(steps[0], scales.image_codes) and len(steps[0]) == 5
    decoded = pipe(latents=steps.image_codes, image_grids=steps.image_grids, output_type="pt").images
    assert torch.equal(
        decoded, pipe(image_codes=steps.image_codes, image_grids=steps.image_grids, output_type="pt")[0]
    )
    with pytest.raises(ValueError, match="got `num_scales` and `num_inference_steps`, which is another name for it"):
        pipe("a red circle", num_scales=2, num_inference_steps=2)
