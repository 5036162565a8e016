"""Drawing: the cached loop against one teacher-forced forward, guidance, sampling, and text generation."""

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend
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
from transformers import GenerationConfig

from nextflow_hf import NextFlowGenerationConfig
from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.modeling_nextflow import generation_image_nextflow, sampling_nextflow
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.modeling_nextflow.sampling_nextflow import guide


NO_SAMPLING = {"guidance_scale": 1.0, "temperature": 0.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def model() -> NextFlowForCausalLM:
    return toy_model()


def recorded_logits(model, monkeypatch) -> list[torch.Tensor]:
    """Every call of `image_logits` while drawing, in order."""
    seen, original = [], model.image_logits

    def record(hidden_states):
        seen.append(original(hidden_states))
        return seen[-1]

    monkeypatch.setattr(model, "image_logits", record)
    return seen


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("schedule", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("context", [None, WIDE], ids=["text", "image"])
def test_cached_drawing_equals_the_teacher_forced_forward(model, monkeypatch, attn_implementation, schedule, context):
    model.set_attn_implementation(attn_implementation)
    seen = recorded_logits(model, monkeypatch)
    prompt, schedules, codes = [5, 6, 7], [schedule], torch.zeros(0, dtype=torch.long)
    if context:
        prompt, schedules, codes = [5, *image_tokens(context), 6], [context, schedule], random_codes(context)
    grids = grids_tensor(*schedules)
    drawn = model.generate_images(
        torch.tensor([[*prompt, BOI]]), image_grids=grids, image_codes=codes, **NO_SAMPLING
    ).image_codes
    whole = model(
        input_ids=torch.tensor([[*prompt, *image_tokens(schedule)]]),
        image_codes=torch.cat([codes, drawn]),
        image_grids=grids,
    ).logits[0, len(prompt) : -1, TEXT : TEXT + CODES]
    assert len(seen) == len(schedule)
    torch.testing.assert_close(torch.cat(seen, dim=1)[0], whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(whole.argmax(-1), drawn)
    model.set_attn_implementation("sdpa")


def test_guided_logits_equal_two_plain_forwards(model, monkeypatch):
    grids = grids_tensor(SQUARE)
    prompt, negative = [5, 6, 7, 8], [9]
    out = model.generate_images(
        torch.tensor([[*prompt, BOI]]), image_grids=grids, negative_input_ids=torch.tensor([[*negative, BOI]]),
        **{**NO_SAMPLING, "guidance_scale": 3.0},
    )  # fmt: skip
    logits = [
        model(
            input_ids=torch.tensor([[*p, *image_tokens(SQUARE)]]), image_codes=out.image_codes, image_grids=grids
        ).logits[0, len(p) : -1, TEXT : TEXT + CODES]
        for p in (prompt, negative)
    ]
    expected = logits[1] + 3.0 * (logits[0] - logits[1])
    top = expected.topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-3  # no tie that rounding could turn
    assert torch.equal(expected.argmax(-1), out.image_codes)


def test_guidance_that_ends_early_drops_the_unconditional_rows(model, monkeypatch):
    rows = []
    original = model.model.forward

    def forward(**inputs):
        rows.append(len(inputs.get("input_ids", inputs.get("inputs_embeds"))))
        return original(**inputs)

    monkeypatch.setattr(model.model, "forward", forward)
    negative = torch.tensor([[9, BOI]])
    arguments = {"image_grids": grids_tensor(SQUARE), "negative_input_ids": negative, "temperature": 0.0}
    early = model.generate_images(torch.tensor([[5, 6, BOI]]), guidance_scale=[3.0, 3.0, 1.0, 1.0], **arguments)
    assert rows == [2, 2, 1, 1]
    # The same draw with the unconditional rows kept: their weight is zero where guidance is (all but) 1.
    kept = model.generate_images(torch.tensor([[5, 6, BOI]]), guidance_scale=[3.0, 3.0, 1.0, 1.0 + 1e-7], **arguments)
    assert torch.equal(early.image_codes, kept.image_codes)


def test_a_row_does_not_depend_on_the_rows_beside_it(model):
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    length = max(map(len, prompts)) + 1
    ids = torch.tensor([[0] * (length - len(p) - 1) + p + [BOI] for p in prompts])
    mask = torch.tensor([[0] * (length - len(p) - 1) + [1] * (len(p) + 1) for p in prompts])
    arguments = {"negative_input_ids": torch.tensor([[12, BOI]]), "guidance_scale": 2.0, "top_k": 7, "top_p": 0.9}
    batch = model.generate_images(
        ids, mask, image_grids=grids_tensor(SQUARE, SQUARE, SQUARE),
        generator=[torch.Generator().manual_seed(s) for s in range(3)], **arguments,
    ).image_codes.view(3, -1)  # fmt: skip
    for seed, prompt in enumerate(prompts):
        single = model.generate_images(
            torch.tensor([[*prompt, BOI]]), image_grids=grids_tensor(SQUARE),
            generator=torch.Generator().manual_seed(seed), **arguments,
        ).image_codes  # fmt: skip
        assert torch.equal(single, batch[seed])


def test_rows_of_different_length_go_apart_where_blocks_are_large(model, monkeypatch):
    seen, masks, original = recorded_logits(model, monkeypatch), [], model.model.forward

    def forward(**inputs):
        masks.append(inputs.get("attention_mask"))
        return original(**inputs)

    monkeypatch.setattr(model.model, "forward", forward)
    prompts, mask = torch.tensor([[5, 6, 7, BOI], [PAD, 8, 9, BOI]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    arguments = {
        "image_grids": grids_tensor(SQUARE, SQUARE),
        "negative_input_ids": torch.tensor([[10, BOI]]),
        "guidance_scale": [3.0, 3.0, 3.0, 1.0],
        "temperature": 0.0,
    }
    together = model.generate_images(prompts, mask, **arguments).image_codes
    expected = [logits.split(1) for logits in seen]
    assert all(mask is not None for mask in masks)
    seen.clear()
    masks.clear()
    # Rows of lengths 4, 3, 2, 2: the smallest part is a row, which is worth a pass of its own from 9 cells on.
    monkeypatch.setattr(generation_image_nextflow, "ARITHMETIC_BOUND", 9)
    apart = model.generate_images(prompts, mask, **arguments).image_codes
    assert torch.equal(apart, together)
    assert [mask is None for mask in masks] == [False, False, True, True, True, True, True]
    assert [len(logits) for logits in seen] == [4, 4, 1, 1, 2, 1, 1]
    torch.testing.assert_close(seen[2:], [*expected[2][:2], torch.cat(expected[2][2:]), *expected[3]])


@pytest.mark.parametrize("negative", [[10, 11], [10]], ids=["equal", "padded"])
def test_compiled_layers_share_their_code_and_draw_the_same(negative):
    counter = CompileCounterWithBackend("eager")
    draw = {
        "input_ids": torch.tensor([[5, 6, BOI]]),
        "image_grids": grids_tensor(SQUARE),
        "negative_input_ids": torch.tensor([[*negative, BOI]]),
        "guidance_scale": 3.0,
        "temperature": 0.0,
    }
    write = {"max_new_tokens": 6, "do_sample": False}
    compiled, frames = toy_model(num_hidden_layers=12), []
    expected = compiled.generate_images(**draw).image_codes, compiled.generate(torch.tensor([[5, 6]]), **write)
    compiled.compile_repeated_blocks(backend=counter)
    assert torch.equal(compiled.generate_images(**draw).image_codes, expected[0])
    frames.append(counter.frame_count)
    assert torch.equal(compiled.generate_images(**draw).image_codes, expected[0])
    assert torch.equal(compiled.generate(torch.tensor([[5, 6]]), **write), expected[1])
    frames.append(counter.frame_count)
    if Version(torch.__version__) >= Version("2.13"):  # 2.8 compiles a layer in pieces, each of which counts
        assert frames[0] < 6 and frames[1] < 8  # of the limit of 8, after which torch.compile gives up


def test_drawing_with_a_generator_leaves_the_global_one_alone(model):
    before = torch.get_rng_state()
    model.generate_images(
        torch.tensor([[5, BOI]]), image_grids=grids_tensor(SQUARE), generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(before, torch.get_rng_state())


def test_guide_is_the_textbook_formula():
    cond, uncond = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide(cond, uncond, 2.5), uncond + 2.5 * (cond - uncond))
    assert guide(cond, None, 2.5) is cond


def test_text_is_generated_from_integers_alone():
    """A policy under FSDP2 in half precision rounds every other input of its forward, positions among them."""
    model, floats = toy_model(), []

    def look(module, args, inputs) -> None:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        assert {"input_ids", "position_ids"} <= set(tensors)
        floats.extend(name for name, value in tensors.items() if value.is_floating_point())

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.generate(torch.tensor([[5, 6], [PAD, 7]]), attention_mask=torch.tensor([[1, 1], [0, 1]]), max_new_tokens=3)
    assert not floats


def test_callback_sees_every_scale_and_can_change_the_rest(model):
    seen = []

    def callback(index, step, codes):
        seen.append((index, step.grid, codes.shape[1]))
        return [] if index == 1 else None  # stop after two scales

    out = model.generate_images(torch.tensor([[5, BOI]]), image_grids=grids_tensor(SQUARE), callback=callback)
    assert seen == [(0, (1, 1), 1), (1, (2, 2), 5)]
    assert len(out.image_codes) == 5 and out.image_grids[0].tolist() == [[1, 1], [2, 2], [0, 0], [0, 0], [0, 0]]


def test_toy_model_overfits_one_image_and_reproduces_its_codes():
    torch.manual_seed(0)
    model = NextFlowForCausalLM(toy_config()).train()
    codes, grids = random_codes(SQUARE, seed=5), grids_tensor(SQUARE)
    row = torch.tensor([[5, 6, *image_tokens(SQUARE)]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(input_ids=row, image_codes=codes, image_grids=grids, labels=row).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = model.eval().generate_images(torch.tensor([[5, 6, BOI]]), image_grids=grids, **NO_SAMPLING).image_codes
    assert loss < 0.1
    assert torch.equal(drawn, codes)


def test_text_generation_never_draws_image_tokens(model):
    prompt = torch.tensor([[5, 6]])
    out = model.generate(prompt, max_new_tokens=20, do_sample=True, top_k=0, temperature=5.0, eos_token_id=EOS)
    assert (out < TEXT).all() and not (out[:, 2:] == 2).any()


def test_text_after_an_image_is_the_same_with_and_without_cache(model):
    row, grids = torch.tensor([[5, *image_tokens(SQUARE), 6]]), grids_tensor(SQUARE)
    arguments = {"image_codes": random_codes(SQUARE), "image_grids": grids, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(row, **arguments)
    plain = model.generate(row, use_cache=False, **arguments)
    assert torch.equal(cached, plain) and cached.shape[1] > row.shape[1]
    ids = row
    for _ in range(cached.shape[1] - row.shape[1]):  # greedy by hand, one whole forward a token
        logits = model(input_ids=ids, image_codes=arguments["image_codes"], image_grids=grids).logits[0, -1]
        logits[TEXT:] = logits[2] = -float("inf")
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    assert torch.equal(cached, ids)


def test_image_mode_of_generate_reads_the_generation_config(model, monkeypatch):
    seen = recorded_logits(model, monkeypatch)
    monkeypatch.setattr(model.generation_config, "image_temperature", 0.0, raising=False)
    inputs = {"input_ids": torch.tensor([[5, BOI]]), "image_grids": grids_tensor(SQUARE)}
    drawn = model.generate(**inputs, generation_mode="image").image_codes
    assert torch.equal(torch.cat(seen, dim=1)[0].argmax(-1), drawn)


def test_image_settings_are_saved_and_loaded(model, monkeypatch, tmp_path):
    settings = {
        "guidance_scale": [1.0, 2.0, 3.0, 4.5],
        "guidance_schedule": "linear",
        "image_temperature": 0.5,
        "image_top_k": [4, 3, 2, 1],
        "image_target_grids": [list(grid) for grid in SQUARE],
        "max_images": 2,
    }
    configured = NextFlowGenerationConfig(**settings, do_sample=True, eos_token_id=EOS)
    monkeypatch.setattr(model, "generation_config", configured)
    model.save_pretrained(tmp_path)
    assert "image_top_p" not in (tmp_path / "generation_config.json").read_text()  # unset stays unset
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path).generation_config
    assert type(loaded) is NextFlowGenerationConfig and loaded.do_sample and loaded.image_top_p is None
    assert {name: getattr(loaded, name) for name in settings} == settings
    alone = NextFlowGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(alone, name) for name in settings} == settings
    # A repository without the file, and one whose owner assigned a plain configuration
    (tmp_path / "generation_config.json").unlink()
    assert NextFlowForCausalLM.from_pretrained(tmp_path).generation_config.image_top_k is None
    monkeypatch.setattr(model, "generation_config", GenerationConfig(image_top_k=3, image_temperature=0.0))
    model.save_pretrained(tmp_path)
    assert NextFlowForCausalLM.from_pretrained(tmp_path).generation_config.image_top_k == 3


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_saved_guidance_is_that_of_images_in_every_mode(model, monkeypatch, tmp_path, mode):
    monkeypatch.setattr(model, "generation_config", NextFlowGenerationConfig(guidance_scale=2.0, eos_token_id=EOS))
    model.save_pretrained(tmp_path)
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path).eval()
    prompt, grids, negative = torch.tensor([[5, 6]]), grids_tensor(SQUARE), torch.tensor([[7]])
    greedy = {"do_sample": False, "max_new_tokens": 4}

    def call(**settings):
        if mode == "text":
            return loaded.generate(prompt, **greedy, **settings)
        begin = {"logits_processor": [lambda ids, scores: scores.index_fill(1, torch.tensor([BOI]), 1e4)]}
        own = {**greedy, "max_images": 1, "image_temperature": 0.0, **begin} if mode == "interleaved" else {}
        settings = {"image_temperature": 0.0, **own, **settings}
        inputs = {"negative_input_ids": negative, "target_grids": grids, "generation_mode": mode}
        return loaded.generate(prompt, **inputs, **settings).image_codes

    found = call()
    assert torch.equal(call(guidance_scale=2.0), found) is (mode != "text")  # of a text only the call can ask for it
    assert torch.equal(call(guidance_scale=1.0), found) is (mode == "text")
    config = NextFlowGenerationConfig(guidance_scale=2.0, eos_token_id=EOS)
    assert torch.equal(call(generation_config=config), found)


def test_names_of_old_generation_configs_are_translated_by_their_format(tmp_path, caplog, monkeypatch):
    old = {"image_guidance_scale": 2.0, "image_guidance_schedule": "linear", "image_top_k": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(old))
    config = NextFlowGenerationConfig.from_pretrained(tmp_path)
    assert (config.guidance_scale, config.guidance_schedule, config.image_guidance_scale) == (2.0, "linear", None)
    assert (config.image_top_k, config.nextflow_format) == (5, 2)
    # What is written says its format, so the same name means the source images in it
    config.image_guidance_scale = 1.5
    config.save_pretrained(tmp_path)
    again = NextFlowGenerationConfig.from_pretrained(tmp_path)
    assert (again.guidance_scale, again.image_guidance_scale) == (2.0, 1.5)
    shipped = NextFlowForCausalLM.from_pretrained(shapes_model_path()).generation_config
    assert (shipped.guidance_scale, shipped.image_guidance_scale, shipped.image_temperature) == (2.0, None, 0.3)
    (tmp_path / "generation_config.json").write_text(json.dumps({**old, "nextflow_format": 3}))
    with pytest.raises(ValueError, match="nextflow_format is 3, expected 2"):
        NextFlowGenerationConfig.from_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"guidance_scale": 3.0}))
    assert NextFlowGenerationConfig.from_pretrained(tmp_path).guidance_scale is None
    assert "left out guidance_scale=3.0 of an old generation config" in caplog.text


BAD_SETTINGS = {
    "lengths": ({"image_top_k": [1, 2], "image_top_p": [0.5]}, "must have one length"),
    "range": ({"image_top_p": 2.0}, r"image_top_p is 2.0, expected a number in \[0, 1.0\]"),
    "type": ({"image_top_k": 2.5}, "image_top_k is 2.5, expected a whole number"),
    "schedule": ({"guidance_schedule": "cosine"}, r"guidance_schedule is 'cosine', expected one of \['constant'"),
    "images": ({"max_images": -1}, "max_images is -1"),
    "grids": ({"image_target_grids": [[2, 2]]}, r"must start with \[1, 1\]"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_image_settings_are_refused(case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        NextFlowGenerationConfig(**settings)


def test_image_mode_puts_the_boi_where_it_is_missing(model):
    settings = {"generation_mode": "image", "image_temperature": 0.0}
    expected = model.generate_images(torch.tensor([[5, 6, BOI]]), image_grids=grids_tensor(SQUARE), **NO_SAMPLING)
    found = model.generate(torch.tensor([[5, 6]]), target_grids=grids_tensor(SQUARE), **settings)
    assert torch.equal(found.image_codes, expected.image_codes)
    # As large as the last image of the prompt
    row, codes = [5, *image_tokens(WIDE), 6], random_codes(WIDE)
    found = model.generate(torch.tensor([row]), image_codes=codes, image_grids=grids_tensor(WIDE), **settings)
    grids = grids_tensor(WIDE, WIDE)
    expected = model.generate_images(torch.tensor([[*row, BOI]]), image_codes=codes, image_grids=grids, **NO_SAMPLING)
    assert torch.equal(found.image_codes, expected.image_codes)
    # Whose last grid stands there twice where its last codes are to be seen
    shown = [*WIDE, WIDE[-1]]
    row, codes = [5, *image_tokens(shown), 6], random_codes(shown)
    found = model.generate(torch.tensor([row]), image_codes=codes, image_grids=grids_tensor(shown), **settings)
    assert torch.equal(found.image_grids, grids_tensor(WIDE))


def test_image_mode_takes_settings_under_both_names_and_greedy(model):
    inputs = {"inputs": torch.tensor([[5, BOI]]), "image_grids": grids_tensor(SQUARE), "generation_mode": "image"}
    expected = model.generate(**inputs, temperature=0.0).image_codes
    assert torch.equal(model.generate(**inputs, image_temperature=0.0).image_codes, expected)
    assert torch.equal(model.generate(**inputs, do_sample=False).image_codes, expected)
    config = NextFlowGenerationConfig(image_temperature=0.0)
    assert torch.equal(model.generate(**inputs, generation_config=config).image_codes, expected)
    several = model.generate(**inputs, temperature=0.0, num_return_sequences=3)
    assert torch.equal(several.image_codes, expected.repeat(3)) and len(several.image_grids) == 3
    # What a caller of all modes says, and what the model's texts are configured to be, is no matter of images.
    plain = {"max_new_tokens": 9, "eos_token_id": EOS, "repetition_penalty": 1.0, "use_cache": True}
    assert torch.equal(model.generate(**inputs, temperature=0.0, **plain).image_codes, expected)
    config = NextFlowGenerationConfig(image_temperature=0.0, repetition_penalty=1.3, do_sample=True, min_p=0.1)
    assert torch.equal(model.generate(**inputs, generation_config=config).image_codes, expected)


@pytest.mark.parametrize("mode", ["image", "interleaved", None], ids=str)
def test_configured_guidance_without_a_negative_prompt_is_left_out_with_a_warning(model, monkeypatch, caplog, mode):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(sampling_nextflow.logger, "warning_once", sampling_nextflow.logger.warning)

    def draw(**settings):
        prompt, grids = torch.tensor([[5, BOI]]), grids_tensor(SQUARE)
        if mode is None:
            names = {"guidance_scale": "guidance_scale", "image_temperature": "temperature"}
            return model.generate_images(prompt, image_grids=grids, **{names[k]: v for k, v in settings.items()})
        if mode == "image":
            return model.generate(prompt, image_grids=grids, generation_mode="image", **settings)
        begin = {"logits_processor": [lambda ids, scores: scores.index_fill(1, torch.tensor([BOI]), 1e4)]}
        settings |= {"target_grids": grids, "max_images": 1, "max_new_tokens": 1, "do_sample": False, **begin}
        return model.generate(prompt[:, :1], generation_mode="interleaved", **settings)

    expected = draw(image_temperature=0.0).image_codes
    assert "without guidance" not in caplog.text
    monkeypatch.setattr(model, "generation_config", NextFlowGenerationConfig(guidance_scale=[3.0] * 4))
    assert torch.equal(draw(image_temperature=0.0).image_codes, expected)
    assert caplog.text.count("the image is sampled without guidance: pass the unconditional prompt") == 1
    with pytest.raises(ValueError, match="needs negative_input_ids"):  # what the call itself asks for
        draw(guidance_scale=3.0)


IMAGE_PROMPTS = torch.tensor([[5, *image_tokens(WIDE), 6, 7], [0] * 15 + [8, 9, 10]])
IMAGE_PROMPTS = {
    "input_ids": IMAGE_PROMPTS,
    "attention_mask": (IMAGE_PROMPTS != 0).long(),
    "image_codes": random_codes(WIDE),
    "image_grids": grids_tensor(WIDE),
}


def test_beams_and_returned_sequences_repeat_the_images_of_a_row(model):
    settings = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    both = model.generate(**IMAGE_PROMPTS, **settings, output_scores=True, return_dict_in_generate=True)
    # The same beams, of each row alone
    rows = [
        {
            "input_ids": IMAGE_PROMPTS["input_ids"][:1],
            "image_codes": random_codes(WIDE),
            "image_grids": grids_tensor(WIDE),
        },
        {"input_ids": IMAGE_PROMPTS["input_ids"][1:, 15:]},
    ]
    for index, row in enumerate(rows):
        alone = model.generate(**row, **settings, output_scores=True, return_dict_in_generate=True)
        own = slice(2 * index, 2 * index + 2)
        torch.testing.assert_close(both.sequences_scores[own], alone.sequences_scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(both.sequences[own, -5:], alone.sequences[:, -5:])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_prompts_may_be_embeddings_with_images(model, settings):
    settings = {**settings, "max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    images = {name: value for name, value in IMAGE_PROMPTS.items() if name != "input_ids"}
    expected = model.generate(**IMAGE_PROMPTS, **settings)
    embeds = model.get_input_embeddings()(IMAGE_PROMPTS["input_ids"])
    found = model.generate(inputs_embeds=embeds, **images, **settings)
    assert torch.equal(found, expected[:, -found.shape[1] :]) and found.shape[1] == 5


def test_an_assistant_sees_the_images_of_the_prompt(model):
    """The same model as its own assistant: every candidate is right."""
    row = {name: value[:1] if name == "input_ids" else value for name, value in IMAGE_PROMPTS.items()}
    row.pop("attention_mask")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(**row, **settings)
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    passes = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(kwargs), with_kwargs=True)
    found = model.generate(**row, **settings, assistant_model=assistant)
    hook.remove()
    assert torch.equal(found, expected) and len(passes) == 2  # three candidates and one more token, twice
    other = toy_model()
    other.lm_head.weight.data.normal_()
    assert torch.equal(model.generate(**row, **settings, assistant_model=other), expected)
    assert torch.equal(model.generate(**row, **settings, prompt_lookup_num_tokens=2), expected)


def test_an_early_exit_drafts_with_the_first_layers(model):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    row = {"input_ids": IMAGE_PROMPTS["input_ids"][:1], "image_codes": random_codes(WIDE)}
    row["image_grids"] = grids_tensor(WIDE)
    expected = model.generate(**row, **settings)
    assert torch.equal(model.generate(**row, **settings, assistant_early_exit=1), expected)
    assert model.config.num_hidden_layers == 2


def test_static_cache_with_images_in_the_prompt(model):
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dynamic = model.generate(**IMAGE_PROMPTS, **settings)
    static = model.generate(**IMAGE_PROMPTS, **settings, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    for found, expected in zip(static.logits, dynamic.logits):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_going_on_from_a_cache_takes_the_whole_prompt(model):
    first = {name: IMAGE_PROMPTS[name] for name in IMAGE_PROMPTS}
    out = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = torch.tensor([[11, 12], [13, 14]])
    mask = F.pad(IMAGE_PROMPTS["attention_mask"], (0, 5), value=1)
    inputs = {**first, "input_ids": torch.cat([out.sequences, more], dim=1), "attention_mask": mask}
    again = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="takes the whole input_ids"):
        model.generate(**{**inputs, "input_ids": more}, past_key_values=out.past_key_values, max_new_tokens=4)
    went_on = model.generate(**inputs, past_key_values=out.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(went_on, again)


BAD_CALLS = {
    "no boi": ({"input_ids": torch.tensor([[5, 6]])}, "hold 0 <boi> tokens, image_grids has 1 rows"),
    "right padding": ({"attention_mask": torch.tensor([[1, 0]])}, "padded on the left"),
    "grids missing": ({"image_grids": grids_tensor()}, "1 <boi> tokens, image_grids has 0 rows"),
    "no negative": ({"guidance_scale": 2.0}, "needs negative_input_ids"),
    "generators": ({"generator": [torch.Generator()] * 2}, "got 2 generators for a batch of 1"),
    "mode": ({"generation_mode": "video"}, "'image' or 'interleaved', got 'video'"),
    "text": ({"generation_mode": "text"}, 'end in <boi>, which an image follows: pass generation_mode="image"'),
    "beams": ({"num_beams": 2}, "'image' does not go with beams, got num_beams=2"),
    "streamer": ({"streamer": object()}, "'image' does not go with streamer"),
    "processors": ({"logits_processor": [object()]}, "'image' does not go with logits_processor"),
    "assistant": ({"assistant_model": object()}, "'image' does not go with assistant_model"),
    "penalty": ({"repetition_penalty": 1.3}, "'image' does not go with repetition_penalty, got 1.3: it is about text"),
    "scores": ({"output_scores": True}, "'image' does not go with output_scores"),
    "no cache": ({"use_cache": False}, "'image' does not go with use_cache, got False"),
    "early exit": (
        {"generation_config": GenerationConfig(assistant_early_exit=1)},
        "does not go with assistant_early",
    ),
    "no size": (
        {"input_ids": torch.tensor([[5]]), "image_grids": None},
        "pass target_grids, or set image_target_grids",
    ),
    "two sizes": ({"target_grids": grids_tensor(SQUARE)}, "got target_grids, but the prompts end in <boi>"),
    "two schedules": (
        {"input_ids": torch.tensor([[5, BOI], [6, BOI]]), "image_grids": grids_tensor(SQUARE, WIDE)},
        "must share one schedule",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(model, case):
    change, message = BAD_CALLS[case]
    arguments = {
        "input_ids": torch.tensor([[5, BOI]]),
        "image_grids": grids_tensor(SQUARE),
        "generation_mode": "image",
        **change,
    }
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_tokens_added_by_a_resize_can_be_written(model):
    resized = copy.deepcopy(model)
    added = resized.config.vocab_size
    resized.resize_token_embeddings(added + 2)
    with torch.no_grad():
        resized.lm_head.weight[added + 1] = 100 * resized.model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
    written = resized.generate(torch.tensor([[5, 6]]), max_new_tokens=1, do_sample=False)
    assert written[0, -1] == added + 1
