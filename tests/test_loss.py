"""The fused loss: equal to the plain one in value and gradients, and never in possession of all logits."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import BOI, CODES, EOS, SQUARE, TEXT, grids_tensor, image_tokens, random_codes, toy_model

from nextflow_hf.modeling_nextflow.loss_nextflow import linear_cross_entropy, scale_weights, weighted_cross_entropy


TOKENS, HIDDEN, VOCABULARY = 37, 16, 50
PARTS = [(20, slice(0, 50)), (17, slice(30, 48))]


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, targets of both kinds, and weights from .2 to 300 as coarse and fine scales have them."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    targets = torch.cat([torch.randint(50, (20,)), torch.randint(30, 48, (17,))])
    return hidden, weight, targets, torch.logspace(-0.7, 2.5, TOKENS)


def plain_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    text = F.cross_entropy((hidden[:20] @ weight.T).float(), targets[:20], reduction="none")
    codes = F.cross_entropy((hidden[20:] @ weight[30:48].T).float(), targets[20:] - 30, reduction="none")
    return torch.cat([text, codes])


@pytest.mark.parametrize("chunk_size", [1, 8, 100])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_fused_loss_is_the_plain_one(precision, chunk_size):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
    hidden, weight, targets, token_weights = problem(dtype)
    with autocast:
        losses = plain_losses(hidden, weight, targets)
        total = (losses * token_weights).sum()
    expected = torch.autograd.grad(total / 7, (hidden, weight))
    with autocast:
        fused_total, fused_losses = weighted_cross_entropy(
            hidden, weight, targets, token_weights, parts=PARTS, chunk_size=chunk_size
        )
    gradients = torch.autograd.grad(fused_total / 7, (hidden, weight))
    torch.testing.assert_close(fused_losses, losses.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused_total, total, atol=0, rtol=1e-5)
    # In bfloat16 both round: by 2**-9, and the sum over chunks once a chunk.
    tolerance = 1e-5 if precision == "float32" else 2e-2 if chunk_size > 1 else 4e-2
    for ours, theirs in zip(gradients, expected):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()
        torch.testing.assert_close(ours, theirs, atol=tolerance * theirs.abs().max().item(), rtol=0)


def test_fused_loss_makes_only_the_gradients_that_are_asked_for():
    hidden, weight, targets, token_weights = problem()
    arguments = {"parts": PARTS, "chunk_size": 8}
    expected = weighted_cross_entropy(hidden, weight, targets, token_weights, **arguments)[0]
    expected.backward()
    frozen = weight.detach()
    alone = hidden.detach().clone().requires_grad_()
    weighted_cross_entropy(alone, frozen, targets, token_weights, **arguments)[0].backward()
    torch.testing.assert_close(alone.grad, hidden.grad)
    with torch.no_grad(), LargestTensor() as largest:
        total, _ = weighted_cross_entropy(hidden, weight, targets, token_weights, **arguments)
    assert not total.requires_grad
    assert largest.numel < weight.numel()  # an evaluation has no gradient of the head
    torch.testing.assert_close(total, expected)


def test_fused_loss_goes_backward_once():
    hidden, weight, targets, token_weights = problem()
    total, losses = weighted_cross_entropy(hidden, weight, targets, token_weights, parts=PARTS, chunk_size=8)
    assert not losses.requires_grad
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        total.backward()


def test_no_supervised_token_is_no_gradient():
    hidden, weight, _, _ = problem()
    none = torch.zeros(0, dtype=torch.long)
    total, _ = weighted_cross_entropy(
        hidden[:0], weight, none, none.float(), parts=[(0, slice(0, 50)), (0, slice(30, 48))], chunk_size=8
    )
    total.backward()
    assert total == 0 and not weight.grad.any() and not hidden.grad.any()


class LargestTensor(TorchDispatchMode):
    """The most elements that an operation allocates for a result. Views and results in place are none of its own."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((arguments, kwargs))}
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return result


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


ROW = [5, 6, *image_tokens(SQUARE), 7, EOS]
LABELS = [-100, 6, BOI, *[-100] * 30, 7, EOS]


def batch(copies: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([ROW] * copies),
        "labels": torch.tensor([LABELS] * copies),
        "image_codes": random_codes(*[SQUARE] * copies),
        "image_grids": grids_tensor(*[SQUARE] * copies),
    }


@pytest.mark.parametrize("head", ["plain", "wrapped"])
def test_the_logits_of_the_sequence_never_exist(head):
    # A head so large beside the rest that logits are the largest tensors; eight rows of 34 supervised tokens.
    boi = 4000 + CODES
    model = toy_model(
        text_vocab_size=4000,
        vocab_size=boi + 2,
        boi_token_id=boi,
        eoi_token_id=boi + 1,
        hidden_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
    ).train()
    if head == "wrapped":
        model.lm_head = WrappedHead(model.lm_head)
    model.loss_chunk_size = 16
    inputs = batch(8)
    for name in ("input_ids", "labels"):
        inputs[name] += (inputs[name] >= BOI) * (boi - BOI)
    text_logits = 8 * 4 * (boi + 2)  # the smallest set that a plain loss would hold
    seen = {}
    for name, skip_logits in (("fused", None), ("plain", False)):
        with LargestTensor() as largest:
            model(**inputs, skip_logits=skip_logits).loss.backward()
        seen[name] = largest.numel
    assert seen["fused"] <= 16 * (boi + 2) < text_logits
    assert seen["plain"] == 8 * len(ROW) * (boi + 2)  # the measure sees logits where there are some


class WrappedHead(torch.nn.Module):
    """As an adapter's or a quantised head: its rows cannot be sliced."""

    def __init__(self, head: torch.nn.Linear):
        super().__init__()
        self.head = head

    @property
    def weight(self) -> torch.Tensor:
        return self.head.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.head(hidden_states)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_any_head_trains_as_the_plain_one(joint, chunk_size):
    outputs, gradients = [], []
    for head in ("plain", "wrapped"):
        model = toy_model(joint_image_loss=joint).train()
        model.loss_chunk_size = chunk_size
        if head == "wrapped":
            model.lm_head = WrappedHead(model.lm_head)
        outputs.append(model(**batch(2)))
        outputs[-1].loss.backward()
        gradients.append({name.replace("head.head", "head"): p.grad for name, p in model.named_parameters()})
    for name in ("loss", "scale_losses", "scale_counts"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_image_codes_are_predicted_among_the_codes_or_among_all(joint):
    model = toy_model(joint_image_loss=joint).train()
    inputs = batch(1)
    out = model(**inputs, skip_logits=False)
    first = ROW.index(BOI)
    rows = slice(0, None) if joint else slice(TEXT, TEXT + CODES)
    targets = inputs["image_codes"] + (TEXT if joint else 0)
    losses = F.cross_entropy(out.logits[0, first : first + 30, rows], targets, reduction="none")
    scale_of = torch.tensor([k for k, (h, w) in enumerate(SQUARE) for _ in range(h * w)])
    expected = torch.stack([losses[scale_of == k].mean() for k in range(4)])
    torch.testing.assert_close(out.scale_losses[1:5], expected.detach())
    only_image = {**inputs, "labels": torch.where(inputs["input_ids"] == BOI, BOI, -100)}
    only_image["input_ids"], only_image["labels"] = only_image["input_ids"][:, 2:], only_image["labels"][:, 2:]
    model(**only_image).loss.backward()  # <boi> comes first, so that no text predicts it
    trained = model.lm_head.weight.grad.abs().sum(1) > 0
    assert trained.tolist() == [joint or TEXT <= row < TEXT + CODES for row in range(TEXT + CODES + 2)]
    weights = scale_weights(inputs["image_grids"], 0.9)[0][scale_of]
    torch.testing.assert_close(model(**only_image).loss, _image_loss(model, only_image, rows, targets, weights))


def _image_loss(model, inputs, rows, targets, weights) -> torch.Tensor:
    logits = model(**inputs, skip_logits=False).logits[0, :30, rows]
    return (F.cross_entropy(logits, targets, reduction="none") * weights).mean()


def test_chunked_loss_equals_the_plain_one_for_each_token():
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False)
    targets = torch.randint(50, (37,))
    results = []
    for chunk_size in (100, 8):
        hidden = torch.randn(37, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head.zero_grad()
        loss = linear_cross_entropy(hidden, head, targets, chunk_size=chunk_size)
        (loss * torch.arange(37)).sum().backward()
        results.append((loss.detach(), hidden.grad, head.weight.grad.clone()))
    for plain, chunked in zip(*results):
        torch.testing.assert_close(plain, chunked)
