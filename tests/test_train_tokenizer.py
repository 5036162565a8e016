"""The tokenizer's training as a whole: by recipe through the three stages, killed and resumed, on two processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import in_processes
from safetensors.torch import load_file
from toy_pipeline import toy_vision_tokenizer
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from nextflow_hf import NextFlowVisionTokenizer, cli
from nextflow_hf.processing.image_processing_nextflow import NextFlowImageProcessor
from nextflow_hf.training.common.checkpoints import last_checkpoint
from nextflow_hf.training.common.finite_steps import NotFiniteError
from nextflow_hf.training.common.recipe import load_recipe, parse_recipe
from nextflow_hf.training.data.images import NextFlowVisionTokenizerCollator
from nextflow_hf.training.evaluation.reconstruction_report import measure_batch
from nextflow_hf.training.vision_tokenizer import train
from nextflow_hf.training.vision_tokenizer.arguments import NextFlowVisionTokenizerTrainingArguments
from nextflow_hf.training.vision_tokenizer.recipe import (
    ImageArguments,
    VisionTokenizerArguments,
    build_datasets,
    build_image_processor,
    build_tokenizer,
)
from nextflow_hf.training.vision_tokenizer.trainer import NextFlowVisionTokenizerTrainer


STAGES = ("pixel", "joint", "decoder")
SQUARE, WIDE = ((1, 1), (2, 2), (4, 4)), ((1, 1), (2, 4))


def make_trainer(folder: Path, **changes) -> NextFlowVisionTokenizerTrainer:
    """Everything on: distillation, adversary, average, a codebook that starts late and whose codes die at once."""
    tokenizer = toy_vision_tokenizer().train()
    torch.manual_seed(1)
    teacher = Siglip2VisionModel(Siglip2VisionConfig(**tokenizer.config.semantic_config.to_dict()))
    generator = torch.Generator().manual_seed(2)
    items = [
        {"pixel_values": torch.rand(3, h, w, generator=generator) * 2 - 1, "image_grids": torch.tensor(schedule)}
        for h, w, schedule in [(16, 16, SQUARE), (8, 16, WIDE), (16, 16, SQUARE)] * 16
    ]
    options = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "continuous_steps": 1,
        "codebook_init_batches": 2,
        "codebook_init_iterations": 2,
        "dead_code_steps": 1,
        "dead_code_until": 1.0,
        "adversarial_loss_weight": 0.1,
        "adversarial_adaptive": True,
        "adversarial_start": 2,
        "discriminator_channels": 4,
        "discriminator_layers": 1,
        "discriminator_learning_rate": 1e-3,
        "ema_decay": 0.9,
    }
    args = NextFlowVisionTokenizerTrainingArguments(**{**options, **changes})
    return NextFlowVisionTokenizerTrainer(tokenizer, args, semantic_teacher=teacher, train_dataset=items)


def losses_of(trainer: NextFlowVisionTokenizerTrainer) -> list[dict]:
    timing = ("train_", "epoch", "total_flos", "step")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if not name.startswith(timing)} for entry in history]


def state_of(trainer: NextFlowVisionTokenizerTrainer) -> dict[str, torch.Tensor]:
    weights = {**trainer.tokenizer.state_dict(), **trainer.adversary.discriminator.state_dict()}
    averages = {f"average_{index}": value for index, value in enumerate(trainer.ema.shadow_params)}
    return {**weights, **averages, "steps_unused": trainer.usage.steps_unused}


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    assert {"adversarial_loss", "adversarial_weight", "discriminator_loss"} <= set(losses_of(whole)[2])
    assert "adversarial_loss" not in losses_of(whole)[1]
    assert sum(entry["restarted_codes"] for entry in losses_of(whole)) > 0
    # Stopped while the checkpoint of step 4 is written.
    killed = make_trainer(tmp_path / "killed", **options)
    save = killed._save_rng_state

    def stop_at_four(folder: str) -> None:
        if killed.state.global_step == 4:
            raise KeyboardInterrupt
        save(folder)

    killed._save_rng_state = stop_at_four
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir())[-1] == "unfinished-checkpoint"
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-3")
    again = make_trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=checkpoint)
    assert losses_of(again) == losses_of(whole)
    for name, value in state_of(whole).items():
        assert torch.equal(state_of(again)[name], value), name
    silent = make_trainer(tmp_path / "silent", **options, adversarial_loss_weight=0.0)
    with pytest.raises(ValueError, match="has an adversary, but adversarial_loss_weight is 0.0"):
        silent.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("bad", ["tokenizer", "discriminator"])
def test_a_bad_number_stops_before_the_weights_change(bad, tmp_path):
    trainer = make_trainer(tmp_path, adversarial_start=0, continuous_steps=0, per_device_train_batch_size=2)
    trainer.train_dataset = [
        {**item, "row_id": f"picture {index}"} for index, item in enumerate(trainer.train_dataset)
    ]
    network = trainer.tokenizer.pixel_decoder if bad == "tokenizer" else trainer.adversary.discriminator
    # In the second step: times one before it.
    network.register_forward_hook(lambda _, __, output: output * (torch.nan if trainer.state.global_step == 1 else 1))
    with pytest.raises(NotFiniteError, match="loss of step 2 is not finite"):
        trainer.train()
    assert trainer.state.global_step == 1
    notes = json.loads((tmp_path / "bad-batch-step2-rank0-0.json").read_text())
    assert notes["row_ids"] == ["picture 2", "picture 3"] and notes["loss"] == "nan"
    batch = load_file(tmp_path / "bad-batch-step2-rank0-0.safetensors")
    assert torch.equal(batch["pixel_values"][0], trainer.train_dataset[2]["pixel_values"])
    assert all(parameter.isfinite().all() for parameter in trainer.tokenizer.parameters())
    assert all(parameter.isfinite().all() for parameter in trainer.adversary.discriminator.parameters())


def test_accumulated_batches_are_one_batch(tmp_path):
    """But for the adaptive weight, which is each micro-batch's own, and the pictures that dead codes start from."""
    options = {"adversarial_adaptive": False, "dead_code_steps": 0, "codebook_init_batches": 0}
    whole, parts = (
        make_trainer(tmp_path, **options, **sizes)
        for sizes in (
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        )
    )
    for trainer in (whole, parts):
        trainer.train()
    for name, value in state_of(whole).items():
        torch.testing.assert_close(state_of(parts)[name], value, rtol=1e-3, atol=1e-5, msg=name)


def train_one_of_two(folder: str) -> None:
    options = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 3}
    trainer, again = (make_trainer(Path(folder, name), **options) for name in ("whole", "again"))
    trainer.train()
    again.train(resume_from_checkpoint=str(Path(folder, "whole/checkpoint-3")))
    for name, value in state_of(trainer).items():
        assert torch.equal(state_of(again)[name], value), name
    if trainer.is_world_process_zero():
        torch.save({"state": state_of(trainer), "losses": losses_of(trainer)}, Path(folder) / "result.pt")


def test_two_processes_are_one_with_both_batches(tmp_path):
    in_processes(train_one_of_two, str(tmp_path))
    whole = make_trainer(tmp_path / "one", per_device_train_batch_size=8)
    whole.train()
    both = torch.load(tmp_path / "result.pt")
    assert sum(entry["restarted_codes"] for entry in both["losses"]) > 0
    for one, other in zip(losses_of(whole), both["losses"], strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    for name, value in state_of(whole).items():
        torch.testing.assert_close(both["state"][name], value, rtol=1e-3, atol=1e-4, msg=name)


SMALL = {  # of every recipe: 64 px, last grid 8x8
    "config_overrides.codebook_size": 64, "config_overrides.semantic_code_dim": 16,
    "config_overrides.pixel_code_dim": 8, "config_overrides.semantic_decoder_layers": 1,
    "config_overrides.latent_channels": 32, "config_overrides.encoder_channels": 8,
    "config_overrides.encoder_res_blocks": 1, "config_overrides.channel_multipliers": [1, 2, 2, 4],
    "config_overrides.norm_num_groups": 0, "perceptual_model": None, "bf16": False, "dataloader_num_workers": 0,
    "image_processor": {
        "scale_bases": [1, 2, 4, 8], "patch_size": 8, "bucket_area": 64, "resolution": 64, "max_aspect_ratio": 2.0,
    },
    "data": "data.yaml", "eval_data": "data.yaml", "max_eval_images": 4, "max_steps": 2, "warmup_steps": 0,
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "global_batch_size": 4, "logging_steps": 1,
    "save_steps": 1, "eval_steps": 2, "adversarial_start": 1, "discriminator_channels": 8, "use_cpu": True,
    "report_to": "none",
}  # fmt: skip
DECODER = {"decoder_channels": 8, "decoder_res_blocks": 0}


def small(stage: str) -> list[str]:
    """The shipped recipe of a stage, made small."""
    own = {
        f"config_overrides.{name}": 2 * value if stage.startswith("decoder") else value
        for name, value in DECODER.items()
    }
    if stage == "pixel":
        own |= {"config_overrides.semantic_config.patch_size": 8, "config_overrides.semantic_config.num_patches": 64}
    if stage.startswith("joint"):
        own |= {"semantic_teacher": "teacher"}
    return ["train", "tokenizer", stage, *(f"{name}={json.dumps(value)}" for name, value in {**SMALL, **own}.items())]


def test_the_stages_by_recipe(tmp_path, monkeypatch):
    """A few steps each; what a stage leaves is what the next one takes, and codes are merged at the end."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{index}.png")
    Image.new("RGB", (32, 64), "red").save("images/tall.png")
    Path("images/broken.png").write_bytes(b"no image")
    Path("data.yaml").write_text("{on_bad_row: skip, sources: [{path: images, task: image}]}")
    teacher = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, num_patches=64
    )
    Siglip2VisionModel(teacher).save_pretrained("teacher")
    for stage in ("pixel", "joint", "decoder", "joint_1024", "decoder_1024"):
        assert cli.main(small(stage)) == 0
        folder = Path(f"runs/tokenizer_{stage}")
        assert json.loads((folder / "eval_results.json").read_text())["eval_psnr"] > 0
        assert NextFlowImageProcessor.from_pretrained(folder).resolution == 64
        run = yaml.safe_load((folder / "run.yaml").read_text())
        assert run["kind"] == "tokenizer" and run["model"] == load_recipe("tokenizer", stage).get(
            "vision_tokenizer_name_or_path"
        )
    loaded = {stage: NextFlowVisionTokenizer.from_pretrained(f"runs/tokenizer_{stage}") for stage in STAGES}
    assert (
        loaded["pixel"].config.semantic_distance_weight == 0 and loaded["joint"].config.semantic_distance_weight == 1
    )
    assert loaded["joint"].config.semantic_config.hidden_size == 32
    frozen, trained = loaded["joint"].state_dict(), loaded["decoder"].state_dict()
    for name, value in frozen.items():
        assert name.startswith("pixel_decoder") or torch.equal(trained[name], value), name
    sizes = [sum(p.numel() for p in loaded[stage].pixel_decoder.parameters()) for stage in ("joint", "decoder")]
    assert sizes[1] > 2 * sizes[0]

    assert cli.main([*small("joint"), "merge_codes=10", "output_dir=merged"]) == 0
    merged = NextFlowVisionTokenizer.from_pretrained("merged")
    assert merged.config.codebook_size == 10 and Path("merged/run.yaml").is_file()
    joint = loaded["joint"].state_dict()  # of the same seed
    kept = {tuple(row.tolist()) for row in joint["quantizer.pixel_codebook.weight"]}
    assert all(tuple(row.tolist()) in kept for row in merged.state_dict()["quantizer.pixel_codebook.weight"])
    processor = NextFlowImageProcessor.from_pretrained("merged")
    images = ImageArguments("data.yaml", eval_data="data.yaml", max_eval_images=4)
    _, evaluation = build_datasets(images, processor, seed=0)
    batch = NextFlowVisionTokenizerCollator()([evaluation[index] for index in range(4)])
    found = measure_batch(merged.eval(), batch["pixel_values"], batch["image_grids"], num_scales=4).values["psnr"]
    measured = json.loads(Path("merged/eval_results.json").read_text())["eval_psnr"]
    assert measured == pytest.approx(found.mean().item(), abs=1e-3)
    after = ["vision_tokenizer_name_or_path=merged", "output_dir=last", "config_overrides.codebook_size=10"]
    assert cli.main([*small("decoder"), *after]) == 0


def test_an_encoder_of_a_rounded_teacher_trains_in_float32(tmp_path):
    config = toy_vision_tokenizer().config
    Siglip2VisionModel(Siglip2VisionConfig(**config.semantic_config.to_dict())).bfloat16().save_pretrained(tmp_path)
    sizes = ("codebook_size", "latent_channels", "encoder_channels", "decoder_channels", "channel_multipliers")
    sizes = {name: getattr(config, name) for name in sizes}
    tokenizer, teacher = build_tokenizer(
        VisionTokenizerArguments(semantic_teacher=str(tmp_path), config_overrides=sizes)
    )
    assert {one.dtype for one in (*tokenizer.parameters(), *teacher.parameters())} == {torch.float32}


def test_a_ragged_last_batch(tmp_path):
    """The codebook starts from all batches of an epoch, of which the last is smaller."""
    trainer = make_trainer(tmp_path, codebook_init_batches=100, max_steps=14)
    trainer.train_dataset = trainer.train_dataset[:46]  # 11 batches of 4, and one of 2
    trainer.train()
    assert len(losses_of(trainer)) == 14


def test_wrong_recipes_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": "images", "learning_rte": 1.0}))
    with pytest.raises(ValueError, match="learning_rte is unknown, near ones that exist: .*'learning_rate'"):
        parse_recipe(load_recipe("tokenizer", path), train.GROUPS)
    with pytest.raises(ValueError, match="pixel.yaml: data must be set"):
        parse_recipe(load_recipe("tokenizer", "pixel"), train.GROUPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adversarial_adaptive": False}, "ema_decay is 0.9, expected none with FSDP"),
        ({"ema_decay": None, "adversarial_adaptive": True}, "adversarial_adaptive is True, expected none with FSDP"),
    ],
)
def test_sharded_parameters_are_refused_where_whole_ones_are_needed(tmp_path, changes, message):
    trainer = make_trainer(tmp_path)
    options = {"dead_code_steps": 0, "codebook_init_batches": 0, **changes}
    for name, value in {**options, "fsdp": True}.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        NextFlowVisionTokenizerTrainer(trainer.tokenizer, trainer.args, semantic_teacher=trainer.semantic_teacher)


def test_a_resolution_that_the_schedule_lacks_is_no_bad_image():
    fields = {"patch_size": 8, "scale_bases": [1, 3, 8], "bucket_area": 64}
    with pytest.raises(ValueError, match=r"^resolution is 100, expected one of \[8, 24, 64\]"):
        build_image_processor({**fields, "resolution": 100})
    assert build_image_processor({**fields, "resolution": 24}).resolution == 24


def test_joint_stage_wants_a_semantic_voice(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.tokenizer.config.semantic_distance_weight = 0.0
    with pytest.raises(ValueError, match="semantic_distance_weight is 0, what stage 'pixel' leaves behind"):
        NextFlowVisionTokenizerTrainer(trainer.tokenizer, trainer.args, semantic_teacher=trainer.semantic_teacher)
