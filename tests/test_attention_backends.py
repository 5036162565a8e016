"""One attention rule, every implementation: they agree where they can express it, and refuse where they cannot.

Flex attention runs on CPU without compilation and without gradients. Flash attention is played by a function that is
registered as the real one is, takes what it takes, and computes from it what the kernel would.
"""

import functools

import pytest
import torch
import transformers.integrations.flex_attention
import transformers.masking_utils
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from toy import BOI, EOS, PAD, SQUARE, WIDE, grids_tensor, image_tokens, random_codes, toy_config, toy_model
from transformers import StaticCache
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nextflow_hf.modeling_nextflow.attention_nextflow import get_attention_mask
from nextflow_hf.modeling_nextflow.grids_nextflow import get_image_layout
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.training.data.collator import PackingCollator


FLASH = "kernels-community/flash-attn2"  # as transformers names a kernel of the Hub
received: list[dict] = []  # of every call of `flash`


def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """The kernels' contract: causal or not, aligned to the last key; 2D padding; packed documents of a single row."""
    is_causal = module.is_causal if is_causal is None else is_causal
    positions = kwargs.get("position_ids")
    received.append({"mask": attention_mask, "is_causal": is_causal, "queries": query.shape[2]})
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    queries, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(len(query), queries, keys, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril(keys - queries)
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None]
    elif positions is not None and len(query) == 1 and queries > 1:
        assert positions.dtype == torch.long
        if (positions.diff() != 1).any():
            document = (positions == positions.min()).cumsum(1)
            allowed = allowed & (document[:, :, None] == document[:, None])
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed[:, None], -float("inf"))
    return (scores.softmax(-1).nan_to_num(0) @ value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(FLASH, flash)
ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, flash_attention_mask)
ALL_ATTENTION_FUNCTIONS.register("no_mask_function", flash)


@pytest.fixture(scope="module")
def model() -> NextFlowForCausalLM:
    return toy_model().requires_grad_(False)


@pytest.fixture
def use(model, monkeypatch):
    """Switches the implementation, for the length of a test."""
    monkeypatch.setattr(
        transformers.masking_utils, "create_block_mask", functools.partial(uncompiled_block_mask, create_block_mask)
    )
    monkeypatch.setattr(
        transformers.integrations.flex_attention,
        "compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: flex_attention(query, key, value, **kwargs),
    )
    received.clear()

    def switch(implementation: str) -> None:
        model.config._attn_implementation = implementation

    yield switch
    model.config._attn_implementation = "sdpa"


def uncompiled_block_mask(create, *arguments, **kwargs):
    return create(*arguments, **{**kwargs, "_compile": False})


def left_padded(*rows: list[int]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def right_padded(*rows: list[int]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def packed(model, rows: list[list[int]], grids: list) -> dict[str, torch.Tensor]:
    positions = [model.model.get_position_ids(torch.tensor([row]), image_grids=grid) for row, grid in zip(rows, grids)]
    return {"input_ids": torch.tensor([sum(rows, [])]), "position_ids": torch.cat(positions, dim=-1)}


ROWS = [[5, 6, *image_tokens(SQUARE), 7, EOS], [8, *image_tokens(WIDE), 9], [10, 11, 12]]
IMAGES = {"image_codes": random_codes(SQUARE, WIDE), "image_grids": grids_tensor(SQUARE, WIDE)}
TEXTS = [[5, 6, 7, 8, 9], [10, 11, 12]]


def assert_agree(model, use, implementations: list[str], inputs: dict) -> None:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    use("eager")
    expected = model(**inputs, use_cache=False).logits[mask]
    for implementation in implementations:
        use(implementation)
        logits = model(**inputs, use_cache=False).logits[mask]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4, msg=lambda m, i=implementation: f"{i}: {m}")


@pytest.mark.parametrize("form", ["left", "right", "packed"])
def test_implementations_agree_on_images(model, use, form):
    if form == "packed":
        inputs = packed(model, ROWS, [grids_tensor(SQUARE), grids_tensor(WIDE), None])
    else:
        inputs = (left_padded if form == "left" else right_padded)(*ROWS)
    assert_agree(model, use, ["sdpa", "flex_attention"], {**inputs, **IMAGES})


def collated_packs() -> dict[str, torch.Tensor]:
    """Two rows of several documents, filled up to one length, as training packs them."""
    schedules = [[SQUARE], [WIDE], []]
    codes = random_codes(SQUARE, WIDE).split([30, 14])
    rows = [
        {
            "input_ids": ids,
            "labels": ids,
            "image_codes": code.tolist(),
            "image_target_codes": code.tolist(),
            "image_grids": grids_tensor(*schedule).tolist(),
        }
        for ids, schedule, code in zip(ROWS, schedules, [*codes, torch.zeros(0, dtype=torch.long)])
    ]
    return PackingCollator(toy_config(), pad_to_multiple_of=8)([[rows[0], rows[2], rows[1]], [rows[1], rows[2]]])


def test_packed_documents_see_themselves_alone(model, use):
    batch = collated_packs()
    ids, starts = batch["input_ids"], batch["position_ids"] == 0
    layout = get_image_layout(toy_config(), ids, batch["image_grids"])
    positions = model.model.get_position_ids(
        ids, image_grids=batch["image_grids"], token_positions=batch["position_ids"]
    )
    use("flex_attention")
    embeds = torch.zeros(*ids.shape, 32)
    block_mask = get_attention_mask(model.config, embeds, None, positions, None, layout)
    place = torch.arange(ids.shape[1])
    document = starts.cumsum(1)
    for row in range(len(ids)):
        seen = block_mask.mask_mod(torch.tensor(row), torch.tensor(0), place[:, None], place[None])
        cells = layout.block_ids[row]
        in_scale = (cells[:, None] == cells[None]) & (cells >= 0)[:, None]
        expected = (document[row][:, None] == document[row][None]) & ((place[:, None] >= place[None]) | in_scale)
        assert torch.equal(seen.expand(len(place), len(place)), expected)
    assert_agree(model, use, ["sdpa", "flex_attention"], {**batch, "labels": None})


@pytest.mark.parametrize("form", ["left", "right", "packed"])
def test_implementations_agree_on_text(model, use, form):
    if form == "packed":
        inputs = packed(model, TEXTS, [None, None])
    else:
        inputs = (left_padded if form == "left" else right_padded)(*TEXTS)
    assert_agree(model, use, ["sdpa", "flex_attention", FLASH], inputs)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", FLASH])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_drawing_is_the_same_everywhere(model, use, implementation, padded):
    prompts = left_padded([5, 6, 7, BOI], [8, 9, BOI] if padded else [8, 9, 10, BOI])
    arguments = {**prompts, "image_grids": grids_tensor(WIDE, WIDE), "temperature": 0.0, "guidance_scale": 1.0}
    drawn = model.generate_images(**arguments).image_codes
    use(implementation)
    assert torch.equal(model.generate_images(**arguments).image_codes, drawn)


def test_padding_on_the_left_changes_nothing_in_float64_either():
    model = toy_model().double().eval()
    model.set_attn_implementation("eager")
    ids, mask = torch.tensor([[PAD, PAD, 5, 6], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        padded, alone = model(ids, attention_mask=mask).logits[:1, 2:], model(ids[:1, 2:]).logits
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)


def test_drawing_gives_flash_kernels_no_mask(model, use):
    use(FLASH)
    model.generate_images(
        input_ids=torch.tensor([[5, 6, BOI]]), image_grids=grids_tensor(WIDE), temperature=0.0, guidance_scale=1.0
    )
    blocks = [call for call in received if call["queries"] in (3, 10) and not call["is_causal"]]
    assert len(blocks) == 2 * 2  # two scales, two layers
    assert all(call["mask"] is None for call in received)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_no_mask_is_made_for_a_block_on_a_cache(model, use, implementation):
    use(implementation)
    cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    block, positions = torch.zeros(1, 6, 32), torch.zeros(3, 1, 6)
    assert get_attention_mask(model.config, block, None, positions, cache, None, is_causal=False) is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_a_block_sees_only_what_a_static_cache_holds(model, use, implementation, padded):
    use(implementation)
    prompt = left_padded(TEXTS[0], TEXTS[1] if padded else TEXTS[0])
    block, positions = torch.randn(2, 6, 32), torch.rand(3, 2, 6)
    outputs = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        mask = prompt["attention_mask"] if padded else None
        model(**{**prompt, "attention_mask": mask}, past_key_values=cache)
        mask = torch.cat([mask, torch.ones(2, 6)], dim=1) if padded else None
        outputs.append(
            model.model(
                inputs_embeds=block,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                is_causal=False,
            ).last_hidden_state
        )
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def test_a_given_4d_mask_is_taken_as_it_is(model, use):
    row, grids = torch.tensor([ROWS[0]]), grids_tensor(SQUARE)
    codes = random_codes(SQUARE)
    layout = get_image_layout(toy_config(), row, grids)
    length = row.shape[1]
    # A cell's block ends where the next begins; a text token's is itself.
    ends = [
        i + int((layout.block_ids[0, i:] == b).sum()) if b >= 0 else i + 1 for i, b in enumerate(layout.block_ids[0])
    ]
    allowed = torch.arange(length)[None] < torch.tensor(ends)[:, None]
    given = model(input_ids=row, image_codes=codes, image_grids=grids, attention_mask=allowed[None, None]).logits
    derived = model(input_ids=row, image_codes=codes, image_grids=grids).logits
    torch.testing.assert_close(given, derived, atol=1e-5, rtol=1e-4)


REFUSED = {
    "images": ({**right_padded(*ROWS), **IMAGES}, "cells of a scale"),
    "4D mask": ({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 1, 2, 2).bool()}, "4D"),
    "packed rows": ({"input_ids": torch.tensor([[5, 6, 7]] * 2), "position_ids": torch.tensor([[0, 1, 0]] * 2)},
                    "packed documents in 2 rows"),
}  # fmt: skip


@pytest.mark.parametrize("implementation", [FLASH, "no_mask_function"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_flash_cannot_express_is_refused(model, use, implementation, case):
    inputs, message = REFUSED[case]
    use(implementation)
    with pytest.raises(ValueError, match=f"{implementation}.*cannot express.*{message}.*'sdpa'"):
        model(**inputs)
    assert not received  # before any layer ran


def test_flex_attention_refuses_a_static_cache(model, use):
    use("flex_attention")
    with pytest.raises(ValueError, match="use 'sdpa' or 'eager' with a static cache"):
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=StaticCache(config=model.config, max_cache_len=8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward on CPU")
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_flex_attention_trains_as_sdpa_does(form):
    model = toy_model(head_dim=16, rope_parameters=None).cuda()  # its kernels want no less
    batch = collated_packs() if form == "packed" else {**left_padded(*ROWS), **IMAGES}
    inputs = {name: value.cuda() for name, value in batch.items()}
    gradients = []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        model(**{**inputs, "labels": inputs["input_ids"]}).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
