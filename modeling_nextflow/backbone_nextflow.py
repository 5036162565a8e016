"""The NextFlow transformer without its head: embeddings of text and codes, and Qwen's layers (§2.2).

Only what NextFlow adds is written here: text rows of the embedding and, at a cell, the codebook features of the scale
before, upsampled, through a connector; the positions, and the mask. Knows codes, never pixels.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer
from transformers.utils import logging
from transformers.utils.output_capturing import capture_outputs

from .attention_nextflow import (
    ATTENTION_BACKENDS,
    CachePlace,
    NextFlowRotaryEmbedding,
    caches_of_layers,
    get_attention_mask,
)
from .configuration_nextflow import NextFlowConfig
from .fused_nextflow import FusedDecoderLayer, can_be_fused, fuse, separate_weights, unfuse
from .graphs_nextflow import PassGraphs
from .grids_nextflow import (
    ImageLayout,
    Schedule,
    count_codes,
    get_image_layout,
    get_position_ids,
    group_by_schedule,
    present_scales,
    schedules_from_grids,
)


logger = logging.get_logger(__name__)


class NextFlowConnector(nn.Sequential):
    """Codebook features -> hidden size."""

    def __init__(self, config: NextFlowConfig):
        # TokenFlow's `mlp2x_gelu`, of both halves of a code together.
        linear_1 = nn.Linear(config.semantic_code_dim + config.pixel_code_dim, config.hidden_size)
        linear_2 = nn.Linear(config.hidden_size, config.hidden_size)
        super().__init__(OrderedDict(linear_1=linear_1, act=ACT2FN[config.connector_hidden_act], linear_2=linear_2))


class NextFlowPreTrainedModel(PreTrainedModel):
    """
    What the transformer's classes share: which modules are quantised, sharded and compiled, fused layers, and how
    weights begin. See [`~transformers.PreTrainedModel`] for loading and saving.
    """

    config: NextFlowConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "Qwen3DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Patterns. Quantisation leaves these modules alone, and float16 keeps them in float32: codes are cast to the
    # connector's dtype, which must be one to compute in. The head is left alone as every output embedding is.
    _keep_in_fp32_modules = [rf"(?:\w+\.){{0,4}}{name}" for name in ("connector", "scale_embedding", "image_codebook")]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    graphs: PassGraphs | None = None  # of `compile_sampling`
    _can_record_outputs = {
        "hidden_states": GradientCheckpointingLayer,  # what both kinds of layer are, and nothing else in here is
        "attentions": [Qwen2Attention, Qwen3Attention],
    }

    if TYPE_CHECKING:

        @property
        def base_model(self) -> "NextFlowModel": ...

    def __init__(self, config: NextFlowConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # FSDP wraps modules by these names, and expects each of them in the model.
        self._no_split_modules = ["Qwen3DecoderLayer" if config.qk_norm else "Qwen2DecoderLayer"]

    def compile_repeated_blocks(self, *args, dynamic: bool | None = True, **kwargs) -> None:
        """
        Compile the decoder's layers in place, for sampling. They share their code, so it takes the time of one layer.
        As in diffusers, arguments are `torch.compile`'s; `dynamic` is on, as every scale has a shape of its own.
        """
        for layer in self.base_model.layers:
            layer.compile(*args, dynamic=dynamic, **kwargs)

    def set_attention_backend(self, backend: str) -> None:
        """
        [`~PreTrainedModel.set_attn_implementation`] under the name and with the backends of diffusers' models, which
        inference engines call.

        Args:
            backend (`str`): One of [`ATTENTION_BACKENDS`], such as `"native"`; any other raises `ValueError`.
        """
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(
                f"the attention backend is {backend!r}, expected one of {list(ATTENTION_BACKENDS)}: others take no "
                "mask, which prompts with images need"
            )
        self.set_attn_implementation(ATTENTION_BACKENDS[backend])

    def compile_sampling(self, max_cells: int = 1024, **compile_options) -> None:
        """
        Make sampling images cheap to launch, on a CUDA device: fuse the layers, and record the passes of the scales as
        CUDA graphs. The first image of each shape (size, batch, guidance, prompt length up to the next multiple of 64)
        records, which takes about twice its time; those after it replay. What was recorded is dropped when the model
        moves or its layers change. Text decodes compiled with `cache_implementation="static"`, as in transformers.

        Args:
            max_cells (`int`, *optional*, defaults to 1024):
                Cells of the largest scale that is recorded. Larger ones are compute-bound and launched one by one.
            compile_options: With any, such as `mode="max-autotune-no-cudagraphs"`, layers are also compiled, see
                [`~NextFlowPreTrainedModel.compile_repeated_blocks`].

        Raises:
            `ValueError`: on another device than CUDA, and where the layers cannot be fused.
        """
        if self.device.type != "cuda":
            raise ValueError(f"the model is on {self.device}, expected a CUDA device: CUDA graphs need one")
        # What can be fused has no hooks, adapters or offloading, whose Python a replay would leave out.
        self.fuse_qkv_projections()
        if not self.is_fused:
            raise ValueError("the layers cannot be fused, and what is quantised or adapted is not recorded")
        if compile_options:
            self.compile_repeated_blocks(**compile_options)
        self.graphs = PassGraphs(max_cells)

    def _apply(self, *args, **kwargs):
        if self.graphs is not None:  # the recorded passes read the weights where they were
            self.graphs = PassGraphs(self.graphs.max_cells)
        return super()._apply(*args, **kwargs)

    def fuse_qkv_projections(self) -> None:
        """
        Fuse the decoder's layers: queries, keys and values become one product, gate and up another, for less than half
        of the operators and the same results. Weights exist once, also meanwhile (but for those of one layer), and are
        saved under Qwen's names. Under the name of diffusers' models; see `fused_nextflow.py`.

        Where layers are quantised, adapted, sharded or offloaded, all stay as they are, with a warning: fuse before
        offloading. Loading an adapter unfuses the layers; PEFT's own `get_peft_model` does not.
        """
        if self.is_fused:
            return
        # All layers or none: `is_fused` asks the first one alone.
        if can_be_fused(self.base_model):
            fuse(self.base_model, qk_norm=self.config.qk_norm)
        else:
            logger.warning("the layers are quantised, adapted, sharded, offloaded or hooked: they are not fused")

    def unfuse_qkv_projections(self) -> None:
        """Undo [`~NextFlowPreTrainedModel.fuse_qkv_projections`]."""
        self.graphs = None
        if self.is_fused:
            unfuse(self.base_model, qk_norm=self.config.qk_norm)

    @property
    def is_fused(self) -> bool:
        """Whether [`~NextFlowPreTrainedModel.fuse_qkv_projections`] has fused the layers."""
        return isinstance(self.base_model.layers[0], FusedDecoderLayer)

    def load_adapter(self, *args, **kwargs):
        """transformers' method, which unfuses the layers first."""
        self.unfuse_qkv_projections()  # an adapter knows Qwen's names
        return super().load_adapter(*args, **kwargs)

    def add_adapter(self, *args, **kwargs) -> None:
        """transformers' method, which unfuses the layers first."""
        self.unfuse_qkv_projections()
        super().add_adapter(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, state_dict: dict[str, torch.Tensor] | None = None, **kwargs):
        if self.is_fused:
            # Files have Qwen's names whatever the layers are at the moment.
            state_dict = separate_weights(self, self.state_dict() if state_dict is None else state_dict)
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    functools.update_wrapper(save_pretrained, PreTrainedModel.save_pretrained)  # diffusers reads its arguments

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NextFlowInputs):
            init.normal_(module.scale_embedding.weight, std=module.scale_embedding_std)
            init.normal_(module.image_codebook.weight)  # only its directions count


class NextFlowInputs(NextFlowPreTrainedModel):
    """The first part of [`NextFlowModel`]: embeddings of text, of codes and of scales."""

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.image_codebook = nn.Embedding(config.codebook_size, config.semantic_code_dim + config.pixel_code_dim)
        # A copy of the tokenizer's codebooks, side by side: trained, it moves away from them without changing any
        # code.
        self.image_codebook.weight.requires_grad_(config.train_codebook)
        self.connector = NextFlowConnector(config)
        self.scale_embedding = nn.Embedding(config.max_scales, config.hidden_size)
        self.scale_embedding_std = math.sqrt(1 / (3 * config.hidden_size))  # as VAR initialises its own

    def embed_inputs(
        self,
        input_ids: torch.Tensor,
        image_codes: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        layout: ImageLayout | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Text rows of the embedding, and at every cell of scale k the upsampled features of the codes of scale k - 1.

        `inputs_embeds` replaces the rows of the embedding. Returns (batch, length, hidden). Raises `ValueError` where
        tokens, grids and codes do not fit together.
        """
        embeds: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if layout is None or image_grids is None:
            self.check_no_images(input_ids, strict=False)
            return self._with_gradients_of_images(embeds)
        codes = image_codes if image_codes is not None else input_ids.new_zeros(0)
        images = present_scales(self.config, input_ids, codes, schedules_from_grids(image_grids), layout)

        # An image of one scale has no cells; among other processes the modules are called all the same.
        cells = embeds.new_zeros(0, embeds.shape[-1])
        if any(len(grids) > 1 for grids, _ in images) or (self.training and _trains_with_others()):
            cells = self._embed_cells(codes, images)
        # Row 0 is `<boi>`'s, the others are those of the cells: one call for all, see `_trains_with_others`.
        scale_terms = self.scale_embedding(F.pad(layout.scale[layout.is_cell] - 1, (1, 0)))
        length_terms = self.scale_length_encoding(image_grids)
        boi_term = length_terms + scale_terms[0] * self.config.boi_scale_embedding
        # The terms may be float32 where embeddings are not: sum first, then round once.
        is_boi = layout.scale == 1
        embeds = embeds.masked_scatter(is_boi[..., None], (embeds[is_boi] + boi_term).to(embeds.dtype))
        cells = cells + scale_terms[1:] + length_terms[layout.image_index[layout.is_cell]]
        return embeds.masked_scatter(layout.is_cell[..., None], cells.to(embeds.dtype))

    def _with_gradients_of_images(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """`inputs_embeds`, with gradients (zeros) for what only images use."""
        if not (self.training and _trains_with_others()):
            return inputs_embeds
        code = torch.zeros(1, dtype=torch.long, device=inputs_embeds.device)
        unused = self.connector(self.image_codebook(code)) + self.scale_embedding(code)
        # Gradients that exist and are zero: the reduction across processes waits for those of every parameter.
        return inputs_embeds + (0 * unused).to(inputs_embeds.dtype)

    def _embed_cells(self, codes: torch.Tensor, images: list[tuple[Schedule, int]]) -> torch.Tensor:
        """Connector outputs (cells of scales 2..m of all images, hidden), images with one schedule in one go."""
        # A closed image also brings the codes of its last scale, which are no input.
        used = [count_codes(grids[:-1]) for grids, _ in images]
        per_image = codes.split([count for _, count in images])
        looked_up = self.image_codebook(torch.cat([rows[:count] for rows, count in zip(per_image, used)]))
        per_image = looked_up.split(used)
        embedded = [rows[:0] for rows in per_image]  # of an image of one scale: nothing
        for grids, members in group_by_schedule(grids for grids, _ in images).items():
            if len(grids) == 1:
                continue
            stacked = torch.stack([per_image[index] for index in members])  # (images, codes, code_dim)
            features, start = [], 0
            # The codes of a scale are the input of the next, so those of the last scale are used by no block.
            for grid, next_grid in zip(grids, grids[1:]):
                cells = grid[0] * grid[1]
                features.append(self.upsampled_features(stacked[:, start : start + cells], grid, next_grid))
                start += cells
            for index, rows in zip(members, torch.cat(features, dim=1)):
                embedded[index] = rows
        return self.connector(torch.cat(embedded))

    def upsampled_features(
        self, looked_up: torch.Tensor, grid: tuple[int, int], next_grid: tuple[int, int]
    ) -> torch.Tensor:
        """Codebook features of the codes of one scale (batch, h*w, code_dim), residual and not accumulated, at the
        next grid.

        Bicubic in fp32; both halves l2-normalised as the tokenizer looks them up. Returns (batch, h'*w', code_dim).
        """
        halves = [self.config.semantic_code_dim, self.config.pixel_code_dim]
        # As in the quantiser: unit vectors, whatever length training gave the rows.
        semantic, pixel = looked_up.float().split(halves, dim=-1)
        features = torch.cat([F.normalize(semantic, dim=-1), F.normalize(pixel, dim=-1)], dim=-1)
        features = features.transpose(1, 2).unflatten(2, grid)  # (batch, code_dim, h, w)
        # The residual of one scale: with VAR's sum of all scales so far self-correction hurts (figure 10).
        features = F.interpolate(features, size=next_grid, mode="bicubic", align_corners=False)
        return features.flatten(2).transpose(1, 2).to(looked_up.dtype)

    def scale_length_encoding(self, image_grids: torch.Tensor) -> torch.Tensor:
        """Sinusoidal encoding (n_images, hidden) of the NUMBER of scales of each image, at the amplitude of the scale
        embedding (amplitude not specified by the paper). A grid that stands there twice shows the codes of one scale:
        an image has as many scales where it is given as where it is sampled."""
        hidden = self.config.hidden_size
        is_scale = image_grids[..., 0] > 0
        if not self.config.scale_length_counts_repeats:
            is_scale[:, 1:] &= (image_grids[:, 1:] != image_grids[:, :-1]).any(-1)
        num_scales = is_scale.sum(-1, keepdim=True).float()  # (n_images, 1)
        exponent = torch.arange(0, hidden, 2, device=image_grids.device).float() / hidden
        angle = num_scales * 10000.0**-exponent
        encoding = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :hidden]
        return encoding * self.scale_embedding_std

    def get_placeholder_ids(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """The tokens of images in `inputs_embeds`, recognised by their embeddings; every other token is 0."""
        input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        for token_id in (self.config.boi_token_id, self.config.image_token_id, self.config.eoi_token_id):
            embedding = self.embed_tokens(input_ids.new_full((1,), token_id)).to(inputs_embeds.device)
            # Bit for bit: both come from the same row of the table.
            input_ids = torch.where((inputs_embeds == embedding).all(-1), token_id, input_ids)
        return input_ids

    def check_no_images(self, input_ids: torch.Tensor, *, strict: bool = True) -> None:
        """Raise where tokens that came without `image_grids` are an image's; where not `strict`, warn."""
        if torch.compiler.is_compiling():  # looking at values would break the graph
            return
        count = int(((input_ids == self.config.image_token_id) | (input_ids == self.config.boi_token_id)).sum())
        message = "input_ids hold <boi> or image placeholder tokens, but no image_grids were given"
        if count and strict:
            raise ValueError(f"{message}, which {count} tokens need: pass all that the processor returned")
        if count:
            logger.warning_once(f"{message}: they are embedded as text is")


def _trains_with_others() -> bool:
    """
    Whether there are other processes. Those that train together wait for each other: for the gradients of every
    parameter, also of what a batch of text does not use, and where weights are sharded at every call of a module. So
    all call the codebook, the connector and the scale embedding once, in this order, whatever their batch is.
    """
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _without_recomputing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Without gradients there is nothing to recompute, and layers that would do it drop their cache."""
    recomputing: list[Any] = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in recomputing:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in recomputing:
            layer.gradient_checkpointing = True


class NextFlowModel(NextFlowInputs):
    """The decoder without its head. See [`NextFlowForCausalLM.forward`] for the inputs."""

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        layer_class = Qwen3DecoderLayer if config.qk_norm else Qwen2DecoderLayer
        self.layers = nn.ModuleList(
            layer_class(config, layer_idx)  # pyright: ignore[reportArgumentType]  # our config has Qwen3's fields
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = NextFlowRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        The hidden states after the last norm. Arguments are those of [`NextFlowForCausalLM.forward`], and:

        Args:
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                cos and sin, each (batch, length, head_dim), instead of positions: for a block on top of a cache.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` (batch, length, hidden) and `past_key_values`.

        Raises:
            `ValueError`: where not exactly one of `input_ids` and `inputs_embeds` is given, for `pixel_values`, and
            where images in the tokens and `image_grids` do not fit each other.
        """
        if kwargs.get("pixel_values") is not None:  # a trainer's loss of its own calls this module by itself
            raise ValueError(
                "got pixel_values, but the transformer reads image_codes: train and call "
                "NextFlowForConditionalGeneration, which has the vision tokenizer"
            )
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if input_ids is None and image_grids is not None and inputs_embeds is not None:
            input_ids = self.get_placeholder_ids(inputs_embeds)
        layout = None
        if input_ids is not None and image_grids is not None:
            layout = get_image_layout(self.config, input_ids, image_grids)
        if input_ids is not None and (inputs_embeds is None or layout is not None):
            inputs_embeds = self.embed_inputs(input_ids, image_codes, image_grids, layout, inputs_embeds)
        assert inputs_embeds is not None
        is_text = layout is None and (position_ids is None or position_ids.ndim == 2)  # as in any language model
        if position_embeddings is not None:
            position_ids = None  # prepared for a block on top of a cache
        elif position_ids is None:
            position_ids = self.get_position_ids(
                input_ids, inputs_embeds, image_grids, attention_mask, past_key_values, layout=layout
            )
        elif position_ids.ndim == 2:
            token_positions = position_ids.expand(len(inputs_embeds), -1)
            position_ids = self.get_position_ids(
                input_ids, inputs_embeds, image_grids, token_positions=token_positions, layout=layout
            )
        if isinstance(attention_mask, dict):  # prepared by `generate`
            mask = attention_mask["full_attention"]
        else:
            mask = get_attention_mask(
                self.config,
                inputs_embeds,
                attention_mask,
                position_ids,
                past_key_values,
                layout,
                is_causal=kwargs.get("is_causal", True),
            )

        hidden_states = inputs_embeds
        text_positions = None  # tell flash packed documents
        if position_ids is not None:
            text_positions = position_ids[0].long() if len(position_ids) == 4 else None
            position_embeddings = self.rotary_emb(hidden_states, position_ids[-3:])
        layers = self.layers[: self.config.num_hidden_layers]  # fewer where an early exit drafts
        samples = self.training and not torch.is_grad_enabled()
        with _without_recomputing(layers) if samples else nullcontext():
            for layer, cache in zip(layers, caches_of_layers(past_key_values, len(layers))):
                hidden_states = layer(
                    hidden_states,
                    attention_mask=mask,
                    position_embeddings=position_embeddings,
                    position_ids=text_positions,
                    past_key_values=cache,
                    use_cache=use_cache,
                    **kwargs,
                )
        hidden_states = self.norm(hidden_states)
        if past_key_values is not None and position_ids is not None and not torch.compiler.is_compiling():
            # Not on a cache of text alone, which stays what other code expects: torch.export flattens its attributes.
            if not is_text or CachePlace.of(past_key_values) is not None:
                CachePlace.mark(past_key_values, position_ids[:, :, -1])
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def get_position_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        past_key_values: Cache | None = None,
        token_positions: torch.Tensor | None = None,
        layout: ImageLayout | None = None,
    ) -> torch.Tensor:
        """
        Positions (4, batch, length) from the tokens alone; see [`grids_nextflow.get_position_ids`].

        On top of a cache the tokens continue where it ends, which is not its length: an image took one step a scale.
        `token_positions` say themselves where their tokens stand. Raises `ValueError` without `input_ids` and
        `inputs_embeds`.
        """
        if input_ids is None:  # only its shape is read
            if inputs_embeds is None:
                raise ValueError("pass input_ids or inputs_embeds")
            input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        length = input_ids.shape[1]
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
        past_tokens = past_steps = 0
        if past_key_values is not None:
            past_tokens = past_key_values.get_seq_length()
            if mask is not None:
                # Padding takes no position, so rows differ in how far they have come.
                past_tokens = mask[:, :-length].long().sum(1, keepdim=True)
            place = CachePlace.of(past_key_values)
            past_steps = past_tokens + (0 if place is None else place.steps_ahead(past_key_values, len(input_ids)))
        return get_position_ids(
            self.config,
            input_ids,
            image_grids,
            # The mask also covers what is cached.
            None if mask is None else mask[:, -length:],
            token_positions,
            layout,
            past_tokens=past_tokens,
            past_steps=past_steps,
        )
