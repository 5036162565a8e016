"""What the Shapes world trains beside the model: its text tokenizer and its semantic teacher."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import patchify
from nextflow_hf.training.shapes.captions import sample_prompt
from nextflow_hf.training.shapes.teacher import CaptionedPictures, ContrastiveCollator, build_teacher
from nextflow_hf.training.shapes.text_tokenizer import train_text_tokenizer


@pytest.fixture(scope="module")
def captions() -> list[str]:
    rng = np.random.default_rng(0)
    return [sample_prompt(rng).text for _ in range(600)]


@pytest.fixture(scope="module")
def tokenizer(captions) -> PreTrainedTokenizerFast:
    return train_text_tokenizer(captions, 512)


def test_words_of_the_world_are_single_tokens(tokenizer, captions):
    assert len(tokenizer) == 512
    for caption in captions[:50]:
        assert len(tokenizer.tokenize(caption)) == len(caption.split())


@pytest.mark.parametrize(
    "text", ["a red circle", "Zürich 漢字 🙂\n\ttab", "<|im_start|>user\nhi<|im_end|>\n", "  two  spaces "]
)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_and_saving(tokenizer, tmp_path):
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    markers = "<|im_start|><|image_pad|><|im_end|>"
    assert len(tokenizer.tokenize(markers)) == 3
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(markers + " a red circle")["input_ids"] == tokenizer(markers + " a red circle")["input_ids"]
    assert loaded.model_max_length == 1024


def test_the_same_corpus_gives_the_same_ids(captions, tokenizer):
    assert train_text_tokenizer(captions, 512).get_vocab() == tokenizer.get_vocab()


def test_too_small_a_vocabulary_is_refused(captions):
    with pytest.raises(ValueError, match="vocab_size is 200, expected at least 260"):
        train_text_tokenizer(captions, 200)


def test_teacher_learns_from_what_its_collator_makes(tokenizer):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    data = CaptionedPictures(pictures, ["a red circle", "a ring", "two squares", "a blue diamond"])
    batch = ContrastiveCollator(tokenizer, patch_size=8)([data[index] for index in range(4)])
    # The patches are those that the vision tokenizer's own semantic encoder sees.
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(batch["pixel_values"], patchify(pixels, 8))
    model = build_teacher(tokenizer, patch_size=8, num_patches=4)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_pictures_and_captions_must_match():
    with pytest.raises(ValueError, match="got 2 pictures and 1 captions"):
        CaptionedPictures(np.zeros((2, 8, 8, 3), np.uint8), ["a circle"])
