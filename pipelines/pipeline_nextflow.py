"""Prompts, source images and messages in, images out (§2): the lifecycle of one call.

The work is done by the components, which meet here through data alone: tokens, `image_grids`, `image_codes`, pixels.
They are annotated with transformers' base classes, as an island imports no other. diffusers wants exact classes of its
own models only (`from_pipe` drops others); transformers' it checks with `isinstance`, so nothing is lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .diffusion_decoder import NextFlowDiffusionDecoder
from .pipeline_helpers import call_component, generator_per_image, one_per_prompt, stack_equal
from .pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
from .pipeline_nextflow_output import NextFlowPipelineOutput


Image = PIL.Image.Image | str | Path | np.ndarray | torch.Tensor
PerScale = float | int | Sequence[float | int | None]

# Where neither the call nor the transformer's generation config (`image_<name>`) says anything.
DEFAULT_SETTINGS = {
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}
OUTPUT_TYPES = ("pil", "np", "pt", "codes")
DECODERS = ("vq", "diffusion")

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from nextflow_hf import NextFlowPipeline
        >>> from nextflow_hf.hub_cards import shapes_model_path

        >>> pipe = NextFlowPipeline.from_pretrained(shapes_model_path())
        >>> image = pipe("a red circle", generator=torch.Generator().manual_seed(0)).images[0]
        >>> edited = pipe("make the circle blue", image=image).images[0]
        ```
"""


@dataclass
class NextFlowDrawingPrompt:
    """
    One image to draw, ready for the transformer.

    Args:
        input_ids (`torch.LongTensor` of shape `(length,)`): The prompt, ending in `<boi>`.
        image_grids (`torch.LongTensor` of shape `(sources + 1, max_scales, 2)`):
            Schedules of the source images, then of the image to draw.
        image_codes (`torch.LongTensor` of shape `(total_codes,)`): Codes of the source images.
        negative_input_ids (`torch.LongTensor` of shape `(length,)`, *optional*): The unconditional prompt.
    """

    input_ids: torch.LongTensor
    image_grids: torch.LongTensor
    image_codes: torch.LongTensor
    negative_input_ids: torch.LongTensor | None = None

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The schedule of the image to draw."""
        return [(height, width) for height, width in self.image_grids[-1].tolist() if height > 0]


class NextFlowPipeline(DiffusionPipeline):
    r"""
    Text-to-image, editing of one or several images, and drawing in a conversation.

    Args:
        transformer ([`NextFlowForCausalLM`]): Draws codes, scale by scale.
        vision_tokenizer ([`NextFlowVisionTokenizer`]): Images to codes and back. Also reachable as `vae`.
        processor ([`NextFlowProcessor`]): Messages and images to model inputs, pixels to images.
        diffusion_decoder ([`NextFlowDiffusionDecoder`], *optional*): Draws the pixels for `decoder="diffusion"`.
        decoder_scheduler, decoder_vae, decoder_text_encoder, decoder_tokenizer, decoder_text_encoder_2,
        decoder_tokenizer_2, decoder_text_encoder_3, decoder_tokenizer_3 (*optional*):
            Its parts, as in [`NextFlowDiffusionDecoderPipeline`].
    """

    model_cpu_offload_seq = (
        "vision_tokenizer->transformer->decoder_text_encoder->decoder_text_encoder_2->decoder_text_encoder_3->"
        "diffusion_decoder->decoder_vae"
    )
    _optional_components = [
        "diffusion_decoder",
        "decoder_scheduler",
        "decoder_vae",
        "decoder_text_encoder",
        "decoder_tokenizer",
        "decoder_text_encoder_2",
        "decoder_tokenizer_2",
        "decoder_text_encoder_3",
        "decoder_tokenizer_3",
    ]
    _callback_tensor_inputs = ["image_codes", "image_grids"]

    def __init__(
        self,
        transformer: PreTrainedModel,
        vision_tokenizer: PreTrainedModel,
        processor: ProcessorMixin,
        diffusion_decoder: NextFlowDiffusionDecoder | None = None,
        decoder_scheduler: SchedulerMixin | None = None,
        decoder_vae: AutoencoderKL | AutoencoderKLQwenImage | None = None,
        decoder_text_encoder: PreTrainedModel | None = None,
        decoder_tokenizer: PreTrainedTokenizerBase | None = None,
        decoder_text_encoder_2: PreTrainedModel | None = None,
        decoder_tokenizer_2: PreTrainedTokenizerBase | None = None,
        decoder_text_encoder_3: PreTrainedModel | None = None,
        decoder_tokenizer_3: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vision_tokenizer=vision_tokenizer,
            processor=processor,
            diffusion_decoder=diffusion_decoder,
            decoder_scheduler=decoder_scheduler,
            decoder_vae=decoder_vae,
            decoder_text_encoder=decoder_text_encoder,
            decoder_tokenizer=decoder_tokenizer,
            decoder_text_encoder_2=decoder_text_encoder_2,
            decoder_tokenizer_2=decoder_tokenizer_2,
            decoder_text_encoder_3=decoder_text_encoder_3,
            decoder_tokenizer_3=decoder_tokenizer_3,
        )
        self._guidance_scale: PerScale = DEFAULT_SETTINGS["guidance_scale"]
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def vae(self) -> PreTrainedModel:
        """The vision tokenizer, under the name that diffusers' tools look for."""
        return self.vision_tokenizer

    @property
    def diffusion_decoder_pipeline(self) -> NextFlowDiffusionDecoderPipeline:
        """The diffusion decoder as a pipeline of its own, of the same components."""
        if self.diffusion_decoder is None or self.decoder_scheduler is None:
            raise ValueError(
                f"`diffusion_decoder` is {type(self.diffusion_decoder).__name__} and `decoder_scheduler` "
                f"{type(self.decoder_scheduler).__name__}, expected both: this pipeline has no diffusion decoder"
            )
        parts = {
            name.removeprefix("decoder_"): part
            for name, part in self.components.items()
            if name.startswith("decoder_")
        }
        pipeline = NextFlowDiffusionDecoderPipeline(
            self.diffusion_decoder,
            vision_tokenizer=self.vision_tokenizer,
            image_processor=self.processor.image_processor,
            **parts,
        )
        pipeline.set_progress_bar_config(**{**vars(self).get("_progress_bar_config", {}), "desc": "diffusion decoder"})
        return pipeline

    @property
    def guidance_scale(self) -> PerScale:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        values = self._guidance_scale if isinstance(self._guidance_scale, Sequence) else [self._guidance_scale]
        return any(value is not None and value != 1 for value in values)

    @property
    def num_timesteps(self) -> int:
        """Scales that the call draws; images that differ in schedule are drawn one after the other."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop there: the images are previews of what was drawn."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        image: Any,
        messages: list | None,
        height: int | None,
        width: int | None,
        aspect_ratio: str | None,
        num_images_per_prompt: int,
        negative_prompt: str | list[str] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        decoder: str,
        decoder_settings: dict[str, Any],
    ) -> None:
        if (prompt is None) == (messages is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"pass exactly one of `prompt` and `messages`, got {given}")
        if messages is not None and image is not None:
            raise ValueError('`image` goes with `prompt`: in `messages` an image is {"type": "image", "image": ...}')
        if messages is not None and len(messages) == 0:
            raise ValueError("`messages` is empty, expected at least one message")
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            texts = [value] if isinstance(value, str) else value
            if texts is not None and not (
                isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
            ):
                raise TypeError(f"`{name}` is {value!r}, expected a string or a non-empty list of strings")
        if (height is None) != (width is None):
            raise ValueError(f"`height` is {height} and `width` is {width}, expected both or neither")
        if height is not None and aspect_ratio is not None:
            raise ValueError(f"got `height`, `width` and `aspect_ratio` ({aspect_ratio!r}): pass one of the two forms")
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` is {num_images_per_prompt}, expected at least 1")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}, expected one of {list(OUTPUT_TYPES)}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, expected some of {self._callback_tensor_inputs}"
            )
        if decoder not in DECODERS:
            raise ValueError(f"`decoder` is {decoder!r}, expected one of {list(DECODERS)}")
        if decoder == "vq" and decoder_settings:
            names = [f"decoder_{name}" for name in decoder_settings]
            raise ValueError(f"got {names} with `decoder='vq'`: they go with `decoder='diffusion'`")
        if decoder == "diffusion" and output_type == "codes":
            raise ValueError("`decoder='diffusion'` and `output_type='codes'`: codes are not decoded")

    def get_image_settings(self, **settings: Any) -> dict[str, Any]:
        """How to draw: what the call says, else the transformer's generation config, else [`DEFAULT_SETTINGS`]."""
        configured = self.transformer.generation_config.to_dict()
        resolved = {}
        for name, default in DEFAULT_SETTINGS.items():
            candidates = (settings[name], configured.get(f"image_{name}"))
            resolved[name] = next((value for value in candidates if value is not None), default)
        return resolved

    def build_messages(self, prompt: str | list[str], image: Any = None) -> list[list[dict[str, Any]]]:
        """One conversation for every prompt: a user's message with the prompt's source images, then its text."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sources = self._images_by_prompt(image, len(prompts), is_single=isinstance(prompt, str))
        return [
            [{"role": "user", "content": [*({"type": "image", "image": one} for one in images), _text_part(text)]}]
            for text, images in zip(prompts, sources, strict=True)
        ]

    @staticmethod
    def _images_by_prompt(image: Any, num_prompts: int, *, is_single: bool) -> list[list[Image]]:
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
            image = list(image)
        if image is None or not isinstance(image, (list, tuple)):
            return [[] if image is None else [image]] * num_prompts
        # All images are the sources of a single prompt; a list of prompts has one entry for each.
        entries = [image] if is_single and not any(isinstance(entry, (list, tuple)) for entry in image) else image
        if len(entries) != num_prompts:
            raise ValueError(f"`image` has {len(entries)} entries for {num_prompts} prompts, expected one for each")
        entries = [[] if entry is None else entry for entry in entries]
        return [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in entries]

    def encode_messages(
        self,
        conversations: list[list[dict[str, Any]]],
        negative_conversations: list[list[dict[str, Any]]] | None = None,
        *,
        keep_first_size: bool = False,
        **size: Any,
    ) -> list[NextFlowDrawingPrompt]:
        """
        Tokens of every conversation, and codes of its images.

        Args:
            conversations (`list[list[dict]]`): Messages, each conversation ending where the image is to be drawn.
            negative_conversations (`list[list[dict]]`, *optional*): The unconditional ones, with the same images.
            keep_first_size (`bool`, *optional*, defaults to `False`):
                Draw at the size of a conversation's first image. Else the processor decides: `size`, the
                conversation's last image, or a square.
            size: `height` and `width`, or `aspect_ratio`, and `resolution` of the image to draw.
        """
        device = self._execution_device
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "generation_mode": "image"}
        resolution = {name: value for name, value in size.items() if name == "resolution"}
        inputs = self.processor.apply_chat_template(conversations, **options, **size)
        image_grids = list(inputs["image_grids"].split(self._count_images(inputs)))
        sources = torch.cat([grids[:-1] for grids in image_grids])
        counts = [int(grids[:-1].prod(-1).sum()) for grids in image_grids]
        codes = sources.new_zeros(0)
        if len(sources):
            pixel_values = inputs["pixel_values"].to(device, self.vision_tokenizer.dtype)
            codes = call_component(self.vision_tokenizer, "encode", pixel_values, sources.to(device)).image_codes
        negative_ids = [None] * len(conversations)
        if negative_conversations is not None:
            # Only the tokens differ: these conversations have the same images.
            negative = self.processor.apply_chat_template(negative_conversations, **options, **resolution)
            if self._count_images(negative) != [len(grids) for grids in image_grids]:
                raise ValueError(
                    f"the unconditional prompts have {self._count_images(negative)} images, expected as many as the "
                    f"prompts: {[len(grids) for grids in image_grids]}"
                )
            negative_ids = _unpad(negative)
        prompts = []
        for ids, grids, part, negative in zip(
            _unpad(inputs), image_grids, codes.split(counts), negative_ids, strict=True
        ):
            if keep_first_size and len(grids) > 1:
                grids = torch.cat([grids[:-1], self.processor.target_image_grids(grids[:1])])
            prompts.append(NextFlowDrawingPrompt(ids, grids, part, negative))
        return prompts

    def _count_images(self, inputs: Any) -> list[int]:
        return (inputs["input_ids"] == self.processor.boi_token_id).sum(1).tolist()

    def draw_codes(
        self,
        prompts: list[NextFlowDrawingPrompt],
        *,
        generators: list[torch.Generator] | None = None,
        callback: Callable | None = None,
        **settings: Any,
    ) -> torch.LongTensor:
        """
        Codes (images, codes) of images that share one schedule. Fewer than the schedule has where `callback`, the
        transformer's, stopped early. `settings` as in [`~NextFlowPipeline.get_image_settings`].
        """
        device = self._execution_device
        input_ids, attention_mask = self._left_pad([prompt.input_ids for prompt in prompts])
        inputs = {
            "attention_mask": attention_mask,
            "image_grids": torch.cat([prompt.image_grids for prompt in prompts]),
            "image_codes": torch.cat([prompt.image_codes for prompt in prompts]),
        }
        if prompts[0].negative_input_ids is not None:
            negative = self._left_pad([prompt.negative_input_ids for prompt in prompts])
            inputs["negative_input_ids"], inputs["negative_attention_mask"] = negative
            inputs["negative_image_grids"] = inputs["image_grids"]
            inputs["negative_image_codes"] = inputs["image_codes"]
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        output = call_component(
            self.transformer,
            "generate_images",
            input_ids.to(device),
            **inputs,
            **settings,
            generator=generators,
            callback=callback,
        )
        return output.image_codes.view(len(prompts), -1)

    def _left_pad(self, rows: list[torch.LongTensor]) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Rows of tokens as one batch (rows, length), and its mask."""
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), self.processor.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, length - len(row) :] = row
            attention_mask[index, length - len(row) :] = 1
        return input_ids, attention_mask

    def decode_codes(
        self,
        image_codes: torch.LongTensor,
        image_grids: torch.LongTensor,
        *,
        num_scales: int | None = None,
        output_type: str = "pil",
    ) -> list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]:
        """
        Images of codes (total_codes,) under their whole schedules (images, max_scales, 2). With `num_scales` the codes
        of the first scales are enough: a preview at full size.
        """
        device = self._execution_device
        image_codes, image_grids = image_codes.to(device), image_grids.to(device)
        pixel_values = call_component(self.vision_tokenizer, "decode", image_codes, image_grids, num_scales=num_scales)
        return self.processor.image_processor.post_process_images(
            pixel_values.float().cpu(), image_grids.cpu(), output_type=output_type
        )

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image | list[Image] | list[list[Image]] | None = None,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        resolution: int | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: PerScale | None = None,
        guidance_schedule: str | None = None,
        temperature: PerScale | None = None,
        top_k: PerScale | None = None,
        top_p: PerScale | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decoder: str = "vq",
        decoder_prompt: str | list[str] | None = None,
        decoder_num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        decoder_strength: float | None = None,
        decoder_tile_size: int | None = None,
        decoder_generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image_codes",),
    ) -> NextFlowPipelineOutput | tuple:
        r"""
        Draw images. Settings left out come from the transformer's generation config (`image_guidance_scale`,
        `image_temperature`, ...).

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw or, with `image`, how to change it.
            image (image, `list` or `list[list]` of images, *optional*):
                The images to edit: PIL images, paths, arrays or tensors. For a single prompt one or several; for a
                list of prompts one for all, or a list with an image, a list of images or `None` for each prompt.
            messages (`list[dict]` or `list[list[dict]]`, *optional*):
                One or several conversations, instead of `prompt`: the image is drawn as the next answer.
            height (`int`, *optional*): Height in pixels, snapped to the nearest size the model knows. Needs `width`.
            width (`int`, *optional*): Width in pixels. Needs `height`.
            aspect_ratio (`str`, *optional*):
                `"width:height"`, such as `"16:9"`, instead of a size. With neither, an edit keeps the shape of its
                first source image, a conversation that of its last image, and all else is square.
            resolution (`int`, *optional*):
                Side in pixels of a square image with as many scales, also for the source images.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images for each prompt, beside each other.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What guidance leads away from. The unconditional prompt is the same conversation with the same images,
                without the user's text, and with this at the end of the last user message.
            guidance_scale (`float` or `list[float]`, *optional*):
                Strength of guidance, also per scale. 1 is none, and costs no unconditional pass.
            guidance_schedule (`str`, *optional*): `"constant"`, or `"linear"`: from 1 at the first scale to the value.
            temperature (`float` or `list[float]`, *optional*): 0 takes the best code.
            top_k (`int` or `list[int]`, *optional*): Codes to sample from; 0 is all.
            top_p (`float` or `list[float]`, *optional*): Probability mass to sample from.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one for each image. Each image draws from a generator of its own, seeded with one number of the
                given one, so an image with a generator to itself is the same in any batch, and the first image of a
                batch with a single generator is the one it would be alone. With generators, the global random state is
                neither read nor changed.
            decoder (`str`, *optional*, defaults to `"vq"`):
                What makes pixels of the codes: `"vq"`, the vision tokenizer, or `"diffusion"`, the diffusion decoder:
                sharper, slower, and free to change fine structure.
            decoder_prompt (`str` or `list[str]`, *optional*):
                Caption for the diffusion decoder, for all images or each prompt's. By default `prompt`, and nothing
                where that is an instruction: with `image` or `messages`.
            decoder_num_inference_steps, decoder_guidance_scale, decoder_strength, decoder_tile_size (*optional*):
                For the diffusion decoder, as in [`NextFlowDiffusionDecoderPipeline`], with its defaults.
            decoder_generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                For its noise, one or one for each image. By default each image goes on with its own of `generator`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"codes"`: no decoding.
            return_dict (`bool`, *optional*, defaults to `True`): Else the same as a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each scale as `callback(pipe, step, scale, callback_kwargs)`: `step` counts all scales of
                the call (up to `num_timesteps`), `scale` those of the images that are drawn together. It may set
                `pipe._interrupt`, or `pipe._guidance_scale` for the scales to come: a number for all or a list with an
                entry for each scale of the schedule (without effect where the call began without guidance). The
                tensors are for reading: a preview is
                `pipe.decode_codes(image_codes.flatten(), image_grids, num_scales=scale + 1)`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["image_codes"]`):
                `"image_codes"`: codes so far (images, codes); `"image_grids"`: the schedules (images, max_scales, 2).

        Examples:

        Returns:
            [`NextFlowPipelineOutput`] or `tuple`: images, their codes and their schedules.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        decoder_settings = {
            "prompt": decoder_prompt,
            "num_inference_steps": decoder_num_inference_steps,
            "guidance_scale": decoder_guidance_scale,
            "strength": decoder_strength,
            "tile_size": decoder_tile_size,
            "generator": decoder_generator,
        }
        decoder_settings = {name: value for name, value in decoder_settings.items() if value is not None}
        self.check_inputs(
            prompt,
            image,
            messages,
            height,
            width,
            aspect_ratio,
            num_images_per_prompt,
            negative_prompt,
            output_type,
            callback_on_step_end_tensor_inputs,
            decoder,
            decoder_settings,
        )
        diffusion_decoder = self.diffusion_decoder_pipeline if decoder == "diffusion" else None
        if diffusion_decoder is not None:
            diffusion_decoder.check_settings(**decoder_settings)
            decoder_settings = {
                name: value for name, value in decoder_settings.items() if name not in ("prompt", "generator")
            }

        # 2. How to draw
        settings = self.get_image_settings(
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False

        # 3. What to draw, as conversations
        if messages is None:
            conversations = self.build_messages(prompt, image)
        else:
            conversations = [messages] if isinstance(messages[0], dict) else list(messages)
        num_images = len(conversations) * num_images_per_prompt
        generators = generator_per_image(generator, num_images)
        negative_conversations = None
        if self.do_classifier_free_guidance:
            negative_texts = one_per_prompt("negative_prompt", negative_prompt or "", len(conversations))
            negative_conversations = list(map(unconditional_messages, conversations, negative_texts))
        captions, noise_generators = None, generators
        if diffusion_decoder is not None:
            # An instruction says what to change, not what is to be seen.
            if decoder_prompt is None and image is None and diffusion_decoder.has_text_encoder:
                decoder_prompt = prompt
            if decoder_prompt is not None:
                texts = one_per_prompt("decoder_prompt", decoder_prompt, len(conversations))
                captions = [text for text in texts for _ in range(num_images_per_prompt)]
            if decoder_generator is not None:
                noise_generators = generator_per_image(decoder_generator, num_images)

        # 4. Tokens of the conversations, codes of the images in them
        size = {"height": height, "width": width, "aspect_ratio": aspect_ratio}
        size = {name: value for name, value in size.items() if value is not None}
        prompts = self.encode_messages(
            conversations,
            negative_conversations,
            keep_first_size=messages is None and not size,
            **size,
            **({} if resolution is None else {"resolution": resolution}),
        )
        prompts = [one for one in prompts for _ in range(num_images_per_prompt)]

        # 5. Draw and decode, the images of one schedule together
        groups: dict[tuple, list[int]] = {}
        for index, one in enumerate(prompts):
            groups.setdefault(tuple(one.grids), []).append(index)
        self._num_timesteps = sum(len(grids) for grids in groups)
        images, image_codes = [None] * num_images, [None] * num_images
        image_grids = torch.stack([one.image_grids[-1] for one in prompts])
        first_step = 0
        with self.progress_bar(total=self._num_timesteps) as progress:
            for grids, members in groups.items():
                self._guidance_scale = settings["guidance_scale"]
                target_grids = image_grids[members]
                callback = self._scale_callback(
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    progress=progress,
                    first_step=first_step,
                    target_grids=target_grids,
                    settings=settings,
                )
                codes = self.draw_codes(
                    [prompts[index] for index in members],
                    generators=None if generators is None else [generators[index] for index in members],
                    callback=callback,
                    **settings,
                )
                drawn = _num_scales(codes.shape[1], grids)
                decoded = codes
                if diffusion_decoder is not None:
                    decoded = diffusion_decoder(
                        codes.flatten(),
                        target_grids,
                        prompt=None if captions is None else [captions[index] for index in members],
                        generator=None if noise_generators is None else [noise_generators[index] for index in members],
                        num_scales=drawn,
                        output_type=output_type,
                        **decoder_settings,
                    ).images
                elif output_type != "codes":
                    decoded = self.decode_codes(
                        codes.flatten(), target_grids, num_scales=drawn, output_type=output_type
                    )
                for index, one, row in zip(members, decoded, codes, strict=True):
                    images[index], image_codes[index] = one, row
                    image_grids[index, drawn:] = 0
                first_step += len(grids)

        # 6. Output
        self.maybe_free_model_hooks()
        output = NextFlowPipelineOutput(
            images=None if output_type == "codes" else stack_equal(images),
            image_codes=torch.cat(image_codes),
            image_grids=image_grids.to(image_codes[0].device),
        )
        return output if return_dict else output.to_tuple()

    def _scale_callback(
        self,
        callback_on_step_end: Callable | None,
        tensor_inputs: Sequence[str],
        *,
        progress: Any,
        first_step: int,
        target_grids: torch.LongTensor,
        settings: dict[str, Any],
    ) -> Callable:
        """The transformer's callback: moves the progress bar, calls the user's, and hands back what that changed."""

        def callback(scale: int, step: Any, image_codes: torch.LongTensor) -> list | None:
            progress.set_postfix_str(f"{step.grid[0]}x{step.grid[1]}", refresh=False)
            progress.update()
            guidance_scale = self._guidance_scale
            if callback_on_step_end is not None:
                tensors = {"image_codes": image_codes, "image_grids": target_grids}
                callback_on_step_end(self, first_step + scale, scale, {name: tensors[name] for name in tensor_inputs})
            if self.interrupt:
                return []
            if self._guidance_scale != guidance_scale:
                changed = {**settings, "guidance_scale": self._guidance_scale}
                return _steps_after(scale, step, target_grids[0].tolist(), changed)
            return None

        return callback


def _steps_after(scale: int, step: Any, grids: list[list[int]], settings: dict[str, Any]) -> list:
    """The transformer's steps for the scales after `scale`, made from `step`, one of them."""

    def setting(name: str, index: int) -> float | int:
        value = settings[name]
        value = value[index] if isinstance(value, Sequence) else value
        return DEFAULT_SETTINGS[name] if value is None else value

    names = ("guidance_scale", "temperature", "top_k", "top_p")
    grids = [(height, width) for height, width in grids if height > 0]
    return [
        replace(step, grid=grids[index], **{name: setting(name, index) for name in names})
        for index in range(scale + 1, len(grids))
    ]


def unconditional_messages(conversation: list[dict[str, Any]], text: str = "") -> list[dict[str, Any]]:
    """
    The same messages with the same images, without the user's text: as training drops it (§3.2). `text` then ends the
    last user message.
    """
    messages = []
    for message in conversation:
        if message["role"] == "user":
            parts = [] if isinstance(message["content"], str) else message["content"]
            message = {**message, "content": [part for part in parts if part["type"] != "text"]}
        messages.append(message)
    last = next((message for message in reversed(messages) if message["role"] == "user"), None)
    if text and last is None:
        raise ValueError("`negative_prompt` needs a user message to stand in, and `messages` has none")
    if text:
        last["content"].append(_text_part(text))
    return messages


def _unpad(inputs: Any) -> list[torch.LongTensor]:
    """The rows of `input_ids`, each without its padding."""
    return [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _num_scales(num_codes: int, grids: Sequence[tuple[int, int]]) -> int:
    """How many scales of a schedule `num_codes` codes are."""
    cells = np.cumsum([height * width for height, width in grids])
    return int(np.searchsorted(cells, num_codes)) + 1


__all__ = ["NextFlowDrawingPrompt", "NextFlowPipeline", "unconditional_messages"]
