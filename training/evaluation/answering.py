"""A pipeline's answers to the samples of a suite, turn by turn."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ...processing.messages_nextflow import join_reasoning
from ..common.recipe import call_with
from .suite import Answer, Part, Sample


if TYPE_CHECKING:
    from ...pipelines.pipeline_nextflow import NextFlowPipeline

MAX_NEW_TOKENS = 256  # of a text, where neither the sample nor the command says it


def answer_sample(pipe: "NextFlowPipeline", sample: Sample, seed: int, settings: dict[str, Any]) -> Answer:
    """The parts of each answer. `settings` take precedence over the sample's."""
    settings = {**sample.settings, **settings}
    messages: list[dict] = []
    answers = []
    for number, turn in enumerate(sample.turns):
        messages = [*messages, *turn.messages]
        generator = torch.Generator().manual_seed(seed + number)
        answers.append(ABILITIES[turn.ability](pipe, messages, generator, settings))
        messages = [*messages, {"role": "assistant", "content": answers[-1]}]
    return answers


def _image(pipe: "NextFlowPipeline", messages: list[dict], generator: torch.Generator, settings: dict) -> list[Part]:
    options = {"messages": messages, "generator": generator}
    output = call_with(pipe, options | _without(settings, "max_new_tokens", "max_images"), "settings")
    return [{"type": "image", "image": image} for image in output.images]


def _text(pipe: "NextFlowPipeline", messages: list[dict], generator: torch.Generator, settings: dict) -> list[Part]:
    limit = settings.get("max_new_tokens", MAX_NEW_TOKENS)
    return [{"type": "text", "text": pipe.chat(messages, max_new_tokens=limit, do_sample=False)}]


def _think(pipe: "NextFlowPipeline", messages: list[dict], generator: torch.Generator, settings: dict) -> list[Part]:
    options = {"messages": messages, "think": True, "generator": generator}
    output = call_with(pipe, options | _without(settings, "max_images"), "settings")
    text = join_reasoning(output.thoughts[0], output.final_prompts[0])
    return [{"type": "text", "text": text}, *({"type": "image", "image": image} for image in output.images)]


def _interleave(pipe: "NextFlowPipeline", messages: list[dict], generator: torch.Generator, settings: dict):
    return call_with(pipe.interleave, {"messages": messages, "generator": generator, **settings}, "settings")


@torch.no_grad()
def _reconstruct(pipe: "NextFlowPipeline", messages: list[dict], generator: torch.Generator, settings: dict):
    """The true image and the decoded one, bicubically resized where its decoder makes another size."""
    processor, factor = pipe.processor.image_processor, settings.get("upscale_factor", 1)
    (image,) = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    resolution = settings.get("resolution", processor.resolution)
    larger = {"resolution": resolution * factor, "patch_size": processor.patch_size * factor}
    (true,) = processor.post_process_images(processor(image, return_tensors="pt", **larger)["pixel_values"])
    codes, grids = pipe.encode_images(image, resolution=resolution)
    decoder, options = settings.get("decoder", "vq"), _without(settings, "upscale_factor", "resolution", "decoder")
    if decoder == "diffusion":
        options = {name.removeprefix("decoder_"): value for name, value in options.items()}
        given = {"image_codes": codes, "image_grids": grids, "generator": generator}
        (decoded,) = call_with(pipe.diffusion_decoder_pipeline, given | options, "settings").images
    elif decoder != "vq" or options:
        raise ValueError(f"settings are {settings}, expected decoder=diffusion with decoder_strength and the like")
    else:
        (decoded,) = pipe.decode_codes(codes, grids)
    return [{"type": "image", "image": one} for one in (true, decoded.resize(true.size, Image.Resampling.BICUBIC))]


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


ABILITIES: dict[str, Callable[..., list[Part]]] = {
    "image": _image,
    "text": _text,
    "think": _think,
    "interleave": _interleave,
    "reconstruct": _reconstruct,
}
