"""A module that keeps its parameters and buffers in float32 when the model around it is cast to half precision."""

from collections.abc import Callable

import torch
from torch import nn


class UnroundedModule(nn.Module):
    """`.half()`, `.to(torch.bfloat16)` and the like move this module to their device, and leave its dtype as it is."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "UnroundedModule":
        def without_rounding(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            # Only casts to fewer than four bytes round; other devices and wider dtypes are let through.
            rounds = applied.dtype != tensor.dtype and applied.itemsize < 4
            return tensor.to(applied.device) if rounds else applied

        return super()._apply(without_rounding, recurse)
