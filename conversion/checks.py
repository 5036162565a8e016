"""Whether what was converted is all that the model needs, and nothing else."""

from collections.abc import Iterable, Mapping

import torch


def check_whole(
    converted: Mapping[str, torch.Tensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    what: str,
    unknown: Iterable[str] = (),
) -> None:
    """Raises `ValueError` where tensors are missing, have another shape than `expected`, or no place (`unknown`)."""
    missing = [name for name in expected if name not in converted]
    left_over = [*unknown, *(name for name in converted if name not in expected)]
    wrong = [
        f"{name} {tuple(tensor.shape)} (expected {expected[name]})"
        for name, tensor in converted.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    for names, problem in ((missing, "are missing"), (left_over, "have no place"), (wrong, "have another shape")):
        if names:
            raise ValueError(f"not a whole {what}: {len(names)} tensors {problem}: {first_of(names)}")


def first_of(names: Iterable[str]) -> str:
    """The first five, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
