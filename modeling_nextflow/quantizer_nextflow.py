"""The quantiser of the vision tokenizer: scales of residual codes from two codebooks with one index (§2.1).

A stack of feature maps of one schedule in, codes and their sum out, always in float32. Knows no pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import ModelOutput

from .configuration_nextflow import NextFlowVisionTokenizerConfig
from .grids_nextflow import Schedule
from .unrounded_nextflow import UnroundedModule


@dataclass
class NextFlowQuantizerOutput(ModelOutput):
    """
    What [`NextFlowMultiScaleQuantizer`] returns for a stack of `n` images of one schedule.

    Args:
        quantized (`torch.Tensor` of shape `(n, code_dim, height, width)`):
            Sum of the codes of all scales on the last grid, float32; its gradient goes straight to the features.
        image_codes (`torch.Tensor` of shape `(n, cells)`): Codes, scale-major; -1 at the cells of dropped scales.
        image_target_codes (`torch.Tensor` of shape `(n, cells)`): Nearest code of the residual actually reached.
        quantizer_loss (`torch.Tensor` of shape `()`): Codebook term.
        commitment_loss (`torch.Tensor` of shape `()`): Commitment term.
    """

    quantized: torch.Tensor | None = None
    image_codes: torch.Tensor | None = None
    image_target_codes: torch.Tensor | None = None
    quantizer_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None


class NextFlowMultiScaleQuantizer(UnroundedModule):
    """
    Multi-scale residual quantiser with two codebooks and one shared index (§2.1).

    Per scale: average the residual down to the grid, l2-normalise its semantic and its pixel part, take the code with
    the least weighted sum of squared distances, add its unit vectors, bicubically enlarged, to the sum, and subtract
    them from the residual. The whole module computes in float32 whatever the dtype of its input, of its parameters
    or of an enclosing autocast; its codebooks stay in float32 where a model is cast to less, since a
    rounded codebook has other nearest codes. PyTorch's process-wide TF32 switch is left as it is: turned on, it also
    rounds the products of the search.
    """

    def __init__(self, config: NextFlowVisionTokenizerConfig):
        super().__init__()
        self.config = config
        self.semantic_codebook = nn.Embedding(config.codebook_size, config.semantic_code_dim)
        self.pixel_codebook = nn.Embedding(config.codebook_size, config.pixel_code_dim)

    def forward(
        self,
        features: torch.Tensor,
        schedule: Schedule,
        *,
        noise: torch.Tensor | None = None,
        dropped: Sequence[bool] | None = None,
        quantize: bool = True,
    ) -> NextFlowQuantizerOutput:
        """
        Args:
            features (`torch.Tensor` of shape `(n, semantic_code_dim + pixel_code_dim, height, width)`):
                Continuous features on the last grid of `schedule`, any dtype.
            schedule (`tuple[tuple[int, int], ...]`): Grids, coarse to fine.
            noise (`torch.Tensor` of shape `(n, cells, 2)`, *optional*):
                Uniform numbers in [0, 1) for the self-correcting encoder: the first decides whether a cell's code is
                sampled, the second which of the nearest codes it becomes (§2.2).
            dropped (`Sequence[bool]`, *optional*): Scales that contribute nothing; the first and last never drop.
            quantize (`bool`, *optional*, defaults to `True`):
                `False` passes the features on as they are, with a commitment to the sum that a perfect codebook, one
                that has every direction, would give: how an autoencoder starts before it has a codebook.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            # Not `codebook()`: where weights are offloaded, an embedding has them only while it is called.
            codebook = self.lookup(torch.arange(self.config.codebook_size, device=features.device))
            target = features.detach()  # (n, code_dim, height, width)
            residual, total = features, torch.zeros_like(target)  # the residual keeps its gradient, for the commitment
            codes, target_codes, quantizer_losses, commitment_losses = [], [], [], []
            start = 0
            for index, grid in enumerate(schedule):
                last = index == len(schedule) - 1
                cells = slice(start, start + math.prod(grid))
                start = cells.stop
                if dropped is not None and dropped[index] and 0 < index and not last:
                    skipped = torch.full((len(features), math.prod(grid)), -1, device=features.device)
                    codes.append(skipped)
                    target_codes.append(skipped)
                    continue

                # (n, code_dim, height, width) -> (n, cells, code_dim)
                query = residual if grid == schedule[-1] else F.interpolate(residual, grid, mode="area")  # as in VAR
                query = self.normalize(query.flatten(2).transpose(1, 2))
                if quantize:
                    sampling = None if noise is None or last else noise[:, cells]
                    scale_codes, scale_targets = self.search(query.detach(), codebook, noise=sampling)
                    code_vectors = self.lookup(scale_codes)
                else:
                    scale_codes = scale_targets = torch.full(query.shape[:2], -1, device=features.device)
                    code_vectors = query.detach()
                up = self.upsample(code_vectors, grid, schedule[-1])
                total = total + up
                residual = residual - up.detach()  # of the sampled code, so later targets correct it

                codes.append(scale_codes)
                target_codes.append(scale_targets)
                quantizer_losses.append(self._error(code_vectors, query.detach()))  # moves the codebook
                commitment_losses.append(self._error(query, code_vectors.detach()))  # moves the features

            # The lookup ignores lengths, so directions do not tie the features to the sum that stands in for them.
            weight = self.config.accumulated_loss_weight
            quantizer_loss = torch.stack(quantizer_losses).mean() + weight * F.mse_loss(total, target)
            commitment_loss = torch.stack(commitment_losses).mean() + weight * F.mse_loss(features, total.detach())
            return NextFlowQuantizerOutput(
                # Straight through; written so that the value is the sum to the last bit: features - target is zero.
                quantized=total.detach() + (features - target) if quantize else features,
                image_codes=torch.cat(codes, 1),
                image_target_codes=torch.cat(target_codes, 1),
                quantizer_loss=quantizer_loss,
                commitment_loss=commitment_loss,
            )

    def decode(self, image_codes: torch.Tensor, schedule: Schedule, *, num_scales: int | None = None) -> torch.Tensor:
        """
        Codes (n, cells of the first `num_scales` scales) to their sum on the last grid, float32 (n, code_dim, height,
        width), bit for bit what quantising gave.
        """
        grids = schedule[:num_scales]
        with torch.autocast(image_codes.device.type, enabled=False):
            scales = image_codes.split([math.prod(grid) for grid in grids], 1)
            # In the order of `forward`, as the sum of floats depends on it.
            maps = (
                self.upsample(self.lookup(codes), grid, schedule[-1])
                for codes, grid in zip(scales, grids, strict=True)
            )
            return sum(maps, next(maps) + 0)  # as quantising does, which begins at zero: that makes -0.0 a 0.0

    def codebook(self) -> torch.Tensor:
        """Unit semantic and unit pixel vectors of every code, float32 (codebook_size, code_dim)."""
        return self.normalize(torch.cat([self.semantic_codebook.weight, self.pixel_codebook.weight], -1))

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (...) to their rows of [`codebook`], float32 (..., code_dim)."""
        return self.normalize(torch.cat([self.semantic_codebook(codes), self.pixel_codebook(codes)], -1))

    def normalize(self, vectors: torch.Tensor) -> torch.Tensor:
        """Both parts of (..., code_dim) to length one, in float32."""
        split = [self.config.semantic_code_dim, self.config.pixel_code_dim]
        # Each part by itself, so neither codebook outweighs the other by its length.
        return torch.cat([F.normalize(part, dim=-1) for part in vectors.float().split(split, -1)], -1)

    def upsample(self, code_vectors: torch.Tensor, grid: tuple[int, int], last_grid: tuple[int, int]) -> torch.Tensor:
        """(n, cells of grid, code_dim) to (n, code_dim, *last_grid)."""
        # As in TokenFlow, no convolution (VAR's phi) follows the upsampling.
        code_map = code_vectors.transpose(1, 2).unflatten(2, grid)
        return code_map if grid == last_grid else F.interpolate(code_map, last_grid, mode="bicubic")

    def search(
        self, query: torch.Tensor, codebook: torch.Tensor, *, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Input and target codes (n, cells) of normalised vectors (n, cells, code_dim): the same nearest code, unless
        `noise` (n, cells, 2) makes a share of the input codes a sample of the nearest.
        """
        # Between unit vectors |z - e|^2 = 2 - 2 z.e, so the weighted sum of both distances is a constant minus twice
        # one inner product, with the weights folded into the query.
        semantic_dim = self.config.semantic_code_dim
        weighted = torch.cat(
            [
                query[..., :semantic_dim] * self.config.semantic_distance_weight,
                query[..., semantic_dim:] * self.config.pixel_distance_weight,
            ],
            -1,
        ).flatten(0, 1)
        # (code_dim, codebook_size); an index has no gradient.
        codebook = codebook.detach().T
        inputs, targets = [], []
        for start in range(0, len(weighted), self.config.search_chunk_size):
            # A similarity matrix is (cells, codebook_size): for a batch of large images it would not fit.
            cells = slice(start, start + self.config.search_chunk_size)
            similarity = weighted[cells] @ codebook
            nearest = similarity.argmax(-1)
            targets.append(nearest)
            if noise is not None:
                nearest = self._self_correct(similarity, nearest, noise.flatten(0, 1)[cells])
            inputs.append(nearest)
        return torch.cat(inputs).view(query.shape[:2]), torch.cat(targets).view(query.shape[:2])

    def _self_correct(self, similarity: torch.Tensor, nearest: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        top_k = min(self.config.self_correction_top_k, self.config.codebook_size)
        # `similarity` is a constant minus half the distance, hence the factor 2 below.
        candidates = similarity.topk(top_k, -1)
        # p ~ softmax(-distance), sampled by inverting the cumulative sum: one uniform number a cell.
        cumulative = (2 * candidates.values).softmax(-1).cumsum(-1)
        choice = (cumulative < noise[:, 1:]).sum(-1, keepdim=True).clamp(max=top_k - 1)
        sampled = candidates.indices.gather(-1, choice).squeeze(-1)
        return torch.where(noise[:, 0] < self.config.self_correction_ratio, sampled, nearest)

    def _error(self, vectors: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the semantic part plus that of the pixel part."""
        semantic_dim = self.config.semantic_code_dim
        semantic, pixel = (vectors - target).square().split([semantic_dim, self.config.pixel_code_dim], -1)
        return semantic.mean() + pixel.mean()
