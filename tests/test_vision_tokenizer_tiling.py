"""Decoding in tiles, slices and compiled: where it must equal decoding at once, and what it saves."""

import pytest
import torch
from torch import nn
from toy_pipeline import toy_pipeline, toy_vision_tokenizer

from nextflow_hf import NextFlowVisionTokenizer, NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.pixel_cnn_nextflow import (
    NextFlowAttentionBlock,
    NextFlowGroupNorm,
    in_tiles,
    tile_side,
    tile_starts,
)


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
    side = tile_side(length, size=size, overlap=overlap)
    assert side <= size and len(tile_starts(length, size=side, overlap=overlap)) == len(starts)
    assert len(tile_starts(length, size=side - 1, overlap=min(overlap, side - 2))) > len(starts)  # none too large


def test_an_image_of_1024_pixels_takes_four_tiles():
    model = tokenizer()
    size, overlap = model.tile_size, int(model.tile_size * model.tile_overlap)
    side = tile_side(1024, size=size, overlap=overlap)
    assert side == 576 and tile_starts(1024, size=side, overlap=overlap) == [0, 448]


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
    places = []
    for length in (52, 88):
        side = tile_side(length // 2, size=20, overlap=5)
        starts = [2 * start for start in tile_starts(length // 2, size=side, overlap=5)]
        places.append(places_of_one_tile(length, starts, 2 * side, reach))
    height, width = places
    assert height.sum() > 20 and width.sum() > 40
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
    assert largest_activation(model, grids) == 8 * 26 * 44  # of the level that stays whole; tiles have 32 x 36


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_that_is_compiled_is_pytorchs(dtype):
    norm = NextFlowGroupNorm(4, 24, swish=True)
    norm.weight.data.uniform_(0.5, 2), norm.bias.data.normal_()
    maps = (3 * torch.randn(2, 24, 7, 9) + 20).to(dtype)  # a mean far from zero costs a sum of squares its digits
    exact = nn.functional.silu(nn.functional.group_norm(maps.double(), 4, norm.weight.double(), norm.bias.double()))
    own = nn.functional.silu(norm.normalize(maps))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(own.double(), exact, rtol=tolerance, atol=tolerance)


def test_the_norm_that_is_compiled_copies_no_layout():
    """The meta device stands for an accelerator, whose eager norm copies."""
    maps = torch.empty(2, 24, 7, 9, device="meta").contiguous(memory_format=torch.channels_last)
    norm = NextFlowGroupNorm(4, 24, swish=True).to("meta")
    assert norm.normalize(maps).is_contiguous(memory_format=torch.channels_last)
    assert not norm(maps).is_contiguous(memory_format=torch.channels_last)


def test_compiled_it_is_the_same_at_every_size_without_another_compilation():
    model, graphs, grids = tokenizer(), [], torch.tensor([[[1, 1], [3, 5], [10, 12]]])
    whole, other = decode(model), decode(model, grids)

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model.compile_sampling(backend=backend)
    torch.testing.assert_close(decode(model), whole, rtol=0, atol=1e-5)
    count = len(graphs)
    assert 0 < count <= 8
    torch.testing.assert_close(decode(model, grids), other, rtol=0, atol=1e-5)
    model.enable_tiling(tile_size=40, tile_overlap=0.5)
    assert (decode(model) - whole).abs().mean() < 0.1 * whole.std()
    assert len(graphs) <= count + 1  # a tile is part of a map, which lies otherwise


def test_on_the_pipeline():
    pipe = toy_pipeline()
    options = {"num_images_per_prompt": 2, "output_type": "np"}
    whole = pipe("a", generator=torch.Generator().manual_seed(0), **options)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling(tile_size=8)
    tiled = pipe("a", generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(tiled.image_codes, whole.image_codes)
    assert tiled.images.shape == whole.images.shape and (tiled.images != whole.images).any()


def test_one_switch_compiles_the_pipeline(monkeypatch):
    pipe, options = toy_pipeline(), {}
    with pytest.raises(ValueError, match="expected a CUDA device"):
        pipe.compile_sampling()
    assert not pipe.vae.pixel_decoder.is_compiled
    monkeypatch.setattr(pipe.transformer, "compile_sampling", lambda **given: options.update(given))
    pipe.compile_sampling(max_cells=9)
    assert options == {"max_cells": 9} and pipe.vae.pixel_decoder.is_compiled


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
