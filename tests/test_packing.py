"""Packs: limits kept, nothing lost, waste and balance as counted by hand; a packed batch is its documents apart."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from toy import BOI, EOS, SQUARE, WIDE, grids_tensor, image_tokens, random_codes, toy_config, toy_model
from transformers import TrainingArguments

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.grids_nextflow import get_image_layout
from nextflow_hf.training.common.flops import attended_pairs, training_flops
from nextflow_hf.training.data import packs as packs_module
from nextflow_hf.training.data.collator import NextFlowDataCollator, PackingCollator
from nextflow_hf.training.data.packing import (
    EndlessPackedDataset,
    PackedDataset,
    PackedIterableDataset,
    document_costs,
)
from nextflow_hf.training.data.packs import PackingReport, Packs, endless_rows, make_packs
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


def row(schedule=None, *, text: int = 3, seed: int = 0) -> dict:
    """Words, an image if there is a schedule, and an end; everything but the first words is trained on."""
    words = [5 + (seed + i) % 30 for i in range(text)]
    ids = [*words, *(image_tokens(schedule) if schedule else []), EOS]
    codes = random_codes(schedule, seed=seed).tolist() if schedule else []
    targets = random_codes(schedule, seed=seed + 100).tolist() if schedule else []
    return {
        "input_ids": ids,
        "labels": [word if schedule is None else -100 for word in words]
        + [token if token in (BOI, EOS) else -100 for token in ids[text:]],
        "image_codes": codes,
        "image_target_codes": targets,
        "image_grids": grids_tensor(schedule).tolist() if schedule else [],
        "length": len(ids),
    }


ROWS = [row(SQUARE), row(seed=1), row(WIDE, seed=2), row(text=9, seed=3), row(SQUARE, text=5, seed=4), row(seed=5)]


# ---- what a document costs


def test_attended_pairs_are_those_of_the_mask():
    ids = ROWS[0]["input_ids"]
    layout = get_image_layout(toy_config(), torch.tensor([ids]), grids_tensor(SQUARE))
    blocks, block = [], 0  # a scale is one block, every other token its own
    for index, cell_block in enumerate(layout.block_ids[0].tolist()):
        block += cell_block < 0 or cell_block != layout.block_ids[0, index - 1].item()
        blocks.append(block)
    seen = sum(k <= q for q in blocks for k in blocks)
    assert attended_pairs(len(ids), [SQUARE]) == seen
    assert attended_pairs(len(ids)) == len(ids) * (len(ids) + 1) // 2


def test_flops_are_those_that_torch_counts():
    # A row that attends to all of itself in one product, as eager attention does: count its own pairs instead.
    model, document = toy_model().train(), ROWS[0]
    model.set_attn_implementation("eager")
    batch = NextFlowDataCollator(pad_token_id=0)([{**document, "labels": document["input_ids"]}])
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    length, width, layers = document["length"], 32, 2
    expected = training_flops(model.config, length, [SQUARE])
    expected += 3 * 2 * 2 * layers * width * (length**2 - attended_pairs(length, [SQUARE]))
    expected -= 3 * 2 * width * model.config.vocab_size  # the last token has nothing to predict
    head = 2 * width * (length - 1) * model.config.vocab_size
    expected -= head  # the gradient of its rows adds up in place, `addmm_`, which torch does not count
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_flops_of_the_7b_model():
    config = NextFlowConfig()
    body = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    text = 6 * (body + 184834 * 3584) * 100 + 6 * 28 * 2 * 3584 * 5050
    assert training_flops(config, 100) == pytest.approx(text)
    frozen = 4 * (body + 184834 * 3584) * 100 + 6 * 28 * 2 * 3584 * 5050
    assert training_flops(config, 100, frozen=True) == pytest.approx(frozen)
    codes_alone = NextFlowConfig(joint_image_loss=False)
    more = training_flops(config, 34, [SQUARE]) - training_flops(codes_alone, 34, [SQUARE])
    assert more == pytest.approx(6 * 3584 * 30 * (184834 - 32768))


# ---- packs


LENGTHS = np.random.default_rng(0).integers(5, 90, 500)
FLOPS = LENGTHS * 10.0 + LENGTHS**2.0


def lists(packs: Packs) -> list[list[int]]:
    return [pack.tolist() for pack in packs]


def first_fit_one_by_one(lengths, flops, *, max_length=np.inf, max_flops=np.inf, window, seed) -> list[list[int]]:
    """The packs, document by document."""
    rng = np.random.default_rng(seed)
    order, packs = np.arange(len(lengths)) if seed is None else rng.permutation(len(lengths)), []
    share = np.maximum(lengths / max_length, flops / max_flops)
    for start in range(0, len(order), window):
        own: list[list[int]] = []
        for index in sorted(order[start : start + window].tolist(), key=lambda index: -share[index]):
            fits = [
                lengths[pack].sum() + lengths[index] <= max_length * (1 + 1e-9)
                and flops[pack].sum() + flops[index] <= max_flops * (1 + 1e-9)
                for pack in own
            ]
            if True in fits:
                own[fits.index(True)].append(index)
            else:
                own.append([index])
        packs += own
    return packs if seed is None else [packs[index] for index in rng.permutation(len(packs))]


@pytest.mark.parametrize("limits", [{"max_length": 100}, {"max_flops": 9500.0}, {"max_length": 120, "max_flops": 1e4}])
@pytest.mark.parametrize("seed", [None, 3])
def test_packs_hold_every_document_once_and_keep_to_the_limits(limits, seed):
    packs = lists(make_packs(LENGTHS, FLOPS, **limits, window=64, seed=seed))
    assert packs == first_fit_one_by_one(LENGTHS, FLOPS, **limits, window=64, seed=seed)
    assert sorted(itertools.chain.from_iterable(packs)) == list(range(500))
    assert all(LENGTHS[pack].sum() <= limits.get("max_length", np.inf) for pack in packs)
    assert all(FLOPS[pack].sum() <= limits.get("max_flops", np.inf) * (1 + 1e-6) for pack in packs)
    assert packs == lists(make_packs(LENGTHS, FLOPS, **limits, window=64, seed=seed))
    # First fit decreasing is never worse than 11/9 of the best; each window may leave one pack open.
    size = max(LENGTHS.sum() / limits.get("max_length", np.inf), FLOPS.sum() / limits.get("max_flops", np.inf))
    assert len(packs) <= size * 11 / 9 + 500 / 64 + 1


def test_packs_of_a_window_hold_only_its_documents():
    packs = make_packs(LENGTHS, max_length=100, window=50)
    assert all(len({index // 50 for index in pack}) == 1 for pack in packs)


def test_first_fit_by_hand():
    assert lists(make_packs([6, 3, 4, 7, 2], max_length=10)) == [[3, 1], [0, 2], [4]]


def test_documents_that_fit_nowhere_are_named():
    with pytest.raises(
        ValueError, match="2 documents fit into no pack, the first is document 1 of 20 tokens.*max_length=10"
    ):
        make_packs([5, 20, 30], max_length=10)
    with pytest.raises(ValueError, match="max_flops needs the flops of all 2 documents, got None"):
        make_packs([5, 6], max_flops=10.0)
    with pytest.raises(ValueError, match="pass max_length, max_flops or both"):
        make_packs([5, 6])


def test_report_by_hand():
    # Three packs of 10, 8 and 4 tokens; two ranks: the third pack makes no step.
    packs = make_packs([6, 4, 8, 4], [36.0, 16.0, 64.0, 1.0], max_length=10, window=2)
    assert lists(packs) == [[0, 1], [2], [3]]
    report = PackingReport.of(packs, num_ranks=2)
    assert (report.num_documents, report.num_packs, report.num_tokens, report.padding) == (4, 3, 22, 0)
    assert report.balance == pytest.approx((52 + 64) / 2 / 64)
    with pytest.raises(ValueError, match="3 packs make no step of 4 ranks"):
        PackingReport.of(packs, num_ranks=4)


def test_report_of_padding_by_hand():
    # Two ranks, batches of two, one and two documents: (6, 4), (8,), (8, 2) and (4,), padded to 6, 8, 8 and 4.
    report = PackingReport.of_padding(
        [6, 4, 8, 8, 2, 4],
        [36.0, 16.0, 64.0, 64.0, 4.0, 16.0],
        [[0, 1], [2], [3, 4], [5]],
        padding_flops=10.0,
        num_ranks=2,
    )
    assert (report.num_documents, report.num_packs, report.num_tokens) == (6, 4, 32)
    assert report.padding == pytest.approx(8 / 40)
    assert report.balance == pytest.approx((72 + 64 + 128 + 16) / 2 / (72 + 128))


def test_equal_computation_balances_ranks_better_than_equal_length():
    lengths = np.random.default_rng(1).choice([10, 80], 4000, p=[0.8, 0.2])
    flops = lengths + 0.05 * lengths**2.0
    by_length = make_packs(lengths, flops, max_length=160, seed=0)
    by_flops = make_packs(lengths, flops, max_flops=800.0, seed=0)
    balance = [PackingReport.of(packs, num_ranks=8).balance for packs in (by_length, by_flops)]
    assert balance[0] < 0.8 < 0.95 < balance[1]


# ---- packed batches


def test_a_packed_batch_is_its_documents_apart():
    model = toy_model().train()
    # The first token of a text is no target when packed: nothing of its own document comes before it.
    apart = [model(**NextFlowDataCollator(pad_token_id=0)([document])) for document in ROWS]
    counts = torch.stack([out.scale_counts for out in apart])
    losses = (torch.stack([out.scale_losses for out in apart]) * counts).sum(0) / counts.sum(0).clamp(min=1)
    total = sum(out.loss * out.scale_counts.sum() for out in apart)
    total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for packs in ([ROWS], [ROWS[:3], ROWS[3:5], ROWS[5:]]):
        model.zero_grad()
        batch = PackingCollator(model.config, pad_to_multiple_of=16)(packs)
        assert "attention_mask" not in batch and batch["input_ids"].shape[1] % 16 == 0
        out = model(**batch, num_items_in_batch=1)
        out.loss.backward()
        torch.testing.assert_close(out.loss, total, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(out.scale_losses, losses, atol=1e-5, rtol=1e-5)
        assert torch.equal(out.scale_counts, counts.sum(0))
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.testing.assert_close(gradients, expected, atol=1e-3, rtol=1e-3)


def test_packing_collator_by_hand():
    batch = PackingCollator(toy_config(), length=12)([[row(text=2), row(text=3, seed=1)], row(text=4)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, *range(5)], [*range(5), *range(7)]]
    assert batch["labels"].tolist() == [
        [-100, 6, EOS, -100, 7, 8, EOS, *[-100] * 5],
        [-100, 6, 7, 8, EOS, *[-100] * 7],
    ]
    with pytest.raises(ValueError, match="a pack has 13 tokens, expected at most length=12"):
        PackingCollator(toy_config(), length=12)([row(text=12)])
    with pytest.raises(ValueError, match="begins with an image to be trained on"):
        PackingCollator(toy_config())([row(SQUARE, text=0)])


def test_costs_are_read_from_the_columns():
    """Of data sets, of parts of them, and of rows without images, as from the rows themselves."""
    config, rows = toy_config(), [*ROWS, {**row(SQUARE, seed=9), "image_grids": grids_tensor(SQUARE, WIDE).tolist()}]
    data = Dataset.from_list(rows)
    cases = [
        (data, rows),
        (data.select([6, 0, 3]), [rows[6], rows[0], rows[3]]),
        (data.select(range(2, 5)), rows[2:5]),
    ]
    texts = [row(seed=seed) for seed in range(3)]
    cases += [
        (Dataset.from_list(texts), texts),
        (datasets.concatenate_datasets([data, data.select([1])]), [*rows, rows[1]]),
    ]
    for columns, expected in cases:
        lengths, flops = document_costs(columns, config)
        assert lengths.tolist() == [row["length"] for row in expected]
        assert flops.tolist() == [training_flops(config, row["length"], row["image_grids"]) for row in expected]


# ---- more rows than are planned at once


@pytest.mark.parametrize("size", [7, 64, 200])
def test_an_endless_walk_has_every_row_once_an_epoch(size, monkeypatch):
    monkeypatch.setattr(packs_module, "CHUNK", 16)
    walk = endless_rows(0, 3 * size, size, (0,)).reshape(3, size)
    assert (np.sort(walk, axis=1) == np.arange(size)).all()
    assert not (walk[0] == walk[1]).all()
    parts = [endless_rows(start, min(start + 11, 3 * size), size, (0,)) for start in range(0, 3 * size, 11)]
    assert np.concatenate(parts).tolist() == walk.ravel().tolist()


def many_rows(count: int, seed: int) -> Dataset:
    lengths = np.random.default_rng(seed).integers(5, 90, count)
    columns = {"length": lengths, "row_id": [f"{seed}-{index}" for index in range(count)]}
    return Dataset.from_dict({**columns, "image_grids": [[[[1, 1], [2, 2]]]] * count}).with_format("numpy")


@pytest.fixture
def make_endless(tmp_path, monkeypatch):
    monkeypatch.setattr(packs_module, "CHUNK", 16)
    sources = [many_rows(900, 0), many_rows(300, 1)]

    def make(**options) -> EndlessPackedDataset:
        options = {"max_length": 100, "window": 2, "counts_file": tmp_path / "packs.json", **options}
        return EndlessPackedDataset(sources, toy_config(), **options)

    return make


def packs_of(data: EndlessPackedDataset, count: int) -> list[list[str]]:
    return [[str(row["row_id"]) for row in data[key]] for key in itertools.islice(data.sampler(), count)]


def test_endless_packs_keep_limits_and_weights(make_endless):
    data = make_endless(window=4)  # blocks of 2,048 rows
    packs = packs_of(data, data.num_packs(0))
    assert all(sum(int(row["length"]) for row in data[0, place]) <= 100 for place in range(data.num_packs(0)))
    names = [name for pack in packs for name in pack]
    counts = np.unique(names, return_counts=True)[1]
    assert len(names) == 2048 and len(counts) == 1200 and set(counts) == {1, 2}  # an epoch and a part of the next
    shares = [name[0] for pack in packs_of(make_endless(weights=[1, 3], window=4), 700) for name in pack]
    assert shares.count("1") / len(shares) == pytest.approx(0.75, abs=0.05)
    assert packs != packs_of(make_endless(seed=1, window=4), len(packs))
    report = data.report(num_ranks=8)
    assert report.num_documents == 2048 and report.num_packs == data.num_packs(0) and 0.5 < report.balance <= 1


def test_a_run_that_goes_on_plans_nothing_behind_it(make_endless, monkeypatch):
    first = make_endless()
    keys = list(itertools.islice(first.sampler(), 1100))  # into the second block of 1,024 rows
    expected = packs_of(first, 1100)
    planned = []
    again, plan = make_endless(), EndlessPackedDataset._plan
    monkeypatch.setattr(EndlessPackedDataset, "_plan", lambda self, block: planned.append(block) or plan(self, block))
    assert keys[-1][0] == 1
    assert [str(row["row_id"]) for row in again[keys[-1]]] == expected[-1] and set(planned) == {1}
    planned.clear()
    assert list(itertools.islice(again.sampler(), 1100)) == keys and not planned
    other = make_endless(max_length=120)  # of another plan, the counts say nothing
    assert other.num_packs(0) == len(plan(other, 0)) != again.num_packs(0)


def test_long_rows_of_a_block_are_named(make_endless, caplog):
    with pytest.raises(ValueError, match='fit into no pack.*on_long_row="skip"'):
        make_endless(max_length=80).num_packs(0)
    data = make_endless(max_length=80, on_long_row="skip")
    assert data.num_packs(0) and "of 1024 rows fit into no pack and are left out: ['" in caplog.text


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_trainer_takes_packs(kind, tmp_path):
    config = toy_config()
    rows = ROWS * 2
    packed = PackedDataset(rows if kind == "list" else Dataset.from_list(rows), config, max_length=64)
    assert sum(map(len, packed)) == 12 and len(packed) < 12
    assert packed.report().num_tokens == sum(document["length"] for document in rows)
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, max_steps=1,
        per_device_train_batch_size=len(packed), save_strategy="no",
    )  # fmt: skip
    trainer = NextFlowTrainer(
        model=toy_model(), args=args, train_dataset=packed, data_collator=PackingCollator(config)
    )
    trainer.train()
    plain = toy_model().train()(
        **NextFlowDataCollator(pad_token_id=0)([{**r, "labels": [-100, *r["labels"][1:]]} for r in rows])
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(plain.loss.item(), rel=1e-3)


def test_a_stream_is_packed_a_window_at_a_time():
    config = toy_config()
    stream = PackedIterableDataset(ROWS * 3, config, max_length=64, window=6)
    packs = list(stream)
    assert packs[: len(packs) // 3] == packs[len(packs) // 3 : 2 * len(packs) // 3]  # the same window three times
    assert sorted(len(r["input_ids"]) for p in packs for r in p) == sorted(r["length"] for r in ROWS * 3)
    assert all(sum(r["length"] for r in p) <= 64 for p in packs)
    assert packs == list(stream)
    endless = iter(PackedIterableDataset(itertools.cycle(ROWS), config, max_flops=1e9, window=6))
    assert sum(map(len, itertools.islice(endless, 3))) >= 3
