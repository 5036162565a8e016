"""Any image -> the pixels of its bucket, and back (§2.1; resize rule not specified by the paper).

Every input becomes upright 8-bit RGB first (image_loading_nextflow.py), then the nearest bucket's size: resized to
cover it, centre-cropped. Knows no tokens; the schedule is data to it. The crop box and all that comes before it are
free of frameworks and shared by the PIL and the torchvision backend.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils.generic import TensorType
from transformers.utils.import_utils import is_torchvision_available

from .image_loading_nextflow import MAX_PIXELS, load_image
from .scale_schedule_nextflow import ScaleSchedule


class NextFlowImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    resolution (`int`, *optional*, defaults to 1024):
        Side in pixels of the square image with as many scales. One of the schedule's `resolutions`.
    scale_bases (`list[int]`, *optional*): Side of each square grid, see [`ScaleSchedule`].
    patch_size (`int` or `float`, *optional*, defaults to 16): Pixels per cell of the last grid, along each axis.
    bucket_area (`int`, *optional*, defaults to 256): Largest `a * b` of a bucket.
    min_bucket_fill (`float`, *optional*, defaults to 0.9): Smallest share of `bucket_area` that a bucket fills.
    max_aspect_ratio (`float`, *optional*, defaults to 4.0): Ratio of the widest bucket; images of more than five
        times that are refused.
    max_pixels (`int`, *optional*, defaults to 178956970): Images with more pixels are refused before they are decoded.
    """

    resolution: int
    scale_bases: list[int] | tuple[int, ...]
    patch_size: int | float
    bucket_area: int
    min_bucket_fill: float
    max_aspect_ratio: float
    max_pixels: int


_schedule = functools.lru_cache(ScaleSchedule)  # which finds its buckets once


def flatten_images(images: Any) -> list[Any]:
    """One image, or (nested) lists and 4D batches of them, as a flat list in order."""
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in flatten_images(nested)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def cover_box(height: int, width: int, target_height: int, target_width: int) -> tuple[float, float, float, float]:
    """
    The largest centred box `(left, top, right, bottom)` of a `height` x `width` image, in its own (fractional)
    pixels, with the target's aspect ratio: what cover-resize followed by a centre crop keeps.
    """
    scale = min(height / target_height, width / target_width)
    left, top = (width - target_width * scale) / 2, (height - target_height * scale) / 2
    # The side that fits exactly must not leave the image by a rounding error.
    return max(left, 0.0), max(top, 0.0), min(width - left, float(width)), min(height - top, float(height))


def crop_box(
    height: int, width: int, target_height: int, target_width: int, *, do_resize: bool, do_center_crop: bool
) -> tuple[float, float, float, float]:
    """
    The box to resize to the target. Without `do_center_crop` all of the image, without `do_resize` the target's size.
    """
    if do_resize:
        if do_center_crop:
            return cover_box(height, width, target_height, target_width)
        return 0.0, 0.0, float(width), float(height)
    if (height, width) != (target_height, target_width) and not (
        do_center_crop and height >= target_height and width >= target_width
    ):
        raise ValueError(
            f"without do_resize the image is {height} x {width} pixels (height x width), expected "
            f"{target_height} x {target_width}, the size of its bucket"
        )
    # Whole pixels: without a resize nothing is interpolated.
    left, top = float((width - target_width) // 2), float((height - target_height) // 2)
    return left, top, left + target_width, top + target_height


class _NextFlowImageProcessing(BaseImageProcessor):
    """What the two backends share: everything but the resize itself."""

    pad: Callable[..., Any]  # the backend's

    valid_kwargs = NextFlowImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grids"]

    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    rescale_factor = 1 / 255
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    resample = PILImageResampling.BICUBIC
    return_tensors = "pt"

    resolution = 1024
    scale_bases = ScaleSchedule.scale_bases
    patch_size = ScaleSchedule.patch_size
    bucket_area = ScaleSchedule.bucket_area
    min_bucket_fill = ScaleSchedule.min_bucket_fill
    max_aspect_ratio = ScaleSchedule.max_aspect_ratio
    max_pixels = MAX_PIXELS

    @property
    def schedule(self) -> ScaleSchedule:
        """The scale schedule that this processor's numbers describe."""
        return self._schedule_of(vars(self))

    @staticmethod
    def _schedule_of(numbers: dict[str, Any]) -> ScaleSchedule:
        values = [numbers[name] for name in ScaleSchedule.__dataclass_fields__]
        return _schedule(*(tuple(value) if isinstance(value, list) else value for value in values))

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        for name in ("size", "crop_size"):
            if kwargs.get(name) is not None:
                raise ValueError(f"got a {name}, expected none: `resolution` says how large images become")
        # The base class wants a `size` and a `crop_size` for the flags we share with it: our sizes come from the
        # buckets.
        kwargs.update(do_resize=False, do_center_crop=False)
        super()._validate_preprocess_kwargs(**kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs)
        if "scale_bases" in kwargs:
            kwargs["scale_bases"] = list(kwargs["scale_bases"])  # as it is when it was saved and loaded
        return kwargs

    def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any) -> list[Any]:
        images = flatten_images(images)
        names = [None] if len(images) == 1 else [f"images[{index}]" for index in range(len(images))]
        return [self.process_image(image, name=name, **kwargs) for image, name in zip(images, names, strict=True)]

    def _resize_box(
        self, image: Any, box: tuple[float, float, float, float], size: tuple[int, int], resample: PILImageResampling
    ) -> Any:
        """The `box` of an image (3, height, width), resized to `size` (height, width) in float32."""
        raise NotImplementedError

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths and addresses, alone or in (nested) lists, as [`load_image`] reads them."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(one) for one in image_url_or_urls]
        return (
            load_image(image_url_or_urls, self.max_pixels) if isinstance(image_url_or_urls, str) else image_url_or_urls
        )

    def _load(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | None = None,
        max_pixels: int | None = None,
        name: str | None = None,
        **kwargs,
    ) -> Image.Image:
        if not do_convert_rgb and isinstance(image, Image.Image) and image.mode != "RGB":
            raise ValueError(f"without do_convert_rgb the image has mode {image.mode}, expected RGB")
        channels_last = None if input_data_format is None else str(input_data_format).lower().endswith("last")
        max_pixels = self.max_pixels if max_pixels is None else max_pixels
        return load_image(image, max_pixels, channels_last=channels_last, name=name)

    def _preprocess(
        self,
        images: list[Any],
        *,
        resolution: int,
        do_resize: bool,
        do_center_crop: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        do_pad: bool,
        resample: PILImageResampling,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        if not images:
            raise ValueError("got 0 images, expected at least 1")
        schedule = self._schedule_of(kwargs)
        num_scales = schedule.num_scales(resolution)

        pixel_values, schedules = [], []
        for image in images:  # (3, height, width), 8 bits
            height, width = image.shape[1:]
            bucket = schedule.nearest_bucket(height, width)
            size = schedule.pixel_size(bucket, num_scales)
            box = crop_box(height, width, *size, do_resize=do_resize, do_center_crop=do_center_crop)
            left, top, right, bottom = box
            kept = (right - left) * (bottom - top) / (height * width)
            if do_resize and kept < 0.5:
                warnings.warn(
                    f"an image is {height} x {width} pixels (height x width): {kept:.0%} of it, its middle, fits the "
                    f"bucket nearest to that, {size[0]} x {size[1]}",
                    stacklevel=2,
                )
            image = self._resize_box(image, box, size, resample)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            pixel_values.append(image)
            schedules.append(schedule.grids(bucket, num_scales))
        if do_pad:
            pixel_values = self.pad(pixel_values)
        data = {
            "pixel_values": pixel_values,
            "image_grids": np.array(schedule.image_grids(schedules), dtype=np.int64),  # (images, max_scales, 2)
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def get_image_grids(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> list[tuple[int, int]]:
        """The grids that an image of this size becomes."""
        numbers = {**vars(self), **(images_kwargs or {})}
        schedule = self._schedule_of(numbers)
        return schedule.grids(schedule.nearest_bucket(height, width), schedule.num_scales(numbers["resolution"]))

    def post_process_images(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None, output_type: str = "pil"
    ) -> list[Image.Image] | list[np.ndarray] | list[torch.Tensor]:
        """
        Pixels back to images: the inverse of the call, apart from the crop and the resize.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`): Normalised, image i in the top-left
                corner.
            image_grids (`torch.Tensor` of shape `(images, max_scales, 2)`, *optional*):
                Schedule of every image, to crop the padding. Without it nothing is cropped.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`: 8-bit RGB; `"np"`: float32 (height, width, 3) in [0, 1]; `"pt"`: float32 (3, height, width)
                in [0, 1].

        Returns:
            `list`: one image of `output_type` for each.

        Raises:
            `ValueError`: for another `output_type`, for grids that do not fit the pixels, and for values that are not
            finite.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type is {output_type!r}, expected "pil", "np" or "pt"')
        pixel_values = torch.as_tensor(pixel_values)
        if image_grids is None:
            grid = [round(side / self.patch_size) for side in pixel_values.shape[-2:]]
            image_grids = torch.tensor([[grid]] * len(pixel_values)).view(-1, 1, 2)
        image_grids = torch.as_tensor(image_grids)
        if len(pixel_values) != len(image_grids):
            raise ValueError(f"got {len(pixel_values)} images and {len(image_grids)} rows of image_grids")
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        images = []
        for pixels, grids in zip(pixel_values, image_grids, strict=True):
            # Grids never shrink: the last is the largest.
            height, width = (round(cells * self.patch_size) for cells in grids.amax(dim=0).tolist())
            if min(height, width) < 1 or height > pixels.shape[1] or width > pixels.shape[2]:
                raise ValueError(
                    f"image_grids say {height} x {width} pixels, but the image is {pixels.shape[1]} x "
                    f"{pixels.shape[2]}"
                )
            image = pixels[:, :height, :width].detach().float().cpu()
            if not image.isfinite().all():
                raise ValueError(f"an image has {int((~image.isfinite()).sum())} non-finite values, expected none")
            image = (image * std + mean).clamp(0, 1)
            if output_type != "pt":
                image = image.permute(1, 2, 0).numpy()
            if output_type == "pil":
                image = Image.fromarray(np.rint(image * 255).astype(np.uint8))
            images.append(image)
        return images


class NextFlowImageProcessorPil(_NextFlowImageProcessing, PilBackend):
    r"""
    Images to NextFlow's pixels with PIL and numpy.

    Every image is made upright RGB, resized to cover the size of its nearest bucket and centre-cropped to it; a batch
    is padded with zeros on the right and at the bottom. Returns a `BatchFeature` with `pixel_values`, float32
    `(images, 3, height, width)` in [-1, 1], and `image_grids`, int64 `(images, max_scales, 2)`. The arguments of
    [`ScaleSchedule`] are attributes here and saved with the processor; `resolution` may be
    given per call.
    """

    def process_image(self, image: Any, **kwargs) -> np.ndarray:
        """Any image as upright RGB, 8 bits (3, height, width)."""
        return np.asarray(self._load(image, **kwargs)).transpose(2, 0, 1)

    def _resize_box(
        self,
        image: np.ndarray,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        resample: PILImageResampling,
    ) -> np.ndarray:
        # PIL crops at fractions of a pixel and resizes in one filter pass.
        cropped = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        cropped = cropped.resize((size[1], size[0]), resample=resample, box=box)
        return np.asarray(cropped, dtype=np.float32).transpose(2, 0, 1)


if is_torchvision_available():

    class NextFlowImageProcessor(_NextFlowImageProcessing, TorchvisionBackend):
        """
        [`NextFlowImageProcessorPil`] on tensors: the box is rounded to whole pixels, the filter runs on `device`.
        """

        def process_image(self, image: Any, device: str | torch.device | None = None, **kwargs) -> torch.Tensor:
            """Any image as upright RGB, 8 bits (3, height, width), on `device`."""
            pixels = torch.from_numpy(np.array(self._load(image, **kwargs))).permute(2, 0, 1)
            return pixels if device is None else pixels.to(device)

        def _resize_box(
            self,
            image: torch.Tensor,
            box: tuple[float, float, float, float],
            size: tuple[int, int],
            resample: PILImageResampling,
        ) -> torch.Tensor:
            left, top = math.floor(box[0] + 0.5), math.floor(box[1] + 0.5)
            height, width = max(1, round(box[3] - box[1])), max(1, round(box[2] - box[0]))
            image = image[:, top : top + height, left : left + width]
            target = SizeDict(height=size[0], width=size[1])
            return self.resize(image, target, resample=resample).to(torch.float32)
else:
    NextFlowImageProcessor = NextFlowImageProcessorPil  # pyright: ignore[reportAssignmentType]  # stands in for it


__all__ = ["NextFlowImageProcessor", "NextFlowImageProcessorPil", "NextFlowImageProcessorKwargs"]
