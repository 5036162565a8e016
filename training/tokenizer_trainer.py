"""Training of the dual-codebook vision tokenizer (§2.1, §3.1): the three stages, the codebook's health, PSNR.

A `transformers.Trainer`: data, optimiser, checkpoints and logging are the usual ones. What is added is what a vector
quantiser needs (a codebook that starts from data, codes that come back to life, usage in the logs), the losses that
attach to the pixels, and an evaluation in decibel. It knows images and their grids; where they come from it does not.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import Dataset
from transformers import Siglip2VisionModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import (
    NextFlowMultiScaleQuantizer,
    NextFlowVisionTokenizer,
    NextFlowVisionTokenizerOutput,
    schedules_from_grids,
)


STAGES = ("pixel", "joint", "decoder")
SEMANTIC_PARTS = ("semantic_encoder", "encode_task_layer", "semantic_decoder", "decode_task_layer")
SEMANTIC_CODEBOOK = "quantizer.semantic_codebook"
STATE_NAME = "vision_tokenizer_trainer.pt"


@dataclass
class NextFlowVisionTokenizerTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] plus what the tokenizer's training needs.

    Args:
        stage (`str`, *optional*, defaults to `"joint"`):
            `"pixel"`: the pixel branch alone, the semantic one frozen and without a say in the search. `"joint"`:
            everything, distilled from the teacher. `"decoder"`: the pixel decoder alone, on fixed codes (§3.1).
        l1_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the mean absolute error, beside the model's own mean squared error.
        edge_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the mean absolute error of the image gradients: sharp outlines.
        continuous_steps (`int`, *optional*, defaults to 0):
            Steps that train the branches as plain autoencoders, before the codebook is initialised from what they
            have learnt and quantising begins (not specified by the paper).
        codebook_init_batches (`int`, *optional*, defaults to 8):
            Batches whose features the codebook is initialised from when quantising begins. 0 keeps it as it is.
        codebook_init_iterations (`int`, *optional*, defaults to 5):
            k-means iterations of that initialisation. 0 picks features at random.
        dead_code_steps (`int`, *optional*, defaults to 100):
            A code that was not used for so many steps restarts from a feature of the current batch. 0 turns it off.
        dead_code_until (`float`, *optional*, defaults to 0.8):
            Share of the training after which codes no longer restart, so that the decoder can settle.
        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the weights; evaluation and the saved model then use it.
    """

    stage: str = field(default="joint", metadata={"help": "One of pixel, joint, decoder."})
    l1_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the mean absolute error."})
    edge_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the error of the image gradients."})
    continuous_steps: int = field(default=0, metadata={"help": "Steps as an autoencoder, before quantising begins."})
    codebook_init_batches: int = field(default=8, metadata={"help": "Batches that initialise the codebook."})
    codebook_init_iterations: int = field(default=5, metadata={"help": "k-means iterations of the initialisation."})
    dead_code_steps: int = field(default=100, metadata={"help": "Unused steps after which a code restarts."})
    dead_code_until: float = field(default=0.8, metadata={"help": "Share of the training with restarts."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the average of the weights."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage!r}, expected one of {STAGES}")
        # The collator makes the model's inputs; a data set may hold images, which are no argument of `forward`.
        self.remove_unused_columns = False


class NextFlowVisionTokenizerCollator:
    """
    Items to a batch: `pixel_values` float32 (n, 3, max_height, max_width), zero-padded, and `image_grids`
    LongTensor (n, max_scales, 2).

    Args:
        image_processor (`Callable`, *optional*):
            A `NextFlowImageProcessor`. With it an item is `{"image": PIL image}`; without, an item is
            `{"pixel_values": (3, height, width), "image_grids": (scales, 2)}`.
    """

    def __init__(self, image_processor: Callable | None = None):
        self.image_processor = image_processor

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        if self.image_processor is not None:
            batch = self.image_processor([item["image"] for item in items], return_tensors="pt")
            return {name: batch[name] for name in ("pixel_values", "image_grids")}
        pixels = [torch.as_tensor(item["pixel_values"]) for item in items]
        grids = [torch.as_tensor(item["image_grids"]) for item in items]
        height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
        # Plainly contiguous: in channels-last layout GroupNorm's bf16 backward is thirty times slower on a CPU.
        pixel_values = torch.zeros(len(items), 3, height, width)
        image_grids = torch.zeros(len(items), max(len(rows) for rows in grids), 2, dtype=torch.long)
        for index, (image, rows) in enumerate(zip(pixels, grids, strict=True)):
            pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
            image_grids[index, : len(rows)] = rows
        return {"pixel_values": pixel_values, "image_grids": image_grids}


class NextFlowVisionTokenizerTrainer(Trainer):
    """
    Trains a [`NextFlowVisionTokenizer`].

    Args:
        model (`NextFlowVisionTokenizer`): The tokenizer.
        args ([`NextFlowVisionTokenizerTrainingArguments`]): Arguments.
        semantic_teacher (`Siglip2VisionModel`, *optional*):
            Whole, frozen: its last but one hidden state is what the semantic decoder learns to predict. Required by
            the stage `"joint"`.
        data_collator (`Callable`, *optional*): Defaults to [`NextFlowVisionTokenizerCollator`] on ready items.
        kwargs: Everything else of [`~transformers.Trainer`].
    """

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
        if args.stage == "joint" and semantic_teacher is None:
            raise ValueError("semantic_teacher is None, expected a Siglip2VisionModel: stage 'joint' distils one")
        changes_codebook = args.stage != "decoder" and (args.dead_code_steps or args.codebook_init_batches)
        if changes_codebook and (args.fsdp or args.deepspeed):
            raise ValueError(
                f"dead_code_steps is {args.dead_code_steps} and codebook_init_batches {args.codebook_init_batches}, "
                "expected 0 and 0 with FSDP or DeepSpeed: they write single rows of a parameter that is sharded there"
            )
        prepare_stage(model, args.stage)
        super().__init__(model, args, data_collator=data_collator or NextFlowVisionTokenizerCollator(), **kwargs)
        self.semantic_teacher = None
        if semantic_teacher is not None:
            self.semantic_teacher = semantic_teacher.requires_grad_(False).eval().to(self.args.device)
        self.ema = None
        if args.ema_decay is not None:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)

        codebook_size = model.config.codebook_size
        # Both live on the CPU: they are read in Python and saved with the checkpoint.
        self.steps_unused = torch.zeros(codebook_size, dtype=torch.long)
        self.step_code_counts = torch.zeros(codebook_size)
        self.scale_code_counts: dict[int, torch.Tensor] = {}
        self.logged_sums: dict[str, torch.Tensor] = {}
        self.logged_steps = 0
        self.restarted_codes = 0
        self.last_features: tuple[torch.Tensor, tuple] | None = None
        self.add_callback(_CodebookCallback(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, NextFlowVisionTokenizerOutput]:
        pixel_values, image_grids = inputs["pixel_values"], inputs["image_grids"]
        tokenizer = self.accelerator.unwrap_model(model)
        targets = None
        if self.args.stage == "joint":
            with torch.no_grad():
                targets = tokenizer.get_teacher_features(self.semantic_teacher, pixel_values, image_grids)
        with self._capture_features(tokenizer.quantizer):
            outputs = model(pixel_values, image_grids, semantic_targets=targets, quantize=self.quantizes)

        patch_size = tokenizer.config.patch_size
        l1_loss, edge_loss = pixel_losses(outputs.reconstruction, pixel_values, image_grids, patch_size)
        loss = outputs.loss + self.args.l1_loss_weight * l1_loss + self.args.edge_loss_weight * edge_loss
        if model.training:
            self._accumulate_logs(outputs, {"l1_loss": l1_loss, "edge_loss": edge_loss})
            if self.quantizes:
                self._count_codes(outputs.image_codes, image_grids)
        return (loss, outputs) if return_outputs else loss

    @property
    def quantizes(self) -> bool:
        """Whether the codebook is in use yet."""
        return self.state.global_step >= self.args.continuous_steps

    @contextmanager
    def _capture_features(self, quantizer: NextFlowMultiScaleQuantizer) -> Iterator[None]:
        """Keeps the features and the schedule of the last quantiser call: what dead codes restart from."""

        def keep(module: nn.Module, arguments: tuple) -> None:
            self.last_features = (arguments[0].detach().float(), arguments[1])

        handle = quantizer.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _accumulate_logs(self, outputs: NextFlowVisionTokenizerOutput, extra: dict[str, torch.Tensor]) -> None:
        names = ("reconstruction_loss", "quantizer_loss", "commitment_loss", "semantic_loss")
        parts = {name: outputs[name] for name in names if outputs.get(name) is not None} | extra
        for name, value in parts.items():
            self.logged_sums[name] = self.logged_sums.get(name, 0) + value.detach()
        self.logged_steps += 1

    def _count_codes(self, image_codes: torch.LongTensor, image_grids: torch.LongTensor) -> None:
        counts = count_codes_per_scale(image_codes.cpu(), image_grids.cpu(), len(self.steps_unused))
        for index, scale_counts in enumerate(counts):
            self.step_code_counts += scale_counts
            self.scale_code_counts[index] = self.scale_code_counts.get(index, 0) + scale_counts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.logged_steps:
            for name, value in self.logged_sums.items():
                logs[name] = round((value / self.logged_steps).item(), 5)
            for index, counts in self.scale_code_counts.items():
                counts = self.accelerator.reduce(counts.to(self.args.device), "sum").cpu()
                if counts.sum() > 0:
                    usage, perplexity = codebook_statistics(counts)
                    logs[f"usage_scale_{index + 1}"] = round(usage, 4)
                    logs[f"perplexity_scale_{index + 1}"] = round(perplexity, 1)
            if self.scale_code_counts:
                total = self.accelerator.reduce(sum(self.scale_code_counts.values()).to(self.args.device), "sum").cpu()
                usage, perplexity = codebook_statistics(total)
                logs |= {"codebook_usage": round(usage, 4), "codebook_perplexity": round(perplexity, 1)}
            logs["restarted_codes"] = self.restarted_codes
            self.logged_sums, self.scale_code_counts, self.logged_steps, self.restarted_codes = {}, {}, 0, 0
        super().log(logs, start_time)

    # ---- The codebook ----

    @torch.no_grad()
    def initialize_codebook(self) -> None:
        """Initialises the codebook from the features of the first `codebook_init_batches` batches of the data."""
        tokenizer = self.accelerator.unwrap_model(self.model)
        queries = []
        with self._capture_features(tokenizer.quantizer):
            for index, batch in enumerate(self.get_train_dataloader()):
                if index == self.args.codebook_init_batches:
                    break
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    tokenizer.encode(batch["pixel_values"], batch["image_grids"])
                queries.append(scale_queries(tokenizer.quantizer, *self.last_features, quantize=False))
        self.initialize_codebook_from(torch.cat(queries))

    @torch.no_grad()
    def initialize_codebook_from(self, features: torch.FloatTensor) -> None:
        """
        Initialises both codebooks together from features (n, semantic_code_dim + pixel_code_dim), whose two parts have
        length one, by `codebook_init_iterations` of k-means. Raises `ValueError` when n is below the codebook size.
        """
        quantizer = self.accelerator.unwrap_model(self.model).quantizer
        codebook = spherical_kmeans(
            quantizer, features, iterations=self.args.codebook_init_iterations, seed=self.args.seed
        )
        # The processes see different batches: all take the first one's codebook.
        self._write_codes(torch.arange(len(codebook)), broadcast(codebook))

    @torch.no_grad()
    def restart_dead_codes(self) -> int:
        """Gives the codes that were not used for `dead_code_steps` steps a query of the current batch."""
        counts = self.accelerator.reduce(self.step_code_counts.to(self.args.device), "sum").cpu()
        self.step_code_counts.zero_()
        self.steps_unused = torch.where(counts > 0, 0, self.steps_unused + 1)
        dead = (self.steps_unused >= self.args.dead_code_steps).nonzero().flatten()
        if not len(dead):
            return 0
        tokenizer = self.accelerator.unwrap_model(self.model)
        queries = scale_queries(tokenizer.quantizer, *self.last_features, quantize=True)
        chosen = queries[torch.randint(len(queries), (len(dead),), device=queries.device)]
        self._write_codes(dead, broadcast(chosen))
        self.steps_unused[dead] = 0
        return len(dead)

    def _write_codes(self, rows: torch.LongTensor, vectors: torch.FloatTensor) -> None:
        """Writes unit vectors into rows of both codebooks, and forgets the optimiser's moments of those rows."""
        quantizer = self.accelerator.unwrap_model(self.model).quantizer
        dims = [quantizer.config.semantic_code_dim, quantizer.config.pixel_code_dim]
        tables = (quantizer.semantic_codebook.weight, quantizer.pixel_codebook.weight)
        for table, part in zip(tables, vectors.split(dims, -1), strict=True):
            indices = rows.to(table.device)
            table.data[indices] = part.to(table)
            if self.optimizer is not None:
                # Under accelerate the state belongs to the wrapped optimiser; both share the dictionary.
                for name, value in self.optimizer.state.get(table, {}).items():
                    if name in ("exp_avg", "exp_avg_sq"):
                        value[indices] = 0

    # ---- Evaluation ----

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Peak signal-to-noise ratio in decibel, computed per image on pixels in [0, 1], averaged over the images:
        `psnr` of all scales, `psnr_scale_k` of the first k (§2.1). Uses the averaged weights when there are some.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            return {
                name: value
                for key, part in data.items()
                for name, value in self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{key}").items()
            }
        tokenizer = self.accelerator.unwrap_model(self.model)
        was_training = tokenizer.training
        tokenizer.eval()
        sums, count = {}, 0
        with self._averaged_weights(tokenizer):
            for batch in self.get_eval_dataloader(eval_dataset):
                batch = self._prepare_inputs(batch)
                pixel_values, image_grids = batch["pixel_values"], batch["image_grids"]
                codes = tokenizer.encode(pixel_values, image_grids).image_codes
                # The processes see different schedules, and must all take part in every gathering.
                longest = torch.tensor(image_grids.shape[1], device=image_grids.device)
                for scales in range(1, int(self.accelerator.gather(longest[None]).max()) + 1):
                    decoded = tokenizer.decode(codes, image_grids, num_scales=scales)
                    values = peak_signal_to_noise(decoded, pixel_values, image_grids, tokenizer.config.patch_size)
                    values = self.accelerator.gather_for_metrics(values)
                    sums[scales] = sums.get(scales, 0) + values.sum().item()
                count += len(values)
        tokenizer.train(was_training)

        metrics = {f"{metric_key_prefix}_psnr_scale_{scales}": round(v / count, 3) for scales, v in sums.items()}
        # An image's scales beyond its last change nothing, so the longest prefix is everybody's whole.
        metrics[f"{metric_key_prefix}_psnr"] = metrics[f"{metric_key_prefix}_psnr_scale_{max(sums)}"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Averaged weights and checkpoints ----

    @contextmanager
    def _averaged_weights(self, tokenizer: NextFlowVisionTokenizer) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        parameters = list(tokenizer.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the averaged weights when there are some; a checkpoint (an internal call) holds the raw ones."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        with self._averaged_weights(self.accelerator.unwrap_model(self.model)):
            super().save_model(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            state = {"steps_unused": self.steps_unused, "ema": None if self.ema is None else self.ema.state_dict()}
            torch.save(state, os.path.join(folder, STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = torch.load(os.path.join(resume_from_checkpoint, STATE_NAME), weights_only=True)
        self.steps_unused = state["steps_unused"]
        if (state["ema"] is None) != (self.ema is None):
            saved = "no average" if state["ema"] is None else "an average"
            raise ValueError(f"the checkpoint has {saved} of the weights, but ema_decay is {self.args.ema_decay}")
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.args.device)


class _CodebookCallback(TrainerCallback):
    """Calls the trainer where `Trainer` has no method to override: before and after each step."""

    def __init__(self, trainer: NextFlowVisionTokenizerTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        trainer = self.trainer
        if trainer.ema is not None:
            trainer.ema.to(args.device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        trainer = self.trainer
        if state.global_step == args.continuous_steps and args.codebook_init_batches and args.stage != "decoder":
            trainer.initialize_codebook()
            if trainer.ema is not None:  # the average must not remember the random codebook
                trainer.ema.shadow_params = [p.detach().clone() for p in trainer.model.parameters()]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        trainer = self.trainer
        restarts = args.dead_code_steps and args.stage != "decoder"
        if restarts and args.continuous_steps < state.global_step < args.dead_code_until * state.max_steps:
            trainer.restarted_codes += trainer.restart_dead_codes()
        if trainer.ema is not None:
            trainer.ema.step(trainer.accelerator.unwrap_model(trainer.model).parameters())


def prepare_stage(model: NextFlowVisionTokenizer, stage: str) -> None:
    """Sets which parameters train, and the weight of the semantic distance, for one of the stages (§3.1)."""
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, expected one of {STAGES}")
    for name, parameter in model.named_parameters():
        semantic = name.startswith((*SEMANTIC_PARTS, SEMANTIC_CODEBOOK))
        if stage == "decoder":
            parameter.requires_grad_(name.startswith("pixel_decoder"))
        else:
            parameter.requires_grad_(stage == "joint" or not semantic)
    if stage == "pixel":
        model.config.semantic_distance_weight = 0.0


def pixel_losses(
    reconstruction: torch.FloatTensor, pixel_values: torch.FloatTensor, image_grids: torch.LongTensor, patch_size: int
) -> tuple[torch.FloatTensor, torch.FloatTensor]:
    """
    Mean absolute error of the pixels and of their two image gradients. Both tensors are (n, 3, height, width) and
    zero outside of each image, so the padding adds nothing and only the count has to know it.
    """
    last_grids = torch.tensor([schedule[-1] for schedule in schedules_from_grids(image_grids)])
    values = 3 * patch_size**2 * int(last_grids.prod(-1).sum())
    error = reconstruction.float() - pixel_values.float()
    edges = error.diff(dim=-1).abs().sum() + error.diff(dim=-2).abs().sum()
    return error.abs().sum() / values, edges / values


def peak_signal_to_noise(
    decoded: torch.FloatTensor, pixel_values: torch.FloatTensor, image_grids: torch.LongTensor, patch_size: int
) -> torch.FloatTensor:
    """PSNR in decibel of every image (n,), from padded pixels in [-1, 1]; a perfect copy is capped at 100."""
    last_grids = torch.tensor([schedule[-1] for schedule in schedules_from_grids(image_grids)])
    values = 3 * patch_size**2 * last_grids.prod(-1).to(decoded.device)
    squared_error = ((decoded - pixel_values).float() / 2).square().sum((1, 2, 3)) / values
    return -10 * squared_error.clamp(min=1e-10).log10()


def count_codes_per_scale(
    image_codes: torch.LongTensor, image_grids: torch.LongTensor, codebook_size: int
) -> torch.FloatTensor:
    """How often each code occurs in each scale, (max_scales, codebook_size). Codes of -1 (dropped) are not counted."""
    max_scales = image_grids.shape[1]
    cells = image_grids.prod(-1)  # (n, max_scales), zero after an image's last scale
    scales = torch.arange(max_scales).expand_as(cells).flatten().repeat_interleave(cells.flatten())
    present = image_codes >= 0
    joint = scales[present] * codebook_size + image_codes[present]
    return torch.bincount(joint, minlength=max_scales * codebook_size).view(max_scales, codebook_size).float()


def codebook_statistics(counts: torch.Tensor) -> tuple[float, float]:
    """Share of the codes that were used, and the perplexity of their distribution, from counts (codebook_size,)."""
    shares = counts.double() / counts.sum()
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


def scale_queries(
    quantizer: NextFlowMultiScaleQuantizer,
    features: torch.FloatTensor,
    schedule: tuple[tuple[int, int], ...],
    *,
    quantize: bool,
) -> torch.FloatTensor:
    """
    The vectors that all scales look up, (vectors, code_dim), both parts of length one. Without `quantize` each is
    its own code: what a perfect codebook would see, for a codebook that does not exist yet.
    """
    residual, codebook, queries = features, quantizer.codebook(), []
    for grid in schedule:
        query = residual if grid == schedule[-1] else F.interpolate(residual, grid, mode="area")
        query = quantizer.normalize(query.flatten(2).transpose(1, 2))
        vectors = quantizer.lookup(quantizer.search(query, codebook)[0]) if quantize else query
        residual = residual - quantizer.upsample(vectors, grid, schedule[-1])
        queries.append(query.flatten(0, 1))
    return torch.cat(queries)


def spherical_kmeans(
    quantizer: NextFlowMultiScaleQuantizer, features: torch.FloatTensor, *, iterations: int, seed: int = 0
) -> torch.FloatTensor:
    """k-means with the quantiser's own distance; centres are (codebook_size, code_dim), both parts of length one."""
    codebook_size = quantizer.config.codebook_size
    if len(features) < codebook_size:
        raise ValueError(f"got {len(features)} features, expected at least one for each of the {codebook_size} codes")
    generator = torch.Generator().manual_seed(seed)
    centers = features[torch.randperm(len(features), generator=generator)[:codebook_size].to(features.device)]
    for _ in range(iterations):
        nearest = quantizer.search(features[None], centers)[0][0]
        sums = torch.zeros_like(centers).index_add_(0, nearest, features)
        filled = torch.bincount(nearest, minlength=codebook_size) > 0
        centers = torch.where(filled[:, None], quantizer.normalize(sums), centers)
    return centers


def pixels_from_uint8(image: np.ndarray) -> torch.FloatTensor:
    """uint8 (height, width, 3) to float32 (3, height, width) in [-1, 1], contiguous."""
    # The copy: an array that is mapped from a file is read-only, and torch warns about that.
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()
