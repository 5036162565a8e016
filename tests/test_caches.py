"""Caches, and the speed paths around them: going on after an image, static shapes, compilation, offload, dtype."""

import pytest
import torch
from accelerate import dispatch_model
from toy import BOI, CODES, PAD, SQUARE, WIDE, grids_tensor, image_tokens, random_codes, toy_model
from transformers import StaticCache
from transformers.cache_utils import DynamicCache
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
from transformers.exporters.utils import get_leaf_tensors

from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM


@pytest.fixture(scope="module")
def model() -> NextFlowForCausalLM:
    return toy_model()


def make_cache(kind: str, model: NextFlowForCausalLM):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=80)


def conversation(first, second) -> tuple[list[list[int]], dict]:
    """Three turns of one row: text and an image, text alone, text and another image."""
    turns = [[5, 6, *image_tokens(first)], [7, 8, 9], [10, *image_tokens(second), 11]]
    grids, codes = map(grids_tensor, (first, second)), (random_codes(first), random_codes(second, seed=1))
    return turns, [{"image_codes": own, "image_grids": grid} for own, grid in zip(codes, grids)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_turns_on_one_cache_equal_the_whole_conversation(model, kind):
    turns, images = conversation(WIDE, SQUARE)
    whole = model(
        input_ids=torch.tensor([sum(turns, [])]),
        image_codes=torch.cat([image["image_codes"] for image in images]),
        image_grids=torch.cat([image["image_grids"] for image in images]),
    ).logits
    cache = make_cache(kind, model)
    parts = [
        model(input_ids=torch.tensor([turn]), past_key_values=cache, **image).logits
        for turn, image in zip(turns, [images[0], {}, images[1]])
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_with_other_images_go_on_where_each_of_them_ends(model, kind):
    rows = [[5, *image_tokens(SQUARE)], [6, 7, *image_tokens(WIDE)], [8]]
    images = {"image_codes": random_codes(SQUARE, WIDE), "image_grids": grids_tensor(SQUARE, WIDE)}
    length = max(map(len, rows))
    prompt = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    more = torch.tensor([[9, 10], [11, 12], [13, 14]])
    mask = torch.cat([(prompt != PAD).long(), torch.ones_like(more)], dim=1)
    whole = model(input_ids=torch.cat([prompt, more], dim=1), attention_mask=mask, **images).logits
    cache = make_cache(kind, model)
    model(input_ids=prompt, attention_mask=mask[:, :length], past_key_values=cache, **images)
    parts = [
        model(
            input_ids=more[:, i : i + 1], attention_mask=mask[:, : length + i + 1], past_key_values=cache
        ).logits
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, -2:], atol=1e-4, rtol=1e-4)


def test_a_cache_of_text_is_left_as_it_is(model):
    """torch.export flattens a cache's attributes: one that only the eager model sets is an output too many."""
    expected = vars(make_cache("dynamic", model)).keys()
    cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert vars(cache).keys() == expected
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, return_dict_in_generate=True)
    assert vars(written.past_key_values).keys() == expected

    register_cache_pytrees_for_model(model)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": True}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    found, eager = (get_leaf_tensors(run(**inputs)) for run in (exported, model))
    assert found.keys() == eager.keys()
    torch.testing.assert_close(found, eager)


def test_a_cache_that_was_cut_does_not_guess_where_it_ends(model):
    ids = torch.tensor([[5, *image_tokens(WIDE), 6]])
    inputs = {"image_codes": random_codes(WIDE), "image_grids": grids_tensor(WIDE)}
    cache = model(input_ids=ids, **inputs, use_cache=True).past_key_values
    cache.crop(-1)
    new = torch.tensor([[7]])
    with pytest.raises(ValueError, match="where this cache ends on the rotary axes is not known.*pass position_ids"):
        model(input_ids=new, past_key_values=cache)
    # What the message asks for
    ids = torch.cat([ids[:, :-1], new], dim=1)
    positions = model.model.get_position_ids(ids, image_grids=inputs["image_grids"])
    logits = model(input_ids=new, position_ids=positions[..., -1:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(input_ids=ids, **inputs).logits[:, -1:], atol=1e-4, rtol=1e-4)

    text = model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=True).past_key_values
    text.crop(-1)  # of text alone it is always known
    cut = model(input_ids=torch.tensor([[9]]), past_key_values=text).logits[:, -1]
    torch.testing.assert_close(cut, model(input_ids=torch.tensor([[5, 6, 7, 9]])).logits[:, -1])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("form", ["all tokens and grids", "all tokens", "new tokens"])
def test_generate_goes_on_after_an_image_that_the_cache_holds(model, kind, form):
    """Codes are needed no more, and grids neither: the cache knows where it ends on the rotary axes."""
    rows = [[5, 6, *image_tokens(SQUARE)], [7, *image_tokens(WIDE)]]
    length = max(map(len, rows))
    prompt = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    more = torch.tensor([[9, 10], [11, 12]])
    ids, grids = torch.cat([prompt, more], dim=1), grids_tensor(SQUARE, WIDE)
    mask = (ids != PAD).long()
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "disable_compile": True,
                "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    codes = random_codes(SQUARE, WIDE)
    expected = model.generate(ids, attention_mask=mask, image_codes=codes, image_grids=grids, **settings)
    cache = make_cache(kind, model)
    model(input_ids=prompt, attention_mask=mask[:, :-2], image_codes=codes, image_grids=grids, past_key_values=cache)
    given = {"inputs": more if form == "new tokens" else ids, "image_grids": grids if "grids" in form else None}
    found = model.generate(**given, attention_mask=mask, past_key_values=cache, **settings)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.sequences[:, -4:], expected.sequences[:, -4:])


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_static_cache_writes_the_same_text_after_an_image(model, padded):
    rows = [[5, 6, *image_tokens(SQUARE)], ([7] if padded else [7, 8]) + image_tokens(SQUARE)]
    ids = torch.tensor([[PAD] * (len(rows[0]) - len(row)) + row for row in rows])
    arguments = {
        "input_ids": ids, "attention_mask": (ids != PAD).long(), "image_codes": random_codes(SQUARE, SQUARE),
        "image_grids": grids_tensor(SQUARE, SQUARE), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None,
        "return_dict_in_generate": True, "output_logits": True, "disable_compile": True,
    }  # fmt: skip
    dynamic = model.generate(**arguments)
    static = model.generate(**arguments, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(static.logits, dynamic.logits, atol=1e-4, rtol=1e-4)


def test_decoding_compiles_without_graph_breaks(model):
    """Text and a scale, on a static cache: traced as a whole, once, and the same numbers."""
    prompt = {"input_ids": torch.tensor([[5, *image_tokens(WIDE)]])}
    images = {"image_codes": random_codes(WIDE), "image_grids": grids_tensor(WIDE)}
    block = {"inputs_embeds": torch.randn(1, 6, 32), "position_ids": torch.rand(3, 1, 6), "is_causal": False}
    steps = [
        {"input_ids": torch.tensor([[token]]), "position_ids": torch.full((4, 1, 1), 10.0 + token)} for token in (6, 7)
    ]
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="eager", fullgraph=True, dynamic=False)
    outputs = []
    with torch.no_grad():
        for run in (model.model, compiled):
            cache = make_cache("static", model)
            model(**prompt, **images, past_key_values=cache)
            outputs.append([run(**step, past_key_values=cache).last_hidden_state for step in steps])
            outputs[-1].append(run(**block, past_key_values=cache).last_hidden_state)
            if run is compiled:
                with torch.compiler.set_stance("fail_on_recompile"):
                    run(**steps[0], past_key_values=cache)
                    run(**block, past_key_values=cache)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("offloaded", ["disk", "cpu"])
def test_offloaded_modules_draw_and_write_the_same(tmp_path, offloaded):
    model = toy_model()
    arguments = {"input_ids": torch.tensor([[5, 6, BOI]]), "image_grids": grids_tensor(SQUARE)}
    prompt = torch.tensor([[5, *image_tokens(SQUARE)]])
    images = {"image_codes": random_codes(SQUARE), "image_grids": grids_tensor(SQUARE)}
    expected = model.generate_images(**arguments, temperature=0.0, guidance_scale=1.0).image_codes
    logits = model(input_ids=prompt, **images).logits
    if offloaded == "disk":
        model.save_pretrained(tmp_path / "model")
        names = ["embed_tokens", "image_codebook", "connector", "scale_embedding", "layers.1"]
        places = {f"model.{name}": "disk" for name in names}
        places |= {"lm_head": "disk", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        model = NextFlowForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
        )
    else:
        dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    if offloaded == "disk":
        assert model.lm_head.weight.is_meta and model.model.scale_embedding.weight.is_meta
    drawn = model.generate_images(**arguments, temperature=0.0, guidance_scale=1.0).image_codes
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(model(input_ids=prompt, **images).logits, logits)


def test_dtype_auto_takes_the_checkpoint_s(tmp_path):
    toy_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = NextFlowForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # positions are not rounded
    row = torch.tensor([[5, *image_tokens(SQUARE)]])
    inputs = {"input_ids": row, "image_codes": random_codes(SQUARE), "image_grids": grids_tensor(SQUARE)}
    out = model(**inputs, labels=row)
    assert out.logits.dtype == torch.bfloat16 and out.loss.isfinite()
    drawn = model.generate_images(
        torch.tensor([[5, BOI]]), image_grids=grids_tensor(SQUARE), temperature=0.0, guidance_scale=1.0
    ).image_codes
    assert drawn.shape == (30,) and (drawn < CODES).all()
