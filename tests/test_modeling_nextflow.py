"""The transformer: layout, positions, mask, inputs, weights and loss against obvious restatements and hand-worked
numbers."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from toy import (
    BOI,
    CODES,
    EOI,
    EOS,
    IMAGE,
    PAD,
    SQUARE,
    TEXT,
    WIDE,
    grids_tensor,
    image_tokens,
    random_codes,
    toy_config,
    toy_model,
)
from transformers import AutoConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.modeling_nextflow import backbone_nextflow
from nextflow_hf.modeling_nextflow.attention_nextflow import NextFlowRotaryEmbedding, get_attention_mask
from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.grids_nextflow import get_image_layout, get_position_ids
from nextflow_hf.modeling_nextflow.loss_nextflow import get_targets, scale_weights
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM


@pytest.fixture(scope="module")
def model() -> NextFlowForCausalLM:
    return toy_model()


def test_default_config_is_the_7b_model():
    with torch.device("meta"):
        model = NextFlowForCausalLM(NextFlowConfig())
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
    body = 28 * layer + 3584
    connector = 40 * 3584 + 3584 + 3584 * 3584 + 3584
    expected = body + 2 * 184834 * 3584 + connector + 32768 * 40 + 18 * 3584
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == expected
    assert total / 1e9 == pytest.approx(7.85, abs=0.02)
    assert body / 1e9 == pytest.approx(6.526, abs=1e-3)


def test_positions_of_figure_5():
    # <boi> at 0, a 2x2 and a 3x3 map, <eoi>, five text tokens, a second image: figure 5 of the paper, C = 6.
    schedule = SQUARE[:3]
    input_ids = torch.tensor([[*image_tokens(schedule), 5, 6, 7, 8, 9, *image_tokens(schedule)]])
    positions = get_position_ids(toy_config(spatial_rope_extent=6.0), input_ids, grids_tensor(schedule, schedule))
    assert positions.shape == (4, 1, 15 + 5 + 15)
    assert positions[0, 0].tolist() == list(range(35))
    image = [(0, 0, 0)]
    image += [(1, row, column) for row in (1.5, 4.5) for column in (1.5, 4.5)]
    image += [(2, row, column) for row in (1, 3, 5) for column in (1, 3, 5)]
    image += [(3, 3, 3)]
    text = [(t, t, t) for t in range(4, 9)]
    second = [(s + 9, r, c) if s in (1, 2) else (s + 9, r + 9, c + 9) for s, r, c in image]
    expected = torch.tensor(image + text + second, dtype=torch.float).T
    torch.testing.assert_close(positions[1:, 0], expected)


def test_positions_of_a_wide_grid_keep_the_area():
    # Equation 1 divides both axes by sqrt(h * w): 1:4 spans C/2 rows and 2C columns.
    schedule = [(1, 1), (4, 16)]
    positions = get_position_ids(
        toy_config(spatial_rope_extent=64.0), torch.tensor([image_tokens(schedule)]), grids_tensor(schedule)
    )
    rows, columns = positions[2, 0, 1:-1], positions[3, 0, 1:-1]
    assert rows.min() == 4 and rows.max() == 28 and columns.min() == 4 and columns.max() == 124


def test_left_padding_takes_no_position():
    schedule = SQUARE[:3]
    row = [5, 6, *image_tokens(schedule), 7]
    alone = get_position_ids(toy_config(spatial_rope_extent=8.0), torch.tensor([row]), grids_tensor(schedule))
    mask = torch.tensor([[0] * 3 + [1] * len(row)])
    padded = get_position_ids(
        toy_config(spatial_rope_extent=8.0), torch.tensor([[PAD] * 3 + row]), grids_tensor(schedule), mask
    )
    torch.testing.assert_close(padded[:, :, 3:], alone)


def test_integers_that_restart_are_the_positions_of_packed_documents(model):
    """`position_ids` (batch, length) give what each document has alone, to the bit, whatever they begin with."""
    documents = [
        ([5, *image_tokens(WIDE), 6, 7, *image_tokens(SQUARE)], [WIDE, SQUARE]),
        ([8], []),
        ([9, 10], []),
        ([5, *image_tokens(SQUARE), EOS], [SQUARE]),
        ([*range(3, 35)] * 10, []),
    ]
    alone = [
        get_position_ids(model.config, torch.tensor([ids]), grids_tensor(*grids) if grids else None)
        for ids, grids in documents
    ]
    packed = torch.tensor([[token for ids, _ in documents for token in ids]])
    restarting = torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None]
    grids = grids_tensor(*[schedule for _, schedules in documents for schedule in schedules])
    positions = get_position_ids(model.config, packed, grids, token_positions=restarting)
    assert torch.equal(positions, torch.cat(alone, dim=-1)) and positions.dtype == torch.float32

    rows, both = packed.expand(2, -1), torch.cat([grids, grids])
    codes = random_codes(WIDE, SQUARE, SQUARE, WIDE, SQUARE, SQUARE)
    inputs = {"input_ids": rows, "image_grids": both, "image_codes": codes}
    whole = model(**inputs, position_ids=torch.cat(alone, dim=-1).expand(-1, 2, -1)).logits
    assert torch.equal(model(**inputs, position_ids=restarting).logits, whole)  # one for both rows

    first = [5, *image_tokens(WIDE), 6]
    later = get_position_ids(
        model.config,
        torch.tensor([first]),
        grids_tensor(WIDE),
        token_positions=torch.arange(7, 7 + len(first))[None],
    )
    assert later[1].tolist() == [[7, 8, *[9] * 3, *[10] * 10, 11, 12]]
    text = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        model(text, position_ids=torch.tensor([[4, 5, 6]])).logits,
        model(text, position_ids=torch.tensor([4.0, 5, 6]).expand(4, 1, -1)).logits,
    )


def reference_blocks(row: list[int], schedules: list) -> list[tuple[int, int]]:
    """(block id, document order) worked out token by token: the definition of the attention rule."""
    blocks, block, schedules = [], 0, iter(schedules)
    cells: list[int] = []
    for token in row:
        if token == BOI:
            block += 1
            cells = list(itertools.chain.from_iterable([k] * (h * w) for k, (h, w) in enumerate(next(schedules)[1:])))
            blocks.append(block)
        elif token == IMAGE:
            scale = cells.pop(0)
            blocks.append(block + 1 + scale)
            if not cells:
                block += 1 + scale
        else:
            block += 1
            blocks.append(block)
    return blocks


def test_mask_is_the_block_rule(model):
    row = [5, 6, *image_tokens(SQUARE), 7, *image_tokens(WIDE), 8, 9]
    grids = grids_tensor(SQUARE, WIDE)
    input_ids = torch.tensor([row])
    layout = get_image_layout(toy_config(), input_ids, grids)
    position_ids = model.model.get_position_ids(input_ids, image_grids=grids)
    embeds = torch.zeros(1, len(row), 32)
    mask = get_attention_mask(model.config, embeds, None, position_ids, None, layout)
    blocks = torch.tensor(reference_blocks(row, [SQUARE, WIDE]))
    assert torch.equal(mask[0, 0].bool(), blocks[None, :] <= blocks[:, None])


def test_no_mask_is_made_where_none_is_needed(model):
    embeds = torch.zeros(1, 9, 32)
    positions = torch.arange(9.0).expand(4, 1, -1)
    assert get_attention_mask(model.config, embeds, None, positions, None, None) is None
    assert get_attention_mask(model.config, embeds, None, positions, None, None, is_causal=False) is None
    prompt = torch.tensor([[5, 6, BOI]])  # an image to be drawn has no cell yet
    layout = get_image_layout(toy_config(), prompt, grids_tensor(SQUARE))
    assert get_attention_mask(model.config, embeds[:, :3], None, positions[:, :, :3], None, layout) is None


def test_cell_inputs_are_upsampled_residual_features(model):
    codes = random_codes(WIDE, seed=3)
    base = model.model
    embeds = base.embed_inputs(
        torch.tensor([image_tokens(WIDE)]), codes, grids_tensor(WIDE),
        get_image_layout(toy_config(), torch.tensor([image_tokens(WIDE)]), grids_tensor(WIDE)),
    )  # fmt: skip
    angles = [3 / 10000 ** (2 * i / 32) for i in range(16)]  # three scales
    length = torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)]) * math.sqrt(1 / 96)
    torch.testing.assert_close(embeds[0, 0], base.embed_tokens.weight[BOI] + base.scale_embedding.weight[0] + length)

    table = torch.cat([F.normalize(half) for half in base.image_codebook.weight.split([6, 4], dim=1)], dim=1)
    start = 1
    for scale, (grid, next_grid, first) in enumerate([((1, 1), (1, 3), 0), ((1, 3), (2, 5), 1)], start=1):
        features = table[codes[first : first + grid[0] * grid[1]]].T.reshape(1, 10, *grid)
        up = F.interpolate(features, size=next_grid, mode="bicubic", align_corners=False)[0].flatten(1).T
        expected = base.connector(up) + base.scale_embedding.weight[scale] + length
        count = next_grid[0] * next_grid[1]
        torch.testing.assert_close(embeds[0, start : start + count], expected)
        start += count


def test_last_scale_is_never_an_input(model):
    row, grids = torch.tensor([[5, *image_tokens(SQUARE), 6]]), grids_tensor(SQUARE)
    codes = random_codes(SQUARE)
    changed = codes.clone()
    changed[-16:] = (changed[-16:] + 1) % CODES
    logits = [model(input_ids=row, image_codes=c, image_grids=grids).logits for c in (codes, changed)]
    torch.testing.assert_close(*logits)


def test_an_image_has_as_many_scales_as_a_source_as_it_has_as_a_target():
    target, source = SQUARE[:3], [*SQUARE[:3], SQUARE[2]]
    grids = grids_tensor(target, source, SQUARE)
    new, old = (toy_model(scale_length_counts_repeats=counts).model for counts in (False, True))
    three, shown, four = new.scale_length_encoding(grids)
    assert torch.equal(shown, three) and not torch.equal(three, four)
    three, shown, four = old.scale_length_encoding(grids)
    assert torch.equal(shown, four) and not torch.equal(three, four)


def test_a_config_saved_before_repeats_were_told_apart_still_counts_them(tmp_path):
    toy_config().save_pretrained(tmp_path)
    assert NextFlowConfig.from_pretrained(tmp_path).scale_length_counts_repeats is False
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    del saved["scale_length_counts_repeats"]
    file.write_text(json.dumps(saved))
    loaded = NextFlowConfig.from_pretrained(tmp_path)
    assert loaded.scale_length_counts_repeats is True
    loaded.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).scale_length_counts_repeats is True
    shipped = NextFlowConfig.from_pretrained(shapes_model_path())
    assert shipped.scale_length_counts_repeats is True and NextFlowConfig().scale_length_counts_repeats is False


def test_scale_weights_of_decisions_section_1():
    schedule = [(b, b) for b in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)]
    grids = torch.tensor([schedule])
    weight = scale_weights(grids, 0.9)[0]
    cells = grids[0].prod(-1)
    share = weight * cells / (weight * cells).sum()
    assert (weight * cells).sum().item() == pytest.approx(10084, rel=1e-5)
    assert share[0].item() == pytest.approx(0.034, abs=5e-4)
    assert share[:8].sum().item() == pytest.approx(0.36, abs=5e-3)
    assert share[-1].item() == pytest.approx(0.078, abs=5e-4)
    assert weight[0].item() == pytest.approx(344, abs=1) and weight[-1].item() == pytest.approx(0.19, abs=5e-3)
    torch.testing.assert_close(scale_weights(grids, 0.0), torch.ones(1, 18))


def test_targets_by_hand():
    schedule = [(1, 1), (1, 2)]
    row = [5, BOI, IMAGE, IMAGE, EOI, 6, BOI, IMAGE, IMAGE, EOI, EOS]
    labels = [-100, -100, -100, -100, -100, 6, BOI, -100, -100, -100, EOS]  # the first image is context
    grids = grids_tensor(schedule, schedule)
    input_ids, codes = torch.tensor([row]), torch.tensor([1, 2, 3, 4, 5, 6])
    layout = get_image_layout(toy_config(), input_ids, grids)
    targets, weights = get_targets(
        input_ids, torch.tensor([labels]), layout, codes, grids, text_vocab_size=TEXT, alpha=1.0
    )
    x = -100
    assert targets[0].tolist() == [x, x, x, x, 6, BOI, TEXT + 4, TEXT + 5, TEXT + 6, EOS, x]
    # alpha 1: k = 1, 1/2, 1/2; normalised to three codes: 3/2 and twice 3/4. Text weighs 1.
    torch.testing.assert_close(weights[0, [4, 5, 6, 7, 8, 9]], torch.tensor([1, 1, 1.5, 0.75, 0.75, 1]))


def test_loss_is_the_weighted_mean_over_supervised_tokens(model):
    row = [5, 6, *image_tokens(SQUARE), 7, EOS]
    labels = torch.tensor([[-100, 6, BOI, *[-100] * 30, 7, EOS]])
    codes, targets = random_codes(SQUARE), random_codes(SQUARE, seed=9)
    grids = grids_tensor(SQUARE)
    out = model(
        input_ids=torch.tensor([row]), image_codes=codes, image_grids=grids, labels=labels, image_target_codes=targets
    )
    log_probs = out.logits[0].log_softmax(-1)
    weight = scale_weights(grids, 0.9)[0]
    scale_of = [k for k, (h, w) in enumerate(SQUARE) for _ in range(h * w)]
    boi, eoi = row.index(BOI), row.index(EOI)  # cell i of the image sits i places after <boi>
    total = -sum(weight[k] * log_probs[boi + i, TEXT + targets[i]] for i, k in enumerate(scale_of))
    total -= log_probs[0, 6] + log_probs[1, BOI] + log_probs[eoi, 7] + log_probs[eoi + 1, EOS]
    count = 30 + 4
    torch.testing.assert_close(out.loss, total / count)
    halved = model(
        input_ids=torch.tensor([row]), image_codes=codes, image_grids=grids, labels=labels,
        image_target_codes=targets, num_items_in_batch=2 * count,
    )  # fmt: skip
    torch.testing.assert_close(halved.loss, out.loss / 2)
    assert out.scale_counts.tolist() == [4, 1, 4, 9, 16, 0]


def test_logits_are_skipped_in_training(model):
    row = torch.tensor([[5, 6, 7]])
    model.train()
    assert model(input_ids=row, labels=row).logits is None
    assert model(input_ids=row, labels=row, skip_logits=False).logits is not None
    model.eval()
    assert model(input_ids=row, labels=row).logits is not None


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_mixed_batch_equals_single(model, attn_implementation):
    model.set_attn_implementation(attn_implementation)
    rows = [[5, 6, *image_tokens(SQUARE), 7, EOS], [8, *image_tokens(WIDE), 9], [10, 11, 12]]
    grids = [grids_tensor(SQUARE), grids_tensor(WIDE), None]
    codes = [random_codes(SQUARE), random_codes(WIDE, seed=1), None]
    singles = [
        model(input_ids=torch.tensor([r]), image_codes=c, image_grids=g).logits[0]
        for r, c, g in zip(rows, codes, grids)
    ]
    length = max(map(len, rows))
    for side in ("left", "right"):
        pads = [[PAD] * (length - len(r)) for r in rows]
        padded = [p + r if side == "left" else r + p for r, p in zip(rows, pads)]
        ids = torch.tensor(padded)
        mask = (ids != PAD).long()
        batch = model(
            input_ids=ids, attention_mask=mask, image_codes=torch.cat(codes[:2]), image_grids=torch.cat(grids[:2])
        ).logits
        for index, single in enumerate(singles):
            torch.testing.assert_close(batch[index][mask[index].bool()], single, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation("sdpa")


def test_packed_row_equals_its_parts(model):
    rows = [[5, 6, *image_tokens(SQUARE), 7, EOS], [8, *image_tokens(WIDE), 9], [10, 11, 12]]
    grids = [grids_tensor(SQUARE), grids_tensor(WIDE), None]
    codes = [random_codes(SQUARE), random_codes(WIDE, seed=1), None]
    parts, positions = [], []
    for r, c, g in zip(rows, codes, grids):
        parts.append(model(input_ids=torch.tensor([r]), image_codes=c, image_grids=g).logits[0])
        positions.append(model.model.get_position_ids(torch.tensor([r]), image_grids=g))
    packed = model(
        input_ids=torch.tensor([sum(rows, [])]),
        position_ids=torch.cat(positions, dim=-1),
        image_codes=torch.cat(codes[:2]),
        image_grids=torch.cat(grids[:2]),
    ).logits[0]
    torch.testing.assert_close(packed, torch.cat(parts), atol=1e-5, rtol=1e-4)


def test_open_image_equals_the_closed_one_up_to_there(model):
    codes, grids = random_codes(SQUARE), grids_tensor(SQUARE)
    whole = model(input_ids=torch.tensor([[5, *image_tokens(SQUARE)]]), image_codes=codes, image_grids=grids).logits
    open_ids = torch.tensor([[5, BOI, *[IMAGE] * (4 + 9)]])  # scales 1..3 of 4, so the codes of 1 and 2 are inputs
    part = model(input_ids=open_ids, image_codes=codes[: 1 + 4], image_grids=grids).logits
    torch.testing.assert_close(part, whole[:, : part.shape[1]], atol=1e-5, rtol=1e-4)


def test_save_and_load_are_bit_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path)
    ours, theirs = model.config.to_dict(), loaded.config.to_dict()
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(ours, theirs), name
    row, grids, codes = torch.tensor([[5, *image_tokens(SQUARE)]]), grids_tensor(SQUARE), random_codes(SQUARE)
    outputs = [m(input_ids=row, image_codes=codes, image_grids=grids).logits for m in (model, loaded)]
    assert torch.equal(*outputs)


def test_every_parameter_gets_a_gradient(model):
    row = torch.tensor([[5, *image_tokens(SQUARE), 6]])
    out = model(input_ids=row, image_codes=random_codes(SQUARE), image_grids=grids_tensor(SQUARE), labels=row)
    out.loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad()
    assert not missing


BAD_INPUTS = {
    "no grids": ({"image_grids": None, "labels": torch.tensor([[5, *image_tokens(SQUARE)]])}, "30 tokens need"),
    "too many grids": ({"image_grids": grids_tensor(SQUARE, SQUARE)}, "1 <boi> tokens, but image_grids has 2 rows"),
    "other grids": ({"image_grids": grids_tensor(WIDE)}, "do not fill its scales"),
    "too few codes": ({"image_codes": random_codes(SQUARE)[:-1]}, "need 30 codes, got image_codes of length 29"),
    "code out of range": ({"image_codes": random_codes(SQUARE) + CODES}, r"must lie in \[0, 24\)"),
    "negative code": ({"image_codes": random_codes(SQUARE) - CODES}, r"must lie in \[0, 24\)"),
    "a hole in the grids": (
        {"image_grids": grids_tensor([(1, 1), (0, 0), *SQUARE[1:]])},
        r"image_grids\[0\] is .*, expected positive grids and then zero rows only",
    ),
    "negative grids": (
        {"image_grids": grids_tensor([(1, 1), (-2, -2), *SQUARE[2:]])},
        r"image_grids\[0\] is .*, expected positive grids",
    ),
    "more scales than the model knows": (
        {"image_grids": torch.tensor([[*SQUARE, (4, 4), (4, 4)]])},
        "image 0 has 6 scales, expected at most config.max_scales = 5",
    ),
    "grids of one image alone": ({"image_grids": grids_tensor(SQUARE)[0]}, r"shape \(5, 2\), expected \(n_images"),
    "grids that are no integers": ({"image_grids": grids_tensor(SQUARE).float()}, "float32, expected integers"),
    "text between the cells": (
        {"input_ids": torch.tensor([[5, BOI, *[IMAGE] * 4, 7, *[IMAGE] * 25, EOI]])},
        "1 image placeholder tokens that follow neither <boi> nor another placeholder",
    ),
    "cells in front": (
        {"input_ids": torch.tensor([[IMAGE, BOI, *[IMAGE] * 28, EOI]])},
        "1 image placeholder tokens that follow neither",
    ),
    "no 1x1 scale": ({"image_grids": grids_tensor([(2, 2), *SQUARE[1:]])}, r"must start with the grid \(1, 1\)"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(model, case):
    change, message = BAD_INPUTS[case]
    inputs = {
        "input_ids": torch.tensor([[5, *image_tokens(SQUARE)]]),
        "image_codes": random_codes(SQUARE),
        "image_grids": grids_tensor(SQUARE),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_rotary_frequencies_are_dealt_out_in_turn():
    config = toy_config(hidden_size=256, num_attention_heads=2, rope_parameters=None)  # heads of 128, as the 7B has
    positions = 40 * torch.rand(3, 2, 9)  # scale, row, column: fractions of a token
    cos, sin = NextFlowRotaryEmbedding(config)(positions, positions)
    for frequency in range(64):
        axis = frequency % 3 if frequency < 60 else 0
        angle = positions[axis] * 1e6 ** (-2 * frequency / 128)
        for half in (frequency, frequency + 64):
            torch.testing.assert_close(cos[..., half], angle.cos(), atol=1e-5, rtol=0)
            torch.testing.assert_close(sin[..., half], angle.sin(), atol=1e-5, rtol=0)

    text = positions[:1].expand(3, -1, -1)
    ours, qwen = NextFlowRotaryEmbedding(config)(text, text), Qwen2RotaryEmbedding(config)(text, text[0])
    assert all(torch.equal(one, two) for one, two in zip(ours, qwen, strict=True))

    # Neighbours on a 64 x 64 grid are a unit apart; either axis sees that (the contiguous split: 0.011 and less).
    for axis in (1, 2):
        step = torch.zeros(3, 1, 1)
        step[axis] = 1.0
        assert NextFlowRotaryEmbedding(config)(step, step)[1].abs().max() > 0.5


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to a device": lambda model: model.to("cpu", torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to float8": lambda model: model.to(torch.float8_e4m3fn),
    "type": lambda model: model.type(torch.bfloat16),
    "there and back": lambda model: model.half().float(),
    "a copy": lambda model: copy.deepcopy(model).bfloat16(),
}
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 64},
    "longrope": {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [2.5] * 4},
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("cast", CASTS)
def test_rotary_frequencies_are_float32_however_a_model_is_cast(cast, rope):
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **ROPES[rope]}
    plain, model = (toy_model(max_position_embeddings=64, rope_parameters=dict(parameters)) for _ in range(2))
    cast_model = CASTS[cast](model)
    assert cast == "there and back" or cast_model.lm_head.weight.itemsize < 4
    ours, theirs = cast_model.model.rotary_emb, plain.model.rotary_emb
    for name, frequencies in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), frequencies) and ours.get_buffer(name).dtype == torch.float32
    # Beyond the trained length, which makes other frequencies of some; and back.
    for longest in (8000, 30):
        positions = torch.linspace(0, longest, 5).expand(3, 1, -1)
        for one, two in zip(ours(positions, positions), theirs(positions, positions), strict=True):
            assert torch.equal(one, two)


def test_image_tokens_without_an_image(model, monkeypatch):
    """Upstream's suites take random tokens for a prompt; whoever loses the images of theirs is told."""
    warnings = []
    monkeypatch.setattr(backbone_nextflow.logger, "warning_once", warnings.append)
    row = torch.tensor([[5, *image_tokens(SQUARE)]])
    assert model(input_ids=row).logits.isfinite().all()
    assert "no image_grids were given: they are embedded as text is" in warnings.pop()
    model(input_ids=torch.tensor([[5, 6]]))
    assert not warnings
    for mode in ("text", "interleaved"):
        with pytest.raises(ValueError, match="no image_grids were given, which 30 tokens need"):
            model.generate(row, max_new_tokens=1, generation_mode=mode)


@pytest.mark.parametrize(
    "section, message",
    [([24, 20, 20], "sums to 64, expected half the head dimension = 4"), ([0, 2, 2], "its first entry is too small")],
)
def test_rotary_split_must_fit_the_head(section, message):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    with pytest.raises(ValueError, match=message):
        NextFlowForCausalLM(toy_config(rope_parameters=rope))


def test_rotary_split_keeps_its_shares_in_another_head():
    assert NextFlowConfig().rope_parameters["mrope_section"] == [24, 20, 20]
    assert toy_config(rope_parameters=None, hidden_size=128).rope_parameters["mrope_section"] == [6, 5, 5]
