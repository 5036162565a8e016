"""The NextFlow transformer with its one head: the loss of text and of image codes, and `generate` (§2.2).

What runs through the layers is backbone_nextflow.py's. It knows codes, never pixels.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple

from .attention_nextflow import get_attention_mask
from .backbone_nextflow import NextFlowModel, NextFlowPreTrainedModel
from .configuration_nextflow import NextFlowConfig
from .generation_nextflow import NextFlowGenerationConfig, NextFlowGenerationMixin
from .grids_nextflow import get_image_layout
from .loss_nextflow import (
    IGNORE_INDEX,
    TokenLosses,
    get_targets,
    linear_cross_entropy,
    mean_by_scale,
    token_scores,
    weighted_cross_entropy,
)
from .sampling_nextflow import with_weight


logger = logging.get_logger(__name__)


@dataclass
class NextFlowCausalLMOutputWithPast(ModelOutput):
    r"""
    Output of [`NextFlowForCausalLM`].

    Args:
        loss (`torch.Tensor`, *optional*): Weighted cross-entropy over the supervised tokens.
        logits (`torch.Tensor` of shape `(batch, kept, vocab_size)`, *optional*):
            Scores of the one head. `None` in training with labels, where nobody reads them.
        past_key_values (`Cache`, *optional*): Keys and values so far.
        hidden_states, attentions (`tuple`, *optional*): As everywhere in transformers.
        scale_losses (`torch.Tensor` of shape `(max_scales + 1,)`, *optional*):
            Unweighted mean cross-entropy of text (entry 0) and of each scale, detached.
        scale_counts (`torch.Tensor` of shape `(max_scales + 1,)`, *optional*): Supervised tokens behind each.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    scale_losses: torch.Tensor | None = None
    scale_counts: torch.Tensor | None = None


@dataclass
class NextFlowTokenScores(ModelOutput):
    r"""
    Output of [`NextFlowForCausalLM`] with `fused_lm_head=True`, the fields of TRL's output of the same name.

    Args:
        loss (`torch.Tensor`): Weighted cross-entropy over the supervised tokens.
        log_probs (`torch.Tensor` of shape `(batch, length)`):
            Log-probability of each target, times its weight in the loss. The negative sum is the loss before it is
            divided. It has a gradient as a sum only.
        entropy (`torch.Tensor` of shape `(batch, length)`): Entropy, in nats, of each token's distribution.
        is_top1 (`torch.Tensor` of shape `(batch, length)`): 1 where the target is the most likely one.
        label_mask (`torch.Tensor` of shape `(batch, length)`): The supervised positions; the rest is 0 everywhere.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


class NextFlowForCausalLM(NextFlowPreTrainedModel, NextFlowGenerationMixin):
    """NextFlow with its one head: next-token prediction for text, next-scale prediction for images."""

    output_modalities = ["image", "text"]
    generation_config_class = NextFlowGenerationConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: dict[str, tuple[list[str], list[str]]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # diffusers' group offloading: sampling calls these one by one, without `forward`; names at any depth.
    _group_offload_block_modules = [
        "model",
        "embed_tokens",
        "connector",
        "image_codebook",
        "scale_embedding",
        "rotary_emb",
        "lm_head",
    ]
    # `Trainer` would pass the number of labels as the loss's denominator, and codes are supervised without a label. So
    # the loss is the mean of each micro-batch, and `NextFlowTrainer`, which counts targets, passes its own number.
    accepts_loss_kwargs = False
    loss_chunk_size = 1024  # tokens whose logits exist at the same time in the loss
    weighted_cross_entropy = staticmethod(weighted_cross_entropy)  # training/transformer/liger.py puts its kernel here

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.model = NextFlowModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.code_rows = config.code_vocabulary  # of the head
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL's trainers replace `forward` by one that predicts the next token at every position, which images do not.
        # The forward of this class understands the same argument.
        if name == "forward" and "fused_lm_head" in getattr(getattr(value, "__code__", None), "co_varnames", ()):
            return
        super().__setattr__(name, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_target_codes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> NextFlowCausalLMOutputWithPast | NextFlowTokenScores:
        r"""
        The loss is the mean over the supervised tokens of the batch, of text and of codes, weighted (equation 2).
        `transformers.Trainer` with gradient accumulation and TRL's `SFTTrainer` average the means of micro-batches;
        [`NextFlowTrainer`] weighs every token of an optimisation step alike.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`):
                Text tokens; an image is `<boi>`, one placeholder per cell of scales 2..K, `<eoi>`.
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*): 0 at padding.
            position_ids (`torch.Tensor` of shape `(batch, length)` or `(4, batch, length)`, *optional*):
                Token positions as integers, from which the rotary axes of text and images follow; or token positions
                and the three rotary axes (scale, row, column). Derived from the tokens if absent. Where token
                positions restart, a packed document begins; packed documents take no `attention_mask`. Sharded
                training in half precision rounds inputs that are not integers: pass `(batch, length)` there.
            past_key_values, inputs_embeds, use_cache (*optional*): As in transformers.
            image_codes (`torch.Tensor` of shape `(total_codes,)`, *optional*):
                Input codes of all images in reading order: scale-major, row-major.
            image_grids (`torch.Tensor` of shape `(n_images, max_scales, 2)`, *optional*):
                One row per `<boi>`: (height, width) of every scale, zero past the last.
            labels (`torch.Tensor` of shape `(batch, length)`, *optional*):
                As for any causal model, shifted inside, -100 where there is no loss. An image is trained on when the
                label at its `<boi>` is not -100; labels at its placeholders and `<eoi>` are not read.
            image_target_codes (`torch.Tensor` of shape `(total_codes,)`, *optional*):
                Targets where self-correction makes them differ from `image_codes`.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Supervised tokens of the whole optimisation step, the loss's denominator. Defaults to this batch's.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions to compute `logits` for: the last so many (0 is all), or which.
            skip_logits (`bool`, *optional*):
                Leave `logits` out. Defaults to `True` in training with labels, where only the loss is read.
            fused_lm_head (`bool`, *optional*, defaults to `False`):
                Return [`NextFlowTokenScores`], as TRL's `SFTTrainer` asks for; needs labels.
            kwargs:
                Those of transformers; among them `shift_labels`, instead of `labels`: the same, one place
                earlier, at the tokens that predict them.

        Raises:
            `ValueError`: where tokens, grids and codes do not fit together, or with `fused_lm_head` in training
            without gradients: then the trainer makes another loss.
        """
        # No parameter of its own: transformers takes every parameter with "label" in its name as one of each batch.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_codes=image_codes,
            image_grids=image_grids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        given_labels = labels if shift_labels is None else shift_labels
        has_labels = given_labels is not None
        if self.training and not torch.compiler.is_compiling():
            self._check_loss_is_own(has_labels, image_grids, fused_lm_head)
        loss = scale_losses = scale_counts = logits = None
        if has_labels:
            if image_grids is None and input_ids is not None:
                self.model.check_no_images(input_ids)  # they would be trained on as text
            if input_ids is None and inputs_embeds is not None and image_grids is not None:
                input_ids = self.model.get_placeholder_ids(inputs_embeds)
            targets, weights, scale = self.get_targets(
                input_ids,
                given_labels,
                image_codes if image_target_codes is None else image_target_codes,  # differ with self-correction
                image_grids,
                is_shifted=shift_labels is not None,
            )
            total, losses, supervised_scale = self.get_losses(hidden_states, targets, weights, scale)
            loss = total / (len(losses) if num_items_in_batch is None else num_items_in_batch)  # of the whole step
            if fused_lm_head:
                return self.score_tokens(hidden_states, targets, weights, scale, total)
            scale_losses, scale_counts = mean_by_scale(losses, supervised_scale, self.config.max_scales)
        if not (self.training and has_labels if skip_logits is None else skip_logits):
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return NextFlowCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            scale_losses=scale_losses,
            scale_counts=scale_counts,
        )

    @staticmethod
    def create_masks_for_generate(
        config: NextFlowConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> torch.Tensor | dict | None:
        """The masks that `generate` makes outside of the compiled forward, for a static cache."""
        if is_first_iteration:  # the prompt may hold images: forward reads their blocks off the tokens
            return attention_mask
        mask = get_attention_mask(config, inputs_embeds, attention_mask, None, past_key_values, None)
        return {"full_attention": mask}

    def get_targets(
        self,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor,
        target_codes: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        is_shifted: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Target id, loss weight and scale (0 for text) of every position, each (batch, length). Raises `ValueError`
        where there are images but no `input_ids`.
        """
        layout = None
        if image_grids is not None:
            if input_ids is None:
                raise ValueError("the targets of images need input_ids")
            layout = get_image_layout(self.config, input_ids, image_grids)
        targets, weights = get_targets(
            input_ids,
            labels,
            layout,
            target_codes,
            image_grids,
            text_vocab_size=self.config.text_vocab_size,
            alpha=self.config.scale_loss_alpha,
            is_shifted=is_shifted,
        )
        return targets, weights, layout.scale if layout is not None else torch.zeros_like(targets)

    def get_losses(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weighted sum of the supervised tokens' cross-entropies; each of them, detached, and its scale.

        Arguments are (batch, length), as [`get_targets`] gives them. The logits are those of a chunk at a time.
        """
        # Text first, then codes: each kind is one slice of the head, and unsupervised positions cost no logits.
        kinds = self._kinds(targets, scale)
        hidden_states, targets, weights, scale = (
            torch.cat([tensor[members] for members, _ in kinds]) for tensor in (hidden_states, targets, weights, scale)
        )
        parts = [(int(members.sum()), rows) for members, rows in kinds]

        # With the head's matrix at hand the gradient is made with the logits; any other head is called chunk by chunk.
        cross_entropy = partial(
            self.weighted_cross_entropy,
            targets=targets,
            token_weights=weights,
            parts=parts,
            chunk_size=self.loss_chunk_size,
        )

        def of_any_head(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            losses, counts = [], [count for count, _ in parts]
            for hidden, target, (_, rows) in zip(hidden_states.split(counts), targets.split(counts), parts):
                losses.append(
                    linear_cross_entropy(
                        hidden,
                        lambda hidden, rows=rows: self.lm_head(hidden)[..., rows],
                        target - rows.start,
                        chunk_size=self.loss_chunk_size,
                    )
                )
            losses = torch.cat(losses)
            return (losses * weights).sum(), losses.detach()

        return *with_weight(self.lm_head, hidden_states, cross_entropy, of_any_head), scale

    def score_tokens(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        scale: torch.Tensor,
        total: torch.Tensor,
    ) -> NextFlowTokenScores:
        """The loss `total` of [`get_losses`] token by token, and what is reported of each. Arguments as there."""
        kinds = self._kinds(targets, scale)
        score = partial(
            token_scores,
            parts=[(targets[members], rows) for members, rows in kinds],
            chunk_size=self.loss_chunk_size,
        )
        scores = with_weight(
            self.lm_head,
            torch.cat([hidden_states[members] for members, _ in kinds]),
            lambda hidden, weight: score(hidden, partial(F.linear, weight=weight)),
            lambda hidden: score(hidden, self.lm_head),
        )
        # Back from the order of kinds to that of the sequence.
        places = torch.cat([members.flatten().nonzero()[:, 0] for members, _ in kinds])
        placed = scores.new_zeros(3, targets.numel()).index_copy(1, places, scores)
        losses, entropy, is_top1 = placed.unflatten(1, targets.shape)
        # Their gradient is that of `total`, which was made with the logits.
        log_probs = -TokenLosses.apply(total, losses * weights)
        mask = targets != IGNORE_INDEX
        return NextFlowTokenScores(total / mask.sum(), log_probs, entropy, is_top1, mask)

    def _kinds(self, targets: torch.Tensor, scale: torch.Tensor) -> list[tuple[torch.Tensor, slice]]:
        """The supervised positions of text, predicted among all rows of the head, and those of image codes, predicted
        among the codes, as they are sampled."""
        # With `joint_image_loss` codes are predicted among all rows, as text is: there is one kind.
        is_code = (scale > 0) & (not self.config.joint_image_loss)
        supervised = targets != IGNORE_INDEX
        return [(supervised & ~is_code, slice(0, self.config.vocab_size)), (supervised & is_code, self.code_rows)]

    @staticmethod
    def _check_loss_is_own(has_labels: bool, image_grids: torch.Tensor | None, fused_lm_head: bool) -> None:
        """In training: raise or warn where a trainer makes its loss outside of the model, from the logits."""
        if not torch.is_grad_enabled():
            if fused_lm_head:
                raise ValueError(
                    "the trainer makes a loss of its own from the logits, where images are not predicted token by "
                    "token: leave out compute_loss_func and label_smoothing_factor, and use TRL's SFTTrainer"
                )
        elif image_grids is not None and not has_labels:
            logger.warning_once(
                "images were passed in training without labels: a loss made from the logits (compute_loss_func, "
                "label_smoothing_factor) is not NextFlow's, as image codes are predicted in place, not one token later"
            )


__all__ = ["NextFlowPreTrainedModel", "NextFlowModel", "NextFlowForCausalLM"]
