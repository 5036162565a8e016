"""A module whose numbers stay float32 where the model around it is cast to less. Knows nothing of what they are."""

from collections.abc import Callable

import torch
from torch import nn


class UnroundedModule(nn.Module):
    """Its own parameters and buffers are moved by `.half()`, `.to(torch.bfloat16)` and the like, and not rounded."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "UnroundedModule":
        def without_rounding(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            rounds = applied.dtype != tensor.dtype and applied.itemsize < 4
            return tensor.to(applied.device) if rounds else applied

        return super()._apply(without_rounding, recurse)
