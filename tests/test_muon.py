"""Muon beside AdamW: against torch's own of both, against singular values, and alike in one process and two."""

import pytest
import torch
from processes import in_processes
from torch import nn
from toy import toy_model
from toy_codes import toy_rows

from nextflow_hf.training.transformer.arguments import NextFlowTrainingArguments
from nextflow_hf.training.transformer.muon import MuonWithAdamW, orthogonalize
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


LEARNING_RATE, DECAY = 0.02, 0.1
SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (8, 8)]


def parameters(seed: int = 0) -> tuple[list[nn.Parameter], nn.Parameter]:
    """Matrices, and one vector."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return matrices, nn.Parameter(torch.randn(8, generator=generator))


def set_gradients(weights: list[nn.Parameter], step: int) -> None:
    for index, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + index))


def make(matrices: list[nn.Parameter], vector: nn.Parameter) -> MuonWithAdamW:
    others = [{"params": [vector], "weight_decay": 0.0}]
    return MuonWithAdamW(matrices, others, lr=LEARNING_RATE, weight_decay=DECAY, betas=(0.9, 0.98))


def stepped(num_steps: int) -> list[torch.Tensor]:
    matrices, vector = parameters()
    optimizer = make(matrices, vector)
    for step in range(num_steps):
        set_gradients([*matrices, vector], step)
        optimizer.step()
    return [weight.detach() for weight in (*matrices, vector)]


@pytest.mark.parametrize(("in_bfloat16", "off_diagonal"), [(False, 1e-4), (True, 0.05)])
def test_singular_values_come_near_one(in_bfloat16, off_diagonal):
    matrices = torch.randn(5, 12, 40, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices, in_bfloat16=in_bfloat16)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ result @ right.mT  # diagonal: the singular vectors stay
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25
    assert (values - torch.diag_embed(diagonal)).abs().max() < off_diagonal


def test_it_is_torchs_muon_and_torchs_adamw():
    matrices, vector = parameters()
    muon = torch.optim.Muon(
        matrices, lr=LEARNING_RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([vector], lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
    for step in range(3):
        set_gradients([*matrices, vector], step)
        muon.step()
        adamw.step()
    start = [weight.detach() for weight in (*parameters()[0], parameters()[1])]
    result = stepped(3)
    assert torch.equal(result[-1], vector)
    for before, ours, theirs in zip(start, result, matrices):
        # torch iterates in bf16.
        assert torch.linalg.norm(ours - theirs) < 0.02 * torch.linalg.norm(theirs - before)


def test_the_schedule_of_the_learning_rate_reaches_both():
    matrices, vector = parameters()
    before = [weight.detach().clone() for weight in (*matrices, vector)]
    optimizer = make(matrices, vector)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    set_gradients([*matrices, vector], 0)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, (*matrices, vector)))


def test_a_saved_state_goes_on():
    matrices, vector = parameters()
    first = make(matrices, vector)
    set_gradients([*matrices, vector], 0)
    first.step()
    second = make(matrices, vector)
    second.load_state_dict(first.state_dict())
    set_gradients([*matrices, vector], 1)
    second.step()
    for ours, expected in zip((*matrices, vector), stepped(2)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def _stepped_in_process() -> list[torch.Tensor]:
    torch.distributed.init_process_group("gloo")
    try:
        return [weight.numpy() for weight in stepped(3)]
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_agree_with_one():
    alone = stepped(3)
    for result in in_processes(_stepped_in_process):
        for ours, expected in zip(result, alone):
            torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=0, atol=1e-6)


def test_only_matrices():
    with pytest.raises(ValueError, match="expected parameters of two dimensions, got the shapes"):
        MuonWithAdamW([nn.Parameter(torch.zeros(3))], [], lr=1.0, weight_decay=0.0)


# --- in the trainer


def arguments(tmp_path, **others) -> NextFlowTrainingArguments:
    return NextFlowTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_steps=1, logging_steps=1,
        learning_rate=1e-2, weight_decay=DECAY, **{"max_steps": 2, "use_muon": True, **others},
    )  # fmt: skip


def test_the_trainer_gives_it_the_matrices_of_the_layers(tmp_path):
    trainer = NextFlowTrainer(toy_model(), arguments(tmp_path), train_dataset=toy_rows(16))
    muon, decayed, others = trainer.create_optimizer().param_groups
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    assert {names[id(weight)].split(".", 3)[3] for weight in muon["params"]} == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    assert muon["weight_decay"] == decayed["weight_decay"] == DECAY and others["weight_decay"] == 0
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {names[id(weight)] for weight in decayed["params"]}
    everything = [*muon["params"], *decayed["params"], *others["params"]]
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert sorted(map(id, everything)) == sorted(map(id, trained))


def test_a_training_resumes_where_it_was(tmp_path):
    whole = NextFlowTrainer(toy_model(), arguments(tmp_path / "whole"), train_dataset=toy_rows(16))
    whole.train()
    resumed = NextFlowTrainer(toy_model(), arguments(tmp_path / "resumed"), train_dataset=toy_rows(16))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for ours, expected in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"optim": "adafactor"}, "torch's AdamW beside it, but optim is"),
        ({"trainable": "alignment"}, "trainable is 'alignment'"),
        ({"fsdp": True}, "needs whole matrices"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, others, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **others)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_accelerate_launches_is_refused_too(tmp_path, monkeypatch, name):
    plain = arguments(tmp_path, use_muon=False)
    monkeypatch.setenv(name, "true")
    plain.use_muon = True
    with pytest.raises(ValueError, match="needs whole matrices"):
        plain._check_muon()
