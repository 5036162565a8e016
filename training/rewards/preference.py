"""Models from the Hub as rewards, through transformers: CLIP similarity, preference models, aesthetic scores.

Weights are loaded at the first call, on the device that is asked for, and never trained.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoProcessor,
)

from .vlm_judge import prompt_text


class HubReward:
    """A frozen model and its processor, loaded when they are first needed."""

    auto_class: type = AutoModel

    def __init__(
        self,
        model_id: str,
        *,
        processor_id: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
        **kwargs: Any,
    ):
        self.model_id = model_id
        self.processor_id = processor_id or model_id
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.kwargs = kwargs
        self.__name__ = model_id.rstrip("/").split("/")[-1]

    @cached_property
    def processor(self) -> Any:
        """The processor, loaded on first use."""
        return AutoProcessor.from_pretrained(self.processor_id)

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model, loaded on first use."""
        options = {} if self.dtype is None else {"dtype": self.dtype}
        model = self.auto_class.from_pretrained(self.model_id, **options, **self.kwargs)
        return model.eval().requires_grad_(False).to(self._device)

    @property
    def _device(self) -> torch.device:
        return torch.device(self.device or torch.accelerator.current_accelerator() or "cpu")

    def _to_model(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        floats = {name: tensor.to(self.model.dtype) for name, tensor in inputs.items() if tensor.is_floating_point()}
        return {name: floats.get(name, tensor).to(self.model.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Any], **columns: Any) -> list[float]:
        texts = [prompt_text(prompt) for prompt in prompts]
        images = [image.convert("RGB") for image in images]
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            scores += self.score(images[rows], texts[rows]).float().tolist()
        return scores

    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """One number for each pair of an image and a text, (n,). A subclass says how."""
        raise NotImplementedError


class CLIPReward(HubReward):
    """
    Agreement of image and prompt under a CLIP-like model: the cosine of their embeddings (the CLIP score).

    Preference models of CLIP's shape (PickScore, HPS v2 in transformers' format) are used as they were trained, with
    `scaled=True`: the cosine times the model's learned scale.

    Args:
        model_id (`str`): Hub id or folder, as `"openai/clip-vit-large-patch14"` or `"yuvalkirstain/PickScore_v1"`.
        scaled (`bool`, *optional*, defaults to `False`): Multiply with `exp(logit_scale)`.
        processor_id (`str`, *optional*): Where the processor is, if not with the model.
        device, dtype, batch_size (*optional*): Where and how to run; by default the accelerator if there is one.
        kwargs: Further options of `from_pretrained`.
    """

    def __init__(self, model_id: str, *, scaled: bool = False, **kwargs: Any):
        super().__init__(model_id, **kwargs)
        self.scaled = scaled

    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """Cosine of the embeddings of each pair, (n,); times the learned scale where `scaled`."""
        # SigLIP reads a text at its last place, which padding to the longest of a batch would move.
        padding: dict[str, Any] = {"padding": True}
        if self.model.config.model_type.startswith("siglip"):
            padding = {"padding": "max_length", "max_length": self.model.config.text_config.max_position_embeddings}
        inputs = self.processor(images=images, text=texts, **padding, truncation=True, return_tensors="pt")
        outputs = self.model(**self._to_model(inputs))
        # The embeddings of the outputs have length 1 already.
        cosine = (outputs.image_embeds * outputs.text_embeds).sum(-1)
        return cosine * self.model.logit_scale.exp() if self.scaled else cosine


class ImageScoreReward(HubReward):
    """
    What an image classifier or a regressor says of the image alone, such as an aesthetic score.

    Args:
        model_id (`str`): Hub id or folder of a model for image classification.
        label (`str`, *optional*):
            The label whose probability is the reward. A model with one output needs none: the output is the reward.
        processor_id, device, dtype, batch_size, kwargs (*optional*): As in [`CLIPReward`].
    """

    auto_class = AutoModelForImageClassification

    def __init__(self, model_id: str, *, label: str | None = None, **kwargs: Any):
        super().__init__(model_id, **kwargs)
        self.label = label

    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """The logit of the only label, or the probability of `label`, for each image, (n,)."""
        labels = self.model.config.id2label
        if self.label is None and len(labels) != 1:
            raise ValueError(f"{self.model_id} has the labels {sorted(labels.values())}: name one with `label`")
        if self.label is not None and self.label not in labels.values():
            raise ValueError(f"{self.model_id} has no label {self.label!r}, expected one of {sorted(labels.values())}")
        logits = self.model(**self._to_model(self._inputs(images, texts))).logits
        if len(labels) == 1:  # whose softmax is always 1
            return logits[:, 0]
        index = next(index for index, name in labels.items() if name == self.label)
        if self.model.config.problem_type == "multi_label_classification":
            return logits.sigmoid()[:, int(index)]
        return logits.softmax(-1)[:, int(index)]

    def _inputs(self, images: list[Image.Image], texts: list[str]) -> dict[str, torch.Tensor]:
        return self.processor(images=images, return_tensors="pt")


class SequenceScoreReward(ImageScoreReward):
    """
    What a sequence classifier or a reward model says of an image and its prompt.

    A processor with a chat template gets a user's message of the image, then the prompt; another gets `images` and
    `text`.

    Args:
        model_id (`str`): Hub id or folder of a model for sequence classification that reads images.
        label, processor_id, device, dtype, batch_size, kwargs (*optional*): As in [`ImageScoreReward`].
    """

    auto_class = AutoModelForSequenceClassification

    def _inputs(self, images: list[Image.Image], texts: list[str]) -> dict[str, torch.Tensor]:
        options = {"padding": True, "return_tensors": "pt"}
        if getattr(self.processor, "chat_template", None) is None:
            return self.processor(images=images, text=texts, truncation=True, **options)
        messages = []
        for image, text in zip(images, texts):
            parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
            messages.append([{"role": "user", "content": parts}])
        return self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
