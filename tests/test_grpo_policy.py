"""What the policy is asked: rows that end with the prefix, their log-probabilities, and rollouts that continue one."""

import pytest
import torch
from PIL import Image
from toy_pipeline import CODES, TEXT_VOCAB, toy_pipeline

from nextflow_hf.training.grpo.policy import add_policy_forward, pad_rows, policy_inputs, policy_row
from nextflow_hf.training.grpo.rollout import Rollout, conversation_of, encode_rows, sample_codes, sample_thoughts


RED = Image.new("RGB", (16, 16), "red")
ROWS = [
    {"prompt": "a"},
    {"prompt": "make it blue", "images": [RED]},
    {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b"}]}], "images": [RED]},
]


@pytest.fixture(scope="module")
def pipeline():
    return toy_pipeline()


@pytest.fixture(scope="module")
def rollouts(pipeline):
    torch.manual_seed(0)
    prompts = encode_rows(pipeline, ROWS, guided=True)
    codes = sample_codes(pipeline, prompts, guidance_scale=2.0, temperature=1.0, top_k=0, top_p=1.0)
    return [Rollout(*parts) for parts in zip(prompts, codes)]


def code_log_probs(pipeline, rollout: Rollout, temperature: float) -> torch.Tensor:
    """All codes of a rollout, from the model's own forward over the whole closed picture."""
    model, config = pipeline.transformer, pipeline.transformer.config
    prompt = rollout.prompt
    cells = len(rollout.codes) - 1
    tail = torch.tensor([config.image_token_id] * cells + [config.eoi_token_id])
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([prompt.input_ids, tail])[None],
            image_codes=torch.cat([prompt.image_codes, rollout.codes]),
            image_grids=prompt.image_grids,
        ).logits[0]
    first = len(prompt.input_ids) - 1
    of_codes = logits[first : first + 1 + cells, TEXT_VOCAB : TEXT_VOCAB + CODES] / temperature
    return of_codes.softmax(-1).gather(-1, rollout.codes[:, None])[:, 0].log()


@pytest.mark.parametrize("scales", [range(1), range(3), range(4), range(2, 4)])
def test_log_probs_of_a_padded_batch_of_prefixes(pipeline, rollouts, scales):
    """Rows of different length, with and without source pictures, against the whole sequence, one by one."""
    model = pipeline.transformer
    rows = [policy_row(rollout, model.config, scales=scales, alpha=0.6) for rollout in rollouts]
    add_policy_forward(model, temperature=0.7, chunk_size=11)
    try:
        batch = pad_rows(rows, pad_token_id=0, device=torch.device("cpu"))
        with torch.no_grad():
            outputs = model(**policy_inputs(batch))
    finally:
        del model.forward
    cells = [1, 4, 9, 16]
    first, last = sum(cells[: scales.start]), sum(cells[: scales.stop])
    for index, rollout in enumerate(rollouts):
        taught = batch["targets"][index] >= 0
        expected = code_log_probs(pipeline, rollout, 0.7)[first:last]
        torch.testing.assert_close(outputs["logps"][index][taught], expected, atol=2e-5, rtol=1e-4)
        assert (outputs["logps"][index][~taught] == 0).all() and (outputs["entropies"][index][taught] > 0).all()
        # Finer scales are not in the row at all.
        assert len(rows[index]["input_ids"]) == len(rollout.prompt.input_ids) + last - 1
        assert batch["loss_weights"][index].sum() == pytest.approx(1)
        ids = [k + 1 for k in scales for _ in range(cells[k])]
        assert batch["scale_ids"][index][taught].tolist() == ids


def test_cell_mask_takes_weight_away(pipeline, rollouts):
    mask = torch.tensor([True, False, True, False, True])
    config = pipeline.transformer.config
    whole = policy_row(rollouts[0], config, scales=range(2), alpha=0.6)["loss_weights"]
    gated = policy_row(rollouts[0], config, scales=range(2), alpha=0.6, cell_mask=mask)["loss_weights"]
    torch.testing.assert_close(gated[-5:], whole[-5:] * mask)


def test_text_before_the_picture_is_taught_with_the_prefix(pipeline):
    model = pipeline.transformer
    (prompt,) = encode_rows(pipeline, ROWS[1:2], guided=True)
    boi = model.config.boi_token_id
    opened = torch.cat([prompt.input_ids[:-1], torch.tensor([65, 66, boi])])
    start = len(prompt.input_ids) - 1
    codes = torch.arange(30) % CODES
    for thoughts in (range(start, start + 3), range(start, start + 2)):  # `<boi>` sampled, or put there
        rollout = Rollout(type(prompt)(opened, prompt.image_grids, prompt.image_codes), codes, thoughts)
        row = policy_row(rollout, model.config, scales=range(2), alpha=0.0, thinking_weight=0.5)
        taught = row["targets"] >= 0
        expected = [65, 66, boi][: len(thoughts)] + (codes[:5] + TEXT_VOCAB).tolist()
        assert row["targets"][taught].tolist() == expected
        assert row["targets"][start - 1] == 65
        weights = [0.5 / len(thoughts)] * len(thoughts) + [1 / 5] * 5
        assert row["loss_weights"][taught].tolist() == pytest.approx(weights)
        assert not (row["loss_weights"][~taught]).any()
    # Text competes with text and `<boi>` only.
    add_policy_forward(model, temperature=1.0, chunk_size=100)
    try:
        batch = pad_rows([row], pad_token_id=0, device=torch.device("cpu"))
        arguments = policy_inputs(batch)
        with torch.no_grad():
            logps = model(**arguments)["logps"][0]
            arguments.pop("policy_targets")
            logits = model(**arguments).logits[0, start - 1]
    finally:
        del model.forward
    ids = model.get_text_ids()
    excluded = {model.config.image_token_id, model.config.pad_token_id, model.config.eos_token_id}
    assert set(ids.tolist()) == set(range(TEXT_VOCAB)) - excluded | {boi}
    expected = logits[ids].log_softmax(-1)[ids.tolist().index(65)]
    torch.testing.assert_close(logps[start - 1], expected)


def test_thinking_opens_the_picture(pipeline):
    prompts = encode_rows(pipeline, ROWS, guided=False)
    torch.manual_seed(0)
    config, allowed = pipeline.transformer.config, set(pipeline.transformer.get_text_ids().tolist())
    with torch.no_grad():
        longer = sample_thoughts(pipeline, prompts, max_tokens=6, temperature=1.0)
    for prompt, (thought, places) in zip(prompts, longer):
        assert torch.equal(thought.input_ids[: places.start], prompt.input_ids[:-1])
        sampled = thought.input_ids[places.start : places.stop].tolist()
        assert set(sampled) <= allowed and 1 <= len(sampled) <= 6
        assert thought.input_ids.tolist().count(config.boi_token_id) == len(prompt.image_grids)
        assert thought.input_ids[-1] == config.boi_token_id
        assert len(thought.input_ids) - places.stop == (sampled[-1] != config.boi_token_id)
    # Cached and padded sampling is the model's own: the likeliest text is that of plain forwards, row by row.
    with torch.no_grad():
        greedy = sample_thoughts(pipeline, prompts, max_tokens=4, temperature=1e-4)
    ids = pipeline.transformer.get_text_ids()
    for prompt, (thought, places) in zip(prompts, greedy):
        tokens = prompt.input_ids[:-1]
        for _ in places:
            images = {"image_grids": prompt.image_grids[:-1], "image_codes": prompt.image_codes}
            with torch.no_grad():
                logits = pipeline.transformer(
                    input_ids=tokens[None], **(images if len(prompt.image_codes) else {})
                ).logits[0, -1]
            tokens = torch.cat([tokens, ids[logits[ids].argmax()][None]])
        assert torch.equal(tokens, thought.input_ids[: places.stop])


def test_drawing_continues_a_prefix(pipeline, rollouts):
    prompts = [rollout.prompt for rollout in rollouts]
    settings = {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    prefixes = [rollout.codes[:14] for rollout in rollouts]
    first = sample_codes(pipeline, prompts, prefixes=prefixes, **settings)
    second = sample_codes(pipeline, prompts, prefixes=prefixes, batch_size=2, **settings)
    for rollout, one, other in zip(rollouts, first, second):
        assert torch.equal(one[:14], rollout.codes[:14]) and torch.equal(other[:14], rollout.codes[:14])
        assert len(one) == 30 and not torch.equal(one, other)
    # The rest is drawn as it would have been: the best codes after the best prefix are the best image.
    best = sample_codes(pipeline, prompts, **{**settings, "temperature": 0})
    continued = sample_codes(
        pipeline, prompts, prefixes=[codes[:5] for codes in best], **{**settings, "temperature": 0}
    )
    assert all(map(torch.equal, best, continued))
    stopped = sample_codes(pipeline, prompts, num_scales=2, **{**settings, "temperature": 0})
    assert all(torch.equal(codes, whole[:5]) for codes, whole in zip(stopped, best))
    with pytest.raises(ValueError, match=r"\(3, 7\).*\[1, 5, 14, 30\]"):
        sample_codes(pipeline, prompts, prefixes=[rollout.codes[:7] for rollout in rollouts], **settings)


def test_rows_and_their_pictures():
    messages, sources = conversation_of(ROWS[1])
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"] and sources == [RED]
    messages, sources = conversation_of(ROWS[2])
    assert messages[0]["content"][0] == {"type": "image", "image": RED} and sources == [RED]
    assert ROWS[2]["prompt"][0]["content"][0] == {"type": "image"}  # the data set's row is left alone
    for images in ([], [RED, RED]):
        with pytest.raises(ValueError, match=f"1 image parts, but `images` holds {len(images)}"):
            conversation_of({**ROWS[2], "images": images})
