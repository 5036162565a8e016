"""Interleaved generation against whole forwards by hand: alone, in a batch, guided, continued from its cache."""

import pytest
import torch
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
    toy_model,
)

from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM


@pytest.fixture(scope="module")
def model() -> NextFlowForCausalLM:
    return toy_model()


def draw_after_some(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A row begins an image after multiples of three and of seven: a property of the row alone."""
    begins = (ids[:, -1] % 3 == 0) | (ids[:, -1] % 7 == 0)
    boost = torch.where(begins, 1e4, -1e4)
    scores = scores.clone()
    scores[:, BOI] = scores[:, BOI] + boost
    return scores


def by_hand(model, prompt, codes, schedules, target, *, max_new_tokens, max_images, negative=None, guidance=1.0):
    """Greedy, one whole forward for each token and each scale, without a cache."""
    ids, codes, schedules, drawn = list(prompt), codes.clone(), list(schedules), 0
    for _ in range(max_new_tokens):
        logits = logits_of(model, ids, codes, schedules)[-1].clone()
        boi = logits[BOI].item() if drawn < max_images else -float("inf")
        logits[TEXT:] = logits[IMAGE] = -float("inf")
        logits[BOI] = boi
        token = int(draw_after_some(torch.tensor([ids]), logits[None]).argmax())
        ids.append(token)
        if token == EOS:
            break
        if token == BOI:
            drawn += 1
            schedules.append(target)
            new = torch.zeros(0, dtype=torch.long)
            for scale in range(1, len(target) + 1):
                cells = sum(h * w for h, w in target[1:scale])
                last = target[scale - 1][0] * target[scale - 1][1]
                row = [*ids, *[IMAGE] * cells]
                scores = logits_of(model, row, torch.cat([codes, new]), schedules)[-last:, TEXT : TEXT + CODES]
                if guidance != 1:
                    plain = [*negative, BOI, *[IMAGE] * cells]
                    free = logits_of(model, plain, new, [target])[-last:, TEXT : TEXT + CODES]
                    scores = free + guidance * (scores - free)
                new = torch.cat([new, scores.argmax(-1)])
            codes = torch.cat([codes, new])
            ids += image_tokens(target)[1:]
    return ids, codes, schedules


def logits_of(model, ids, codes, schedules):
    grids = grids_tensor(*schedules) if schedules else None
    return model(input_ids=torch.tensor([ids]), image_codes=codes, image_grids=grids).logits[0]


NO_CODES = torch.zeros(0, dtype=torch.long)
PROMPTS = {
    "text": ([5, 6, 7], NO_CODES, []),
    "image": ([8, *image_tokens(WIDE), 9], random_codes(WIDE), [WIDE]),
    "short": ([31], NO_CODES, []),
}
SETTINGS = {"generation_mode": "interleaved", "do_sample": False, "image_temperature": 0.0, "max_new_tokens": 9}


def generate(model, *names, targets=(SQUARE,), **settings):
    rows = [PROMPTS[name][0] for name in names]
    length = max(map(len, rows))
    schedules = [schedule for name in names for schedule in PROMPTS[name][2]]
    settings.setdefault("logits_processor", [draw_after_some])
    return model.generate(
        input_ids=torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        image_codes=torch.cat([PROMPTS[name][1] for name in names]) if schedules else None,
        image_grids=grids_tensor(*schedules) if schedules else None,
        target_grids=grids_tensor(*targets),
        **{**SETTINGS, **settings},
    )


def row_of(out, index: int, num_rows_codes: list[int]):
    """Tokens without padding and codes of one row."""
    ids = out.sequences[index][out.attention_mask[index].bool()].tolist()
    return ids, out.image_codes.split(num_rows_codes)[index]


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("max_images", [0, 1, 2])
def test_one_row_equals_whole_forwards(model, name, max_images):
    out = generate(model, name, max_images=max_images, max_new_tokens=20)
    ids, codes, schedules = by_hand(model, *PROMPTS[name], SQUARE, max_new_tokens=20, max_images=max_images)
    assert out.sequences[0].tolist() == ids and out.attention_mask.all()
    assert torch.equal(out.image_codes, codes)
    assert torch.equal(out.image_grids, grids_tensor(*schedules))
    own = len(PROMPTS[name][2])
    assert out.is_generated.tolist() == [False] * own + [True] * (len(schedules) - own)
    assert len(schedules) - own == max_images  # or the test shows nothing


@pytest.mark.parametrize("targets", [(SQUARE,), (SQUARE, WIDE, SQUARE)], ids=["one schedule", "two schedules"])
def test_rows_of_a_batch_are_what_they_are_alone(model, targets):
    out = generate(model, *PROMPTS, targets=targets, max_images=2, max_new_tokens=9)
    alone = [
        by_hand(model, *PROMPTS[name], target, max_new_tokens=9, max_images=2)
        for name, target in zip(PROMPTS, targets * 3)
    ]
    begun = [ids[len(PROMPTS[name][0]) :].index(BOI) for name, (ids, _, _) in zip(PROMPTS, alone)]
    assert len(set(begun)) > 1  # they do draw at different times
    sizes = [len(codes) for _, codes, _ in alone]
    for index, (ids, codes, _) in enumerate(alone):
        found, found_codes = row_of(out, index, sizes)
        assert found == ids
        assert torch.equal(found_codes, codes)
    assert torch.equal(out.image_grids, grids_tensor(*[schedule for _, _, found in alone for schedule in found]))


def test_a_row_that_ends_early_and_sampling_with_own_generators(model):
    eos = generate(model, "text", max_images=1).sequences[0, -2].item()  # so that one row stops before the others
    settings = {"max_images": 1, "do_sample": True, "temperature": 0.7, "image_temperature": 1.0, "eos_token_id": eos}
    batch = generate(model, *PROMPTS, **settings, generator=[torch.Generator().manual_seed(s) for s in range(3)])
    sizes = []
    for seed, name in enumerate(PROMPTS):
        single = generate(model, name, **settings, generator=torch.Generator().manual_seed(seed))
        sizes.append(len(single.image_codes))
        ids = batch.sequences[seed][batch.attention_mask[seed].bool()]
        assert torch.equal(ids, single.sequences[0])
        assert torch.equal(batch.image_codes[sum(sizes[:-1]) : sum(sizes)], single.image_codes)
    assert len(batch.image_codes) == sum(sizes)


def test_guidance_uses_the_unconditional_prompt(model):
    settings = {"max_images": 2, "guidance_scale": 3.0}
    negative = torch.tensor([[30, 12]])
    out = generate(model, "text", "short", negative_input_ids=negative, **settings)
    alone = [
        by_hand(model, *PROMPTS[name], SQUARE, max_new_tokens=9, max_images=2, negative=[30, 12], guidance=3.0)
        for name in ("text", "short")
    ]
    sizes = [len(codes) for _, codes, _ in alone]
    for index, (ids, codes, _) in enumerate(alone):
        found, found_codes = row_of(out, index, sizes)
        assert found == ids and torch.equal(found_codes, codes)
    assert not torch.equal(out.image_codes[: sizes[0]], generate(model, "text", max_images=2).image_codes)


@pytest.mark.parametrize("names", [["text"], ["image"], ["short", "text", "image"]], ids=["text", "image", "batch"])
def test_going_on_from_the_cache_equals_starting_again(model, names):
    out = generate(model, *names, max_images=1, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() in (out.sequences.shape[1] - 1, out.sequences.shape[1])
    turn = torch.tensor([[14, *image_tokens(WIDE), 15]]).expand(len(names), -1)  # with a new image of the user
    # Codes in reading order: those of a row, then the row's new image
    grids_by_row = out.image_grids.split([(row == BOI).sum().item() for row in out.sequences])
    codes_by_row = out.image_codes.split([int(grids.prod(-1).sum()) for grids in grids_by_row])
    inputs = {
        "input_ids": torch.cat([out.sequences, turn], dim=1),
        "attention_mask": torch.cat([out.attention_mask, torch.ones_like(turn)], dim=1),
        "image_codes": torch.cat([part for codes in codes_by_row for part in (codes, random_codes(WIDE, seed=3))]),
        "image_grids": torch.cat([part for grids in grids_by_row for part in (grids, grids_tensor(WIDE))]),
        "logits_processor": [draw_after_some],
        "max_images": 1,
    }
    again = model.generate(**inputs, **SETTINGS)
    cache_length = out.past_key_values.get_seq_length()
    went_on = model.generate(**inputs, **SETTINGS, past_key_values=out.past_key_values)
    assert cache_length > 1 and torch.equal(went_on.sequences, again.sequences)
    assert torch.equal(went_on.image_codes, again.image_codes)
    assert torch.equal(went_on.image_grids, again.image_grids)
    assert again.is_generated.sum() == len(names)
    # and the last schedule of each row is the one that is drawn on
    assert torch.equal(again.image_grids[again.is_generated], grids_tensor(*[WIDE] * len(names)))


def test_answer_is_the_generated_part(model):
    out = generate(model, "image", "text", max_images=1)
    answer = out.answer()
    assert torch.equal(answer.sequences, out.sequences[:, len(PROMPTS["image"][0]) :])
    cells = sum(h * w for h, w in SQUARE)
    first = len(random_codes(WIDE))
    assert torch.equal(answer.image_codes, out.image_codes[first:])
    assert len(answer.image_codes) == 2 * cells and torch.equal(answer.image_grids, grids_tensor(SQUARE, SQUARE))
    assert (answer.sequences == EOI).sum() == 2


def test_num_return_sequences_repeats_whole_rows(model):
    settings = {"max_images": 1, "do_sample": True, "temperature": 0.7, "image_temperature": 1.0}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    out = generate(model, "image", "short", **settings, num_return_sequences=2, generator=generators())
    expected = generate(model, "image", "image", "short", "short", **settings, generator=generators())
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.image_codes, expected.image_codes)
    assert torch.equal(out.image_grids, expected.image_grids)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("negatives", [[[4]], [[4], [6]]], ids=["one for all", "one each"])
def test_num_return_sequences_with_guidance_repeats_the_unconditional_prompts(model, mode, negatives):
    """Greedy, each of the `count` rows of a prompt is what the prompt gives alone."""
    settings = {**SETTINGS, "generation_mode": mode, "max_images": 1, "guidance_scale": 3.0}
    inputs = {"input_ids": torch.tensor([[9], [14]]), "target_grids": grids_tensor(WIDE)}  # both begin an image
    inputs |= {"negative_input_ids": torch.tensor(negatives)}
    settings |= {"logits_processor": [draw_after_some], "do_sample": True, "top_k": 1} if mode == "interleaved" else {}
    if mode == "image":
        settings = {"generation_mode": mode, "guidance_scale": 3.0, "temperature": 0.0}
    one = model.generate(**inputs, **settings).image_codes.view(2, -1)
    two = model.generate(**inputs, **settings, num_return_sequences=2).image_codes
    assert torch.equal(two.view(4, -1), one.repeat_interleave(2, dim=0))


class Recorder:
    def __init__(self):
        self.tokens, self.images, self.ended = [], [], False

    def put(self, value):
        self.tokens.append(value.tolist())

    def put_image(self, image_codes, image_grids):
        self.images.append((len(self.tokens), image_codes, image_grids))

    def end(self):
        self.ended = True


def test_streamer_gets_text_and_images_apart(model):
    streamer = Recorder()
    out = generate(model, "image", max_images=1, streamer=streamer)
    prompt, *tokens = streamer.tokens
    assert prompt == [[8, 9]] and streamer.ended  # `<boi>`, placeholders and `<eoi>` are no text
    text = [token for token in out.answer().sequences[0].tolist() if token < TEXT and token != IMAGE]
    assert [token for (token,) in tokens] == text
    ((after, codes, grids),) = streamer.images
    assert after - 1 == out.answer().sequences[0].tolist().index(BOI)
    assert torch.equal(codes, out.answer().image_codes) and torch.equal(grids, grids_tensor(SQUARE)[0])
    without_hook = Recorder()
    without_hook.put_image = None
    generate(model, "image", max_images=1, streamer=without_hook)
    assert without_hook.tokens == streamer.tokens


def test_schedule_comes_from_the_call_the_last_image_or_the_configuration(model, monkeypatch):
    inputs = {"input_ids": torch.tensor([PROMPTS["image"][0]]), "image_codes": random_codes(WIDE)}
    settings = {**SETTINGS, "logits_processor": [draw_after_some], "max_images": 1}
    out = model.generate(**inputs, image_grids=grids_tensor(WIDE), **settings)
    assert torch.equal(out.image_grids, grids_tensor(WIDE, WIDE))
    text = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="pass target_grids, or set image_target_grids"):
        model.generate(text, **settings)
    monkeypatch.setattr(model.generation_config, "image_target_grids", [list(grid) for grid in SQUARE])
    assert torch.equal(model.generate(text, **settings).image_grids, grids_tensor(SQUARE))


BAD_CALLS = {
    "beams": ({"num_beams": 2}, "'interleaved' does not go with beams, got num_beams=2"),
    "assistant": ({"assistant_model": object()}, "does not go with assistant_model"),
    "scores": ({"output_scores": True}, "does not go with output_scores, got True"),
    "minimum": ({"min_new_tokens": 3}, "does not go with min_new_tokens, got 3"),
    "static cache": ({"cache_implementation": "static"}, "does not go with cache_implementation, got 'static'"),
    "no cache": ({"use_cache": False}, "does not go without a cache"),
    "guidance": ({"guidance_scale": 2.0}, "needs negative_input_ids"),
    "guidance towards images": ({"image_guidance_scale": 2.0}, "does not go with image_guidance_scale"),
    "stop strings": ({"stop_strings": ["a"]}, r"stop_strings are text, got \['a'\]: pass the tokenizer"),
    "images": ({"max_images": -1}, "max_images is -1, expected at least 0"),
    "early exit": ({"assistant_early_exit": 1}, "does not go with assistant_early_exit, got 1"),
    "per scale": ({"image_top_k": [1, 2]}, "top_k has 2 entries, expected one for each of the 4 scales"),
    "generators": ({"generator": [torch.Generator()] * 2}, "got 2 generators for a batch of 1"),
    "boi": ({"input_ids": torch.tensor([[5, BOI]])}, "do not end in <boi>"),
    "targets": ({"target_grids": grids_tensor(SQUARE, SQUARE)}, "target_grids has 2 rows, expected 1 or 1"),
    "unknown": ({"max_image": 2}, "max_image"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(model, case):
    change, message = BAD_CALLS[case]
    arguments = {"input_ids": torch.tensor([[5, 6]]), "target_grids": grids_tensor(SQUARE), **SETTINGS, **change}
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)
