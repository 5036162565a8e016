"""Muon for the matrices of the decoder's layers and AdamW for everything else, as one optimiser.

`torch.optim.Muon` takes only matrices, and every process orthogonalises all of them, one after the other and in bf16:
half a step of a small model on a CPU. Here matrices of one shape are one batch, of which every process takes a share.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


# Newton-Schulz coefficients of Jordan et al. (2024): they lead singular values of (0, 1] near 1 in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_STEPS = 5
RMS = 0.2  # of AdamW's updates, relative to the learning rate (arXiv 2502.16982, §2.2)


class MuonWithAdamW(torch.optim.Optimizer):
    """
    The update of a matrix is its momentum, made nearly orthogonal and scaled to the size of an update of AdamW: the
    learning rate and the weight decay of AdamW fit (arXiv 2502.16982). All other parameters have AdamW.

    Under data parallelism the gradients must be the same on all processes, as they are in `DistributedDataParallel`.

    Args:
        matrices (`Iterable[nn.Parameter]`): Parameters of two dimensions that are matrices to be multiplied by.
        others (`Iterable[dict]`): Parameter groups of AdamW.
        lr (`float`): Learning rate of both.
        weight_decay (`float`): Decay of the matrices, decoupled.
        momentum (`float`, *optional*, defaults to 0.95): Momentum of the matrices, with Nesterov's look ahead.
        in_bfloat16 (`bool`, *optional*, defaults to `False`):
            Whether a CPU, too, orthogonalises in bfloat16, as accelerators do: for CPUs that train fastest in it.
        adamw_options: Passed to `torch.optim.AdamW` (`betas`, `eps`, `fused`).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[dict],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        in_bfloat16: bool = False,
        **adamw_options,
    ):
        self.in_bfloat16 = in_bfloat16
        matrices = list(matrices)
        if wrong := [tuple(matrix.shape) for matrix in matrices if matrix.ndim != 2]:
            raise ValueError(f"expected parameters of two dimensions, got the shapes {wrong}")
        self.adamw = torch.optim.AdamW(list(others), lr=lr, **adamw_options)
        muon_group = {"params": matrices, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([muon_group, *self.adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both optimizers, see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon_group, *adamw_groups = self.param_groups
        # Again in every step: load_state_dict makes new objects.
        self.adamw.param_groups, self.adamw.state = adamw_groups, self.state
        self.adamw.step()
        self._step_of_matrices(muon_group)
        return loss

    def _step_of_matrices(self, group: dict) -> None:
        batches: dict[tuple, list[nn.Parameter]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                # Sorted: a matrix and its transpose have the same orthogonal factor, so both shapes share a batch.
                key = (*sorted(matrix.shape), matrix.device, matrix.dtype)
                batches.setdefault(key, []).append(matrix)
        for matrices in batches.values():
            directions = [self._direction(matrix, group["momentum"]) for matrix in matrices]
            stack = torch.stack([wide(direction) for direction in directions])
            updates = orthogonalize_in_shares(stack, in_bfloat16=self.in_bfloat16)
            for matrix, update in zip(matrices, updates):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                # An orthogonal matrix has entries of RMS 1 / sqrt(longer side): scaled to those of AdamW's updates.
                wide(matrix).add_(update, alpha=-group["lr"] * RMS * max(matrix.shape) ** 0.5)

    def _direction(self, matrix: nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
        # Nesterov: the gradient counts once more, on top of the mean that it is part of.
        return matrix.grad.lerp(mean, momentum)


def matrices_of(layers: nn.Module) -> list[nn.Parameter]:
    """What Muon trains: the matrices of the layers. Embedding and head have a row for each token, as suits AdamW."""
    return [weight for weight in layers.parameters() if weight.ndim == 2 and weight.requires_grad]


def wide(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix or its transpose, a view: whichever has no more rows than columns."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalize_in_shares(matrices: torch.Tensor, *, in_bfloat16: bool = False) -> torch.Tensor:
    """`orthogonalize`, of which every process computes a share, the same for all on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonalize(matrices, in_bfloat16=in_bfloat16)
    share = -(-len(matrices) // dist.get_world_size())
    mine = matrices[dist.get_rank() * share :][:share]
    gathered = matrices.new_zeros(dist.get_world_size() * share, *matrices.shape[1:])
    # `all_gather` wants equal sizes, and the last share may be smaller.
    padded = matrices.new_zeros(share, *matrices.shape[1:])
    padded[: len(mine)] = orthogonalize(mine, in_bfloat16=in_bfloat16)
    dist.all_gather(list(gathered.chunk(dist.get_world_size())), padded)
    return gathered[: len(matrices)]


def orthogonalize(matrices: torch.Tensor, *, in_bfloat16: bool = False) -> torch.Tensor:
    """
    Matrices (n, rows, columns), rows <= columns, with all singular values near 1 (0.7 to 1.2), in their dtype.

    Newton-Schulz iterations: an odd polynomial of the matrix is that polynomial of its singular values.
    """
    a, b, c = COEFFICIENTS
    # Many CPUs multiply fastest in fp32; elsewhere bf16 is enough.
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" and not in_bfloat16 else torch.bfloat16)
    # The Frobenius norm is no less than the largest singular value, so all of them are in (0, 1].
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
