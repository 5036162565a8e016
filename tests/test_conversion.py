"""A Qwen checkpoint becomes a NextFlow that says the same on text and can draw."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from toy import SQUARE, grids_tensor, image_tokens
from transformers import (
    AutoModelForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from nextflow_hf.conversion.from_qwen import (
    NEW_MODULES,
    config_from_qwen,
    convert_qwen,
    empty_model,
    from_qwen,
    read_checkpoint,
)
from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM


TEXT = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
MROPE = {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
WIDE_HEADS = {"head_dim": 16}  # four heads of 16 in a width of 32, as small Qwen3 have it

FAMILIES = {
    "qwen2.5-vl": (
        Qwen2_5_VLForConditionalGeneration,
        lambda: Qwen2_5_VLConfig(text_config=dict(MROPE), vision_config=dict(VISION), **IDS),
    ),
    "qwen2.5-vl, tied": (
        Qwen2_5_VLForConditionalGeneration,
        lambda: Qwen2_5_VLConfig(
            text_config=dict(MROPE), vision_config=dict(VISION), tie_word_embeddings=True, **IDS
        ),
    ),
    "qwen2-vl": (
        Qwen2VLForConditionalGeneration,
        lambda: Qwen2VLConfig(
            text_config=dict(MROPE),
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
            **IDS,
        ),
    ),
    "qwen2.5": (Qwen2ForCausalLM, lambda: Qwen2Config(**TEXT, rope_parameters=dict(ROPE))),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**TEXT, **WIDE_HEADS, rope_parameters=dict(ROPE))),
    "qwen3, tied": (
        Qwen3ForCausalLM,
        lambda: Qwen3Config(**TEXT, **WIDE_HEADS, rope_parameters=dict(ROPE), tie_word_embeddings=True),
    ),
    "qwen3-vl": (
        Qwen3VLForConditionalGeneration,
        lambda: Qwen3VLConfig(
            text_config={**TEXT, **WIDE_HEADS, "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}},
            vision_config={**VISION, "deepstack_visual_indexes": [0]},
            **IDS,
        ),
    ),
}  # fmt: skip


def save_source(family: str, folder):
    """A checkpoint of that family with random weights, none of them at a value that hides a mistake."""
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config()).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, save_source(request.param, folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    return folder, save_source("qwen2.5-vl", folder)


def overrides(qwen) -> dict:
    """Text models do not say which token is the placeholder."""
    return {} if hasattr(qwen.config, "image_token_id") else {"image_token_id": 90}


def test_text_logits_are_those_of_qwen(source):
    folder, qwen = source
    codebook = torch.randn(24, 40)
    model = from_qwen(folder, codebook, config_overrides=overrides(qwen))
    ids = torch.randint(90, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :100], qwen(input_ids=ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits[..., :100] for m in (model, qwen))
    torch.testing.assert_close(ours[1], theirs[1])
    torch.testing.assert_close(ours[0, 5:], theirs[0, 5:])
    assert torch.equal(model.model.image_codebook.weight, codebook)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    # The placeholder is no text: ours never writes it, so theirs must not either.
    generated = [m.generate(ids[:1], max_new_tokens=8, do_sample=False, suppress_tokens=[90]) for m in (model, qwen)]
    assert torch.equal(*generated)


def test_a_converted_model_is_saved_and_loaded_as_any_other(source, tmp_path):
    folder, qwen = source
    model = from_qwen(folder, codebook_size=24, config_overrides=overrides(qwen))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is NextFlowForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_both_layouts_of_names_are_read(checkpoint, tmp_path):
    """Files have the released names, `model.` and `visual.`; the model in memory has `model.language_model.`."""
    folder, qwen = checkpoint
    assert {"model.norm.weight", "visual.patch_embed.proj.weight", "lm_head.weight"} <= read_checkpoint(folder).keys()
    shutil.copy(folder / "config.json", tmp_path)
    assert "model.language_model.norm.weight" in qwen.state_dict()
    save_file(qwen.state_dict(), tmp_path / "model.safetensors")
    one, two = (from_qwen(each, codebook_size=24) for each in (folder, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# config.json as the released repositories have it: written by transformers 4, with rope in two fields, Qwen2.5-VL's
# language model beside its vision model and not in a `text_config`.
FLAT = {"rope_theta": 10000.0, "sliding_window": 32768, "use_sliding_window": False, "torch_dtype": "float32"}
OLD_CONFIGS = {
    "qwen2.5-vl": {
        **TEXT, **FLAT, **IDS, "rms_norm_eps": 1e-5, "max_window_layers": 3, "vision_config": VISION,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "tie_word_embeddings": False,
    },
    "qwen2.5": {**TEXT, **FLAT, "max_window_layers": 3, "tie_word_embeddings": False},
    "qwen3, tied": {
        **TEXT, **FLAT, **WIDE_HEADS, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": True,
    },
    "qwen3-vl": {
        **IDS, "vision_config": {**VISION, "deepstack_visual_indexes": [0]}, "tie_word_embeddings": False,
        "text_config": {
            **TEXT, **WIDE_HEADS, "rope_theta": 10000.0, "model_type": "qwen3_vl_text", "dtype": "float32",
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        },
    },
}  # fmt: skip
OLD_CONFIGS["qwen2.5-vl, tied"] = {**OLD_CONFIGS["qwen2.5-vl"], "tie_word_embeddings": True}


@pytest.mark.parametrize("family", OLD_CONFIGS)
def test_configs_of_the_released_repositories_are_read(family: str, tmp_path):
    qwen = save_source(family, tmp_path)
    settings = overrides(qwen)
    expected = from_qwen(tmp_path, codebook_size=24, config_overrides=settings)
    old = {**OLD_CONFIGS[family], "model_type": qwen.config.model_type, "architectures": [type(qwen).__name__]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    model = from_qwen(tmp_path, codebook_size=24, config_overrides=settings)
    ours, theirs = (each.config.to_dict() for each in (model, expected))
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}  # where the file has none, the class has a default
    assert {name for name in theirs if ours[name] != theirs[name]} <= tokens
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_weights_stay_in_the_files(checkpoint, tmp_path):
    """No copy of the layers is made: their memory is the files', and is copied where it is written to."""
    folder, _ = checkpoint
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = from_qwen(tmp_path, codebook_size=24)
    kept = [value for name, value in model.named_parameters() if name.startswith(("model.layers.", "model.norm."))]
    ranges = mapped(tmp_path)
    assert ranges and all(any(low <= value.data_ptr() < high for low, high in ranges) for value in kept)
    assert not any(low <= model.lm_head.weight.data_ptr() < high for low, high in ranges)
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert from_qwen(tmp_path, codebook_size=24).model.layers[0].mlp.up_proj.weight.std() > 0


def mapped(folder) -> list[tuple[int, int]]:
    """Addresses at which files of the folder are mapped."""
    with open("/proc/self/maps") as lines:
        ranges = [line.split()[0].split("-") for line in lines if str(folder) in line]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


def test_new_rows_look_like_text_rows(checkpoint):
    folder, qwen = checkpoint
    model = from_qwen(folder, codebook_size=4000)
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        torch.testing.assert_close(table[100:].mean(0), table[:100].mean(0), atol=1e-2, rtol=0)
        torch.testing.assert_close(table[100:].std(0), table[:100].std(0), atol=1e-2, rtol=0)
    again, other = (from_qwen(folder, codebook_size=4000, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    std = model.model.scale_embedding.weight.std()
    torch.testing.assert_close(std, torch.tensor(model.model.scale_embedding_std), atol=0.01, rtol=0)
    weights = {name: value for name, value in model.named_parameters() if name.startswith("model.connector.linear")}
    assert all((value == 0).all() if "bias" in name else value.std() > 0.01 for name, value in weights.items())


def test_dtype_is_that_of_the_files_or_the_one_asked_for(checkpoint):
    folder, _ = checkpoint
    assert {p.dtype for p in from_qwen(folder, codebook_size=24).parameters()} == {torch.float32}
    for dtype in ("bfloat16", torch.bfloat16):
        assert {p.dtype for p in from_qwen(folder, codebook_size=24, dtype=dtype).parameters()} == {torch.bfloat16}


def test_bfloat16_files_stay_bfloat16_and_where_they_are(tmp_path):
    qwen = save_source("qwen2.5-vl, tied", tmp_path).bfloat16()
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    qwen.save_pretrained(tmp_path, max_shard_size="10KB")
    model, ranges = from_qwen(tmp_path, codebook_size=24), mapped(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.dtype}
    layers = [value for name, value in model.named_parameters() if name.startswith("model.layers.")]
    assert all(any(low <= value.data_ptr() < high for low, high in ranges) for value in layers)
    ids, qwen = torch.randint(90, (1, 9)), type(qwen).from_pretrained(tmp_path)  # with its frequencies in float32
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :100], qwen(input_ids=ids).logits)


def test_the_converted_model_draws(source):
    folder, qwen = source
    settings = {"max_scales": 5, **overrides(qwen)}
    model = from_qwen(folder, codebook_size=24, config_overrides=settings)
    drawn = model.generate_images(
        torch.tensor([[5, 6, model.config.boi_token_id]]), image_grids=grids_tensor(SQUARE), temperature=0.0
    )
    assert len(drawn.image_codes) == len(image_tokens(SQUARE)) - 1


# ---- The released sizes ----

# hidden, intermediate, layers, heads, key-value heads, text rows, tied, billions of text parameters
RELEASED = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3.09),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 7.62),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 32.76),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 72.71),
}


@pytest.mark.parametrize("size", RELEASED)
def test_every_name_of_the_released_sizes_has_its_place(size: str):
    hidden, intermediate, layers, heads, kv_heads, rows, tied, billions = RELEASED[size]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": rows, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 1},
        tie_word_embeddings=tied, image_token_id=151655,
    )  # fmt: skip
    with torch.device("meta"):
        qwen = Qwen2_5_VLForConditionalGeneration(config)
    stored = {name: value for name, value in qwen.state_dict().items() if not (tied and name == "lm_head.weight")}
    text = {name: value for name, value in stored.items() if ".visual." not in name}
    assert sum(value.numel() for value in text.values()) / 1e9 == pytest.approx(billions, abs=0.01)

    model = empty_model(config_from_qwen(config, codebook_size=32768))
    converted = convert_qwen(stored, model, tied=tied)  # raises where a name or a shape is off
    assert len(converted) == len(text) + tied
    assert converted.keys() == {name for name in model.state_dict() if not name.startswith(NEW_MODULES)}
    assert model.config.head_dim == 128 and model.config.rope_parameters["mrope_section"] == [24, 20, 20]
    assert model.lm_head.weight.shape == (rows + 32768 + 2, hidden)


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
    converted, default = config_from_qwen(config, codebook_size=32768).to_dict(), NextFlowConfig().to_dict()
    assert {name for name in default if converted[name] != default[name]} <= {"bos_token_id", "rms_norm_eps"}


def test_text_models_get_qwens_own_placeholder():
    config = Qwen3Config(**{**TEXT, "vocab_size": 151936}, head_dim=16, rope_parameters=dict(ROPE))
    converted = config_from_qwen(config, codebook_size=24)
    assert (converted.image_token_id, converted.eos_token_id, converted.pad_token_id) == (151655, 151645, 151643)
    assert converted.qk_norm and converted.head_dim == 16


# ---- What is refused ----


def test_what_does_not_fit_is_refused(checkpoint):
    folder, _ = checkpoint
    with pytest.raises(ValueError, match="24 wide, expected semantic \\+ pixel code dim = 40"):
        from_qwen(folder, torch.randn(10, 24))
    with pytest.raises(ValueError, match="codebook_size is 5, the codebook has 10 rows"):
        from_qwen(folder, torch.randn(10, 40), codebook_size=5)
    with pytest.raises(ValueError, match="pass the vision tokenizer's codebook, or codebook_size"):
        from_qwen(folder)


def test_other_models_are_refused_by_name():
    with pytest.raises(ValueError, match="model_type is 'qwen3_moe', expected one of qwen2, qwen2_vl, qwen2_5_vl"):
        config_from_qwen(Qwen3MoeConfig(), codebook_size=24)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    with pytest.raises(ValueError, match="rope_type is 'yarn', expected 'default'"):
        config_from_qwen(Qwen2Config(**TEXT, rope_parameters=yarn), codebook_size=24)
    with pytest.raises(ValueError, match="use_sliding_window must be False"):
        config_from_qwen(Qwen3Config(**TEXT, use_sliding_window=True), codebook_size=24)
    with pytest.raises(ValueError, match=r"the checkpoint is quantised \(fp8\): name the one in bfloat16"):
        config_from_qwen(Qwen3Config(**TEXT, quantization_config={"quant_method": "fp8"}), codebook_size=24)
    with pytest.raises(ValueError, match="no image_token_id, and Qwen's own, 151655, is beyond its vocabulary of 100"):
        config_from_qwen(Qwen2Config(**TEXT), codebook_size=24)


def test_incomplete_checkpoints_are_refused_with_what_is_missing(checkpoint, tmp_path):
    folder, _ = checkpoint
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    lost = index["weight_map"]["model.norm.weight"]
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of .* files of weights: .'{lost}'"):
        from_qwen(tmp_path, codebook_size=24)
    with pytest.raises(FileNotFoundError, match="lacks 1 of 1 files of weights: .'model.safetensors'"):
        read_checkpoint(tmp_path / "..")

    state = read_checkpoint(folder)
    model = empty_model(config_from_qwen(FAMILIES["qwen2.5-vl"][1](), codebook_size=24))
    norm = state.pop("model.norm.weight")
    with pytest.raises(ValueError, match="1 tensors are missing: model.norm.weight$"):
        convert_qwen(state, model, tied=False)
    with pytest.raises(ValueError, match="1 tensors have no place: model.norms.weight$"):
        convert_qwen({**state, "model.norm.weight": norm, "model.norms.weight": norm}, model, tied=False)
    with pytest.raises(ValueError, match=r"have another shape: model.norm.weight \(31,\) \(expected \(32,\)\)$"):
        convert_qwen({**state, "model.norm.weight": norm[:-1]}, model, tied=False)
