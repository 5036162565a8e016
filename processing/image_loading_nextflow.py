"""Any image -> upright 8-bit sRGB, the same for a file, its bytes, its address and its data URI, or an error.

The one loader of images: size and format are checked by the header, before anything is decoded. Only formats that
Pillow decodes by itself are opened (EPS, for one, would run Ghostscript). What cannot be read faithfully is refused
with its cause. Knows no models, schedules or tensors of pixels.
"""

import base64
import binascii
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .image_fetching_nextflow import fetch


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "PSD", "ICO")
MAX_PIXELS = 178_956_970  # where Pillow itself stops; at half of it, from files, it warns and we refuse
MAX_BYTES = 2**28
TIMEOUT = 30.0

_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of an ICC profile -> mode


def load_image(
    source: Any,
    max_pixels: int = MAX_PIXELS,
    *,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    allow_private_addresses: bool = False,
    formats: Sequence[str] = FORMATS,
    channels_last: bool | None = None,
    name: str | None = None,
) -> Image.Image:
    """
    One image of any supported kind as 8-bit sRGB: upright by its EXIF orientation, embedded colour profiles converted,
    the first frame of an animation, Photoshop's composite of layers, transparency composited on white.

    Values of more than 8 bits are scaled by their depth: that of the file's header; floats span [0, 1], integers of
    unknown depth (`uint16` arrays, PIL images of mode "I;16" that no file has, mode "I") 16 bits, or 8 bits where no
    value exceeds 255. A broken colour profile or EXIF block is ignored with a warning: its pixels are whole, and
    browsers show such an image the same way.

    Args:
        source (`PIL.Image.Image`, `str`, `Path`, `bytes`, `dict`, `np.ndarray` or `torch.Tensor`):
            A string is a path, an `http(s)://` address or a `data:image/...;base64,` URI; bytes are those of a file; a
            dictionary has the "bytes" or the "path" of an undecoded column of `datasets`. Arrays are channels last
            unless only channels first fits, tensors the other way round.
        max_pixels (`int`, *optional*): Refuse larger images, before decoding where the header says so.
        max_bytes (`int`, *optional*, defaults to 256 MiB): Refuse larger files.
        timeout (`float`, *optional*, defaults to 30): Seconds in which an address has to deliver the image.
        allow_private_addresses (`bool`, *optional*, defaults to `False`): Whether an address, or one that it redirects
            to, may lead to this machine or its network. Pass `True` only for addresses that you trust.
        formats (`Sequence[str]`, *optional*): Formats to accept, of [`FORMATS`].
        channels_last (`bool`, *optional*): Overrides the layout that wins where both fit an array.
        name (`str`, *optional*): What errors call an image that has no path and no address of its own.

    Raises:
        `FileNotFoundError` for a path that does not exist, `TypeError` for another kind of object, `ValueError` for
        everything that cannot be read faithfully, with the image, the cause and the numbers.
    """
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source  # NumPy has no bfloat16
        return _from_array(source.numpy(), bool(channels_last), max_pixels, name or "the image tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, channels_last in (None, True), max_pixels, name or "the image array")
    if isinstance(source, Image.Image):
        return _to_rgb(source, max_pixels, name or "the image")
    fetching = {"timeout": timeout, "allow_private_addresses": allow_private_addresses}
    file, name = _find_file(source, name, max_bytes, fetching)
    with open_header(file, max_pixels, max_bytes=max_bytes, formats=formats, name=name) as image:
        return _to_rgb(image, max_pixels, name)


@contextmanager
def open_header(
    file: str | Path | bytes,
    max_pixels: int = MAX_PIXELS,
    *,
    max_bytes: int = MAX_BYTES,
    formats: Sequence[str] = FORMATS,
    name: str,
) -> Iterator[Image.Image]:
    """An image file or its bytes as a PIL image that is not decoded yet, or `ValueError` with its `name`."""
    if isinstance(file, bytes):
        size, opened = len(file), BytesIO(file)
    else:
        size, opened = _file_size(file, name), file
    if size > max_bytes:
        raise ValueError(f"{name} has {size} bytes, expected at most {max_bytes}")
    Image.init()  # knows all formats from here on
    with _decoding(name, formats):
        # A build of Pillow may lack a format, such as AVIF.
        image = Image.open(opened, formats=[one for one in formats if one in Image.OPEN])
    with image:
        _check_size(image.height, image.width, max_pixels, name)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.height * image.width > limit:  # Pillow warns, and raises at twice as many
            raise ValueError(
                f"{name} looks like a decompression bomb and was not decoded: it has {image.height * image.width} "
                f"pixels, expected at most {limit} (PIL.Image.MAX_IMAGE_PIXELS)"
            )
        yield image


def _find_file(source: Any, name: str | None, max_bytes: int, fetching: dict[str, Any]) -> tuple[Any, str]:
    """The file or the bytes that `source` stands for, and what to call them."""
    if isinstance(source, dict) and (source.get("bytes") is not None or source.get("path") is not None):
        path, source = source.get("path"), source.get("bytes")
        source, name = (path, name) if source is None else (source, name or (path and f"the image {path!r}"))
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return fetch(source, max_bytes=max_bytes, **fetching), f"the image {source}"
    if isinstance(source, str) and source.startswith("data:"):
        name = name or "the data URI"
        try:
            # Strictly: by default Python skips what is no base64, and the rest decodes to another image.
            return base64.b64decode(source.partition(",")[2], validate=True), name
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{name} is not base64: {error}") from error
    if isinstance(source, (str, Path)):
        return source, f"the image file {str(source)!r}"
    if isinstance(source, bytes):
        return source, name or f"the image file of {len(source)} bytes"
    raise TypeError(
        f"{name or 'an image'} is a {type(source).__name__}, expected a PIL image, a path, an address, bytes, a numpy "
        "array or a torch tensor"
    )


def _file_size(path: str | Path, name: str) -> int:
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ValueError(f"{name} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device may have no end
        raise ValueError(f"{name} is truncated, corrupt or not an image: it is no regular file")
    return found.st_size


@contextmanager
def _decoding(name: str, formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Turns whatever Pillow's decoders raise into a `ValueError` about `name`. Wraps calls of Pillow alone."""
    try:
        yield
    except MemoryError:  # says nothing about the file
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is truncated, corrupt or not an image of the formats {', '.join(formats)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} looks like a decompression bomb and was not decoded: {error}") from error
    except Exception as error:  # OSError, SyntaxError, ValueError, KeyError, struct.error, zlib.error, ...
        raise ValueError(f"{name} is truncated, corrupt or not an image: {error}") from error


def _check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {height} x {width} pixels (height x width), expected at least 1 x 1")
    if height * width > max_pixels:
        raise ValueError(f"{name} has {height * width} pixels ({height} x {width}), expected at most {max_pixels}")


def _to_rgb(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    """A PIL image of any mode -> RGB. The caller's image is left as it is."""
    _check_size(image.height, image.width, max_pixels, name)  # known from the header: nothing is decoded yet
    if image.format not in (None, "MPO", *FORMATS):  # it may not be decoded yet
        raise ValueError(f"{name} has the format {image.format}, expected one of {', '.join(FORMATS)}, or a copy()")
    image, depth = _first_frame(image, name)
    image = _upright(image, name)
    profile = image.info.get("icc_profile")
    # First, as the conversion of a profile takes 8 bits.
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image, depth, name)
    if profile:
        image = _to_srgb(image, profile, name)
    try:
        if image.has_transparency_data:  # RGBA, LA, PA, and a transparent palette entry or colour
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode}, which cannot become RGB: {error}") from error
    image.info = {}  # the profile and the orientation are applied: whoever loads the result must not do it again
    return image


def _first_frame(image: Image.Image, name: str) -> tuple[Image.Image, int | None]:
    """The first frame, decoded, and the depth of its values where its file says that."""
    with _decoding(name):
        # A PSD's "frames" are its layers, and it opens as their composite. A phone's MPO is one image with extras.
        frames = 1 if image.format == "PSD" else getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            warnings.warn(f"{name} has {frames} frames, only the first is used", stacklevel=2)
        if frames == 1 or image.tell() == 0:
            image.load()
            return image, _header_depth(image)
        frame = image.tell()
        image.seek(0)
        first, depth = image.copy(), _header_depth(image)
        image.seek(frame)  # as the caller had it
        return first, depth


def _header_depth(image: Image.Image) -> int | None:
    """Bits per value of a grayscale image of 16-bit or 32-bit integers. None: no header says what is white."""
    if image.format != "TIFF":
        return None if image.format is None else 16  # Pillow's decoders scale to that
    tags: Any = vars(image)["tag_v2"]
    bits, sample_format = (tags.get(tag, (1,))[0] for tag in (258, 339))  # BitsPerSample, SampleFormat
    return bits if bits <= 16 and sample_format == 1 else None  # 1: unsigned


def _upright(image: Image.Image, name: str) -> Image.Image:
    """A copy of the image as its EXIF orientation shows it."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises SyntaxError, struct.error, KeyError, ... for a broken EXIF block
        warnings.warn(f"the EXIF block of {name} cannot be read, its orientation is ignored: {error}", stacklevel=2)
        return image.copy()


def _to_8_bits(image: Image.Image, depth: int | None, name: str) -> Image.Image:
    """Grayscale of 16-bit or 32-bit integers, or of floats -> L, or LA where one of its values is transparent."""
    values = np.asarray(image)
    gray = Image.fromarray(_array_to_8_bits(values, name, depth=depth, max_depth=16))
    if "transparency" in image.info:
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray


def _to_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """The image with its colours in sRGB instead of those of its ICC profile; RGB or RGBA."""
    base = "L" if image.mode in ("1", "L", "LA", "La") else "CMYK" if image.mode == "CMYK" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        opened: Any = source.profile
        space = opened.xcolor_space.strip()
        mode = _PROFILE_MODES.get(space)
        if mode != base and (mode, base) != ("RGB", "L"):
            raise ValueError(f"it is for {space}, but the image has mode {image.mode}")
        srgb = ImageCms.createProfile("sRGB")
        colors = ImageCms.profileToProfile(image.convert(mode), source, srgb, outputMode="RGB")
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        warnings.warn(f"the colour profile of {name} is ignored: {error}", stacklevel=2)
        return image
    assert colors is not None  # as it is not done in place
    # Profiles know no transparency: it is carried over.
    if image.has_transparency_data:
        colors.putalpha(image.convert("RGBA").getchannel("A"))
    return colors


def _from_array(array: np.ndarray, channels_last: bool, max_pixels: int, name: str) -> Image.Image:
    """
    An array of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels -> RGB. `channels_last` says which layout
    wins where both fit.
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
    _check_size(array.shape[0], array.shape[1], max_pixels, name)
    is_16_bits = array.dtype.kind == "u" and array.dtype.itemsize == 2
    array = _array_to_8_bits(array, name, max_depth=16 if is_16_bits else 8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), max_pixels, name)


def _array_to_8_bits(array: np.ndarray, name: str, *, depth: int | None = None, max_depth: int = 8) -> np.ndarray:
    """
    Values of any type -> uint8: booleans, floats that span [0, 1], and integers of `depth` bits. Where that is not
    known it is 8 if all values fit, else `max_depth`.
    """
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} non-finite values, expected none")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"{name} is of floats in [{low:g}, {high:g}], expected [0, 1] (give 0 to 255 as 8-bit integers)"
            )
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}, expected integers, floats or booleans")
    low, high = int(array.min()), int(array.max())
    if depth is None:
        depth = 8 if high <= 255 else max_depth
        if depth == 8 and high > 0 and array.dtype.itemsize == 2 and max_depth == 16:
            warnings.warn(f"{name} has 16-bit values of at most {high}, which are taken for 8-bit ones", stacklevel=2)
    limit = 2**depth - 1
    if low < 0 or high > limit:
        raise ValueError(f"{name} is of integers in [{low}, {high}], expected [0, {limit}]")
    return np.rint(array.astype(np.float32) / (limit / 255)).astype(np.uint8)
