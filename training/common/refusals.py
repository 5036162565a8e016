"""What our trainers refuse of transformers': keys that would change the objective, and numbers that mean nothing.

Knows names and values, nothing of a model.
"""

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments


# Keys of `TrainingArguments` that change the loss, what it is computed of or the weights, outside of the model -> why.
REFUSED = {
    "label_smoothing_factor": "the trainer would smooth labels of the next token, which image codes are not",
    "neftune_noise_alpha": "noise would be added to the embeddings of text and to none of an image's",
    "average_tokens_across_devices": "tokens of a process with few of them would weigh more than those of others",
    "bf16_full_eval": "the evaluation would leave the weights themselves rounded; bf16 computes in bfloat16 anyway",
    "fp16_full_eval": "the evaluation would leave the weights themselves rounded; fp16 computes in float16 anyway",
    "label_names": "the model reads `labels` only",
}
OWN_LOSS = {"compute_loss_func": "the loss is the model's own"}
OWN_LOSS_AND_EVALUATION = {
    **OWN_LOSS,
    "compute_metrics": "the evaluation computes its own metrics",
    "preprocess_logits_for_metrics": "the evaluation has no logits",
}
HARMLESS = {"label_names": ["labels"]}  # beside the default

AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1, "save_total_limit": 1, "torch_empty_cache_steps": 1,
    "learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "logging_steps": 0, "eval_steps": 0,
    "eval_delay": 0, "dataloader_num_workers": 0, "seed": 0, "data_seed": 0,
}  # fmt: skip
MORE_THAN = {"num_train_epochs": 0, "save_steps": 0}


def check_arguments(args: TrainingArguments) -> None:
    """Raises `ValueError` where a key would change the objective or has a number that means nothing."""
    for name, reason in REFUSED.items():
        value = getattr(args, name)
        if value not in (TrainingArguments.__dataclass_fields__[name].default, HARMLESS.get(name)):
            raise ValueError(f"{name} is {value!r}, which is not supported: {reason}")
    check_numbers(args, AT_LEAST, MORE_THAN)
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(f"max_steps is {args.max_steps}, expected at least 1, or -1 for num_train_epochs")
    parallelism = args.parallelism_config
    if parallelism is not None and (parallelism.cp_size > 1 or parallelism.sp_size > 1):
        raise ValueError(
            f"parallelism_config has cp_size={parallelism.cp_size} and sp_size={parallelism.sp_size}, expected 1 of "
            "each: a sequence cannot be cut, as the scales of an image stand together"
        )


def check_numbers(args: Any, at_least: Mapping[str, float], more_than: Mapping[str, float] | None = None) -> None:
    """Raises `ValueError` where a field of `args` that is not None lies below its bound."""
    for name, low in at_least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:  # nor NaN
            raise ValueError(f"{name} is {value!r}, expected at least {low}")
    for name, low in (more_than or {}).items():
        value = getattr(args, name)
        if value is not None and not value > low:
            raise ValueError(f"{name} is {value!r}, expected more than {low}")


def check_trainer_options(options: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Raises `ValueError` where an argument of `Trainer` is given that `refused` names, with a reason."""
    for name, reason in refused.items():
        if options.get(name) is not None:
            raise ValueError(f"{name} is not supported: {reason}")
