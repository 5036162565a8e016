"""The vision tokenizer's invariants, with toy sizes: what must be equal, what must stay, what must raise.

Of transformers' own suite for models (ModelTesterMixin of 5.23) these cannot run, and why:

- `output_hidden_states` and `output_attentions` (5 tests): it is four networks, and no one stack of layers.
- `get_input_embeddings`: its input is pixels; the codebook is `codebook`.
- gradient checkpointing, resizing of embeddings, tensor parallelism, RoPE: it has none.
"""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from test_loss import LargestTensor
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig, NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.grids_nextflow import count_codes, schedules_from_grids
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from nextflow_hf.modeling_nextflow.vit_nextflow import patchify


PATCH, CODES, SEMANTIC_DIM, PIXEL_DIM = 4, 40, 6, 4
SQUARE = [(1, 1), (2, 2), (3, 3), (4, 4)]
TALL = [(1, 1), (3, 1), (5, 2)]
WIDE = [(1, 1), (1, 2), (2, 5), (3, 8), (5, 13)]


def split_image_codes(image_codes: torch.Tensor, image_grids: torch.Tensor) -> list[list[torch.Tensor]]:
    """Flat codes (total_codes,) as one list an image of (height, width) maps, coarse to fine."""
    schedules = schedules_from_grids(image_grids)
    per_image = image_codes.split([count_codes(schedule) for schedule in schedules])
    return [
        [scale.view(grid) for scale, grid in zip(codes.split([height * width for height, width in grids]), grids)]
        for codes, grids in zip(per_image, schedules)
    ]


def join_image_codes(code_maps: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Inverse of `split_image_codes`."""
    return torch.cat([code_map.reshape(-1) for maps in code_maps for code_map in maps])


def config(**overrides) -> NextFlowVisionTokenizerConfig:
    values = {
        "semantic_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 16,
        },
        "codebook_size": CODES,
        "semantic_code_dim": SEMANTIC_DIM,
        "pixel_code_dim": PIXEL_DIM,
        "semantic_decoder_layers": 1,
        "latent_channels": 8,
        "encoder_channels": 8,
        "encoder_res_blocks": 1,
        "decoder_channels": 12,
        "decoder_res_blocks": 1,
        "channel_multipliers": [1, 1, 2],
        "self_correction_top_k": 5,
    }
    return NextFlowVisionTokenizerConfig(**{**values, **overrides})


def build(**overrides) -> NextFlowVisionTokenizer:
    torch.manual_seed(0)
    model = NextFlowVisionTokenizer(config(**overrides)).eval()
    # Biases and norms start at trivial values: move everything, so that every path shows.
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> NextFlowVisionTokenizer:
    return build()


def grids(*schedules: list[tuple[int, int]]) -> torch.Tensor:
    rows = torch.zeros(len(schedules), max(map(len, schedules)) + 1, 2, dtype=torch.long)
    for index, schedule in enumerate(schedules):
        rows[index, : len(schedule)] = torch.tensor(schedule)
    return rows


def pixels(*schedules: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    """Noise in each image's corner, and large numbers in the padding, which nothing may read."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(PATCH * schedule[-1][0], PATCH * schedule[-1][1]) for schedule in schedules]
    values = torch.full((len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes)), 99.0)
    for index, (height, width) in enumerate(sizes):
        values[index, :, :height, :width] = torch.rand(3, height, width, generator=generator) * 2 - 1
    return values


def random_codes(*schedules: list[tuple[int, int]]) -> torch.Tensor:
    return torch.randint(CODES, (sum(count_codes(schedule) for schedule in schedules),))


def slow_quantize(model: NextFlowVisionTokenizer, features: torch.Tensor, schedule: list, forced=None, dropped=()):
    """
    One image (code_dim, height, width), cell by cell, with both distances written out. Returns the sum, the codes and,
    per code, the nearest one; `forced` replaces the codes that the residual goes on from.
    """
    quantizer, settings = model.quantizer, model.config
    semantic = [row / row.norm() for row in quantizer.semantic_codebook.weight.double()]
    pixel = [row / row.norm() for row in quantizer.pixel_codebook.weight.double()]
    residual, total, codes, nearest = features.double(), torch.zeros_like(features).double(), [], []
    for index, (height, width) in enumerate(schedule):
        if index in dropped:
            codes += [-1] * (height * width)
            nearest += [-1] * (height * width)
            continue
        small = F.adaptive_avg_pool2d(residual, (height, width))
        code_map = torch.zeros(len(features), height, width).double()
        for row in range(height):
            for column in range(width):
                vector = small[:, row, column]
                part_s, part_p = vector[:SEMANTIC_DIM], vector[SEMANTIC_DIM:]
                part_s, part_p = part_s / part_s.norm(), part_p / part_p.norm()
                distances = torch.stack(
                    [
                        settings.semantic_distance_weight * (part_s - s).square().sum()
                        + settings.pixel_distance_weight * (part_p - p).square().sum()
                        for s, p in zip(semantic, pixel, strict=True)
                    ]
                )
                nearest.append(int(distances.argmin()))
                codes.append(nearest[-1] if forced is None else int(forced[len(codes)]))
                code_map[:, row, column] = torch.cat([semantic[codes[-1]], pixel[codes[-1]]])
        up = F.interpolate(code_map[None], schedule[-1], mode="bicubic", align_corners=False)[0]
        total, residual = total + up, residual - up
    return total, torch.tensor(codes), torch.tensor(nearest)


# ---- Codes and pixels ----


@pytest.mark.parametrize("schedules", [(SQUARE,), (WIDE,), (SQUARE, SQUARE), (WIDE, SQUARE, TALL, SQUARE)])
def test_shapes_and_roundtrip(model: NextFlowVisionTokenizer, schedules: tuple):
    image_grids, pixel_values = grids(*schedules), pixels(*schedules)
    codes = model.encode(pixel_values, image_grids).image_codes
    assert codes.shape == (sum(count_codes(schedule) for schedule in schedules),)
    assert codes.dtype == torch.long and 0 <= codes.min() and codes.max() < CODES

    output = model(pixel_values, image_grids)
    assert torch.equal(output.image_codes, codes)
    decoded = model.decode(codes, image_grids)
    assert decoded.shape == pixel_values.shape and decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, output.reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)
    assert (decoded[pixel_values == 99] == 0).all()

    features = model.decode_features(codes, image_grids)
    size = (pixel_values.shape[2] // PATCH, pixel_values.shape[3] // PATCH)
    assert features.semantic_embeds.shape == (len(schedules), SEMANTIC_DIM, *size)
    assert features.pixel_embeds.shape == (len(schedules), PIXEL_DIM, *size)
    assert features.semantic_features.shape == (len(schedules), 16, *size)


def test_mixed_batch_equals_single(model: NextFlowVisionTokenizer):
    schedules = [WIDE, SQUARE, TALL, SQUARE]
    image_grids, pixel_values = grids(*schedules), pixels(*schedules)
    codes = model.encode(pixel_values, image_grids).image_codes
    decoded = model.decode(codes, image_grids)
    features = model.decode_features(codes, image_grids)
    losses = []
    for index, code_maps in enumerate(split_image_codes(codes, image_grids)):
        (rows, columns), row = schedules[index][-1], image_grids[index : index + 1]
        alone = pixel_values[index : index + 1, :, : PATCH * rows, : PATCH * columns]
        single = model.encode(alone, row).image_codes
        assert torch.equal(single, join_image_codes([code_maps]))
        torch.testing.assert_close(
            decoded[index, :, : PATCH * rows, : PATCH * columns], model.decode(single, row)[0], atol=1e-5, rtol=0
        )
        for name, value in model.decode_features(single, row).items():
            torch.testing.assert_close(features[name][index, :, :rows, :columns], value[0], atol=1e-5, rtol=1e-5)
        losses.append(model(alone, row).loss)
    torch.testing.assert_close(model(pixel_values, image_grids).loss, torch.stack(losses).mean())


def test_outputs_as_a_tuple(model: NextFlowVisionTokenizer):
    inputs = pixels(SQUARE), grids(SQUARE)
    expected = model(*inputs).to_tuple()
    torch.testing.assert_close(model(*inputs, return_dict=False), expected, rtol=0, atol=0)
    assert len(expected) == 6  # without the semantic loss, which nobody asked for


def test_split_and_join_are_inverse():
    image_grids = grids(WIDE, TALL)
    codes = random_codes(WIDE, TALL)
    maps = split_image_codes(codes, image_grids)
    assert [[tuple(code_map.shape) for code_map in image] for image in maps] == [WIDE, TALL]
    assert torch.equal(join_image_codes(maps), codes)
    assert schedules_from_grids(image_grids) == [tuple(WIDE), tuple(TALL)]


def test_previews(model: NextFlowVisionTokenizer):
    image_grids, codes = grids(SQUARE, TALL), random_codes(SQUARE, TALL)
    maps = split_image_codes(codes, image_grids)
    for num_scales in (1, 2, 3):
        prefix = join_image_codes([image[:num_scales] for image in maps])
        preview = model.decode(prefix, image_grids, num_scales=num_scales)
        assert torch.equal(preview, model.decode(codes, image_grids, num_scales=num_scales))
        # A prefix is the sum of what it has, on the grid of the whole.
        square = join_image_codes([maps[0][:num_scales]])
        quantized = model.quantizer.decode(square[None], tuple(SQUARE), num_scales=num_scales)
        schedule = [*SQUARE[:num_scales], SQUARE[-1]]
        expected, _, _ = slow_quantize(model, torch.ones(10, 4, 4), schedule, forced=square, dropped=[num_scales])
        torch.testing.assert_close(quantized[0].double(), expected, atol=1e-5, rtol=0)
    # the shorter image is complete after three scales
    torch.testing.assert_close(preview[1], model.decode(codes, image_grids)[1])


# ---- The quantiser ----


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("schedule", [SQUARE, WIDE[:4]])
def test_quantizer_against_slow_version(schedule: list, weights: tuple[float, float]):
    model = build(semantic_distance_weight=weights[0], pixel_distance_weight=weights[1])
    features = 3 * torch.randn(2, SEMANTIC_DIM + PIXEL_DIM, *schedule[-1])
    output = model.quantizer(features, tuple(schedule))
    for index in range(2):
        total, codes, _ = slow_quantize(model, features[index], schedule)
        assert torch.equal(output.image_codes[index], codes)
        torch.testing.assert_close(output.quantized[index].double(), total, atol=1e-5, rtol=0)
    assert torch.equal(output.quantized, model.quantizer.decode(output.image_codes, tuple(schedule)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizes_in_float32_whatever_the_dtype(dtype: torch.dtype):
    model, schedule = build(), tuple(SQUARE)
    features = torch.randn(4, SEMANTIC_DIM + PIXEL_DIM, 4, 4).to(dtype)
    expected = model.quantizer(features.float(), schedule)
    with torch.autocast("cpu", dtype):
        under_autocast = model.quantizer(features.float(), schedule)
        decoded = model.quantizer.decode(expected.image_codes, schedule)
    for output in (under_autocast, model.to(dtype).quantizer(features, schedule)):
        assert torch.equal(output.image_codes, expected.image_codes)
        assert output.quantized.dtype == torch.float32 and torch.equal(output.quantized, expected.quantized)
    assert torch.equal(decoded, expected.quantized)
    assert model.codebook.dtype == torch.float32


def test_casting_leaves_the_codebook_alone_and_moving_does_not():
    model, codebook = build(), build().codebook
    for cast in (model.half, model.bfloat16, lambda: model.to("cpu", torch.float16), model.float):
        cast()
        assert torch.equal(model.codebook, codebook)
    assert model.half().dtype == torch.float16 == model.quant_conv.weight.dtype
    assert model.double().quantizer.semantic_codebook.weight.dtype == torch.float64
    assert {parameter.device.type for parameter in model.to("meta").quantizer.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.to_empty(device="cpu").quantizer.parameters()} == {torch.float64}


def test_bfloat16_model_runs_and_keeps_its_codebook(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = NextFlowVisionTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.pixel_encoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.codebook, model.codebook)
    image_grids = grids(SQUARE, TALL)
    codes = loaded.encode(pixels(SQUARE, TALL), image_grids).image_codes
    assert loaded.decode(codes, image_grids).dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_search_equals_whole(model: NextFlowVisionTokenizer, chunk: int):
    chunked = build(search_chunk_size=chunk)
    image_grids, pixel_values = grids(SQUARE, SQUARE, WIDE), pixels(SQUARE, SQUARE, WIDE)
    for self_correction in (False, True):
        one, two = (
            each.encode(
                pixel_values, image_grids, self_correction=self_correction, generator=torch.Generator().manual_seed(1)
            )
            for each in (model, chunked)
        )
        assert torch.equal(one.image_codes, two.image_codes)


@pytest.mark.parametrize("self_correction", [False, True])
def test_search_holds_the_distances_of_a_chunk_alone(self_correction: bool):
    model = build(codebook_size=5000, search_chunk_size=4)
    features, noise = torch.randn(2, SEMANTIC_DIM + PIXEL_DIM, 4, 4), torch.rand(2, 30, 2)
    with torch.no_grad(), LargestTensor() as largest:
        model.quantizer(features, tuple(SQUARE), noise=noise if self_correction else None)
    # Of all cells of the last scale it would be 32 x 5000, one-hot or not.
    assert largest.numel == 5000 * (SEMANTIC_DIM + PIXEL_DIM)  # the codebook


# ---- Self-correction ----


def test_self_correction_targets_are_nearest_to_the_residual_reached(model: NextFlowVisionTokenizer):
    image_grids, pixel_values = grids(SQUARE, TALL), pixels(SQUARE, TALL)
    output = model.encode(pixel_values, image_grids, self_correction=True, generator=torch.Generator().manual_seed(0))
    inputs = output.image_codes.split([count_codes(SQUARE), count_codes(TALL)])
    targets = output.image_target_codes.split([count_codes(SQUARE), count_codes(TALL)])
    for index, schedule in enumerate((SQUARE, TALL)):
        rows, columns = schedule[-1]
        crop = pixel_values[index : index + 1, :, : PATCH * rows, : PATCH * columns]
        features = model._encode_features(crop)[0]
        _, _, nearest = slow_quantize(model, features, schedule, forced=inputs[index])
        assert torch.equal(targets[index], nearest)
        assert not torch.equal(targets[index], inputs[index])
        last = rows * columns
        assert torch.equal(targets[index][-last:], inputs[index][-last:])


def test_self_correction_share_and_distribution():
    model = build(self_correction_top_k=3, self_correction_ratio=0.6)
    query = model.quantizer.normalize(torch.randn(1, 1, SEMANTIC_DIM + PIXEL_DIM)).expand(1, 20000, -1)
    noise = torch.rand(1, 20000, 2)
    inputs, targets = model.quantizer.search(query, model.codebook, noise=noise)
    distances = (query[0, 0] - model.codebook).square().sum(-1)
    nearest = distances.argsort()[:3]
    assert (targets == nearest[0]).all()
    expected = 0.6 * (-distances[nearest]).softmax(0)
    expected[0] += 0.4
    share = torch.stack([(inputs == code).float().mean() for code in nearest])
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)
    torch.testing.assert_close(share.sum(), torch.tensor(1.0))


def test_self_correction_off_is_plain(model: NextFlowVisionTokenizer):
    image_grids, pixel_values = grids(SQUARE, WIDE), pixels(SQUARE, WIDE)
    plain = model.encode(pixel_values, image_grids)
    assert plain.image_target_codes is None
    corrected = build(self_correction_ratio=0.0).encode(pixel_values, image_grids, self_correction=True)
    assert torch.equal(corrected.image_codes, plain.image_codes)
    assert torch.equal(corrected.image_target_codes, plain.image_codes)


def test_self_correction_generators(model: NextFlowVisionTokenizer):
    schedules = [SQUARE, TALL, SQUARE]
    image_grids, pixel_values = grids(*schedules), pixels(*schedules)

    def encode(generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
        return model.encode(pixel_values, image_grids, self_correction=True, generator=generator).image_codes

    state = torch.get_rng_state()
    one, same, other = (encode(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)

    # One generator an image: the image's codes do not depend on the batch.
    batch = encode([torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = model.encode(
        pixel_values[1:2, :, :, : 2 * PATCH],
        image_grids[1:2],
        self_correction=True,
        generator=[torch.Generator().manual_seed(6)],
    ).image_codes
    assert torch.equal(batch.split([count_codes(schedule) for schedule in schedules])[1], alone)
    with pytest.raises(ValueError, match="2 entries, expected one per image: 3"):
        encode([torch.Generator(), torch.Generator()])


# ---- Training ----


def test_scale_dropout_keeps_first_and_last():
    model = build(scale_dropout=1.0)
    image_grids, pixel_values = grids(SQUARE, TALL), pixels(SQUARE, TALL)
    assert model(pixel_values, image_grids).image_codes.min() >= 0  # evaluation drops nothing
    codes = model.train()(pixel_values, image_grids).image_codes
    for image in split_image_codes(codes, image_grids):
        kept = [bool((code_map >= 0).all()) for code_map in image]
        assert kept == [True, *[False] * (len(image) - 2), True]
        assert all((code_map == -1).all() for code_map in image[1:-1])


def test_scale_dropout_is_a_coin_for_each_scale():
    model = build(scale_dropout=0.5).train()
    torch.manual_seed(0)
    dropped = torch.tensor([model._dropped_scales(None, 18) for _ in range(2000)]).float()
    torch.testing.assert_close(dropped.mean(0), torch.full((18,), 0.5), atol=0.05, rtol=0)
    assert (torch.corrcoef(dropped.T) - torch.eye(18)).abs().max() < 0.1


def test_explicit_drop_against_slow_version(model: NextFlowVisionTokenizer):
    features = torch.randn(1, SEMANTIC_DIM + PIXEL_DIM, 4, 4)
    output = model.quantizer(features, tuple(SQUARE), dropped=[True, False, True, True])
    total, codes, _ = slow_quantize(model, features[0], SQUARE, dropped=[2])
    assert torch.equal(output.image_codes[0], codes)
    torch.testing.assert_close(output.quantized[0].double(), total, atol=1e-5, rtol=0)

    image_grids, pixel_values = grids(SQUARE), pixels(SQUARE)
    drop = torch.tensor([False, False, True, False, False])
    assert (model(pixel_values, image_grids, drop_scales=drop).image_codes == -1).sum() == 9
    with pytest.raises(ValueError, match="3 entries, expected one per scale: 5"):
        model(pixel_values, image_grids, drop_scales=[False] * 3)


def test_straight_through_gradient(model: NextFlowVisionTokenizer):
    features = torch.randn(1, SEMANTIC_DIM + PIXEL_DIM, 4, 4, requires_grad=True)
    upstream = torch.randn(1, SEMANTIC_DIM + PIXEL_DIM, 4, 4)
    model.quantizer(features, tuple(SQUARE)).quantized.backward(upstream)
    assert torch.equal(features.grad, upstream)


@pytest.mark.parametrize("accumulated", [0.0, 1.0])
def test_quantizer_losses_move_their_own_side(accumulated: float):
    model = build(accumulated_loss_weight=accumulated)
    features = torch.randn(2, SEMANTIC_DIM + PIXEL_DIM, 4, 4, requires_grad=True)
    tables = list(model.quantizer.parameters())
    output = model.quantizer(features, tuple(SQUARE))
    codebook_only = torch.autograd.grad(
        output.quantizer_loss, [features, *tables], retain_graph=True, allow_unused=True
    )
    features_only = torch.autograd.grad(output.commitment_loss, [features, *tables], allow_unused=True)
    assert codebook_only[0] is None and all(gradient.abs().sum() > 0 for gradient in codebook_only[1:])
    assert features_only[0].abs().sum() > 0 and features_only[1:] == (None, None)
    torch.testing.assert_close(output.quantizer_loss, output.commitment_loss)  # equal in value


@pytest.mark.parametrize("as_list", [True, False])
def test_every_parameter_learns(as_list: bool):
    model = build().train()
    schedules = [SQUARE, TALL]
    targets = [torch.randn(math.prod(schedule[-1]), 16) for schedule in schedules]
    if not as_list:
        targets = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=float("nan"))
    model.gradient_checkpointing_enable()
    output = model(pixels(*schedules), grids(*schedules), semantic_targets=targets)
    output.loss.backward()
    expected = (
        output.reconstruction_loss + output.quantizer_loss + 0.25 * output.commitment_loss + output.semantic_loss
    )
    torch.testing.assert_close(output.loss, expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = build(scale_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.pixel_decoder.levels[0].blocks)
        model(pixels(SQUARE), grids(SQUARE)).loss.backward()
        gradients.append(model.pixel_encoder.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_learns_one_batch():
    model = build(scale_dropout=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedules, losses = [TALL, TALL], []
    pixel_values = F.interpolate(torch.rand(2, 3, 1, 1) * 2 - 1, (20, 8))
    for _ in range(15):
        output = model(pixel_values, grids(*schedules))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.reconstruction_loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- The semantic branch ----


@pytest.mark.parametrize("schedule", [SQUARE, WIDE, TALL])
def test_semantic_encoder_is_siglip2(schedule: list):
    model = build()
    whole = copy.deepcopy(model.config.semantic_config)
    whole.vision_use_head = True
    teacher = Siglip2VisionModel(whole).eval()
    missing, unexpected = model.semantic_encoder.load_state_dict(teacher.state_dict(), strict=False)
    assert not missing
    assert {name.split(".layers.")[-1].split(".")[0] for name in unexpected} == {"2", "post_layernorm", "head"}

    # Siglip2's own way: patches by its image processor, padded, with a mask.
    pixel_values, (rows, columns) = pixels(schedule), schedule[-1]
    patches = torch.from_numpy(convert_image_to_patches(pixel_values[0].numpy(), PATCH))
    patches = F.pad(patches, (0, 0, 0, 3))[None]
    mask = torch.ones(1, rows * columns + 3, dtype=torch.long)
    mask[:, -3:] = 0
    hidden_states = teacher(patches, mask, torch.tensor([[rows, columns]]), output_hidden_states=True).hidden_states
    expected = hidden_states[-2][:, :-3]

    ours = model.get_teacher_features(teacher, pixel_values, grids(schedule))
    assert len(ours) == 1
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
    semantic = model.encode_task_layer(expected).transpose(1, 2).unflatten(2, (rows, columns))
    torch.testing.assert_close(model._encode_features(pixel_values)[:, :SEMANTIC_DIM], semantic, atol=1e-5, rtol=1e-5)


def test_semantic_loss_is_one_minus_cosine(model: NextFlowVisionTokenizer):
    schedules = [SQUARE, WIDE]
    image_grids, pixel_values = grids(*schedules), pixels(*schedules)
    codes = model.encode(pixel_values, image_grids).image_codes
    features = model.decode_features(codes, image_grids).semantic_features
    targets = [torch.randn(math.prod(schedule[-1]), 16) for schedule in schedules]
    expected = [
        1 - F.cosine_similarity(features[i, :, :h, :w].flatten(1).T, targets[i], dim=-1).mean()
        for i, (h, w) in enumerate(schedule[-1] for schedule in schedules)
    ]
    actual = model(pixel_values, image_grids, semantic_targets=targets).semantic_loss
    torch.testing.assert_close(actual, torch.stack(expected).mean())


# ---- The model as a transformers model ----


def test_save_and_load_bit_exact(model: NextFlowVisionTokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = NextFlowVisionTokenizer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.channel_multipliers == model.config.channel_multipliers
    assert loaded.config.semantic_config.num_hidden_layers == 3  # the whole teacher's, of which we build one less
    for (name, one), two in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    image_grids, pixel_values = grids(SQUARE), pixels(SQUARE)
    codes = model.encode(pixel_values, image_grids).image_codes
    assert torch.equal(loaded.encode(pixel_values, image_grids).image_codes, codes)
    assert torch.equal(loaded.decode(codes, image_grids), model.decode(codes, image_grids))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(model: NextFlowVisionTokenizer, attention: str, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NextFlowVisionTokenizer.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.semantic_encoder.config._attn_implementation == attention
    assert loaded.semantic_decoder.config._attn_implementation == attention
    output, expected = (each(pixels(WIDE), grids(WIDE)) for each in (loaded, model))
    torch.testing.assert_close(output.reconstruction, expected.reconstruction, atol=1e-5, rtol=1e-5)
    other = {"eager": "sdpa", "sdpa": "eager"}[attention]
    loaded.set_attn_implementation({"semantic_config": other})
    assert loaded.config._attn_implementation == attention
    assert loaded.semantic_encoder.config._attn_implementation == other


def test_default_size_on_the_meta_device():
    def millions(module: torch.nn.Module) -> float:
        return sum(parameter.numel() for parameter in module.parameters()) / 1e6

    with torch.device("meta"):
        enhanced = NextFlowVisionTokenizer(NextFlowVisionTokenizerConfig())
        plain = NextFlowVisionTokenizer(NextFlowVisionTokenizerConfig(decoder_channels=128, decoder_res_blocks=2))
    assert not list(enhanced.buffers())
    assert enhanced.codebook.shape == (32768, 40)
    assert round(millions(enhanced.pixel_encoder), 1) == 29.3
    assert round(millions(enhanced.pixel_decoder), 1) == 237.1
    assert round(millions(plain.pixel_decoder), 2) == 42.45
    assert len(enhanced.semantic_encoder.encoder.layers) == 26
    norms = {module.num_groups for module in enhanced.modules() if isinstance(module, torch.nn.GroupNorm)}
    assert norms == {32}


def test_codebook_is_unit_halves(model: NextFlowVisionTokenizer):
    codebook = model.codebook
    assert codebook.shape == (CODES, SEMANTIC_DIM + PIXEL_DIM)
    for part in codebook.split([SEMANTIC_DIM, PIXEL_DIM], -1):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(CODES))


# ---- A tokenizer of fixed size, and what older encoders have ----


def test_last_layer_through_its_norm_is_the_feature():
    model = build(semantic_layer=-1)
    teacher = Siglip2VisionModel(model.config.semantic_config).eval()
    assert not model.semantic_encoder.load_state_dict(teacher.state_dict(), strict=False).missing_keys
    patches = patchify(pixels(TALL), PATCH)
    expected = model.encode_task_layer(teacher(patches, None, torch.tensor([[5, 2]])).last_hidden_state)
    features = model._encode_features(pixels(TALL))[:, :SEMANTIC_DIM].flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_class_token_takes_part_and_is_left_out():
    semantic = {**config().semantic_config.to_dict(), "class_token": True, "pre_layernorm": True}
    model = build(semantic_config=semantic, semantic_feature_size=9)
    features = model._encode_features(pixels(TALL))
    assert features.shape == (1, SEMANTIC_DIM + PIXEL_DIM, 5, 2)
    model.semantic_encoder.embeddings.class_token.data.add_(torch.randn(16))
    changed = model._encode_features(pixels(TALL))
    assert (changed - features)[:, :SEMANTIC_DIM].abs().min() > 0
    assert torch.equal(changed[:, SEMANTIC_DIM:], features[:, SEMANTIC_DIM:])
    output = model.decode_features(random_codes(TALL), grids(TALL))
    assert output.semantic_features.shape == (1, 9, 5, 2)
    assert model.config.condition_channels == sum(maps.shape[1] for maps in output.values())


def test_fixed_size_has_its_schedule():
    model = build(image_size=16, scale_sides=[1, 2, 4])
    assert model.get_image_grids(2).tolist() == [[[1, 1], [2, 2], [4, 4]]] * 2
    codes = model.encode(pixels(SQUARE), model.get_image_grids()).image_codes
    assert len(codes) == 21
    with pytest.raises(ValueError, match=r"last grid is \(5, 2\), expected \(4, 4\): .* 16 x 16 pixels only"):
        model.encode(pixels(TALL), grids(TALL))
    with pytest.raises(ValueError, match="config.scale_sides is None"):
        build().get_image_grids()


def test_a_teachers_config_is_taken_as_it_is():
    teacher = Siglip2VisionConfig(**{**config().semantic_config.to_dict(), "hidden_size": 32})
    taken = config(semantic_config=teacher).semantic_config
    assert taken.hidden_size == 32 and not taken.class_token and not taken.pre_layernorm


# ---- Bad inputs ----


def test_bad_inputs_raise_with_both_numbers(model: NextFlowVisionTokenizer):
    image_grids, pixel_values, codes = grids(SQUARE), pixels(SQUARE), random_codes(SQUARE)
    with pytest.raises(ValueError, match=r"\(29,\), image_grids asks for \(30,\)"):
        model.decode(codes[:-1], image_grids)
    with pytest.raises(ValueError, match=r"\(30,\), image_grids asks for \(55,\)"):
        model.decode_features(codes, grids(SQUARE, [(5, 5)]))
    with pytest.raises(ValueError, match=r"image_codes must lie in \[0, 40\), got .* to 40"):
        model.decode(codes.clamp(max=38).index_fill(0, torch.tensor([3]), CODES), image_grids)
    with pytest.raises(ValueError, match="image_codes must lie in .* got -1 to"):
        model.decode(codes.index_fill(0, torch.tensor([3]), -1), image_grids)
    with pytest.raises(ValueError, match="image_codes are torch.float32, expected integers"):
        model.decode(codes.float(), image_grids)
    with pytest.raises(ValueError, match="num_scales is 0, expected at least 1"):
        model.decode(codes, image_grids, num_scales=0)
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\), expected \(1, 3, 20, 8\)"):
        model.encode(pixel_values, grids(TALL))
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\), expected \(2, 3, 16, 16\)"):
        model(pixel_values, grids(SQUARE, SQUARE))
    with pytest.raises(ValueError, match="2 non-finite of 768 values"):
        broken = pixel_values.clone()
        broken[0, 0, 0, 0], broken[0, 1, 2, 3] = float("nan"), float("inf")
        model.encode(broken, image_grids)


@pytest.mark.parametrize("rows", [[[0, 0], [2, 2]], [[1, 1], [0, 2]], [[0, 0], [0, 0]], [[1, 1], [-2, 2]]])
def test_bad_grids_raise(rows: list):
    with pytest.raises(ValueError, match=r"image_grids\[0\] is .*, expected positive grids"):
        schedules_from_grids(torch.tensor([rows]))


def test_bad_grid_shape_raises():
    with pytest.raises(ValueError, match=r"\(3, 2\), expected \(n_images, max_scales, 2\)"):
        schedules_from_grids(torch.ones(3, 2, dtype=torch.long))


def test_whole_numbers_are_floats_in_a_config():
    """As YAML has them: `self_correction_ratio: 0`."""
    config = NextFlowVisionTokenizerConfig(self_correction_ratio=0, scale_dropout=0, semantic_loss_weight=1)
    assert (config.self_correction_ratio, config.scale_dropout) == (0, 0)
    assert NextFlowConfig(scale_loss_alpha=0, spatial_rope_extent=32).scale_loss_alpha == 0


def test_bad_configs_raise():
    with pytest.raises(ValueError, match="patch_size is 4, .* = 2"):
        NextFlowVisionTokenizer(config(channel_multipliers=[1, 2]))
    with pytest.raises(ValueError, match="num_hidden_layers is 1, expected at least 2"):
        NextFlowVisionTokenizer(config(semantic_config={**config().semantic_config.to_dict(), "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="semantic_layer is -3, expected -1 or -2"):
        NextFlowVisionTokenizer(config(semantic_layer=-3))
    with pytest.raises(ValueError, match="image_size 20 has 5 patches of 4 pixels a side, .*num_patches = 16"):
        NextFlowVisionTokenizer(config(image_size=20))
    with pytest.raises(ValueError, match="130 channels, expected a multiple of its 32 norm groups"):
        NextFlowVisionTokenizer(config(encoder_channels=130))


def test_residual_branches_start_at_zero():
    model = NextFlowVisionTokenizer(config())
    last = [name for name in model.state_dict() if name.endswith((".conv2.weight", "attentions.0.out_proj.weight"))]
    first = [name for name in model.state_dict() if name.endswith(".conv1.weight")]
    assert last and all(not model.state_dict()[name].any() for name in last)
    assert first and all(model.state_dict()[name].any() for name in first)
