"""What every trainer of this library asks of the processes it runs in."""

from dataclasses import fields, replace

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.utils import is_torch_bf16_gpu_available


def process_state() -> PartialState:
    """This process among those of the run. Without being told, accelerate knows of no others on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def seed_process(args: TrainingArguments) -> None:
    """
    Give each process random numbers of its own, when a training begins: `Trainer` seeds all alike, and they would add
    the same noise to, or drop out the same places of, their own rows. A resumed run then loads the random state of
    each process that the checkpoint knows.
    """
    if args.process_index > 0:
        torch.manual_seed(args.seed + args.process_index)


class ProcessesMixin:
    """
    Before `Trainer` among the bases: processes sum in float32, and all of them shuffle the rows by `data_seed` (by
    default `seed`), in each epoch anew. By default the order may come from the random numbers of whatever runs in a
    process: it would be another one where these differ ([`seed_process`]), and in a run that is resumed after its
    first epoch.
    """

    _length_sampler: LengthGroupedSampler | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.dataloader_config.data_seed = self._data_seed
        sum_in_float32(self.accelerator)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler):
            sampler.seed = self._data_seed  # it would be 42
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(self._data_seed)
            self._length_sampler = sampler
        return sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._length_sampler is not None:
            for _ in range(int(self.state.epoch)):
                iter(self._length_sampler)  # shuffles, as at the start of each epoch


def computes_bfloat16(on_cpu: bool) -> bool:
    """
    Whether the CPU, or else the accelerator, has instructions for bfloat16, as far as can be known. An x86 processor
    without AVX-512 has none: PyTorch then multiplies matrices many times slower in it than in float32.
    """
    if on_cpu:
        return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")
    return is_torch_bf16_gpu_available()


def check_processes(trainer: Trainer, *, can_shard_weights: bool = True) -> None:
    """
    Refuse several GPUs in one process and, where the trainer cannot use them, shards of the weights.

    Args:
        can_shard_weights (`bool`, *optional*, defaults to `True`):
            Not where a model is called once for every schedule of a batch: ZeRO-3 gathers weights in each call, and
            processes with unequally many calls wait for each other. Nor is there code to wrap such a model for FSDP,
            or to save it.
    """
    if trainer.args.n_gpu > 1:  # 1 for a model that is split over them by its `device_map`
        # `nn.DataParallel` cuts every tensor by rows; the codes and grids of a batch are not one a row.
        raise ValueError(
            f"one process sees {trainer.args.n_gpu} GPUs, expected one each: start it with torchrun or accelerate "
            "launch, or make one GPU visible with CUDA_VISIBLE_DEVICES"
        )
    if not can_shard_weights and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise ValueError(
            f"{type(trainer).__name__} supports neither ZeRO-3, where processes wait for each other when the "
            "schedules of their batches differ, nor FSDP, which cannot wrap or save its model: use DDP or ZeRO-2"
        )


def sum_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP compute in half precision without rounding what is summed."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = without_rounded_sums(plugin.mixed_precision_policy)


def without_rounded_sums(policy):
    """
    The FSDP policy of accelerate, which has one dtype for everything, with that dtype for the computation alone.

    Losses leave the model as they were computed, gradients are summed over the processes in float32, and buffers
    (which FSDP1 casts past the modules' own methods) stay as they are.
    """
    # In half precision a sum over many processes would lose what each of them adds.
    exact = {"reduce_dtype": torch.float32, "output_dtype": None, "buffer_dtype": None}
    names = {field.name for field in fields(policy)}
    return replace(policy, **{name: dtype for name, dtype in exact.items() if name in names})
