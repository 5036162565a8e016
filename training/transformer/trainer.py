"""`NextFlowTrainer`: transformers' Trainer for the transformer, on rows of tokens and codes.

Only the difference is here: tokens are counted as the loss supervises them, the losses are logged apart for text, for
images and for every scale, a loss that is no number stops the training, and a checkpoint is there whole or not at all.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import TorchDynamoPlugin
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from ...modeling_nextflow.grids_nextflow import get_image_layout
from ...modeling_nextflow.loss_nextflow import get_targets
from ..common.checkpoints import StagedCheckpointsMixin
from ..common.finite_steps import FiniteStepsMixin
from ..common.flops import batch_flops, peak_flops
from ..common.processes import check_processes
from ..common.refusals import OWN_LOSS, check_arguments, check_trainer_options
from ..common.sharding import class_of_user
from ..data.collator import NextFlowDataCollator
from ..data.packing import EndlessPackedDataset
from .arguments import NextFlowTrainingArguments
from .freezing import is_head_cut, join_head
from .layers import LayersCallback, find_decoder
from .muon import MuonWithAdamW, matrices_of


ROW_IDS = "row_ids"  # of a batch, for the names of bad rows; no input of the model


class NextFlowTrainer(FiniteStepsMixin, StagedCheckpointsMixin, Trainer):
    """
    Trains [`NextFlowForCausalLM`] (§3.2).

    Takes what `Trainer` takes. The default collator is [`NextFlowDataCollator`]. The loss is the sum of weighted token
    losses over the number of supervised tokens of the whole optimisation step, so accumulating gradients, on however
    many processes, equals one larger batch. The weights of an image's codes add up to their number (equation 2): that
    number, unweighted, is what an image counts.

    Evaluation reports the same loss over the whole evaluation set. Processes whose shares differ repeat a few rows.

    A step whose loss or gradient is not finite raises [`NotFiniteError`] on every process before the weights change,
    and the batch is saved. A checkpoint is written beside its place and moved there when it is complete.
    """

    def __init__(self, model=None, args=None, data_collator=None, **kwargs):
        check_trainer_options(kwargs, OWN_LOSS)
        if args is not None:  # may be transformers' own
            check_arguments(args)
        if data_collator is None:
            if model is None:
                raise ValueError("with model_init, pass data_collator=NextFlowDataCollator(pad_token_id)")
            data_collator = NextFlowDataCollator(pad_token_id=model.config.pad_token_id)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        check_processes(self)
        if self._wants_muon and (self.optimizer is not None or self.optimizer_cls_and_kwargs is not None):
            raise ValueError("use_muon makes the optimizer, but optimizers or optimizer_cls_and_kwargs name another")
        self.model_accepts_loss_kwargs = True  # the number that is counted below, where the model counts labels
        # Between logs, and during an evaluation.
        self._training_losses = _LossSums()
        self._evaluation_losses = _LossSums()
        self._flops, self._flops_to_log, self._clock = 0.0, 0.0, 0.0
        self.add_callback(LayersCallback(self))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, EndlessPackedDataset):
            return rows.sampler()
        return super()._get_train_sampler(rows)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.torch_compile:  # the layers alone are compiled: see `LayersCallback`
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")

    # --- optimiser

    @property
    def _wants_muon(self) -> bool:
        return isinstance(self.args, NextFlowTrainingArguments) and self.args.use_muon

    def create_optimizer(self, model=None):
        """`Trainer`'s method; with `use_muon` the optimizer is [`MuonWithAdamW`]."""
        if self.optimizer is None and self._wants_muon:
            self.optimizer = self._create_muon(self.model if model is None else model)
        return super().create_optimizer(model)

    def _create_muon(self, model: torch.nn.Module) -> MuonWithAdamW:
        matrices = matrices_of(self.accelerator.unwrap_model(model).model.layers)
        of_muon = {id(matrix) for matrix in matrices}
        names = self.get_decay_parameter_names(model)
        decayed, others = [], []
        for name, weight in model.named_parameters():
            if weight.requires_grad and id(weight) not in of_muon:
                (decayed if name in names else others).append(weight)
        return MuonWithAdamW(
            matrices,
            [
                {"params": decayed, "weight_decay": self.args.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            fused=self.args.optim == "adamw_torch_fused",
            in_bfloat16=self.args.bf16,
        )

    # --- counting

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        # transformers would count labels; codes are supervised without one, and placeholders' labels are not read.
        counted = [{"labels": batch["labels"], "shift_labels": self._targets(batch)} for batch in batch_samples]
        num_items = super()._get_num_items_in_batch(counted, device)
        # It was divided by the processes that share a batch, which makes a float of it; FSDP would round that.
        return num_items.round().long() if torch.is_tensor(num_items) else num_items

    def _targets(self, batch: dict) -> torch.Tensor:
        """What is supervised, to be counted: which code it is does not matter, and pixels have none yet."""
        config = self.accelerator.unwrap_model(self.model).config
        layout = codes = None
        if batch.get("image_grids") is not None:
            layout = get_image_layout(config, batch["input_ids"], batch["image_grids"])
        if layout is not None:
            codes = layout.is_slot.new_zeros(int(layout.is_slot.sum()), dtype=torch.long)
        targets, _ = get_targets(
            batch["input_ids"],
            batch["labels"],
            layout,
            codes,
            batch.get("image_grids"),
            text_vocab_size=config.text_vocab_size,
            alpha=config.scale_loss_alpha,
        )
        return targets

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            # `Trainer` drops columns that `forward` does not take; from this one the collator makes `row_ids`.
            self._signature_columns.append("row_id")

    # --- losses

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """`Trainer`'s method; an error of a batch names its rows."""
        known = {name: value for name, value in inputs.items() if name != ROW_IDS}
        try:
            loss, outputs = super().compute_loss(
                model, known, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        except ValueError as error:  # tokens, grids and codes do not fit together, or a code is out of range
            error.add_note(f"It was raised by a batch of the rows {inputs.get(ROW_IDS, '(without row_id)')}")
            raise
        if model.training:
            self.watch(inputs, loss)
        if outputs.get("scale_losses") is not None:
            losses = self._training_losses if model.training else self._evaluation_losses
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                num_items_in_batch = num_items_in_batch / self.accelerator.num_processes  # as `Trainer` does, in place
            losses.add(outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """`Trainer`'s method, without logits where only the loss is asked for."""
        if prediction_loss_only:  # the loss does without the logits of the whole sequence
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer`'s method, with the losses of text and of each scale, and the speed."""
        if "loss" in logs:
            _, parts = self._training_losses.pop(self.accelerator)
            logs.update(parts)
            logs.update(self._speed())
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """`Trainer`'s method; the loss is the mean over all tokens, and not over batches."""
        self._evaluation_losses = _LossSums()
        with self._untimed():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, parts = self._evaluation_losses.pop(self.accelerator)
        if loss is not None:  # transformers' mean of the batches' means would weigh the tokens of small batches more
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in parts.items()})
        return output

    # --- speed

    def floating_point_ops(self, inputs: dict) -> float:
        """Counted on the device, and read in [`~NextFlowTrainer.store_flos`]: a step does not wait for a number."""
        config = self.accelerator.unwrap_model(self.model).config
        if "pixel_values" not in inputs:
            self._flops = self._flops + batch_flops(config, inputs, frozen=self._is_frozen)
        return 0.0

    @property
    def _is_frozen(self) -> bool:
        layers = find_decoder(self.model).layers
        return not layers[0].mlp.down_proj.weight.requires_grad

    def store_flos(self) -> None:
        """`Trainer`'s method, with the operations that were counted since it was last called."""
        before = self.state.total_flos
        # `Trainer` adds this up over the processes: `total_flos` and the difference below are those of all.
        self.current_flos, self._flops = float(self._flops), 0.0
        super().store_flos()
        self._flops_to_log += self.state.total_flos - before

    def start_clock(self) -> float:
        """Start anew to count the seconds of the training alone, and return those so far."""
        begin, self._clock = self._clock, time.perf_counter()
        return self._clock - begin

    def _speed(self) -> dict[str, float]:
        """TFLOP/s of a process since the last log, and the share of what its GPU can do, where that is known."""
        rate = self._flops_to_log / self.start_clock() / self.args.world_size
        self._flops_to_log, peak = 0.0, peak_flops(self.args.device)
        return {"tflops": float(f"{rate / 1e12:.4g}")} | ({} if peak is None else {"mfu": round(rate / peak, 4)})

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._clock += time.perf_counter() - begin

    # --- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        with self._untimed():
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        is_here = state_dict is None or len(state_dict) > 0  # FSDP gathers it on the first process alone
        if is_head_cut(model) and is_here:
            state_dict = join_head(model, model.state_dict() if state_dict is None else state_dict)
        with class_of_user(self.model):
            super()._save(output_dir, state_dict=state_dict)


class _LossSums:
    """Running sums of losses (float32) and token counts, on the device until they are read."""

    def __init__(self):
        self._sums: list[torch.Tensor] | None = None

    def add(self, outputs: dict, num_items: torch.Tensor | int | None) -> None:
        """`outputs` of the model, and the number that its loss was divided by if not its own."""
        counts = outputs["scale_counts"]
        # The loss is a mean. Times its denominator it is a sum, which adds up over micro-batches and processes.
        weighted = outputs["loss"].detach().float() * (counts.sum() if num_items is None else num_items)
        sums = [weighted, outputs["scale_losses"].float() * counts, counts]
        self._sums = sums if self._sums is None else [old + new for old, new in zip(self._sums, sums)]

    def pop(self, accelerator) -> tuple[float | None, dict[str, float]]:
        """The weighted mean over all processes, the means of text, images and scales, unweighted; and start anew."""
        if self._sums is None:
            return None, {}
        weighted, sums, counts = (accelerator.reduce(part).cpu() for part in self._sums)
        self._sums = None
        return (weighted / counts.sum()).item(), _loss_parts(sums, counts)


def _loss_parts(sums: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """`text_loss`, `image_loss` and `loss_scale_k`: unweighted mean cross-entropies in nats."""
    parts = {}
    if counts[0] > 0:
        parts["text_loss"] = round((sums[0] / counts[0]).item(), 4)
    if counts[1:].sum() > 0:
        parts["image_loss"] = round((sums[1:].sum() / counts[1:].sum()).item(), 4)
    for scale, (total, count) in enumerate(zip(sums[1:], counts[1:]), start=1):
        if count > 0:
            parts[f"loss_scale_{scale}"] = round((total / count).item(), 4)
    return parts
