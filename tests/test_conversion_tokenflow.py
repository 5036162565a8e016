"""A TokenFlow checkpoint becomes a tokenizer with its codes, its pictures and its features."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenflow_reference import CODES, Reference, tiny_checkpoint

from nextflow_hf.conversion.from_tokenflow import (
    KEYS,
    _pattern,
    config_from_tokenflow,
    convert_tokenflow,
    empty_tokenizer,
    from_tokenflow,
    load_tokenflow,
    target_names,
)
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer


KEY_LISTS = Path(__file__).parent / "data" / "tokenflow_keys.json"

# image size, scales, cells a side of the position tables in the checkpoint, decoder
CASES = {
    "clip": ("clip", 12, (1, 2, 3), 3, {}),
    "clip-interpolated": ("clip", 16, (1, 2, 3, 4), 3, {}),
    "clip-enhanced": ("clip", 12, (1, 2, 3), 3, {"decoder_channels": 256, "decoder_blocks": 2}),
    # Fewer than four channels a group, and a decoder whose levels are not the encoder's
    "clip-narrow": ("clip", 12, (1, 2, 3), 3, {"channels": 64, "decoder_channels": 64, "decoder_levels": (1, 2, 3)}),
    "siglip": ("siglip", 17, (1, 2, 3, 4, 5), 5, {}),  # 5 patches of 3 pixels, and 2 pixels that no patch sees
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    encoder, size, sides, cells, decoder = CASES[request.param]
    state = tiny_checkpoint(encoder, cells=cells, **decoder)
    path = tmp_path_factory.mktemp("tokenflow") / "checkpoint.pt"
    torch.save({"model": state, "optimizer": {}, "steps": 3, "args": argparse.Namespace(lr=1e-4)}, path)
    model = from_tokenflow(path, image_size=size, config_overrides={"scale_sides": sides})
    return model, Reference(state, sides=sides, pixels=size), size


def pictures(size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@torch.no_grad()
def test_same_features_codes_and_pictures(case):
    model, reference, size = case
    images = pictures(size)
    image_grids = model.get_image_grids(2)
    codes = model.encode(images, image_grids).image_codes.view(2, -1)
    decoded = model.decode(codes.flatten(), image_grids)
    features = model.decode_features(codes.flatten(), image_grids).semantic_features
    for index, image in enumerate(images):
        expected = reference.features(image[None])
        torch.testing.assert_close(model._encode_features(image[None]).double(), expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(codes[index], reference.encode(image[None]))
        semantic, picture = reference.decode(codes[index])
        torch.testing.assert_close(decoded[index].double(), picture[0].clamp(-1, 1), atol=1e-5, rtol=0)
        torch.testing.assert_close(features[index].flatten(1).T.double(), semantic, atol=1e-5, rtol=1e-5)
    assert len(codes.unique()) > CODES / 4 and decoded.std() > 0.1  # not trivially alike


@torch.no_grad()
def test_same_previews(case):
    model, reference, size = case
    image_grids = model.get_image_grids()
    codes = model.encode(pictures(size, 1), image_grids).image_codes
    preview = model.decode(codes, image_grids, num_scales=2)
    _, picture = reference.decode(codes[: 1 + reference.sides[1] ** 2])
    torch.testing.assert_close(preview.double(), picture.clamp(-1, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_siglip_sees_clamped_pixels_and_its_pixel_branch_does_not():
    state = tiny_checkpoint("siglip", cells=5)
    model = NextFlowVisionTokenizer(config_from_tokenflow(_flat(state), image_size=17, scale_sides=(1, 5)))
    model.load_state_dict(convert_tokenflow(_flat(state), model))
    bright = 3 * pictures(17, 1)
    expected = Reference(state, sides=(1, 5), pixels=17).features(bright)
    torch.testing.assert_close(model._encode_features(bright).double(), expected, atol=5e-5, rtol=1e-5)


def test_it_is_an_ordinary_tokenizer_afterwards(case, tmp_path):
    model, _, size = case
    model.save_pretrained(tmp_path)
    loaded, info = NextFlowVisionTokenizer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.scale_sides == list(model.config.scale_sides)
    image_grids = loaded.get_image_grids()
    codes = [each.encode(pictures(size, 1), image_grids).image_codes for each in (model, loaded)]
    assert torch.equal(*codes)
    assert torch.equal(model.decode(codes[0], image_grids), loaded.decode(codes[0], image_grids))
    # and it trains: every parameter gets a gradient
    targets = torch.randn(1, image_grids[0, -1].prod(), model.config.semantic_feature_size)
    loaded.train()(
        pictures(size, 1), image_grids, semantic_targets=targets, drop_scales=[False] * image_grids.shape[1]
    ).loss.backward()
    # Attention does not see a bias on the keys.
    silent = {name for name, p in loaded.named_parameters() if p.grad is None or (p.grad.abs() < 1e-7).all()}
    assert all("k_proj.bias" in name for name in silent), silent


def test_groups_that_do_not_divide_the_channels_are_refused():
    """TokenFlow's norms have 32 groups at every level: no narrower tokenizer is made up for the weights."""
    state = _flat(tiny_checkpoint("clip", cells=3, channels=48))
    with pytest.raises(ValueError, match="a CNN level has 48 channels, expected a multiple of its 32 norm groups"):
        empty_tokenizer(config_from_tokenflow(state, image_size=12, scale_sides=(1, 2, 3)))


def test_encoder_and_decoder_have_as_many_levels():
    config = config_from_tokenflow(_flat(tiny_checkpoint("clip", cells=3)), image_size=12, scale_sides=(1, 2, 3))
    config.decoder_channel_multipliers = [1, 2]
    with pytest.raises(ValueError, match="decoder_channel_multipliers has 2 levels, expected the encoder's 3"):
        empty_tokenizer(config)


def test_other_sizes_are_refused(case):
    model, _, size = case
    side = model.config.scale_sides[-1]
    with pytest.raises(ValueError, match=rf"last grid is \(7, 7\), expected \({side}, {side}\)"):
        model.encode(torch.zeros(1, 3, 28, 28), torch.tensor([[[1, 1], [7, 7]]]))
    with pytest.raises(ValueError, match=rf"\(1, 3, 9, 9\), expected \(1, 3, {size}, {size}\)"):
        model.encode(torch.zeros(1, 3, 9, 9), model.get_image_grids())


# ---- The released checkpoints' names and shapes ----

RELEASED = {
    "clipb_224": (224, 14, 561, 42.45),
    "clipb_224_enhanced": (256, 16, 817, 237.1),
    "siglip_384": (384, 27, 2227, 42.45),
}


@pytest.mark.parametrize("variant", RELEASED)
def test_every_released_key_has_one_place(variant: str):
    size, side, tokens, decoder_millions = RELEASED[variant]
    keys = released_keys(variant)
    state = _flat({name: torch.empty(shape, device="meta") for name, shape in keys.items()})
    config = config_from_tokenflow(state, image_size=size)
    with torch.device("meta"):
        model = NextFlowVisionTokenizer(config)
    converted = convert_tokenflow(state, model)  # raises where a name or a shape is off
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }

    assert len(keys) == {"clipb_224": 550, "clipb_224_enhanced": 650, "siglip_384": 848}[variant]
    # one to one: no two of theirs have one place, and what has no place is known
    targets = [target for name in state for target in target_names(name, config)]
    assert len(targets) == len(set(targets))
    left = {name for name in state if not target_names(name, config)}
    assert set(targets) <= set(converted)
    if variant == "siglip_384":
        parts = ("encoder_vqkd.encoder.layers.26.", "encoder_vqkd.post_layernorm.", "encoder_vqkd.head.")
        unused = {name for name in state if name.startswith(("scaling_layer.", *parts))}
    else:
        unused = {"encoder_vqkd.proj"}
    assert left == unused | {"quantize.codebook_used"}
    # what is not theirs is zero: biases of keys, and of CLIP's patches
    added = {name for name in converted if name not in targets}
    assert all(name.endswith(("k_proj.bias", "patch_embedding.bias")) for name in added), added

    grids = model.get_image_grids()
    assert grids[0, -1].tolist() == [side, side] and int(grids[0].prod(-1).sum()) == tokens
    assert round(sum(p.numel() for p in model.pixel_decoder.parameters()) / 1e6, 2) == pytest.approx(
        decoder_millions, abs=0.05
    )
    assert config.semantic_config.num_attention_heads == (16 if variant == "siglip_384" else 12)
    assert config.semantic_decoder_config.num_attention_heads == 12


@pytest.mark.parametrize("variant", ["clipb_224", "clipb_224_enhanced"])
def test_clips_projection_may_be_there_or_not(variant: str):
    """Their training code has dropped it from the encoder, which does not use it; the lists above have it."""
    state = {name: torch.empty(shape, device="meta") for name, shape in released_keys(variant).items()}
    without = {name: value for name, value in state.items() if name != "encoder_vqkd.proj"}
    assert len(without) == len(state) - 1
    config = config_from_tokenflow(without)
    assert config.to_dict() == config_from_tokenflow(state).to_dict()
    assert convert_tokenflow(without, empty_tokenizer(config)).keys() == empty_tokenizer(config).state_dict().keys()


def test_every_row_of_the_table_is_used():
    names = [name for variant in RELEASED for name in _flat(released_keys(variant))]
    used = {next((row for row in KEYS if _pattern(row).fullmatch(name)), None) for name in names}
    assert set(KEYS) <= used


def test_vitamin_is_refused_by_name():
    state = {name: torch.empty(shape, device="meta") for name, shape in released_keys("clipb_224").items()}
    state = {name: value for name, value in state.items() if not name.startswith("encoder_vqkd")}
    state["encoder_vqkd.stem.conv1.weight"] = torch.empty(3, 3, device="meta")
    with pytest.raises(ValueError, match=r"has encoder_vqkd.stem.conv1.weight, expected CLIP's or SigLIP's: ViTamin"):
        config_from_tokenflow(state)


# ---- Files ----


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Malicious()}, "bad.pt")
    with pytest.raises(ValueError, match="bad.pt is no checkpoint of tensors alone"):
        from_tokenflow("bad.pt")
    assert not Path("unpickled").exists()


def test_layouts_of_files(tmp_path):
    state = {"quantize.embedding_vqkd.weight": torch.ones(2, 2)}
    ema = {"quantize.embedding_vqkd.weight": torch.zeros(2, 2)}
    (value,) = state.values()
    for content in ({"model": state}, {"state_dict": state}, state, {"ema": state, "model": ema}):
        torch.save(content, tmp_path / "file.pt")
        torch.testing.assert_close(load_tokenflow(tmp_path / "file.pt")["quantize.embedding_vqkd.weight"], value)
    torch.save({"model": state}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_tokenflow(tmp_path / "file.pt")["quantize.embedding_vqkd.weight"], value)
    save_file(state, tmp_path / "file.safetensors")
    assert torch.equal(load_tokenflow(tmp_path / "file.safetensors")["quantize.embedding_vqkd.weight"], value)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.pt"):
        from_tokenflow(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt is no checkpoint"):
        from_tokenflow(tmp_path / "text.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, expected a dictionary"):
        from_tokenflow(tmp_path / "list.pt")
    torch.save({"weights": {"a": torch.ones(2)}, "step": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="has weights, step at its top, expected ema, model or state_dict"):
        from_tokenflow(tmp_path / "other.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="text.safetensors is no checkpoint"):
        from_tokenflow(tmp_path / "text.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "flat.pt")
    with pytest.raises(ValueError, match="not a whole .*: quantize.embedding_vqkd.weight is missing among a$"):
        from_tokenflow(tmp_path / "flat.pt")


@pytest.mark.parametrize("layer", ["encoder_vqkd.transformer.resblocks.11.", "decoder_vqkd.blocks.2."])
def test_a_checkpoint_that_ends_early_is_not_taken_for_a_shorter_one(layer: str):
    state = {name: torch.empty(shape, device="meta") for name, shape in released_keys("clipb_224").items()}
    state = {name: value for name, value in state.items() if not name.startswith(layer)}
    with pytest.raises(ValueError, match=r"16 tensors are missing: semantic_.*layers\.(11|2)\.layer_norm1"):
        convert_tokenflow(state, empty_tokenizer(config_from_tokenflow(state)))


def test_incomplete_and_foreign_tensors_are_named(tmp_path):
    state = tiny_checkpoint("clip", cells=3)
    settings = {"image_size": 12, "config_overrides": {"scale_sides": (1, 3)}}
    path = tmp_path / "checkpoint.pt"

    def convert(changed: dict) -> None:
        torch.save({"model": changed}, path)
        from_tokenflow(path, **settings)

    with pytest.raises(ValueError, match="7 tensors are missing: pixel_encoder.* and 2 more"):
        convert(
            {
                name: value
                for name, value in state.items()
                if not name.startswith("encoder.mid.0.") or "conv2.bias" in name
            }
        )
    with pytest.raises(
        ValueError, match="1 tensors belong to no part of a TokenFlow tokenizer: vqkd_quant_resi.0.weight"
    ):
        convert({**state, "vqkd_quant_resi.0.weight": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"another shape: quant_conv.weight \(4, 9, 1, 1\) \(expected \(4, 8, 1, 1\)\)"
    ):
        convert({**state, "quant_conv.weight": torch.ones(4, 9, 1, 1)})
    with pytest.raises(ValueError, match=r"image_size is 100, expected one of \[224, 256\]"):
        config_from_tokenflow(state, image_size=100)


def released_keys(variant: str) -> dict[str, list[int]]:
    """Names and shapes; layers that are alike are listed once, with `{first-last}` in the place of their number."""
    lists = json.loads(KEY_LISTS.read_text())
    if variant == "clipb_224":  # the encoder of the one with the decoder of the other
        listed = {
            name: shape for name, shape in lists["clipb_224_enhanced"].items() if not name.startswith("decoder.")
        }
        listed |= {name: shape for name, shape in lists["siglip_384"].items() if name.startswith("decoder.")}
    else:
        listed = lists[variant]
    keys = {}
    for name, shape in listed.items():
        before, _, rest = name.partition("{")
        numbers, _, after = rest.partition("}")
        first, _, last = numbers.partition("-")
        for number in range(int(first), int(last) + 1) if numbers else [""]:
            keys[f"{before}{number}{after}"] = shape
    return keys


def _flat(state: dict) -> dict:
    """As transformers 5 writes SigLIP."""
    return {name.replace("vision_model.", ""): value for name, value in state.items()}
