"""The codebook's health: how its codes are used, what it starts from, and where dead codes start anew.

Random samples are taken from the images of all processes, in the order in which one process would have had them, with
a generator of the step: neither the number of processes nor a restart of the run changes them.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...modeling_nextflow.quantizer_nextflow import NextFlowMultiScaleQuantizer
from ..data.images import NextFlowVisionTokenizerCollator


class CodeUsage:
    """
    Counts of the codes, over the images of all processes.

    Args:
        codebook_size (`int`): Number of codes.
        accelerator (`Accelerator`): Adds up the processes.
    """

    def __init__(self, codebook_size: int, accelerator: Accelerator):
        self.accelerator = accelerator
        device = accelerator.device
        self.step_counts = torch.zeros(codebook_size, device=device)
        self.scale_counts = torch.zeros(0, codebook_size, device=device)
        self.steps_unused = torch.zeros(codebook_size, dtype=torch.long, device=device)

    def add(self, image_codes: torch.Tensor, image_grids: torch.Tensor) -> None:
        """Counts the codes of a batch of this process."""
        counts = count_codes_per_scale(image_codes, image_grids, len(self.steps_unused))
        self.step_counts += counts.sum(0)
        self._grow(len(counts))
        self.scale_counts[: len(counts)] += counts

    def end_step(self) -> None:
        """Whether the codes were used in this step, by any process."""
        counts = self.accelerator.reduce(self.step_counts, "sum")
        self.steps_unused = torch.where(counts > 0, 0, self.steps_unused + 1)
        self.step_counts.zero_()

    def metrics(self) -> dict[str, float]:
        """Usage and perplexity since the last call, of every scale and in total; empty if nothing was counted."""
        scales = torch.tensor([len(self.scale_counts)], device=self.scale_counts.device)
        # Processes may have counted schedules of other lengths, and a reduction wants equal shapes.
        self._grow(int(self.accelerator.gather(scales).max()))
        if not len(self.scale_counts):
            return {}
        counts = self.accelerator.reduce(self.scale_counts, "sum").cpu()
        self.scale_counts = self.scale_counts[:0]
        values = {}
        for scale, row in enumerate(counts, start=1):
            if row.sum() > 0:
                usage, perplexity = codebook_statistics(row)
                values |= {f"usage_scale_{scale}": round(usage, 4), f"perplexity_scale_{scale}": round(perplexity, 1)}
        if values:
            usage, perplexity = codebook_statistics(counts.sum(0))
            values |= {"codebook_usage": round(usage, 4), "codebook_perplexity": round(perplexity, 1)}
        return values

    def _grow(self, scales: int) -> None:
        missing = scales - len(self.scale_counts)
        if missing > 0:
            self.scale_counts = F.pad(self.scale_counts, (0, 0, 0, missing))


def count_codes_per_scale(image_codes: torch.Tensor, image_grids: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """How often each code occurs in each scale, (max_scales, codebook_size). Codes of -1 (dropped) are not counted."""
    max_scales = image_grids.shape[1]
    cells = image_grids.prod(-1)  # (n, max_scales), zero after an image's last scale
    scales = torch.arange(max_scales, device=cells.device).expand_as(cells).flatten()
    # One number for (scale, code), so that both are counted at once.
    joint = scales.repeat_interleave(cells.flatten()) * codebook_size + image_codes.clamp(min=0)
    counts = torch.zeros(max_scales * codebook_size, device=image_codes.device)
    return counts.index_add_(0, joint, (image_codes >= 0).float()).view(max_scales, codebook_size)


def codebook_statistics(counts: torch.Tensor) -> tuple[float, float]:
    """Share of the codes that were used, and the perplexity of their distribution, from counts (codebook_size,)."""
    shares = counts.double() / counts.sum()
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


def scale_queries(
    quantizer: NextFlowMultiScaleQuantizer,
    features: torch.Tensor,
    schedule: tuple[tuple[int, int], ...],
    *,
    quantize: bool,
) -> torch.Tensor:
    """
    The vectors that all scales look up, (n, cells of all scales, code_dim), both parts of length one. Without
    `quantize` each is its own code: what a perfect codebook would see, for a codebook that does not exist yet.
    """
    # The arithmetic of the quantiser's `forward`, which does not return its queries.
    residual, codebook, queries = features, quantizer.codebook(), []
    for grid in schedule:
        query = residual if grid == schedule[-1] else F.interpolate(residual, grid, mode="area")
        query = quantizer.normalize(query.flatten(2).transpose(1, 2))
        vectors = quantizer.lookup(quantizer.search(query, codebook)[0]) if quantize else query
        residual = residual - quantizer.upsample(vectors, grid, schedule[-1])
        queries.append(query)
    return torch.cat(queries, 1)


def sample_queries(
    batches: Sequence[Sequence[torch.Tensor]],
    count: int,
    accelerator: Accelerator,
    *,
    seed: Sequence[int],
    replace: bool,
) -> torch.Tensor:
    """
    `count` vectors, the same in all processes, from the images of all of them.

    Args:
        batches (`Sequence[Sequence[torch.Tensor]]`):
            Of this process: the vectors (cells, code_dim) of every image of every batch. All processes have as many
            batches of as many images.
        count (`int`): How many.
        accelerator (`Accelerator`): Knows the processes.
        seed (`Sequence[int]`): Seed of the random numbers.
        replace (`bool`): Whether a vector may be taken twice.
    """
    rank, vectors = accelerator.process_index, batches[0][0]
    # The last batch of an epoch may have fewer images: then zeros fill its row.
    own_sizes = pad_sequence([torch.tensor([len(image) for image in batch]) for batch in batches], batch_first=True)
    own_sizes = own_sizes.to(vectors.device)
    # (processes, batches, images) -> the order in which one process would have had them.
    sizes = accelerator.gather(own_sizes[None]).transpose(0, 1).cpu()
    ends = sizes.flatten().cumsum(0).view(sizes.shape)
    total = int(sizes.sum())
    if not replace and total < count:
        raise ValueError(f"got {total} features, expected at least one for each of the {count} codes")
    # All processes choose alike, as they have the same seed and sizes.
    chosen = np.random.default_rng(list(seed)).choice(total, count, replace=replace)
    chosen = torch.from_numpy(chosen)
    sampled = vectors.new_zeros(count, vectors.shape[-1])
    for own_ends, batch in zip(ends[:, rank], batches, strict=True):
        for end, image in zip(own_ends.tolist(), batch):
            # Counted from the first vector of this image; those outside of it are another's.
            rows = chosen - (end - len(image))
            inside = (rows >= 0) & (rows < len(image))
            sampled[inside.to(sampled.device)] = image[rows[inside].to(sampled.device)]
    # Each was filled in by the process that has its image.
    return accelerator.reduce(sampled, "sum")


def spherical_kmeans(
    quantizer: NextFlowMultiScaleQuantizer,
    centers: torch.Tensor,
    features: torch.Tensor,
    accelerator: Accelerator,
    *,
    iterations: int,
) -> torch.Tensor:
    """
    k-means with the quantiser's own distance, over the features (n, code_dim) of all processes. Starts from and gives
    centres (codebook_size, code_dim), both parts of length one.
    """
    for _ in range(iterations):
        nearest = quantizer.search(features[None], centers)[0][0]
        sums = torch.zeros_like(centers).index_add_(0, nearest, features)
        counts = torch.bincount(nearest, minlength=len(centers)).to(sums)
        sums, counts = accelerator.reduce([sums, counts], "sum")
        # A centre that no feature is nearest to stays where it is.
        centers = torch.where(counts[:, None] > 0, quantizer.normalize(sums), centers)
    return centers


@torch.no_grad()
def distinct_codes(quantizer: NextFlowMultiScaleQuantizer, counts: torch.Tensor, num_codes: int) -> torch.Tensor:
    """
    The `num_codes` codes that are left, in order, when of the two nearest codes the less used one goes, again and
    again. Near is what is near in the search.

    Args:
        counts (`torch.Tensor` of shape `(codebook_size,)`): How often each code is used.

    Raises:
        `ValueError`: where there are no more than `num_codes` codes.
    """
    config, codebook = quantizer.config, quantizer.codebook().float()
    if not 0 < num_codes < len(codebook):
        raise ValueError(f"num_codes is {num_codes}, expected at least 1 and fewer than the {len(codebook)} codes")
    semantic, pixel = codebook.split([config.semantic_code_dim, config.pixel_code_dim], dim=-1)
    distance = config.semantic_distance_weight * torch.cdist(semantic, semantic) ** 2
    distance += config.pixel_distance_weight * torch.cdist(pixel, pixel) ** 2
    distance.fill_diagonal_(torch.inf)
    for _ in range(len(codebook) - num_codes):
        pair = divmod(int(distance.argmin()), len(codebook))
        dropped = min(pair, key=lambda code: counts[code].item())
        distance[dropped] = distance[:, dropped] = torch.inf
    # A code that is left has a finite distance to the others that are, or is alone.
    left = torch.isfinite(distance).any(-1).nonzero()[:, 0]
    return left if num_codes > 1 else counts.argmax()[None]


@torch.no_grad()
def with_codes(vision_tokenizer: NextFlowVisionTokenizer, codes: torch.Tensor) -> NextFlowVisionTokenizer:
    """A copy of `vision_tokenizer` that has only the given codes, renumbered in their order."""
    config = copy.deepcopy(vision_tokenizer.config)
    config.codebook_size = len(codes)
    smaller = type(vision_tokenizer)(config).to(vision_tokenizer.device, vision_tokenizer.dtype)
    books = ("quantizer.semantic_codebook.weight", "quantizer.pixel_codebook.weight")
    state = {name: value[codes] if name in books else value for name, value in vision_tokenizer.state_dict().items()}
    smaller.load_state_dict(state)
    return smaller


def merged_codes(
    vision_tokenizer: NextFlowVisionTokenizer, images: Dataset, num_codes: int, *, num_images: int
) -> NextFlowVisionTokenizer:
    """
    A copy of `vision_tokenizer` with the `num_codes` codes of [`distinct_codes`].

    A codebook is densest where images are most alike, in plain backgrounds: which of many nearly equal codes a cell
    gets is then a matter of everything around it, which no transformer can foresee.

    Args:
        images (`Dataset`): Items of [`NextFlowImageDataset`]; the first `num_images` say how often a code is used.
    """
    counts = torch.zeros(vision_tokenizer.config.codebook_size, dtype=torch.long)
    some = Subset(images, range(min(num_images, len(images))))
    for batch in DataLoader(some, batch_size=16, collate_fn=NextFlowVisionTokenizerCollator()):
        pixels, grids = (batch[name].to(vision_tokenizer.device) for name in ("pixel_values", "image_grids"))
        with torch.no_grad():
            codes = vision_tokenizer.encode(pixels, grids).image_codes
        counts += torch.bincount(codes.cpu(), minlength=len(counts))
    return with_codes(vision_tokenizer, distinct_codes(vision_tokenizer.quantizer, counts, num_codes))
