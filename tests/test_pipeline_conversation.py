"""Talking, drawing and thinking with the pipeline, against `generate` called by hand and whole forwards."""

import pytest
from toy_pipeline import toy_processor

from nextflow_hf.processing import THINK_PROMPT, format_thinking, parse_thinking, with_think_prompt


# ---- the format of thinking


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_thinking("grass is green", "a green circle"), ("grass is green", "a green circle")),
        ("<think>\ngrass is green\n</think>\n\na green circle", ("grass is green", "a green circle")),
        ("<think>grass is", ("grass is", "")),
        ("a green circle", ("", "a green circle")),
        ("<think></think>", ("", "")),
    ],
)
def test_thinking_is_parsed(text, expected):
    assert parse_thinking(text) == toy_processor().post_process_thinking(text) == expected


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, THINK_PROMPT),
        ("Be brief.", f"{THINK_PROMPT}\nBe brief."),
        ([{"type": "text", "text": "Be brief."}], f"{THINK_PROMPT}\nBe brief."),
        (THINK_PROMPT, THINK_PROMPT),
        ("", THINK_PROMPT),
    ],
)
def test_a_system_message_asks_for_thinking(system, expected):
    processor, user = toy_processor(), {"role": "user", "content": "a circle"}
    messages = [user] if system is None else [{"role": "system", "content": system}, user]
    text = processor.apply_chat_template(messages, enable_thinking=True, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{expected}<|im_end|>\n<|im_start|>user\na circle<|im_end|>\n<|im_start|>assistant\n"
    )
    once = with_think_prompt(messages)
    assert with_think_prompt(once) == once  # so rows that have the system message may ask again


def test_the_unconditional_prompt_does_not_think():
    processor, messages = toy_processor(), [{"role": "user", "content": "a circle"}]
    options = {"tokenize": True, "return_dict": True, "generation_mode": "image", "negative_prompt": ""}
    plain = processor.apply_chat_template(messages, **options)
    thinking = processor.apply_chat_template(messages, **options, enable_thinking=True)
    assert thinking["negative_input_ids"].tolist() == plain["negative_input_ids"].tolist()
    assert THINK_PROMPT in processor.tokenizer.decode(thinking["input_ids"][0])
