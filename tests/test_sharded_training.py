"""However the weights lie on the processes, and in half precision: the same masks, positions, losses and gradients."""

import functools
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState
from fsdp_on_cpu import CpuFsdpTrainer
from processes import in_processes
from safetensors.torch import load_file
from test_training_equivalence import FSDP2
from torch.distributed.fsdp import FSDPModule, MixedPrecision
from toy import SQUARE, WIDE, toy_config, toy_model
from toy_codes import row
from toy_decoder import toy_decoder_pipeline
from toy_pipeline import toy_vision_tokenizer
from transformers import Trainer, TrainingArguments

from nextflow_hf.modeling_nextflow import backbone_nextflow
from nextflow_hf.modeling_nextflow.attention_nextflow import NextFlowRotaryEmbedding
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.training.common.processes import without_rounded_sums
from nextflow_hf.training.data.collator import PackingCollator
from nextflow_hf.training.data.packing import PackedDataset
from nextflow_hf.training.diffusion_decoder.trainer import (
    NextFlowDiffusionDecoderTrainer,
    NextFlowDiffusionDecoderTrainingArguments,
)
from nextflow_hf.training.transformer.arguments import NextFlowTrainingArguments
from nextflow_hf.training.transformer.trainer import NextFlowTrainer, _LossSums
from nextflow_hf.training.vision_tokenizer.arguments import NextFlowVisionTokenizerTrainingArguments
from nextflow_hf.training.vision_tokenizer.trainer import NextFlowVisionTokenizerTrainer


KINDS = {
    "ddp": ({}, {}),
    "fsdp2": ({"trainer_class": CpuFsdpTrainer}, FSDP2),
    "compiled": ({"trainer_class": CpuFsdpTrainer, "torch_compile_backend": "aot_eager"}, FSDP2),
    "zero2": ({"stage": 2}, {"DS_ACCELERATOR": "cpu"}),
    "zero3": ({"stage": 3}, {"DS_ACCELERATOR": "cpu"}),
}
no_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
WORDS = torch.randint(3, 40, (4, 300), generator=torch.Generator().manual_seed(0)).tolist()
# Of two packs, each longer than 256 tokens, as bfloat16 counts to that and no further.
ROWS = [
    row(SQUARE, prompt=WORDS[0], seed=0),
    row(WIDE, SQUARE, prompt=WORDS[1][:280], seed=1),
    row(SQUARE, prompt=WORDS[2][:290], seed=2),
    row(prompt=WORDS[3]),
]


def record(seen: dict) -> None:
    """Keeps what the forward of this process is given and makes of it."""
    forward, rotary = NextFlowForCausalLM.forward, NextFlowRotaryEmbedding.forward
    get_attention_mask = backbone_nextflow.get_attention_mask

    @functools.wraps(forward)
    def recorded_forward(self, *args, **inputs):
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        seen["floats"] = [name for name, value in tensors.items() if value.is_floating_point()]
        seen["inputs"] = list(tensors)
        return forward(self, *args, **inputs)

    def recorded_rotary(self, x, position_ids):
        seen["positions"], seen["frequencies"] = position_ids.clone(), self.inv_freq.clone()
        return rotary(self, x, position_ids)

    def recorded_mask(*args, **kwargs):
        seen["mask"] = get_attention_mask(*args, **kwargs)
        return seen["mask"]

    NextFlowForCausalLM.forward = recorded_forward
    NextFlowRotaryEmbedding.forward = recorded_rotary
    backbone_nextflow.get_attention_mask = recorded_mask


def whole(parameter: torch.nn.Parameter, stage: int | None) -> torch.Tensor:
    if stage is not None:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).clone()
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()


def deepspeed_config(stage: int, *, bf16: bool) -> dict:
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        **dict.fromkeys([*sizes, "gradient_clipping"], "auto"),
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
    }


def train_a_step(
    folder: Path, *, bf16: bool, trainer_class=NextFlowTrainer, stage: int | None = None, **options
) -> dict:
    """What a process saw in a step of plain gradient descent, the losses, and the gradients."""
    options |= {} if stage is None else {"deepspeed": deepspeed_config(stage, bf16=bf16)}
    args = NextFlowTrainingArguments(
        output_dir=str(folder / "run"), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
        max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, bf16=bf16,
        save_strategy="no", per_device_train_batch_size=1, train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    if stage is not None:
        import deepspeed

        deepspeed.init_distributed("gloo")  # as `TrainingArguments` does on a GPU; ZeRO-3 then loads shards alone
    model = NextFlowForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = PackedDataset(ROWS, model.config, max_length=700, seed=None)
    assert [len(pack) for pack in data] == [2, 2]
    trainer = trainer_class(model, args, PackingCollator(model.config), train_dataset=data)
    seen = {}
    record(seen)
    trainer.train()
    parts = (model.lm_head, model.model.embed_tokens, *model.model.layers)
    assert {isinstance(part, FSDPModule) for part in parts} == {trainer.is_fsdp_enabled}  # each gathered by itself
    seen["weights"] = {name: whole(p, stage) for name, p in trainer.accelerator.unwrap_model(model).named_parameters()}
    seen["logs"] = trainer.state.log_history[0]
    buffer = io.BytesIO()  # not tensors: those are shared with a process that is gone then
    torch.save(seen, buffer)
    return buffer.getvalue()


def train_in_two_processes(folder: Path, kind: str, bf16: bool) -> list[dict]:
    options, environment = KINDS[kind]
    environment = {**environment, "ACCELERATE_MIXED_PRECISION": "bf16" if bf16 else "no"}
    results = in_processes(lambda: train_a_step(folder, bf16=bf16, **options), **environment)
    return [torch.load(io.BytesIO(result)) for result in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose weights bfloat16 can hold: DeepSpeed rounds them before it copies them to float32."""
    path = tmp_path_factory.mktemp("model")
    toy_model(max_position_embeddings=1024).to(torch.bfloat16).float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def under_ddp(folder) -> Callable[[bool], list[dict]]:
    return functools.cache(functools.partial(train_in_two_processes, folder, "ddp"))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind", ["fsdp2", "compiled", pytest.param("zero2", marks=no_deepspeed), pytest.param("zero3", marks=no_deepspeed)]
)
def test_packed_documents_are_the_same_as_under_ddp(kind, bf16, folder, under_ddp):
    expected, got = under_ddp(bf16), train_in_two_processes(folder, kind, bf16)
    frequencies = toy_model(max_position_embeddings=1024).model.rotary_emb.inv_freq
    for ours, theirs in zip(got, expected):
        assert {"position_ids", "image_grids", "num_items_in_batch"} <= set(ours["inputs"]) and not ours["floats"]
        assert ours["mask"].dtype == torch.bool and torch.equal(ours["mask"], theirs["mask"])
        assert ours["positions"].dtype == torch.float32 and torch.equal(ours["positions"], theirs["positions"])
        assert ours["frequencies"].dtype == torch.float32 and torch.equal(ours["frequencies"], frequencies)

    losses = {name: value for name, value in expected[0]["logs"].items() if "loss" in name}
    assert len(losses) == 3 + 4  # of all, of text, of images, and of four scales
    assert {name: got[0]["logs"][name] for name in losses} == pytest.approx(losses, rel=1e-3 if bf16 else 1e-5)
    for name, start in load_file(folder / "model.safetensors").items():
        gradient, ddp = start - got[0]["weights"][name], start - expected[0]["weights"][name]
        if bf16 and ddp.any():
            assert torch.cosine_similarity(gradient.flatten().double(), ddp.flatten().double(), dim=0) > 0.999, name
            assert gradient.norm().item() == pytest.approx(ddp.norm().item(), rel=0.02), name
        else:
            torch.testing.assert_close(gradient, ddp, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_running_sums_of_losses_are_float32():
    """bfloat16 stops adding ones at 256."""
    sums, one = _LossSums(), torch.ones((), dtype=torch.bfloat16)
    for _ in range(1000):
        sums.add({"loss": one, "scale_losses": one[None], "scale_counts": torch.ones(1, dtype=torch.long)}, None)
    assert sums.pop(Accelerator(cpu=True)) == (1.0, {"text_loss": 1.0})


def test_fsdp1_casts_no_buffers():
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    assert without_rounded_sums(policy) == MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@no_deepspeed
def test_frequencies_are_float32_where_deepspeed_shards_a_new_model():
    def work() -> list[float]:
        import deepspeed

        deepspeed.init_distributed("gloo")
        config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
        with deepspeed.zero.Init(config_dict_or_path=config):
            return NextFlowRotaryEmbedding(toy_config()).inv_freq.tolist()

    assert in_processes(work, count=1, DS_ACCELERATOR="cpu") == [toy_model().model.rotary_emb.inv_freq.tolist()]


# ---- what processes cannot do


def make_transformer_trainer(folder: Path, **arguments) -> NextFlowTrainer:
    return NextFlowTrainer(toy_model(), NextFlowTrainingArguments(str(folder), use_cpu=True, **arguments))


def make_tokenizer_trainer(folder: Path, **arguments) -> NextFlowVisionTokenizerTrainer:
    whole = {"dead_code_steps": 0, "codebook_init_batches": 0}
    args = NextFlowVisionTokenizerTrainingArguments(str(folder), use_cpu=True, stage="pixel", **whole, **arguments)
    return NextFlowVisionTokenizerTrainer(toy_vision_tokenizer(), args)


def make_decoder_trainer(folder: Path, **arguments) -> NextFlowDiffusionDecoderTrainer:
    args = NextFlowDiffusionDecoderTrainingArguments(str(folder), use_cpu=True, **arguments)
    return NextFlowDiffusionDecoderTrainer(toy_decoder_pipeline("unet"), args)


MAKERS = [make_transformer_trainer, make_tokenizer_trainer, make_decoder_trainer]


@pytest.mark.parametrize("make", MAKERS)
def test_several_gpus_in_one_process_are_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process sees 2 GPUs, expected one each: start it with torchrun"):
        make(tmp_path)


@pytest.mark.parametrize("make", MAKERS[1:])
def test_models_that_cannot_be_sharded_are_refused(make, tmp_path):
    def work() -> None:
        create = Trainer.create_accelerator_and_postprocess

        def create_with_fsdp(self) -> None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # see `CpuFsdpTrainer`
            create(self)

        Trainer.create_accelerator_and_postprocess = create_with_fsdp
        with pytest.raises(ValueError, match="supports neither ZeRO-3.* nor FSDP.*: use DDP or ZeRO-2"):
            make(tmp_path)

    in_processes(work, count=1, **FSDP2)


@no_deepspeed
@pytest.mark.parametrize(
    ("make", "stage", "message"),
    [
        (make_tokenizer_trainer, 2, "DeepSpeed in bf16 rounds the codebooks"),
        (make_tokenizer_trainer, 3, "supports neither ZeRO-3"),
        (make_decoder_trainer, 3, "supports neither ZeRO-3"),
    ],
)
def test_what_deepspeed_would_get_wrong_is_refused(make, stage, message, tmp_path):
    def work() -> None:
        with pytest.raises(ValueError, match=message):
            make(tmp_path, bf16=True, deepspeed=deepspeed_config(stage, bf16=True))

    in_processes(work, count=1, DS_ACCELERATOR="cpu")
