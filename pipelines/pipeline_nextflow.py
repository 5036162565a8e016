"""Prompts, source images and messages in, images out (§2): the lifecycle of one call.

The work is done by the components, which meet here through data alone: tokens, `image_grids`, `image_codes`, pixels.
They are annotated with transformers' base classes, as an island imports no other. diffusers wants exact classes of its
own models only (`from_pipe` drops others); transformers' it checks with `isinstance`, so nothing is lost.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .chat_nextflow import NextFlowConversationMixin
from .diffusion_decoder_nextflow import NextFlowDiffusionDecoder
from .helpers_nextflow import (
    SharedComponentsMixin,
    check_fingerprint,
    exclusive,
    exclusively,
    generator_per_image,
    one_per_prompt,
    stack_equal,
)
from .inpainting_nextflow import given_images, source_image, with_prefix
from .lora_nextflow import NextFlowLoraLoaderMixin
from .outputs_nextflow import NextFlowPipelineOutput
from .pipeline_nextflow_call import Image, NextFlowCall, PerScale, build_messages, has_user_image
from .pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
from .preview_nextflow import NextFlowPreview
from .prompts_nextflow import DEFAULT_SETTINGS, NextFlowImageBatch, NextFlowImagePrompt, NextFlowStepsMixin, num_cells


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

        >>> # Draw the left half again
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


class NextFlowPipeline(
    NextFlowConversationMixin,
    NextFlowStepsMixin,
    NextFlowLoraLoaderMixin,
    SharedComponentsMixin,
    DiffusionPipeline,
):
    r"""
    Text-to-image, editing of one or several images, thinking before drawing, and conversations of text and images.

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
        self._guidance_scale: PerScale = DEFAULT_SETTINGS["guidance_scale"]
        self._image_guidance_scale: PerScale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._current = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("transformer", "vision_tokenizer", "processor", "diffusion_decoder"):
            self._is_checked = False

    def register_modules(self, **components: Any) -> None:
        super().register_modules(**components)
        self.check_components()

    def check_components(self) -> None:
        """Raises `ValueError` where the components do not know the same codes and tokens. What is None is left out."""
        if self.diffusion_decoder is not None and self.vision_tokenizer is not None:
            self.diffusion_decoder.check_codes(self.vision_tokenizer)
        if self.transformer is not None:
            self._check_transformer(self.transformer.config)
        self._is_checked = True

    def _check_transformer(self, config: PreTrainedConfig) -> None:
        if self.vision_tokenizer is not None:
            codes = self.vision_tokenizer.config.codebook_size
            if codes != config.codebook_size:
                raise ValueError(f"the vision tokenizer has {codes} codes, the transformer {config.codebook_size}")
            check_fingerprint("transformer", config.vision_tokenizer_fingerprint, self.vision_tokenizer)
        if self.processor is not None:
            self._check_vocabulary(config)

    def _check_vocabulary(self, config: PreTrainedConfig) -> None:
        names = ("boi_token_id", "eoi_token_id", "image_token_id")
        found, expected = ({name: getattr(one, name) for name in names} for one in (self.processor, config))
        if found != expected:
            raise ValueError(f"the processor's tokens are {found}, the transformer's {expected}")
        if len(self.processor.tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.processor.tokenizer)} tokens, the transformer {config.vocab_size}: "
                "resize its embeddings"
            )
        if self.processor.max_scales > config.max_scales:
            raise ValueError(
                f"the processor's images have up to {self.processor.max_scales} scales, the transformer's "
                f"{config.max_scales} (`max_scales`)"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's, or the vision tokenizer's where that is all there is. Components may differ in theirs."""
        return (self.vision_tokenizer if self.transformer is None else self.transformer).dtype

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
    def image_guidance_scale(self) -> PerScale:
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return _guides(self._guidance_scale) or _guides(self._image_guidance_scale)

    @property
    def num_timesteps(self) -> int:
        """Scales that the call draws; images that differ in schedule are drawn one after the other."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """
        Set `pipe._interrupt = True` in a callback to stop there: the images are previews of what was drawn. Set while
        the diffusion decoder draws, it ends that: the images are as far as they have come.
        """
        return self._interrupt

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
        image_codes: torch.LongTensor | None = None,
        latents: torch.LongTensor | None = None,
        image_grids: torch.LongTensor | None = None,
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
    ) -> NextFlowPipelineOutput | tuple:
        r"""
        Draw images. Settings left out come from the transformer's generation config (`guidance_scale`,
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
                Strength of guidance, also per scale. 1 is none, and costs no unconditional pass. With
                `image_guidance_scale` it is that of the text alone.
            guidance_schedule (`str`, *optional*): `"constant"`, or `"linear"`: from 1 at the first scale to the value.
            image_guidance_scale (`float` or `list[float]`, *optional*):
                Strength of guidance towards the images that the user shows, also per scale: the more, the closer an
                edit stays to them. Anything but 1 costs a second unconditional pass, without text and images
                (InstructPix2Pix).
            temperature (`float` or `list[float]`, *optional*): 0 takes the best code.
            top_k (`int` or `list[int]`, *optional*): Codes to sample from; 0 is all.
            top_p (`float` or `list[float]`, *optional*): Probability mass to sample from.
            num_scales (`int`, *optional*):
                Draw only the first so many scales: a preview at full size, of which `image_codes` and `image_grids`
                have what was drawn.
            num_inference_steps, latents (*optional*):
                diffusers' names for `num_scales` and `image_codes`: steps are scales, and what is decoded is codes.
            image_codes, image_grids (`torch.LongTensor`, *optional*):
                Codes and schedules of an earlier result or of [`~NextFlowPipeline.encode_images`], for all images, one
                a prompt, or one an image; `keep_scales` and `mask_image` say what is kept of them. Without a size, a
                whole image says its own; a preview needs the size of its call. With neither `prompt` nor `messages`
                they are decoded.
            keep_scales (`int`, *optional*):
                Keep the first so many scales of `image_codes`, else of the image that says the size (the first of
                `image`, the last in `messages`), and redraw the others: variations with one layout. By default all
                that are given or, with `mask_image`, none.
            mask_image (image or `list` of images, *optional*):
                White where that image is drawn again, one for all or one a prompt. Elsewhere its codes stay. The
                unchanged part is the image as the vision tokenizer reconstructs it.
            mask_coverage (`float`, *optional*, defaults to 0.6):
                Cells of coarse scales reach beyond the mask: a cell is redrawn where at least this share of what it
                reaches lies inside. At 1 no code outside changes anything, and what is drawn has to fit all coarse
                scales that are there; less draws more freely, and shifts shades around the mask.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one for each image. Each image draws from a generator of its own, seeded with one number of the
                given one: the first image of a batch with a single generator is the one it would be alone. In float32
                an image with a generator to itself is the same in any batch. In bfloat16 and float16 the last bits of
                the logits depend on the shapes of the batch, and a code changes where two are as close as that: images
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
                For its noise, one or one for each image. By default each image goes on with its own of `generator`.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"codes"` (also `"latent"`, as diffusers calls it): no decoding.
            return_dict (`bool`, *optional*, defaults to `True`): Else the same as a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each scale as `callback(pipe, step, scale, callback_kwargs)`: `step` counts all scales of
                the call (up to `num_timesteps`), `scale` those of the images that are drawn together. It may set
                `pipe._interrupt`, or `pipe._guidance_scale` for the scales to come: a number for all or a list with an
                entry for each scale of the schedule (without effect where the call began without guidance), and
                `pipe._image_guidance_scale` likewise. Codes that it returns are those that the next scale is drawn
                from; what was drawn from the scales before stays. A preview is
                `pipe.decode_codes(image_codes.flatten(), image_grids, num_scales=scale + 1)`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                `"latents"`: codes so far (images, codes), also as `"image_codes"`; `"image_grids"`: the schedules
                (images, max_scales, 2), which are for reading.
            think (`bool`, *optional*, defaults to `False`):
                Let the model write before each image, reasoning and then the prompt that it arrives at, and draw with
                that in view. Text is sampled as the transformer's generation config says. The unconditional prompt of
                guidance is the one without thinking.
            max_new_tokens (`int`, *optional*):
                With `think`: where an image that is not yet begun is begun, with a warning.

        Examples:

        Returns:
            [`NextFlowPipelineOutput`] or `tuple`: images, their codes and their schedules.
        """
        call = NextFlowCall(**{name: value for name, value in locals().items() if name != "self"})
        drawing = self._prepare(call)
        for _ in self._draw(call, drawing):
            pass
        images = self._decode(call, drawing)
        self.maybe_free_model_hooks()
        whole = [drawing.image_grids([index], drawing.count_drawn(index)) for index in range(len(drawing.prompts))]
        output = NextFlowPipelineOutput(
            images=images,
            image_codes=torch.cat(drawing.image_codes),
            image_grids=torch.cat(whole).to(drawing.image_codes[0].device),
            thoughts=drawing.thoughts,
            final_prompts=drawing.final_prompts,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def preview(self, *args: Any, **kwargs: Any) -> Iterator[NextFlowPreview]:
        """
        Watch images grow: an iterator over the scales, each drawn and decoded when it is asked for.

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
        bound = inspect.signature(NextFlowPipeline.__call__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        call = NextFlowCall(**{name: value for name, value in bound.arguments.items() if name != "self"})
        if call.output_type == "codes":
            raise ValueError("`output_type` is 'codes', expected 'pil', 'np' or 'pt': a preview is an image")
        with exclusive(self):
            return self._previews(call, self._prepare(call))

    # ---- the steps of a call

    def _begin(self, work: Any = None) -> None:
        """What the pipeline is at from now on: nobody has interrupted it, and what went on before cannot go on."""
        if not self._is_checked:  # a component was replaced
            self.check_components()
        self._interrupt = False
        self._current = work

    def _prepare(self, call: NextFlowCall) -> NextFlowImageBatch:
        # 1. Check inputs
        call.check(self._callback_tensor_inputs)
        self.check_thinking(call.think, call.max_new_tokens)
        if call.decoder == "diffusion":
            self.diffusion_decoder_pipeline.check_settings(**call.decoder_settings)

        # 2. How to draw
        settings = {name: getattr(call, name) for name in DEFAULT_SETTINGS}
        settings = self.get_image_settings(**settings)
        self._guidance_scale = settings["guidance_scale"]
        self._image_guidance_scale = settings["image_guidance_scale"]

        # 3. What to draw
        prompts = self._given_codes(call) if call.only_decodes else self._encode(call)
        settings["image_guidance_scale"] = self._image_guidance_scale
        generators = generator_per_image(call.generator, len(prompts))
        thoughts = final_prompts = None
        if call.think:
            self._begin()
            prompts, thoughts, final_prompts = self.think_first(
                prompts, max_new_tokens=call.max_new_tokens, generators=generators
            )
        drawing = NextFlowImageBatch(
            prompts,
            settings,
            num_scales=call.num_scales,
            generators=generators,
            thoughts=thoughts,
            final_prompts=final_prompts,
        )
        self._begin(drawing)
        if call.decoder == "diffusion":
            drawing.captions = self._captions(call, len(prompts))
            drawing.noise_generators = drawing.generators
            if call.decoder_generator is not None:
                drawing.noise_generators = generator_per_image(call.decoder_generator, len(prompts))
        self._num_timesteps = sum(
            drawing.count_scales(members[0]) for members in drawing.groups if not drawing.are_given(members)
        )
        return drawing

    def _captions(self, call: NextFlowCall, num_images: int) -> list[str] | None:
        """What the diffusion decoder reads of each image. An instruction does not say what is to be seen."""
        caption = call.decoder_prompt
        if caption is None and call.image is None and self.diffusion_decoder_pipeline.has_text_encoder:
            caption = call.prompt
        if caption is None:
            return None
        captions = one_per_prompt("decoder_prompt", caption, num_images // call.num_images_per_prompt)
        return [caption for caption in captions for _ in range(call.num_images_per_prompt)]

    def _given_images(self, call: NextFlowCall, num_prompts: int, repeats: int) -> list[tuple]:
        codebook_size = self.transformer.config.codebook_size
        return given_images(call.image_codes, call.image_grids, num_prompts, repeats, codebook_size=codebook_size)

    def _given_codes(self, call: NextFlowCall) -> list[NextFlowImagePrompt]:
        """Nothing to draw from: images that are only decoded."""
        images = self._given_images(call, len(call.image_grids), 1)
        nothing = call.image_grids.new_zeros(0)
        return [NextFlowImagePrompt(nothing, grids[None], nothing, prefix_codes=codes) for codes, grids in images]

    def _encode(self, call: NextFlowCall) -> list[NextFlowImagePrompt]:
        """The prompt of every image: tokens of the conversations, codes of the images in them, what is kept."""
        messages = build_messages(call.prompt, call.image) if call.messages is None else call.messages
        conversations, _ = self.processor.as_conversations(messages)
        if call.image_guidance_scale is None and not all(map(has_user_image, conversations)):
            self._image_guidance_scale = 1.0  # the model's own applies where there are images
        if _guides(self._image_guidance_scale) and not all(map(has_user_image, conversations)):
            raise ValueError(
                f"`image_guidance_scale` is {self._image_guidance_scale}, which guides towards the user's images, but "
                f"{sum(not has_user_image(one) for one in conversations)} of {len(conversations)} prompts have none"
            )
        texts = one_per_prompt("negative_prompt", call.negative_prompt or "", len(conversations))
        unconditional = {}
        if self.do_classifier_free_guidance:
            unconditional["negative_conversations"] = [
                self.processor.unconditional_messages(one, text)
                for one, text in zip(conversations, texts, strict=True)
            ]
        if _guides(self._image_guidance_scale):
            unconditional["imageless_conversations"] = [
                self.processor.unconditional_messages(one, text, keep_images=False)
                for one, text in zip(conversations, texts, strict=True)
            ]
        prompts = self.encode_messages(
            conversations,
            **unconditional,
            keep_first_size=call.messages is None and not call.size,
            **call.size,
            **({} if call.resolution is None else {"resolution": call.resolution}),
            **({"enable_thinking": True} if call.think else {}),
        )
        prompts = [one for one in prompts for _ in range(call.num_images_per_prompt)]
        if call.image_codes is None and call.keep_scales is None and call.mask_image is None:
            return prompts
        return self._keep(call, prompts)

    def _keep(self, call: NextFlowCall, prompts: list[NextFlowImagePrompt]) -> list[NextFlowImagePrompt]:
        """The prompts, with what the call keeps of the images that it redraws."""
        repeats = call.num_images_per_prompt
        num_prompts = len(prompts) // repeats
        if call.image_codes is not None:
            images = self._given_images(call, num_prompts, repeats)
        else:
            index = 0 if call.messages is None else -1
            images = [source_image(prompt, index) for prompt in prompts]
        masks = [None] * len(prompts)
        if call.mask_image is not None:
            masks = one_per_prompt("mask_image", _unbatched(call.mask_image), num_prompts)
            masks = [self._load_mask(mask) for mask in masks for _ in range(repeats)]
        prompts = [
            with_prefix(
                prompt,
                image,
                size_is_given=bool(call.size) or call.resolution is not None,
                keep_scales=call.keep_scales,
                mask=mask,
                coverage=call.mask_coverage,
                footprint=self._footprint,
            )
            for prompt, image, mask in zip(prompts, images, masks, strict=True)
        ]
        schedule = self.processor.image_processor.schedule
        for prompt, mask in zip(prompts, masks, strict=True):
            if mask is not None:
                bucket = schedule.nearest_bucket(mask.height, mask.width)
                if schedule.grids(bucket, len(prompt.grids)) != prompt.grids:
                    raise ValueError(
                        f"`mask_image` is {mask.height} x {mask.width} pixels (height x width), expected the shape of "
                        f"the image, whose last grid is {prompt.grids[-1]}"
                    )
        return prompts

    def _load_mask(self, mask: Image) -> PIL.Image.Image:
        pixels = self.processor.image_processor.process_image(mask, do_convert_rgb=True)  # (3, height, width), 8 bits
        return PIL.Image.fromarray(np.asarray(pixels).transpose(1, 2, 0)).convert("L")

    def _footprint(self, grid: tuple[int, int], last_grid: tuple[int, int]) -> torch.Tensor:
        """What each cell of a grid reaches on the last one: (cells, height, width), weights of the enlargement."""
        cells = torch.eye(grid[0] * grid[1])[None]
        return self.vision_tokenizer.quantizer.upsample(cells, grid, last_grid)[0]

    @torch.no_grad()
    def _draw(self, call: NextFlowCall, drawing: NextFlowImageBatch) -> Iterator[tuple[list[int], Any]]:
        """Draw the images of one schedule together, and yield them with the transformer's scale after each."""
        first_step = 0
        with self.progress_bar(total=self._num_timesteps) as progress:
            for members in drawing.groups:
                count = drawing.count_scales(members[0])
                prompts = [drawing.prompts[index] for index in members]
                if drawing.are_given(members):
                    for index, prompt in zip(members, prompts, strict=True):
                        cells = num_cells(prompt.grids[:count])
                        drawing.image_codes[index] = prompt.prefix_codes[:cells].to(self._execution_device)
                    continue
                self._guidance_scale = drawing.settings["guidance_scale"]
                self._image_guidance_scale = drawing.settings["image_guidance_scale"]
                generators = drawing.generators
                scales = self.stream_codes(
                    prompts,
                    generators=None if generators is None else [generators[index] for index in members],
                    num_scales=count,
                    **drawing.settings,
                )
                for scale in scales:
                    progress.set_postfix_str(f"{scale.step.grid[0]}x{scale.step.grid[1]}", refresh=False)
                    progress.update()
                    guidance = self._guidance_scale, self._image_guidance_scale
                    if call.callback_on_step_end is not None:
                        self._call_back(call, first_step + scale.index, scale, drawing.image_grids(members))
                    for index, codes in zip(members, scale.image_codes, strict=True):
                        drawing.image_codes[index] = codes
                    yield members, scale
                    if self.interrupt:  # the transformer then checks what it has sampled, and ends
                        del scale.plan[scale.index + 1 :]
                        continue
                    if guidance != (self._guidance_scale, self._image_guidance_scale):
                        self._change_guidance(scale)
                first_step += count

    def _call_back(self, call: NextFlowCall, step: int, scale: Any, image_grids: torch.LongTensor) -> None:
        """Let the callback see the codes so far, and replace them by those that it returns."""
        codes = scale.image_codes
        tensors = {"latents": codes.clone(), "image_codes": codes.clone(), "image_grids": image_grids}
        tensors = {name: tensors[name] for name in call.callback_on_step_end_tensor_inputs}
        returned = call.callback_on_step_end(self, step, scale.index, tensors) or {}
        for name in ("latents", "image_codes"):
            changed = returned.get(name)
            if changed is not None and not torch.equal(changed.to(codes.device), codes):
                scale.image_codes = changed.to(codes.device)

    def _change_guidance(self, scale: Any) -> None:
        """Draw the scales to come with the guidance that the pipeline now has."""

        def at(value: PerScale, index: int) -> float:
            value = value[index] if isinstance(value, Sequence) else value
            return 1.0 if value is None else value

        for index in range(scale.index + 1, len(scale.plan)):
            scale.plan[index] = replace(
                scale.plan[index],
                guidance_scale=at(self._guidance_scale, index),
                image_guidance_scale=at(self._image_guidance_scale, index),
            )

    def _decode(self, call: NextFlowCall, drawing: NextFlowImageBatch) -> list | np.ndarray | torch.Tensor | None:
        """The images of the codes, by the decoder that the call names; `None` for `output_type="codes"`."""
        if call.output_type == "codes":
            return None
        images = [None] * len(drawing.prompts)
        was_interrupted = self.interrupt

        def pass_on(decoder: NextFlowDiffusionDecoderPipeline, *_: Any) -> dict:
            decoder._interrupt = self.interrupt and not was_interrupted
            return {}

        for members in drawing.groups:
            codes = torch.cat([drawing.image_codes[index] for index in members])
            options = {"num_scales": drawing.count_drawn(members[0]), "output_type": call.output_type}
            if call.decoder == "diffusion":
                for name, each in (("prompt", drawing.captions), ("generator", drawing.noise_generators)):
                    options[name] = None if each is None else [each[index] for index in members]
                options = {**call.decoder_settings, **options, "callback_on_step_end": pass_on}
                decoded = self.diffusion_decoder_pipeline(codes, drawing.image_grids(members), **options).images
            else:
                decoded = self.decode_codes(codes, drawing.image_grids(members), **options)
            for index, image in zip(members, decoded, strict=True):
                images[index] = image
        return stack_equal(images)

    @torch.no_grad()
    def _previews(self, call: NextFlowCall, drawing: NextFlowImageBatch) -> Iterator[NextFlowPreview]:
        def preview(members: list[int], count: int, images: Any) -> NextFlowPreview:
            codes = [drawing.image_codes[index] for index in members]
            return NextFlowPreview(
                images=stack_equal(list(images)),
                indices=members,
                scale=count,
                num_scales=len(drawing.prompts[members[0]].grids),
                grid=drawing.prompts[members[0]].grids[count - 1],
                image_codes=torch.cat(codes),
                image_grids=drawing.image_grids(members, count).to(codes[0].device),
            )

        scales = self._draw(call, drawing)
        try:
            # Not locked from one preview to the next, which may be asked for from another thread.
            while True:
                with exclusive(self):
                    if self._current is not drawing:
                        raise RuntimeError("another call of this pipeline began before the last preview was asked for")
                    members, scale = next(scales, (None, None))
                    if scale is None:
                        break
                    grids, count = drawing.image_grids(members), scale.index + 1
                    codes = scale.image_codes.flatten()
                    images = self.decode_codes(codes, grids, num_scales=count, output_type=call.output_type)
                yield preview(members, count, images)
            if call.decoder == "diffusion":
                images = self._decode(call, drawing)
                for members in drawing.groups:
                    yield preview(members, drawing.count_drawn(members[0]), [images[index] for index in members])
        finally:
            self.maybe_free_model_hooks()


def _unbatched(images: Any) -> Any:
    """A batch of arrays as a list."""
    return list(images) if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4 else images


def _guides(scale: PerScale) -> bool:
    """Whether a guidance scale asks for an unconditional pass anywhere."""
    return any(value is not None and value != 1 for value in (scale if isinstance(scale, Sequence) else [scale]))


__all__ = ["NextFlowImagePrompt", "NextFlowPipeline"]
