"""Prompts, source images and messages in, images out (§2): the lifecycle of one call.

The work is done by the components, which meet here through data alone: tokens, `image_grids`, `image_codes`, pixels.
Their annotations are transformers' base classes, because this package imports neither modeling nor processing.
diffusers checks transformers' classes with `isinstance`, so nothing is lost; of its own it wants the exact class.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.doc_utils import replace_example_docstring
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .chat_nextflow import NextFlowConversationMixin
from .diffusion_decoder_nextflow import NextFlowDiffusionDecoder
from .helpers_nextflow import (
    check_numbers,
    exclusive,
    exclusively,
    given,
    loaded,
    one_of,
    stack_equal,
)
from .inpainting_nextflow import given_images, keep_codes
from .lora_nextflow import NextFlowLoraLoaderMixin
from .outputs_nextflow import NextFlowPipelineOutput, NextFlowPreview, make_preview
from .pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
from .prompts_nextflow import (
    Image,
    NextFlowImagePrompt,
    PerScale,
    build_messages,
    call_back,
    check_prompts,
    collate_prompts,
    generator_per_image,
    join_codes,
    one_per_prompt,
)


CODES = ("codes", "latent")  # output without decoding
OUTPUT_TYPES = ("pil", "np", "pt", *CODES)
DECODERS = ("vq", "diffusion")
GUIDANCE = ("guidance_scale", "image_guidance_scale")  # what a callback may change

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from nextflow_hf import NextFlowPipeline
        >>> from nextflow_hf.hub_cards import shapes_model_path

        >>> pipe = NextFlowPipeline.from_pretrained(shapes_model_path())
        >>> output = pipe("a red circle", generator=torch.Generator().manual_seed(0))
        >>> image = output.images[0]

        >>> # Change an image; say how much of it stays
        >>> edited = pipe("make the circle blue", image=image, image_guidance_scale=1.5).images[0]

        >>> # Four images with the layout of the first: its first three scales, and others after them
        >>> codes = {"image_codes": output.image_codes, "image_grids": output.image_grids}
        >>> variations = pipe("a red circle", **codes, keep_scales=3, num_images_per_prompt=4).images

        >>> # Sample the left half again
        >>> mask = torch.zeros(image.height, image.width)
        >>> mask[:, : image.width // 2] = 1
        >>> half = pipe("a green square", **codes, mask_image=mask).images[0]

        >>> # Think first
        >>> output = pipe("a circle in the color of grass", think=True)
        >>> output.thoughts[0], output.final_prompts[0], output.images[0]

        >>> # In-context learning: what the pairs show is done to the last image
        >>> pairs, content = [(image, edited)], []
        >>> for before, after in pairs:
        ...     content += [{"type": "image", "image": before}, {"type": "text", "text": "is to"}]
        ...     content += [{"type": "image", "image": after}, {"type": "text", "text": "as"}]
        >>> content += [{"type": "image", "image": image}, {"type": "text", "text": "is to"}]
        >>> answer = pipe(messages=[{"role": "user", "content": content}]).images[0]

        >>> # A fast preview, finished where it is liked
        >>> draft = pipe("a red circle", num_scales=4, generator=torch.Generator().manual_seed(1))
        >>> whole = pipe("a red circle", image_codes=draft.image_codes, image_grids=draft.image_grids).images[0]
        ```
"""


class NextFlowPipeline(NextFlowLoraLoaderMixin, NextFlowConversationMixin):
    r"""
    Text-to-image, editing of one or several images, thinking before an image, and conversations of text and images.

    Args:
        transformer ([`NextFlowForCausalLM`]): Samples codes, scale by scale.
        vision_tokenizer ([`NextFlowVisionTokenizer`]): Images to codes and back. Also reachable as `vae`.
        processor ([`NextFlowProcessor`]): Messages and images to model inputs, pixels to images.
        diffusion_decoder ([`NextFlowDiffusionDecoder`], *optional*): Makes the pixels for `decoder="diffusion"`.
        decoder_scheduler, decoder_vae, decoder_text_encoder, decoder_tokenizer, decoder_text_encoder_2,
        decoder_tokenizer_2, decoder_text_encoder_3, decoder_tokenizer_3 (*optional*):
            Its parts, as in [`NextFlowDiffusionDecoderPipeline`].
    """

    # In the order in which a call first needs them.
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
    _callback_tensor_inputs = ["latents", "image_codes", "image_grids"]

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

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's, or the vision tokenizer's where that is all there is. Components may differ in theirs."""
        return (self.vision_tokenizer if self.transformer is None else self.transformer).dtype

    @property
    def vae(self) -> PreTrainedModel:
        """The vision tokenizer, under the name that diffusers' tools look for."""
        return self.vision_tokenizer

    def compile_sampling(self, **compile_options: Any) -> None:
        """
        Compile what samples images and what decodes them, on a CUDA device: the transformer's and the vision
        tokenizer's methods of this name. Options are the transformer's.
        """
        self.transformer.compile_sampling(**compile_options)
        self.vision_tokenizer.compile_sampling()

    @property
    def diffusion_decoder_pipeline(self) -> NextFlowDiffusionDecoderPipeline:
        """The diffusion decoder as a pipeline of its own, of the same components. Raises `ValueError` without one."""
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
        # Anew each time, as components may have been replaced; the weights are shared.
        pipeline = NextFlowDiffusionDecoderPipeline(
            self.diffusion_decoder,
            vision_tokenizer=self.vision_tokenizer,
            image_processor=self.processor.image_processor,
            **parts,
        )
        pipeline.set_progress_bar_config(**{**vars(self).get("_progress_bar_config", {}), "desc": "diffusion decoder"})
        return pipeline

    @torch.no_grad()
    @exclusively
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
        image_guidance_scale: PerScale | None = None,
        temperature: PerScale | None = None,
        top_k: PerScale | None = None,
        top_p: PerScale | None = None,
        num_scales: int | None = None,
        num_inference_steps: int | None = None,
        image_codes: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        keep_scales: int | None = None,
        mask_image: Image | list[Image] | None = None,
        mask_coverage: float = 0.6,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        think: bool = False,
        max_new_tokens: int | None = None,
        stream: bool = False,
    ) -> NextFlowPipelineOutput | tuple | Iterator[NextFlowPreview]:
        r"""
        Sample images. Settings left out come from the transformer's generation config (`guidance_scale`,
        `image_temperature`, ...).

        Args:
            prompt (`str` or `list[str]`, *optional*): What to show or, with `image`, how to change it.
            image (image, `list` or `list[list]` of images, *optional*):
                The images to edit: PIL images, paths, arrays or tensors. For a single prompt one or several; for a
                list of prompts one for all, or a list with an image, a list of images or `None` for each prompt.
            messages (`list[dict]` or `list[list[dict]]`, *optional*):
                One or several conversations, instead of `prompt`: the image is the next answer.
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
                Strength of guidance, also per scale. 1 is none, and costs no unconditional pass. With
                `image_guidance_scale` it is that of the text alone.
            guidance_schedule (`str`, *optional*): `"constant"`; `"linear"`: from 1 at the first scale to the value; or
                `"early"`: none at the last two scales, which take most of the time.
            image_guidance_scale (`float` or `list[float]`, *optional*):
                Strength of guidance towards the images that the user shows, also per scale: the more, the closer an
                edit stays to them. Anything but 1 costs a second unconditional pass, without text and images
                (InstructPix2Pix).
            temperature (`float` or `list[float]`, *optional*): 0 takes the best code.
            top_k (`int` or `list[int]`, *optional*): Codes to sample from; 0 is all.
            top_p (`float` or `list[float]`, *optional*): Probability mass to sample from.
            num_scales (`int`, *optional*):
                Sample only the first so many scales: a preview at full size, of which `image_codes` and `image_grids`
                have what was sampled.
            num_inference_steps, latents (*optional*):
                diffusers' names for `num_scales` and `image_codes`: steps are scales, and what is decoded is codes.
            image_codes, image_grids (`torch.Tensor`, *optional*):
                Codes and schedules of an earlier result or of [`~NextFlowPipeline.encode_images`], for all images, one
                a prompt, or one an image; `keep_scales` and `mask_image` say what is kept of them. Without a size, a
                whole image says its own; a preview needs the size of its call. With neither `prompt` nor `messages`
                they are decoded.
            keep_scales (`int`, *optional*):
                Keep the first so many scales of `image_codes`, else of the image that says the size (the first of
                `image`, the last in `messages`), and sample the others: variations with one layout. By default all
                that are given or, with `mask_image`, none.
            mask_image (image or `list` of images, *optional*):
                White where that image is sampled again, one for all or one a prompt. Elsewhere its codes stay. The
                unchanged part is the image as the vision tokenizer reconstructs it.
            mask_coverage (`float`, *optional*, defaults to 0.6):
                Cells of coarse scales reach beyond the mask: a cell is sampled again where at least this share of what
                it reaches lies inside. At 1 no code outside changes anything, and the new part has to fit all coarse
                scales that are there; less is freer, and shifts shades around the mask.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one for each image. Each image has a generator of its own, seeded with one number of the
                given one: the first image of a batch with a single generator is the one it would be alone. In float32
                the codes of an image with a generator to itself are the same in any batch, and its pixels but for the
                rounding of the decoder (at most one of 255 levels). In bfloat16 and float16 the last bits of the
                logits depend on the shapes of the batch, and a code changes where two are as close as that: images
                are nearly always the same, which `benchmarks/batch_dependence.py` measures. With generators, the
                global random state is neither read nor changed.
            decoder (`str`, *optional*, defaults to `"vq"`):
                What makes pixels of the codes: `"vq"`, the vision tokenizer, or `"diffusion"`, the diffusion decoder:
                sharper, slower, and free to change fine structure.
            decoder_prompt (`str` or `list[str]`, *optional*):
                Caption for the diffusion decoder, for all images or each prompt's. By default `prompt`, and nothing
                where that is an instruction: with `image` or `messages`.
            decoder_num_inference_steps, decoder_guidance_scale, decoder_strength, decoder_tile_size (*optional*):
                For the diffusion decoder, as in [`NextFlowDiffusionDecoderPipeline`], with its defaults.
            decoder_generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                For its noise, one or one for each image. By default each image continues with its own of `generator`.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"codes"` (also `"latent"`, as diffusers calls it): no decoding.
            return_dict (`bool`, *optional*, defaults to `True`): Else the same as a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each scale as `callback(pipe, step, scale, callback_kwargs)`: `step` counts all scales of
                the call (up to `num_timesteps`), `scale` those of the images that are sampled together. It may set
                `pipe._interrupt`, or `pipe._guidance_scale` for the scales to come: a number for all or a list with an
                entry for each scale of the schedule (an error where no scale to come had any: its prompts are gone),
                and `pipe._image_guidance_scale` likewise. Codes that it returns are those that the next scale is
                sampled from; what was sampled from the scales before stays. A preview is
                `pipe.decode_codes(image_codes.flatten(), image_grids, num_scales=scale + 1)`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                `"latents"`: codes so far (images, codes), also as `"image_codes"`; `"image_grids"`: the schedules
                (images, max_scales, 2), which are for reading.
            think (`bool`, *optional*, defaults to `False`):
                Let the model write before each image, reasoning and then the prompt that it arrives at, and sample
                the image with that in view. Text is sampled as the transformer's generation config says. The
                unconditional prompt of guidance is the one without thinking.
            max_new_tokens (`int`, *optional*):
                With `think`: where an image that is not yet begun is begun, with a warning.

        Examples:

        Returns:
            [`NextFlowPipelineOutput`] or `tuple`: images, their codes and their schedules.
        """
        # 1. Check inputs
        image_codes = one_of(image_codes=image_codes, latents=latents)
        num_steps = one_of(num_scales=num_scales, num_inference_steps=num_inference_steps)
        size = given(height=height, width=width, aspect_ratio=aspect_ratio)
        size |= given(resolution=None if resolution is None else self.known_resolution(resolution, height))
        kept = given(image_codes=image_codes, image_grids=image_grids, keep_scales=keep_scales, mask_image=mask_image)
        decoding = given(num_inference_steps=decoder_num_inference_steps, guidance_scale=decoder_guidance_scale)
        decoding |= given(strength=decoder_strength, tile_size=decoder_tile_size)
        decoding |= given(prompt=decoder_prompt, generator=decoder_generator)
        tensor_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        check_numbers(num_scales=num_scales, num_inference_steps=num_inference_steps, height=height, width=width)
        check_numbers(num_images_per_prompt=num_images_per_prompt)
        self.check_outputs(output_type, decoder, decoding, tensor_inputs, stream)
        if max_new_tokens is not None:
            self.check_thinking(think, max_new_tokens)
        check_prompts(prompt, image, messages, negative_prompt, image_codes, image_grids)

        # 2. Settings of sampling, which callbacks see and may change
        conversations = build_messages([] if prompt is None else prompt, image)
        if messages is not None:
            conversations, _ = self.processor.as_conversations(messages)
        names = "guidance_scale", "guidance_schedule", "image_guidance_scale", "temperature", "top_k", "top_p"
        values = guidance_scale, guidance_schedule, image_guidance_scale, temperature, top_k, top_p
        settings: dict[str, Any] = dict(zip(names, values, strict=True))
        settings = self.prepare_settings(conversations, settings) if conversations else settings

        # 3. Encode prompts; without any, codes are only decoded
        if not conversations:
            others = size | given(image=image, think=think or None, keep_scales=keep_scales, mask_image=mask_image)
            prompts = self.given_prompts(image_codes, image_grids, num_images_per_prompt, others)
        else:
            options = {"think": think, "keep_first_size": messages is None, **size}
            prompts = self.encode_prompts(conversations, negative_prompt, settings, **options)
            prompts = [copy.copy(one) for one in prompts for _ in range(num_images_per_prompt)]  # own codes each
        if conversations and kept:
            source = 0 if messages is None else -1  # the image to keep codes of where none is given
            keep_codes(self, prompts, len(conversations), source, mask_coverage, size_is_given=bool(size), **kept)
        generators, thoughts, final_prompts = generator_per_image(generator, len(prompts)), None, None
        if think:
            prompts, thoughts, final_prompts = self.think_first(prompts, max_new_tokens, generators)

        # 4. Loop over scales, the images of one schedule together
        groups = self.prepare_images(prompts, num_steps, is_limit=num_inference_steps is not None)
        scales = self.sample_images(prompts, groups, settings, generators, callback_on_step_end, tensor_inputs)
        if decoder == "diffusion":
            counts = len(conversations) or len(prompts), len(prompts)
            decoding = self.prepare_decoding(decoding, prompt if image is None else None, generators, *counts)
        if stream:
            return self._previews(prompts, groups, scales, decoder, decoding, output_type)
        for _ in scales:
            pass

        # 5. Decode
        images = self.decode_images(prompts, groups, decoder, decoding, output_type)
        self.maybe_free_model_hooks()
        output = NextFlowPipelineOutput(images, *join_codes(prompts), thoughts, final_prompts)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def preview(self, *args: Any, **kwargs: Any) -> Iterator[NextFlowPreview]:
        """
        Watch images grow: an iterator over the scales, each sampled and decoded when it is asked for.

        The last preview is the whole image; with `decoder="diffusion"` one more follows, of that decoder. Images that
        differ in size follow each other. To cancel, ask for no more, or set `pipe._interrupt = True` from anywhere.

        Args:
            args, kwargs: As in the call, except `output_type="codes"` and `return_dict`.

        Examples:
            ```py
            >>> from diffusers.utils import export_to_gif
            >>> from nextflow_hf.pipelines import save_strip

            >>> previews = list(pipe.preview("a red circle"))
            >>> strip = save_strip(previews, "growing.png")
            >>> path = export_to_gif([preview.images[0] for preview in previews], "growing.gif", fps=3)
            ```
        """
        return self(*args, **kwargs, stream=True)

    # ---- 1. Check inputs

    def check_outputs(
        self, output_type: str, decoder: str, decoding: dict[str, Any], tensor_inputs: Sequence[str], stream: bool
    ) -> None:
        """Raises `ValueError` where what the call is to give does not fit together."""
        if output_type not in OUTPUT_TYPES or (stream and output_type in CODES):
            expected = "'pil', 'np' or 'pt': a preview is an image" if stream else f"one of {list(OUTPUT_TYPES)}"
            raise ValueError(f"`output_type` is {output_type!r}, expected {expected}")
        if output_type not in CODES and self.vision_tokenizer is None:
            raise ValueError(f"`output_type` is {output_type!r}, expected 'codes': `vision_tokenizer` is None")
        if unknown := [name for name in tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, expected some of {self._callback_tensor_inputs}"
            )
        if decoder not in DECODERS:
            raise ValueError(f"`decoder` is {decoder!r}, expected one of {list(DECODERS)}")
        if decoder == "vq" and decoding:
            names = [f"decoder_{name}" for name in decoding]
            raise ValueError(f"got {names} with `decoder='vq'`: they go with `decoder='diffusion'`")
        if decoder == "diffusion":
            if output_type in CODES:
                raise ValueError(f"`decoder='diffusion'` and `output_type={output_type!r}`: codes are not decoded")
            self.diffusion_decoder_pipeline.check_settings(**decoding)

    # ---- 3. Encode prompts

    def given_prompts(
        self, image_codes: Any, image_grids: Any, num_images_per_prompt: int, others: dict[str, Any]
    ) -> list[NextFlowImagePrompt]:
        """`image_codes` alone, which are only decoded: raises `ValueError` where `others` ask for sampling."""
        names = [*others, *(["num_images_per_prompt"] if num_images_per_prompt != 1 else [])]
        if names:
            raise ValueError(
                f"got {names} with `image_codes` and neither `prompt` nor `messages`: without them codes are only "
                "decoded"
            )
        codebook_size = self.vision_tokenizer.config.codebook_size  # there need not be a transformer
        images = given_images(image_codes, image_grids, len(image_grids), 1, codebook_size)
        nothing = image_grids.new_zeros(0)
        return [NextFlowImagePrompt(nothing, grids[None], nothing, prefix_codes=codes) for codes, grids in images]

    # ---- 4. Loop over scales

    @torch.no_grad()
    def sample_images(
        self,
        prompts: list[NextFlowImagePrompt],
        groups: list[list[int]],
        settings: dict[str, Any],
        generators: list[torch.Generator] | None,
        callback: Callable | None,
        tensor_inputs: Sequence[str],
    ) -> Iterator[tuple[list[int], Any]]:
        """
        Sample the images of each group together. Yields their indices and the transformer's scale after each one (once
        and `None` where all codes were given), and leaves the codes so far with the prompts.
        """
        first_step, pad_token_id = 0, self.processor.tokenizer.pad_token_id
        with self.progress_bar(total=self._num_timesteps) as progress:
            for members in groups:
                group = [prompts[index] for index in members]
                if group[0].codes is not None:  # all were given
                    yield members, None
                    continue
                # A callback changes the guidance of one group; the next begins with that of the call.
                self._guidance_scale, self._image_guidance_scale = (settings[name] for name in GUIDANCE)
                transformer, device = loaded(self.transformer), self._execution_device
                inputs: dict[str, Any] = collate_prompts(group, pad_token_id, device)
                inputs["generator"] = None if generators is None else [generators[index] for index in members]
                inputs |= {"num_scales": group[0].num_scales, **settings}
                for scale in transformer.stream_images(**inputs):
                    progress.set_postfix_str(f"{scale.step.grid[0]}x{scale.step.grid[1]}", refresh=False)
                    progress.update()
                    # A callback, or whoever reads the previews, may set other guidance before the next scale.
                    guidance = self._guidance_scale, self._image_guidance_scale
                    if callback is not None:
                        call_back(callback, self, first_step + scale.index, scale, group, tensor_inputs)
                    # Before the `yield`: a preview is made from the codes of its prompts.
                    for prompt, row in zip(group, scale.image_codes, strict=True):
                        prompt.codes, prompt.num_sampled = row, scale.index + 1
                    yield members, scale
                    if self._interrupt:  # the transformer then checks what it has sampled, and ends
                        del scale.plan[scale.index + 1 :]
                    elif guidance != (now := (self._guidance_scale, self._image_guidance_scale)):
                        # One that was left alone keeps its schedule.
                        changed = {name: new for name, old, new in zip(GUIDANCE, guidance, now) if new != old}
                        scale.change_guidance(**changed)
                first_step += group[0].num_scales or 0  # callbacks count steps through all groups

    # ---- 5. Decode

    def prepare_decoding(
        self, decoding: dict[str, Any], prompt: Any, generators: list | None, num_prompts: int, num_images: int
    ) -> dict[str, Any]:
        """Options of the diffusion decoder, with a caption and a generator for each image."""
        caption, generator = decoding.get("prompt"), decoding.get("generator")
        if caption is None and self.diffusion_decoder_pipeline.has_text_encoder:
            caption = prompt  # an instruction, of an edit, does not say what is to be seen
        if caption is not None:
            is_own = isinstance(caption, (list, tuple)) and len(caption) == num_images
            count = num_images if is_own else num_prompts
            caption = one_per_prompt("decoder_prompt", caption, count)
            caption = [one for one in caption for _ in range(num_images // count)]
        if generator is not None:
            generators = generator_per_image(generator, num_images)
        return {**decoding, "prompt": caption, "generator": generators}

    def decode_images(
        self,
        prompts: list[NextFlowImagePrompt],
        groups: list[list[int]],
        decoder: str,
        decoding: dict[str, Any],
        output_type: str,
    ) -> list | np.ndarray | torch.Tensor | None:
        """Images of the groups' codes so far, by the decoder that is named; `None` for `output_type="codes"`."""
        if output_type in CODES:
            return None
        images: dict[int, Any] = {}
        was_interrupted = self._interrupt

        # An interruption from before has shortened the codes already; one from now on stops the decoder.
        def pass_on(decoder: NextFlowDiffusionDecoderPipeline, *_: Any) -> dict:
            decoder._interrupt = self._interrupt and not was_interrupted
            return {}

        for members in groups:
            group = [prompts[index] for index in members]
            # Whole schedules: a preview is decoded on the last grid.
            codes, grids = join_codes(group)[0], torch.stack([prompt.image_grids[-1] for prompt in group])
            options: dict[str, Any] = {"num_scales": group[0].num_sampled, "output_type": output_type}
            if decoder == "diffusion":
                for name in ("prompt", "generator"):
                    options[name] = decoding[name] and [decoding[name][index] for index in members]
                options = {**decoding, **options, "callback_on_step_end": pass_on}
                decoded = self.diffusion_decoder_pipeline(codes, grids, **options).images
            else:
                decoded = self.decode_codes(codes, grids, **options)
            for index, image in zip(members, decoded, strict=True):
                images[index] = image
        return stack_equal([images[index] for index in sorted(images)])

    @torch.no_grad()
    def _previews(
        self,
        prompts: list[NextFlowImagePrompt],
        groups: list[list[int]],
        scales: Iterator[tuple[list[int], Any]],
        decoder: str,
        decoding: dict[str, Any],
        output_type: str,
    ) -> Iterator[NextFlowPreview]:
        """The images after every scale, sampled and decoded when they are asked for."""
        try:
            # Not locked from one preview to the next, which may be asked for from another thread.
            while True:
                with exclusive(self):
                    if self._current is not prompts:
                        raise RuntimeError("another call of this pipeline began before the last preview was asked for")
                    sampled = next(scales, None)
                    if sampled is None:
                        break
                    members, _ = sampled
                    images = self.decode_images(prompts, [members], "vq", {}, output_type)
                yield make_preview(prompts, members, images)
            if decoder == "diffusion":
                images = self.decode_images(prompts, groups, decoder, decoding, output_type)
                assert images is not None  # a preview has no codes as its output
                for members in groups:
                    yield make_preview(prompts, members, [images[index] for index in members])
        finally:
            self.maybe_free_model_hooks()


__all__ = ["NextFlowImagePrompt", "NextFlowPipeline"]
