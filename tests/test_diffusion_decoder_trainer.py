"""The diffusion decoder's trainer: the scheduler's targets, what trains and what does not, resuming, LoRA files."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from processes import in_processes
from toy_codes import extract_codes
from toy_decoder import toy_base_model, toy_decoder_pipeline
from toy_pipeline import toy_processor

from nextflow_hf import NextFlowDiffusionDecoder
from nextflow_hf.training.common.finite_steps import NotFiniteError
from nextflow_hf.training.common.recipe import load_recipe, parse_recipe, shipped_recipes
from nextflow_hf.training.data.decoder_rows import NextFlowDecoderCollator, NextFlowDecoderDataset
from nextflow_hf.training.data.messages import caption_of
from nextflow_hf.training.diffusion_decoder import trainer as module
from nextflow_hf.training.diffusion_decoder.build import DecoderArguments, build_decoder_pipeline
from nextflow_hf.training.diffusion_decoder.train import GROUPS
from nextflow_hf.training.diffusion_decoder.trainer import (
    NextFlowDiffusionDecoderTrainer,
    NextFlowDiffusionDecoderTrainingArguments,
    add_training_noise,
    prepare_decoder,
    training_scheduler,
    visual_modules,
)


def picture(index: int) -> Image.Image:
    size = [(16, 16), (12, 20)][index % 2]
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8))


def items(pipe, count: int = 6) -> list[dict]:
    rows = []
    for index in range(count):
        codes, grids = pipe.encode_image(picture(index))
        rows.append({"image": picture(index), "image_codes": codes, "image_grids": grids[0], "caption": ""})
    return rows


@pytest.fixture
def make_trainer(tmp_path):
    def make(family: str = "unet", folder: str = "run", **changes) -> NextFlowDiffusionDecoderTrainer:
        pipe = toy_decoder_pipeline(family)
        options = {
            "output_dir": tmp_path / folder,
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "per_device_eval_batch_size": 6,
            "learning_rate": 3e-3,
            "logging_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        args = NextFlowDiffusionDecoderTrainingArguments(**{**options, **changes})
        rows = items(pipe)
        return NextFlowDiffusionDecoderTrainer(pipe, args, train_dataset=rows, eval_dataset=rows)

    return make


@pytest.fixture
def arguments(tmp_path):
    def make(**changes) -> NextFlowDiffusionDecoderTrainingArguments:
        return NextFlowDiffusionDecoderTrainingArguments(output_dir=tmp_path, use_cpu=True, **changes)

    return make


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_target_and_noisy_latents_give_the_latents_back(arguments, prediction_type):
    latents = torch.randn(5, 2, 4, 4)
    if prediction_type == "flow":
        scheduler = training_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
        noisy, timesteps, target, weights = add_training_noise(scheduler, latents, arguments())
        share = (timesteps / 1000).view(-1, 1, 1, 1)
        torch.testing.assert_close(noisy - share * target, latents, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(noisy + (1 - share) * target, latents + target, atol=1e-5, rtol=1e-4)
    else:
        scheduler = training_scheduler(DDIMScheduler(prediction_type=prediction_type))
        noisy, timesteps, target, weights = add_training_noise(scheduler, latents, arguments())
        alpha = DDIMScheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        if prediction_type == "epsilon":
            back = (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt()
        elif prediction_type == "v_prediction":
            back = alpha.sqrt() * noisy - (1 - alpha).sqrt() * target
        else:
            back = target
        torch.testing.assert_close(back, latents, atol=2e-3, rtol=1e-3)
    assert len(timesteps.unique()) > 1 and torch.equal(weights, torch.ones(5))


def test_sampling_steps_do_not_change_the_training_noise():
    sampling = FlowMatchEulerDiscreteScheduler(shift=2.0)
    sampling.set_timesteps(4)
    assert len(training_scheduler(sampling).timesteps) == 1000


def test_training_lowers_the_loss_of_held_noise(make_trainer):
    trainer = make_trainer(max_steps=12, ema_decay=0.7, learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before
    others = {name: value.clone() for name, value in trainer.pipeline.vision_tokenizer.state_dict().items()}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    assert all(torch.equal(trainer.pipeline.vision_tokenizer.state_dict()[name], v) for name, v in others.items())
    trainer.save_model()
    saved = NextFlowDiffusionDecoder.from_pretrained(trainer.args.output_dir)
    for parameter, average in zip(saved.parameters(), trainer.ema.shadow_params, strict=True):
        torch.testing.assert_close(parameter.data, average)


@pytest.mark.parametrize(("family", "options"), [("unet", {}), ("flux", {"lora_rank": 2})])
def test_resumed_training_is_uninterrupted_training(make_trainer, family, options):
    options = {"save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9, **options}
    whole = make_trainer(family, "whole", **options)
    whole.train()
    again = make_trainer(family, "again", **options)
    again.train(resume_from_checkpoint=str(whole.args.output_dir) + "/checkpoint-2")
    weights = whole.decoder.state_dict()
    for name, value in again.decoder.state_dict().items():
        torch.testing.assert_close(value, weights[name], msg=name)
    for first, second in zip(whole.ema.shadow_params, again.ema.shadow_params, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.process
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_the_best_decoder_is_left_at_the_end(make_trainer, monkeypatch, options):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer, evaluated = make_trainer(**steps, load_best_model_at_end=True, **options), {}

    def evaluate(*args):
        step = trainer.state.global_step
        evaluated[step] = {name: value.clone() for name, value in trainer.decoder.state_dict().items()}
        return {"eval_loss": float(step != 2)}

    monkeypatch.setattr(trainer, "_evaluate", evaluate)
    trainer.train()
    assert not all(torch.equal(evaluated[4][name], value) for name, value in evaluated[2].items())
    left = trainer.decoder.state_dict()
    assert all(torch.equal(left[name], value) for name, value in evaluated[2].items())


@pytest.mark.parametrize("resumed", [False, True])
def test_processes_add_noise_of_their_own(make_trainer, monkeypatch, resumed):
    seen, checkpoint = [], None
    if resumed:  # from a checkpoint of one process
        saved = make_trainer(folder="one", max_steps=1, save_strategy="steps", save_steps=1)
        saved.train()
        checkpoint = f"{saved.args.output_dir}/checkpoint-1"

    def note(scheduler, latents, args):
        found = add_training_noise(scheduler, latents, args)
        seen.append(found[1].tolist())
        return found

    def train() -> list:
        monkeypatch.setattr(module, "add_training_noise", note)
        trainer = make_trainer(max_steps=2, per_device_train_batch_size=1)
        trainer.train_dataset = trainer.train_dataset[::2]  # of one schedule: as many random numbers on each process
        trainer.train(resume_from_checkpoint=checkpoint)
        return seen

    first, second = in_processes(train)
    assert 0 < len(first) == len(second) and all(one != other for one, other in zip(first, second))


@pytest.mark.process
def test_processes_share_rows_that_are_grouped_by_length(make_trainer):
    def train() -> list:
        trainer = make_trainer(
            max_steps=8, per_device_train_batch_size=1, train_sampling_strategy="group_by_length", save_strategy="no"
        )
        rows, collate, read = trainer.train_dataset[::2] * 2, trainer.data_collator, []
        trainer.train_dataset = Dataset.from_dict({"length": [*range(6)], "number": [*range(6)]})

        def collator(numbers):
            read.extend(one["number"] for one in numbers)
            return collate([rows[one["number"]] for one in numbers])

        trainer.data_collator = collator
        trainer.train()
        return read

    first, second = in_processes(train)
    for epoch in (slice(0, 3), slice(3, 6)):
        assert {*first[epoch], *second[epoch]} == {*range(6)}


@pytest.mark.process
def test_processes_evaluate_each_image_once_by_noise_of_their_own(make_trainer, monkeypatch):
    seen = []

    def note(scheduler, latents, args):
        seen.append(add_training_noise(scheduler, latents, args))
        return seen[-1]

    def evaluate() -> tuple[int, list]:
        monkeypatch.setattr(module, "add_training_noise", note)
        trainer = make_trainer(per_device_eval_batch_size=2)
        trainer.eval_dataset = trainer.eval_dataset[:5]
        output = trainer.evaluation_loop(trainer.get_eval_dataloader())
        return output.num_samples, seen[0][1].tolist()

    (count, noise), (other_count, other_noise) = in_processes(evaluate)
    assert count == other_count == 5 and noise != other_noise


def test_a_loss_that_is_no_number_stops_before_the_weights_change(make_trainer, monkeypatch):
    trainer = make_trainer()
    before = {name: value.clone() for name, value in trainer.decoder.state_dict().items()}
    encode = trainer.pipeline.encode_condition
    monkeypatch.setattr(trainer.pipeline, "encode_condition", lambda *args: encode(*args) * torch.nan)
    with pytest.raises(NotFiniteError, match="loss of step 1 is not finite"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.decoder.state_dict().items())


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen"])
def test_a_lora_is_loaded_by_load_lora_weights(make_trainer, family):
    trainer = make_trainer(family, lora_rank=2, lora_alpha=6, max_steps=2)
    before = {name: value.clone() for name, value in trainer.decoder.state_dict().items()}
    trainer.train()
    changed = {name for name, v in trainer.decoder.state_dict().items() if not torch.equal(v, before[name])}
    visual = tuple(f"{name}." for name in visual_modules(trainer.decoder))
    assert any(name.startswith(visual) for name in changed) and any("lora_B" in name for name in changed)
    assert all(".lora_" in name or name.startswith(visual) for name in changed)
    trainer.save_model()
    fresh = toy_decoder_pipeline(family)
    fresh.load_lora_weights(trainer.args.output_dir)
    inputs = torch.randn(1, 4, 4, 8), torch.tensor([300.0]), torch.randn(1, 26, 2, 4)
    with torch.no_grad():
        prompt = trainer.decoder.empty_prompt(1)
        expected = trainer.decoder.eval()(*inputs, **prompt).sample
        torch.testing.assert_close(fresh.diffusion_decoder(*inputs, **prompt).sample, expected, atol=1e-5, rtol=1e-4)
    assert fresh.get_list_adapters() == {"diffusion_decoder": ["default_0"]}
    with pytest.raises(ValueError, match="expected some of the diffusion decoder's"):
        fresh.load_lora_weights({"diffusion_decoder.nowhere.weight": torch.zeros(1)})


def test_dropped_images_lose_condition_and_caption(make_trainer, monkeypatch):
    trainer = make_trainer(condition_dropout=1.0)
    seen = []
    encode_prompt = trainer.pipeline.encode_prompt
    monkeypatch.setattr(trainer.pipeline, "encode_prompt", lambda texts: seen.append(texts) or encode_prompt(texts))
    trainer.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    rows = [{**row, "caption": "a"} for row in trainer.train_dataset[:2]]
    batch = trainer.data_collator(rows)
    trainer.compute_loss(trainer.model.train(), batch)
    assert seen[0] == ["", ""] and len(seen) == 3 and not any(condition.any() for condition in seen[1:])
    seen.clear()
    trainer.compute_loss(trainer.model.eval(), batch)
    assert seen[0] == ["a", "a"] and all(condition.any() for condition in seen[1:])


def test_rows_pair_an_image_with_its_own_codes(tmp_path):
    def get_row(index: int) -> dict:
        images = [picture(index + 1), picture(index)]
        source = [{"type": "image"}] if index % 2 else []
        messages = [
            {"role": "user", "content": [*source, {"type": "text", "text": f"draw {index}"}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ]
        return {"messages": messages, "images": images if source else images[1:]}

    pipe = toy_decoder_pipeline("unet")
    codes = extract_codes(
        get_row,
        4,
        tmp_path,
        processor=toy_processor(),
        vision_tokenizer=pipe.vision_tokenizer,
        self_correction=False,
        image_drop_rate=0.5,
    )
    data = NextFlowDecoderDataset(codes, lambda _, row_id: get_row(int(row_id)))
    for index in range(4):
        expected, grids = pipe.encode_image(picture(index))
        assert torch.equal(data[index]["image_codes"], expected)
        assert data[index]["caption"] == ("" if index % 2 else f"draw {index}")
    batch = NextFlowDecoderCollator(pipe.image_processor, upscale_factor=2)([data[0], data[1]])
    assert batch["pixel_values"].shape == (2, 3, 32, 40) and batch["captions"] == ["draw 0", ""]
    assert batch["image_codes"].numel() == batch["image_grids"].prod(-1).sum()
    wrong = {**data[0], "image": picture(1)}
    with pytest.raises(ValueError, match="were they extracted with another one"):
        NextFlowDecoderCollator(pipe.image_processor)([wrong])


def test_the_appended_scale_of_a_given_image_is_no_code_of_its_picture(tmp_path):
    def get_row(index: int) -> dict:
        source, answer = [{"type": "image"}], [{"type": "image"}] if index == 0 else [{"type": "text", "text": "a"}]
        messages = [{"role": "user", "content": source}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": [picture(1), picture(0)] if index == 0 else [picture(1)]}

    pipe, processor = toy_decoder_pipeline("unet"), toy_processor()
    processor.append_last_scale = True
    options = {"self_correction": False, "text_drop_rate": 0.0, "image_drop_rate": 0.0}
    codes = extract_codes(get_row, 2, tmp_path, processor=processor, vision_tokenizer=pipe.vision_tokenizer, **options)
    data = NextFlowDecoderDataset(codes, lambda _, row_id: get_row(int(row_id)))
    drawn, given = data[0], data[1]
    assert [len(row["image_grids"][row["image_grids"].prod(-1) > 0]) for row in (drawn, given)] == [4, 5]
    batch = NextFlowDecoderCollator(pipe.image_processor)([drawn, given])
    expected, grids = pipe.encode_image([picture(0), picture(1)])
    assert torch.equal(batch["image_grids"], grids) and torch.equal(batch["image_codes"], expected)


def test_caption_of_messages():
    image, text = {"type": "image"}, {"type": "text", "text": "a cat"}
    answer = {"role": "assistant", "content": [image]}
    assert caption_of([{"role": "user", "content": "a cat"}, answer]) == "a cat"
    assert caption_of([{"role": "user", "content": [image, text]}, answer]) == ""
    assert caption_of([{"role": "user", "content": [image, text]}, {"role": "assistant", "content": "a dog"}]) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting_scheme": "cosine"}, "weighting_scheme is 'cosine'"),
        ({"condition_dropout": 2.0}, "condition_dropout is 2.0"),
        ({"lora_alpha": 4}, "lora_rank is None"),
    ],
)
def test_bad_arguments_are_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


def test_a_lora_trains_in_float32(arguments):
    decoder = toy_decoder_pipeline("flux").diffusion_decoder.to(torch.bfloat16)
    with pytest.raises(ValueError, match="decoder is in torch.bfloat16 and bf16 is false"):
        prepare_decoder(decoder, arguments(lora_rank=2))
    prepare_decoder(decoder, arguments(lora_rank=2, bf16=True))
    assert {parameter.dtype for parameter in decoder.parameters() if parameter.requires_grad} == {torch.float32}
    with pytest.raises(ValueError, match=r"\{'default': \(2, 2\)\}, expected .* lora_rank 2 and lora_alpha 4"):
        prepare_decoder(decoder, arguments(lora_rank=2, lora_alpha=4, bf16=True))


@pytest.mark.parametrize("lora", [False, True])
def test_a_stage_begins_where_the_one_before_ended(tmp_path, lora):
    toy_base_model("unet").save_pretrained(tmp_path / "base_model")
    recipe = {
        "base_model": str(tmp_path / "base_model"), "denoiser": "unet", "use_cpu": True, "data": "unused",
        "scheduler": {"class": "EulerDiscreteScheduler"}, "report_to": "none", "disable_tqdm": True, "max_steps": 1,
        "save_strategy": "no", "per_device_train_batch_size": 2, **({"lora_rank": 2} if lora else {}),
    }  # fmt: skip
    first = {"output_dir": str(tmp_path / "base"), "learning_rate": 1e-2}
    # At a rate of 0 the second ends there, too.
    second = {"output_dir": str(tmp_path / "upscale"), "learning_rate": 0.0, "upscale_factor": 2}
    trained = []
    for changes in (first, {**second, "decoder_name_or_path": first["output_dir"]}):
        plain = toy_decoder_pipeline("unet")
        decoder_args, _, _, args = parse_recipe({**recipe, **changes}, GROUPS)
        pipe = build_decoder_pipeline(decoder_args, plain.vision_tokenizer, plain.image_processor)
        assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler" and pipe.has_text_encoder
        assert pipe.scheduler.config.timestep_spacing == "trailing" and pipe.vae.config.scaling_factor == 0.7
        trainer = NextFlowDiffusionDecoderTrainer(pipe, args, train_dataset=items(plain, 2))
        assert trainer.data_collator.upscale_factor == decoder_args.upscale_factor
        trainer.train()
        trainer.save_model()
        trained.append({name: value.clone() for name, value in trainer.decoder.state_dict().items()})
    assert trained[0].keys() == trained[1].keys()
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, msg=name)


@pytest.mark.parametrize("name", shipped_recipes("decoder"))
def test_recipes_are_arguments(name):
    recipe = {**load_recipe("decoder", name), "data": "data.yaml", "bf16": False, "use_cpu": True}
    decoder_args, _, _, args = parse_recipe(recipe, GROUPS)
    assert (args.lora_rank is None) == (decoder_args.denoiser == "unet") and args.max_steps > 0
    assert (decoder_args.upscale_factor == 2) == name.endswith("_upscale") == bool(decoder_args.decoder_name_or_path)


def test_a_denoiser_from_nothing():
    plain = toy_decoder_pipeline("unet")
    config = {
        "class": "UNet2DConditionModel", "sample_size": 16, "in_channels": 3, "out_channels": 3,
        "block_out_channels": [8, 16], "layers_per_block": 1, "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2D", "up_block_types": ["UpBlock2D", "UpBlock2D"], "norm_num_groups": 8,
        "cross_attention_dim": 8, "attention_head_dim": 8,
    }  # fmt: skip
    args = DecoderArguments(
        denoiser_config=config, scheduler={"class": "FlowMatchEulerDiscreteScheduler"}, projection_dim=4
    )
    pipe = build_decoder_pipeline(args, plain.vision_tokenizer, None)
    assert pipe.vae is None and pipe.diffusion_decoder.latent_channels == 3
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    args.denoiser_config = {**config, "no_such": 1}
    with pytest.raises(ValueError, match="denoiser_config: .*no_such"):
        build_decoder_pipeline(args, plain.vision_tokenizer, None)
