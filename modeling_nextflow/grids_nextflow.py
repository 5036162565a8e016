"""Scale schedules as the models get them: `image_grids` (n_images, max_scales, 2), zero past an image's last scale.

Read and checked here, once for the transformer and the vision tokenizer. Which grids there are is the processor's.
"""

import torch


Schedule = tuple[tuple[int, int], ...]  # (height, width) of every scale, coarse to fine


def schedules_from_grids(image_grids: torch.Tensor) -> list[Schedule]:
    """Scale schedules, one tuple of (height, width) an image, from `image_grids` (n, max_scales, 2), zero-padded."""
    check_shape(image_grids)
    schedules = []
    for index, rows in enumerate(image_grids.tolist()):
        grids = tuple((height, width) for height, width in rows if height or width)
        if not grids or min(min(grid) for grid in grids) < 1 or any(any(row) for row in rows[len(grids) :]):
            raise ValueError(f"image_grids[{index}] is {rows}, expected positive grids and then zero rows only")
        schedules.append(grids)
    return schedules


def check_shape(image_grids: torch.Tensor) -> None:
    """Without a look at the numbers, which may be on another device."""
    if image_grids.ndim != 3 or image_grids.shape[-1] != 2:
        raise ValueError(f"image_grids has shape {tuple(image_grids.shape)}, expected (n_images, max_scales, 2)")
    if image_grids.is_floating_point():
        raise ValueError(f"image_grids is {image_grids.dtype}, expected integers")


def count_codes(schedule: Schedule) -> int:
    """Codes of an image: the cells of all its scales."""
    return sum(height * width for height, width in schedule)


def check_codes(codes: torch.Tensor, codebook_size: int, name: str = "image_codes") -> torch.Tensor:
    """`codes`, or `ValueError` where they are no codes of the codebook. Looks at the numbers: the host waits."""
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"{name} are {codes.dtype}, expected integers")
    low, high = (int(bound) for bound in codes.aminmax()) if codes.numel() else (0, 0)
    if low < 0 or high >= codebook_size:
        raise ValueError(f"{name} must lie in [0, {codebook_size}), got {low} to {high}")
    return codes
