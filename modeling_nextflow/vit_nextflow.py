"""The ViT of the vision tokenizer's semantic branch: SigLIP2's, and what CLIP and BEiT have besides (§2.1).

Patches and their grid in, one feature a patch out. Knows nothing of codes, pixels or sizes of images.
"""

import math

import torch
from torch import nn
from transformers import Siglip2VisionModel
from transformers import initialization as init
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from .configuration_nextflow import NextFlowViTConfig


class NextFlowViTEmbeddings(Siglip2VisionEmbeddings):
    """SigLIP2's, with a class token before the patches and a norm after all where the config asks for them."""

    def __init__(self, config: NextFlowViTConfig):
        super().__init__(config)
        # Its position is part of it: their sum is all that is ever seen.
        self.class_token = nn.Parameter(torch.empty(config.hidden_size)) if config.class_token else None
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_layernorm else nn.Identity()
        )

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.LongTensor) -> torch.Tensor:
        # Of the positions' type: a patch embedding that is quantised holds bytes.
        patches = self.patch_embedding(pixel_values.to(self.position_embedding.weight.dtype))
        # Through its call, unlike SigLIP2's: where weights are offloaded, an embedding has them in its call alone.
        positions = self.position_embedding(torch.arange(self.num_patches, device=patches.device))
        positions = positions.unflatten(0, (self.position_embedding_size, self.position_embedding_size))
        embeddings = patches + self.resize_positional_embeddings(
            positions, spatial_shapes, max_length=patches.shape[1]
        )
        if self.class_token is not None:
            embeddings = torch.cat([self.class_token.expand(len(embeddings), 1, -1), embeddings], 1)
        return self.pre_layernorm(embeddings)


class NextFlowViT(Siglip2VisionModel):
    """`Siglip2VisionModel` with those embeddings, for stacks of one grid."""

    config: NextFlowViTConfig
    post_layernorm: nn.Module  # the vision tokenizer leaves it out where it does not want the last layer's output

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
        # On the CPU: Siglip2 reads the shapes as Python numbers.
        shapes = torch.tensor([grid]).expand(len(patches), 2)
        hidden_states = self(patches, None, shapes).last_hidden_state
        return hidden_states[:, -math.prod(grid) :]  # without the class token
