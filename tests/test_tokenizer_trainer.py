"""The tokenizer's trainer: stages train what they should, the codebook stays alive, resuming changes nothing."""

import math

import numpy as np
import pytest
import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from nextflow_hf.training.data.images import NextFlowVisionTokenizerCollator
from nextflow_hf.training.evaluation.reconstruction_report import measure_batch
from nextflow_hf.training.vision_tokenizer.arguments import NextFlowVisionTokenizerTrainingArguments
from nextflow_hf.training.vision_tokenizer.codebook import (
    codebook_statistics,
    count_codes_per_scale,
    scale_queries,
    spherical_kmeans,
)
from nextflow_hf.training.vision_tokenizer.losses import image_sizes, pixel_losses, stack_by_size
from nextflow_hf.training.vision_tokenizer.trainer import NextFlowVisionTokenizerTrainer


SQUARE = ((1, 1), (2, 2), (4, 4))
WIDE = ((1, 1), (2, 4))
SEMANTIC = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 2,
    "num_patches": 16,
}


@pytest.fixture
def make_tokenizer():
    def make() -> NextFlowVisionTokenizer:
        torch.manual_seed(0)
        return NextFlowVisionTokenizer(
            NextFlowVisionTokenizerConfig(
                semantic_config={**SEMANTIC, "vision_use_head": False},
                codebook_size=16,
                semantic_code_dim=4,
                pixel_code_dim=4,
                semantic_decoder_layers=1,
                latent_channels=8,
                encoder_channels=4,
                encoder_res_blocks=1,
                decoder_channels=4,
                decoder_res_blocks=0,
                channel_multipliers=[1, 2],
                scale_dropout=0.3,
            )
        )

    return make


@pytest.fixture
def teacher() -> Siglip2VisionModel:
    torch.manual_seed(1)
    return Siglip2VisionModel(Siglip2VisionConfig(**SEMANTIC))


@pytest.fixture
def items() -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    sizes = [(8, 8, SQUARE), (4, 8, WIDE)] * 12
    return [
        {"pixel_values": torch.rand(3, h, w, generator=generator) * 2 - 1, "image_grids": torch.tensor(schedule)}
        for h, w, schedule in sizes
    ]


@pytest.fixture
def make_trainer(make_tokenizer, teacher, items, tmp_path):
    def make(folder: str = "run", **changes) -> NextFlowVisionTokenizerTrainer:
        options = {
            "output_dir": tmp_path / folder,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 5,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "codebook_init_batches": 2,
            "codebook_init_iterations": 2,
            "dead_code_steps": 2,
        }
        args = NextFlowVisionTokenizerTrainingArguments(**{**options, **changes})
        model = make_tokenizer()
        return NextFlowVisionTokenizerTrainer(
            model,
            args,
            semantic_teacher=teacher if args.stage == "joint" else None,
            train_dataset=items,
            eval_dataset=items[:7],
        )

    return make


@pytest.mark.parametrize("stage", ["pixel", "joint", "decoder"])
def test_a_stage_changes_its_own_parameters_only(make_trainer, make_tokenizer, stage):
    trainer = make_trainer(stage=stage, weight_decay=0.0)
    before = make_tokenizer().state_dict()
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    folders = {name.split(".")[0] for name in changed}
    if stage == "decoder":
        assert folders == {"pixel_decoder"}
    elif stage == "pixel":
        assert "pixel_encoder" in folders and "pixel_decoder" in folders
        assert not folders & {"semantic_encoder", "encode_task_layer", "semantic_decoder", "decode_task_layer"}
    else:
        assert {"pixel_encoder", "pixel_decoder", "semantic_decoder", "encode_task_layer", "quantizer"} <= folders


def test_the_teacher_is_required_and_stays_as_it_is(make_trainer, make_tokenizer, teacher, items):
    trainer = make_trainer()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with pytest.raises(ValueError, match="semantic_teacher is None"):
        NextFlowVisionTokenizerTrainer(make_tokenizer(), trainer.args, train_dataset=items)


def test_unknown_stage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stage is 'semantic'"):
        NextFlowVisionTokenizerTrainingArguments(output_dir=tmp_path, stage="semantic")


def test_logs_have_all_parts_and_the_usage_of_every_scale(make_trainer):
    trainer = make_trainer()
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    parts = {"reconstruction_loss", "quantizer_loss", "commitment_loss", "semantic_loss", "l1_loss", "edge_loss"}
    assert parts <= set(logs)
    assert {"usage_scale_1", "usage_scale_3", "codebook_usage", "codebook_perplexity"} <= set(logs)
    assert 0 < logs["codebook_usage"] <= 1 <= logs["codebook_perplexity"] <= 16


def test_evaluation_is_the_mean_over_images_for_every_prefix_of_scales(make_trainer, items):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    values = []
    for item in items[:7]:
        pixels, grids = item["pixel_values"][None], item["image_grids"][None]
        decoded = model.decode(model.encode(pixels, grids).image_codes, grids)
        values.append(-10 * math.log10((((decoded - pixels) / 2) ** 2).mean().item()))
    assert metrics["eval_psnr"] == pytest.approx(np.mean(values), abs=2e-3)
    assert {"eval_psnr_scale_1", "eval_psnr_scale_2", "eval_psnr_scale_3"} <= set(metrics)


def test_codebook_waits_for_the_continuous_steps(make_trainer, make_tokenizer):
    before = make_tokenizer().codebook
    waiting = make_trainer("waiting", continuous_steps=4, max_steps=2, weight_decay=0.0)
    waiting.train()
    torch.testing.assert_close(waiting.model.codebook, before)
    assert waiting.usage.steps_unused.sum() == 0 and not len(waiting.usage.scale_counts)
    begun = make_trainer("begun", continuous_steps=2, max_steps=3, weight_decay=0.0)
    begun.train()
    assert (begun.model.codebook - before).abs().amax(-1).min() > 1e-3  # every code came from the data


# Interrupted before, and after, the codebook is in use.
def test_a_decoder_alone_always_trains_on_codes(make_trainer):
    codes, features = (make_trainer(stage="decoder", continuous_steps=steps, max_steps=2) for steps in (0, 2))
    for trainer in (codes, features):
        trainer.train()
    expected = codes.tokenizer.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in features.tokenizer.state_dict().items())


class Epochs(list):
    """Items that note the epoch in which they are read."""

    def __init__(self, items):
        super().__init__(items)
        self.epoch, self.read = 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        self.read.append(self.epoch)
        return super().__getitem__(index)


def test_a_codebook_that_begins_in_a_later_epoch_leaves_it_to_the_training(make_trainer, items):
    trainer = make_trainer(stage="pixel", continuous_steps=7, max_steps=9)  # of six steps an epoch
    trainer.train_dataset = images = Epochs(items)
    trainer.train()
    assert images.read == sorted(images.read) and set(images.read) == {0, 1}


def test_every_evaluation_is_of_the_same_images(make_trainer, items):
    trainer = make_trainer(stage="pixel")
    trainer.eval_dataset = images = Epochs(items[:7])
    loader = trainer.get_eval_dataloader()  # one for all evaluations, where its workers are persistent
    for _ in range(2):
        trainer.evaluation_loop(loader)
    assert images.read == [0] * 14


@pytest.mark.parametrize("continuous_steps", [0, 2, 3])
def test_resumed_training_is_uninterrupted_training(make_trainer, continuous_steps):
    options = {"save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9, "dead_code_until": 1.0}
    options["continuous_steps"] = continuous_steps
    whole = make_trainer("whole", **options)
    whole.train()
    again = make_trainer("again", **options)
    again.train(resume_from_checkpoint=str(whole.args.output_dir) + "/checkpoint-2")
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, msg=name)
    assert torch.equal(whole.usage.steps_unused, again.usage.steps_unused)
    for first, second in zip(whole.ema.shadow_params, again.ema.shadow_params, strict=True):
        torch.testing.assert_close(first, second)


def test_saved_model_holds_theaveraged_weights(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.9)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    saved = NextFlowVisionTokenizer.from_pretrained(tmp_path / "saved")
    for parameter, average in zip(saved.parameters(), trainer.ema.shadow_params, strict=True):
        torch.testing.assert_close(parameter.data, average)
    name, raw = next(iter(trainer.model.named_parameters()))
    assert not torch.equal(raw, dict(saved.named_parameters())[name])


def test_dead_codes_restart_from_the_batch_and_live_codes_stay(make_trainer):
    trainer = make_trainer(dead_code_steps=3, ema_decay=0.99)
    quantizer = trainer.model.quantizer
    features = torch.randn(2, 8, 4, 4)
    trainer.last_features, trainer.last_schedules = {SQUARE: features}, [SQUARE, SQUARE]
    trainer.usage.step_counts[:10] = 1
    trainer.usage.steps_unused[10:] = 2
    before = quantizer.codebook()
    queries = scale_queries(quantizer, features, SQUARE, quantize=True).flatten(0, 1)
    trainer.usage.end_step()
    assert trainer.restart_dead_codes() == 6
    after = quantizer.codebook()
    torch.testing.assert_close(after[:10], before[:10])
    # Both parts of a restarted code come from one and the same query.
    assert (after[10:, None] - queries).abs().amax(-1).amin(-1).max() < 1e-5
    assert trainer.usage.steps_unused.sum() == 0
    with trainer.averaged_weights():  # which must not go on with the dead codes
        torch.testing.assert_close(quantizer.codebook(), after)


def test_kmeans_lowers_the_error_and_wants_enough_features(make_trainer):
    trainer = make_trainer()
    quantizer = trainer.model.quantizer
    features = quantizer.normalize(torch.randn(320, 8))
    errors = []
    for iterations in (0, 1, 4):
        centers = spherical_kmeans(quantizer, features[:16], features, trainer.accelerator, iterations=iterations)
        torch.testing.assert_close(centers, quantizer.normalize(centers))
        errors.append(torch.cdist(features, centers).min(-1).values.square().mean().item())
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ValueError, match="got 3 features"):
        trainer.initialize_codebook_from([[features[:3]]])


def test_queries_add_up_with_the_quantizer(make_tokenizer):
    model = make_tokenizer().eval()
    features = torch.randn(2, 8, 4, 4)
    codes = model.quantizer(features, SQUARE).image_codes
    queries = scale_queries(model.quantizer, features, SQUARE, quantize=True)
    assert queries.shape == (2, 21, 8)
    assert torch.equal(model.quantizer.search(queries, model.codebook)[0], codes)


def test_queries_are_in_the_order_of_the_images(make_trainer, items):
    trainer = make_trainer()
    batch = NextFlowVisionTokenizerCollator()(items[:4])
    with trainer._capture_features(batch["image_grids"]):
        trainer.model.encode(**batch)
    for item, queries in zip(items[:4], trainer._queries(quantize=True), strict=True):
        alone = NextFlowVisionTokenizerCollator()([item])
        features = trainer.model._encode_features(alone["pixel_values"])
        schedule = tuple(map(tuple, item["image_grids"].tolist()))
        expected = scale_queries(trainer.model.quantizer, features, schedule, quantize=True)[0]
        torch.testing.assert_close(queries, expected)


def test_padding_changes_no_loss_and_no_metric(items, make_tokenizer):
    tokenizer = make_tokenizer().eval()
    collator = NextFlowVisionTokenizerCollator()
    wide = items[1]
    alone = collator([wide])
    both = collator([items[0], wide])
    assert both["pixel_values"].shape == (2, 3, 8, 8) and both["image_grids"].shape == (2, 3, 2)
    first, second = measure_batch(tokenizer, **alone, num_scales=2), measure_batch(tokenizer, **both, num_scales=3)
    assert {"psnr", "gmsd", "psnr_scale_1"} <= set(first.values) <= set(second.values)
    for name, value in first.values.items():
        torch.testing.assert_close(value[0], second.values[name][1], equal_nan=True)

    noise = torch.zeros_like(both["pixel_values"])
    noise[1, :, :4, :8] = 0.1 * torch.randn(3, 4, 8)
    sizes = image_sizes(tokenizer, both["image_grids"])
    assert sizes == [(8, 8), (4, 8)]
    stacks = (stack_by_size(pixels, sizes) for pixels in (both["pixel_values"] + noise, both["pixel_values"]))
    l1_loss, edge_loss = pixel_losses(*stacks)
    wide_noise = noise[1, :, :4, :8]
    # Each picture counts the same, as in the model's own mean squared error.
    assert l1_loss.item() == pytest.approx(wide_noise.abs().mean().item() / 2, rel=1e-4)
    steps = wide_noise.diff(dim=-1).abs().sum() + wide_noise.diff(dim=-2).abs().sum()
    assert edge_loss.item() == pytest.approx(steps.item() / 96 / 2, rel=1e-4)


def test_edges_are_the_error_of_the_image_gradient():
    pixels = torch.zeros(1, 3, 8, 8)
    l1_loss, edge_loss = pixel_losses([torch.full_like(pixels, 0.5)], [pixels])
    assert l1_loss.item() == pytest.approx(0.5) and edge_loss.item() == 0
    striped = pixels.clone()
    striped[..., ::2] = 1
    assert pixel_losses([striped], [pixels])[1].item() == pytest.approx(7 / 8)


def test_code_counts_skip_dropped_scales():
    grids = torch.tensor([[(1, 1), (1, 2)], [(1, 1), (0, 0)]])
    counts = count_codes_per_scale(torch.tensor([3, -1, -1, 2]), grids, 4)
    assert counts.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    usage, perplexity = codebook_statistics(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    assert usage == 0.5 and perplexity == pytest.approx(2)
