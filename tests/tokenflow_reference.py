"""An independent statement of TokenFlow's tokenizer: plain functions of a checkpoint's tensors, in double precision.

Slow on purpose: one image, attention and codes written out. It reads theirs names only and none of our modules; it is
what the converted tokenizer is compared with. `tiny_checkpoint` lays out random weights under exactly those names.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


LEVELS = (1, 1, 2)  # channel multipliers of the tiny pixel branch: stride 4
CHANNELS, RES_BLOCKS = 128, 1
SEMANTIC_DIM, PIXEL_DIM, CODES, LATENT = 6, 4, 50, 8


def tiny_checkpoint(
    encoder: str,
    *,
    cells: int,
    channels: int = CHANNELS,
    decoder_channels: int = CHANNELS,
    decoder_levels: tuple[int, ...] = LEVELS,
    decoder_blocks: int = RES_BLOCKS,
):
    """State dict of a small TokenFlow whose position tables have `cells` cells a side; `encoder` is clip or siglip."""
    generator = torch.Generator().manual_seed(len(encoder))
    state: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, around: float = 0.0) -> None:
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
        state[name] = around + torch.randn(shape, generator=generator) / math.sqrt(fan_in)

    def linear(name: str, out: int, *inputs: int) -> None:
        add(f"{name}.weight", out, *inputs)
        add(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, around=1.0)
        add(f"{name}.bias", width)

    def resnet(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        linear(f"{name}.conv1", after, before, 3, 3)
        norm(f"{name}.norm2", after)
        linear(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            linear(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            linear(f"{name}.{part}", width, width, 1, 1)

    def middle(name: str, width: int) -> None:
        resnet(f"{name}.mid.0", width, width)
        attention(f"{name}.mid.1", width)
        resnet(f"{name}.mid.2", width, width)

    linear("encoder.conv_in", channels, 3, 3, 3)
    width = channels
    for level, multiplier in enumerate(LEVELS):
        for block in range(RES_BLOCKS):
            resnet(f"encoder.conv_blocks.{level}.res.{block}", width, channels * multiplier)
            width = channels * multiplier
            if level == len(LEVELS) - 1:
                attention(f"encoder.conv_blocks.{level}.attn.{block}", width)
        if level < len(LEVELS) - 1:
            linear(f"encoder.conv_blocks.{level}.downsample.conv", width, width, 3, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    linear("encoder.conv_out", LATENT, width, 3, 3)

    width = decoder_channels * decoder_levels[-1]
    linear("decoder.conv_in", width, LATENT, 3, 3)
    middle("decoder", width)
    for level, multiplier in enumerate(reversed(decoder_levels)):
        for block in range(decoder_blocks + 1):
            resnet(f"decoder.conv_blocks.{level}.res.{block}", width, decoder_channels * multiplier)
            width = decoder_channels * multiplier
            if level == 0:
                attention(f"decoder.conv_blocks.{level}.attn.{block}", width)
        if level < len(LEVELS) - 1:
            linear(f"decoder.conv_blocks.{level}.upsample.conv", width, width, 3, 3)
    norm("decoder.norm_out", width)
    linear("decoder.conv_out", 3, width, 3, 3)
    linear("quant_conv", PIXEL_DIM, LATENT, 1, 1)
    linear("post_quant_conv", LATENT, PIXEL_DIM, 1, 1)

    if encoder == "clip":
        hidden, features = 192, 20
        prefix = "encoder_vqkd"
        add(f"{prefix}.class_embedding", hidden)
        add(f"{prefix}.positional_embedding", cells**2 + 1, hidden)
        add(f"{prefix}.proj", hidden, features)
        add(f"{prefix}.conv1.weight", hidden, 3, 4, 4)
        norm(f"{prefix}.ln_pre", hidden)
        norm(f"{prefix}.ln_post", hidden)
        for layer in range(2):
            name = f"{prefix}.transformer.resblocks.{layer}"
            add(f"{name}.attn.in_proj_weight", 3 * hidden, hidden)
            add(f"{name}.attn.in_proj_bias", 3 * hidden)
            linear(f"{name}.attn.out_proj", hidden, hidden)
            norm(f"{name}.ln_1", hidden)
            linear(f"{name}.mlp.c_fc", 4 * hidden, hidden)
            linear(f"{name}.mlp.c_proj", hidden, 4 * hidden)
            norm(f"{name}.ln_2", hidden)
    else:
        hidden = features = 48
        prefix = "encoder_vqkd.vision_model"
        linear(f"{prefix}.embeddings.patch_embedding", hidden, 3, 3, 3)
        add(f"{prefix}.embeddings.position_embedding.weight", cells**2, hidden)
        for layer in range(3):
            name = f"{prefix}.encoder.layers.{layer}"
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                linear(f"{name}.self_attn.{part}", hidden, hidden)
            norm(f"{name}.layer_norm1", hidden)
            linear(f"{name}.mlp.fc1", 80, hidden)
            linear(f"{name}.mlp.fc2", hidden, 80)
            norm(f"{name}.layer_norm2", hidden)
        norm(f"{prefix}.post_layernorm", hidden)
        add(f"{prefix}.head.probe", 1, 1, hidden)
        add(f"{prefix}.head.attention.in_proj_weight", 3 * hidden, hidden)
        state["scaling_layer.shift"] = torch.full((1, 3, 1, 1), 0.5)
        state["scaling_layer.scale"] = torch.full((1, 3, 1, 1), 0.5)

    linear("encode_task_layer.0", hidden, hidden)
    linear("encode_task_layer.2", SEMANTIC_DIM, hidden)
    linear("decode_task_layer.0", hidden, hidden)
    linear("decode_task_layer.2", features, hidden)
    add("decoder_vqkd.cls_token", 1, 1, hidden)
    add("decoder_vqkd.pos_embed", 1, cells**2 + 1, hidden)
    linear("decoder_vqkd.patch_embed.proj", hidden, SEMANTIC_DIM, 1, 1)
    for block in range(2):
        name = f"decoder_vqkd.blocks.{block}"
        norm(f"{name}.norm1", hidden)
        add(f"{name}.attn.q_bias", hidden)
        add(f"{name}.attn.v_bias", hidden)
        add(f"{name}.attn.qkv.weight", 3 * hidden, hidden)
        linear(f"{name}.attn.proj", hidden, hidden)
        norm(f"{name}.norm2", hidden)
        linear(f"{name}.mlp.fc1", 4 * hidden, hidden)
        linear(f"{name}.mlp.fc2", hidden, 4 * hidden)
    norm("decoder_vqkd.fc_norm", hidden)
    state["quantize.codebook_used"] = torch.zeros(100)
    add("quantize.embedding_vqkd.weight", CODES, SEMANTIC_DIM)
    add("quantize.embedding_vqgan.weight", CODES, PIXEL_DIM)
    return state


class Reference:
    """Encoding and decoding of one image; `sides` are its scales, `pixels` the side of its images."""

    def __init__(self, state: dict[str, torch.Tensor], *, sides: Sequence[int], pixels: int):
        self.state = {name.replace("vision_model.", ""): value.double() for name, value in state.items()}
        self.clip = "encoder_vqkd.class_embedding" in state
        self.sides, self.pixels = list(sides), pixels

    # ---- what both directions are made of ----

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def conv(self, x: torch.Tensor, name: str, **options) -> torch.Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def layer_norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def group_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        groups = x.view(32, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        weight, bias = (self.state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return groups.view_as(x) * weight + bias

    def heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
        """Attention of (tokens, width) matrices, one head after the other."""
        size = q.shape[1] // count
        out = []
        for head in range(count):
            own = slice(head * size, (head + 1) * size)
            out.append((q[:, own] @ k[:, own].T / math.sqrt(size)).softmax(-1) @ v[:, own])
        return torch.cat(out, 1)

    # ---- pixel branch; maps (1, channels, height, width) ----

    def swish(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sigmoid()

    def resnet(self, x: torch.Tensor, name: str) -> torch.Tensor:
        h = self.conv(self.swish(self.group_norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        h = self.conv(self.swish(self.group_norm(h, f"{name}.norm2")), f"{name}.conv2", padding=1)
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        normed = self.group_norm(x, f"{name}.norm")
        q, k, v = (self.conv(normed, f"{name}.{part}")[0].flatten(1).T for part in "qkv")
        return x + self.conv(self.heads(q, k, v, 1).T.reshape(x.shape), f"{name}.proj_out")

    def level(self, x: torch.Tensor, name: str) -> torch.Tensor:
        block = 0
        while f"{name}.res.{block}.conv1.weight" in self.state:
            x = self.resnet(x, f"{name}.res.{block}")
            if f"{name}.attn.{block}.q.weight" in self.state:
                x = self.attention(x, f"{name}.attn.{block}")
            block += 1
        return x

    def middle(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = self.resnet(x, f"{name}.mid.0")
        return self.resnet(self.attention(x, f"{name}.mid.1"), f"{name}.mid.2")

    def pixel_encoder(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x, "encoder.conv_in", padding=1)
        for level in range(len(LEVELS)):
            x = self.level(x, f"encoder.conv_blocks.{level}")
            if level < len(LEVELS) - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.conv_blocks.{level}.downsample.conv", stride=2)
        x = self.swish(self.group_norm(self.middle(x, "encoder"), "encoder.norm_out"))
        return self.conv(self.conv(x, "encoder.conv_out", padding=1), "quant_conv")

    def pixel_decoder(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.conv(self.conv(x, "post_quant_conv"), "decoder.conv_in", padding=1), "decoder")
        for level in range(len(LEVELS)):
            x = self.level(x, f"decoder.conv_blocks.{level}")
            if level < len(LEVELS) - 1:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(x, f"decoder.conv_blocks.{level}.upsample.conv", padding=1)
        return self.conv(self.swish(self.group_norm(x, "decoder.norm_out")), "decoder.conv_out", padding=1)

    # ---- semantic branch; (tokens, width) matrices ----

    def positions(self, table: torch.Tensor, side: int) -> torch.Tensor:
        """Class position, then those of the cells, bicubic by the ratio (side + 0.1) / (side of the table)."""
        known = math.isqrt(len(table) - 1)
        if known == side:
            return table
        square = table[1:].T.reshape(1, -1, known, known)
        ratio = (side + 0.1) / known
        resized = F.interpolate(square, scale_factor=(ratio, ratio), mode="bicubic")
        return torch.cat([table[:1], resized[0].flatten(1).T])

    def clip_encoder(self, image: torch.Tensor) -> torch.Tensor:
        state, name = self.state, "encoder_vqkd"
        x = F.conv2d(image, state[f"{name}.conv1.weight"], stride=4)[0].flatten(1).T
        side = math.isqrt(len(x))
        x = torch.cat([state[f"{name}.class_embedding"][None], x])
        x = self.layer_norm(x + self.positions(state[f"{name}.positional_embedding"], side), f"{name}.ln_pre", 1e-5)
        for layer in range(2):
            block = f"{name}.transformer.resblocks.{layer}"
            normed = self.layer_norm(x, f"{block}.ln_1", 1e-5)
            qkv = normed @ state[f"{block}.attn.in_proj_weight"].T + state[f"{block}.attn.in_proj_bias"]
            x = x + self.linear(self.heads(*qkv.chunk(3, 1), count=3), f"{block}.attn.out_proj")
            h = self.linear(self.layer_norm(x, f"{block}.ln_2", 1e-5), f"{block}.mlp.c_fc")
            x = x + self.linear(h * (1.702 * h).sigmoid(), f"{block}.mlp.c_proj")
        return self.layer_norm(x, f"{name}.ln_post", 1e-5)[1:]

    def siglip_encoder(self, image: torch.Tensor) -> torch.Tensor:
        name = "encoder_vqkd"
        image = ((((image + 1) * 127.5).clamp(0, 255) / 255) - 0.5) / 0.5
        x = self.conv(image, f"{name}.embeddings.patch_embedding", stride=3)[0].flatten(1).T
        x = x + self.state[f"{name}.embeddings.position_embedding.weight"]
        for layer in range(2):  # the last of the three is not used
            block = f"{name}.encoder.layers.{layer}"
            normed = self.layer_norm(x, f"{block}.layer_norm1", 1e-6)
            q, k, v = (self.linear(normed, f"{block}.self_attn.{part}_proj") for part in "qkv")
            x = x + self.linear(self.heads(q, k, v, 16), f"{block}.self_attn.out_proj")
            h = self.linear(self.layer_norm(x, f"{block}.layer_norm2", 1e-6), f"{block}.mlp.fc1")
            x = x + self.linear(F.gelu(h, approximate="tanh"), f"{block}.mlp.fc2")
        return x

    def semantic_decoder(self, x: torch.Tensor) -> torch.Tensor:
        state, name, side = self.state, "decoder_vqkd", x.shape[2]
        x = self.conv(x, f"{name}.patch_embed.proj")[0].flatten(1).T
        x = torch.cat([state[f"{name}.cls_token"][0], x]) + self.positions(state[f"{name}.pos_embed"][0], side)
        for layer in range(2):
            block = f"{name}.blocks.{layer}"
            qkv = self.layer_norm(x, f"{block}.norm1", 1e-6) @ state[f"{block}.attn.qkv.weight"].T
            q, k, v = qkv.chunk(3, 1)
            q, v = q + state[f"{block}.attn.q_bias"], v + state[f"{block}.attn.v_bias"]
            x = x + self.linear(self.heads(q, k, v, 12), f"{block}.attn.proj")
            h = self.linear(self.layer_norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
            x = x + self.linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), f"{block}.mlp.fc2")
        return self.layer_norm(x[1:], f"{name}.fc_norm", 1e-6)

    def task_layer(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.linear(self.linear(x, f"{name}.0").tanh(), f"{name}.2")

    # ---- both branches ----

    def features(self, image: torch.Tensor) -> torch.Tensor:
        image = image.double()
        semantic = self.task_layer(
            self.clip_encoder(image) if self.clip else self.siglip_encoder(image), "encode_task_layer"
        )
        side = math.isqrt(len(semantic))
        if not self.clip:
            image = F.interpolate(image, (4 * side, 4 * side), mode="bicubic")
        return torch.cat([semantic.T.reshape(1, -1, side, side), self.pixel_encoder(image)], 1)

    def codebooks(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (self.state[f"quantize.embedding_{name}.weight"] for name in ("vqkd", "vqgan"))
        return tuple(table / table.norm(dim=1, keepdim=True) for table in rows)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        residual, codes = self.features(image), []
        semantic, pixel = self.codebooks()
        for side in self.sides:
            for vector in F.adaptive_avg_pool2d(residual, side)[0].flatten(1).T:
                one, two = vector[:SEMANTIC_DIM], vector[SEMANTIC_DIM:]
                distances = (one / one.norm() - semantic).square().sum(1) + (two / two.norm() - pixel).square().sum(1)
                codes.append(int(distances.argmin()))
            residual = residual - self.code_map(codes[-side * side :], side)
        return torch.tensor(codes)

    def code_map(self, codes: Sequence[int], side: int) -> torch.Tensor:
        small = torch.stack([torch.cat([table[code] for table in self.codebooks()]) for code in codes], 1)
        return F.interpolate(small.view(1, -1, side, side), (self.sides[-1], self.sides[-1]), mode="bicubic")

    def decode(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (cells, width) and pixels of the codes of the first so many scales."""
        codes, start, total = codes.tolist(), 0, 0.0
        for side in self.sides:
            if start == len(codes):
                break
            total = total + self.code_map(codes[start : start + side * side], side)
            start += side * side
        semantic = self.task_layer(self.semantic_decoder(total[:, :SEMANTIC_DIM]), "decode_task_layer")
        image = self.pixel_decoder(total[:, SEMANTIC_DIM:])
        return semantic, image if self.clip else F.interpolate(image, (self.pixels, self.pixels), mode="bicubic")
