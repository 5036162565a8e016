"""What a mode of `generate` cannot do, refused by name before anything runs. Knows settings, not models."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig


# Settings of text that callers pass to every mode: where an image is drawn they ask for nothing.
_OF_NO_CONSEQUENCE = {
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "num_beams",
    "pad_token_id",
    "return_dict_in_generate",
}


def refuse_options(options: Mapping[str, Any], mode: str, names: Sequence[str]) -> None:
    """Raise where a call has options that mean nothing in this mode."""
    names = ("assistant_model", "custom_generate", "prefix_allowed_tokens_fn", "synced_gpus", *names)
    for name in names:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"generation_mode={mode!r} does not go with {name}")


def refuse_text_settings(options: Mapping[str, Any]) -> None:
    """
    Raise where a call for an image has settings of text. Those of the generation config are for the texts that the
    model writes otherwise.
    """
    names = vars(GenerationConfig()).keys() - _OF_NO_CONSEQUENCE
    for name in sorted(names & options.keys()):
        value, default = options[name], name == "use_cache"
        if not (value is None or value is default or (value == 1 and value is not True)):  # penalties of 1 are none
            raise ValueError(f"generation_mode='image' does not go with {name}, got {value!r}: it is about text")


def refuse_config(config: GenerationConfig, mode: str) -> None:
    """Raise where a generation config asks for what this mode cannot do."""
    if config.num_beams > 1:
        raise ValueError(f"generation_mode={mode!r} does not go with beams, got num_beams={config.num_beams}")
    names = ["prompt_lookup_num_tokens", "assistant_early_exit"]
    if mode == "interleaved":
        # Scores of what step; lengths of whose tokens; a cache that does not grow.
        names += ["output_scores", "output_logits", "output_attentions", "output_hidden_states"]
        names += ["min_length", "min_new_tokens", "forced_eos_token_id", "exponential_decay_length_penalty"]
        names += ["cache_implementation", "prefill_chunk_size", "token_healing"]
        if config.use_cache is False:
            raise ValueError("generation_mode='interleaved' does not go without a cache, got use_cache=False")
        if config.guidance_scale not in (None, 1):
            raise ValueError(
                f"generation_mode='interleaved' does not go with guidance_scale, got {config.guidance_scale}: it "
                "guides text, and that of images is image_guidance_scale"
            )
    for name in names:
        value = getattr(config, name, None)
        if value and (name, value) != ("cache_implementation", "dynamic"):
            raise ValueError(f"generation_mode={mode!r} does not go with {name}, got {value!r}")


__all__ = ["refuse_config", "refuse_options", "refuse_text_settings"]
