"""The arithmetic of GRPO over scales, each against a statement of it in plain Python."""

import math
import statistics

import numpy as np
import pytest
import torch

from nextflow_hf.training.grpo.objective import (
    chunked_log_probs,
    clipped_loss,
    code_weights,
    combine_rewards,
    gated_advantages,
    group_advantages,
    group_advantages_by_function,
    kl_to_reference,
    mask_to_cells,
    middle_return,
    token_advantages,
)


NAN, INF = math.nan, math.inf
GRIDS = [(1, 1), (2, 2), (3, 3), (4, 6)]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_code_weights(alpha):
    weights = code_weights(GRIDS, alpha).tolist()
    raw = [(h * w) ** -alpha for h, w in GRIDS for _ in range(h * w)]
    assert weights == pytest.approx([value * len(raw) / sum(raw) for value in raw])
    assert sum(weights) == pytest.approx(len(raw))
    if alpha == 1:  # every scale has the same share
        assert sum(weights[1:5]) == pytest.approx(weights[0])


def test_weighted_codes_have_the_gradient_of_weighted_grids_on_policy():
    """The paper's objective has `k_t` times the ratio of a whole grid, a product; ours the codes' ratios."""
    torch.manual_seed(0)
    logits = torch.randn(5, 7, requires_grad=True)  # a 1x1 and a 2x2 scale, 7 codes
    codes, scale, advantage = torch.randint(7, (5,)), torch.tensor([0, 1, 1, 1, 1]), 1.7
    logps = logits.log_softmax(-1).gather(1, codes[:, None])[:, 0]
    k = torch.tensor([1.0, 4**-0.6])
    grids = torch.stack([(logps - logps.detach())[scale == t].sum().exp() for t in (0, 1)])
    paper = torch.autograd.grad(-(k * grids * advantage).sum(), logits, retain_graph=True)[0]
    ratio = (logps - logps.detach()).exp()
    losses = clipped_loss(ratio, torch.tensor(advantage), epsilon_low=0.2, epsilon_high=0.2)
    ours = torch.autograd.grad((losses * code_weights([(1, 1), (2, 2)], 0.6)).sum(), logits)[0]
    torch.testing.assert_close(ours, paper * 5 / (k[0] + 4 * k[1]))


def test_clipped_loss():
    for ratio in (0.5, 0.85, 1.0, 1.1, 1.4, 9.0):
        for advantage in (-2.0, 0.0, 1.5):
            for delta in (None, 3.0):
                bounded = ratio if delta is None else min(ratio, delta)
                expected = -min(bounded * advantage, min(max(ratio, 0.8), 1.3) * advantage)
                got = clipped_loss(
                    torch.tensor(ratio), torch.tensor(advantage), epsilon_low=0.2, epsilon_high=0.3, delta=delta
                )
                assert got.item() == pytest.approx(expected)


def test_kl_estimate_is_unbiased_and_never_negative():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    estimates = kl_to_reference(policy.log(), reference.log())
    assert (estimates >= 0).all()
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist()))
    assert (policy * estimates).sum().item() == pytest.approx(exact, rel=1e-5)


def overlaps(cell: int, cells: int, other: int, others: int) -> bool:
    return cell * others < (other + 1) * cells and other * cells < (cell + 1) * others


def test_masks_propagate_from_pixels_to_the_cells_of_every_scale():
    torch.manual_seed(1)
    for mask in (torch.rand(16, 24) < 0.02, torch.rand(16, 24) < 0.1, torch.ones(16, 24, dtype=torch.bool)):
        finer, size, expected = mask.tolist(), mask.shape, []
        for grid in reversed(GRIDS):
            active = [
                [
                    any(
                        finer[i][j] and overlaps(row, grid[0], i, size[0]) and overlaps(column, grid[1], j, size[1])
                        for i in range(size[0])
                        for j in range(size[1])
                    )
                    for column in range(grid[1])
                ]
                for row in range(grid[0])
            ]
            expected = [cell for line in active for cell in line] + expected
            finer, size = active, grid
        assert mask_to_cells(mask.numpy(), GRIDS).tolist() == expected
    assert mask_to_cells(np.zeros((16, 24), dtype=bool), GRIDS).all() and mask_to_cells(None, GRIDS).all()
    corner = np.zeros((16, 24), dtype=bool)
    corner[0, 0] = True
    assert mask_to_cells(corner, GRIDS).nonzero()[:, 0].tolist() == [0, 1, 5, 14]


def test_a_missing_reward_is_no_zero():
    """Two groups of two; failed is infinite, not applicable NaN."""
    rewards = torch.tensor([[1.0, NAN], [2.0, NAN], [INF, 5.0], [4.0, 6.0]])
    by_function, total = combine_rewards(rewards, torch.tensor([1.0, 10.0]), 2)
    torch.testing.assert_close(total, torch.tensor([1.0, 2.0, NAN, 64.0]), equal_nan=True)
    assert torch.isnan(by_function[2, 0])
    # It applies to the neighbour in its group: the sum without it would not compare.
    _, total = combine_rewards(torch.tensor([[1.0, NAN], [1.0, 3.0]]), torch.tensor([1.0, 1.0]), 2)
    torch.testing.assert_close(total, torch.tensor([NAN, 4.0]), equal_nan=True)
    # All of a group failed; nothing applies.
    for lost in (-INF, NAN):
        assert torch.isnan(combine_rewards(torch.full((2, 1), lost), torch.ones(1), 2)[1]).all()


@pytest.mark.parametrize("eta", [0.01, 1.0, 100.0])
def test_middle_return(eta):
    rewards = [[0.2, 0.9, NAN], [0.6, 0.9, NAN]]
    got = middle_return(torch.tensor(rewards, dtype=torch.float64), eta).tolist()
    expected = eta * (math.log(sum(math.exp((r - 0.6) / eta) for r in (0.2, 0.6)) / 2)) + 0.6
    assert got[:2] == pytest.approx([expected, 0.9]) and math.isnan(got[2])
    one_missing = middle_return(torch.tensor([[0.2], [NAN]], dtype=torch.float64), eta)
    assert one_missing.item() == pytest.approx(0.2)
    assert expected == pytest.approx({0.01: 0.6 - 0.01 * math.log(2), 100.0: 0.4}.get(eta, expected), abs=1e-3)


def test_group_advantages():
    groups = [[1.0, 2.0, 4.0], [3.0, 3.0, 3.0], [0.0, NAN, 1.0]]
    rewards = torch.tensor(groups).flatten()
    known = [[value for value in group if not math.isnan(value)] for group in groups]
    everything = statistics.stdev(value for group in known for value in group)
    for scale in ("group", "batch", "none"):
        expected = []
        for group, values in zip(groups, known):
            mean, spread = statistics.mean(values), statistics.stdev(values)
            divisor = {"group": spread + 1e-4, "batch": everything + 1e-4, "none": 1.0}[scale]
            expected += [0.0 if math.isnan(value) else (value - mean) / divisor for value in group]
        advantages, deviations = group_advantages(rewards, 3, scale)
        assert advantages.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert deviations.tolist() == pytest.approx([statistics.stdev(values) for values in known])
    assert advantages[3:6].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="'std'"):
        group_advantages(rewards, 3, "std")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage_at_all(scale):
    """Not even that of rounding: the mean of seven times 0.7 is not 0.7 in single precision."""
    alike = [0.7] * 7
    assert torch.tensor(alike).mean() != torch.tensor(alike)[0]
    rewards = torch.tensor([*alike, *alike[:5], NAN, NAN, *[NAN] * 7, *range(7)], dtype=torch.float32)
    advantages, deviations = group_advantages(rewards, 7, scale)
    assert not advantages[:21].any() and advantages[21:].any()
    assert deviations[:3].tolist() == [0, 0, 0] and deviations[3] > 1


def test_group_advantages_by_function():
    columns = [[1.0, 2.0, 0.0, 4.0], [10.0, 30.0, 5.0, 5.0]]
    weights = [1.0, 0.5]
    sums = [0.0] * 4
    for column, weight in zip(columns, weights):
        for start in (0, 2):
            pair = column[start : start + 2]
            for index, value in enumerate(pair):
                advantage = (value - statistics.mean(pair)) / (statistics.stdev(pair) + 1e-4)
                sums[start + index] += weight * advantage
    expected = [(value - statistics.mean(sums)) / (statistics.stdev(sums) + 1e-4) for value in sums]
    rewards = torch.tensor(columns).T
    advantages, deviations = group_advantages_by_function(rewards, torch.tensor(weights), 2)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-4)
    assert deviations.tolist() == pytest.approx([statistics.stdev([6, 17]), statistics.stdev([2.5, 6.5])], rel=1e-5)


def test_log_probs_in_chunks():
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 9)
    targets, upstream = torch.randint(9, (10,)), torch.randn(10)
    results = []
    for chunk_size in (100, 3):
        hidden = torch.arange(60.0).view(10, 6).div(30).requires_grad_()
        head.zero_grad()
        logps, entropies = chunked_log_probs(hidden, head, targets, temperature=0.7, chunk_size=chunk_size)
        assert not entropies.requires_grad
        (logps * upstream).sum().backward()
        results.append((logps.detach(), entropies, hidden.grad, head.weight.grad.clone()))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(whole, chunked)
    distribution = torch.distributions.Categorical(logits=head(torch.arange(60.0).view(10, 6).div(30)) / 0.7)
    torch.testing.assert_close(results[0][0], distribution.log_prob(targets).detach())
    torch.testing.assert_close(results[0][1], distribution.entropy().detach())


def test_masks_gate_rewards():
    """A group of three, two codes. The masks of all cover the first; those of the first two samples the second."""
    rewards = torch.tensor([[1.0], [3.0], [8.0]])
    gates = torch.tensor([[[True, True]], [[True, True]], [[True, False]]])
    got = gated_advantages(lambda column: group_advantages(column[:, 0], 3, "none"), rewards, gates)
    # First code: 1, 3, 8 against their mean 4. Second: 1, 3 against 2, and nothing for the third.
    torch.testing.assert_close(got, torch.tensor([[-3.0, -1.0], [-1.0, 1.0], [4.0, 0.0]]))
    # In units of the deviation of the same samples: of 1, 3, 8 it is sqrt(13), of 1, 3 it is sqrt(2).
    got = gated_advantages(lambda column: group_advantages(column[:, 0], 3), rewards, gates)
    expected = [[-3 / 13**0.5, -1 / 2**0.5], [-1 / 13**0.5, 1 / 2**0.5], [4 / 13**0.5, 0.0]]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-3, atol=1e-4)
    # Rewards that are all larger by 100 rank the samples as before, in every code.
    shifted = gated_advantages(lambda column: group_advantages(column[:, 0], 3, "none"), rewards + 100, gates)
    torch.testing.assert_close(
        shifted, gated_advantages(lambda column: group_advantages(column[:, 0], 3, "none"), rewards, gates)
    )


def test_masks_gate_middle_returns():
    """Two samples with two suffixes each: a code's value comes from the suffixes whose masks cover it."""
    rewards = torch.tensor([[1.0, 5.0], [2.0, 4.0]])
    gates = torch.tensor([[[True, True, False], [True, False, False]], [[True, True, True], [True, True, True]]])

    def normalize(column):
        return group_advantages(middle_return(column.T, eta=1.0), 2, "none")

    first, second = math.log((math.e + math.e**5) / 2), math.log((math.e**2 + math.e**4) / 2)
    # First code: all suffixes count. Second: of the first sample only the first. Third: nothing to compare with.
    half = [(first - second) / 2, (1.0 - second) / 2, 0.0]
    expected = torch.tensor([half, [-value for value in half]])
    torch.testing.assert_close(gated_advantages(normalize, rewards, gates), expected)


def test_advantages_of_tokens():
    scale_ids = torch.tensor([[0, 0, 1, 2, 2, 0], [0, 1, 2, 0, 0, 0]])
    of_codes = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    got = token_advantages(torch.tensor([7.0, 8.0]), of_codes, scale_ids)
    assert got.tolist() == [[7, 7, 1, 2, 3, 7], [8, 4, 5, 8, 8, 8]]
    assert token_advantages(torch.tensor([7.0]), None, scale_ids).tolist() == [7]
