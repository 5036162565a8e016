"""`nextflow-hf train` with accelerate's FSDP on CPU processes: accelerate looks for it beside accelerators alone."""

from accelerate.state import DistributedType, PartialState

from nextflow_hf import cli
from nextflow_hf.training.transformer import train
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


class CpuFsdpTrainer(NextFlowTrainer):
    def __init__(self, *args, **kwargs):
        # Between `TrainingArguments` and `Accelerator`, which reads it, it can be told that there are some.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)
        assert self.is_fsdp_enabled and self.accelerator.is_fsdp2


if __name__ == "__main__":
    train.NextFlowTrainer = CpuFsdpTrainer
    cli.run()
