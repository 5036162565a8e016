"""`nextflow-hf` with a transformer that sees accumulated features: VAR's input, instead of the paper's (§2.2).

    python accumulated.py train transformer recipes/transformer.yaml ...
    python accumulated.py evaluate emoji runs/ablations/pipeline ...

The input of a scale is then the sum of the features of all coarser ones, and not those of the one before. For square
images alone, whose grids are those of `SIDES`.
"""

from collections.abc import Sequence

import torch

from nextflow_hf.cli import main
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowModel as Model


SIDES = (1, 2, 3, 4, 5, 6, 8)


def accumulated(model: Model, codes: torch.Tensor, next_side: int) -> torch.Tensor:
    """Features (images, cells, code_dim) of the scale of `next_side`, from `codes` (images, codes) of coarser ones."""
    sides = SIDES[: SIDES.index(next_side)]
    scales = codes[:, : sum(side * side for side in sides)].split([side * side for side in sides], dim=1)
    grid = (next_side, next_side)
    return sum(
        model.upsampled_features(model.image_codebook(of_scale), (side, side), grid)
        for side, of_scale in zip(sides, scales)
    )


def embed_cells(model: Model, codes: torch.Tensor, images: Sequence[tuple[tuple, int]]) -> torch.Tensor:
    """Replaces `NextFlowModel._embed_cells`; images that are complete have one schedule."""
    per_image = codes.split([count for _, count in images])
    embedded: list[torch.Tensor] = []
    for grids in dict.fromkeys(grids for grids, _ in images):
        sides = [height for height, _ in grids]
        members = [index for index, (of_image, _) in enumerate(images) if of_image == grids]
        stacked = torch.stack([per_image[index] for index in members])
        features = torch.cat([accumulated(model, stacked, side) for side in sides[1:]], dim=1)
        embedded += zip(members, features)
    return model.connector(torch.cat([rows for _, rows in sorted(embedded, key=lambda pair: pair[0])]))


def embed_next_scale(
    model: NextFlowForCausalLM, codes: torch.Tensor, grid: tuple, next_grid: tuple, terms: torch.Tensor
) -> torch.Tensor:
    """Replaces `NextFlowForCausalLM.embed_next_scale`."""
    embeds = model.model.connector(accumulated(model.model, codes, next_grid[0]))
    return (embeds + terms[:, None]).to(model.model.norm.weight.dtype)


if __name__ == "__main__":
    Model._embed_cells = embed_cells
    NextFlowForCausalLM.embed_next_scale = embed_next_scale
    raise SystemExit(main())
