"""Nodes for ComfyUI: load a pipeline, generate, edit and chat. Images are shown after each scale, as they grow.

ComfyUI's images are float tensors (batch, height, width, channels) in [0, 1], its masks (batch, height, width) with 1
where an image changes. Knows nothing of the pipeline's inside.
"""

from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from nextflow_hf import NextFlowPipeline


PREVIEW_PIXELS = 512
SEED = ("INT", {"default": 0, "min": 0, "max": 2**63 - 1})
TEXT = ("STRING", {"multiline": True})
SAMPLING = {
    "negative_prompt": TEXT,
    "seed": SEED,
    "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
    "guidance_scale": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 30.0, "tooltip": "0: the model's own"}),
}


def to_images(batch: torch.Tensor) -> list[Image.Image]:
    """ComfyUI's images as PIL images."""
    arrays = (batch.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(array[..., :3]) for array in arrays]


def to_batch(images: list[Image.Image]) -> torch.Tensor:
    """PIL images of one size as ComfyUI's."""
    return torch.stack([torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255) for image in images])


def to_mask(mask: torch.Tensor) -> Image.Image:
    return Image.fromarray((mask.reshape(-1, *mask.shape[-2:])[0].cpu() > 0.5).numpy().astype(np.uint8) * 255)


class NextFlowLoad:
    """A pipeline from a folder or the Hub, on ComfyUI's device."""

    CATEGORY, FUNCTION = "NextFlow", "load"
    RETURN_TYPES = ("NEXTFLOW",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        dtypes = (["auto", "float32", "bfloat16", "float16"],)
        return {"required": {"model": ("STRING", {"default": "", "tooltip": "folder or Hub id"}), "dtype": dtypes}}

    def load(self, model: str, dtype: str) -> tuple[NextFlowPipeline]:
        options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        pipe = NextFlowPipeline.from_pretrained(model, **options).to(comfy.model_management.get_torch_device())
        pipe.set_progress_bar_config(disable=True)
        return (pipe,)


class NextFlowGenerate:
    """Images of a prompt."""

    CATEGORY, FUNCTION = "NextFlow", "generate"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 1024, "min": 16, "max": 4096, "step": 16}
        size = {"width": ("INT", side), "height": ("INT", side)}
        return {"required": {"pipe": ("NEXTFLOW",), "prompt": TEXT, **size, **SAMPLING}}

    def generate(
        self, pipe: NextFlowPipeline, prompt: str, width: int, height: int, **sampling: Any
    ) -> tuple[torch.Tensor]:
        return (_sample(pipe, prompt, width=width, height=height, **sampling),)


class NextFlowEdit:
    """An image changed as told, in the shape that it has; more images are references, and a mask says where."""

    CATEGORY, FUNCTION = "NextFlow", "edit"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        guidance = {"default": 1.0, "min": 0.0, "max": 30.0, "tooltip": "the more, the closer to the images"}
        return {
            "required": {
                "pipe": ("NEXTFLOW",),
                "image": ("IMAGE",),
                "prompt": TEXT,
                "image_guidance_scale": ("FLOAT", guidance),
                **SAMPLING,
            },
            "optional": {"references": ("IMAGE",), "mask": ("MASK",)},
        }

    def edit(
        self,
        pipe: NextFlowPipeline,
        image: torch.Tensor,
        prompt: str,
        references: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        **sampling: Any,
    ) -> tuple[torch.Tensor]:
        images = to_images(image) + ([] if references is None else to_images(references))
        if mask is not None:
            sampling["mask_image"] = to_mask(mask)
        return (_sample(pipe, prompt, image=images, **sampling),)


class NextFlowChat:
    """The answer to a question, also about images."""

    CATEGORY, FUNCTION = "NextFlow", "chat"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        count = ("INT", {"default": 512, "min": 1, "max": 8192})
        return {
            "required": {"pipe": ("NEXTFLOW",), "prompt": TEXT, "max_new_tokens": count},
            "optional": {"images": ("IMAGE",)},
        }

    def chat(
        self, pipe: NextFlowPipeline, prompt: str, max_new_tokens: int, images: torch.Tensor | None = None
    ) -> tuple[str]:
        shown = [] if images is None else [{"type": "image", "image": image} for image in to_images(images)]
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}]
        return (pipe.chat(messages, max_new_tokens=max_new_tokens),)


def _sample(
    pipe: NextFlowPipeline, prompt: str, *, seed: int, batch_size: int, guidance_scale: float, **options: Any
) -> torch.Tensor:
    """Images of a prompt, each scale of which ComfyUI shows. Stops after a scale where the user stops it."""
    previews = pipe.preview(
        prompt,
        num_images_per_prompt=batch_size,
        generator=torch.Generator().manual_seed(seed),
        guidance_scale=guidance_scale or None,
        **options,
    )
    progress = None
    for preview in previews:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress = progress or comfy.utils.ProgressBar(preview.num_scales)
        shown = ("JPEG", preview.images[0], PREVIEW_PIXELS)
        progress.update_absolute(preview.scale, preview.num_scales, shown)
    return to_batch(preview.images)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (NextFlowLoad, NextFlowGenerate, NextFlowEdit, NextFlowChat)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "NextFlowLoad": "NextFlow: load",
    "NextFlowGenerate": "NextFlow: generate",
    "NextFlowEdit": "NextFlow: edit",
    "NextFlowChat": "NextFlow: chat",
}
