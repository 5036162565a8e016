"""A Qwen2.5-VL checkpoint becomes a NextFlow that says the same on text and can draw."""

import pytest
import torch
from toy import SQUARE, grids_tensor, image_tokens
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.conversion_nextflow import config_from_qwen2_5_vl, from_qwen2_5_vl
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder)
    return folder, model


def test_text_logits_are_those_of_qwen(checkpoint):
    folder, qwen = checkpoint
    codebook = torch.randn(24, 40)
    model = NextFlowForCausalLM.from_qwen2_5_vl(folder, codebook)
    ids = torch.randint(90, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :100], qwen(input_ids=ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits[..., :100] for m in (model, qwen))
    torch.testing.assert_close(ours[1], theirs[1])
    torch.testing.assert_close(ours[0, 5:], theirs[0, 5:])
    assert torch.equal(model.model.image_codebook.weight, codebook)
    generated = [m.generate(ids[:1], max_new_tokens=8, do_sample=False) for m in (model, qwen)]
    assert torch.equal(*generated)


def test_new_rows_look_like_text_rows(checkpoint):
    folder, qwen = checkpoint
    model = from_qwen2_5_vl(folder, codebook_size=4000)
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        torch.testing.assert_close(table[100:].mean(0), table[:100].mean(0), atol=5e-3, rtol=0)
        torch.testing.assert_close(table[100:].std(0), table[:100].std(0), atol=5e-3, rtol=0)
    again = from_qwen2_5_vl(folder, codebook_size=4000)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_the_converted_model_draws(checkpoint):
    folder, _ = checkpoint
    model = from_qwen2_5_vl(folder, codebook_size=24, config_overrides={"max_scales": 5})
    drawn = model.generate_images(
        torch.tensor([[5, 6, model.config.boi_token_id]]), image_grids=grids_tensor(SQUARE), temperature=0.0
    )
    assert len(drawn.image_codes) == len(image_tokens(SQUARE)) - 1


def test_the_7b_checkpoint_gives_the_default_config():
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000,
            "eos_token_id": 151645, "pad_token_id": 151643,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        image_token_id=151655,
    )  # fmt: skip
    converted, default = config_from_qwen2_5_vl(config, codebook_size=32768).to_dict(), NextFlowConfig().to_dict()
    assert {name for name in default if converted[name] != default[name]} <= {"bos_token_id", "rms_norm_eps"}


def test_what_does_not_fit_is_refused(checkpoint):
    folder, _ = checkpoint
    with pytest.raises(ValueError, match="24 wide, expected semantic \\+ pixel code dim = 40"):
        from_qwen2_5_vl(folder, torch.randn(10, 24))
    with pytest.raises(ValueError, match="codebook_size is 5, the codebook has 10 rows"):
        from_qwen2_5_vl(folder, torch.randn(10, 40), codebook_size=5)
    with pytest.raises(ValueError, match="pass the vision tokenizer's codebook, or codebook_size"):
        from_qwen2_5_vl(folder)
