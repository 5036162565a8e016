"""What transformers asks of every model, with images in the sequence wherever that makes a difference.

transformers' own suite for models (ModelTesterMixin and GenerationTesterMixin of 5.23) passes for `NextFlowModel` and
`NextFlowForCausalLM` with text. What it skips there, and why:

- flash attention 2, 3 and 4, hub kernels, flex attention with gradients, accelerator offload, several accelerators,
  DeepSpeed, quanto: need hardware or packages; tests/test_attention_backends.py and tests/test_caches.py stand in.
- composite models, sub-configs, mixture of experts, recurrent layers, multi-token prediction, partial and axial RoPE,
  learned position embeddings, encoder-decoders, audio, video: NextFlow has none.
- `_keep_in_fp32_modules`: none, the rotary embedding and the codebook features compute in fp32 by themselves.
- weight conversion mappings: none, conversion/ has tables of its own.
- start from a lone `bos_token_id`: Qwen2.5 has no such token.

With images, it also cannot run: assisted decoding (a draft model is given the tokens without their images), the
resizing tests that clip token ids (they clip `<boi>` away), random token ids out of the whole vocabulary (`<boi>`
and placeholders without an image are refused), and what cuts every input along two axes (codes have one) or exports a
graph (how many codes there are, the tokens say).

`NextFlowForConditionalGeneration` cannot run, besides: a load from the folder of its base model (it is read from a
repository with its parts), and positions that count tokens given beside images (those of images are three numbers).
"""

import copy

import pytest
import torch
from toy import (
    BOI,
    CODES,
    EOS,
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
from transformers.cache_utils import DynamicCache

from nextflow_hf.modeling_nextflow.grids_nextflow import get_image_layout
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM, NextFlowModel


@pytest.fixture(scope="module")
def model() -> NextFlowForCausalLM:
    return toy_model()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """A row with a square image and a padded one with a wide image."""
    rows = [[5, 6, *image_tokens(SQUARE), 7, EOS], [8, *image_tokens(WIDE), 9]]
    ids = torch.tensor([row + [PAD] * (len(rows[0]) - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "image_codes": random_codes(SQUARE, WIDE),
        "image_grids": grids_tensor(SQUARE, WIDE),
    }


def test_outputs_stand_in_the_usual_order(model, batch):
    out = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    assert list(out)[:3] == ["loss", "logits", "past_key_values"]
    as_tuple = model(**batch, labels=batch["input_ids"], output_hidden_states=True, return_dict=False)
    assert type(as_tuple) is tuple and len(as_tuple) == len(out)
    torch.testing.assert_close(as_tuple[:2], (out.loss, out.logits))
    assert model(**batch)[0].shape == (*batch["input_ids"].shape, TEXT + CODES + 2)


def test_hidden_states_and_attentions_are_those_of_every_layer(model, batch):
    model.set_attn_implementation("eager")
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    length = batch["input_ids"].shape[1]
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, length, 32)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, length, length)] * 2
    layout = get_image_layout(toy_config(), batch["input_ids"], batch["image_grids"])
    same_block = (layout.block_ids[:, :, None] == layout.block_ids[:, None]) & layout.is_cell[:, None]
    seen = (torch.ones(length, length).bool().tril() | same_block) & batch["attention_mask"].bool()[:, None]
    real = batch["attention_mask"].bool()
    for weights in out.attentions:
        assert torch.equal((weights > 0).all(1)[real], seen[real])


@pytest.mark.parametrize("qk_norm", [False, True], ids=["Qwen2.5", "Qwen3"])
def test_hidden_states_of_some_layers(batch, qk_norm):
    model = toy_model(qk_norm=qk_norm)
    every = model(**batch, output_hidden_states=True).hidden_states
    first, second, last = model(**batch, output_hidden_states=[0, -1]).hidden_states
    assert second is None and torch.equal(first, every[0]) and torch.equal(last, every[-1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(batch, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = toy_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_a_model_in_training_samples_with_gradient_checkpointing_too():
    model, prompt = toy_model(), torch.tensor([[5, 6, 7]])
    options = {"do_sample": False, "max_new_tokens": 8, "image_temperature": 0.0, "target_grids": grids_tensor(SQUARE)}
    expected = [model.generate(prompt, generation_mode=mode, **options) for mode in ("image", "interleaved")]
    model.train().gradient_checkpointing_enable()
    found = [model.generate(prompt, generation_mode=mode, **options) for mode in ("image", "interleaved")]
    assert torch.equal(found[0].image_codes, expected[0].image_codes)
    assert torch.equal(found[1].sequences, expected[1].sequences)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_embeddings_of_the_tokens_are_as_good_as_the_tokens(model, batch):
    expected = model(**batch, labels=batch["input_ids"])
    ids = batch.pop("input_ids")
    out = model(**batch, labels=ids, inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close((out.loss, out.logits), (expected.loss, expected.logits))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_logits_are_kept_where_asked(model, batch):
    everywhere = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, everywhere[:, -2:])
    places = torch.tensor([0, 4, 9])
    torch.testing.assert_close(model(**batch, logits_to_keep=places).logits, everywhere[:, places])
    boi = batch["input_ids"] == BOI
    torch.testing.assert_close(model(**batch, logits_to_keep=boi).logits, everywhere[boi])


def test_shifted_labels_replace_labels(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = model(**batch, labels=labels).loss
    torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(**batch, labels=batch["input_ids"], shift_labels=shifted).loss, expected)
    # The last token of a shard has a target too, which labels cannot say.
    last = model(input_ids=torch.tensor([[5, 6]]), shift_labels=torch.tensor([[-100, 7]]))
    torch.testing.assert_close(last.loss, -last.logits[0, 1].log_softmax(-1)[7])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_are_all_initialised_where_none_are_loaded(tied):
    model = NextFlowForCausalLM.from_pretrained(None, config=toy_config(tie_word_embeddings=tied), state_dict={})
    fresh = NextFlowForCausalLM(toy_config(tie_word_embeddings=tied))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        if theirs.std() == 0:  # biases and norms
            assert torch.equal(ours, theirs), name
        else:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.5), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_base_weights_load_with_and_without_the_head(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    base = NextFlowModel.from_pretrained(tmp_path / "whole").eval()
    expected = model.model(**batch).last_hidden_state
    assert torch.equal(base(**batch).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again, info = NextFlowForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and not info["unexpected_keys"]
    assert torch.equal(again.eval().model(**batch).last_hidden_state, expected)


def test_embeddings_can_be_resized_and_saved(batch, tmp_path):
    model = toy_model()
    expected = model(**batch).logits
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path)
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path)
    logits = loaded(**batch).logits
    assert logits.shape[-1] == loaded.config.vocab_size == 80
    torch.testing.assert_close(logits[..., : TEXT + CODES + 2], expected)
    hidden = torch.randn(2, 3, 32)
    codes = loaded.lm_head(hidden)[..., TEXT : TEXT + CODES]  # stay where they were: added tokens come last
    torch.testing.assert_close(loaded.image_logits(hidden), codes)
    with pytest.raises(ValueError, match="vocab_size is 65, expected .* = 66 or"):
        toy_config(vocab_size=TEXT + CODES + 1)


def test_image_logits_go_through_a_head_that_is_not_a_plain_one(model):
    class Adapter(torch.nn.Linear):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    hidden = torch.randn(2, 3, 32)
    adapted = copy.deepcopy(model)
    adapted.lm_head.__class__ = Adapter
    torch.testing.assert_close(adapted.image_logits(hidden), model.image_logits(hidden) + 1)


def test_parallel_plans_name_what_is_there(model):
    def matches(pattern: str, name: str) -> bool:
        parts, names = pattern.split("."), name.split(".")
        return len(parts) == len(names) and all(part in ("*", own) for part, own in zip(parts, names))

    modules = [name for name, _ in model.named_modules()]
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for pattern in model.tp_plan:
        assert any(matches(pattern, name) for name in modules), pattern
    in_layers = [name for name in linears if ".layers." in name]
    assert all(any(matches(pattern, name) for pattern in model.tp_plan) for name in [*in_layers, "lm_head"])
    # The stages of a pipeline hold every weight there is.
    stages = [f"{stage}." for stage in model.pp_plan]
    assert [name for name, _ in model.named_parameters() if not any(name.startswith(stage) for stage in stages)] == []


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_rope_can_be_scaled(rope_type):
    plain, scaled = toy_config(), toy_config()
    scaled.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    models = []
    for config in (plain, scaled):
        torch.manual_seed(0)
        models.append(NextFlowModel(config).eval())
    short, long = torch.tensor([[5, 6, 7, 8]]), torch.randint(3, TEXT, (1, 700))
    outputs = [[model(input_ids=ids).last_hidden_state for ids in (short, long)] for model in models]
    assert torch.equal(outputs[0][0], outputs[1][0]) == (rope_type == "dynamic")  # scales only what is too long
    assert not torch.allclose(outputs[0][1], outputs[1][1], atol=1e-5)


def test_a_sliding_window_is_refused():
    with pytest.raises(ValueError, match="NextFlow has no sliding window"):
        toy_config(use_sliding_window=True, sliding_window=4, max_window_layers=0)


def test_text_generation_from_a_cache_of_the_user(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **arguments)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache)
    assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), expected)
