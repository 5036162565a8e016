"""Decoding in tiles and slices: where it must equal decoding at once, and that it takes less memory."""

import pytest
import torch
from torch import nn
from toy_pipeline import toy_pipeline, toy_vision_tokenizer

from nextflow_hf import NextFlowVisionTokenizer, NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.pixel_cnn_nextflow import NextFlowAttentionBlock, in_tiles, tile_starts


GRIDS = torch.tensor([[[1, 1], [3, 5], [13, 22]]])  # 52 x 88 pixels


def tokenizer(**overrides) -> NextFlowVisionTokenizer:
    """Its residual branches do not start at zero, as they do for training."""
    model = NextFlowVisionTokenizer(
        NextFlowVisionTokenizerConfig(**{**toy_vision_tokenizer().config.to_dict(), **overrides})
    ).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return model


def random_codes(grids: torch.Tensor) -> torch.Tensor:
    return torch.randint(24, (int(grids.prod(-1).sum()),), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decode(model: NextFlowVisionTokenizer, grids: torch.Tensor = GRIDS, **options) -> torch.Tensor:
    return model.decode(random_codes(grids), grids, **options)


@pytest.mark.parametrize(("length", "size", "overlap"), [(7, 7, 3), (8, 7, 3), (50, 16, 4), (51, 16, 0), (9, 4, 2)])
def test_tiles_cover_a_side(length, size, overlap):
    starts = tile_starts(length, size=size, overlap=overlap)
    assert starts[0] == 0 and starts[-1] == max(length - size, 0)
    assert all(after - before <= size - overlap for before, after in zip(starts, starts[1:]))
    assert len(starts) == 1 or (len(starts) - 1) * (size - overlap) < length - overlap  # no tile too many


@pytest.mark.parametrize(("size", "overlap"), [(5, 2), (5, 0), (4, 2), (40, 8)])
def test_the_blend_of_what_no_neighbour_changes_is_exact(size, overlap):
    """A function of every place alone, times three in size."""
    maps = torch.randn(2, 4, 11, 17)
    big = in_tiles(
        lambda tile: tile.sin().repeat_interleave(3, 2).repeat_interleave(3, 3), maps, size=size, overlap=overlap
    )
    torch.testing.assert_close(big, maps.sin().repeat_interleave(3, 2).repeat_interleave(3, 3))


def test_a_tile_fades_linearly_into_the_next():
    values = iter([0.0, 1.0])
    blended = in_tiles(lambda tile: torch.full_like(tile, next(values)), torch.zeros(1, 1, 3, 12), size=8, overlap=4)
    expected = torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])
    torch.testing.assert_close(blended, expected.expand(1, 1, 3, 12))


def places_of_one_tile(length: int, starts: list[int], tile: int, reach: int) -> torch.Tensor:
    """Along a side: what one tile alone covers, farther than `reach` from where it ends inside the image."""
    tiles, inside = torch.zeros(length), torch.zeros(length, dtype=torch.bool)
    for start in starts:
        end = start + tile
        tiles[start:end] += 1
        inside[start + reach if start else 0 : end - reach if end < length else end] = True
    return inside & (tiles == 1)


def test_away_from_the_borders_of_tiles_it_is_the_whole_without_norms():
    model = tokenizer(norm_num_groups=0)
    whole = decode(model)
    model.enable_tiling(tile_size=40, tile_overlap=0.25)
    tiled = decode(model)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    # What a pixel sees past the first level, in pixels: with places of two, two blocks of two convolutions each; with
    # places of one, the convolution that enlarges, the same blocks, and the last one.
    reach = 2 * 4 + 1 + 4 + 1
    height, width = (
        places_of_one_tile(length, [2 * start for start in tile_starts(length // 2, size=20, overlap=5)], 40, reach)
        for length in (52, 88)
    )
    assert height.sum() > 20 and width.sum() > 50
    compared = [images[..., height, :][..., width] for images in (tiled, whole)]
    torch.testing.assert_close(*compared, rtol=0, atol=1e-5)


def test_with_norms_it_is_close():
    model = tokenizer()
    whole = decode(model)
    model.enable_tiling(tile_size=40, tile_overlap=0.5)
    error = (decode(model) - whole).abs().mean()
    assert 0 < error < 0.1 * whole.std()


def test_a_small_image_is_decoded_whole():
    model = tokenizer()
    whole = decode(model)
    model.enable_tiling(tile_size=88)
    torch.testing.assert_close(decode(model), whole, rtol=0, atol=1e-6)
    model.enable_tiling(tile_size=40)
    assert not torch.equal(decode(model), whole)
    model.disable_tiling()
    assert torch.equal(decode(model), whole)


def test_attention_sees_the_whole_image():
    model, cells = tokenizer(), []
    for module in model.pixel_decoder.modules():
        if isinstance(module, NextFlowAttentionBlock):
            module.register_forward_pre_hook(lambda module, args: cells.append(tuple(args[0].shape[2:])))
    model.enable_tiling(tile_size=40)
    decode(model)
    assert set(cells) == {(13, 22)}


def largest_activation(model: NextFlowVisionTokenizer, grids: torch.Tensor) -> int:
    sizes = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    decode(model, grids)
    for hook in hooks:
        hook.remove()
    return max(sizes)


def test_memory():
    grids = torch.cat([GRIDS] * 3)
    model = tokenizer()
    whole = largest_activation(model, grids)
    assert whole == 3 * 8 * 52 * 88
    model.enable_slicing()
    assert largest_activation(model, grids) == whole / 3
    model.enable_tiling(tile_size=40)
    assert largest_activation(model, grids) == 8 * 40 * 40


def test_slices_are_the_same_images():
    grids = torch.cat([GRIDS, GRIDS, torch.tensor([[[1, 1], [2, 2], [4, 4]]])])
    model = tokenizer()
    images = decode(model, grids)
    codes = model.encode(images, grids).image_codes
    model.enable_slicing()
    torch.testing.assert_close(decode(model, grids), images, rtol=0, atol=1e-6)
    assert torch.equal(model.encode(images, grids).image_codes, codes)
    model.disable_slicing()
    assert not model.use_slicing


def test_on_the_pipeline():
    pipe = toy_pipeline()
    options = {"num_images_per_prompt": 2, "output_type": "np"}
    whole = pipe("a", generator=torch.Generator().manual_seed(0), **options)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling(tile_size=8)
    tiled = pipe("a", generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(tiled.image_codes, whole.image_codes)
    assert tiled.images.shape == whole.images.shape and (tiled.images != whole.images).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_size": 7}, "tile_size is 7, expected at least two cells: 8"),
        ({"tile_overlap": 0.6}, "tile_overlap is 0.6, expected a share from 0 to 0.5"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        toy_vision_tokenizer().enable_tiling(**options)
