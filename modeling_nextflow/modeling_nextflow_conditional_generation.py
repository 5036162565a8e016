"""The transformer with the vision tokenizer at its side: pixels in, text and pixels out.

Adds nothing to either. Its repository is theirs: the transformer's files at the root, the tokenizer's in the
sub-folder `vision_tokenizer`, as the pipeline's is laid out, so one repository serves every class.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .configuration_nextflow import NextFlowConfig
from .generation_nextflow import (
    NextFlowGenerationMixin,
    NextFlowImageGenerationOutput,
    NextFlowInterleavedGenerationOutput,
)
from .grids_nextflow import check_image_count
from .modeling_nextflow import NextFlowCausalLMOutputWithPast, NextFlowForCausalLM, NextFlowTokenScores
from .modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer


logger = logging.get_logger(__name__)

VISION_TOKENIZER = "vision_tokenizer"
TOKENIZER_ATTENTION = (None, "eager", "sdpa")
# Arguments of `from_pretrained` about the repository, which both parts get.
_REPOSITORY_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "trust_remote_code",
    "variant",
    "use_safetensors",
    "max_memory",
    "offload_folder",
    "offload_buffers",
)


class NextFlowForConditionalGeneration(NextFlowForCausalLM, NextFlowGenerationMixin):
    r"""
    [`NextFlowForCausalLM`] that takes `pixel_values` wherever that takes `image_codes`, and gives pixels for codes.
    The tokenizer is frozen. Weights keep the names they have without it.

    Args:
        config ([`NextFlowConfig`]): The transformer's, with a `vision_tokenizer_config`.
    """

    _keys_to_ignore_on_load_missing = [rf"^{VISION_TOKENIZER}\."]  # they come from files of their own

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.vision_tokenizer: NextFlowVisionTokenizer | None = None  # `from_pretrained` puts it there
        own = config.vision_tokenizer_config
        if own is not None:
            assert not isinstance(own, dict)  # a configuration makes its sub-configurations of them
            if own._attn_implementation not in TOKENIZER_ATTENTION:
                own._attn_implementation = None
            self._set_vision_tokenizer(NextFlowVisionTokenizer._from_config(own))
        self.post_init()

    def _set_vision_tokenizer(self, vision_tokenizer: NextFlowVisionTokenizer) -> None:
        if vision_tokenizer.config.codebook_size != self.config.codebook_size:
            raise ValueError(
                f"the vision tokenizer has {vision_tokenizer.config.codebook_size} codes, the transformer "
                f"{self.config.codebook_size}"
            )
        self.vision_tokenizer = vision_tokenizer.eval().requires_grad_(False)
        self.config.vision_tokenizer_config = vision_tokenizer.config
        # `post_init` gathers these from the parts that exist when it runs.
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_no_split_modules"):
            setattr(self, name, {*(getattr(self, name) or ()), *getattr(vision_tokenizer, name)})

    def train(self, mode: bool = True) -> "NextFlowForConditionalGeneration":
        """
        Set the mode of the transformer; the vision tokenizer stays frozen and in evaluation mode.

        Raises:
            `ValueError`: where parameters of the vision tokenizer require gradients.
        """
        super().train(mode)
        if self.vision_tokenizer is not None:
            self.vision_tokenizer.eval()
            trained = [name for name, value in self.vision_tokenizer.named_parameters() if value.requires_grad]
            if mode and trained:  # they would get no gradient
                raise ValueError(
                    f"{len(trained)} parameters of the frozen vision tokenizer are to be trained, such as "
                    rf"{trained[0]}: pass exclude_modules='.*\b{VISION_TOKENIZER}\..*' to an adapter of both parts"
                )
        return self

    # ---- one repository

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        r"""
        As everywhere in transformers, with two parts to load. `dtype`, `attn_implementation` and `device_map` are for
        both; as dictionaries, those of the tokenizer are under `"vision_tokenizer"` (or `"vision_tokenizer_config"`,
        as transformers names sub-configurations). An attention that the tokenizer does not have leaves it with its
        own. `quantization_config` and all other options are the transformer's.
        """
        if pretrained_model_name_or_path is None:  # with a `state_dict` of both
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        if isinstance(config, NextFlowConfig):
            config = copy.deepcopy(config)
            config.vision_tokenizer_config = None  # the files say
        own = {name: kwargs[name] for name in _REPOSITORY_ARGUMENTS if name in kwargs}
        for name in ("dtype", "torch_dtype", "attn_implementation", "device_map"):
            if name in kwargs:
                kwargs[name], own[name] = _split(kwargs[name], name)
        attention = own.get("attn_implementation")
        if not isinstance(attention, dict) and attention not in TOKENIZER_ATTENTION:
            own.pop("attn_implementation")
        loading_info = kwargs.get("output_loading_info", False)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model, info = loaded if isinstance(loaded, tuple) else (loaded, {})

        folder = "/".join(part for part in (kwargs.get("subfolder"), VISION_TOKENIZER) if part)
        # Not `pretrained_model_name_or_path`: that may be an adapter, which knows its base.
        loaded = NextFlowVisionTokenizer.from_pretrained(
            model.name_or_path, subfolder=folder, output_loading_info=loading_info, **own
        )
        vision_tokenizer, own_info = loaded if isinstance(loaded, tuple) else (loaded, {})
        for name, keys in own_info.items():
            info[name] = type(info[name])([*info[name], *(_prefixed(key) for key in keys)])
        _check_fingerprint(model.config.vision_tokenizer_fingerprint, vision_tokenizer)
        model._set_vision_tokenizer(vision_tokenizer)
        return (model, info) if loading_info else model

    def save_pretrained(self, save_directory: str | Path, *args, state_dict: dict | None = None, **kwargs) -> None:
        """
        As everywhere in transformers; the tokenizer goes to the sub-folder. An adapter is saved without it.
        """
        is_adapter = getattr(self, "_hf_peft_config_loaded", False)
        vision_tokenizer_config = self.config.vision_tokenizer_config
        if self.vision_tokenizer is not None and not is_adapter:
            own_state = None
            if state_dict is not None:
                own_state = {
                    key.removeprefix(_prefixed("")): tensor
                    for key, tensor in state_dict.items()
                    if key.startswith(_prefixed(""))
                }
            own = {name: kwargs[name] for name in ("is_main_process", "max_shard_size", "variant") if name in kwargs}
            self.vision_tokenizer.save_pretrained(Path(save_directory) / VISION_TOKENIZER, state_dict=own_state, **own)
            own_keys = (_prefixed(key) for key in self.vision_tokenizer.state_dict())
            self._keys_to_ignore_on_save = {*(self._keys_to_ignore_on_save or ()), *own_keys}
        try:
            self.config.vision_tokenizer_config = None  # it has been saved with the tokenizer
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        finally:
            self.config.vision_tokenizer_config = vision_tokenizer_config

    # ---- pixels and codes

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        """Codes (total_codes,) of images, `pixel_values` and `image_grids` as the image processor gives them."""
        assert self.vision_tokenizer is not None, "this model was made without a vision_tokenizer_config"
        device = _compute_device(self.vision_tokenizer)
        codes = self.vision_tokenizer.encode(pixel_values.to(device), image_grids.to(device)).image_codes
        assert codes is not None
        return codes.to(_compute_device(self))

    @torch.no_grad()
    def decode_image_tokens(
        self,
        image_tokens: torch.Tensor | NextFlowImageGenerationOutput | NextFlowInterleavedGenerationOutput,
        image_grids: torch.Tensor | None = None,
        *,
        num_scales: int | None = None,
    ) -> torch.Tensor:
        """
        Pixels (images, 3, max_height, max_width) in [-1, 1] of codes and their grids, or of what `generate` returned,
        which has both. With `num_scales` a preview at full size. Raises `ValueError` for codes without grids.
        """
        if isinstance(image_tokens, torch.Tensor):
            image_codes = image_tokens
        else:
            image_codes, image_grids = image_tokens.image_codes, image_tokens.image_grids
        if image_grids is None:
            raise ValueError("codes alone say no size: pass image_grids, or what `generate` returned")
        assert image_codes is not None  # `generate` returns both or neither
        assert self.vision_tokenizer is not None, "this model was made without a vision_tokenizer_config"
        device = _compute_device(self.vision_tokenizer)
        return self.vision_tokenizer.decode(image_codes.to(device), image_grids.to(device), num_scales=num_scales)

    def _codes_of_prompt(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor,
        *,
        image_codes: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cached: int = 0,
    ) -> torch.Tensor:
        """
        Codes of the images in a prompt, or of those behind its first `cached` tokens. A `<boi>` that ends its row has
        a schedule, but no pixels and no codes.
        """
        if image_codes is not None:
            raise ValueError("got pixel_values and image_codes: pass one, `get_image_tokens` gives codes of pixels")
        if image_grids is None or (input_ids is None and inputs_embeds is None):
            raise ValueError("pixel_values need input_ids and image_grids: they say where images are, and how large")
        is_boi = self._prompt_ids(input_ids, inputs_embeds) == self.config.boi_token_id
        check_image_count(is_boi, image_grids)
        has_pixels = is_boi.clone()
        has_pixels[:, -1] = False
        # Pixels are given of all images or, on top of a cache, of those behind it: their number tells.
        if len(pixel_values) != int(has_pixels.sum()):
            has_pixels[:, :cached] = False
        given = image_grids[has_pixels[is_boi]]
        if len(pixel_values) != len(given):
            where = " after those in past_key_values" if cached else ""
            raise ValueError(f"pixel_values has {len(pixel_values)} images, input_ids hold {len(given)}{where}")
        return self.get_image_tokens(pixel_values, given)

    # ---- forward and generate

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_target_codes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> NextFlowCausalLMOutputWithPast | NextFlowTokenScores:
        r"""
        As [`NextFlowForCausalLM.forward`].

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, max_height, max_width)`, *optional*):
                The images of `input_ids` in reading order, instead of their `image_codes`.
        """
        if pixel_values is not None:
            image_codes = self._codes_of_prompt(
                input_ids,
                pixel_values,
                image_codes=image_codes,
                image_grids=image_grids,
                inputs_embeds=inputs_embeds,
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_codes=image_codes,
            image_grids=image_grids,
            labels=labels,
            image_target_codes=image_target_codes,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | ModelOutput | NextFlowImageGenerationOutput:
        """
        [`NextFlowForCausalLM.generate`], where the images of the prompts may be `pixel_values`: of all or, with
        `past_key_values`, of those that are not in the cache yet.
        """
        if pixel_values is not None:
            input_ids, cache = kwargs.get("input_ids", inputs), kwargs.get("past_key_values")
            cached = 0 if cache is None else int(cache.get_seq_length())
            images = {name: kwargs.get(name) for name in ("image_codes", "image_grids", "inputs_embeds")}
            kwargs["image_codes"] = self._codes_of_prompt(input_ids, pixel_values, cached=cached, **images)
        return super().generate(inputs, generation_config, logits_processor, stopping_criteria, **kwargs)


def _check_fingerprint(expected: str | None, vision_tokenizer: NextFlowVisionTokenizer) -> None:
    """Raises `ValueError` where the transformer knows the codes of another vision tokenizer."""
    if expected is None:
        return
    found = vision_tokenizer.get_codes_fingerprint()
    if found is None:
        logger.warning("the vision tokenizer does not say whose codes it gives: load it in float32 and save it again")
    elif found != expected:
        raise ValueError(
            f"the transformer knows the codes of the vision tokenizer {expected}, got {found}: use the tokenizer that "
            "it was trained with"
        )


def _compute_device(model: PreTrainedModel) -> torch.device:
    """The device that `model` computes on. Parameters that are offloaded are elsewhere: accelerate's hooks know it."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), model.device))


def _prefixed(name: str) -> str:
    return f"{VISION_TOKENIZER}.{name}"


def _split(value: Any, name: str) -> tuple[Any, Any]:
    """A value for both parts, or a dictionary by module names, as (the transformer's, the tokenizer's)."""
    if not isinstance(value, dict):
        return value, value
    value = {VISION_TOKENIZER if key == f"{VISION_TOKENIZER}_config" else key: part for key, part in value.items()}
    own = {key for key in value if key.split(".")[0] == VISION_TOKENIZER}
    rest = {key: part for key, part in value.items() if key not in own}
    mine = {key.removeprefix(VISION_TOKENIZER).removeprefix("."): value[key] for key in own}
    if not mine and "" not in rest:
        raise ValueError(f"{name} is {value}, expected an entry {VISION_TOKENIZER!r} or one for all, ''")
    mine = mine or {"": rest[""]}
    if name == "device_map":
        return rest, mine
    return rest[""] if set(rest) == {""} else rest, mine[""]


__all__ = ["NextFlowForConditionalGeneration"]
