"""What the transformer offers to those who sample from it or score what was sampled (§2.2, §3.2.5).

Embed the next scale, place its block, and sample, guide or score codes. The sampling loop, reinforcement learning and
the pipeline need nothing else, and no place in the vocabulary. Knows the head and the codes, no prompts.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .configuration_nextflow import NextFlowConfig
from .rope_nextflow import block_coordinates
from .sampling_nextflow import ScaleStep, guide, sample_codes


if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel as Host  # what `GenerationMixin` asks of its class

    from . import modeling_nextflow  # not `from .file import`, which diffusers' loader would follow in a circle

    NextFlowModel = modeling_nextflow.NextFlowModel
else:
    Host = object


class NextFlowSamplingInterface(Host):
    """Methods of [`NextFlowForCausalLM`] for sampling and scoring, of which none knows how prompts look."""

    config: NextFlowConfig
    if TYPE_CHECKING:  # transformers evaluates what it finds
        model: NextFlowModel
        lm_head: nn.Linear

    def get_scale_terms(self, image_grids: torch.Tensor) -> torch.Tensor:
        """
        What the inputs of each scale of images (images, max_scales, 2) have in common, (images, max_scales, hidden):
        the embedding of the scale and the encoding of their number, which is part of the input.
        """
        scales = torch.arange(self.config.max_scales, device=image_grids.device)
        return self.model.scale_embedding(scales) + self.model.scale_length_encoding(image_grids)[:, None]

    def embed_next_scale(
        self, codes: torch.Tensor, grid: tuple[int, int], next_grid: tuple[int, int], terms: torch.Tensor
    ) -> torch.Tensor:
        """
        Inputs (images, cells, hidden) of the scale of `next_grid`, from `codes` (images, codes of all scales so far),
        the last of which are those of `grid`, and the scale's own `terms` (images, hidden), see [`get_scale_terms`].
        """
        features = self.model.image_codebook(codes[:, -grid[0] * grid[1] :])
        embeds = self.model.connector(self.model.upsampled_features(features, grid, next_grid))
        return (embeds + terms[:, None]).to(self.model.norm.weight.dtype)

    def get_block_positions(self, step: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Rotary positions (3, rows, cells) of consecutive blocks, the first of which takes `step` (rows, 1) of the
        text axis. Made without waiting for the device."""
        extent = self.config.spatial_rope_extent
        places = [block_coordinates(grid, index, extent=extent) for index, grid in enumerate(grids)]
        ahead, row, column = torch.cat(places, dim=1).to(step.device, non_blocking=True)
        step = step + ahead
        return torch.stack([step, row.expand_as(step), column.expand_as(step)])

    def image_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores (..., codebook_size) of the code rows of the head: no other row is multiplied."""
        codes = self.config.code_vocabulary
        weight = plain_weight(self.lm_head)
        if weight is not None:
            return F.linear(hidden_states, weight[codes])
        if has_whole_weight_in_call(self.lm_head):
            return call_with_weight(
                self.lm_head, hidden_states, lambda hidden, weight: F.linear(hidden, weight[codes])
            )
        return self.lm_head(hidden_states)[..., codes]

    def guided_logits(self, hidden_states: Sequence[torch.Tensor], step: ScaleStep, num_images: int) -> torch.Tensor:
        """
        Scores (images, cells, codebook_size) of one scale in fp32, from the hidden states of the prompts and of those
        that guide them, `num_images` each, one after the other.

        The head is linear: fused layers in fp32 guide hidden states, for one product instead of one a condition. In
        half precision the guided states would be rounded more than guided scores are.
        """
        guides_states = self.model.is_fused and hidden_states[0].dtype == torch.float32
        scores = list(hidden_states) if guides_states else [self.image_logits(states) for states in hidden_states]
        scores = (torch.cat(scores) if len(scores) > 1 else scores[0]).float()
        scores, unconditional, imageless, *_ = [*scores.split(num_images), None, None]
        guided = guide(
            scores, unconditional, step.guidance_scale, imageless=imageless, image_scale=step.image_guidance_scale
        )
        return self.image_logits(guided) if guides_states else guided

    @staticmethod
    def sample_scale(
        logits: torch.Tensor,
        step: ScaleStep,
        numbers: torch.Tensor | None,
        given: torch.Tensor | None = None,
        is_given: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Codes (images, cells) of one scale; `given` (images, cells) stay where `is_given`. `numbers` as in
        [`sample_codes`]."""
        codes = sample_codes(logits, step, numbers)
        return codes if given is None or is_given is None else given.where(is_given, codes)

    def get_text_ids(self) -> torch.Tensor:
        """The tokens that text before an image is made of: text without the end of the turn, and `<boi>`, its end."""
        config = self.config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        excluded = torch.tensor([config.image_token_id, config.pad_token_id, *ends], device=self.device)
        ids = torch.arange(config.text_vocab_size + 1, device=self.device)
        ids[-1] = config.boi_token_id
        return ids[~torch.isin(ids, excluded)]

    def score_targets(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, score: Callable[..., tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        """
        What `score(states, head, targets)` gives of every target, float32 of the shape of `targets`, 0 where there is
        none. A code competes with codes alone and text with text, as where they are sampled.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): What the targets are predicted from.
            targets (`torch.Tensor` of shape `(batch, length)`): Token ids of text and codes, negative for none.
            score (`Callable`):
                From states (tokens, hidden), a head that maps them to logits, and targets (tokens,) among these logits
                to tensors (tokens,), such as log-probabilities and entropies.
        """
        codes, ids = self.config.code_vocabulary, self.get_text_ids()
        is_code = (targets >= codes.start) & (targets < codes.stop)
        is_text = (targets >= 0) & ~is_code
        own_targets = targets[is_code] - codes.start, torch.searchsorted(ids, targets[is_text])

        def score_both(states: Sequence[torch.Tensor], code_head: Callable, text_head: Callable) -> list[Any]:
            heads = code_head, lambda hidden: text_head(hidden)[..., ids]
            return [score(*part) for part in zip(states, heads, own_targets)]

        def score_with_weight(states: Sequence[torch.Tensor], weight: torch.Tensor) -> list[Any]:
            heads = (lambda hidden: F.linear(hidden, weight[codes])), (lambda hidden: F.linear(hidden, weight))
            return score_both(states, *heads)

        states = [hidden_states[is_code], hidden_states[is_text]]
        if has_whole_weight_in_call(self.lm_head):  # one call, so that all processes gather the weight as often
            of_codes, of_text = call_with_weight(self.lm_head, states, score_with_weight)
        else:
            of_codes, of_text = score_both(states, self.image_logits, self.lm_head)
        blank = torch.zeros(targets.shape, device=hidden_states.device)
        return tuple(
            blank.masked_scatter(is_code, code).masked_scatter(is_text, text)
            for code, text in zip(of_codes, of_text, strict=True)
        )


def plain_weight(head: nn.Module) -> torch.Tensor | None:
    """The matrix of a head that is nothing else, to be multiplied in part. `None` for one that has its weights, or all
    of them, in its call alone: with an adapter, quantised, offloaded or sharded."""
    # Offloading replaces the `forward` of the very module, sharding hooks into it.
    return head.weight if _is_plain(head) and not head._forward_pre_hooks else None


def has_whole_weight_in_call(head: nn.Module) -> bool:
    """Whether hooks make a plain matrix whole for its call: sharded by DeepSpeed or FSDP2, which gather it there."""
    return _is_plain(head) and bool(head._forward_pre_hooks)


def call_with_weight(head: nn.Linear, hidden_states: torch.Tensor | Sequence[torch.Tensor], function: Callable) -> Any:
    """`function(hidden_states, weight)` in the place of the head's product: in one call of it, so that all processes
    gather the weight as often, however many tokens each has."""
    head.forward = lambda input: function(input, head.weight)
    try:
        return head(hidden_states)
    finally:
        del head.forward


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    if not isinstance(head, nn.Linear) or head.bias is not None or "forward" in vars(head):
        return False
    if type(head) is nn.Linear:
        return type(head.weight) is nn.Parameter
    # Joined of rows that are trained and rows that are not; or FSDP2's class for a linear layer.
    return is_parametrized(head, "weight") or type(head).forward is nn.Linear.forward


__all__ = ["NextFlowSamplingInterface", "call_with_weight", "has_whole_weight_in_call", "plain_weight"]
