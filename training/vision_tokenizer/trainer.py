"""Training of the dual-codebook vision tokenizer (§2.1, §3.1) in its three stages.

A `transformers.Trainer` with what a vector quantiser needs (a codebook initialised from data, dead codes that restart,
usage in the logs: codebook.py), losses on the pixels (losses.py, adversary.py) and an evaluation in decibel.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Siglip2VisionModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ...modeling_nextflow.grids_nextflow import Schedule, schedules_from_grids
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import (
    NextFlowVisionTokenizer,
    NextFlowVisionTokenizerOutput,
)
from ...modeling_nextflow.pixel_cnn_nextflow import convolution_layout
from ..common.ema import AveragedWeightsMixin
from ..common.processes import check_processes
from ..common.refusals import OWN_LOSS_AND_EVALUATION, check_trainer_options
from ..data.images import NextFlowImageDataset, NextFlowVisionTokenizerCollator
from ..evaluation.reconstruction_report import measure_batch
from .adversary import Adversary, adaptive_weight
from .arguments import STAGES, NextFlowVisionTokenizerTrainingArguments
from .codebook import CodeUsage, sample_queries, scale_queries, spherical_kmeans
from .losses import image_sizes, load_perceptual_loss, perceptual_loss, pixel_losses, stack_by_size


SEMANTIC_PARTS = ("semantic_encoder", "encode_task_layer", "semantic_decoder", "decode_task_layer")
SEMANTIC_CODEBOOK = "quantizer.semantic_codebook"
LOGGED = ("reconstruction_loss", "quantizer_loss", "commitment_loss", "semantic_loss")


class NextFlowVisionTokenizerTrainer(AveragedWeightsMixin, Trainer):
    """
    Trains a [`NextFlowVisionTokenizer`].

    A step whose loss or gradient is not finite raises [`NotFiniteError`] on every process before the weights change,
    and the batch is saved. A checkpoint is written beside its place and moved there when it is complete.

    Args:
        model (`NextFlowVisionTokenizer`): The tokenizer.
        args ([`NextFlowVisionTokenizerTrainingArguments`]): Arguments.
        semantic_teacher (`Siglip2VisionModel`, *optional*):
            Whole, frozen: its last but one hidden state is what the semantic decoder learns to predict. Required by
            the stage `"joint"`.
        data_collator (`Callable`, *optional*): Defaults to [`NextFlowVisionTokenizerCollator`] on ready items.
        kwargs: Everything else of [`~transformers.Trainer`].
    """

    state_name = "vision_tokenizer_trainer.pt"
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: NextFlowVisionTokenizer,
        args: NextFlowVisionTokenizerTrainingArguments,
        *,
        semantic_teacher: Siglip2VisionModel | None = None,
        data_collator: Callable | None = None,
        **kwargs,
    ):
        check_trainer_options(kwargs, OWN_LOSS_AND_EVALUATION)
        check_trainable(model, args, semantic_teacher)
        prepare_stage(model, args.stage)
        super().__init__(model, args, data_collator=data_collator or NextFlowVisionTokenizerCollator(), **kwargs)
        check_processes(self, can_shard_weights=False)
        if self.is_deepspeed_enabled and self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"DeepSpeed in {self.accelerator.mixed_precision} rounds the codebooks, and rounded ones have other "
                "nearest codes (§2.1): use DDP, or leave bf16 and fp16 out"
            )
        self.semantic_teacher = self.perceptual_distance = self.adversary = None
        if semantic_teacher is not None:
            self.semantic_teacher = semantic_teacher.requires_grad_(False).eval().to(args.device)
        if args.perceptual_model is not None:
            distance = load_perceptual_loss(args.perceptual_model, layers=args.perceptual_layers)
            self.perceptual_distance = distance.to(args.device)
        if args.adversarial_loss_weight:
            self.adversary = Adversary(args, self.accelerator)
        self.usage = CodeUsage(model.config.codebook_size, self.accelerator)
        self.restarted_codes = 0
        self.logged_values: dict[str, list[torch.Tensor]] = {}
        # Of the last batch, where dead codes restart: features of the images of each schedule, and their schedules.
        self.last_features: dict[Schedule, torch.Tensor] = {}
        self.last_schedules: list[Schedule] = []

    @property
    def tokenizer(self) -> NextFlowVisionTokenizer:
        """The model that is trained, without what wraps it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def quantizes(self) -> bool:
        """Whether the codebook is in use yet; one that does not train always is."""
        return self.state.global_step >= self.args.continuous_steps or not self.args.trains_codebook

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, NextFlowVisionTokenizerOutput]:
        pixel_values, image_grids = inputs["pixel_values"], inputs["image_grids"]
        pixel_values = pixel_values.contiguous(memory_format=convolution_layout(pixel_values.device))
        targets = None
        if self.args.stage == "joint":
            with torch.no_grad():
                targets = self.tokenizer.get_teacher_features(self.semantic_teacher, pixel_values, image_grids)
        with self._capture_features(image_grids):
            outputs = model(
                pixel_values,
                image_grids,
                semantic_targets=targets,
                drop_scales=self._dropped_scales(image_grids.shape[1]) if model.training else None,
                quantize=self.quantizes,  # an autoencoder until then
            )
        sizes = image_sizes(self.tokenizer, image_grids)
        fake, real = (stack_by_size(pixels, sizes) for pixels in (outputs.reconstruction, pixel_values))

        l1_loss, edge_loss = pixel_losses(fake, real)
        parts = {"l1_loss": l1_loss, "edge_loss": edge_loss}
        pixel_loss = self.args.l1_loss_weight * l1_loss + self.args.edge_loss_weight * edge_loss
        if self.perceptual_distance is not None:
            parts["perceptual_loss"] = perceptual_loss(self.perceptual_distance, fake, real)
            pixel_loss = pixel_loss + self.args.perceptual_loss_weight * parts["perceptual_loss"]
        loss = outputs.loss + pixel_loss
        begun = self.state.global_step >= self.args.adversarial_start
        if self.adversary is not None and model.training and begun:
            adversarial = self._adversarial_parts(fake, real, outputs.reconstruction_loss + pixel_loss)
            loss = loss + adversarial["adversarial_weight"] * adversarial["adversarial_loss"]
            parts |= adversarial
        if model.training:
            # The discriminator's loss has to be finite, too: it learns from the same images.
            self.watch(inputs, loss + 0 * parts.get("discriminator_loss", 0))
            self._keep_for_logs(outputs, parts)
            if self.quantizes:
                self.usage.add(outputs.image_codes, image_grids)
        return (loss, outputs) if return_outputs else loss

    def _adversarial_parts(
        self, fake: list[torch.Tensor], real: list[torch.Tensor], pixel_loss: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The tokenizer's loss from the discriminator, which then learns from the same images."""
        adversarial_loss = self.adversary.generator_loss(fake)
        weight = torch.tensor(self.args.adversarial_loss_weight, device=pixel_loss.device)
        if self.args.adversarial_adaptive:
            last_layer = self.tokenizer.pixel_decoder.conv_out.weight
            weight = weight * adaptive_weight(pixel_loss, adversarial_loss, last_layer, self.accelerator)
        # After the tokenizer's loss: autocast caches the weights it casts, here with a gradient, there without.
        share = 1 / self.current_gradient_accumulation_steps  # micro-batches add up, as the tokenizer's do
        discriminator_loss = self.adversary.learn(fake, real, share=share)
        return {
            "adversarial_loss": adversarial_loss,
            "adversarial_weight": weight,
            "discriminator_loss": discriminator_loss,
        }

    def _dropped_scales(self, max_scales: int) -> list[bool]:
        """Per step, the same for all its micro-batches and processes, so that they add up to one large batch."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        # Always as many numbers: two processes may have schedules of different lengths.
        return (torch.rand(64, generator=generator)[:max_scales] < self.tokenizer.config.scale_dropout).tolist()

    # ---- Logs ----

    def _keep_for_logs(self, outputs: NextFlowVisionTokenizerOutput, parts: dict[str, torch.Tensor]) -> None:
        parts = {name: outputs[name] for name in LOGGED if outputs.get(name) is not None} | parts
        for name, value in parts.items():
            self.logged_values.setdefault(name, []).append(value.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer`'s method, with the means of all parts of the loss and the use of the codes."""
        if "loss" in logs and self.logged_values:
            # All processes have the same names in the same order: one reduction for all of them.
            means = torch.stack([torch.stack(values).float().mean() for values in self.logged_values.values()])
            means = self.accelerator.reduce(means, "mean").tolist()
            logs |= {name: round(mean, 5) for name, mean in zip(self.logged_values, means, strict=True)}
            logs |= self.usage.metrics()
            if self.args.dead_code_steps and self.args.trains_codebook:
                logs["dead_codes"] = int((self.usage.steps_unused >= self.args.dead_code_steps).sum())
                logs["restarted_codes"] = self.restarted_codes
            self.logged_values, self.restarted_codes = {}, 0
        super().log(logs, start_time)

    # ---- The codebook ----

    @contextmanager
    def _capture_features(self, image_grids: torch.Tensor) -> Iterator[None]:
        """Keep the quantiser's input (n, code_dim, height, width) for each schedule of the batch."""
        self.last_schedules, self.last_features = schedules_from_grids(image_grids), {}

        def keep(module: nn.Module, arguments: tuple) -> None:
            features, schedule = arguments
            self.last_features[schedule] = features.detach().float()

        handle = self.tokenizer.quantizer.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _queries(self, *, quantize: bool) -> list[torch.Tensor]:
        """The vectors (cells, code_dim) that each image of the last batch looks up."""
        quantizer = self.tokenizer.quantizer
        rows = {
            schedule: iter(scale_queries(quantizer, features, schedule, quantize=quantize))
            for schedule, features in self.last_features.items()
        }
        return [next(rows[schedule]) for schedule in self.last_schedules]

    @torch.no_grad()
    def initialize_codebook(self) -> None:
        """Initialise the codebook from the features of the first `codebook_init_batches` batches of the data."""
        batches, loader = [], cast(Any, self.get_train_dataloader())
        # A new loader would set its data set, that of the training, to the crops and flips of the first epoch.
        loader.set_epoch(int(self.state.epoch))
        for index, batch in enumerate(loader):
            if index == self.args.codebook_init_batches:
                break
            batch = self._prepare_inputs(batch)
            # Encoding calls the quantiser, whose input is what the hook keeps.
            with self.compute_loss_context_manager(), self._capture_features(batch["image_grids"]):
                self.tokenizer.encode(batch["pixel_values"], batch["image_grids"])
            batches.append(self._queries(quantize=False))
        self.initialize_codebook_from(batches)

    @torch.no_grad()
    def initialize_codebook_from(self, batches: list[list[torch.Tensor]]) -> None:
        """
        Initialise both codebooks together by `codebook_init_iterations` of k-means, from the features (cells,
        code_dim) of every image of this process's batches, both parts of length one.

        Raises:
            `ValueError`: where all processes have fewer features than codes.
        """
        quantizer = self.tokenizer.quantizer
        codebook_size = quantizer.config.codebook_size
        centers = sample_queries(batches, codebook_size, self.accelerator, seed=(self.args.seed,), replace=False)
        features = torch.cat([image for batch in batches for image in batch])
        codebook = spherical_kmeans(
            quantizer, centers, features, self.accelerator, iterations=self.args.codebook_init_iterations
        )
        self._write_codes(torch.arange(codebook_size, device=codebook.device), codebook)

    @torch.no_grad()
    def restart_dead_codes(self) -> int:
        """Give codes that were not used for `dead_code_steps` steps a query of the last batch; returns how many."""
        dead = (self.usage.steps_unused >= self.args.dead_code_steps).nonzero().flatten()
        if len(dead):
            seed = (self.args.seed, self.state.global_step)
            # Residuals that this batch has looked up, so the new codes are where codes are needed.
            queries = [self._queries(quantize=True)]
            self._write_codes(dead, sample_queries(queries, len(dead), self.accelerator, seed=seed, replace=True))
            self.usage.steps_unused[dead] = 0
        return len(dead)

    def _write_codes(self, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        """
        Write unit vectors into rows of both codebooks and of their averages, in which old codes mean nothing for new
        ones, and forget the optimizer's moments of those rows.
        """
        quantizer = self.tokenizer.quantizer
        dims = [quantizer.config.semantic_code_dim, quantizer.config.pixel_code_dim]
        tables = (quantizer.semantic_codebook.weight, quantizer.pixel_codebook.weight)
        averages = {}
        if self.ema is not None:
            averages = dict(zip(map(id, self.averaged_parameters), self.ema.shadow_params, strict=True))
        for table, part in zip(tables, vectors.split(dims, -1), strict=True):
            # Under accelerate the state belongs to the wrapped optimizer; both share the dictionary.
            state = {} if self.optimizer is None else self.optimizer.state.get(table, {})
            table.data[rows] = part.to(table)
            if id(table) in averages:
                averages[id(table)][rows] = part.to(table)
            for name in state.keys() & {"exp_avg", "exp_avg_sq"}:
                state[name][rows] = 0

    # ---- Evaluation ----

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """
        Means over the images, of pixels in [0, 1]: `psnr` in decibel, `ssim` and `gmsd` of all scales, `psnr_scale_k`
        of the first k (§2.1); and the use of the codebook. Uses the averaged weights when there are some.
        """
        tokenizer = self.tokenizer
        was_training = tokenizer.training
        tokenizer.eval()
        usage = CodeUsage(tokenizer.config.codebook_size, self.accelerator)
        gathered: dict[str, list[torch.Tensor]] = {}
        # Persistent workers keep their loader: its next epoch would have other images of rows that have several.
        cast(Any, dataloader).set_epoch(0)
        with self.averaged_weights():
            for batch in dataloader:
                batch = self._prepare_inputs(batch)
                pixel_values, image_grids = batch["pixel_values"], batch["image_grids"]
                # Processes see different schedules, and must all take part in every gathering.
                longest = (image_grids.prod(-1) > 0).sum(-1).max()
                num_scales = int(self.accelerator.gather(longest[None]).max())
                measured = measure_batch(tokenizer, pixel_values, image_grids, num_scales=num_scales)
                usage.add(measured.image_codes, image_grids)
                for name, values in self.accelerator.gather_for_metrics(measured.values).items():
                    gathered.setdefault(name, []).append(values)
        tokenizer.train(was_training)

        values = {name: torch.cat(parts) for name, parts in gathered.items()}
        means = {name: value.nanmean().item() for name, value in values.items()}
        # NaN: SSIM where no image is as large as its window.
        metrics = {name: round(mean, 4) for name, mean in means.items() if mean == mean}
        metrics |= {name: value for name, value in usage.metrics().items() if name.startswith("codebook_")}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(values["psnr"]))

    # ---- Around a step ----

    def on_epoch_begin(self) -> None:
        # accelerate's loader tells the data set no epoch where its sampler has one: in the epoch in which a run goes
        # on, and always with several processes.
        if isinstance(self.train_dataset, NextFlowImageDataset):
            self.train_dataset.set_epoch(int(self.state.epoch))

    def on_step_begin(self) -> None:
        # Before the first quantised step: the codes begin among the features that the autoencoder has learnt.
        is_time = self.state.global_step == self.args.continuous_steps
        if is_time and self.args.codebook_init_batches and self.args.trains_codebook:
            self.initialize_codebook()

    def on_optimizer_step(self) -> None:
        if self.adversary is not None:
            # The factor of the schedule alone, whatever the tokenizer's own rate.
            factor = self.lr_scheduler.get_last_lr()[0] / self.args.learning_rate
            self.adversary.step(learning_rate_factor=factor, max_grad_norm=self.args.max_grad_norm)

    def on_step_end(self) -> None:
        args, step = self.args, self.state.global_step
        if args.dead_code_steps and self.args.trains_codebook and step > args.continuous_steps:
            self.usage.end_step()
            if step < args.dead_code_until * self.state.max_steps:
                self.restarted_codes += self.restart_dead_codes()
        super().on_step_end()

    # ---- Checkpoints ----

    def own_state(self) -> dict[str, Any]:
        adversary = None if self.adversary is None else self.adversary.state_dict()
        return {**super().own_state(), "adversary": adversary, "steps_unused": self.usage.steps_unused}

    def load_own_state(self, state: dict[str, Any], path: str) -> None:
        super().load_own_state(state, path)
        self.usage.steps_unused = state["steps_unused"]
        if (state["adversary"] is None) != (self.adversary is None):
            raise ValueError(
                f"{path} has {'no' if state['adversary'] is None else 'an'} adversary, but adversarial_loss_weight is "
                f"{self.args.adversarial_loss_weight}"
            )
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])


def check_trainable(
    model: NextFlowVisionTokenizer,
    args: NextFlowVisionTokenizerTrainingArguments,
    semantic_teacher: Siglip2VisionModel | None,
) -> None:
    """Raises `ValueError` where model, stage and parallelism do not go together."""
    if args.stage == "joint" and semantic_teacher is None:
        raise ValueError("semantic_teacher is None, expected a Siglip2VisionModel: stage 'joint' distils one")
    if args.stage == "joint" and model.config.semantic_distance_weight == 0:
        raise ValueError(
            "semantic_distance_weight is 0, what stage 'pixel' leaves behind; stage 'joint' expects a positive one: "
            "load the tokenizer with semantic_distance_weight=1.0"
        )
    on_whole_parameters = {
        "dead_code_steps": args.trains_codebook and args.dead_code_steps,
        "codebook_init_batches": args.trains_codebook and args.codebook_init_batches,
        "adversarial_adaptive": args.adversarial_loss_weight and args.adversarial_adaptive,
        "ema_decay": args.ema_decay is not None,
    }
    if (args.fsdp or args.deepspeed) and (names := [name for name, works in on_whole_parameters.items() if works]):
        raise ValueError(
            f"{names[0]} is {getattr(args, names[0])}, expected none with FSDP or DeepSpeed: it works on whole "
            "parameters, and those are sharded there. Train with DDP"
        )


def prepare_stage(model: NextFlowVisionTokenizer, stage: str) -> None:
    """Set which parameters train, and the weight of the semantic distance, for one of the stages (§3.1)."""
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, expected one of {STAGES}")
    for name, parameter in model.named_parameters():
        semantic = name.startswith((*SEMANTIC_PARTS, SEMANTIC_CODEBOOK))
        if stage == "decoder":
            parameter.requires_grad_(name.startswith("pixel_decoder"))
        else:
            parameter.requires_grad_(stage == "joint" or not semantic)
    if stage == "pixel":
        # The semantic half is untrained in this stage, and must not take part in choosing codes.
        model.config.semantic_distance_weight = 0.0
