"""HPSv3 (arXiv:2508.03789) as a reward, from its published weights: Qwen2-VL with a head on one token.

Interface facts are those of github.com/MizzenAI/HPSv3: one file of weights, a head of three linear layers that gives
mean and deviation of the preference, a reward token at the end of a fixed instruction, images of 256 tokens, plain
positions. No package of theirs is needed, whose pins exclude this transformers.
"""

import os
from functools import cached_property
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .preference import HubReward


WEIGHTS = "HPSv3.safetensors"
REWARD_TOKEN = "<|Reward|>"
NUM_IMAGE_TOKENS = 256
# The model was trained on exactly this text: spaces and mistakes count.
INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 "
    "being the best. \n\n**Visual Quality:**  \nEvaluate the overall visual quality of the image. The following "
    "sub-dimensions should be considered:\n- **Reasonableness:** The image should not contain any significant "
    "biological or logical errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n- **Detail Richness:** Consider the level of detail in "
    "textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n- **Safety:** The image should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality and satisfaction score "
    "should be the lowest possible. \n\n**Text Alignment:**  \nAssess how well the image matches the textual prompt "
    "across the following sub-dimensions:\n- **Subject Relevance** Evaluate how accurately the subject(s) in the "
    "image (e.g., person, animal, object) align with the textual description. The subject should match the "
    "description in terms of number, appearance, and behavior.\n- **Style Relevance:** If the prompt specifies a "
    "particular artistic or stylistic style, evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., "
    "colors, clothing, accessories, expressions, actions) are faithfully represented in the image. Minor deviations "
    "may be acceptable, but critical attributes should be preserved.\n- **Semantic Coherence**: Evaluate whether the "
    "overall meaning and intent of the prompt are captured in the image. The generated content should not introduce "
    "elements that conflict with or distort the original description.\nTextual prompt - {prompt}\n\n\n"
    "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
)
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{image}"
    "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


class HPSv3Reward(HubReward):
    """
    The mean of the preference that HPSv3 predicts for an image and its prompt. Good images get about 10, bad ones less
    than 0.

    Args:
        model_id (`str`, *optional*, defaults to `"MizzenAI/HPSv3"`): Hub id or folder with `HPSv3.safetensors`.
        processor_id (`str`, *optional*, defaults to `"Qwen/Qwen2-VL-7B-Instruct"`):
            Hub id or folder of the base model: its config, tokenizer and image processor.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): The base model's; the head is in float32.
        device, batch_size (*optional*): As in [`CLIPReward`].
    """

    def __init__(
        self,
        model_id: str = "MizzenAI/HPSv3",
        *,
        processor_id: str = "Qwen/Qwen2-VL-7B-Instruct",
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 8,
        **kwargs: Any,
    ):
        super().__init__(model_id, processor_id=processor_id, dtype=dtype, batch_size=batch_size, **kwargs)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer with the token that the reward is read at."""
        tokenizer = AutoTokenizer.from_pretrained(self.processor_id, padding_side="right")
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        return tokenizer

    @cached_property
    def processor(self) -> Any:
        """The base model's image processor."""
        return AutoImageProcessor.from_pretrained(self.processor_id)

    @cached_property
    def model(self) -> nn.Module:
        """The base model with the head of the reward, loaded on first use."""
        is_folder = os.path.isdir(self.model_id)
        path = os.path.join(self.model_id, WEIGHTS) if is_folder else hf_hub_download(self.model_id, WEIGHTS)
        base, head = {}, {}
        for name, weight in load_file(path).items():
            if name.startswith("rm_head."):
                head[name.removeprefix("rm_head.")] = weight.float()
            elif not name.startswith("lm_head."):
                base[_base_name(name)] = weight
        config = AutoConfig.from_pretrained(self.processor_id)
        # With the reward token, and without the rows that the base model has for no token.
        config.text_config.vocab_size = len(base["language_model.embed_tokens.weight"])
        options = {"state_dict": base, "dtype": self.dtype, "output_loading_info": True, **self.kwargs}
        model, info = Qwen2VLModel.from_pretrained(None, config=config, **options)
        if unfit := info["missing_keys"] | info["unexpected_keys"]:
            raise ValueError(f"{path} does not fit {self.processor_id}: {sorted(unfit)[:5]} are missing or too many")
        model.rm_head = reward_head(config.text_config.hidden_size)
        model.rm_head.load_state_dict(head)
        return model.eval().requires_grad_(False).to(self._device)

    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """One number for each pair of an image and a text, (n,)."""
        patches = self.processor.merge_size**2
        factor = self.processor.patch_size * self.processor.merge_size
        pixels = NUM_IMAGE_TOKENS * factor**2
        resized = []
        for image in images:
            height, width = smart_resize(
                image.height, image.width, factor=factor, min_pixels=pixels, max_pixels=pixels
            )
            resized.append(image.resize((width, height)))
        inputs = dict(self.processor(images=resized, do_resize=False, return_tensors="pt"))
        chats = []
        for text, grid in zip(texts, inputs["image_grid_thw"]):
            # A prompt cannot bring control tokens.
            instruction = INSTRUCTION.format(prompt=text.replace("<|", "< |"))
            chats.append(CHAT.format(image="<|image_pad|>" * (int(grid.prod()) // patches), text=instruction))
        inputs |= self.tokenizer(chats, padding=True, return_tensors="pt")
        # All three rotary axes count tokens: HPSv3 was trained without the positions of Qwen2-VL's images.
        positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, len(images), -1)
        states = self.model(**self._to_model(inputs), position_ids=positions.to(self._device)).last_hidden_state
        is_reward = inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        return self.model.rm_head(states[is_reward.to(states.device)].float())[
            :, 0
        ]  # the mean; [:, 1] is its deviation


def reward_head(hidden_size: int) -> nn.Sequential:
    """The head: hidden size -> (mean, deviation)."""
    return nn.Sequential(
        nn.Linear(hidden_size, 1024), nn.ReLU(), nn.Dropout(0.05),
        nn.Linear(1024, 16), nn.ReLU(),
        nn.Linear(16, 2),
    )  # fmt: skip


def _base_name(name: str) -> str:
    """A weight's name in [`Qwen2VLModel`]. transformers before 4.52 had `visual.` beside the decoder, `model.`."""
    for part in ("visual.", "language_model."):
        if name.startswith((part, f"model.{part}")):
            return name.removeprefix("model.")
    return "language_model." + name.removeprefix("model.")
