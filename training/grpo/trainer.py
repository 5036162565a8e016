"""`NextFlowGRPOTrainer`: TRL's GRPO trainer for images sampled scale by scale (§3.2.5, arXiv:2601.02256), and for the
thought before an image (UniGRPO, arXiv:2603.23500).

Two of TRL's steps are ours: how completions are made and scored, and the loss. Data loading, groups, accumulation,
logging, checkpoints and adapters are TRL's.

Images are sampled with guidance, top-k and top-p; the log-probabilities of the loss have none of these, as in the
paper. The gradient is then that of `E_q[A log p]` with q the sharper of the two distributions: the policy learns from
its own guided images. The gap is not corrected, since codes that q never samples have no weight that would bring them
back. It is bounded: old and new log-probabilities are both those of p, so the clip holds an update to p whatever q
was, and `beta` and `delta` hold it further. `sampling_gap` is logged: `E_q[log p] - E_p[log p]` in nats a code, which
is 0 where q is p, that is without guidance, top-k and top-p. Thoughts are sampled from p itself.
"""

import copy
import itertools
import math
import os
import resource
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed
from trl.trainer.utils import use_adapter

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...pipelines.pipeline_nextflow import NextFlowPipeline
from ...processing.image_loading_nextflow import load_image
from ...processing.processing_nextflow import NextFlowProcessor
from ...processing.scale_schedule_nextflow import num_cells
from ..common.checkpoints import StagedCheckpointsMixin
from ..common.finite_steps import FiniteStepsMixin
from ..common.processes import check_processes
from ..common.refusals import check_trainer_options
from ..common.sharding import call_sharded, class_of_user
from ..data.messages import message
from .config import NO_TEXT_ROLLOUT, NextFlowGRPOConfig
from .objective import (
    clipped_loss,
    combine_rewards,
    gated_advantages,
    group_advantages,
    group_advantages_by_function,
    kl_to_reference,
    mask_to_cells,
    middle_return,
    token_advantages,
)
from .parts import FollowingReference, check_sharding, load_parts, load_reference, replaced, save_reference
from .policy import add_policy_forward, pad_rows, policy_inputs, policy_row
from .reward_calls import RewardCalls
from .rollout import Rollout, conversation_of, decode, encode_rows, sample_codes, sample_thoughts
from .trl_contract import check_trl_attributes, check_trl_methods


logger = logging.get_logger(__name__)

REFUSED_OPTIONS = {
    "reward_processing_classes": "a reward prepares its own inputs",
    "quantization_config": "load the model with it and pass the model",
    "tools": "images have no tool calls",
    "rollout_func": NO_TEXT_ROLLOUT,
    "environment_factory": "the data set has the prompts",
}
# What the trainer tells rewards beside the data set's columns.
OWN_COLUMNS = {"codes", "source_images", "thoughts", "prompts", "report_masks"}


class NextFlowGRPOTrainer(FiniteStepsMixin, StagedCheckpointsMixin, GRPOTrainer):
    """
    Aligns [`NextFlowForCausalLM`] with any reward of its images.

    A step whose loss or gradient is not finite raises [`NotFiniteError`] before the weights change.

    Rows of the data sets have `prompt`, a text or messages, and optionally `images`, the images to edit (for image
    parts without data in messages). All other columns go to the rewards, see [`nextflow_hf.training.rewards`].

    Args:
        model (`str`, [`NextFlowForCausalLM`] or `PeftModel`):
            The policy; or a repository as [`NextFlowPipeline.from_pretrained`] takes it, which brings all parts and
            is loaded in float32 (with adapters, `model_init_kwargs={"dtype": "bfloat16"}` is enough).
        reward_funcs (`Callable`, `str` or a list of them):
            Rewards. A string is the Hub id of a CLIP-like model, see [`CLIPReward`].
        args ([`NextFlowGRPOConfig`], *optional*): Numbers.
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, or for evaluation a `dict` of them): Prompts.
        processing_class ([`NextFlowProcessor`]): Needed unless `model` is a repository.
        callbacks, optimizers, peft_config (*optional*): As in TRL.
        vision_tokenizer ([`NextFlowVisionTokenizer`]): Needed unless `model` is a repository. It is not trained.
        kwargs: TRL's other options, for text; refused.

    Example:

    ```py
    >>> from datasets import Dataset
    >>> from nextflow_hf import NextFlowGRPOConfig, NextFlowGRPOTrainer


    >>> def redness(images, **columns):
    ...     return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]


    >>> trainer = NextFlowGRPOTrainer(
    ...     "hub_cards/nextflow-shapes",
    ...     redness,
    ...     NextFlowGRPOConfig("runs/red", num_generations=8, prefix_scales=2),
    ...     Dataset.from_list([{"prompt": "a circle"}, {"prompt": "two squares"}]),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "nextflow"]
    _name = "NextFlow GRPO"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Callable | str | list[Callable | str],
        args: NextFlowGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict | None = None,
        processing_class: NextFlowProcessor | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        *,
        vision_tokenizer: NextFlowVisionTokenizer | None = None,
        **kwargs: Any,
    ):
        check_trl_methods()
        check_trainer_options(kwargs, REFUSED_OPTIONS)
        if args is not None and not isinstance(args, NextFlowGRPOConfig):
            raise TypeError(f"`args` is {type(args).__name__}, expected NextFlowGRPOConfig")
        model, vision_tokenizer, processing_class = load_parts(model, args, vision_tokenizer, processing_class)
        args = NextFlowGRPOConfig(f"{type(model).__name__}-GRPO") if args is None else args

        # TRL would load the reference again from where the policy came from, which it may have left long ago. It is
        # copied instead, before anything patches the policy's forward.
        needs_reference = args.any_beta != 0 and peft_config is None and not is_peft_model(model)
        reference = copy.deepcopy(model).eval().requires_grad_(False) if needs_reference else None
        if args.sync_ref_model and reference is None:
            raise ValueError("`sync_ref_model` needs a reference model: `beta` other than 0, and no adapters")
        self._train_sampler: torch.utils.data.Sampler | None = None
        self.reward_calls = RewardCalls(reward_funcs, takes_masks=args.mask_propagation)
        for_trl = {"beta": 0.0 if needs_reference else args.any_beta, "model_init_kwargs": None}  # else TRL loads one
        with replaced(args, **for_trl, sync_ref_model=False):
            super().__init__(
                model=model,
                reward_funcs=self.reward_calls.functions,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
                **kwargs,
            )
        check_trl_attributes(self)
        check_processes(self)
        check_sharding(self)
        self.beta = args.beta
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_policy_forward(policy, temperature=self.temperature, chunk_size=args.log_probs_chunk_size)
        if reference is not None:
            self._add_reference(reference)
        vision_tokenizer = vision_tokenizer.eval().requires_grad_(False).to(self.accelerator.device)
        # The policy with its adapters in it: `get_base_model` is the module they were put into.
        self.pipeline = NextFlowPipeline(policy, vision_tokenizer, processing_class)

    def _add_reference(self, reference: PreTrainedModel) -> None:
        add_policy_forward(reference, temperature=self.temperature, chunk_size=self.args.log_probs_chunk_size)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:  # layer by layer, as the policy; TRL would gather all of it at once
            self.ref_model = fsdp2_prepare_model(self.accelerator, reference)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(FollowingReference(ref_model=self.ref_model, accelerator=self.accelerator))

    # ---- rewards

    def _score(self, inputs: list[dict], rollouts: list[Rollout]) -> tuple[torch.Tensor, list, list]:
        """Rewards (samples of all processes, functions), failures infinite; the images; and the masks of rewards."""
        self.reward_calls.masks = [None] * len(inputs)
        images = decode(self.pipeline, rollouts, self.args.rollout_batch_size)
        rows, prompts, completions = [], [], []
        for row, rollout, image in zip(inputs, rollouts, images):
            ids = rollout.prompt.input_ids
            thought = self._tokenizer.decode(ids[rollout.thoughts.start : rollout.thoughts.stop])
            thought = thought.removesuffix(self.pipeline.processor.boi_token)
            text = [{"type": "text", "text": thought}] if thought else []
            prompts.append(row["prompt"])
            completions.append([message("assistant", *text, {"type": "image", "image": image})])
            columns = {name: value for name, value in row.items() if name not in ("image", "images")}
            sources = list(map(load_image, conversation_of(row)[1]))
            given = {"images": image, "codes": rollout.codes, "source_images": sources}
            rows.append({**columns, **given, "thoughts": thought})
        rewards = self._calculate_rewards(rows, prompts, completions, [r.codes.tolist() for r in rollouts])
        return rewards, images, self.reward_calls.masks

    # ---- rollouts

    def _num_prefix_scales(self, grids: Sequence[tuple[int, int]]) -> int:
        wanted = self.args.prefix_scales
        if self.args.vmr_num_suffixes > 1 and wanted >= len(grids):
            raise ValueError(f"`prefix_scales` is {wanted} of {len(grids)} scales, which leaves no suffix for VMR")
        return len(grids) if wanted is None else min(wanted, len(grids))

    def _trains_suffix(self) -> bool:
        """Whether it is the suffix's turn. Counted in rollouts; in updates where an update has several of them."""
        turns = self.args.prefix_updates_per_suffix
        if self.args.vmr_num_suffixes == 1 or turns == 0 or not self.model.training:
            return False
        has_one = math.prod(self._window) >= self.args.gradient_accumulation_steps
        return (self._rollout_index if has_one else self.state.global_step) % (turns + 1) == turns

    def _sample_codes(
        self, prompts: list, generators: list[torch.Generator] | None, **options: Any
    ) -> list[torch.Tensor]:
        args = self.args
        settings = {
            "batch_size": args.rollout_batch_size, "guidance_scale": args.guidance_scale,
            "guidance_schedule": args.guidance_schedule, "temperature": self.temperature, "top_k": self.top_k,
            "top_p": self.top_p, **options,
        }  # fmt: skip
        return self._call_policy(lambda: sample_codes(self.pipeline, prompts, generators=generators, **settings))

    def _call_policy(self, function: Callable[[], Any]) -> Any:
        return call_sharded(self.model_wrapped, self.pipeline.transformer.model, function)

    def _generators(self, count: int, stage: int) -> list[torch.Generator]:
        """One for each sample of this process and each stage of a rollout. A sample then depends neither on the number
        of processes nor on the batch that it is sampled in, and a resumed run samples as an uninterrupted one."""
        first = self.accelerator.process_index * count
        keys = [(self.args.seed, self._rollout_index, stage, sample) for sample in range(first, first + count)]
        seeds = [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) for key in keys]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _prefixes(self, rollouts: list[Rollout]) -> list[torch.Tensor]:
        return [r.codes[: num_cells(r.prompt.grids[: self._num_prefix_scales(r.prompt.grids)])] for r in rollouts]

    @torch.no_grad()
    def _rollout(self, inputs: list[dict], *, shared_prefix: bool) -> tuple[list[Rollout], list[list[Rollout]]]:
        """An image for every row; and with VMR, while prefixes are trained, others with the same prefixes."""
        args = self.args
        size = {name: getattr(args, name) for name in ("height", "width", "aspect_ratio", "resolution")}
        size = {name: value for name, value in size.items() if value is not None}
        thinks = args.max_thinking_tokens > 0
        prompts = encode_rows(self.pipeline, inputs, guided=args.guidance_scale != 1, thinks=thinks, **size)
        thoughts = [range(0)] * len(prompts)
        was_training, options = self.model.training, args.gradient_checkpointing_kwargs
        stages = itertools.count()

        def generators() -> list[torch.Generator] | None:
            return self._generators(len(inputs), next(stages)) if was_training else None

        with (
            disable_gradient_checkpointing(self.model, options),  # TRL's unwrapping would forget the options
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=args.ds3_gather_for_generation
            ),
            self.accelerator.autocast(),
        ):
            self.model.eval()
            if thinks:
                thinking = {"max_tokens": args.max_thinking_tokens, "temperature": self.temperature}
                thinking["generators"] = generators() or ()
                longer = self._call_policy(lambda: sample_thoughts(self.pipeline, prompts, **thinking))
                prompts, thoughts = (list(column) for column in zip(*longer))
            if shared_prefix:
                depth = self._num_prefix_scales(prompts[0].grids)
                codes = self._sample_codes(prompts, generators(), num_scales=depth)  # the prefix alone
                starts = self._leaders([Rollout(*parts) for parts in zip(prompts, codes, thoughts)])
                prompts, thoughts = [start.prompt for start in starts], [start.thoughts for start in starts]
                codes = self._sample_codes(prompts, generators(), prefixes=[start.codes for start in starts])
            else:
                codes = self._sample_codes(prompts, generators())
            rollouts = [Rollout(*parts) for parts in zip(prompts, codes, thoughts)]
            others = []
            if was_training and not shared_prefix:  # VMR: more suffixes of each prefix
                for _ in range(args.vmr_num_suffixes - 1):
                    codes = self._sample_codes(prompts, generators(), prefixes=self._prefixes(rollouts))
                    others.append([Rollout(*parts) for parts in zip(prompts, codes, thoughts)])
            self.model.train(was_training)
        return rollouts, others

    def _leaders(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The first of its group for every sample; a group may lie on several processes."""
        everyone = gather_object(rollouts)
        first = self.accelerator.process_index * len(rollouts)
        return [
            everyone[index // self.num_generations * self.num_generations]
            for index in range(first, first + len(rollouts))
        ]

    # ---- TRL's two steps

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        if taken := OWN_COLUMNS & set(inputs[0]):
            raise ValueError(f"the data set has the columns {sorted(taken)}, which rewards get from the trainer")
        trains_suffix = self._trains_suffix()
        self.reward_calls.num_failed = 0
        if mode == "train" and self._buffered_inputs is not None:
            self._record_peak_memory(mode, "update")
        rollouts, others = self._rollout(inputs, shared_prefix=trains_suffix)

        weights = self.reward_weights.to(self.accelerator.device)
        raw, images, masks = self._score(inputs, rollouts)
        by_function, rewards = combine_rewards(raw, weights, num_generations)
        totals, all_masks, extra = [rewards], [masks], dict(self._pending_extra_logs)
        for suffixes in others:
            self._pending_extra_logs.clear()
            raw, _, masks = self._score(inputs, suffixes)
            totals.append(combine_rewards(raw, weights, num_generations)[1])
            all_masks.append(masks)
        totals = torch.stack(totals)  # (suffixes, samples)
        if others:
            self._pending_extra_logs.clear()
            self._pending_extra_logs.update(extra)  # the table of completions has the first images only
            self._metrics[mode]["vmr/suffix_std"].append(totals.std(0).nanmean().item())
            rewards = middle_return(totals, self.args.vmr_eta)  # the value of each prefix
        if torch.isnan(rewards).all():
            raise ValueError("no sample of the generation batch has a reward: see the failures reported above")

        scored, normalize = self._advantage_function(totals, by_function, weights, num_generations)
        advantages, deviations = normalize(scored)
        own = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        scales = [self._trained_scales(rollout.prompt.grids, trains_suffix) for rollout in rollouts]
        gates = cells = None
        if self.args.mask_propagation:
            gates = self._gates(rollouts, all_masks, scales)
            everyone = self.accelerator.gather(self.accelerator.pad_across_processes(gates.int(), dim=2)).bool()
            cells = gated_advantages(normalize, scored, everyone)[own]
        batch = self._policy_batch(rollouts, scales, gates)
        batch["advantages"] = token_advantages(advantages[own], cells, batch["scale_ids"])
        self._add_fixed_log_probs(batch)
        self._record_rollouts(mode, inputs, images, by_function, rewards, advantages, deviations)
        self._metrics[mode]["trains_suffix"].append(float(trains_suffix))
        self._record_peak_memory(mode, "rollout")
        return batch

    def _advantage_function(
        self, totals: torch.Tensor, by_function: torch.Tensor, weights: torch.Tensor, num_generations: int
    ) -> tuple[torch.Tensor, Callable]:
        """The rewards (samples, suffixes or functions) that advantages are made of, and what makes these of them."""
        if self.args.multi_objective_aggregation == "normalize_then_sum":  # refused with several suffixes
            # A sample that is left out is left out of each reward: here a failure can no more be told from a reward
            # that does not apply.
            by_function = by_function.masked_fill(totals[0].isnan()[:, None], torch.nan)
            return by_function, partial(group_advantages_by_function, weights=weights, num_generations=num_generations)
        eta, scale = self.args.vmr_eta, self.scale_rewards
        return totals.T, lambda rewards: group_advantages(middle_return(rewards.T, eta), num_generations, scale)

    def _gates(self, rollouts: list[Rollout], masks: list[list], scales: list[range]) -> torch.Tensor:
        """Codes that the reward of each suffix looked at, (samples, suffixes, trained codes)."""
        rows = []
        for index, (rollout, trained) in enumerate(zip(rollouts, scales)):
            grids = rollout.prompt.grids
            codes = slice(num_cells(grids[: trained.start]), num_cells(grids[: trained.stop]))
            rows.append(torch.stack([mask_to_cells(of_suffix[index], grids)[codes] for of_suffix in masks], 1))
        return pad_sequence(rows, batch_first=True).transpose(1, 2).to(self.accelerator.device)

    def _policy_batch(
        self, rollouts: list[Rollout], scales: list[range], gates: torch.Tensor | None
    ) -> dict[str, Any]:
        config = self.pipeline.transformer.config
        weights = {"alpha": self.args.scale_loss_alpha, "thinking_weight": self.args.thinking_weight}
        masks = [None] * len(rollouts) if gates is None else gates.any(1)
        rows = [
            policy_row(rollout, config, scales=trained, cell_mask=mask, **weights)
            for rollout, trained, mask in zip(rollouts, scales, masks)
        ]
        return pad_rows(rows, pad_token_id=self._tokenizer.pad_token_id, device=self.accelerator.device)

    def _trained_scales(self, grids: Sequence[tuple[int, int]], trains_suffix: bool) -> range:
        depth = self._num_prefix_scales(grids)
        return range(depth, len(grids)) if trains_suffix else range(depth)

    def _add_fixed_log_probs(self, batch: dict[str, Any]) -> None:
        """Log-probabilities of the policy as it is now, where it will have moved on when they are needed, and of the
        reference."""
        args = self.args
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            # Without an update in between the old log-probabilities are those of the loss itself: the ratio is 1.
            if args.gradient_accumulation_steps % math.prod(self._window) != 0:
                batch["old_per_token_logps"] = self._log_probs(self.model, batch)
            if self.args.any_beta == 0:
                return
            if self.ref_model is not None:
                batch["ref_per_token_logps"] = self._log_probs(self.ref_model, batch)
                return
            peft_model = self.accelerator.unwrap_model(self.model)
            # An adapter that was there before is kept by TRL as "ref"; a new one is switched off.
            with use_adapter(peft_model, adapter_name="ref" if "ref" in peft_model.peft_config else None):
                batch["ref_per_token_logps"] = self._log_probs(self.model, batch)

    def _log_probs(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities (batch, length), some rows at a time."""
        size = self.args.per_device_train_batch_size
        logps = torch.zeros(batch["targets"].shape, device=batch["targets"].device)
        for start in range(0, len(logps), size):
            inputs = policy_inputs(batch, slice(start, start + size))
            with self.accelerator.autocast():
                rows = model(**inputs)["logps"]
            logps[start : start + size, : rows.shape[1]] = rows
        return logps

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        mode = "train" if self.model.training else "eval"
        arguments = policy_inputs(inputs)
        outputs = model(**arguments)
        logps, entropies = outputs["logps"], outputs["entropies"]  # (batch, length)
        length = logps.shape[1]
        weights, advantages = inputs["loss_weights"][:, :length], inputs["advantages"]
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages[:, :length]
        old = inputs.get("old_per_token_logps")
        ratio = (logps - (logps.detach() if old is None else old[:, :length])).exp()
        is_code = inputs["scale_ids"][:, :length] > 0
        low, high, beta = (torch.where(is_code, *pair) for pair in self._numbers_of_codes_and_text())
        losses = clipped_loss(ratio, advantages, epsilon_low=low, epsilon_high=high, delta=self.args.delta)
        divergence = None
        if self.args.any_beta != 0:
            divergence = kl_to_reference(logps, inputs["ref_per_token_logps"][:, :length])
            if self.args.use_bias_correction_kl:
                divergence = divergence * ratio
            losses = losses + beta * divergence
        loss = (losses * weights).sum(1).mean()  # the weights of a sample's codes sum to 1
        if mode == "train":
            self.watch(inputs, loss)

        clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
        per_token = {"entropy": entropies, "clip_ratio": clipped.float(), "sampling_gap": logps.detach() + entropies}
        if divergence is not None:
            per_token["kl"] = divergence.detach()
        self._record_tokens(mode, per_token, inputs["scale_ids"][:, :length], arguments["policy_targets"] >= 0)
        return loss / (self.current_gradient_accumulation_steps if mode == "train" else 1.0)

    def _numbers_of_codes_and_text(self) -> list[tuple[float, float]]:
        """Lower and upper bound of the clip and weight of the KL, each of codes and of the text before the image."""
        epsilon, beta = self.args.thinking_epsilon, self.args.thinking_beta
        pairs = [(self.epsilon_low, epsilon), (self.epsilon_high, epsilon), (self.beta, beta)]
        return [(of_codes, of_codes if of_text is None else of_text) for of_codes, of_text in pairs]

    # ---- logging

    def _record_peak_memory(self, mode: str, phase: str) -> None:
        """Log the largest memory that a process took since the last record, in units of 1e9 bytes."""
        device = self.accelerator.device
        if device.type == "cpu":  # of the process, since its start
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        else:
            peak = torch.accelerator.max_memory_allocated(device)
            torch.accelerator.reset_peak_memory_stats(device)
        peaks = self.accelerator.gather(torch.tensor([peak / 1e9], device=device))
        self._metrics[mode][f"peak_memory_gb/{phase}"].append(peaks.max().item())

    def _record_tokens(
        self, mode: str, per_token: dict[str, torch.Tensor], scale_ids: torch.Tensor, taught: torch.Tensor
    ) -> None:
        """Means over the codes taught, and by scale; text (scale 0) apart."""
        num_scales = self.pipeline.transformer.config.max_scales + 1
        scales = scale_ids[taught]
        counts = torch.bincount(scales, minlength=num_scales).float()
        sums = [counts.new_zeros(num_scales).index_add_(0, scales, v[taught].float()) for v in per_token.values()]
        counts, *sums = self.accelerator.reduce(torch.stack([counts, *sums]), reduction="sum").cpu()
        metrics = self._metrics[mode]
        for name, total in zip(per_token, sums):
            metrics[name].append((total[1:].sum() / counts[1:].sum()).item())
            if counts[0] > 0:
                metrics[f"text/{name}"].append((total[0] / counts[0]).item())
            for scale in counts[1:].nonzero()[:, 0].add(1).tolist():
                metrics[f"scale_{scale}/{name}"].append((total[scale] / counts[scale]).item())

    def _record_rollouts(
        self,
        mode: str,
        inputs: list[dict],
        images: list,
        by_function: torch.Tensor,
        rewards: torch.Tensor,
        advantages: torch.Tensor,
        deviations: torch.Tensor,
    ) -> None:
        metrics = self._metrics[mode]
        for index, name in enumerate(self.reward_func_names):
            values = by_function[:, index]
            values = values[~torch.isnan(values)]
            metrics[f"rewards/{name}/mean"].append(values.mean().item())
            metrics[f"rewards/{name}/std"].append(values.std().item())
        known = rewards[~torch.isnan(rewards)]
        metrics["reward"].append(known.mean().item())
        metrics["reward_std"].append(known.std().item())
        metrics["frac_reward_zero_std"].append((deviations < 1e-8).float().mean().item())
        failed = torch.tensor([float(self.reward_calls.num_failed)], device=self.accelerator.device)
        metrics["rewards/failed"].append(self.accelerator.reduce(failed, reduction="sum").item())

        # What the rewards logged themselves; every process asks for the same names in the same order.
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(list(self._pending_metrics.get(name, [])))
            metrics[name].append(sum(values) / len(values))
        self._pending_metrics.clear()
        columns = sorted(set(gather_object(list(self._pending_extra_logs))))
        extra = {c: gather_object(self._pending_extra_logs.get(c, [None] * len(inputs))) for c in columns}
        self._pending_extra_logs.clear()
        if not self.log_completions:
            return
        for column, values in extra.items():
            self._logs["extra"][column].extend(values)
        self._logs["prompt"].extend(gather_object([row["prompt"] for row in inputs]))
        self._logs["completion"].extend([[message("assistant", {"type": "image"})]] * len(advantages))
        for index, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(by_function[:, index].tolist())
        self._logs["advantages"].extend(advantages.tolist())
        if self.log_multimodal:
            self._logs["images"].extend(gather_object([[_thumbnail(image)] for image in images]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's method, which also gives sampled images to TensorBoard."""
        if self.log_completions and self._logs["images"] and self.accelerator.is_main_process:
            self._log_to_tensorboard([row[0] for row in list(self._logs["images"])[:16]])
        super().log(logs, start_time)

    def _log_to_tensorboard(self, images: list) -> None:
        """TRL shows completions on other boards only."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for index, image in enumerate(images):
                    callback.tb_writer.add_image(
                        f"completions/{index}", np.asarray(image), self.state.global_step, dataformats="HWC"
                    )

    # ---- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with class_of_user(self.model):
            super()._save(output_dir, state_dict=state_dict)

    def save_own_state(self, folder: str) -> None:
        """Where the run is among its rollouts; inside a window of `num_iterations`, what is still to be learnt; and a
        reference that follows."""
        state = {"step": self._step, "window": self._window, "rollouts": None}
        if self._step % math.prod(self._window):
            state["rollouts"] = self._buffered_inputs
        torch.save(state, os.path.join(folder, self._rollouts_file))
        if self.args.sync_ref_model:
            save_reference(self, folder)

    def _get_train_sampler(self, *args, **kwargs) -> torch.utils.data.Sampler | None:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.ref_model is not None:
            load_reference(self, checkpoint)
        for _ in range(int(self.state.epoch) if self._train_sampler is not None else 0):
            next(iter(self._train_sampler), None)  # TRL's sampler shuffles anew at the start of each epoch
        path = os.path.join(checkpoint, self._rollouts_file)
        state = {"step": self.state.global_step * self.args.gradient_accumulation_steps, "window": None}
        if os.path.exists(path):
            state = torch.load(path, map_location=self.accelerator.device.type, weights_only=True)
        self._step = state["step"]  # TRL counts from 0
        if state["window"] == self._window:
            self._buffered_inputs = state["rollouts"]
        elif self._step % math.prod(self._window):
            logger.warning(
                f"{path} is missing or has the window {state['window']}, expected {self._window}: the run goes on "
                "with new rollouts, and not as it would have without the interruption"
            )

    @property
    def _rollout_index(self) -> int:
        return self._step // math.prod(self._window)

    @property
    def _window(self) -> tuple[int, int]:
        """Micro-batches of a rollout, and how often each is learnt from."""
        return self.args.steps_per_generation, self.num_iterations

    @property
    def _rollouts_file(self) -> str:
        return f"rollouts-{self.accelerator.process_index}-of-{self.accelerator.num_processes}.pt"


def _thumbnail(image: Any, side: int = 256) -> Any:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return small
