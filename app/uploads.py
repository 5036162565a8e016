"""What may come in from a browser: images of a few formats, limited in bytes and in pixels, judged by their header.

Nothing is decoded here: whether the pixels are all there is found out when the image is used.
"""

import os

from ..processing.image_loading_nextflow import open_header


MAX_BYTES = 20 * 1024**2
MAX_PIXELS = 50_000_000  # more than a phone's camera takes
MAX_IMAGES = 8  # of one request
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]


def check_image(path: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> None:
    """`ValueError` with the cause if the file is no image, too large a file, or an image of too many pixels."""
    with open_header(path, max_pixels, max_bytes=max_bytes, formats=FORMATS, name=os.path.basename(path)):
        pass


def check_images(paths: list[str]) -> None:
    """[`check_image`] for all images of one request, which may be [`MAX_IMAGES`]."""
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"got {len(paths)} images, expected at most {MAX_IMAGES}")
    for path in paths:
        check_image(path)
