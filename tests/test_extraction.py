"""Extraction: what is stored is what the processor and the tokenizer give, whole shards only, one tokenizer only."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from toy_codes import extract_codes
from toy_pipeline import toy_processor, toy_vision_tokenizer

from nextflow_hf.training.data.shards import load_codes


def get_row(index: int) -> dict:
    rng = np.random.default_rng(index)
    size = [(16, 16), (12, 20)][index % 2]
    pictures = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(2)]
    if index % 3 == 0:
        content, images = [{"type": "text", "text": f"draw {index}"}], pictures[:1]
    else:
        content, images = [{"type": "image"}, {"type": "text", "text": f"edit {index}"}], pictures
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "image"}]}]
    return {"messages": messages, "images": images}


def extract(folder, get_row=get_row, **options):
    parts = {"processor": toy_processor(), "vision_tokenizer": toy_vision_tokenizer()}
    options = {"text_drop_rate": 0.0, "image_drop_rate": 0.0, "rows_per_shard": 4, "batch_size": 3, **parts, **options}
    return extract_codes(get_row, 10, folder, **options)


def test_codes_and_tokens_of_a_row(tmp_path):
    data = extract(tmp_path)
    processor, tokenizer = toy_processor(), toy_vision_tokenizer()
    assert len(data) == 10
    for index in range(10):
        row = get_row(index)
        inputs = processor.apply_chat_template(
            row["messages"], images=row["images"], tokenize=True, return_dict=True, return_labels=True
        )
        assert data[index]["input_ids"].tolist() == inputs["input_ids"][0].tolist()
        assert data[index]["labels"].tolist() == inputs["labels"][0].tolist()
        assert data[index]["image_grids"].tolist() == inputs["image_grids"].tolist()
        assert data[index]["length"] == inputs["input_ids"].shape[1]
        clean = tokenizer.encode(inputs["pixel_values"], inputs["image_grids"]).image_codes
        codes, targets = (torch.tensor(data[index][name]) for name in ("image_codes", "image_target_codes"))
        context = len(clean) - int(inputs["image_grids"][-1].prod(-1).sum())
        # The images of the conversation are clean; the one that is trained on is sampled, with targets to correct it.
        assert torch.equal(codes[:context], clean[:context]) and torch.equal(targets[:context], clean[:context])
        assert not torch.equal(codes[context:], targets[context:])


def test_without_self_correction_all_codes_are_clean(tmp_path):
    for row in extract(tmp_path, self_correction=False):
        assert row["image_codes"].tolist() == row["image_target_codes"].tolist()


def test_rows_for_evaluation_are_clean_whatever_else_is_set(tmp_path):
    options = {"text_drop_rate": 1.0, "image_drop_rate": 1.0, "self_correction_samples": 1.0}
    rows = extract(tmp_path / "evaluation", purpose="evaluation", **options)
    plain = extract(tmp_path / "plain", self_correction=False)
    assert list(rows["is_clean"]) == [True] * 10 == list(plain["is_clean"])
    for ours, theirs in zip(rows, plain, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert not any(extract(tmp_path / "training", **options)["is_clean"])


def test_a_killed_extraction_goes_on_and_gives_the_same(tmp_path):
    whole = extract(tmp_path / "whole")

    def breaks(index: int) -> dict:
        if index == 7:
            raise KeyboardInterrupt
        return get_row(index)

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "killed", get_row=breaks)
    assert [path.name for path in sorted((tmp_path / "killed").glob("*.parquet"))] == ["shard-00000.parquet"]
    resumed = extract(tmp_path / "killed")
    assert len(resumed) == len(whole) == 10
    for ours, theirs in zip(whole, resumed):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_another_tokenizer_or_setting_is_refused(tmp_path):
    extract(tmp_path)
    with pytest.raises(
        ValueError, match=r"other settings: \[\('settings.seed', 0\)\], expected \[\('settings.seed', 1\)\]"
    ):
        extract(tmp_path, seed=1)
    other = toy_vision_tokenizer()
    with torch.no_grad():
        other.quantizer.pixel_codebook.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other settings: .*vision_tokenizer"):
        extract(tmp_path, vision_tokenizer=other)


def test_a_decoder_that_was_trained_on_keeps_its_codes(tmp_path):
    extract(tmp_path)
    other = toy_vision_tokenizer()
    with torch.no_grad():
        other.pixel_decoder.conv_in.weight.add_(1)
    assert len(extract(tmp_path, vision_tokenizer=other)) == 10


def test_a_finished_extraction_says_that_it_reads_nothing(tmp_path, caplog):
    extract(tmp_path)
    assert "stays as it is" not in caplog.text
    extract(tmp_path)
    assert f"{tmp_path} is finished and stays as it is; remove it if captions or images changed" in caplog.text


def test_loading_an_empty_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="extract the codes first"):
        load_codes(tmp_path)


def test_everything_but_the_encoder_is_off_the_main_thread(tmp_path, monkeypatch):
    """Rows are read, tokenized and processed on other threads, in order: any number of them gives the same rows."""
    processor, threads = toy_processor(), set()
    apply = type(processor).apply_chat_template

    def recorded(self, *args, **kwargs):
        threads.add(threading.current_thread())
        return apply(self, *args, **kwargs)

    def read(index: int) -> dict:
        threads.add(threading.current_thread())
        return get_row(index)

    monkeypatch.setattr(type(processor), "apply_chat_template", recorded)
    one, many = (extract(tmp_path / str(count), read, decoding_threads=count)[:] for count in (1, 6))
    assert threads and threading.main_thread() not in threads
    assert all(np.array_equal(a, b) for name in one for a, b in zip(one[name], many[name], strict=True))
