"""Any image -> the pixels of its bucket, and back (§2.1; resize rule not specified by the paper).

Every input becomes an upright 8-bit RGB picture first (`load_rgb`), then the nearest bucket's size: resized to cover
it, centre-cropped. What cannot be read faithfully is refused with its cause. Knows no tokens; the schedule is data to
it. The crop box and all that comes before it are free of frameworks and shared by the PIL and the torchvision backend.
"""

import base64
import binascii
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict, load_image
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, is_torchvision_available

from .scale_schedule import ScaleSchedule, num_cells


class NextFlowImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    resolution (`int`, *optional*, defaults to 1024):
        Level: side in pixels of the square image with as many scales. One of the schedule's `resolutions`.
    scale_bases (`list[int]`, *optional*): Side of each square grid, see [`ScaleSchedule`].
    patch_size (`int`, *optional*, defaults to 16): Pixels per cell of the last grid, along each axis.
    bucket_area (`int`, *optional*, defaults to 256): Largest `a * b` of a bucket.
    min_bucket_fill (`float`, *optional*, defaults to 0.9): Smallest share of `bucket_area` that a bucket fills.
    max_aspect_ratio (`float`, *optional*, defaults to 4.0): Ratio of the widest bucket; images of more than five
        times that are refused.
    max_pixels (`int`, *optional*, defaults to 178956970): Images with more pixels are refused before they are decoded.
    """

    resolution: int
    scale_bases: list[int] | tuple[int, ...]
    patch_size: int
    bucket_area: int
    min_bucket_fill: float
    max_aspect_ratio: float
    max_pixels: int


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns whatever Pillow's decoders raise, and its decompression bomb warning, into a `ValueError` about `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} looks like a decompression bomb and was not decoded: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} does not exist") from error
    except (OSError, SyntaxError, EOFError, IndexError, TypeError, struct.error) as error:
        # SyntaxError is what Pillow raises for a broken PNG.
        raise ValueError(f"{name} is truncated, corrupt or not an image: {error}") from error


def _check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {height} x {width} pixels (height x width), expected at least 1 x 1")
    if height * width > max_pixels:
        raise ValueError(f"{name} has {height * width} pixels ({height} x {width}), expected at most {max_pixels}")


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation shows it. A broken EXIF block costs the orientation, not the image."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, struct.error, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"the image's EXIF block cannot be read, its orientation is ignored: {error}", stacklevel=2)
        return image.copy()


def _picture_to_rgb(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    """
    First frame of a PIL image of any mode -> upright RGB, transparency on white. The caller's image is left as is.
    """
    _check_size(image.height, image.width, max_pixels, name)  # known from the header: nothing is decoded yet
    with _decoding(name):
        frames = getattr(image, "n_frames", 1)  # only the formats that can hold several have it
        if frames > 1 and image.format != "MPO":  # a phone's MPO is one picture with extras
            warnings.warn(f"{name} has {frames} frames, only the first is used", stacklevel=2)
        if frames > 1 and image.tell() != 0:
            frame = image.tell()
            image.seek(0)
            first = image.copy()
            image.seek(frame)
            image = first
        image.load()
    image = _upright(image)

    if image.mode.startswith("I"):  # 16 bits: I;16 in its byte orders, and I where a decoder has no narrower mode
        return _array_to_rgb(np.asarray(image), None, max_pixels, name, bits=16)
    if image.mode == "F":
        return _array_to_rgb(np.asarray(image), None, max_pixels, name)
    try:
        if image.has_transparency_data:  # RGBA, LA, PA, and a transparent palette entry or colour
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode}, which cannot become RGB: {error}") from error


def _array_to_rgb(
    array: np.ndarray, channels_last: bool | None, max_pixels: int, name: str, bits: int | None = None
) -> Image.Image:
    """
    An array of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels -> RGB. 8-bit and 16-bit integers and
    booleans span their whole range, floats span [0, 1]. `channels_last` says which layout wins where both fit (None:
    only 2D).
    """
    if 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}, expected at least one pixel")
    if array.ndim == 3:
        last, first = array.shape[2] in (1, 3, 4), array.shape[0] in (1, 3, 4)
        if not (last or first):
            raise ValueError(f"{name} has shape {array.shape}, expected 1, 3 or 4 channels first or last")
        if not last or (first and not channels_last):
            array = np.moveaxis(array, 0, 2)
    elif array.ndim != 2:
        raise ValueError(f"{name} has {array.ndim} dimensions {array.shape}, expected 2 or 3")
    _check_size(*array.shape[:2], max_pixels, name)

    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} non-finite values, expected none")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"{name} is of floats in [{low:g}, {high:g}], expected [0, 1] (give 0 to 255 as 8-bit integers)"
            )
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.integer):
        if array.dtype.kind == "u" and array.dtype.itemsize == 2:
            bits = 16
        limit = 65535 if bits == 16 else 255
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > limit:
            raise ValueError(f"{name} is of integers in [{low}, {high}], expected [0, {limit}]")
        if bits == 16:
            array = np.rint(array.astype(np.float32) / 257)  # 65535 / 257 = 255
        array = array.astype(np.uint8)
    else:
        raise ValueError(f"{name} has dtype {array.dtype}, expected integers, floats or booleans")

    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _picture_to_rgb(Image.fromarray(np.ascontiguousarray(array)), max_pixels, name)


def load_rgb(source: Any, max_pixels: int, channels_last: bool | None = None) -> Image.Image:
    """
    One image of any supported kind -> upright 8-bit RGB picture, transparency composited on white.

    Args:
        source (`PIL.Image.Image`, `str`, `Path`, `bytes`, `np.ndarray` or `torch.Tensor`):
            A string is a path, an `http(s)://` address or a `data:image/...;base64,` URI, bytes are those of a file.
            Arrays are channels last unless only channels first fits, tensors the other way round; floats in [0, 1],
            integers over their whole range.
        max_pixels (`int`): Refuse larger images, before decoding where the header says so.
        channels_last (`bool`, *optional*): Overrides the layout that wins where both fit.

    Raises:
        `FileNotFoundError` for a path that does not exist, `TypeError` for another kind of object, `ValueError` for
        everything that cannot be read faithfully, with the cause and the numbers.
    """
    if isinstance(source, Image.Image):
        return _picture_to_rgb(source, max_pixels, "the image")
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
        return _array_to_rgb(source.numpy(), bool(channels_last), max_pixels, "the image tensor")
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source, channels_last in (None, True), max_pixels, "the image array")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with _decoding(source):
            image = load_image(source)
        return _picture_to_rgb(image, max_pixels, source)
    if isinstance(source, str) and source.startswith("data:image/"):
        name = "the data URI"
        try:
            source = BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(f"the data URI is not base64: {error}") from error
    elif isinstance(source, (str, Path)):
        name = f"the image file {str(source)!r}"
    elif isinstance(source, bytes):
        name, source = f"the image file of {len(source)} bytes", BytesIO(source)
    else:
        raise TypeError(
            f"an image is a {type(source).__name__}, expected a PIL image, a path, bytes, a numpy array or a torch "
            "tensor"
        )
    with _decoding(name):
        image = Image.open(source)
    with image:
        return _picture_to_rgb(image, max_pixels, name)


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
    left, top = float((width - target_width) // 2), float((height - target_height) // 2)
    return left, top, left + target_width, top + target_height


class _NextFlowImageProcessing:
    """What the two backends share: everything but the resize itself."""

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
    max_pixels = 178_956_970  # where Pillow itself stops; at half of it, from files, it warns and we refuse

    @property
    def schedule(self) -> ScaleSchedule:
        """The scale schedule that this processor's numbers describe."""
        return self._schedule_of(vars(self))

    @staticmethod
    def _schedule_of(numbers: dict[str, Any]) -> ScaleSchedule:
        return ScaleSchedule(**{name: numbers[name] for name in ScaleSchedule.__dataclass_fields__})

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        # The base class wants a `size` and a `crop_size` for the flags we share with it: our sizes come from the
        # buckets.
        kwargs.update(do_resize=False, do_center_crop=False)
        super()._validate_preprocess_kwargs(**kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs)
        if "scale_bases" in kwargs:
            kwargs["scale_bases"] = list(kwargs["scale_bases"])  # as it is when it was saved and loaded
        return kwargs

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        return flatten_images(images)

    def _rgb_picture(
        self, image: Any, *, do_convert_rgb: bool | None, input_data_format: str | None, max_pixels: int
    ) -> Image.Image:
        if not do_convert_rgb and isinstance(image, Image.Image) and image.mode != "RGB":
            raise ValueError(f"without do_convert_rgb the image has mode {image.mode}, expected RGB")
        channels_last = None if input_data_format is None else str(input_data_format).lower().endswith("last")
        return load_rgb(image, max_pixels, channels_last)

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

    def get_number_of_image_tokens(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Number of `<|image_pad|>` of an image of this size: the cells of all scales but the first."""
        return num_cells(self.get_image_grids(height, width, images_kwargs)) - 1

    def get_image_grids(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> list[tuple[int, int]]:
        """The grids that an image of this size becomes."""
        numbers = {**vars(self), **(images_kwargs or {})}
        schedule = self._schedule_of(numbers)
        return schedule.grids(schedule.nearest_bucket(height, width), schedule.num_scales(numbers["resolution"]))

    def post_process_images(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | list[np.ndarray] | list[torch.Tensor]:
        """
        Pixels back to images: the inverse of the call, apart from the crop and the resize.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`): Normalised, image i in the top-left
                corner.
            image_grids (`torch.Tensor` of shape `(images, max_scales, 2)`): Schedule of every image.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`: 8-bit RGB; `"np"`: float32 (height, width, 3) in [0, 1]; `"pt"`: float32 (3, height, width)
                in [0, 1].
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type is {output_type!r}, expected "pil", "np" or "pt"')
        pixel_values, image_grids = torch.as_tensor(pixel_values), torch.as_tensor(image_grids)
        if len(pixel_values) != len(image_grids):
            raise ValueError(f"got {len(pixel_values)} images and {len(image_grids)} rows of image_grids")
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        images = []
        for pixels, grids in zip(pixel_values, image_grids, strict=True):
            height, width = (
                grids.amax(dim=0) * self.patch_size
            ).tolist()  # grids never shrink: the last is the largest
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
    [`ScaleSchedule`] are attributes here and saved with the processor; `resolution` chooses the level and may be
    given per call.
    """

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | None = None,
        max_pixels: int | None = None,
        **kwargs,
    ) -> np.ndarray:
        picture = self._rgb_picture(
            image,
            do_convert_rgb=do_convert_rgb,
            input_data_format=input_data_format,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )
        return np.asarray(picture).transpose(2, 0, 1)

    def _resize_box(
        self,
        image: np.ndarray,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        resample: PILImageResampling,
    ) -> np.ndarray:
        # PIL crops at fractions of a pixel and resizes in one filter pass.
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        picture = picture.resize(size[::-1], resample=resample, box=box)
        return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)


if is_torchvision_available():

    class NextFlowImageProcessor(_NextFlowImageProcessing, TorchvisionBackend):
        """
        [`NextFlowImageProcessorPil`] on tensors: the box is rounded to whole pixels, the filter runs on `device`.
        """

        def process_image(
            self,
            image: Any,
            do_convert_rgb: bool | None = None,
            input_data_format: str | None = None,
            device: str | torch.device | None = None,
            max_pixels: int | None = None,
            **kwargs,
        ) -> torch.Tensor:
            picture = self._rgb_picture(
                image,
                do_convert_rgb=do_convert_rgb,
                input_data_format=input_data_format,
                max_pixels=self.max_pixels if max_pixels is None else max_pixels,
            )
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
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
    NextFlowImageProcessor = NextFlowImageProcessorPil


__all__ = ["NextFlowImageProcessor", "NextFlowImageProcessorPil", "NextFlowImageProcessorKwargs"]
