"""Dual-codebook multi-scale residual vision tokenizer (§2.1, after TokenFlow): pixels in, codes out, and back.

One index per cell addresses a semantic and a pixel codebook. Every image comes with its row of `image_grids`, the
(height, width) grids of its scales; images that share a row are processed as one plain stack, so a batch of mixed
aspect ratios gives what its images give alone. Nothing here knows buckets, text, or who trains it. Gradients are the
caller's: use `torch.no_grad()` around `encode` and `decode` when they are not wanted.
"""

import copy
import functools
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Siglip2VisionModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_nextflow import NextFlowVisionTokenizerConfig
from .grids_nextflow import Schedule, check_codes, count_codes, group_by_schedule, schedules_from_grids
from .pixel_cnn_nextflow import NextFlowPixelDecoder, NextFlowPixelEncoder, NextFlowZeroConv2d, convolution_layout
from .quantizer_nextflow import NextFlowMultiScaleQuantizer
from .vit_nextflow import NextFlowViT, patchify


@dataclass
class NextFlowVisionTokenizerEncoderOutput(ModelOutput):
    """
    Codes of a batch of images, flat: images in order, scale-major and row-major inside an image.

    Args:
        image_codes (`torch.Tensor` of shape `(total_codes,)`): The codes an image is rebuilt from.
        image_target_codes (`torch.Tensor` of shape `(total_codes,)`, *optional*, returned with `self_correction`):
            What a transformer should answer: the nearest code of the residual that the input codes left (§2.2).
    """

    image_codes: torch.Tensor | None = None
    image_target_codes: torch.Tensor | None = None


@dataclass
class NextFlowVisionTokenizerFeatures(ModelOutput):
    """
    The maps behind the codes on each image's last grid, in the top-left corner, zero-padded to the largest: the
    condition of the diffusion decoder (§2.3).

    Args:
        semantic_embeds (`torch.Tensor` of shape `(n, semantic_code_dim, max_height, max_width)`): Quantised map.
        pixel_embeds (`torch.Tensor` of shape `(n, pixel_code_dim, max_height, max_width)`): Quantised map.
        semantic_features (`torch.Tensor` of shape `(n, feature_size, max_height, max_width)`):
            The teacher's features as the semantic decoder predicts them.
    """

    semantic_embeds: torch.Tensor | None = None
    pixel_embeds: torch.Tensor | None = None
    semantic_features: torch.Tensor | None = None


@dataclass
class NextFlowVisionTokenizerOutput(ModelOutput):
    """
    Output of a training forward.

    Args:
        loss (`torch.Tensor` of shape `()`): Weighted sum of the parts below.
        reconstruction_loss (`torch.Tensor` of shape `()`): Mean squared error in pixels.
        quantizer_loss (`torch.Tensor` of shape `()`): Codebook term, unweighted.
        commitment_loss (`torch.Tensor` of shape `()`): Commitment term, unweighted.
        semantic_loss (`torch.Tensor` of shape `()`, *optional*, returned with `semantic_targets`):
            1 - cosine to the teacher's features, unweighted.
        reconstruction (`torch.Tensor` of shape `(n, 3, max_height, max_width)`):
            Unclamped float32 pixels, zero outside of each image; further losses attach here.
        image_codes (`torch.Tensor` of shape `(total_codes,)`): Codes; -1 at the cells of dropped scales.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    quantizer_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    semantic_loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    image_codes: torch.Tensor | None = None


def _pad_maps(stacks: Sequence[torch.Tensor], groups: Collection[list[int]]) -> torch.Tensor:
    """Stacks (n_group, channels, height, width) as one zero-padded batch in the order of the images, whose indices are
    those of `groups`."""
    if len(stacks) == 1:
        return stacks[0]
    count = sum(map(len, groups))
    height, width = (max(stack.shape[axis] for stack in stacks) for axis in (2, 3))
    padded = stacks[0].new_zeros(count, stacks[0].shape[1], height, width)
    for stack, indices in zip(stacks, groups, strict=True):
        padded[indices, :, : stack.shape[2], : stack.shape[3]] = stack
    return padded


class NextFlowVisionTokenizer(PreTrainedModel):
    """
    Dual-codebook multi-scale vision tokenizer (§2.1): SigLIP2 and a CNN encode, one index a cell addresses both
    codebooks, a CNN decodes pixels and a small ViT the teacher's features.

    Pixels are float (n, 3, max_height, max_width) in [-1, 1]; image i occupies the top-left corner, `patch_size` times
    its last grid, the rest is ignored. `image_grids` is (n, max_scales, 2), rows after an image's last scale zero. A
    tokenizer of fixed size, TokenFlow's, takes and gives `(n, 3, image_size, image_size)`.
    """

    config: NextFlowVisionTokenizerConfig
    base_model_prefix = "vision_tokenizer"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    output_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["NextFlowResnetBlock", "NextFlowAttentionBlock", "NextFlowMultiScaleQuantizer"]
    # diffusers' group offloading: what `encode` and `decode` call one by one, without `forward`; names at any depth.
    _group_offload_block_modules = [
        "semantic_encoder",
        "semantic_decoder",
        "encoder",
        "pixel_encoder",
        "pixel_decoder",
        "quant_conv",
        "post_quant_conv",
        "quantizer",
        "semantic_codebook",
        "pixel_codebook",
    ]
    # A codebook rounded to half precision would give other codes (§3.1 quantises in float32).
    _keep_in_fp32_modules_strict = ["quantizer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: NextFlowVisionTokenizerConfig):
        super().__init__(config)
        semantic_config = config.semantic_vit_config
        config.check_sizes()
        hidden_size = semantic_config.hidden_size
        code_dim = config.semantic_code_dim
        self.patch_size = config.patch_size

        self.semantic_encoder = NextFlowViT._from_config(semantic_config)
        # Where the features are the last but one hidden state, neither the last layer nor the last norm is kept:
        # `last_hidden_state` of this model is `hidden_states[-2]` of the whole one, and a whole checkpoint loads.
        if config.semantic_layer == -2:
            del self.semantic_encoder.encoder.layers[-1]
            self.semantic_encoder.post_layernorm = nn.Identity()
        self.encode_task_layer = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, code_dim)
        )
        self.pixel_encoder = NextFlowPixelEncoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.pixel_code_dim, 1)

        self.quantizer = NextFlowMultiScaleQuantizer(config)

        # A pre-norm ViT whose "image" is the quantised map: one patch a cell, the code's dimensions its channels.
        decoder_config = copy.deepcopy(config.semantic_decoder_vit_config or semantic_config)
        if config.semantic_decoder_config is None:
            decoder_config.num_hidden_layers = config.semantic_decoder_layers
        decoder_config.num_channels, decoder_config.patch_size = code_dim, 1
        self.semantic_decoder = NextFlowViT._from_config(decoder_config)
        decoder_size = decoder_config.hidden_size
        self.decode_task_layer = nn.Sequential(
            nn.Linear(decoder_size, decoder_size), nn.Tanh(), nn.Linear(decoder_size, config.feature_size)
        )
        self.post_quant_conv = nn.Conv2d(config.pixel_code_dim, config.latent_channels, 1)
        self.pixel_decoder = NextFlowPixelDecoder(config)
        self.use_slicing = self.use_tiling = False
        self.tile_size, self.tile_overlap = 640, 0.2
        self._codes_fingerprint: str | None = None  # of these weights, which the config need not be about
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            if isinstance(module, NextFlowZeroConv2d):
                init.zeros_(module.weight)
            else:
                init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # The only embeddings here are the codebooks: directions uniform on the sphere, length about one.
            init.normal_(module.weight, std=module.embedding_dim**-0.5)

    def get_codes_fingerprint(self) -> str | None:
        """
        What tells the codes of this tokenizer from those of another: a hash of the weights that decide them, wherever
        and in whatever precision they are loaded. The decoders may be trained on (§3.1). Saving writes it to the
        config; without that it is computed once, or is `None` for weights in float16, quantised or on the meta device.
        """
        if self._codes_fingerprint is None:
            self._codes_fingerprint = _codes_fingerprint(self.state_dict())
        return self._codes_fingerprint

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' method; for a folder of another kind, the error names what is in it."""
        path = pretrained_model_name_or_path
        if path is not None and os.path.isdir(path) and kwargs.get("config") is None:
            _check_folder(Path(path), kwargs.get("subfolder") or "")
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model._codes_fingerprint = model.config.codes_fingerprint
        return loaded

    def load_state_dict(self, *args, **kwargs):
        """PyTorch's method; the fingerprint of the codes is computed anew after it."""
        self._codes_fingerprint = None
        return super().load_state_dict(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, state_dict: dict | None = None, **kwargs):
        saved = _codes_fingerprint(self.state_dict() if state_dict is None else state_dict)
        self.config.codes_fingerprint = saved or self._codes_fingerprint  # float16 has none of its own
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    # diffusers reads its signature. Not as a decorator, which type checkers take for a method that is not bound.
    functools.update_wrapper(save_pretrained, PreTrainedModel.save_pretrained)

    def get_image_grids(self, num_images: int = 1) -> torch.Tensor:
        """Grids (num_images, max_scales, 2) of a tokenizer of fixed size; raises `ValueError` for any other."""
        if self.config.scale_sides is None:
            raise ValueError("config.scale_sides is None: this tokenizer has no schedule of its own, pass image_grids")
        sides = torch.tensor(self.config.scale_sides)
        return torch.stack([sides, sides], -1).expand(num_images, -1, -1)

    @property
    def codebook(self) -> torch.Tensor:
        """Unit semantic and unit pixel vectors of every code, float32 (codebook_size, semantic + pixel code_dim)."""
        return self.quantizer.codebook()

    def enable_slicing(self) -> None:
        """`encode` and `decode` take one image at a time: the same result in less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Undo [`~NextFlowVisionTokenizer.enable_slicing`]."""
        self.use_slicing = False

    def enable_tiling(self, tile_size: int = 640, tile_overlap: float = 0.2) -> None:
        """
        `decode` makes the pixels of a large image in tiles: less memory, at the price of the norms, whose statistics
        then are those of a tile. Attention still sees the whole image. `encode` stays whole: where a tile's features
        differ a little, its codes would differ altogether. Tiles are as small as their number allows: an image of
        1,024 pixels takes 4 of 576, for 27% more work.

        Args:
            tile_size (`int`, *optional*, defaults to 640):
                Largest side of a tile in pixels; smaller images are decoded whole.
            tile_overlap (`float`, *optional*, defaults to 0.2):
                Share of a tile that it has in common with the next, where the two are blended.

        Raises:
            `ValueError`: where `tile_size` is below two cells or `tile_overlap` not from 0 to 0.5.
        """
        if tile_size < 2 * self.config.patch_size:
            raise ValueError(f"tile_size is {tile_size}, expected at least two cells: {2 * self.config.patch_size}")
        if not 0 <= tile_overlap <= 0.5:
            raise ValueError(f"tile_overlap is {tile_overlap}, expected a share from 0 to 0.5")
        self.tile_size, self.tile_overlap = tile_size, tile_overlap
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Undo [`~NextFlowVisionTokenizer.enable_tiling`]."""
        self.use_tiling = False

    def compile_sampling(self, *, dynamic: bool | None = True, **compile_options) -> None:
        """
        Make `decode` faster: each group norm and its swish become one compiled function, whatever the size of the
        image, and maps lie channels last, as convolutions read them, without a copy in between. The first image takes
        some seconds more. The counterpart of the transformer's method of this name.

        Args:
            dynamic, compile_options: As of `torch.compile`.
        """
        self.pixel_decoder.compile_norms(dynamic=dynamic, **compile_options)

    def encode(
        self,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor,
        *,
        self_correction: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> NextFlowVisionTokenizerEncoderOutput:
        """
        Codes of every image.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, max_height, max_width)`): Padded pixels in [-1, 1].
            image_grids (`torch.Tensor` of shape `(n, max_scales, 2)`): Scale schedule of every image.
            self_correction (`bool`, *optional*, defaults to `False`):
                Whether to sample `self_correction_ratio` of the codes of every scale but the last among their
                `self_correction_top_k` nearest, and to return the targets that correct for it (§2.2).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the samples; a list has one per image, whose codes then do not depend on the batch.

        Raises:
            `ValueError`: on pixels that are not finite or do not fit their grids.
        """
        schedules = self._check_pixels(pixel_values, image_grids)
        # In the order of the images, so that grouping them by schedule changes no code.
        noise = self._sample_noise(schedules, generator, pixel_values.device) if self_correction else None
        codes, targets = [torch.empty(0)] * len(schedules), [torch.empty(0)] * len(schedules)
        for schedule, indices in group_by_schedule(schedules).items():
            stack = self._crop(pixel_values, schedule, indices)
            slices = stack.split(1 if self.use_slicing else len(stack))
            features = torch.cat([self._encode_features(one) for one in slices])  # these take the memory
            group_noise = None if noise is None else torch.stack([noise[i] for i in indices]).to(features.device)
            output = self.quantizer(features, schedule, noise=group_noise)
            for row, index in enumerate(indices):
                codes[index], targets[index] = output.image_codes[row], output.image_target_codes[row]
        return NextFlowVisionTokenizerEncoderOutput(
            image_codes=torch.cat(codes), image_target_codes=torch.cat(targets) if self_correction else None
        )

    def decode(
        self, image_codes: torch.Tensor, image_grids: torch.Tensor, *, num_scales: int | None = None
    ) -> torch.Tensor:
        """
        Pixels of every image, float32 (n, 3, max_height, max_width) in [-1, 1], zero outside of each image.

        Args:
            image_codes (`torch.Tensor` of shape `(total_codes,)`):
                All codes or, with `num_scales`, also only those of the first `num_scales` scales of every image.
            image_grids (`torch.Tensor` of shape `(n, max_scales, 2)`): Scale schedule of every image, in full.
            num_scales (`int`, *optional*):
                Decode only the first so many scales: a preview at full size.

        Raises:
            `ValueError`: on codes outside the codebook and on a count that does not match the grids.
        """
        maps, groups = self._decode_codes(image_codes, image_grids, num_scales)
        tiles = {}
        if self.use_tiling:
            tiles = {"tile_size": self.tile_size, "tile_overlap": int(self.tile_size * self.tile_overlap)}
        decode = functools.partial(self._decode_pixels, **tiles)
        pixels = []
        for quantized in maps:
            slices = quantized.split(1 if self.use_slicing else len(quantized))
            pixels.append(torch.cat([decode(one) for one in slices]).float().clamp(-1, 1))
        return _pad_maps(pixels, groups)

    def decode_features(
        self, image_codes: torch.Tensor, image_grids: torch.Tensor, *, num_scales: int | None = None
    ) -> NextFlowVisionTokenizerFeatures:
        """The maps behind the codes (§2.3). Arguments and errors as in [`~NextFlowVisionTokenizer.decode`]."""
        maps, groups = self._decode_codes(image_codes, image_grids, num_scales)
        semantic_dim = self.config.semantic_code_dim
        features = [
            self._decode_semantics(quantized).transpose(1, 2).unflatten(2, quantized.shape[2:]) for quantized in maps
        ]
        return NextFlowVisionTokenizerFeatures(
            semantic_embeds=_pad_maps([quantized[:, :semantic_dim] for quantized in maps], groups),
            pixel_embeds=_pad_maps([quantized[:, semantic_dim:] for quantized in maps], groups),
            semantic_features=_pad_maps(features, groups),
        )

    def get_teacher_features(
        self, teacher: Siglip2VisionModel, pixel_values: torch.Tensor, image_grids: torch.Tensor
    ) -> list[torch.Tensor]:
        """
        What [`~NextFlowVisionTokenizer.forward`] takes as `semantic_targets`: the last but one hidden state of a whole
        `Siglip2VisionModel`, one (height * width, hidden_size) tensor an image. Wrap it in `torch.no_grad()`.
        """
        schedules = self._check_pixels(pixel_values, image_grids)
        targets = [torch.empty(0)] * len(schedules)
        for schedule, indices in group_by_schedule(schedules).items():
            patches = self._semantic_patches(self._crop(pixel_values, schedule, indices))
            shapes = torch.tensor([schedule[-1]]).expand(len(indices), 2)  # on the CPU, as Siglip2 reads numbers
            output = teacher(patches, None, shapes, output_hidden_states=True)
            for row, index in enumerate(indices):
                targets[index] = output.hidden_states[-2][row]
        return targets

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor,
        semantic_targets: torch.Tensor | list[torch.Tensor] | None = None,
        drop_scales: torch.Tensor | Sequence[bool] | None = None,
        quantize: bool = True,
    ) -> NextFlowVisionTokenizerOutput:
        r"""
        Reconstruction and losses.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, max_height, max_width)`): Padded pixels in [-1, 1].
            image_grids (`torch.Tensor` of shape `(n, max_scales, 2)`): Scale schedule of every image.
            semantic_targets (`torch.Tensor` or list of `torch.Tensor`, *optional*):
                Shape `(n, max_cells, hidden_size)`, or one of `(cells, hidden_size)` an image: the frozen teacher's
                features of the cells of the last grid, row-major. Without them the semantic decoder does not run.
            drop_scales (`torch.Tensor` of shape `(max_scales,)`, *optional*):
                Scales that contribute nothing in this step; an image's first and last scale always stay. By default
                each scale drops with probability `scale_dropout` in training and none in evaluation.
            quantize (`bool`, *optional*, defaults to `True`):
                `False` trains the branches as autoencoders, before there is a codebook; all codes are then -1.
        """
        if self.training and torch.is_grad_enabled():
            self._codes_fingerprint = None  # the next step may change the weights
        schedules = self._check_pixels(pixel_values, image_grids)
        dropped = self._dropped_scales(drop_scales, image_grids.shape[1])
        groups = group_by_schedule(schedules)
        codes = [torch.empty(0)] * len(schedules)
        reconstructions, losses = [], []
        for schedule, indices in groups.items():
            pixels = self._crop(pixel_values, schedule, indices)
            features = self._encode_features(pixels)
            quantization = self.quantizer(features, schedule, dropped=dropped, quantize=quantize)
            reconstruction = self._decode_pixels(quantization.quantized).float()  # losses in float32
            parts = [
                F.mse_loss(reconstruction, pixels.float()),
                quantization.quantizer_loss,
                quantization.commitment_loss,
            ]
            if semantic_targets is not None:
                predicted = self._decode_semantics(quantization.quantized)
                cells = math.prod(schedule[-1])
                target = torch.stack([semantic_targets[index][:cells] for index in indices])
                parts.append(1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean())
            reconstructions.append(reconstruction)
            losses.append(torch.stack(parts) * (len(indices) / len(schedules)))  # images weigh alike, not groups
            for row, index in enumerate(indices):
                codes[index] = quantization.image_codes[row]

        reconstruction_loss, quantizer_loss, commitment_loss, *semantic_loss = torch.stack(losses).sum(0)
        loss = reconstruction_loss + self.config.quantizer_loss_weight * quantizer_loss
        loss = loss + self.config.commitment_loss_weight * commitment_loss
        if semantic_loss:
            loss = loss + self.config.semantic_loss_weight * semantic_loss[0]
        return NextFlowVisionTokenizerOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            quantizer_loss=quantizer_loss,
            commitment_loss=commitment_loss,
            semantic_loss=semantic_loss[0] if semantic_loss else None,
            reconstruction=_pad_maps(reconstructions, groups.values()),
            image_codes=torch.cat(codes),
        )

    def _encode_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (n, 3, height, width) to continuous features (n, code_dim, rows, columns) of both branches."""
        pixels = pixels.to(self.quant_conv.weight.dtype)  # of a convolution: quantised linear layers hold bytes
        rows, columns = (side // self.config.semantic_vit_config.patch_size for side in pixels.shape[2:])
        grid = (rows, columns)
        hidden_states = self.semantic_encoder.encode(self._semantic_patches(pixels), grid)  # (n, cells, hidden_size)
        semantic_map = self.encode_task_layer(hidden_states).transpose(1, 2).unflatten(2, grid)
        pixel_size = (self.patch_size * rows, self.patch_size * columns)
        pixel_map = self.quant_conv(self.pixel_encoder(_resize(pixels, pixel_size)))
        return torch.cat([semantic_map.float(), pixel_map.float()], 1)  # (n, code_dim, rows, columns)

    def _semantic_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (n, 3, height, width) as the semantic encoder takes them, see [`patchify`]."""
        if self.config.clamp_semantic_pixels:
            pixels = pixels.clamp(-1, 1)
        return patchify(pixels, self.config.semantic_vit_config.patch_size)

    def _decode_pixels(self, quantized: torch.Tensor, **tiles: int) -> torch.Tensor:
        """Quantised map (n, code_dim, rows, columns) to pixels (n, 3, height, width), unclamped."""
        pixel_map = quantized[:, self.config.semantic_code_dim :].to(self.post_quant_conv.weight.dtype)
        # Looked-up codes are channels last in memory, and all maps of the CNN would take over that layout.
        layout = convolution_layout(pixel_map.device, compiled=self.pixel_decoder.is_compiled)
        pixel_map = pixel_map.contiguous(memory_format=layout)
        pixels = self.pixel_decoder(self.post_quant_conv(pixel_map), **tiles)
        # The stride decides the size, except where it is fixed (TokenFlow's).
        return pixels if self.config.image_size is None else _resize(pixels, self.pixel_size(quantized.shape[2:]))

    def pixel_size(self, grid: Sequence[int]) -> tuple[int, int]:
        """(height, width) of an image whose last grid is `grid`; raises `ValueError` where a fixed size differs."""
        if self.config.image_size is None:
            rows, columns = grid
            return self.patch_size * rows, self.patch_size * columns
        cells = self.config.image_size // self.config.semantic_vit_config.patch_size
        if tuple(grid) != (cells, cells):
            raise ValueError(
                f"the last grid is {tuple(grid)}, expected {(cells, cells)}: this tokenizer takes images of "
                f"{self.config.image_size} x {self.config.image_size} pixels only"
            )
        return self.config.image_size, self.config.image_size

    def _decode_semantics(self, quantized: torch.Tensor) -> torch.Tensor:
        """Quantised map (n, code_dim, rows, columns) to the teacher's features (n, rows * columns, hidden_size)."""
        cells = quantized[:, : self.config.semantic_code_dim].flatten(2).transpose(1, 2)
        cells = cells.to(self.post_quant_conv.weight.dtype)
        rows, columns = quantized.shape[2:]
        return self.decode_task_layer(self.semantic_decoder.encode(cells, (rows, columns)))

    def _decode_codes(
        self, image_codes: torch.Tensor, image_grids: torch.Tensor, num_scales: int | None
    ) -> tuple[list[torch.Tensor], list[list[int]]]:
        """Quantised maps of every group of images with one schedule, and the images of each group."""
        schedules = schedules_from_grids(image_grids)
        if num_scales is not None and num_scales < 1:
            raise ValueError(f"num_scales is {num_scales}, expected at least 1")
        sizes = [count_codes(schedule) for schedule in schedules]
        if image_codes.numel() != sum(sizes):  # of the first scales alone
            sizes = [count_codes(schedule[:num_scales]) for schedule in schedules]
        if image_codes.ndim != 1 or image_codes.numel() != sum(sizes):
            raise ValueError(f"image_codes has shape {tuple(image_codes.shape)}, image_grids asks for ({sum(sizes)},)")
        per_image = image_codes.split(sizes)
        check_codes(image_codes, self.config.codebook_size)
        maps, groups = [], group_by_schedule(schedules)
        for schedule, indices in groups.items():
            length = count_codes(schedule[:num_scales])
            codes = torch.stack([per_image[index][:length] for index in indices])  # (n, codes)
            maps.append(self.quantizer.decode(codes, schedule, num_scales=num_scales))
        return maps, list(groups.values())

    def _check_pixels(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> list[Schedule]:
        schedules = schedules_from_grids(image_grids)
        sizes = [self.pixel_size(schedule[-1]) for schedule in schedules]
        expected = (len(schedules), 3, max(height for height, _ in sizes), max(width for _, width in sizes))
        if tuple(pixel_values.shape) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected {expected} for the last grids of the "
                f"{len(schedules)} rows of image_grids"
            )
        if not torch.isfinite(pixel_values).all():  # a NaN would get a code all the same
            bad = int((~torch.isfinite(pixel_values)).sum())
            raise ValueError(f"pixel_values has {bad} non-finite of {pixel_values.numel()} values, expected none")
        return schedules

    def _crop(self, pixel_values: torch.Tensor, schedule: Schedule, indices: list[int]) -> torch.Tensor:
        height, width = self.pixel_size(schedule[-1])
        stack = pixel_values if len(indices) == len(pixel_values) else pixel_values[indices]
        return stack[:, :, :height, :width]

    def _dropped_scales(self, drop_scales: torch.Tensor | Sequence[bool] | None, max_scales: int) -> list[bool] | None:
        if drop_scales is None:
            if not self.training or self.config.scale_dropout == 0:
                return None
            drop_scales = torch.rand(max_scales) < self.config.scale_dropout  # the same for the whole batch
        if len(drop_scales) != max_scales:
            raise ValueError(f"drop_scales has {len(drop_scales)} entries, expected one per scale: {max_scales}")
        return [bool(drop) for drop in drop_scales]

    def _sample_noise(
        self,
        schedules: Sequence[Schedule],
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, ...]:
        """Two uniform numbers for every code of every image, in the order of the images."""
        sizes = [count_codes(schedule) for schedule in schedules]
        generators = generator if isinstance(generator, list) else [generator] * len(sizes)
        if len(generators) != len(sizes):
            raise ValueError(f"generator has {len(generators)} entries, expected one per image: {len(sizes)}")
        return tuple(
            torch.rand(size, 2, generator=source, device=device if source is None else source.device)
            for size, source in zip(sizes, generators, strict=True)
        )


def _check_folder(folder: Path, subfolder: str) -> None:
    config = folder / subfolder / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if kind != NextFlowVisionTokenizerConfig.model_type:
        found = "no config.json" if kind is None else f"the config.json of a {kind}"
        raise FileNotFoundError(
            f"there is no vision tokenizer in {config.parent}, which has {found}: `nextflow-hf convert tokenflow` and "
            "`nextflow-hf train tokenizer` make one, and a model's lies in its sub-folder vision_tokenizer/"
        )


def _codes_fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    # What decodes changes no code: the third stage trains the pixel decoder alone (§3.1).
    decoders = ("post_quant_conv.", "pixel_decoder.", "semantic_decoder.", "decode_task_layer.")
    state = {name: tensor for name, tensor in state_dict.items() if not name.startswith(decoders)}
    # Compared as bfloat16, to which float16 may round another way.
    exact = (torch.float64, torch.float32, torch.bfloat16)
    if not state or any(tensor.is_meta or tensor.dtype not in exact for tensor in state.values()):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return pixels if tuple(pixels.shape[2:]) == size else F.interpolate(pixels, size, mode="bicubic")


__all__ = [
    "NextFlowVisionTokenizer",
    "NextFlowVisionTokenizerEncoderOutput",
    "NextFlowVisionTokenizerFeatures",
    "NextFlowVisionTokenizerOutput",
]
