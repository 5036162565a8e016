"""`NextFlowGRPOConfig`: the numbers of [`NextFlowGRPOTrainer`], and what of TRL's has no meaning for images."""

from dataclasses import MISSING, dataclass, fields

from transformers import TrainingArguments
from trl import GRPOConfig

from ..common.refusals import check_arguments, check_numbers
from ..transformer.arguments import fsdp_recomputes


# What TRL offers for text and cannot be done here -> why, or what there is instead.
NO_TEXT_ROLLOUT = "images are sampled by the policy itself, scale by scale"
OWN_SAMPLING = "it is an option of text generation; images have guidance_scale, temperature, top_k and top_p"
REFUSED = {
    "use_vllm": NO_TEXT_ROLLOUT,
    "use_transformers_continuous_batching": NO_TEXT_ROLLOUT,
    "use_transformers_paged": NO_TEXT_ROLLOUT,
    "min_p": OWN_SAMPLING,
    "repetition_penalty": OWN_SAMPLING,
    "generation_kwargs": OWN_SAMPLING,
    "cache_implementation": OWN_SAMPLING,
    "chat_template_kwargs": "the processor renders prompts as the pipeline does",
    "max_completion_length": "an image has as many codes as its schedule; text before it has max_thinking_tokens",
    "mask_truncated_completions": "an image never ends early: every sample would be masked",
    "max_tool_calling_iterations": "there are no tools",
    "include_for_metrics": "there is no compute_metrics",
    "use_liger_kernel": "the loss needs log-probabilities over the code rows of the head, not a fused cross-entropy",
    "cast_lm_head_to_fp32": "logits are made in the model's dtype and normalised in float32",
    "importance_sampling_level": "ratios are per code, weighted by scale: that of a grid is a product without bounds",
    "off_policy_mask_threshold": "guidance and top-k make every rollout off-policy by design",
    "top_entropy_quantile": "scale_loss_alpha weighs the codes",
    "entropy_coef": "use beta to keep the policy from collapsing",
    "use_adaptive_entropy": "use beta to keep the policy from collapsing",
    "router_aux_loss_coef": "the model has no experts",
    "pad_to_multiple_of": "rows are padded to the longest of them",
    "trust_remote_code": "a repository is loaded with the classes of this package",
}
REFUSED_FAMILIES = {
    "vllm_": NO_TEXT_ROLLOUT,
    "transformers_": NO_TEXT_ROLLOUT,
    "sapo_": "it belongs to another `loss_type`",
    "vespo_": "it belongs to another `loss_type`",
    "entropy_": "use beta to keep the policy from collapsing",
}
# What of TRL's own means here what it means there.
SUPPORTED = {
    "beta", "delta", "disable_dropout", "ds3_gather_for_generation", "epsilon", "epsilon_high",
    "generation_batch_size", "log_completions", "log_completions_hub_repo", "log_multimodal", "log_unique_prompts",
    "loss_type", "model_init_kwargs", "multi_objective_aggregation", "num_completions_to_print", "num_generations",
    "num_generations_eval", "num_iterations", "ref_model_mixup_alpha", "ref_model_sync_steps", "reward_weights",
    "scale_rewards", "shuffle_dataset", "steps_per_generation", "sync_ref_model", "temperature", "top_k", "top_p",
    "use_bias_correction_kl", "wandb_log_unique_prompts",
}  # fmt: skip

AT_LEAST = {
    "prefix_scales": 1, "vmr_num_suffixes": 1, "prefix_updates_per_suffix": 0, "max_thinking_tokens": 0,
    "thinking_weight": 0, "thinking_epsilon": 0, "thinking_beta": 0, "rollout_batch_size": 1,
    "log_probs_chunk_size": 1, "num_generations": 2, "num_iterations": 1, "steps_per_generation": 1,
    "generation_batch_size": 1, "beta": 0, "epsilon": 0, "epsilon_high": 0, "delta": 0, "guidance_scale": 0,
}  # fmt: skip


def refusal(name: str) -> str | None:
    """Why TRL's field `name` is refused, None if it is supported."""
    if name in SUPPORTED:
        return None
    families = [reason for prefix, reason in REFUSED_FAMILIES.items() if name.startswith(prefix)]
    return REFUSED.get(name) or next(iter(families), "it is not known to this version of nextflow_hf")


@dataclass
class NextFlowGRPOConfig(GRPOConfig):
    r"""
    TRL's [`~trl.GRPOConfig`] with what images need. Defaults that differ from TRL's: `num_generations` 16,
    `per_device_train_batch_size` and `gradient_accumulation_steps` 4, `learning_rate` 1e-5, `adam_beta2` 0.95,
    `weight_decay` 0.05, `top_k` 2, `top_p` 0.9, `loss_type` `"grpo"` (no other is possible).

    Vanilla GRPO over the whole sequence is `prefix_scales=None, scale_loss_alpha=0`.

    Args:
        prefix_scales (`int`, *optional*, defaults to 8):
            Scales m that are trained, from the coarsest on. Finer ones are sampled for the reward, and never in a
            training forward. `None` trains all.
        scale_loss_alpha (`float`, *optional*, defaults to 0.6):
            Weight `(h * w) ** -alpha` of a code of an h x w scale (PANW), normalised per image. 0 weighs all alike.
        vmr_num_suffixes (`int`, *optional*, defaults to 1):
            Suffixes K sampled after each prefix, whose rewards make its value (VMR). 1 is off: one suffix, its reward.
        vmr_eta (`float`, *optional*, defaults to 1.0): Temperature of `eta * log mean exp(R / eta)`.
        prefix_updates_per_suffix (`int`, *optional*, defaults to 3):
            With VMR, generations that train the prefix before one trains the finer scales, on images that share
            their prefix in each group. 0 never trains these.
        mask_propagation (`bool`, *optional*, defaults to `False`):
            Where rewards report masks, carry these to the codes behind the pixels. A code is trained only if a mask
            covers it, and on the rewards of the masks that do: its group are the samples that rewards looked at there.
        guidance_scale (`float`, *optional*, defaults to 6.0):
            Guidance of the rollout. 1 is none, 6 is the cfg 5 of VAR, which the paper samples with.
        guidance_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, from 1 on, or `"constant"`.
        height, width (`int`, *optional*): Size of the images, as in the pipeline's call.
        aspect_ratio (`str`, *optional*): Instead of a size. With neither: an edit keeps its source's, else square.
        resolution (`int`, *optional*): Resolution of the images, as in the pipeline's call.
        max_thinking_tokens (`int`, *optional*, defaults to 0):
            Text tokens that the policy may write before the image, asked to think as by `pipe(prompt, think=True)`.
            The thought is trained with the prefix and has the advantage of its image (UniGRPO, arXiv:2603.23500).
        thinking_weight (`float`, *optional*, defaults to 1.0):
            Weight of the mean over the thought's tokens in the loss, beside 1 for the mean over the codes.
        thinking_epsilon (`float`, *optional*): Bound of the clip for the thought. Defaults to that of the codes.
        thinking_beta (`float`, *optional*): Weight of the thought's KL. Defaults to `beta`, that of the codes.
        rollout_batch_size (`int`, *optional*): Images sampled at the same time. Defaults to the generation batch.
        log_probs_chunk_size (`int`, *optional*, defaults to 4096): Tokens whose logits exist at the same time.
    """

    num_generations: int | None = 16
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    learning_rate: float = 1e-5
    adam_beta2: float = 0.95
    weight_decay: float = 0.05
    top_k: int = 2
    top_p: float = 0.9
    loss_type: str = "grpo"

    prefix_scales: int | None = 8
    scale_loss_alpha: float = 0.6
    vmr_num_suffixes: int = 1
    vmr_eta: float = 1.0
    prefix_updates_per_suffix: int = 3
    mask_propagation: bool = False
    guidance_scale: float = 6.0
    guidance_schedule: str = "linear"
    height: int | None = None
    width: int | None = None
    aspect_ratio: str | None = None
    resolution: int | None = None
    max_thinking_tokens: int = 0
    thinking_weight: float = 1.0
    thinking_epsilon: float | None = None
    thinking_beta: float | None = None
    rollout_batch_size: int | None = None
    log_probs_chunk_size: int = 4096

    def __post_init__(self):
        check_arguments(self)
        if self.loss_type != "grpo":
            raise ValueError(f"loss_type is {self.loss_type!r}, expected 'grpo': the scales' weights normalise it")
        general = {item.name for item in fields(TrainingArguments)}
        for item in fields(GRPOConfig):
            reason = REFUSED.get(item.name) if item.name in general else refusal(item.name)
            default = item.default if item.default is not MISSING else item.default_factory()
            if reason is not None and getattr(self, item.name) != default:
                raise ValueError(f"{item.name} is {getattr(self, item.name)!r}, which is not supported: {reason}")
        check_numbers(self, AT_LEAST, {"temperature": 0, "vmr_eta": 0})
        thinking = ("thinking_epsilon", "thinking_beta")
        if self.max_thinking_tokens == 0 and (unused := [one for one in thinking if getattr(self, one) is not None]):
            raise ValueError(f"{unused[0]} is {getattr(self, unused[0])} without max_thinking_tokens: nothing thinks")
        if self.vmr_num_suffixes > 1 and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`multi_objective_aggregation` is {self.multi_objective_aggregation!r}: with `vmr_num_suffixes` > 1 "
                "the value of a prefix needs total rewards, 'sum_then_normalize'"
            )
        if self.vmr_num_suffixes > 1 and self.prefix_scales is None:
            raise ValueError("`vmr_num_suffixes` > 1 needs `prefix_scales`: without a prefix there is no suffix")
        super().__post_init__()
        is_reentrant = (self.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if self.ddp_find_unused_parameters is None and not is_reentrant:
            self.ddp_find_unused_parameters = True  # no text in a prefix: some rows and parameters get no gradient
        if fsdp_recomputes(self):
            self.gradient_checkpointing = self.activation_checkpointing = False

    @property
    def any_beta(self) -> float:
        """The larger weight of a KL, 0 where none needs a reference."""
        return max(self.beta, self.thinking_beta or 0.0)
