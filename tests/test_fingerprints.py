"""Codes of one vision tokenizer never meet another model's, and tokens have one layout: refused where parts meet."""

import copy
import logging

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from toy import toy_config
from toy_decoder import toy_decoder_pipeline
from toy_pipeline import toy_pipeline, toy_processor, toy_vision_tokenizer
from transformers import BitsAndBytesConfig

from nextflow_hf import NextFlowForConditionalGeneration, NextFlowPipeline, NextFlowVisionTokenizer
from nextflow_hf.hub_cards import shapes_model_path


def other_tokenizer() -> NextFlowVisionTokenizer:
    """Of the same sizes; its config says what it was saved with, which is not what it holds."""
    torch.manual_seed(2)
    config = toy_vision_tokenizer().config
    config.codes_fingerprint = toy_vision_tokenizer().get_codes_fingerprint()
    return NextFlowVisionTokenizer(config).eval()


@pytest.fixture
def parts() -> dict:
    pipe = toy_pipeline()
    pipe.transformer.config.vision_tokenizer_fingerprint = pipe.vision_tokenizer.get_codes_fingerprint()
    return {name: part for name, part in pipe.components.items() if part is not None}


REFUSED = "the transformer knows the codes of the vision tokenizer .*, got .*: use the tokenizer that it was trained"


def test_a_pipeline_of_other_codes_is_not_put_together(parts, tmp_path):
    NextFlowPipeline(**parts).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=REFUSED):
        NextFlowPipeline(**{**parts, "vision_tokenizer": other_tokenizer()})
    pipe = NextFlowPipeline.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=REFUSED):
        pipe.register_modules(vision_tokenizer=other_tokenizer())
    # From files, by every loader, in half precision as well
    other_tokenizer().save_pretrained(tmp_path / "whole" / "vision_tokenizer")
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}):
        for loader in (NextFlowPipeline, DiffusionPipeline):
            with pytest.raises(ValueError, match=REFUSED):
                loader.from_pretrained(tmp_path / "whole", **options)


def test_a_component_that_is_replaced_is_checked_by_the_next_call(parts):
    pipe = NextFlowPipeline(**parts)
    pipe.vision_tokenizer = other_tokenizer()
    conversation = pipe.start_conversation()
    for call in (
        lambda: pipe("a"),
        lambda: pipe.chat([{"role": "user", "content": "a"}]),
        lambda: conversation.chat("a"),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    pipe.vision_tokenizer = parts["vision_tokenizer"]
    pipe("a", output_type="codes")


def test_a_composite_of_other_codes_is_not_loaded(parts, tmp_path):
    parts["transformer"].save_pretrained(tmp_path)
    other_tokenizer().save_pretrained(tmp_path / "vision_tokenizer")
    with pytest.raises(ValueError, match=REFUSED):
        NextFlowForConditionalGeneration.from_pretrained(tmp_path)
    parts["vision_tokenizer"].save_pretrained(tmp_path / "vision_tokenizer")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = NextFlowForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    NextFlowForConditionalGeneration.from_pretrained(tmp_path / "again")


def test_a_diffusion_decoder_of_other_codes_is_refused(parts):
    standalone = toy_decoder_pipeline("unet")
    decoder = standalone.diffusion_decoder
    decoder.register_to_config(vision_tokenizer_fingerprint=other_tokenizer().get_codes_fingerprint())
    refused = pytest.raises(ValueError, match="the diffusion decoder knows the codes of the vision tokenizer")
    with refused:
        type(standalone)(**standalone.components)
    with refused:
        NextFlowPipeline(**parts, diffusion_decoder=decoder, decoder_scheduler=standalone.scheduler)


def test_precision_place_and_decoders_do_not_change_it(tmp_path):
    tokenizer = toy_vision_tokenizer()
    expected = tokenizer.get_codes_fingerprint()
    assert len(expected) == 16 and toy_vision_tokenizer().bfloat16().get_codes_fingerprint() == expected
    with torch.no_grad():
        tokenizer.pixel_decoder.conv_out.weight.add_(1)
    tokenizer.save_pretrained(tmp_path)
    for options in (
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    ):
        loaded = NextFlowVisionTokenizer.from_pretrained(tmp_path, **options)
        assert loaded.get_codes_fingerprint() == expected
    loaded = NextFlowVisionTokenizer.from_pretrained(tmp_path)
    cpu_offload(loaded, torch.device("cpu"))
    assert loaded.parameters().__next__().is_meta and loaded.get_codes_fingerprint() == expected
    with torch.device("meta"):
        assert NextFlowVisionTokenizer(toy_vision_tokenizer().config).get_codes_fingerprint() is None
    assert toy_vision_tokenizer().half().get_codes_fingerprint() is None  # what it was saved as is not known


def test_what_may_change_the_codes_forgets_it(tmp_path):
    tokenizer, other = toy_vision_tokenizer(), other_tokenizer()
    first, second = tokenizer.get_codes_fingerprint(), other.get_codes_fingerprint()
    assert first != second
    copy.deepcopy(tokenizer).load_state_dict(other.state_dict())
    assert tokenizer.get_codes_fingerprint() == first
    tokenizer.load_state_dict(other.state_dict())
    assert tokenizer.get_codes_fingerprint() == second
    # A step of training
    tokenizer.save_pretrained(tmp_path)
    tokenizer = NextFlowVisionTokenizer.from_pretrained(tmp_path).train()
    grids = torch.tensor([[[1, 1], [2, 2], [3, 3], [4, 4]]])
    tokenizer(torch.zeros(1, 3, 16, 16), grids).loss.backward()
    with torch.no_grad():
        tokenizer.quantizer.pixel_codebook.weight.add_(1)
    third = tokenizer.get_codes_fingerprint()
    tokenizer.save_pretrained(tmp_path)
    assert third != second and NextFlowVisionTokenizer.from_pretrained(tmp_path).config.codes_fingerprint == third


def test_it_is_computed_once(monkeypatch):
    tokenizer, counts = toy_vision_tokenizer(), []
    state_dict = NextFlowVisionTokenizer.state_dict
    monkeypatch.setattr(
        NextFlowVisionTokenizer, "state_dict", lambda self, **kwargs: counts.append(1) or state_dict(self, **kwargs)
    )
    for _ in range(3):
        tokenizer.get_codes_fingerprint()
    assert len(counts) == 1


def test_a_model_without_one_loads_with_one_warning_at_most(parts, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    parts["vision_tokenizer"].half()
    parts["vision_tokenizer"]._codes_fingerprint = None
    NextFlowPipeline(**parts)
    assert sum("does not say whose codes it gives" in record.message for record in caplog.records) <= 1
    caplog.clear()
    parts["transformer"].config.vision_tokenizer_fingerprint = None
    NextFlowPipeline(**parts)
    assert not [record for record in caplog.records if "codes" in record.message]


def test_the_shipped_model_says_whose_codes_it_knows():
    pipe = NextFlowPipeline.from_pretrained(shapes_model_path())
    expected = pipe.transformer.config.vision_tokenizer_fingerprint
    assert pipe.diffusion_decoder.config.vision_tokenizer_fingerprint == expected
    assert pipe.vision_tokenizer.config.codes_fingerprint == expected
    pipe.vision_tokenizer._codes_fingerprint = None
    assert pipe.vision_tokenizer.get_codes_fingerprint() == expected


# ---- the vocabulary


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_vocab_size": 39}, "boi_token_id and eoi_token_id are"),
        ({"eoi_token_id": 70, "vocab_size": 80}, "boi_token_id and eoi_token_id are"),
        ({"boi_token_id": 5}, "boi_token_id and eoi_token_id are"),
        ({"codebook_size": 23}, "boi_token_id and eoi_token_id are"),
        ({"vocab_size": 65}, "vocab_size is 65"),
        ({"image_token_id": 40}, "image_token_id is 40"),
        ({"image_token_id": 66}, "image_token_id is 66"),
        ({"image_token_id": -1}, "image_token_id is -1"),
    ],
)
def test_a_layout_with_other_places_is_no_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        toy_config(**changes)


def test_added_tokens_come_last():
    assert toy_config(vocab_size=70, image_token_id=66).image_vocabulary == slice(40, 66)


def test_tokens_of_another_layout_do_not_meet_the_transformer(parts):
    config = parts["transformer"].config
    for name, value, message in (
        ("codebook_size", 23, "the vision tokenizer has 24 codes, the transformer 23"),
        ("boi_token_id", 323, "the processor's tokens are"),
        ("eoi_token_id", 324, "the processor's tokens are"),
        ("image_token_id", 7, "the processor's tokens are"),
        ("vocab_size", 300, "the tokenizer has 326 tokens, the transformer 300"),
        ("max_scales", 3, "images have up to 4 scales, the transformer's 3"),
    ):
        right = getattr(config, name)
        setattr(config, name, value)
        with pytest.raises(ValueError, match=message):
            NextFlowPipeline(**parts)
        setattr(config, name, right)
    processor = toy_processor()
    processor.tokenizer.add_tokens([f"<new_{index}>" for index in range(3)])
    with pytest.raises(ValueError, match="has 329 tokens, the transformer 326: resize its embeddings"):
        NextFlowPipeline(**{**parts, "processor": processor})
