"""`nextflow-hf train transformer`: the transformer on rows of tokens and codes (§3.2)."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.utils import logging

from ...conversion.assemble import load_processor, load_vision_tokenizer
from ...modeling_nextflow.configuration_nextflow import NextFlowConfig
from ..common.checkpoints import train_to_the_end
from ..common.flops import training_flops
from ..common.run import BatchArguments, world_size
from ..data.collator import PackingCollator
from ..data.packing import EndlessPackedDataset, PackedDataset, PackedIterableDataset, check_fit, document_costs
from ..data.packs import WINDOWS_AT_ONCE, PackingReport
from ..data.shards import load_codes, tokenizer_of
from ..data.streaming import RowStream
from .arguments import DataArguments, ModelArguments, NextFlowTrainingArguments, check_adapter
from .callbacks import SampleImagesCallback
from .freezing import set_trainable
from .memory import micro_batch_tokens, recipe_config, recipe_memory
from .model_loading import load_model
from .trainer import NextFlowTrainer


logger = logging.get_logger(__name__)

SAMPLED_ROWS = 4096  # that padding is estimated from

GROUPS = (ModelArguments, DataArguments, BatchArguments, NextFlowTrainingArguments)
MODEL = "model_name_or_path"


# --- data


def load_rows(folders: Sequence[str], weights: Sequence[float] | None = None, *, seed: int = 0) -> datasets.Dataset:
    """Load extracted folders and mix their rows."""
    return mix_rows([load_codes(folder) for folder in folders], weights, seed=seed)


def mix_rows(
    sources: Sequence[datasets.Dataset], weights: Sequence[float] | None = None, *, seed: int = 0
) -> datasets.Dataset:
    """Mix rows of tokens and codes by the weights of their sources; without weights, concatenate them."""
    if weights is None:
        return datasets.concatenate_datasets(list(sources)).with_format("numpy")
    # Without those of weight 0: sources begin again until each of them has been read to its end.
    read = [(rows, weight / sum(weights)) for rows, weight in zip(sources, weights, strict=True) if weight > 0]
    sources, probabilities = map(list, zip(*read))
    return datasets.interleave_datasets(
        sources, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted"
    ).with_format("numpy")


def load_sources(
    args: DataArguments, seed: int, vision_tokenizer: str | None = None
) -> tuple[list[datasets.Dataset] | RowStream, datasets.Dataset | None]:
    """
    Load the rows to train on (one data set per folder, or one stream) and those to evaluate on.

    Args:
        vision_tokenizer (`str`, *optional*): Fingerprint that the codes of all folders must have: the model's.
    """
    check_same_codes([*args.train_codes, *(args.eval_codes or [])])
    evaluation = load_evaluation_rows(args.eval_codes)
    if args.streaming:
        options = {"seed": seed, "shuffle_buffer": args.shuffle_buffer, "vision_tokenizer": vision_tokenizer}
        return RowStream(args.train_codes, args.train_weights, **options), evaluation
    sources = [load_codes(folder, vision_tokenizer=vision_tokenizer) for folder in args.train_codes]
    if args.eval_rows:
        pairs = [hold_out(rows, args.eval_rows, folder) for rows, folder in zip(sources, args.train_codes)]
        sources, evaluation = [rows for rows, _ in pairs], mix_rows([held_out for _, held_out in pairs])
    return sources, evaluation


def hold_out(rows: datasets.Dataset, count: int, folder: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Split off the last `count` clean rows, those with neither prompt dropout nor self-correction; the rows before them
    are trained on. Evaluation needs clean rows: a loss on sampled codes or without a prompt does not measure answers,
    and the clean codes of a self-corrected image cannot be recovered from its inputs and targets.
    """
    clean = clean_rows(rows)
    if len(clean) < count or clean[-count] == 0:
        raise ValueError(
            f"{folder} has {len(clean)} rows of {len(rows)} without dropout and self-correction, expected eval_rows="
            f"{count} of them behind others: extract rows with purpose=evaluation, and name their folder in eval_codes"
        )
    return rows.select(range(clean[-count])), rows.select(clean[-count:])


def clean_rows(rows: datasets.Dataset) -> np.ndarray:
    """Indices of the rows with neither prompt dropout nor self-correction; empty for shards that do not record it."""
    return np.flatnonzero(rows["is_clean"][:] if "is_clean" in rows.column_names else np.zeros(0))


def load_evaluation_rows(folders: Sequence[str] | None) -> datasets.Dataset | None:
    """Load the folders of `eval_codes`; warn if some of their rows are not clean."""
    if not folders:
        return None
    rows = load_rows(folders)
    if (num_clean := len(clean_rows(rows))) < len(rows):
        logger.warning(
            f"{len(rows) - num_clean} of {len(rows)} rows of eval_codes were extracted with prompt dropout or "
            "self-correction: their loss is a training loss; extract them with purpose=evaluation"
        )
    return rows


def pack_rows(
    rows: list[datasets.Dataset] | RowStream,
    config: NextFlowConfig,
    data_args: DataArguments,
    args: NextFlowTrainingArguments,
) -> PackedDataset | EndlessPackedDataset | PackedIterableDataset:
    """Pack rows; log the packing efficiency unless the rows are a stream, whose length is unknown."""
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"train_sampling_strategy is {args.train_sampling_strategy!r}, but packs have no length to be grouped by"
        )
    options = {
        "max_length": data_args.pack_max_length,
        "max_flops": data_args.pack_max_flops,
        "window": data_args.pack_window,
        "on_long_row": data_args.on_long_row,
    }
    if isinstance(rows, RowStream):
        check_fit(rows.once(), config, max_length=data_args.pack_max_length, max_flops=data_args.pack_max_flops)
        return PackedIterableDataset(rows, config, **options)
    options["seed"] = args.seed
    # Too many rows to plan before the first step: block by block, which knows no length.
    if args.max_steps > 0 and sum(map(len, rows)) > WINDOWS_AT_ONCE * data_args.pack_window:
        counts_file = Path(args.output_dir, "packs.json")
        packs = EndlessPackedDataset(rows, config, data_args.train_weights, **options, counts_file=counts_file)
    else:
        packs = PackedDataset(mix_rows(rows, data_args.train_weights, seed=args.seed), config, **options)
    report = packs.report(args.world_size * args.per_device_train_batch_size)
    if args.should_log:
        logger.warning(
            f"{report.num_documents} documents in {report.num_packs} packs of "
            f"{report.num_tokens / report.num_packs:.0f} tokens on average; of a step's time, processes wait "
            f"{1 - report.balance:.1%} for the busiest"
        )
    return packs


def report_padding(rows: datasets.Dataset, config: NextFlowConfig, args: NextFlowTrainingArguments) -> None:
    """Log what padding costs without packs, estimated from some of the rows, at least those of a step."""
    ranks, batch_size, steps = args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps
    by_length = args.train_sampling_strategy == "batch_rebalance"
    if not by_length and args.train_sampling_strategy != "random":
        return
    at_once = ranks * batch_size * (steps if by_length else 1)
    if not args.should_log or len(rows) < at_once or at_once == 1:
        return
    sampled = np.random.default_rng(args.seed).permutation(len(rows))[: max(SAMPLED_ROWS, at_once)]
    lengths, flops = document_costs(rows.select(sampled), config)
    if by_length:
        options = {"dp_size": ranks, "grad_accum": steps, "shuffle": False}
        samplers = [BatchRebalanceSampler(list(lengths), at_once, rank=rank, **options) for rank in range(ranks)]
        batches = [batch for of_ranks in zip(*samplers, strict=True) for batch in of_ranks]
        kind = f"in steps of {steps} batches of about {batch_size} rows by length"
        advice = "more gradient_accumulation_steps of fewer rows pad less"
    else:
        batches = np.arange(len(lengths) // at_once * at_once).reshape(-1, batch_size)
        kind = f"in batches of {batch_size} rows in random order"
        advice = "pack_max_length, pack_max_flops or train_sampling_strategy=batch_rebalance help"
    report = PackingReport.of_padding(
        lengths,
        flops,
        batches,
        padding_flops=training_flops(config, 1) - training_flops(config, 0),
        num_ranks=ranks,
    )
    logger.warning(
        f"{kind}, {report.padding:.1%} of the tokens are padding; of a step, processes wait {1 - report.balance:.1%} "
        f"for the busiest: {advice}"
    )


def check_same_codes(folders: Sequence[str]) -> None:
    """Refuse folders whose codes come from different vision tokenizers."""
    fingerprints = {folder: tokenizer_of(folder) for folder in folders}
    if len(set(fingerprints.values())) > 1:
        raise ValueError(f"the codes come from different vision tokenizers, expected one: {fingerprints}")


# --- training


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    batch_args: BatchArguments,
    args: NextFlowTrainingArguments,
    *,
    checkpoint: str | None = None,
) -> NextFlowTrainer:
    """Train, from `checkpoint` on if given, evaluate if there are rows for it, and save in `output_dir`."""
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError(f"max_steps is {args.max_steps}, expected at least 1: a stream has no end")
    if is_deepspeed_zero3_enabled() and (args.trainable == "alignment" or model_args.lora_train_image_parts):
        raise ValueError(
            "ZeRO-3 shards the head, of which 'alignment' and lora_train_image_parts train some rows: use "
            "deepspeed_zero2.yaml, ddp.yaml or fsdp2.yaml, which few trained parameters let fit"
        )
    check_adapter(model_args, args)
    if args.eval_strategy != "no" and not (data_args.eval_codes or data_args.eval_rows):
        raise ValueError(f"eval_strategy is {args.eval_strategy.value!r}, which needs eval_codes or eval_rows")
    set_seed(args.seed)
    model = load_model(model_args, in_bfloat16=args.bf16)
    set_trainable(model, args.trainable)
    rows, evaluation = load_sources(data_args, args.seed, model.config.vision_tokenizer_fingerprint)
    collator = None
    if data_args.is_packed:
        # Flex attention masks whole tiles of 128.
        multiple = 128 if model.config._attn_implementation == "flex_attention" else 1
        collator = PackingCollator(model.config, pad_to_multiple_of=multiple)
        rows = pack_rows(rows, model.config, data_args, args)
    elif not data_args.streaming:
        rows = mix_rows(rows, data_args.train_weights, seed=args.seed)
        report_padding(rows, model.config, args)
    trainer = NextFlowTrainer(model, args, collator, train_dataset=rows, eval_dataset=evaluation)
    if args.sample_prompts:
        trainer.add_callback(sampling_callback(trainer, model_args, args))

    def save() -> None:
        if evaluation is not None:
            trainer.evaluate()
        trainer.save_model(args.output_dir)

    train_to_the_end(trainer, checkpoint, save)
    return trainer


def sampling_callback(
    trainer: NextFlowTrainer, model_args: ModelArguments, args: NextFlowTrainingArguments
) -> SampleImagesCallback:
    """The callback that samples `sample_prompts`; raises `ValueError` where a part to decode codes is missing."""
    if not (model_args.processor_name_or_path and model_args.vision_tokenizer_name_or_path):
        raise ValueError(
            "sample_prompts need processor_name_or_path and vision_tokenizer_name_or_path: they make images of codes"
        )
    return SampleImagesCallback(
        trainer,
        load_vision_tokenizer(model_args.vision_tokenizer_name_or_path),
        load_processor(model_args.processor_name_or_path),
        prompts=args.sample_prompts,
        seed=args.sample_seed,
        settings=args.sample_settings,
    )


def plan(
    model_args: ModelArguments, data_args: DataArguments, batch_args: BatchArguments, args: NextFlowTrainingArguments
) -> list[str]:
    """What a training would read and take, for `--dry-run`; no weights are loaded."""
    config = recipe_config(model_args)
    tokens = micro_batch_tokens(config, data_args, args)
    rows_a_step = world_size() * args.gradient_accumulation_steps
    lines = [
        f"data    {folder}: {count_rows(folder)}" for folder in [*data_args.train_codes, *(data_args.eval_codes or [])]
    ]
    lines.append(f"tokens  up to {tokens:,} in a micro-batch, {tokens * rows_a_step:,} in a step")
    if args.max_steps > 0:
        lines[-1] += f", {tokens * rows_a_step * args.max_steps:.3g} in all"
    memory = recipe_memory(config, model_args, args, tokens)
    return [*lines, f"memory  {memory.total_on_gpu / 1e9:.1f} GB of a GPU, if nothing is sharded (nextflow-hf memory)"]


def count_rows(folder: str) -> str:
    """The number of rows in a folder of codes, in words."""
    return f"{len(load_codes(folder)):,} rows" if Path(folder, "manifest.json").is_file() else "not there yet"
