"""The ViT of the vision tokenizer's semantic branch: SigLIP2, with options for teachers like CLIP and BEiT (§2.1).

Takes patches and their grid, and returns one feature for each patch. Knows nothing of codes, pixels or image sizes.
"""

import math

import torch
from torch import nn
from transformers import Siglip2VisionModel
from transformers import initialization as init
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from .configuration_nextflow import NextFlowViTConfig


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    (n, channels, height, width) to (n, patches, patch_size**2 * channels), in the order of Siglip2's processor. Less
    than a patch on the right and below is left out, as by a strided convolution.
    """
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    pixel_values = pixel_values[:, :, : rows * patch_size, : columns * patch_size]
    patches = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


class NextFlowViTEmbeddings(Siglip2VisionEmbeddings):
    """SigLIP2's embeddings; the config may add a class token before the patches, and a norm after all of them."""

    def __init__(self, config: NextFlowViTConfig):
        super().__init__(config)
        # Its position embedding is added to it once and for all: the model only ever uses the sum.
        self.class_token = nn.Parameter(torch.empty(config.hidden_size)) if config.class_token else None
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_layernorm else nn.Identity()
        )

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.LongTensor) -> torch.Tensor:
        # Cast to the dtype of the positions: a quantised patch embedding holds bytes, so its own dtype says nothing.
        patches = self.patch_embedding(pixel_values.to(self.position_embedding.weight.dtype))
        # SigLIP2 reads `.weight`; offloading loads an embedding's weights only while it is called.
        positions = self.position_embedding(torch.arange(self.num_patches, device=patches.device))
        positions = positions.unflatten(0, (self.position_embedding_size, self.position_embedding_size))
        embeddings = patches + self.resize_positional_embeddings(
            positions, spatial_shapes, max_length=patches.shape[1]
        )
        if self.class_token is not None:
            embeddings = torch.cat([self.class_token.expand(len(embeddings), 1, -1), embeddings], 1)
        return self.pre_layernorm(embeddings)


class NextFlowViT(Siglip2VisionModel):
    """`Siglip2VisionModel` with these embeddings, for batches in which all images have one grid."""

    config: NextFlowViTConfig
    post_layernorm: nn.Module  # an `Identity` where the vision tokenizer reads the last but one layer

    def __init__(self, config: NextFlowViTConfig):
        super().__init__(config)
        self.embeddings = NextFlowViTEmbeddings(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NextFlowViTEmbeddings) and module.class_token is not None:
            init.normal_(module.class_token, std=module.embed_dim**-0.5)

    def encode(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Patches (n, height * width, channels) of one grid to features (n, height * width, hidden_size)."""
        # On the CPU, because Siglip2 reads the shapes as Python numbers.
        shapes = torch.tensor([grid]).expand(len(patches), 2)
        hidden_states = self(patches, None, shapes).last_hidden_state
        return hidden_states[:, -math.prod(grid) :]  # without the class token
