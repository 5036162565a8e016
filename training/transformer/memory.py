"""What training takes of one GPU's memory, by arithmetic: nothing is allocated, the model lies on the meta device.

One process, decoder layers recomputed in the backward pass (`activation_checkpointing`), one micro-batch. Accumulating
micro-batches takes no more. CUDA's context and fragmentation come on top: see `HEADROOM`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ...conversion.assemble import subfolder_of
from ...modeling_nextflow.configuration_nextflow import NextFlowConfig
from ...modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from ..common.flops import training_flops
from ..common.folders import TRANSFORMERS, check_source
from .arguments import DataArguments, ModelArguments, NextFlowTrainingArguments, check_adapter
from .freezing import set_trainable
from .model_loading import add_adapter, saved_adapter
from .muon import matrices_of


# States of an optimizer for each parameter, and the bytes of one; None is the dtype of the weights, as in torch.
# bitsandbytes has one byte each, with an fp32 constant for 256 of them.
OPTIMIZERS = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_8bit": (2, 1 + 4 / 256),
    "paged_adamw_8bit": (2, 1 + 4 / 256),
    "paged_adamw_32bit": (2, 4),
    "lion_8bit": (1, 1 + 4 / 256),
    "sgd": (0, None),
}
ADAPTED = ("lora", "qlora")
TRAINABLE = ("all", "alignment", *ADAPTED)
HEADROOM = 0.06  # of the GPU: CUDA's context, workspaces of its libraries, fragmentation


@dataclass(frozen=True)
class TrainingMemory:
    """
    Bytes by purpose.

    Args:
        parameters, trained_parameters (`int`): How many there are.
        weights (`float`): All parameters; under autocast also the casts that it keeps during a step.
        gradients (`float`): Gradients of the parameters that are trained.
        optimizer (`float`): Its states.
        paged_optimizer (`float`): The part of `optimizer` that moves to the host where the GPU is full.
        checkpoints (`float`): Inputs of the layers, and what else is kept of them for the backward pass.
        layer (`float`): What one layer keeps while it is recomputed.
        logits (`float`): One chunk of the loss, and its gradient of the head before it is added to the others'.
    """

    parameters: int
    trained_parameters: int
    weights: float
    gradients: float
    optimizer: float
    paged_optimizer: float
    checkpoints: float
    layer: float
    logits: float

    @property
    def total(self) -> float:
        """Bytes at the peak of a step."""
        # The loss is done with its logits before a layer is recomputed.
        working = max(self.layer, self.logits)
        return self.weights + self.gradients + self.optimizer + self.checkpoints + working

    @property
    def total_on_gpu(self) -> float:
        """The least that must be there at once: without the states that may be paged out."""
        return self.total - self.paged_optimizer

    def sharded(self, processes: int) -> "TrainingMemory":
        """With weights, gradients and states shared by so many processes, as FSDP2 and ZeRO-3 do."""
        names = ("weights", "gradients", "optimizer", "paged_optimizer")
        return replace(self, **{name: getattr(self, name) / processes for name in names})

    def fits(self, gigabytes: float) -> bool:
        """Whether it fits into a GPU of so many gigabytes, with [`HEADROOM`] left."""
        return self.total_on_gpu <= gigabytes * 1e9 * (1 - HEADROOM)


def training_memory(
    config: NextFlowConfig,
    *,
    trainable: str = "all",
    optim: str = "adamw_torch_fused",
    use_muon: bool = False,
    dtype: str = "bfloat16",
    tokens: int = 16384,
    loss_chunk_size: int = NextFlowForCausalLM.loss_chunk_size,
    lora_r: int = 16,
    selective: bool = False,
) -> TrainingMemory:
    """
    The memory of one step.

    Args:
        trainable (`str`): `"all"`, `"alignment"`, `"lora"` or `"qlora"` (4 bits).
        optim (`str`): One of `OPTIMIZERS`, by the names of `TrainingArguments.optim`.
        use_muon (`bool`): Whether the matrices of the layers have Muon; goes with all weights and torch's AdamW.
        dtype (`str`): Dtype of the weights: `"bfloat16"`, or `"float32"` computed in bfloat16 (`bf16: true`).
        tokens (`int`): Tokens in a micro-batch.
        loss_chunk_size (`int`): Tokens whose logits exist at the same time.
        selective (`bool`): With `selective_recomputation`.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable is {trainable!r}, expected one of {list(TRAINABLE)}")
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim is {optim!r}, expected one of {list(OPTIMIZERS)}")
    size = {"bfloat16": 2, "float32": 4}[dtype]
    with torch.device("meta"):
        model = NextFlowForCausalLM(config)
    parameters, weights = sum(map(torch.numel, model.parameters())), _weight_bytes(model, trainable, size)
    layer, trained_size = layer_bytes_per_token(config, frozen=trainable != "all"), size
    if trainable in ADAPTED:
        model = add_adapter(model, ModelArguments("meta", use_peft=True, lora_r=lora_r))
        trained_size = 4  # PEFT keeps adapters in fp32
        weights += 4 * _count(model)
        layer += adapter_bytes_per_token(config)
    else:
        set_trainable(model, trainable)
    optimizer = _optimizer_bytes(model, optim, trained_size)
    if use_muon:  # one state, where AdamW has two
        optimizer -= trained_size * sum(map(torch.numel, matrices_of(model.model.layers)))
    return TrainingMemory(
        parameters=parameters,
        trained_parameters=_count(model),
        weights=weights,
        gradients=_count(model) * trained_size,
        optimizer=optimizer,
        paged_optimizer=optimizer if optim.startswith("paged") else 0,
        checkpoints=tokens * config.num_hidden_layers * kept_bytes_per_token(config, selective=selective),
        layer=tokens * layer,
        logits=min(tokens, loss_chunk_size) * logits_bytes_per_token(config)
        + 2 * config.vocab_size * config.hidden_size * (trainable in ("all", "alignment")),
    )


def _count(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _weight_bytes(model: NextFlowForCausalLM, trainable: str, size: int) -> float:
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    weights = size * sum(map(torch.numel, model.parameters()))
    if size == 4:  # autocast casts a weight once a step; embeddings are not cast
        weights += 2 * linear
    if trainable == "qlora":
        # Linear layers of the decoder: half a byte, and an fp32 constant for 64 of them.
        linear = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, nn.Linear))
        weights += linear * (0.5 + 4 / 64 - size - 2 * (size == 4))
    return weights


def _optimizer_bytes(model: nn.Module, optim: str, size: int) -> float:
    states, width = OPTIMIZERS[optim]
    width, wide = width or size, 0
    if "8bit" in optim:  # `Trainer` keeps embeddings in 32 bits
        embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        wide = sum(weight.numel() for weight in embeddings if weight.requires_grad)
    return states * (width * _count(model) + (4 - width) * wide)


def kept_bytes_per_token(config: NextFlowConfig, *, selective: bool = False) -> int:
    """What a recomputed layer keeps, in bfloat16: its input; with `selective_recomputation` also what attention gives
    and the products that are no wider than their input: queries, keys, values, and the two into the residual."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return 2 * (config.hidden_size + selective * (2 * queries + 2 * keys + 2 * config.hidden_size))


def layer_bytes_per_token(config: NextFlowConfig, *, frozen: bool = False) -> int:
    """What autograd keeps of one decoder layer, in bfloat16, with flash attention and nothing fused."""
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    # Each norm: the fp32 input. What rotation leaves of queries and keys, the values, and attention's output.
    kept = 2 * 4 * hidden + 2 * (queries + keys + keys + queries)
    # Gate, up and the activation.
    kept += 2 * 3 * feed_forward
    if frozen:
        return kept
    # What weights are multiplied with: each norm's own and then the projections', and the last one's of the MLP.
    return kept + 2 * (2 + 2) * hidden + 2 * feed_forward


def adapter_bytes_per_token(config: NextFlowConfig) -> int:
    """What LoRA on all projections of a frozen decoder layer adds, with PEFT's adapters in fp32."""
    queries = config.num_attention_heads * config.head_dim
    inputs = 5 * config.hidden_size + queries + config.intermediate_size  # of seven projections
    # Of every input the mask of dropout and what it leaves; of the widest, while it is read, both in fp32.
    return (1 + 2) * inputs + 2 * 4 * config.intermediate_size


def logits_bytes_per_token(config: NextFlowConfig) -> int:
    """bf16 logits, their fp32 copy, and its log-softmax; backward takes as much."""
    return (2 + 4 + 4) * config.vocab_size


def table(rows: Sequence[tuple[str, TrainingMemory]], gigabytes: float) -> str:
    """Gigabytes (1e9) by purpose, as a Markdown table."""
    head = ["", "trained", "weights", "gradients", "optimizer", "checkpoints", "layer", "logits", "total", "fits"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, memory in rows:
        numbers = [getattr(memory, column) / 1e9 for column in head[2:-2]] + [memory.total / 1e9]
        paged = f" ({memory.paged_optimizer / 1e9:.1f} paged)" if memory.paged_optimizer else ""
        fits = ("yes" if memory.fits(gigabytes) else "no") + paged
        lines.append([name, f"{memory.trained_parameters / 1e9:.3f}B", *(f"{number:.1f}" for number in numbers), fits])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def recipe_config(args: ModelArguments) -> NextFlowConfig:
    """The configuration of a recipe's model; of the 7B model where its folder is not there yet."""
    overrides = args.config_overrides or {}
    source = args.model_name_or_path
    if source is None or (source.startswith("runs/") and not Path(source).exists()):
        return NextFlowConfig(**overrides)
    check_source("model_name_or_path", source, *TRANSFORMERS, "pipeline")
    adapter = saved_adapter(source)
    base = source if adapter is None else adapter.base_model_name_or_path
    return NextFlowConfig.from_pretrained(base, **subfolder_of(base, "transformer"), **overrides)


def micro_batch_tokens(config: NextFlowConfig, data: DataArguments, args: NextFlowTrainingArguments) -> int:
    """The most tokens that a micro-batch has: those of full packs, or of rows as long as the model takes."""
    longest = config.max_position_embeddings
    if data.is_packed:
        lengths = [data.pack_max_length or float("inf")]
        if data.pack_max_flops is not None:  # short documents of text have the fewest FLOPs a token
            lengths.append(data.pack_max_flops / training_flops(config, 1))
        longest = int(min(lengths))
    return args.per_device_train_batch_size * longest


def recipe_memory(
    config: NextFlowConfig, model: ModelArguments, args: NextFlowTrainingArguments, tokens: int
) -> TrainingMemory:
    """The memory of a recipe's step, with `tokens` in a micro-batch."""
    check_adapter(model, args)
    trainable = args.trainable
    if model.use_peft:
        trainable = "qlora" if model.load_in_4bit else "lora"
    optim = getattr(args.optim, "value", args.optim)
    is_half = model.dtype in ("bfloat16", "float16") or (model.use_peft and model.dtype is None and args.bf16)
    dtype = "bfloat16" if is_half else "float32"
    return training_memory(
        config,
        trainable=trainable,
        optim=optim if optim in OPTIMIZERS else "adamw_torch_fused",
        use_muon=args.use_muon,
        dtype=dtype,
        tokens=tokens,
        lora_r=model.lora_r,
        selective=args.selective_recomputation,
    )
