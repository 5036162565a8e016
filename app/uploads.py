"""What may come in from a browser: images of a few formats, limited in bytes and in pixels, judged by their header.

Nothing is decoded here. What the header cannot say (whether the pixels are all there) the image processor finds out.
"""

import os

from PIL import Image, UnidentifiedImageError


MAX_BYTES = 20 * 1024**2
MAX_PIXELS = 50_000_000  # more than a phone's camera takes
MAX_IMAGES = 8  # of one request
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]


def check_image(path: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> None:
    """`ValueError` with the cause if the file is no image, too large a file, or an image of too many pixels."""
    name, size = os.path.basename(path), os.path.getsize(path)
    if size > max_bytes:
        raise ValueError(f"{name} has {size:,} bytes, expected at most {max_bytes:,}")
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads the header only
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} looks like a decompression bomb and was not decoded: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not an image of the formats {', '.join(FORMATS)}, or it is damaged") from error
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width * height:,} pixels ({width} x {height}) and was not decoded: expected at most "
            f"{max_pixels:,}"
        )


def check_images(paths: list[str]) -> None:
    """[`check_image`] for all images of one request, which may be [`MAX_IMAGES`]."""
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"got {len(paths)} images, expected at most {MAX_IMAGES}")
    for path in paths:
        check_image(path)
