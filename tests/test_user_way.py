"""The way of a user, by commands alone, offline and in a fresh folder: from a Qwen to a model in use."""

from pathlib import Path

import pytest
from command_line import save_picture

from nextflow_hf import NextFlowPipeline


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    from nextflow_hf import cli

    folder = tmp_path_factory.mktemp("converted")
    qwen, tokenizer = save_qwen(folder / "qwen"), save_tokenizer(folder / "tokenizer")
    assert cli.main(["convert", "qwen", str(qwen), str(folder / "model"), "--vision-tokenizer", str(tokenizer)]) == 0
    return folder / "model"


@pytest.mark.parametrize("family", QWENS)
def test_convert_writes_a_whole_pipeline(family, tmp_path, command_line):
    save_qwen(tmp_path / "qwen", family), save_tokenizer(tmp_path / "tokenizer")
    said = command_line.run("convert", "qwen", "qwen", "model", "--vision-tokenizer", "tokenizer", "--dry-run")
    assert "vocabulary of 306: 280 of text from qwen, 24 codes, <boi> and <eoi>" in said
    assert "images of 16 x 16 pixels" in said and "vision tokenizer -> model/vision_tokenizer" in said
    assert not Path("model").exists()
    command_line.run("convert", "qwen", "qwen", "model", "--vision-tokenizer", "tokenizer")
    pipe = NextFlowPipeline.from_pretrained("model")
    config, processor = pipe.transformer.config, pipe.processor
    assert config.max_scales == processor.max_scales == 4
    assert processor.tokenizer.convert_tokens_to_ids(CONTROL) == list(range(256, 262))
    assert (config.image_token_id, config.boi_token_id, config.eos_token_id) == (261, 304, 258)
    assert config.vision_tokenizer_fingerprint == pipe.vision_tokenizer.get_codes_fingerprint()
    assert pipe.transformer.generation_config.image_top_k == 2  # the paper's
    assert "You are Qwen" not in processor.apply_chat_template([{"role": "user", "content": "a"}])
    command_line.run("generate", "a", "--model", "model", "--seed", "1", "--output", "drawn.png")
    assert Path("drawn.png").is_file()


def test_every_command_takes_it(converted, command_line, tmp_path):
    save_picture(tmp_path / "photo.png")
    model = ("--model", str(converted))
    assert command_line.json("info", converted)["class"] == "NextFlowPipeline"
    command_line.run("chat", "hello", "--max-new-tokens", "2", *model)
    command_line.run("edit", "a", "--image", "photo.png", "--output", "edited.png", *model)
    command_line.run("reconstruct", "photo.png", *model)
