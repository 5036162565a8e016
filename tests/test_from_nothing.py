"""`nextflow-hf train text_tokenizer` and `teacher`: what a model from nothing needs beside itself."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nextflow_hf import NextFlowForCausalLM, cli
from nextflow_hf.modeling_nextflow.vit_nextflow import patchify
from nextflow_hf.processing import NextFlowProcessor
from nextflow_hf.processing.image_processing_nextflow import NextFlowImageProcessor
from nextflow_hf.training.data.text_tokenizer import train_text_tokenizer
from nextflow_hf.training.vision_tokenizer.teacher import ContrastiveCollator, TeacherArguments, build_teacher


@pytest.fixture(scope="module")
def captions() -> list[str]:
    words = [*("a", "two", "three"), *("red", "blue", "green"), *("circles", "squares", "rings")]
    return [" ".join(part) for part in itertools.product(words[:3], words[3:6], words[6:])]


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
    with pytest.raises(ValueError, match="vocab_size is 200, expected at least 263"):
        train_text_tokenizer(captions, 200)
    assert len(train_text_tokenizer(captions, 263)) == 263


def test_teacher_learns_from_what_its_collator_makes(tokenizer):
    processor = NextFlowImageProcessor(**SCHEDULE)
    sizes = [(64, 64), (32, 64), (64, 64), (64, 64)]
    items = [{"image": noise(index, size), "caption": word} for index, (size, word) in enumerate(zip(sizes, "abc "))]
    items[3]["caption"] = ""  # has nothing to be contrasted with
    batch = ContrastiveCollator(tokenizer, processor)(items)
    assert batch["input_ids"].shape == (3, 32) and len(batch["pixel_values"]) == 3
    # The patches are those that the vision tokenizer's own semantic encoder sees.
    for index, shape in enumerate(batch["spatial_shapes"].tolist()):
        pixels = processor(items[index]["image"], return_tensors="pt")["pixel_values"]
        own = batch["pixel_values"][index][batch["pixel_attention_mask"][index].bool()]
        torch.testing.assert_close(own, patchify(pixels, 8)[0])
        assert len(own) == shape[0] * shape[1]
    with pytest.raises(ValueError, match="num_eval is -1, expected at least 0"):
        TeacherArguments(data="", text_tokenizer_name_or_path="", num_eval=-1)
    model = build_teacher(TeacherArguments(data="", text_tokenizer_name_or_path=""), tokenizer, processor)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no image of the batch has a caption"):
        ContrastiveCollator(tokenizer, processor)(items[3:])


SCHEDULE = {"resolution": 64, "scale_bases": [1, 2, 4, 8], "patch_size": 8, "bucket_area": 64}


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_from_captioned_images_to_a_transformer(tmp_path, monkeypatch):
    """Text tokenizer, teacher, vision tokenizer, processor, codes and transformer: all from nothing, by commands."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for index in range(12):
        noise(index, (64, 64)).save(f"photos/{index}.png")
        Path(f"photos/{index}.txt").write_text(f"a red circle {index}")
    source = {"path": "photos", "format": "captioned_folder", "task": "text_to_image", "inversion_rate": 0}
    Path("data.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    quick = ["max_steps=2", "use_cpu=true", "report_to=none", "save_steps=1", "logging_steps=1", "warmup_steps=0"]
    assert cli.main(["train", "text_tokenizer", "small", "data=data.yaml", "output_dir=text"]) == 0
    assert len(AutoTokenizer.from_pretrained("text")) == 512
    teacher = ["data=data.yaml", "text_tokenizer_name_or_path=text", "num_eval=4", "output_dir=teacher"]
    teacher = ["train", "teacher", "small", *teacher, "per_device_train_batch_size=4", *quick]
    assert cli.main(teacher) == 0
    assert 0 <= json.loads(Path("teacher/eval_results.json").read_text())["eval_accuracy"] <= 1
    weights = Path("teacher/model.safetensors").read_bytes()
    Path("teacher/trainer_state.json").unlink()
    shutil.rmtree("teacher/checkpoint-2")
    assert cli.main(teacher) == 0  # goes on with the second step
    assert Path("teacher/model.safetensors").read_bytes() == weights
    tokenizer = {
        "data": "data.yaml", "semantic_teacher": "teacher", "stage": "joint", "image_processor": SCHEDULE,
        "config_overrides": {
            "codebook_size": 32, "semantic_code_dim": 8, "pixel_code_dim": 8, "semantic_decoder_layers": 1,
            "latent_channels": 16, "encoder_channels": 8, "encoder_res_blocks": 0, "decoder_channels": 8,
            "decoder_res_blocks": 0, "channel_multipliers": [1, 1, 1, 1], "norm_num_groups": 0,
        },
        "merge_codes": 24, "output_dir": "vision",
    }  # fmt: skip
    Path("tokenizer.yaml").write_text(yaml.safe_dump(tokenizer))
    assert cli.main(["train", "tokenizer", "tokenizer.yaml", "per_device_train_batch_size=4", *quick]) == 0
    both = ["vision_tokenizer_name_or_path=vision", "output_dir=processor"]
    assert cli.main(["train", "text_tokenizer", "small", "data=data.yaml", *both]) == 0
    processor = NextFlowProcessor.from_pretrained("processor")
    assert len(processor.tokenizer) == 512 + 24 + 2 and processor.image_processor.resolution == 64
    assert yaml.safe_load(Path("processor/run.yaml").read_text())["kind"] == "text_tokenizer"
    assert (
        cli.main(["extract", "data.yaml", "processor=processor", "vision_tokenizer=vision", "output_dir=codes"]) == 0
    )
    transformer = {
        "processor_name_or_path": "processor", "vision_tokenizer_name_or_path": "vision", "train_codes": ["codes"],
        "config_overrides": {
            "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
        },
        "output_dir": "transformer",
    }  # fmt: skip
    Path("transformer.yaml").write_text(yaml.safe_dump(transformer))
    assert cli.main(["train", "transformer", "transformer.yaml", *quick]) == 0
    assert NextFlowForCausalLM.from_pretrained("transformer").config.codebook_size == 24
