"""Talking, drawing and thinking with the pipeline, against `generate` called by hand and whole forwards."""

import pytest
from toy_pipeline import toy_processor

from nextflow_hf.processing import THINKING_PROMPT, join_reasoning, split_reasoning


# ---- the format of thinking


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (join_reasoning("grass is green", "a green circle"), ("grass is green", "a green circle")),
        ("<think>\ngrass is green\n</think>\n\na green circle", ("grass is green", "a green circle")),
        ("<think>grass is", ("grass is", "")),
        ("a green circle", (None, "a green circle")),
        ("<think></think>", ("", "")),
    ],
)
def test_thinking_is_parsed(text, expected):
    assert split_reasoning(text) == toy_processor().split_reasoning(text) == expected


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, THINKING_PROMPT),
        ("Be brief.", f"{THINKING_PROMPT}\nBe brief."),
        ([{"type": "text", "text": "Be brief."}], f"{THINKING_PROMPT}\nBe brief."),
        (THINKING_PROMPT, THINKING_PROMPT),
        ("", THINKING_PROMPT),
    ],
)
def test_a_system_message_asks_for_thinking(system, expected):
    processor, user = toy_processor(), {"role": "user", "content": "a circle"}
    messages = [user] if system is None else [{"role": "system", "content": system}, user]
    text = processor.apply_chat_template(messages, enable_thinking=True, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{expected}<|im_end|>\n<|im_start|>user\na circle<|im_end|>\n<|im_start|>assistant\n"
    )
    # rows that have the system message may ask again
    asked = [{"role": "system", "content": expected}, user]
    assert processor.apply_chat_template(asked, enable_thinking=True, add_generation_prompt=True) == text


def test_the_unconditional_prompt_does_not_think():
    processor, messages = toy_processor(), [{"role": "user", "content": "a circle"}]
    options = {"tokenize": True, "return_dict": True, "generation_mode": "image", "negative_prompt": ""}
    plain = processor.apply_chat_template(messages, **options)
    thinking = processor.apply_chat_template(messages, **options, enable_thinking=True)
    assert thinking["negative_input_ids"].tolist() == plain["negative_input_ids"].tolist()
    assert THINKING_PROMPT in processor.tokenizer.decode(thinking["input_ids"][0])
