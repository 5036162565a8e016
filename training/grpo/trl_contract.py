"""All that [`NextFlowGRPOTrainer`] builds on in TRL's trainer and that TRL does not promise, in one place.

Knows TRL's class and nothing of ours. Held from 1.10 on; what moves is named when a trainer is made.
"""

import inspect

import trl
from trl import GRPOTrainer


# Methods that ours replaces or calls -> their parameters.
METHODS = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_prepare_inputs": ["self", "generation_batch"],
    "log": ["self", "logs", "start_time"],
}
# Attributes that ours reads or fills; TRL's constructor or its training makes them.
ATTRIBUTES = (
    "_buffered_inputs", "_logs", "_metrics", "_pending_extra_logs", "_pending_metrics", "_step", "_tokenizer", "beta",
    "current_gradient_accumulation_steps", "epsilon_high", "epsilon_low", "log_completions", "log_multimodal",
    "num_generations", "num_generations_eval", "num_iterations", "ref_model", "reward_func_names", "reward_weights",
    "scale_rewards", "temperature", "top_k", "top_p",
)  # fmt: skip
# Made by the training loop, not by the constructor.
MADE_LATER = {"current_gradient_accumulation_steps"}


def check_trl_methods(trainer_class: type = GRPOTrainer) -> None:
    """Raises `ImportError` where a method of [`METHODS`] is not there or takes something else."""
    for name, expected in METHODS.items():
        method = getattr(trainer_class, name, None)
        found = None if method is None else list(inspect.signature(inspect.unwrap(method)).parameters)
        if found != expected:
            raise ImportError(
                f"trl {trl.__version__} has {trainer_class.__name__}.{name} with the parameters {found}, expected "
                f"{expected}: this version of nextflow_hf does not fit it"
            )


def check_trl_attributes(trainer: GRPOTrainer) -> None:
    """Raises `ImportError` where a trainer that was just made lacks one of [`ATTRIBUTES`]."""
    missing = [name for name in ATTRIBUTES if name not in MADE_LATER and not hasattr(trainer, name)]
    if missing:
        raise ImportError(
            f"trl {trl.__version__} makes a GRPOTrainer without {missing}: this version of nextflow_hf does not fit it"
        )
