"""Codes in, sharper pixels out (§2.3): the optional last step of [`NextFlowPipeline`], which can be used alone.

A denoiser samples the image anew under the condition of its codes, from noise or from what the vision tokenizer
decodes. It may change fine structure: off by default, and no choice for local edits or for identity.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.doc_utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import ImageProcessingMixin, PreTrainedModel, PreTrainedTokenizerBase

from .diffusion_decoder_nextflow import NextFlowDiffusionDecoder, decoder_condition, encode_captions
from .helpers_nextflow import NextFlowBasePipeline, exclusively, loaded, stack_equal
from .latents_nextflow import decode_latents, encode_latents, predict_in_tiles, vae_latent_channels, vae_scale_factor
from .prompts_nextflow import generator_per_image, group_equal, one_per_prompt


OUTPUT_TYPES = ("pil", "np", "pt", "latent")

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from nextflow_hf import NextFlowDiffusionDecoderPipeline

        >>> decoder = NextFlowDiffusionDecoderPipeline.from_pretrained("path/to/decoder")
        >>> sharper = decoder(image="photo.png", prompt="a red fox in the snow").images[0]

        >>> # behind a NextFlowPipeline whose repository has one
        >>> pipe("a red fox in the snow", decoder="diffusion", decoder_num_inference_steps=20)
        ```
"""


class NextFlowDiffusionDecoderPipeline(NextFlowBasePipeline, CogVideoXLoraLoaderMixin):
    r"""
    Samples the image of given codes with a diffusion model.

    Args:
        diffusion_decoder ([`NextFlowDiffusionDecoder`]): The denoiser and its projection of the condition.
        scheduler (`SchedulerMixin`):
            The denoiser's: a diffusion scheduler (`DDIMScheduler`, `EulerDiscreteScheduler`, ...) or
            `FlowMatchEulerDiscreteScheduler`.
        vision_tokenizer ([`NextFlowVisionTokenizer`]): Codes to condition, images to codes.
        image_processor ([`NextFlowImageProcessor`], *optional*): For a call with `image`.
        vae (`AutoencoderKL` or `AutoencoderKLQwenImage`, *optional*):
            The denoiser's. Without one it denoises pixels.
        text_encoder, text_encoder_2, text_encoder_3 (`PreTrainedModel`, *optional*):
            The denoiser's, as its own pipeline has them. Without them it gets no caption.
        tokenizer, tokenizer_2, tokenizer_3 (`PreTrainedTokenizerBase`, *optional*): Theirs.
    """

    # In the order in which a call first needs them.
    model_cpu_offload_seq = "vision_tokenizer->text_encoder->text_encoder_2->text_encoder_3->diffusion_decoder->vae"
    _optional_components = [
        "image_processor",
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ]
    _callback_tensor_inputs = ["latents"]
    _lora_loadable_modules = ["diffusion_decoder"]
    transformer_name = "diffusion_decoder"  # the prefix of its LoRA's keys

    diffusion_decoder: Any
    scheduler: Any
    image_processor: Any
    vae: Any
    _guidance_scale = 1.0

    def __init__(
        self,
        diffusion_decoder: NextFlowDiffusionDecoder,
        scheduler: SchedulerMixin,
        vision_tokenizer: PreTrainedModel,
        image_processor: ImageProcessingMixin | None = None,
        vae: AutoencoderKL | AutoencoderKLQwenImage | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        self.register_modules(
            diffusion_decoder=diffusion_decoder,
            scheduler=scheduler,
            vision_tokenizer=vision_tokenizer,
            image_processor=image_processor,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.pixel_processor = VaeImageProcessor(vae_scale_factor=1)

    def register_modules(self, **components: Any) -> None:
        """diffusers' method; raises `ValueError` where decoder and vision tokenizer do not know the same codes."""
        super().register_modules(**components)
        if self.diffusion_decoder is not None and self.vision_tokenizer is not None:
            self.diffusion_decoder.check_codes(self.vision_tokenizer)

    @property
    def guidance_scale(self) -> float:
        """Guidance by the codes and the caption, in the current call or the last one."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether there is guidance."""
        return self._guidance_scale != 1

    @property
    def pixels_per_cell(self) -> int:
        """Pixels of the output that a cell of the codes spans, along each axis."""
        return self.vision_tokenizer.config.patch_size * self.diffusion_decoder.config.upscale_factor

    @property
    def has_text_encoder(self) -> bool:
        """Whether captions can be read. Raises `ValueError` where only some of the text encoders are there."""
        suffixes = self.diffusion_decoder.family.text_encoders
        names = [f"{kind}{suffix}" for suffix in suffixes for kind in ("text_encoder", "tokenizer")]
        missing = [name for name in names if getattr(self, name) is None]
        if missing and len(missing) < len(names):
            raise ValueError(f"{missing} is missing of {names}, expected all of them or none")
        return not missing

    def check_components(self) -> None:
        """Raises `ValueError` where the components do not fit each other."""
        self.diffusion_decoder.check_parts(
            self.vision_tokenizer,
            vae_channels=vae_latent_channels(self.vae),
            pixels_per_cell=self.pixels_per_cell,
            pixels_per_latent=vae_scale_factor(self.vae),
        )

    def check_settings(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 25,
        strength: float = 1.0,
        tile_size: int | None = None,
        negative_prompt: str | list[str] | None = None,
        **others: Any,
    ) -> None:
        """Raises `ValueError` where the decoder cannot do what a call asks for. `others` are checked where used."""
        self.check_components()
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None and not self.has_text_encoder:
                raise ValueError(f"`{name}` is {text!r}, expected None: this decoder has no text encoder")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, expected at least 1")
        if not 0 < strength <= 1 or num_inference_steps * strength < 1:
            raise ValueError(
                f"`strength` is {strength} of {num_inference_steps} steps, expected at most 1 and one step or more"
            )
        cell = self.pixels_per_cell
        if tile_size is not None and (tile_size % cell or tile_size < 4 * cell):
            raise ValueError(f"`tile_size` is {tile_size}, expected a multiple of {cell} pixels, at least {4 * cell}")

    def check_inputs(
        self,
        image_codes: torch.Tensor | None,
        image_grids: torch.Tensor | None,
        image: Any,
        init_image: Any,
        strength: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises `ValueError` where the inputs of a call do not fit together, or need a component that is missing."""
        if (image_codes is None) == (image is None):
            given = "neither" if image is None else "both"
            raise ValueError(f"pass exactly one of `image_codes` and `image`, got {given}")
        if (image_codes is None) != (image_grids is None):
            raise ValueError("`image_codes` and `image_grids` go together, got one of them")
        if image is not None and self.image_processor is None:
            raise ValueError("`image` needs the component `image_processor`, which is None: pass `image_codes`")
        names = [one for one in (init_image if isinstance(init_image, list) else [init_image]) if isinstance(one, str)]
        if names and self.image_processor is None:
            raise ValueError(f"`init_image` has {names[0]!r}, which needs `image_processor`: pass a PIL image")
        if init_image is not None and strength == 1:
            raise ValueError("`init_image` is given but `strength` is 1, expected less: at 1 all begins with noise")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}, expected one of {list(OUTPUT_TYPES)}")
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name != "latents"]:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, expected some of {self._callback_tensor_inputs}"
            )

    def encode_image(self, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (total_codes,) and schedules (images, max_scales, 2) of images."""
        inputs = self.image_processor(image, return_tensors="pt")
        inputs = inputs.to(self._execution_device, self.vision_tokenizer.dtype)
        return loaded(self.vision_tokenizer).encode(**inputs).image_codes, inputs["image_grids"]

    def encode_condition(
        self, image_codes: torch.Tensor, image_grids: torch.Tensor, *, num_scales: int | None = None
    ) -> torch.Tensor:
        """The condition (images, channels, rows, columns) of codes that share one schedule."""
        device = self._execution_device
        features = loaded(self.vision_tokenizer).decode_features(
            image_codes.to(device), image_grids.to(device), num_scales=num_scales
        )
        return decoder_condition(features.semantic_embeds, features.pixel_embeds, features.semantic_features)

    def encode_prompt(
        self, prompts: list[str], *, max_sequence_length: int | None = None
    ) -> dict[str, torch.Tensor | None]:
        """
        Captions as the inputs of the denoiser's text branch, by the pipeline that the denoiser comes from. Without a
        text encoder: nothing to read, for every one.
        """
        device, decoder = self._execution_device, self.diffusion_decoder
        if not self.has_text_encoder:
            return {name: tensor.to(device) for name, tensor in decoder.empty_prompt(len(prompts)).items()}
        return encode_captions(decoder, self.components, prompts, device, max_sequence_length)

    def prepare_timesteps(
        self, scheduler: Any, num_inference_steps: int, strength: float, latent_size: tuple[int, int]
    ) -> torch.Tensor:
        """The scheduler's timesteps from `strength` on, for latents of that size."""
        options: dict[str, Any] = {}
        if _is_flow_matching(scheduler):
            if scheduler.config["use_dynamic_shifting"]:
                from diffusers.pipelines.flux.pipeline_flux import calculate_shift

                # Larger images take noisier timesteps; a token is 2x2 latents.
                names = "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"
                tokens = latent_size[0] * latent_size[1] // 4
                options["mu"] = calculate_shift(tokens, *(scheduler.config[name] for name in names))
            if self.diffusion_decoder.family.is_packed:  # as the pipelines of these denoisers do
                options["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, device=self._execution_device, **options)
        # Schedulers of second order have two timesteps a step.
        first = (num_inference_steps - int(num_inference_steps * strength)) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):  # DDIM and DDPM know their place by the timestep
            scheduler.set_begin_index(first)
        return scheduler.timesteps[first:]

    def encode_start(
        self,
        image_codes: torch.Tensor,
        image_grids: torch.Tensor,
        *,
        num_scales: int | None = None,
        init_image: list | None = None,
    ) -> torch.Tensor:
        """Latents of the image to begin with: `init_image`, or what the vision tokenizer decodes."""
        # All images share the schedule of the first, whose largest grid is the last.
        height, width = (int(cells) * self.pixels_per_cell for cells in image_grids[0].amax(0))
        device = self._execution_device
        if init_image is not None:
            images = [self._upright(one) if isinstance(one, (str, PIL.Image.Image)) else one for one in init_image]
            pixels = torch.cat([self.pixel_processor.preprocess(one, height, width) for one in images])
        else:
            codes = image_codes.to(device), image_grids.to(device)
            pixels = loaded(self.vision_tokenizer).decode(*codes, num_scales=num_scales)
            if pixels.shape[2:] != (height, width):
                pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
        return encode_latents(self.vae, pixels.to(device))

    def _upright(self, image: Any) -> PIL.Image.Image:
        """RGB as all images are read: diffusers ignores EXIF, takes grays for one channel and alpha for a fourth."""
        if self.image_processor is None:  # of an image that is opened already
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
        pixels = self.image_processor.process_image(image, do_convert_rgb=True)  # (3, height, width), 8 bits
        return PIL.Image.fromarray(np.asarray(pixels).transpose(1, 2, 0))

    def prepare_latents(
        self,
        scheduler: Any,
        timestep: torch.Tensor,
        num_images: int,
        size: tuple[int, int],
        generators: list[torch.Generator] | None = None,
        *,
        noise: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Noise as the scheduler begins with it or, with `start`, latents noised up to `timestep`. Raises `ValueError`
        for `latents` of another shape.
        """
        device = self._execution_device
        shape = (num_images, self.diffusion_decoder.latent_channels, *size)
        if noise is None:
            # Float32 from each image's own generator: the same noise in any batch and precision.
            noise = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(noise.shape)}, expected {shape}")
        noise = noise.to(device, torch.float32)
        if _is_flow_matching(scheduler):
            return noise if start is None else scheduler.scale_noise(start, timestep[None], noise)
        if start is None:
            return noise * scheduler.init_noise_sigma
        return scheduler.add_noise(start, noise, timestep[None])

    def denoise(
        self,
        scheduler: Any,
        timesteps: torch.Tensor,
        latents: torch.Tensor,
        condition: torch.Tensor,
        texts: dict[str, torch.Tensor | None],
        generators: list[torch.Generator] | None,
        *,
        tile: int | None,
        progress: Any,
        first_step: int,
        callback: Callable | None,
        tensor_inputs: Sequence[str],
    ) -> torch.Tensor:
        """
        Latents after all timesteps, or where `pipe._interrupt` stopped them. `texts` has the rows that guidance leads
        away from and then those of the images. The `callback` may replace the latents; `first_step` counts the steps
        of the groups before.
        """
        conditional = {name: None if rows is None else rows.chunk(2)[1] for name, rows in texts.items()}
        for step, timestep in enumerate(timesteps):
            if self._interrupt:
                break
            # Asked at every step, as a callback may switch guidance on or off.
            text = texts if self.do_classifier_free_guidance else conditional
            prediction = self.predict(scheduler, latents, timestep, condition, text, tile=tile)
            latents = self.step(scheduler, prediction, timestep, latents, generators)
            progress.update()
            if callback is not None:
                tensors = dict.fromkeys(tensor_inputs, latents)  # "latents" is all that there is
                latents = (callback(self, first_step + step, timestep, tensors) or {}).get("latents", latents)
        return latents

    def predict(
        self,
        scheduler: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        prompt: dict[str, torch.Tensor | None],
        *,
        tile: int | None = None,
    ) -> torch.Tensor:
        """
        The denoiser's guided prediction in float32. `prompt` has the rows of the images or, with guidance, those
        that it leads away from and then those of the images. `tile` is in cells.
        """
        if not _is_flow_matching(scheduler):
            latents = scheduler.scale_model_input(latents, timestep)
        if self.do_classifier_free_guidance:
            latents = latents.repeat(2, 1, 1, 1)
            # Training drops the condition to zeros, together with the caption.
            condition = torch.cat([torch.zeros_like(condition), condition])

        def denoise(latents: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            timesteps = timestep.expand(len(latents))
            return self.diffusion_decoder(latents, timesteps, condition, **prompt, return_dict=False)[0].float()

        if tile is None:
            prediction = denoise(latents, condition)
        else:
            prediction = predict_in_tiles(denoise, latents, condition, tile=tile)
        if self.do_classifier_free_guidance:
            without, conditional = prediction.chunk(2)
            prediction = without + self._guidance_scale * (conditional - without)
        return prediction

    def step(
        self,
        scheduler: Any,
        prediction: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        generators: list[torch.Generator] | None,
    ) -> torch.Tensor:
        """One step of the scheduler. One that needs noise takes it from the images' generators."""
        # Schedulers that add no noise take no generator.
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generators} if takes_generator else {}
        return scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Any:
        """Images of latents."""
        pixels = decode_latents(self.vae, latents)
        # Tensors come on the CPU, as those of `NextFlowPipeline.decode_codes` do.
        return self.pixel_processor.postprocess(pixels.cpu() if output_type == "pt" else pixels, output_type)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs,
    ) -> None:
        """
        Loads what [`NextFlowDiffusionDecoderTrainer`] saved: a LoRA of the denoiser and, in full, the projection of
        the condition with the input layer. These two stay when the LoRA is unloaded. Raises `ValueError` for weights
        of another model.
        """
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        prefix = f"{self.transformer_name}."
        plain = {name.removeprefix(prefix): value for name, value in state_dict.items() if ".lora_" not in name}
        unknown = sorted(set(plain) - set(self.diffusion_decoder.state_dict()))
        if unknown:
            raise ValueError(f"the LoRA has weights {unknown[:4]}, expected some of the diffusion decoder's")
        # Before the LoRA is in, which renames the weights of the layers that it wraps.
        self.diffusion_decoder.load_state_dict(plain, strict=False)
        lora = {name: value for name, value in state_dict.items() if ".lora_" in name}
        self.diffusion_decoder.load_lora_adapter(
            lora, prefix=self.transformer_name, adapter_name=adapter_name, metadata=metadata, _pipeline=self
        )

    @torch.no_grad()
    @exclusively
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image_codes: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image: Any = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        strength: float = 1.0,
        init_image: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        tile_size: int | None = None,
        num_scales: int | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Make the images of codes, or of an image's codes.

        Args:
            image_codes (`torch.Tensor` of shape `(total_codes,)`, *optional*): Codes, as NextFlow samples them.
            image_grids (`torch.Tensor` of shape `(images, max_scales, 2)`, *optional*): Their schedules.
            image (image or `list` of images, *optional*): Instead of codes: what to encode and make anew.
            prompt (`str` or `list[str]`, *optional*):
                Caption for all images or for each. It describes the image; it is no instruction. By default empty.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to `""`): What guidance leads away from.
            num_inference_steps (`int`, *optional*, defaults to 25): Steps from pure noise.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Strength of guidance by the codes and the caption together. 1 is none, and costs no second pass.
            strength (`float`, *optional*, defaults to 1.0):
                1 begins with noise. Less begins with an image, noised that far, and takes that share of the steps.
            init_image (image or `list` of images, *optional*):
                That image, resized to the output; by default what the vision tokenizer decodes. A decoder of 2x
                output can begin with the result of one of 1x.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one for each image. Each image has a generator of its own, seeded with one number of
                the given one, so it is the same in any batch.
            latents (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
                Noise to begin with, standard normal, instead of the generators'. For images of one size.
            tile_size (`int`, *optional*):
                Side in output pixels of squares to predict one by one, overlapping, for large images. The VAE has
                its own: `pipe.vae.enable_tiling()`.
            num_scales (`int`, *optional*): Use the codes of the first scales only, `image_codes` may end there.
            max_sequence_length (`int`, *optional*): Longest caption in tokens; by default the denoiser pipeline's.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): Else the same as a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`; may return changed
                `latents`, set `pipe._guidance_scale` or `pipe._interrupt`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`): Its tensors.

        Examples:

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images. Arrays that differ in size come as a list.
        """
        # 1. Check inputs
        tensor_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        self.check_settings(prompt, num_inference_steps, strength, tile_size, negative_prompt)
        self.check_inputs(image_codes, image_grids, image, init_image, strength, output_type, tensor_inputs)
        self._guidance_scale, self._interrupt = guidance_scale, False
        # Its place among the steps is this call's: other pipelines, in other threads, may have the same component.
        scheduler = copy.deepcopy(self.scheduler)

        # 2. Codes of the images, and which images share a schedule
        if image is not None:
            image_codes, image_grids = self.encode_image(image)
        assert image_codes is not None and image_grids is not None  # checked above
        codes_of_images = _split_codes(image_codes, image_grids, num_scales)
        num_images = len(image_grids)
        groups = group_equal([str(rows) for rows in image_grids.tolist()])
        if latents is not None and len(groups) > 1:
            raise ValueError(f"`latents` is one tensor, but the images have {len(groups)} different schedules")
        generators = generator_per_image(generator, num_images)

        # 3. Captions: those that guidance leads away from and those of the images, padded together
        captions = one_per_prompt("prompt", prompt or "", num_images)
        negatives = one_per_prompt("negative_prompt", negative_prompt or "", num_images)
        texts = self.encode_prompt(negatives + captions, max_sequence_length=max_sequence_length)

        # 4. Denoise, the images of one schedule together
        images: list = [None] * num_images
        tile = None if tile_size is None else tile_size // self.pixels_per_cell
        with self.progress_bar(total=0) as progress:
            for position, members in enumerate(groups):
                codes, grids = torch.cat([codes_of_images[index] for index in members]), image_grids[members]
                condition = self.encode_condition(codes, grids, num_scales=num_scales)
                height, width = condition.shape[2:]
                ratio = self.pixels_per_cell // vae_scale_factor(self.vae)  # latents that a cell spans
                size = (height * ratio, width * ratio)
                timesteps = self.prepare_timesteps(scheduler, num_inference_steps, strength, size)
                self._num_timesteps = progress.total = len(timesteps) * len(groups)
                start = None
                if strength < 1:
                    picked = None if init_image is None else _pick(init_image, members, num_images)
                    start = self.encode_start(codes, grids, num_scales=num_scales, init_image=picked)
                own = None if generators is None else [generators[index] for index in members]
                sample = self.prepare_latents(
                    scheduler, timesteps[0], len(members), size, own, noise=latents, start=start
                )
                rows = [*members, *(index + num_images for index in members)]  # negatives, then captions
                text = {name: None if value is None else value[rows] for name, value in texts.items()}
                options = {"tile": tile, "progress": progress, "first_step": position * len(timesteps)}
                options |= {"callback": callback_on_step_end, "tensor_inputs": tensor_inputs}
                sample = self.denoise(scheduler, timesteps, sample, condition, text, own, **options)
                decoded = sample if output_type == "latent" else self.decode_latents(sample, output_type)
                for index, one in zip(members, decoded, strict=True):
                    images[index] = one

        # 5. Output
        self.maybe_free_model_hooks()
        output = ImagePipelineOutput(images=stack_equal(images))
        return output if return_dict else output.to_tuple()


def _is_flow_matching(scheduler: Any) -> bool:
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def _split_codes(
    image_codes: torch.Tensor, image_grids: torch.Tensor, num_scales: int | None
) -> tuple[torch.Tensor, ...]:
    """Flat codes as one tensor an image; of all its scales, or of the first `num_scales`."""
    if image_grids.ndim != 3 or image_codes.ndim != 1:
        raise ValueError(
            f"`image_codes` has shape {tuple(image_codes.shape)} and `image_grids` {tuple(image_grids.shape)}, "
            "expected (total_codes,) and (images, max_scales, 2)"
        )
    counts = [grids.prod(-1).sum(-1).tolist() for grids in (image_grids, image_grids[:, :num_scales])]
    for lengths in counts:
        if sum(lengths) == len(image_codes):
            return image_codes.split(lengths)
    raise ValueError(f"`image_codes` has {len(image_codes)} codes, `image_grids` asks for {sum(counts[-1])}")


def _pick(images: Any, members: list[int], num_images: int) -> list:
    """Entries `members` of `images`; a single image stands for all."""
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    entries = list(images) if is_batch or isinstance(images, (list, tuple)) else [images] * num_images
    if len(entries) != num_images:
        raise ValueError(f"`init_image` has {len(entries)} entries for {num_images} images, expected one or as many")
    return [entries[index] for index in members]


__all__ = ["NextFlowDiffusionDecoderPipeline"]
