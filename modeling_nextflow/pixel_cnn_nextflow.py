"""The pixel branch of the vision tokenizer: VQGAN's CNN encoder and decoder, as TokenFlow has them (§2.1).

Maps in, maps out. Knows channels and resolutions; nothing of codes or grids.
"""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip2.modeling_siglip2 import eager_attention_forward

from .configuration_nextflow import NextFlowVisionTokenizerConfig


def convolution_layout(device: torch.device, *, compiled: bool = False) -> torch.memory_format:
    """How maps and weights lie for the fastest CNN: channels last, unless group norms copy that back, as on a GPU they
    do where they are not `compiled`."""
    return torch.channels_last if compiled or device.type == "cpu" else torch.contiguous_format


class NextFlowZeroConv2d(nn.Conv2d):
    """
    The last convolution of a residual branch, which starts at zero: the CNN learns several times faster (not specified
    by the paper). A class of its own, as transformers initialises no module whose parameters are all in its parts.
    """


class NextFlowGroupNorm(nn.GroupNorm):
    """
    Group norm, then swish unless `swish` is false. Compiled, it keeps the layout of the maps. Eagerly it is PyTorch's
    own norm, which copies maps whose channels lie last on all devices but a CPU.
    """

    def __init__(self, num_groups: int, num_channels: int, *, swish: bool):
        super().__init__(num_groups, num_channels, eps=1e-6)
        self.swish = swish

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # PyTorch's norm is one kernel; plain operators are what a compiler fuses with the swish.
        normed = self.normalize(input) if torch.compiler.is_compiling() else super().forward(input)
        return F.silu(normed) if self.swish else normed

    def normalize(self, input: torch.Tensor) -> torch.Tensor:
        """The norm of maps (n, channels, height, width), of operators that a compiler fuses."""
        # (n, groups, channels of a group, height, width); statistics in float32, as in PyTorch's norm
        groups = input.float().unflatten(1, (self.num_groups, -1))
        # Each channel first: with channels last this reads memory in order.
        variance, mean = torch.var_mean(groups, dim=(3, 4), correction=0, keepdim=True)
        center = mean.mean(2, keepdim=True)
        # The variance of a group is that within its channels plus that between their means.
        variance = (variance + (mean - center).square()).mean(2, keepdim=True)
        normed = ((groups - center) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class NextFlowResnetBlock(GradientCheckpointingLayer):
    """GroupNorm, swish, 3x3 convolution, twice, around a residual (VQGAN)."""

    def __init__(self, config: NextFlowVisionTokenizerConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _group_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(config, out_channels)
        self.conv2 = NextFlowZeroConv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.shortcut(hidden_states)
        return residual + self.conv2(self.norm2(self.conv1(self.norm1(hidden_states))))


class NextFlowAttentionBlock(GradientCheckpointingLayer):
    """Single-head self-attention over the cells of a map, around a residual (VQGAN)."""

    is_causal = False

    def __init__(self, config: NextFlowVisionTokenizerConfig, channels: int):
        super().__init__()
        self.config = config
        self.scaling = channels**-0.5
        self.norm = _group_norm(config, channels, swish=False)
        self.q_proj = nn.Conv2d(channels, channels, 1)
        self.k_proj = nn.Conv2d(channels, channels, 1)
        self.v_proj = nn.Conv2d(channels, channels, 1)
        self.out_proj = NextFlowZeroConv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        # (batch, channels, height, width) -> (batch, 1 head, height * width, channels)
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2).unsqueeze(1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        # No mask: a stack has images of one size, without padding.
        attended, _ = attention_interface(self, query, key, value, None, scaling=self.scaling, is_causal=False)
        # (batch, height * width, 1 head, channels) -> (batch, channels, height, width)
        attended = attended.squeeze(2).transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return hidden_states + self.out_proj(attended)


class NextFlowCNNLevel(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then a change of resolution."""

    def __init__(
        self,
        config: NextFlowVisionTokenizerConfig,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        attention: bool,
        resample: nn.Module,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            NextFlowResnetBlock(config, in_channels if index == 0 else out_channels, out_channels)
            for index in range(num_blocks)
        )
        self.attentions = nn.ModuleList(
            NextFlowAttentionBlock(config, out_channels) if attention else nn.Identity() for _ in range(num_blocks)
        )
        self.resample = resample

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            hidden_states = attention(block(hidden_states))
        return self.resample(hidden_states)


class NextFlowPixelEncoder(nn.Module):
    """CNN from pixels (n, 3, height, width) to the latents of the last grid; attention in the last level only."""

    def __init__(self, config: NextFlowVisionTokenizerConfig):
        super().__init__()
        widths = [config.encoder_channels * multiplier for multiplier in config.channel_multipliers]
        deepest = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.encoder_channels, 3, padding=1)
        self.levels = nn.ModuleList(
            NextFlowCNNLevel(
                config,
                widths[index - 1] if index else config.encoder_channels,
                width,
                num_blocks=config.encoder_res_blocks,
                attention=index == deepest,
                resample=nn.Identity() if index == deepest else _downsample(width),
            )
            for index, width in enumerate(widths)
        )
        self.middle = nn.Sequential(
            NextFlowResnetBlock(config, widths[-1], widths[-1]),
            NextFlowAttentionBlock(config, widths[-1]),
            NextFlowResnetBlock(config, widths[-1], widths[-1]),
        )
        self.norm_out = _group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (n, 3, height, width) in [-1, 1] -> latents (n, latent_channels, rows, columns) of the last grid."""
        hidden_states = self.conv_in(pixel_values)
        for level in self.levels:
            hidden_states = level(hidden_states)
        hidden_states = self.middle(hidden_states)
        return self.conv_out(self.norm_out(hidden_states))


class NextFlowPixelDecoder(nn.Module):
    """Mirror of the encoder with its own width and one more block a level; unclamped pixels out."""

    def __init__(self, config: NextFlowVisionTokenizerConfig):
        super().__init__()
        multipliers = config.decoder_channel_multipliers or config.channel_multipliers
        widths = [config.decoder_channels * multiplier for multiplier in reversed(multipliers)]
        shallowest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = nn.Sequential(
            NextFlowResnetBlock(config, widths[0], widths[0]),
            NextFlowAttentionBlock(config, widths[0]),
            NextFlowResnetBlock(config, widths[0], widths[0]),
        )
        self.levels = nn.ModuleList(
            NextFlowCNNLevel(
                config,
                widths[max(index - 1, 0)],
                width,
                num_blocks=config.decoder_res_blocks + 1,
                attention=index == 0,
                resample=nn.Identity() if index == shallowest else _upsample(width),
            )
            for index, width in enumerate(widths)
        )
        self.norm_out = _group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.is_compiled = False

    def forward(self, latents: torch.Tensor, tile_size: int | None = None, tile_overlap: int = 0) -> torch.Tensor:
        """`tile_size` and `tile_overlap` in pixels: work in tiles past the first level, see [`in_tiles`]."""
        # The first level has the attention, over all cells, and little memory: a cell is still one or four places.
        hidden_states = self.levels[0](self.middle(self.conv_in(latents)))
        enlarge = nn.Sequential(*self.levels[1:], self.norm_out, self.conv_out)  # also works on a part of the map
        if tile_size is None:
            return enlarge(hidden_states)
        # The last level keeps the resolution and the first has doubled it already.
        factor = 2 ** max(len(self.levels) - 2, 0)
        return in_tiles(enlarge, hidden_states, size=tile_size // factor, overlap=tile_overlap // factor)

    def compile_norms(self, **options) -> None:
        """Compile the norms with `torch.compile`'s options, and lay weights as maps then lie."""
        for module in self.modules():
            if isinstance(module, NextFlowGroupNorm):
                module.compile(**options)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # no overload takes it alone
        self.is_compiled = True


def _group_norm(config: NextFlowVisionTokenizerConfig, channels: int, *, swish: bool = True) -> nn.Module:
    """The config's norm, and swish."""
    if config.norm_num_groups == 0:
        return nn.SiLU() if swish else nn.Identity()
    groups = config.norm_num_groups
    if config.norm_min_group_channels:
        # A group of one channel would erase the mean of that channel, and with it the colour of the image.
        groups = max(1, min(groups, channels // config.norm_min_group_channels))
    if channels % groups:
        raise ValueError(f"a CNN level has {channels} channels, expected a multiple of its {groups} norm groups")
    return NextFlowGroupNorm(groups, channels, swish=swish)


def _downsample(channels: int) -> nn.Module:
    """Halves both axes with a strided convolution."""
    # VQGAN's padding, right and below only, which TokenFlow's weights were trained with.
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def _upsample(channels: int) -> nn.Module:
    """Doubles both axes by repetition, then a convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0, mode="nearest"), conv=conv))


def in_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], maps: torch.Tensor, *, size: int, overlap: int
) -> torch.Tensor:
    """
    `function` of maps (n, channels, height, width), on tiles of at most `size` by `size` that overlap by at least
    `overlap`. Where tiles overlap, their results are blended: each fades out linearly towards its own border.
    """
    height, width = maps.shape[2:]
    rows, columns = (tile_side(length, size=size, overlap=overlap) for length in (height, width))
    total = weights = None
    for top in tile_starts(height, size=rows, overlap=overlap):
        for left in tile_starts(width, size=columns, overlap=overlap):
            result = function(maps[:, :, top : top + rows, left : left + columns])
            factor = result.shape[2] // rows
            if total is None or weights is None:
                # Sums in float32: several tiles meet at a place.
                total = result.new_zeros(*result.shape[:2], factor * height, factor * width, dtype=torch.float32)
                weights = total.new_zeros(factor * height, factor * width)
            window = torch.outer(
                _fade(rows, top, height, overlap=overlap, factor=factor),
                _fade(columns, left, width, overlap=overlap, factor=factor),
            ).to(total.device)
            place = (slice(factor * top, factor * (top + rows)), slice(factor * left, factor * (left + columns)))
            total[:, :, *place] += result * window
            weights[place] += window
    assert total is not None and weights is not None  # a side has one tile at least
    return (total / weights).to(result.dtype)


def tile_side(length: int, *, size: int, overlap: int) -> int:
    """The smallest side of tiles that cover `length` with as few as tiles of `size` take."""
    count = 1 if length <= size else math.ceil((length - overlap) / (size - overlap))
    return math.ceil((length + (count - 1) * overlap) / count)


def tile_starts(length: int, *, size: int, overlap: int) -> list[int]:
    """Where tiles begin along a side of `length`: as few as cover it, spread evenly, all of one size."""
    if length <= size:
        return [0]
    count = math.ceil((length - overlap) / (size - overlap))
    return [round(index * (length - size) / (count - 1)) for index in range(count)]


def _fade(cells: int, start: int, length: int, *, overlap: int, factor: int) -> torch.Tensor:
    """Weights (cells * factor,) along a side of a tile: rising from a border that is none of the map, and falling."""
    # Half a step away from the border, so that no weight is 0 where only one tile lies.
    steps = (torch.arange(cells * factor) + 0.5) / max(overlap * factor, 1)
    weights = torch.ones(cells * factor)
    if start > 0:
        weights = torch.minimum(weights, steps)
    if start + cells < length:
        weights = torch.minimum(weights, steps.flip(0))
    return weights
