"""Every key of `TrainingArguments` and `GRPOConfig`, and every argument of `Trainer`: what becomes of the objective.

A key stands in a table as one of three kinds:

- "works": it is meant to change the training, and a test shows that it does what it says;
- "refused": with this value our arguments raise an error that names it;
- "same": transformers' matter. A step with this value has the loss and the gradients of a step without it.

A key that is in no table fails the tests: somebody has to look at it first.
"""

import inspect
import os
import signal
from dataclasses import fields
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from accelerate.utils import ParallelismConfig
from datasets import Dataset
from test_grpo_trainer import low_codes, make_trainer
from test_sft_trainer import gradients_of
from test_trainer import ROWS
from toy import PAD, toy_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging
from trl import GRPOConfig
from trl.trainer import grpo_trainer

from nextflow_hf.training.data.collator import NextFlowDataCollator
from nextflow_hf.training.diffusion_decoder.trainer import NextFlowDiffusionDecoderTrainingArguments
from nextflow_hf.training.grpo.config import NextFlowGRPOConfig
from nextflow_hf.training.grpo.trainer import NextFlowGRPOTrainer
from nextflow_hf.training.transformer.arguments import DataArguments, NextFlowTrainingArguments
from nextflow_hf.training.transformer.trainer import NextFlowTrainer
from nextflow_hf.training.vision_tokenizer.arguments import NextFlowVisionTokenizerTrainingArguments
from nextflow_hf.training.vision_tokenizer.recipe import ImageArguments, VisionTokenizerArguments


SAVES = {"save_strategy": "steps", "save_steps": 1}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
WORKERS = {"dataloader_num_workers": 1}
SCHEDULE = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
CHECKPOINTING = {"gradient_checkpointing": True}  # its name in older versions, too
METRICS = {"compute_metrics": lambda prediction, compute_result=True: {}}  # an argument of `Trainer`
ADAMW = "test_training_equivalence.py::test_accumulating"
COMMAND = "test_train_command.py::test_accelerate_launch"

# Key -> (kind, value, the test that shows it, or what a toy step needs besides).
KEYS = {
    "output_dir": ("works", "runs", "test_trainer.py::test_resumed_training_equals_uninterrupted_training"),
    "per_device_train_batch_size": ("works", 1, ADAMW),
    "num_train_epochs": ("same", 2.0, {}),
    "max_steps": ("works", 2, "test_trainer.py::test_resumed_training_equals_uninterrupted_training"),
    "learning_rate": ("same", 1e-3, {}),
    "lr_scheduler_type": ("same", "cosine_with_min_lr", SCHEDULE),
    "lr_scheduler_kwargs": ("same", {"min_lr": 1e-6}, SCHEDULE),
    "warmup_steps": ("same", 2, {}),
    "optim": ("same", "sgd", {}),
    "optim_args": ("same", "momentum=0.9", {"optim": "sgd"}),
    "weight_decay": ("same", 0.1, {}),
    "adam_beta1": ("same", 0.5, {}),
    "adam_beta2": ("same", 0.5, {}),
    "adam_epsilon": ("same", 1e-3, {}),
    "optim_target_modules": ("same", ["q_proj"], {}),
    "gradient_accumulation_steps": ("works", 4, ADAMW),
    "average_tokens_across_devices": ("refused", False, ""),
    "max_grad_norm": ("same", 0.1, {}),
    "label_smoothing_factor": ("refused", 0.1, ""),
    "bf16": ("same", True, {}),
    "fp16": ("same", True, {}),
    "bf16_full_eval": ("refused", True, ""),
    "fp16_full_eval": ("refused", True, ""),
    "tf32": ("same", False, {}),
    "activation_checkpointing": ("same", True, {}),
    "activation_checkpointing_kwargs": ("same", {"use_reentrant": False}, CHECKPOINTING),
    "gradient_checkpointing": ("same", True, {}),
    "gradient_checkpointing_kwargs": ("same", {"use_reentrant": False}, CHECKPOINTING),
    "torch_compile": ("same", True, COMPILED),
    "torch_compile_backend": ("same", "eager", COMPILED),
    "torch_compile_mode": ("same", "default", COMPILED),
    "use_liger_kernel": ("works", True, "test_liger.py::test_trainer_takes_use_liger_kernel"),
    "liger_kernel_config": ("works", {"rope": False}, "test_liger.py::test_what_liger_cannot_do_is_refused"),
    "use_cache": ("same", True, {}),
    "neftune_noise_alpha": ("refused", 5.0, ""),
    "torch_empty_cache_steps": ("same", 1, {}),
    "auto_find_batch_size": ("same", True, {}),
    "logging_strategy": ("same", "epoch", {}),
    "logging_steps": ("same", 2, {}),
    "logging_first_step": ("same", True, {}),
    "log_on_each_node": ("same", False, {}),
    "logging_nan_inf_filter": ("same", False, {}),
    "include_num_input_tokens_seen": ("same", "all", {}),
    "log_level": ("same", "error", {}),
    "log_level_replica": ("same", "error", {}),
    "disable_tqdm": ("same", False, {}),
    "report_to": ("same", "tensorboard", {}),
    "run_name": ("same", "a", {}),
    "project": ("same", "a", {}),
    "trackio_space_id": ("same", "a", {}),
    "trackio_bucket_id": ("same", "a", {}),
    "trackio_static_space_id": ("same", "a", {}),
    "eval_strategy": ("same", "steps", {"eval_steps": 1}),
    "eval_steps": ("same", 1, {"eval_strategy": "steps"}),
    "eval_delay": ("same", 1, EVALUATES),
    "per_device_eval_batch_size": ("same", 1, {}),
    "prediction_loss_only": ("same", True, METRICS),
    "eval_on_start": ("same", True, EVALUATES),
    "eval_do_concat_batches": ("same", False, METRICS),
    "eval_use_gather_object": ("same", True, METRICS),
    "eval_accumulation_steps": ("same", 1, METRICS),
    "include_for_metrics": ("same", ["inputs", "loss"], METRICS),
    "batch_eval_metrics": ("same", True, METRICS),
    "save_only_model": ("same", True, SAVES),
    "save_strategy": ("same", "steps", {"save_steps": 1}),
    "save_steps": ("same", 1, {"save_strategy": "steps"}),
    "save_on_each_node": ("same", True, SAVES),
    "save_total_limit": ("same", 1, SAVES),
    "enable_jit_checkpoint": ("same", True, {}),
    "push_to_hub": ("same", True, SAVES),
    "hub_token": ("same", "a", {}),
    "hub_private_repo": ("same", True, {}),
    "hub_model_id": ("same", "a/b", {}),
    "hub_strategy": ("same", "end", {}),
    "hub_always_push": ("same", True, {}),
    "hub_revision": ("same", "a", {}),
    "load_best_model_at_end": ("same", True, {**SAVES, **EVALUATES}),
    "metric_for_best_model": ("same", "loss", {**SAVES, **EVALUATES}),
    "greater_is_better": ("same", True, {**SAVES, **EVALUATES, "metric_for_best_model": "loss"}),
    "ignore_data_skip": ("same", True, {}),
    "restore_callback_states_from_checkpoint": ("same", True, {}),
    "full_determinism": ("same", True, {}),
    "seed": ("same", 1, {}),
    "data_seed": ("same", 1, {}),
    "use_cpu": ("works", True, "test_trainer.py::test_resumed_training_equals_uninterrupted_training"),
    "accelerator_config": ("same", {"even_batches": False}, {}),
    "parallelism_config": ("refused", ParallelismConfig(cp_size=2), ""),
    "dataloader_drop_last": ("same", True, {}),
    "dataloader_num_workers": ("same", 1, {}),
    "dataloader_pin_memory": ("same", False, {}),
    "dataloader_persistent_workers": ("same", True, WORKERS),
    "dataloader_prefetch_factor": ("same", 1, WORKERS),
    "dataloader_multiprocessing_context": ("same", "fork", WORKERS),
    "dataloader_in_order": ("same", False, {}),
    "remove_unused_columns": ("same", False, {}),
    "label_names": ("refused", ["targets"], ""),
    "train_sampling_strategy": ("same", "group_by_length", {}),
    "length_column_name": ("same", "size", {}),
    "ddp_find_unused_parameters": ("same", True, {}),
    "ddp_bucket_cap_mb": ("same", 1, {}),
    "ddp_broadcast_buffers": ("same", True, {}),
    "ddp_static_graph": ("same", True, {}),
    "ddp_backend": ("works", "gloo", "test_train_tokenizer.py::test_two_processes_are_one_with_both_batches"),
    "ddp_timeout": ("same", 60, {}),
    "fsdp": ("works", True, COMMAND),
    "fsdp_config": ("works", {"version": 2}, COMMAND),
    "deepspeed": ("works", {}, "test_train_command.py::test_accelerate_reads_the_configs"),
    "debug": ("same", "underflow_overflow", {}),
    "skip_memory_metrics": ("same", False, {}),
    "do_train": ("same", True, {}),
    "do_eval": ("same", True, {}),
    "do_predict": ("same", True, {}),
    "resume_from_checkpoint": ("works", "a", "test_trainer.py::test_resumed_training_equals_uninterrupted_training"),
    "local_rank": ("same", 0, {}),
}

# What `GRPOConfig` has besides.
GRPO = "test_grpo_trainer.py::"
LOSS = GRPO + "test_loss_is_the_stated_one_off_policy"
GRPO_KEYS = {
    "beta": ("works", 0.3, LOSS),
    "cache_implementation": ("refused", "static", ""),
    "cast_lm_head_to_fp32": ("refused", True, ""),
    "chat_template_kwargs": ("refused", {"a": 1}, ""),
    "delta": ("works", 1.2, LOSS),
    "disable_dropout": ("same", True, {}),
    "ds3_gather_for_generation": ("same", False, {}),
    "entropy_coef": ("refused", 0.1, ""),
    "entropy_coef_delta": ("refused", 0.1, ""),
    "entropy_coef_max": ("refused", 0.1, ""),
    "entropy_coef_min": ("refused", 0.1, ""),
    "entropy_target": ("refused", 0.3, ""),
    "epsilon": ("works", 0.05, LOSS),
    "epsilon_high": ("works", 0.1, LOSS),
    "generation_batch_size": ("works", 16, "test_training_keys.py::test_rollouts_are_shared_by_steps"),
    "generation_kwargs": ("refused", {"do_sample": False}, ""),
    "importance_sampling_level": ("refused", "sequence", ""),
    "log_completions": ("works", True, GRPO + "test_thinking_evaluation_and_logged_completions"),
    "log_completions_hub_repo": ("works", "a/b", "test_training_keys.py::test_completions_may_go_to_the_hub"),
    "log_multimodal": ("same", False, {}),
    "log_unique_prompts": ("same", True, {}),
    "loss_type": ("refused", "dapo", ""),
    "mask_truncated_completions": ("refused", True, ""),
    "max_completion_length": ("refused", 64, ""),
    "max_tool_calling_iterations": ("refused", 2, ""),
    "min_p": ("refused", 0.1, ""),
    "model_init_kwargs": ("works", {"dtype": "bfloat16"}, GRPO + "test_a_repository_brings_all_parts"),
    "multi_objective_aggregation": (
        "works", "normalize_then_sum", GRPO + "test_rewards_may_be_normalised_before_they_are_summed"
    ),
    "num_completions_to_print": ("same", 1, {}),
    "num_generations": ("works", 4, GRPO + "test_advantages_are_those_of_the_groups"),
    "num_generations_eval": ("works", 2, GRPO + "test_thinking_evaluation_and_logged_completions"),
    "num_iterations": ("works", 3, LOSS),
    "off_policy_mask_threshold": ("refused", 0.5, ""),
    "pad_to_multiple_of": ("refused", 8, ""),
    "ref_model_mixup_alpha": ("works", 1.0, GRPO + "test_a_reference_that_follows"),
    "ref_model_sync_steps": ("works", 2, GRPO + "test_a_reference_that_follows"),
    "repetition_penalty": ("refused", 1.2, ""),
    "reward_weights": ("works", [0.5], GRPO + "test_rewards_get_what_they_are_promised"),
    "router_aux_loss_coef": ("refused", 0.1, ""),
    "sapo_temperature_neg": ("refused", 1.2, ""),
    "sapo_temperature_pos": ("refused", 1.2, ""),
    "scale_rewards": ("works", "batch", "test_grpo_math.py::test_group_advantages"),
    "shuffle_dataset": ("works", False, "test_training_keys.py::test_rollouts_are_shared_by_steps"),
    "steps_per_generation": ("works", 2, "test_training_keys.py::test_rollouts_are_shared_by_steps"),
    "sync_ref_model": ("works", True, GRPO + "test_a_reference_that_follows"),
    "temperature": ("works", 0.9, LOSS),
    "top_entropy_quantile": ("refused", 0.2, ""),
    "top_k": ("works", 2, "test_grpo_policy.py::test_drawing_continues_a_prefix"),
    "top_p": ("works", 0.9, "test_grpo_policy.py::test_drawing_continues_a_prefix"),
    "transformers_continuous_batching_config": ("refused", {"a": 1}, ""),
    "trust_remote_code": ("refused", True, ""),
    "use_adaptive_entropy": ("refused", True, ""),
    "use_bias_correction_kl": ("works", False, LOSS),
    "use_transformers_continuous_batching": ("refused", True, ""),
    "use_transformers_paged": ("refused", True, ""),
    "use_vllm": ("refused", True, ""),
    "vespo_k_neg": ("refused", 9.0, ""),
    "vespo_k_pos": ("refused", 9.0, ""),
    "vespo_lambda_neg": ("refused", 9.0, ""),
    "vespo_lambda_pos": ("refused", 9.0, ""),
    "vllm_enable_sleep_mode": ("refused", True, ""),
    "vllm_gpu_memory_utilization": ("refused", 0.5, ""),
    "vllm_group_port": ("refused", 1, ""),
    "vllm_importance_sampling_cap": ("refused", 9.0, ""),
    "vllm_importance_sampling_clip_max": ("refused", 9.0, ""),
    "vllm_importance_sampling_clip_min": ("refused", 9.0, ""),
    "vllm_importance_sampling_correction": ("refused", False, ""),
    "vllm_importance_sampling_mode": ("refused", "a", ""),
    "vllm_max_model_length": ("refused", 64, ""),
    "vllm_mode": ("refused", "server", ""),
    "vllm_model_impl": ("refused", "transformers", ""),
    "vllm_server_base_url": ("refused", "a", ""),
    "vllm_server_host": ("refused", "a", ""),
    "vllm_server_port": ("refused", 1, ""),
    "vllm_server_timeout": ("refused", 1.0, ""),
    "vllm_structured_outputs_regex": ("refused", "a", ""),
    "vllm_tensor_parallel_size": ("refused", 2, ""),
}  # fmt: skip
# Keys that could hide another's effect, or are compared with a tolerance of their own: each has a step of its own.
ALONE = {
    "activation_checkpointing", "auto_find_batch_size", "bf16", "data_seed", "fp16", "full_determinism",
    "gradient_checkpointing", "remove_unused_columns", "seed", "skip_memory_metrics",
    "train_sampling_strategy", "use_cache",
}  # fmt: skip
# Not in the step of GRPO: `eval_on_start` moves the random numbers that images are drawn with; to compile takes long.
NOT_WITH_GRPO = {"eval_on_start", "include_for_metrics", *COMPILED, "torch_compile_mode"}

TRAINER_ARGUMENTS = {
    "model": ("works", None, "test_trainer.py::test_resumed_training_equals_uninterrupted_training"),
    "args": ("works", None, "test_trainer.py::test_resumed_training_equals_uninterrupted_training"),
    "data_collator": ("works", None, "test_train_command.py::test_packs_train_as_padded_rows_do"),
    "train_dataset": ("works", None, "test_trainer.py::test_resumed_training_equals_uninterrupted_training"),
    "eval_dataset": ("works", None, "test_training_equivalence.py::test_evaluation_weighs_tokens_and_not_batches"),
    "processing_class": ("works", None, "test_training_keys.py::test_arguments_of_trainer_do_what_they_say"),
    "model_init": ("works", None, "test_training_keys.py::test_arguments_of_trainer_do_what_they_say"),
    "compute_loss_func": ("refused", lambda *_, **__: None, ""),
    "compute_metrics": ("works", None, "test_training_keys.py::test_metrics_get_logits_and_labels"),
    "callbacks": ("works", None, "test_training_keys.py::test_arguments_of_trainer_do_what_they_say"),
    "optimizers": ("works", None, "test_training_keys.py::test_arguments_of_trainer_do_what_they_say"),
    "optimizer_cls_and_kwargs": ("works", None, "test_training_keys.py::test_arguments_of_trainer_do_what_they_say"),
    "preprocess_logits_for_metrics": ("works", None, "test_training_keys.py::test_metrics_get_logits_and_labels"),
}
TABLES = {**KEYS, **GRPO_KEYS, **TRAINER_ARGUMENTS}


def keys_of(kind: str, table: dict) -> list[str]:
    return [name for name, entry in table.items() if entry[0] == kind]


@pytest.fixture
def options(tmp_path) -> dict:
    return {"output_dir": str(tmp_path), "use_cpu": True}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What some keys change for the whole process; and no key reaches the Hub."""
    for name in ("init_hf_repo", "_push_from_checkpoint", "push_to_hub", "_finish_current_push"):
        monkeypatch.setattr(Trainer, name, lambda self, *args, **kwargs: None)
    verbosity, handler, environment = logging.get_verbosity(), signal.getsignal(signal.SIGTERM), dict(os.environ)
    threads = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(threads[0])
    torch.backends.cudnn.benchmark = threads[1]
    signal.signal(signal.SIGTERM, handler)
    logging.set_verbosity(verbosity)
    os.environ.clear()
    os.environ.update(environment)


def test_every_key_is_in_a_table():
    general, of_grpo = ({item.name for item in fields(kind)} for kind in (TrainingArguments, GRPOConfig))
    assert general <= set(KEYS)
    assert of_grpo - general <= set(GRPO_KEYS)
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} <= set(TRAINER_ARGUMENTS)
    assert {kind for kind, _, _ in TABLES.values()} == {"works", "refused", "same"}


def test_what_works_has_a_test():
    for name in keys_of("works", TABLES):
        file, _, function = TABLES[name][2].partition("::")
        assert f"def {function}(" in (Path(__file__).parent / file).read_text(), name


# --- refused


@pytest.mark.parametrize("name", keys_of("refused", KEYS))
@pytest.mark.parametrize(
    "group",
    [
        NextFlowTrainingArguments,
        NextFlowVisionTokenizerTrainingArguments,
        NextFlowDiffusionDecoderTrainingArguments,
        NextFlowGRPOConfig,
    ],
)
def test_what_changes_the_objective_is_refused_by_name(options, group, name):
    with pytest.raises(ValueError, match=f"^{name} "):
        group(**options, **{name: KEYS[name][1]})


@pytest.mark.parametrize("name", keys_of("refused", KEYS))
def test_our_trainer_refuses_it_in_arguments_of_transformers(options, name):
    args = TrainingArguments(**options)
    setattr(args, name, KEYS[name][1])
    with pytest.raises(ValueError, match=f"^{name} "):
        NextFlowTrainer(toy_model(), args)


@pytest.mark.parametrize("name", [*keys_of("refused", GRPO_KEYS), "use_liger_kernel", "include_for_metrics"])
def test_what_has_no_meaning_for_images_is_refused_by_name(options, name):
    value = {**KEYS, **GRPO_KEYS}[name][1]
    if name not in NextFlowGRPOConfig.__dataclass_fields__:
        pytest.skip(f"this version of TRL has no {name}")
    with pytest.raises(ValueError, match=f"^{name} "):
        NextFlowGRPOConfig(**options, bf16=False, **{name: value})


@pytest.mark.parametrize("name", keys_of("refused", TRAINER_ARGUMENTS))
def test_arguments_of_trainer_that_make_another_loss_are_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name} "):
        NextFlowTrainer(toy_model(), TrainingArguments(**options), **{name: TRAINER_ARGUMENTS[name][1]})


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (NextFlowTrainingArguments, "per_device_train_batch_size", 0),
        (NextFlowTrainingArguments, "gradient_accumulation_steps", -1),
        (NextFlowTrainingArguments, "max_steps", -5),
        (NextFlowTrainingArguments, "max_steps", 0),
        (NextFlowTrainingArguments, "num_train_epochs", 0),
        (NextFlowTrainingArguments, "save_steps", -1),
        (NextFlowTrainingArguments, "learning_rate", -1e-4),
        (NextFlowTrainingArguments, "learning_rate", float("nan")),
        (NextFlowTrainingArguments, "num_train_epochs", float("nan")),
        (NextFlowTrainingArguments, "sample_seed", -1),
        (NextFlowVisionTokenizerTrainingArguments, "per_device_eval_batch_size", 0),
        (NextFlowVisionTokenizerTrainingArguments, "continuous_steps", -1),
        (NextFlowDiffusionDecoderTrainingArguments, "lora_rank", 0),
        (NextFlowDiffusionDecoderTrainingArguments, "warmup_steps", -1),
        (NextFlowGRPOConfig, "per_device_train_batch_size", 0),
        (NextFlowGRPOConfig, "prefix_scales", 0),
        (NextFlowGRPOConfig, "vmr_num_suffixes", 0),
        (NextFlowGRPOConfig, "temperature", 0.0),
        (NextFlowGRPOConfig, "vmr_eta", 0.0),
        (NextFlowGRPOConfig, "max_thinking_tokens", -1),
        (NextFlowGRPOConfig, "rollout_batch_size", 0),
        (NextFlowGRPOConfig, "num_generations", 0),
        (NextFlowGRPOConfig, "num_iterations", 0),
        (NextFlowGRPOConfig, "steps_per_generation", 0),
        (NextFlowGRPOConfig, "beta", -0.1),
        (NextFlowGRPOConfig, "epsilon", float("nan")),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(options, group, name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}, expected"):
        group(**options, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("pack_max_length", 0), ("pack_max_flops", -1.0), ("eval_rows", -1), ("train_weights", [0.0])],
)
def test_numbers_of_the_data_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} is"):
        DataArguments(train_codes=["a"], **{name: value})


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (VisionTokenizerArguments, "merge_codes"),
        (VisionTokenizerArguments, "merge_images"),
        (ImageArguments, "max_eval_images"),
    ],
)
def test_numbers_that_a_tokenizer_would_miss_at_its_end_are_refused(group, name):
    with pytest.raises(ValueError, match=f"^{name} is 0, expected at least 1"):
        group(**({"data": "a"} if group is ImageArguments else {}), **{name: 0})


@pytest.mark.parametrize("name", ["optimizers", "optimizer_cls_and_kwargs"])
def test_two_optimizers_are_refused(options, name):
    model = toy_model()
    optimizer = torch.optim.SGD(model.parameters())
    value = {"optimizers": (optimizer, None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {})}[name]
    with pytest.raises(ValueError, match="use_muon"):
        NextFlowTrainer(model, NextFlowTrainingArguments(**options, use_muon=True), **{name: value})


# --- the same


def step(tmp_path, **changes) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss of an evaluation and of a step, and the gradients of that step."""
    options = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "max_steps": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "save_strategy": "no",
        "train_sampling_strategy": "sequential", **changes,
    }  # fmt: skip
    trainer_options = {name: options.pop(name) for name in METRICS if name in options}
    args = NextFlowTrainingArguments(**options)
    # Rows as data sets give them; the length is a column.
    trainer = gradients_of(NextFlowTrainer)(
        toy_model(), args, NextFlowDataCollator(pad_token_id=PAD), train_dataset=ROWS, eval_dataset=ROWS,
        **trainer_options,
    )  # fmt: skip
    evaluated = trainer.evaluate()["eval_loss"]
    loss = trainer.train().training_loss
    return evaluated, loss, trainer.gradients


@pytest.fixture(scope="module")
def usual_step(tmp_path_factory):
    return step(tmp_path_factory.mktemp("usual"))


def steps_together() -> list[list[str]]:
    """Keys that need the same besides, in one step; those that stand alone in one of their own."""
    known = [name for name in keys_of("same", KEYS) if name in TrainingArguments.__dataclass_fields__]
    groups: dict[tuple, list[str]] = {}
    for name in known:
        groups.setdefault(tuple(sorted(KEYS[name][2])) if name not in ALONE else (name, ""), []).append(name)
    return list(groups.values())


@pytest.mark.parametrize("names", steps_together(), ids=lambda names: names[0])
def test_the_rest_leaves_loss_and_gradients_as_they_are(usual_step, names, tmp_path):
    besides = {key: value for name in names for key, value in KEYS[name][2].items()}
    evaluated, loss, gradients = step(tmp_path, **{**besides, **{name: KEYS[name][1] for name in names}})
    is_half = names[0] in ("bf16", "fp16")
    close = {"rtol": 0.1, "atol": 0.02} if is_half else {"rtol": 1e-4, "atol": 1e-6}
    assert [evaluated, loss] == pytest.approx(usual_step[:2], rel=1e-2 if is_half else 1e-5)
    assert gradients.keys() == usual_step[2].keys()
    for name, gradient in usual_step[2].items():
        torch.testing.assert_close(gradients[name], gradient, msg=lambda text, of=name: f"{of}: {text}", **close)


def test_grpo_with_the_rest_is_the_same(tmp_path):
    table = {**KEYS, **GRPO_KEYS}
    names = [name for name in keys_of("same", table) if name not in ALONE | NOT_WITH_GRPO]
    changes = {name: table[name][1] for name in names if name in NextFlowGRPOConfig.__dataclass_fields__}
    changes |= {"num_generations_eval": 1, "eval_dataset": Dataset.from_list([{"prompt": "a"}])}
    steps = []
    for options in ({}, changes):
        trainer = make_trainer(tmp_path, trainer_class=gradients_of(NextFlowGRPOTrainer), **options)
        steps.append((trainer.train().training_loss, trainer.gradients))
    assert steps[0][0] == pytest.approx(steps[1][0], abs=1e-5)
    for name, gradient in steps[0][1].items():
        torch.testing.assert_close(steps[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_rollouts_are_shared_by_steps(tmp_path):
    prompts = []

    def reward(prompts_given=None, **columns):
        prompts.append(columns["prompts"])
        return low_codes(**columns)

    for options in ({"steps_per_generation": 2}, {"generation_batch_size": 16}):
        prompts.clear()
        make_trainer(tmp_path, reward, max_steps=2, shuffle_dataset=False, **options).train()
        assert prompts == [["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["d"] * 4]


def test_completions_may_go_to_the_hub(tmp_path, monkeypatch):
    repositories = []
    monkeypatch.setattr(grpo_trainer, "create_repo", lambda name, **_: repositories.append(name))
    monkeypatch.setattr(grpo_trainer, "DatasetCard", MagicMock())
    monkeypatch.setattr(grpo_trainer, "CommitScheduler", MagicMock())
    make_trainer(tmp_path, log_completions=True, log_completions_hub_repo="a/b")
    assert repositories == ["a/b"]


# --- arguments of `Trainer`


def test_metrics_get_logits_and_labels(options):
    seen = {}

    def compute(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"count": (prediction.label_ids != -100).sum()}

    trainer = NextFlowTrainer(
        toy_model(),
        TrainingArguments(**options, report_to="none"),
        eval_dataset=ROWS,
        compute_metrics=compute,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate()
    assert seen["shapes"] == ((4, 34), (4, 34)) and metrics["eval_count"] == sum(
        label != -100 for row in ROWS for label in row["labels"]
    )
    assert metrics["eval_loss"] == pytest.approx(
        toy_model()(**NextFlowDataCollator(pad_token_id=PAD)(ROWS)).loss.item(), rel=1e-5
    )


def test_arguments_of_trainer_do_what_they_say(options, tmp_path):
    class Counting(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    args = TrainingArguments(**options, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True)
    collator, counting = NextFlowDataCollator(pad_token_id=PAD), Counting()
    for extra in ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.0})}, {"optimizers": None}):
        model = toy_model()
        if "optimizers" in extra:
            extra = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.0), None)}
        trainer = NextFlowTrainer(model, args, collator, train_dataset=ROWS, callbacks=[counting], **extra)
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), toy_model().parameters()))
    assert counting.steps == 4
    made = NextFlowTrainer(args=args, data_collator=collator, train_dataset=ROWS, model_init=lambda: toy_model())
    given = NextFlowTrainer(toy_model(), args, collator, train_dataset=ROWS)
    assert made.train().training_loss == given.train().training_loss
