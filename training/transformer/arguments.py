"""The groups of arguments of `nextflow-hf train transformer`: the keys of a recipe. Inert data.

Names are those of transformers' `TrainingArguments` and of TRL's `ModelConfig`, where these have one.
"""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..common.refusals import check_arguments, check_numbers
from ..data.packing import ON_LONG_ROW
from .freezing import TRAINABLE


@dataclass
class ModelArguments:
    """
    What is trained.

    Args:
        model_name_or_path (`str`, *optional*):
            A NextFlow transformer (`nextflow-hf convert qwen` makes the one that alignment starts from), or an adapter
            of one: with `use_peft` that adapter is trained, else the weights that it is merged into. Without
            it a model with random weights is made for `processor_name_or_path` and `vision_tokenizer_name_or_path`.
        config_overrides (`dict`, *optional*): Fields of [`NextFlowConfig`], for either.
        processor_name_or_path (`str`, *optional*): The processor; needed to sample images.
        vision_tokenizer_name_or_path (`str`, *optional*): The vision tokenizer; needed to sample images.
        dtype (`str`, *optional*):
            Dtype of the weights. By default float32, where `bf16: true` computes in bfloat16 and keeps exact what is
            trained; under an adapter, whose base is frozen, bfloat16 with `bf16: true`. A model whose float32 copy
            does not fit is best in bfloat16.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.
        use_peft (`bool`, *optional*, defaults to `False`): Train a LoRA adapter instead of the model.
        lora_r, lora_alpha, lora_dropout, lora_target_modules, lora_modules_to_save, use_rslora, use_dora:
            Fields of PEFT's `LoraConfig`. By default it adapts every matrix of the decoder's layers.
        lora_train_image_parts (`bool`, *optional*, defaults to `False`):
            Whether an adapter also trains what NextFlow added to the language model, which may not make images yet.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Quantise the adapter's base to 4 bits (QLoRA).
        load_in_8bit (`bool`, *optional*, defaults to `False`): Quantise the adapter's base to 8 bits.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`): `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`): Quantise the 4-bit constants, too.
        bnb_4bit_quant_storage (`str`, *optional*): Dtype that 4-bit weights lie in; `"bfloat16"` for FSDP2.
    """

    model_name_or_path: str | None = None
    config_overrides: dict | None = None
    processor_name_or_path: str | None = None
    vision_tokenizer_name_or_path: str | None = None
    dtype: str | None = field(default=None, metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_train_image_parts: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None

    def __post_init__(self):
        check_numbers(self, {"lora_r": 1, "lora_alpha": 1, "lora_dropout": 0})
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true, expected at most one")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError("quantised weights cannot be trained: load_in_4bit and load_in_8bit need use_peft: true")
        if self.model_name_or_path is None and not (
            self.processor_name_or_path and self.vision_tokenizer_name_or_path
        ):
            raise ValueError(
                "model_name_or_path is missing. To start from random weights, name processor_name_or_path and "
                "vision_tokenizer_name_or_path instead: they fix the vocabulary"
            )


@dataclass
class DataArguments:
    """
    What it is trained on: folders of rows of tokens and codes, as `nextflow-hf extract` writes them.

    Args:
        train_codes (`list[str]`): The folders.
        train_weights (`list[float]`, *optional*):
            How often each is sampled from, relative to the others; rows repeat until every folder was seen whole. By
            default every row is seen once an epoch.
        eval_codes (`list[str]`, *optional*):
            Folders that are evaluated on, as `extract` writes them with `purpose: evaluation`.
        eval_rows (`int`, *optional*, defaults to 0):
            Without `eval_codes`: this many rows of every folder, the last ones that were extracted without prompt
            dropout and self-correction, are evaluated on; the training ends before the first of them.
        pack_max_length, pack_max_flops (`int`, `float`, *optional*):
            Limits of a pack, in tokens and in FLOPs of its training: with either, a row of a batch is a pack of
            documents that do not see each other, and of as much computation as the others where FLOPs limit it (§4).
            By default a row is one document, padded to the longest of its batch. With `max_steps`, more rows than 512
            windows are packed block by block during the training, epoch after epoch: it starts at once, and `epoch` in
            the logs is the share of `max_steps`.
        pack_window (`int`, *optional*, defaults to 2048): Documents that are packed among themselves.
        on_long_row (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at a document that fits into no pack, before the training or before its block; `"skip"`
            leaves such out, counted and named.
        streaming (`bool`, *optional*, defaults to `False`):
            Read the shards as they come, in an order that is shuffled by files and within `shuffle_buffer` rows, and
            not by number from a copy in the cache of `datasets`: for more rows than that is for. Needs `max_steps`;
            every process reads all files.
        shuffle_buffer (`int`, *optional*, defaults to 1000): Rows among which the next one of a stream is chosen.
    """

    train_codes: list[str] = field(default_factory=list)
    train_weights: list[float] | None = None
    eval_codes: list[str] | None = None
    eval_rows: int = 0
    pack_max_length: int | None = None
    pack_max_flops: float | None = None
    pack_window: int = 2048
    on_long_row: str = field(default="raise", metadata={"choices": list(ON_LONG_ROW)})
    streaming: bool = False
    shuffle_buffer: int = 1000

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed."""
        return self.pack_max_length is not None or self.pack_max_flops is not None

    def __post_init__(self):
        if not self.train_codes:
            raise ValueError("train_codes is empty, expected at least one folder of extracted codes")
        counts = {"eval_rows": 0, "pack_max_length": 1, "pack_window": 1, "shuffle_buffer": 1}
        check_numbers(self, counts, {"pack_max_flops": 0})
        if self.train_weights is not None and not (min(self.train_weights, default=0) >= 0 < sum(self.train_weights)):
            raise ValueError(f"train_weights is {self.train_weights}, expected numbers that are not negative, or null")
        if self.train_weights is not None and len(self.train_weights) != len(self.train_codes):
            raise ValueError(
                f"train_weights has {len(self.train_weights)} entries for {len(self.train_codes)} folders of "
                "train_codes, expected one for each, or null: every row once an epoch"
            )
        if self.eval_codes and self.eval_rows:
            raise ValueError(f"eval_rows is {self.eval_rows} and eval_codes is {self.eval_codes}: pass one of the two")
        if self.eval_rows and self.streaming:
            raise ValueError(f"eval_rows is {self.eval_rows}, but a stream has no last rows: name eval_codes instead")


@dataclass
class NextFlowTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] and, besides:

    Where FSDP recomputes activations itself, which suits it better, `gradient_checkpointing` is turned off.
    `torch_compile` compiles the decoder's layers, which share their code, and nothing else.

    Args:
        trainable (`str`, *optional*, defaults to `"all"`):
            `"all"`, or `"alignment"`: the connector and the head's rows of image codes, `<boi>` and `<eoi>` (§3.2.2).
        selective_recomputation (`bool`, *optional*, defaults to `False`):
            With `activation_checkpointing`: keep what attention gives and what matrix products make no wider, so that
            of a layer's products only the gate's and the up projection's are computed again. For the 7B model that is
            58% of them, for 0.86 MB a token.
        use_muon (`bool`, *optional*, defaults to `False`):
            Muon for the matrices of the decoder's layers, with the same learning rate and weight decay, and the AdamW
            of the other arguments for the rest ([`MuonWithAdamW`]). For whole matrices: no FSDP, DeepSpeed or adapter.
        sample_prompts (`list[str]`, *optional*):
            Prompts of which an image is sampled at every evaluation, with the same seed every time.
        sample_seed (`int`, *optional*, defaults to 0): Prompt i uses `sample_seed + i`.
        sample_settings (`dict`, *optional*):
            Arguments of the pipeline's call (`guidance_scale`, `top_k`, `height`...), instead of its defaults.
    """

    trainable: str = field(default="all", metadata={"choices": list(TRAINABLE)})
    selective_recomputation: bool = False
    use_muon: bool = False
    sample_prompts: list[str] | None = None
    sample_seed: int = 0
    sample_settings: dict | None = None
    # Every process uses every parameter, whatever its rows are: see `NextFlowModel.embed_inputs`.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        check_arguments(self)
        check_numbers(self, {"sample_seed": 0})
        super().__post_init__()
        if self.selective_recomputation and (fsdp_recomputes(self) or not self.activation_checkpointing):
            raise ValueError(
                "selective_recomputation says what activation_checkpointing keeps: set activation_checkpointing: "
                "true, and fsdp_activation_checkpointing: false under FSDP"
            )
        if fsdp_recomputes(self):
            self.gradient_checkpointing = self.activation_checkpointing = False
        # A batch has one row of codes for all its images: a batch of the first process cannot be cut for the others.
        if self.accelerator_config.dispatch_batches or self.accelerator_config.split_batches:
            raise ValueError("accelerator_config has dispatch_batches or split_batches, but batches cannot be cut")
        self.accelerator_config.dispatch_batches = False
        if self.use_muon:
            self._check_muon()

    def _check_muon(self) -> None:
        if self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(f"use_muon has torch's AdamW beside it, but optim is {self.optim.value!r}")
        if self.trainable != "all":
            raise ValueError(f"use_muon is for the decoder's matrices, but trainable is {self.trainable!r}")
        launched = [os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")]  # `accelerate launch`
        if self.fsdp or self.deepspeed or "true" in launched:
            raise ValueError("use_muon needs whole matrices, but FSDP and DeepSpeed shard them: use DDP, or AdamW")


def fsdp_recomputes(args: TrainingArguments) -> bool:
    """Whether FSDP recomputes activations itself."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # by `accelerate launch`
        return os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"
    return bool(args.fsdp) and str(args.fsdp_config.get("activation_checkpointing")).lower() == "true"


def check_adapter(model: ModelArguments, args: NextFlowTrainingArguments) -> None:
    """Raises `ValueError` where an adapter is to train, and something else is said to."""
    if model.use_peft and args.trainable != "all":
        raise ValueError(f"trainable is {args.trainable!r}, but an adapter trains its own matrices: leave it 'all'")
    if model.use_peft and args.use_muon:
        raise ValueError("use_muon is for the decoder's matrices, but use_peft trains an adapter: leave it false")
