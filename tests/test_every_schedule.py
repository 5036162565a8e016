"""All 41 aspect ratios of table 14 at all five levels, through the vision tokenizer and the transformer's inputs.

The schedules are the table's own numbers, not our rule's. Widths are toys; grids, scales and counts are the paper's.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toy import BOI, CODES, TEXT, image_tokens, toy_config, toy_model

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.grids_nextflow import get_image_layout, get_position_ids
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer


TABLE = json.loads((Path(__file__).parent / "data" / "scale_schedules.json").read_text())["ratios"]
LEVELS = {64: 4, 128: 8, 256: 12, 512: 16, 1024: 18}  # pixels of the square: scales
PATCH = 2  # instead of 16


def schedules(level: int) -> list[list[tuple[int, int]]]:
    return [[tuple(grid) for grid in row["schedule"][: LEVELS[level]]] for row in TABLE]


def by_ratio(ratio: str, level: int) -> list[tuple[int, int]]:
    return schedules(level)[[row["ratio"] for row in TABLE].index(ratio)]


def num_codes(schedule: list[tuple[int, int]]) -> int:
    return sum(math.prod(grid) for grid in schedule)


@pytest.fixture(scope="module")
def tokenizer() -> NextFlowVisionTokenizer:
    torch.manual_seed(0)
    vit = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = NextFlowVisionTokenizer(
        NextFlowVisionTokenizerConfig(
            semantic_config={**vit, "patch_size": PATCH, "num_patches": 16},
            semantic_decoder_layers=1,
            codebook_size=64,
            semantic_code_dim=4,
            pixel_code_dim=2,
            latent_channels=4,
            encoder_channels=4,
            encoder_res_blocks=1,
            decoder_channels=4,
            decoder_res_blocks=0,
            channel_multipliers=[1, 1],
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_the_tokenizer_takes_every_ratio_in_one_batch(tokenizer: NextFlowVisionTokenizer, level: int):
    every = schedules(level)
    assert level < 1024 or len(set(map(tuple, every))) == 41  # coarse grids of near ratios are the same
    image_grids = torch.zeros(41, 18, 2, dtype=torch.long)
    for row, schedule in zip(image_grids, every, strict=True):
        row[: len(schedule)] = torch.tensor(schedule)
    height, width = (PATCH * max(schedule[-1][axis] for schedule in every) for axis in (0, 1))
    pixels = torch.rand(41, 3, height, width, generator=torch.Generator().manual_seed(level)) * 2 - 1

    codes = tokenizer.encode(pixels, image_grids).image_codes
    assert len(codes) == sum(map(num_codes, every)) and len(codes.unique()) > 32
    decoded = tokenizer.decode(codes, image_grids)
    assert decoded.shape == pixels.shape and decoded.isfinite().all()
    of_image = codes.split(list(map(num_codes, every)))
    for index, (rows, columns) in enumerate(schedule[-1] for schedule in every):
        inside = decoded[index, :, : PATCH * rows, : PATCH * columns]
        assert inside.std() > 0.01
        assert decoded[index].count_nonzero() == inside.count_nonzero()  # zero outside of the image
        if index not in (0, 20, 33):  # 1:4, 1:1 and a tall one, alone as in the batch
            continue
        row = image_grids[index : index + 1]
        alone = tokenizer.encode(pixels[index : index + 1, :, : PATCH * rows, : PATCH * columns], row).image_codes
        assert torch.equal(alone, of_image[index])
        torch.testing.assert_close(tokenizer.decode(alone, row)[0], inside, atol=1e-5, rtol=0)


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_inputs_and_positions_of_every_ratio(level: int):
    model, extent, start = toy_model(max_scales=18).model, 64.0, 7
    table = torch.cat([F.normalize(part) for part in model.image_codebook.weight.split([6, 4], dim=1)], dim=1)
    angles = [LEVELS[level] / 10000 ** (2 * i / 32) for i in range(16)]
    length = torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)]) / math.sqrt(3 * 32)
    for schedule in schedules(level):
        grids = F.pad(torch.tensor([schedule]), (0, 0, 0, 18 - len(schedule)))
        ids = torch.tensor([[5] * start + image_tokens(schedule)])
        codes = torch.randint(CODES, (num_codes(schedule),), generator=torch.Generator().manual_seed(level))
        embeds = model.embed_inputs(ids, codes, grids, get_image_layout(toy_config(), ids, grids))[0, start + 1 : -1]
        positions = get_position_ids(toy_config(spatial_rope_extent=extent), ids, grids)[1:, 0]
        assert positions[:, start].tolist() == [start] * 3
        assert positions[:, -1].tolist() == [start + len(schedule)] * 3

        expected_embeds, expected_positions = [], []
        maps = codes.split([math.prod(grid) for grid in schedule])
        for scale, (height, width) in enumerate(schedule[1:], start=1):
            before = table[maps[scale - 1]].T.reshape(1, 10, *schedule[scale - 1])
            features = F.interpolate(before, size=(height, width), mode="bicubic", align_corners=False)[0]
            expected_embeds.append(model.connector(features.flatten(1).T) + model.scale_embedding.weight[scale])
            unit = extent / math.sqrt(height * width)
            axes = [
                torch.tensor([float(start + scale)]),
                *((torch.arange(side) + 0.5) * unit for side in (height, width)),
            ]
            expected_positions.append(torch.cartesian_prod(*axes).T)
        torch.testing.assert_close(embeds, torch.cat(expected_embeds) + length, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(positions[:, start + 1 : -1], torch.cat(expected_positions, dim=1))


@pytest.mark.parametrize("ratio, level", [("1:1", 512), ("1:4", 128), ("5:3", 128)])
@torch.no_grad()
def test_drawing_equals_the_teacher_forced_forward(monkeypatch, ratio: str, level: int):
    model, schedule, prompt = toy_model(max_scales=18, max_position_embeddings=4096), by_ratio(ratio, level), [5, 6, 7]
    grids = F.pad(torch.tensor([schedule]), (0, 0, 0, 18 - len(schedule)))
    seen, original = [], model.image_logits

    def record(hidden_states: torch.Tensor) -> torch.Tensor:
        seen.append(original(hidden_states)[0])
        return seen[-1][None]

    monkeypatch.setattr(model, "image_logits", record)
    drawn = model.generate_images(torch.tensor([[*prompt, BOI]]), image_grids=grids, guidance_scale=1.0).image_codes
    whole = model(
        input_ids=torch.tensor([[*prompt, *image_tokens(schedule)]]), image_codes=drawn, image_grids=grids
    ).logits[0, len(prompt) : -1, TEXT : TEXT + CODES]
    for scale, (cached, forced) in enumerate(zip(seen, whole.split([math.prod(grid) for grid in schedule]))):
        torch.testing.assert_close(cached, forced, atol=1e-4, rtol=1e-4, msg=lambda text, k=scale: f"{k}: {text}")
    assert len(seen) == len(schedule)
