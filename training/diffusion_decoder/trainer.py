"""Training of the diffusion decoder (§3.3): the scheduler's own loss on latents, under the condition of the codes.

A `transformers.Trainer` around a [`NextFlowDiffusionDecoderPipeline`], whose other parts stay frozen. A UNet trains
whole; of a transformer a LoRA, and in full the projection of the condition with the input layer that takes it in. No
pixel losses, as in the paper.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ...pipelines.diffusion_decoder_nextflow import NextFlowDiffusionDecoder
from ...pipelines.latents_nextflow import encode_latents
from ...pipelines.pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
from ..common.ema import AveragedWeightsMixin
from ..common.processes import check_processes
from ..common.refusals import OWN_LOSS_AND_EVALUATION, check_arguments, check_numbers, check_trainer_options
from ..data.decoder_rows import NextFlowDecoderCollator


WEIGHTING_SCHEMES = ("none", "logit_normal", "sigma_sqrt", "mode", "cosmap")
# Attention and MLP of an image's tokens; the last two are those of FLUX's single blocks.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_mlp", "proj_out"]


@dataclass
class NextFlowDiffusionDecoderTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] plus what the diffusion decoder's training needs. None of the numbers is
    specified by the paper.

    Args:
        lora_rank (`int`, *optional*): Train a LoRA of this rank instead of all weights: for the transformers.
        lora_alpha (`int`, *optional*): Its scale; by default the rank.
        lora_target_modules (`list[str]`, *optional*):
            Endings of the names of the layers it adapts; by default attention and MLP.
        condition_dropout (`float`, *optional*, defaults to 0.1):
            Share of the images that lose their condition and caption together, for guidance.
        weighting_scheme (`str`, *optional*, defaults to `"logit_normal"`):
            How the times of a flow-matching scheduler are sampled (`"logit_normal"`, `"mode"`) or weighted
            (`"sigma_sqrt"`, `"cosmap"`), or `"none"`. A diffusion scheduler's are uniform.
        logit_mean (`float`, *optional*, defaults to 0.0): For `"logit_normal"`.
        logit_std (`float`, *optional*, defaults to 1.0): For `"logit_normal"`.
        mode_scale (`float`, *optional*, defaults to 1.29): For `"mode"`.
        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the weights; evaluation and the saved model then use it.
    """

    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_target_modules: list[str] | None = None
    condition_dropout: float = 0.1
    weighting_scheme: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        check_arguments(self)
        check_numbers(self, {"lora_rank": 1, "lora_alpha": 1, "ema_decay": 0}, {"logit_std": 0})
        super().__post_init__()
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            raise ValueError(f"weighting_scheme is {self.weighting_scheme!r}, expected one of {WEIGHTING_SCHEMES}")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout is {self.condition_dropout}, expected 0 to 1")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_target_modules is not None):
            raise ValueError("lora_alpha or lora_target_modules is given, but lora_rank is None")
        # The collator makes the batch; a row holds an image, which is no argument of `forward`.
        self.remove_unused_columns = False


class _TrainedDecoder(nn.Module):
    """The decoder as `Trainer` takes it: a configuration of diffusers is not one that its integrations can log."""

    def __init__(self, decoder: NextFlowDiffusionDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor, prompt: dict):
        return self.decoder(latents, timesteps, condition, **prompt, return_dict=False)[0]

    def activation_checkpointing_enable(self, **options: object) -> None:
        self.decoder.enable_gradient_checkpointing()


class NextFlowDiffusionDecoderTrainer(AveragedWeightsMixin, Trainer):
    """
    Trains the diffusion decoder of a pipeline.

    Args:
        pipeline ([`NextFlowDiffusionDecoderPipeline`]):
            Its decoder is trained, at the decoder's `upscale_factor`; its scheduler says what is predicted; its other
            parts are frozen.
        args ([`NextFlowDiffusionDecoderTrainingArguments`]): Arguments.
        kwargs: Everything else of [`~transformers.Trainer`]. Data sets are [`NextFlowDecoderDataset`], or have its
            items; the collator defaults to [`NextFlowDecoderCollator`].
    """

    state_name = "diffusion_decoder_trainer.pt"
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        pipeline: NextFlowDiffusionDecoderPipeline,
        args: NextFlowDiffusionDecoderTrainingArguments,
        *,
        data_collator: object | None = None,
        **kwargs,
    ):
        check_trainer_options(kwargs, OWN_LOSS_AND_EVALUATION)
        decoder = pipeline.diffusion_decoder
        if data_collator is None:
            if pipeline.image_processor is None:
                raise ValueError("the pipeline has no image_processor, expected one, or a data_collator")
            data_collator = NextFlowDecoderCollator(pipeline.image_processor, decoder.config.upscale_factor)
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module) and name != "diffusion_decoder":
                component.requires_grad_(False).eval()
        prepare_decoder(decoder, args)
        pipeline.check_components()
        super().__init__(_TrainedDecoder(decoder), args, data_collator=data_collator, **kwargs)
        check_processes(self, can_shard_weights=False)
        self.pipeline = pipeline.to(self.args.device)
        self.noise_scheduler = training_scheduler(pipeline.scheduler)

    @property
    def decoder(self) -> NextFlowDiffusionDecoder:
        """The decoder that is trained, without what wraps it."""
        return self.accelerator.unwrap_model(self.model).decoder

    @property
    def averaged_parameters(self) -> list[nn.Parameter]:
        """The parameters of the moving average: those that are trained."""
        return [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | list[str]],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """`Trainer`'s method: the loss of the denoiser at random noise levels (§3.3)."""
        image_grids, num_images = inputs["image_grids"], len(inputs["captions"])
        # Both conditions go together, as guidance leads away from an image that has neither.
        dropped = torch.rand(num_images) < (self.args.condition_dropout if model.training else 0)
        captions = ["" if drop else text for text, drop in zip(inputs["captions"], dropped.tolist(), strict=True)]
        codes_of_images = inputs["image_codes"].split(image_grids.prod(-1).sum(-1).tolist())
        with torch.no_grad():
            texts = self.pipeline.encode_prompt(captions)  # all at once, padded to one length
        loss, of_images = 0.0, torch.zeros(num_images, device=image_grids.device)
        # Images of one schedule have one size: a stack without padding.
        for members in _groups(image_grids):
            grids = image_grids[members]
            with torch.no_grad():
                condition = self.pipeline.encode_condition(torch.cat([codes_of_images[i] for i in members]), grids)
                condition = condition * (~dropped[members]).to(condition).view(-1, 1, 1, 1)
                height, width = (side * self.pipeline.pixels_per_cell for side in condition.shape[2:])
                pixels = inputs["pixel_values"][members, :, :height, :width]
                # Training sees samples of the VAE's posterior; evaluation its mode, which does not change.
                latents = encode_latents(self.pipeline.vae, pixels, sample=model.training)
            noisy, timesteps, target, weights = add_training_noise(self.noise_scheduler, latents, self.args)
            prompt = {name: None if rows is None else rows[members] for name, rows in texts.items()}
            predicted = model(noisy, timesteps, condition, prompt).float()
            errors = (predicted - target).square().flatten(1).mean(1)
            # A mean over the images, into however many groups they fall.
            loss = loss + (weights * errors).sum() / num_images
            of_images[members] = (weights * errors).detach()
        if model.training:
            self.watch(inputs, loss)
        return (loss, {"losses": of_images}) if return_outputs else loss

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The loss on held-out images, with the same noise at every call; of the averaged weights where there are."""
        model, losses = self.model, []
        was_training = model.training
        model.eval()
        # The same noise at every evaluation; the random numbers of the training stay where they are.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.averaged_weights(), torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed + self.args.process_index)  # not one noise for the rows of all processes
            for batch in dataloader:
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    _, outputs = self.compute_loss(model, batch, return_outputs=True)
                # Of each image once: the last batches of several processes are filled up with the first ones.
                losses.append(self.accelerator.gather_for_metrics(outputs["losses"]))
        model.train(was_training)
        mean, count = torch.cat(losses).mean().item(), sum(map(len, losses))
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": mean}, num_samples=count)

    # ---- Checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        if self.args.lora_rank is None:
            self.decoder.save_pretrained(output_dir)
        else:
            NextFlowDiffusionDecoderPipeline.save_lora_weights(
                output_dir,
                transformer_lora_layers=lora_state_dict(self.decoder),
                transformer_lora_adapter_metadata=self.decoder.peft_config["default"].to_dict(),
            )
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def load_weights(self, folder: str, model: nn.Module | None) -> None:
        """Read the weights of a checkpoint: the whole decoder, or its LoRA."""
        if self.args.lora_rank is None:
            self.decoder.load_state_dict(NextFlowDiffusionDecoder.from_pretrained(folder).state_dict())
            return
        from peft import set_peft_model_state_dict

        saved = NextFlowDiffusionDecoderPipeline.lora_state_dict(folder)
        prefix = f"{NextFlowDiffusionDecoderPipeline.transformer_name}."
        saved = {name.removeprefix(prefix): value for name, value in saved.items()}
        lora = {name: value for name, value in saved.items() if ".lora_" in name}
        # Not strict: weights that are frozen are in no file of the LoRA.
        self.decoder.load_state_dict({name: saved[name] for name in saved.keys() - lora.keys()}, strict=False)
        result = set_peft_model_state_dict(self.decoder, lora, adapter_name="default")
        if result.unexpected_keys:
            raise ValueError(f"{folder} has a LoRA of other layers: {result.unexpected_keys[:4]}")


def prepare_decoder(decoder: NextFlowDiffusionDecoder, args: NextFlowDiffusionDecoderTrainingArguments) -> None:
    """Which weights train: all, or a LoRA with the projection of the condition and the input layer (§3.3)."""
    decoder.train()
    if args.lora_rank is None:
        decoder.requires_grad_(True)
    else:
        from peft import LoraConfig

        decoder.requires_grad_(False)
        alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
        if not decoder._hf_peft_config_loaded:
            targets = args.lora_target_modules or LORA_TARGETS
            decoder.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=alpha, target_modules=targets))
        found = {name: (config.r, config.lora_alpha) for name, config in decoder.peft_config.items()}
        if found != {"default": (args.lora_rank, alpha)}:
            raise ValueError(
                f"the decoder has LoRAs of rank and alpha {found}, expected none or one to train on, named 'default', "
                f"of lora_rank {args.lora_rank} and lora_alpha {alpha}"
            )
        # An adapter that was there already was frozen with the rest, above.
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        for module in visual_modules(decoder).values():
            module.requires_grad_(True)
    if args.bf16 or args.fp16:  # what trains does so in float32, whatever the frozen rest is
        cast_training_params(decoder, torch.float32)
    elif args.lora_rank is not None and decoder.dtype != torch.float32:
        raise ValueError(
            f"the decoder is in {decoder.dtype} and bf16 is false, so that a LoRA would train in it, where most steps "
            "round to nothing: set bf16: true, or frozen_dtype: float32"
        )


def visual_modules(decoder: NextFlowDiffusionDecoder) -> dict[str, nn.Module]:
    """What is new in the decoder, and so trained in full beside a LoRA: the projection, and the layer it feeds."""
    input_layer = f"denoiser.{decoder.family.input_layer}"
    return {name: decoder.get_submodule(name) for name in ("condition_projection", input_layer)}


def lora_state_dict(decoder: NextFlowDiffusionDecoder) -> dict[str, torch.Tensor]:
    """The LoRA and what is trained beside it, under the names of the decoder's modules."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(decoder)
    for name, module in visual_modules(decoder).items():
        weights |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return weights


def training_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """A scheduler of the same noise with all its training steps, free of what sampling does to the given one."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    return DDPMScheduler.from_config(scheduler.config)


def add_training_noise(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    latents: torch.Tensor,
    args: NextFlowDiffusionDecoderTrainingArguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, their timesteps (n,), what the denoiser should predict, and the weights (n,) of its errors."""
    count, noise = len(latents), torch.randn_like(latents)
    steps = scheduler.config.num_train_timesteps
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        times = compute_density_for_timestep_sampling(
            args.weighting_scheme, count, args.logit_mean, args.logit_std, args.mode_scale
        )
        # Looked up in the scheduler's table, so that a shifted schedule is trained at its own noise levels.
        indices = (times * steps).long().clamp(max=steps - 1)
        timesteps, sigmas = (part[indices].to(latents.device) for part in (scheduler.timesteps, scheduler.sigmas))
        weights = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas)
        sigmas = sigmas.view(-1, 1, 1, 1)
        # A straight path from image to noise, and its velocity as the target.
        return (1 - sigmas) * latents + sigmas * noise, timesteps, noise - latents, weights
    # On the CPU, as the times above: the same numbers on any device.
    timesteps = torch.randint(steps, (count,)).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction_type = scheduler.config.prediction_type
    targets = {"epsilon": lambda: noise, "sample": lambda: latents}
    targets["v_prediction"] = lambda: scheduler.get_velocity(latents, noise, timesteps)
    return noisy, timesteps, targets[prediction_type](), torch.ones(count, device=latents.device)


def _groups(image_grids: torch.Tensor) -> list[list[int]]:
    """Indices of the images that share a schedule."""
    groups: dict[tuple, list[int]] = {}
    for index, rows in enumerate(image_grids.tolist()):
        groups.setdefault(tuple(map(tuple, rows)), []).append(index)
    return list(groups.values())
