"""Every kind of image in, faithfully or not at all; the crop; and back to images."""

import base64
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from nextflow_hf.processing import NextFlowImageProcessorPil, ScaleSchedule, load_image
from nextflow_hf.processing.image_processing_nextflow import cover_box


SMALL = {"scale_bases": (1, 2, 3, 4, 5, 6, 8), "patch_size": 8, "bucket_area": 64, "resolution": 64}


@pytest.fixture
def processor() -> NextFlowImageProcessorPil:
    return NextFlowImageProcessorPil(**SMALL)


def rgb(source, max_pixels: int = 10**6) -> tuple[int, int, int]:
    """The colour of the middle pixel."""
    image = load_image(source, max_pixels)
    assert image.mode == "RGB"
    return image.getpixel((image.width // 2, image.height // 2))


def saved(image: Image.Image, suffix: str, folder: Path, **kwargs) -> Path:
    path = folder / f"image.{suffix}"
    image.save(path, **kwargs)
    return path


# ---- size and crop


@pytest.mark.parametrize(
    "size, grid",
    [((64, 64), [8, 8]), ((100, 50), [6, 10]), ((50, 100), [10, 6]), ((640, 80), [4, 16]), ((1, 1), [8, 8])],
)
def test_nearest_bucket_at_the_level(processor: NextFlowImageProcessorPil, size: tuple[int, int], grid: list[int]):
    out = processor(Image.new("RGB", size, "red"))
    assert out["image_grids"][0, -1].tolist() == grid
    assert out["pixel_values"].shape == (1, 3, grid[0] * 8, grid[1] * 8)
    assert out["pixel_values"].dtype == torch.float32 and out["image_grids"].dtype == torch.int64
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1)
    torch.testing.assert_close(out["pixel_values"], red.expand_as(out["pixel_values"]), atol=1e-6, rtol=0)


def test_resolution_per_call(processor: NextFlowImageProcessorPil):
    out = processor(Image.new("RGB", (64, 64)), resolution=32)
    assert out["image_grids"].tolist() == [[[1, 1], [2, 2], [3, 3], [4, 4], [0, 0], [0, 0], [0, 0]]]
    assert out["pixel_values"].shape[-2:] == (32, 32)
    assert processor.resolution == 64
    with pytest.raises(ValueError, match="resolution is 50, expected one of"):
        processor(Image.new("RGB", (64, 64)), resolution=50)


def test_full_size_default():
    out = NextFlowImageProcessorPil()(Image.new("RGB", (300, 200)))
    assert out["pixel_values"].shape == (1, 3, 832, 1216) and out["image_grids"].shape == (1, 18, 2)


def test_cover_then_centre_crop(processor: NextFlowImageProcessorPil):
    # 2:1 at the 6:10 bucket: the outer 1/12 on either side goes. Red borders of that width vanish exactly.
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, :10] = pixels[:, -10:] = (255, 0, 0)
    pixels[:, 10:-10] = (0, 255, 0)
    out = processor(pixels, resample=Image.Resampling.NEAREST)
    assert (out["pixel_values"][0, 1] == 1).all() and (out["pixel_values"][0, 0] == -1).all()


def test_cover_box_is_centred_and_inside():
    assert cover_box(60, 120, 48, 80) == pytest.approx((10, 0, 110, 60))
    assert cover_box(100, 50, 64, 64) == pytest.approx((0, 25, 50, 75))
    for height, width, target in [(7, 13, (48, 80)), (1001, 999, (64, 64)), (1, 3, (64, 64))]:
        left, top, right, bottom = cover_box(height, width, *target)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert (bottom - top) / (right - left) == pytest.approx(target[0] / target[1])


def test_without_resize_or_crop(processor: NextFlowImageProcessorPil):
    image = Image.new("RGB", (64, 64))
    assert processor(image, do_resize=False, do_center_crop=False)["pixel_values"].shape[-2:] == (64, 64)
    assert processor(Image.new("RGB", (70, 66)), do_resize=False)["pixel_values"].shape[-2:] == (64, 64)
    assert processor(Image.new("RGB", (30, 31)), do_center_crop=False)["pixel_values"].shape[-2:] == (64, 64)
    with pytest.raises(ValueError, match="the image is 60 x 64 pixels .*, expected 64 x 64"):
        processor(Image.new("RGB", (64, 60)), do_resize=False)


def test_rescale_and_normalize_flags(processor: NextFlowImageProcessorPil):
    image = Image.new("RGB", (64, 64), "white")
    assert processor(image, do_rescale=False, do_normalize=False)["pixel_values"].max() == 255
    assert processor(image, do_normalize=False)["pixel_values"].max() == 1


def test_batch_is_padded_top_left(processor: NextFlowImageProcessorPil):
    images = [Image.new("RGB", (160, 40), "white"), [Image.new("RGB", (40, 160), "white")]]
    out = processor(images)
    assert out["pixel_values"].shape == (2, 3, 128, 128)
    assert (out["pixel_values"][0, :, :32] == 1).all() and (out["pixel_values"][0, :, 32:] == 0).all()
    assert (out["pixel_values"][1, :, :, :32] == 1).all() and (out["pixel_values"][1, :, :, 32:] == 0).all()
    as_numpy = processor(images, return_tensors="np")
    assert isinstance(as_numpy["pixel_values"], np.ndarray)
    for image, row in zip([images[0], images[1][0]], out["pixel_values"], strict=True):
        alone = processor(image)["pixel_values"][0]
        assert row[:, : alone.shape[1], : alone.shape[2]].equal(alone)


def test_absurd_ratios_are_refused(processor: NextFlowImageProcessorPil):
    with pytest.warns(UserWarning, match=r"is 10 x 200 pixels \(height x width\): 20% of it, its middle, fits"):
        out = processor(Image.new("RGB", (200, 10)))
    assert out["image_grids"][0, -1].tolist() == [4, 16]
    with pytest.raises(ValueError, match=r"10 x 201 \(height x width\) is 20.1, expected at most 20"):
        processor(Image.new("RGB", (201, 10)))


# ---- every kind of image


@pytest.mark.parametrize(
    "image, colour",
    [
        (Image.new("L", (9, 9), 77), (77, 77, 77)),
        (Image.new("1", (9, 9), 1), (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (9, 9), (0, 51)), (204, 204, 204)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (9, 9), (255, 128, 128)), (255, 255, 255)),
        (Image.new("HSV", (9, 9), (0, 255, 255)), (255, 0, 0)),
        (Image.new("F", (9, 9), 0.2), (51, 51, 51)),
        (Image.new("I", (9, 9), 51 * 257), (51, 51, 51)),
        (Image.new("RGB", (9, 9), (1, 2, 3)).quantize(), (1, 2, 3)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value[0]),
)
def test_modes(image: Image.Image, colour: tuple[int, int, int]):
    assert rgb(image) == colour


def test_16_bits_are_scaled_not_clipped(tmp_path):
    gradient = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    path = saved(Image.fromarray(gradient), "png", tmp_path)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    expected = np.arange(256).reshape(16, 16)
    assert (np.asarray(load_image(path, 1000))[..., 0] == expected).all()
    assert (np.asarray(load_image(gradient, 1000))[..., 2] == expected).all()
    path = saved(Image.fromarray(gradient), "tiff", tmp_path)
    assert (np.asarray(load_image(path, 1000))[..., 1] == expected).all()
    big_endian = Image.frombytes("I;16B", (16, 16), gradient.astype(">u2").tobytes())
    assert (np.asarray(load_image(big_endian, 1000))[..., 0] == expected).all()


def test_transparent_palette_and_colour_key(tmp_path):
    palette = Image.new("P", (9, 9), 3)
    palette.putpalette([0, 0, 0] * 3 + [255, 0, 0])
    assert rgb(saved(palette, "png", tmp_path, transparency=3)) == (255, 255, 255)
    assert rgb(saved(palette, "png", tmp_path)) == (255, 0, 0)
    assert rgb(saved(Image.new("RGB", (9, 9), "blue"), "png", tmp_path, transparency=(0, 0, 255))) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation: int):
    image = Image.new("RGB", (30, 20), "white")
    image.paste((0, 0, 0), (0, 0, 15, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(image, "png", tmp_path, exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
        assert (np.asarray(load_image(opened, 1000)) == expected).all()  # PIL images that carry the tag, too
    assert (np.asarray(load_image(path, 1000)) == expected).all()
    assert expected.shape[:2] == ((30, 20) if orientation >= 5 else (20, 30))


def test_broken_exif_costs_the_orientation_only(tmp_path):
    image = Image.new("RGB", (9, 9), "red")
    image.info["exif"] = b"Exif\x00\x00broken"
    with pytest.warns(UserWarning, match="orientation is ignored"):
        assert rgb(image) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_give_their_first_frame(tmp_path, suffix: str):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    path = saved(
        frames[0],
        suffix,
        tmp_path,
        save_all=True,
        append_images=frames[1:],
        **{"lossless": True} if suffix == "webp" else {},
    )
    with pytest.warns(UserWarning, match="has 2 frames, only the first is used"):
        assert rgb(path) == (255, 0, 0)
    with Image.open(path) as image:
        image.seek(1)
        with pytest.warns(UserWarning, match="the image has 2 frames"):
            assert rgb(image) == (255, 0, 0)
        assert image.tell() == 1  # the caller's image is as it was


@pytest.mark.parametrize(
    "array, colour",
    [
        (np.full((9, 7, 3), 5, np.uint8), (5, 5, 5)),
        (np.full((3, 9, 7), 5, np.uint8), (5, 5, 5)),
        (np.full((9, 7), 5, np.uint8), (5, 5, 5)),
        (np.full((9, 7, 1), 5, np.int64), (5, 5, 5)),
        (np.full((9, 7, 3), 0.2), (51, 51, 51)),
        (np.full((9, 7, 3), 0.2, np.float16), (51, 51, 51)),
        (np.ones((9, 7), bool), (255, 255, 255)),
        (np.zeros((9, 7, 4), np.uint8), (255, 255, 255)),
        (np.zeros((9, 7, 3), ">u2"), (0, 0, 0)),
        (torch.full((3, 9, 7), 5, dtype=torch.uint8), (5, 5, 5)),
        (torch.full((9, 7, 3), 5, dtype=torch.uint8), (5, 5, 5)),
        (torch.full((1, 9, 7), 0.2, dtype=torch.bfloat16), (51, 51, 51)),
        (torch.zeros((3, 9, 7), requires_grad=True), (0, 0, 0)),
    ],
)
def test_arrays_and_tensors(array, colour: tuple[int, int, int]):
    assert rgb(array) == colour
    assert load_image(array, 1000).size == (7, 9)


def test_ambiguous_layouts(processor: NextFlowImageProcessorPil):
    array = np.zeros((3, 3, 3), np.uint8)
    array[0] = 255  # channels first: red. channels last: a white row
    assert load_image(array, 100).getpixel((0, 2)) == (0, 0, 0)
    assert load_image(torch.from_numpy(array), 100).getpixel((0, 2)) == (255, 0, 0)
    assert processor(array, input_data_format="channels_first")["pixel_values"][0, :, 60, 0].tolist() == [1, -1, -1]
    batch = np.zeros((2, 20, 20, 3), np.uint8)
    assert len(processor(batch)["pixel_values"]) == len(processor(torch.from_numpy(batch))["pixel_values"]) == 2


def test_sources(processor: NextFlowImageProcessorPil, tmp_path):
    path = saved(Image.new("RGB", (20, 20), "red"), "png", tmp_path)
    buffer = io.BytesIO(path.read_bytes())
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    for source in (path, str(path), uri):
        assert rgb(source) == (255, 0, 0)
    with pytest.raises(ValueError, match="data URI is not base64"):
        load_image("data:image/png;base64,!!", 100)


# ---- refusals


def test_missing_file(processor: NextFlowImageProcessorPil, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.png' does not exist"):
        processor(str(tmp_path / "nothing.png"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_truncated_files(tmp_path, suffix: str):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    path = saved(Image.fromarray(pixels), suffix, tmp_path)
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=f"image.{suffix}' is truncated, corrupt or not an image"):
            load_image(path, 10**6)


def test_files_that_are_no_images(tmp_path):
    path = tmp_path / "note.png"
    path.write_text("hello")
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match="is truncated, corrupt or not an image"):
            load_image(source, 100)


@pytest.mark.parametrize(
    "source, error, match",
    [
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"shape \(0, 5, 3\), expected at least one pixel"),
        (Image.new("RGB", (0, 5)), ValueError, r"is 5 x 0 pixels .*, expected at least 1 x 1"),
        (np.full((5, 5, 3), np.nan), ValueError, "75 non-finite values, expected none"),
        (torch.tensor([[[0.0, float("inf")]]]), ValueError, "1 non-finite"),
        (np.full((5, 5, 3), 200.0), ValueError, r"floats in \[200, 200\], expected \[0, 1\]"),
        (np.full((5, 5, 3), -1.0), ValueError, r"floats in \[-1, -1\]"),
        (np.full((5, 5, 3), 300), ValueError, r"integers in \[300, 300\], expected \[0, 255\]"),
        (np.full((5, 5, 3), -1, np.int16), ValueError, r"integers in \[-1, -1\]"),
        (Image.new("I", (5, 5), 70000), ValueError, r"\[70000, 70000\], expected \[0, 65535\]"),
        (Image.new("F", (5, 5), 128.0), ValueError, r"floats in \[128, 128\]"),
        (np.zeros((5, 5, 2), np.uint8), ValueError, r"shape \(5, 5, 2\), expected 1, 3 or 4 channels"),
        (np.zeros((5,), np.uint8), ValueError, "1 dimensions"),
        (np.zeros((5, 5), complex), ValueError, "dtype complex128"),
        (b"bytes", ValueError, "image file of 5 bytes is truncated, corrupt or not an image"),
        (None, TypeError, "is a NoneType"),
    ],
)
def test_unreadable_inputs(source, error, match: str):
    with pytest.raises(error, match=match):
        load_image(source, 10**6)


def test_decompression_bombs(processor: NextFlowImageProcessorPil, tmp_path, monkeypatch):
    path = saved(Image.new("1", (200, 100)), "png", tmp_path)
    with pytest.raises(ValueError, match=r"has 20000 pixels \(100 x 200\), expected at most 19999"):
        load_image(path, 19999)
    with pytest.raises(ValueError, match="20000 pixels"):
        processor(Image.new("L", (200, 100)), max_pixels=19999)
    with pytest.raises(ValueError, match="20000 pixels"):
        processor(np.zeros((100, 200), np.uint8), max_pixels=19999)
    for limit in (15000, 9000):  # Pillow warns, Pillow raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="decompression bomb"):
            load_image(path, 10**9)


def test_bomb_header_is_refused_before_decoding(tmp_path):
    # A png that claims 60000 x 60000 pixels in a few bytes.
    chunk = PngImagePlugin.putchunk
    path = tmp_path / "bomb.png"
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(file, b"IHDR", (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
        chunk(file, b"IDAT", b"\x00")
        chunk(file, b"IEND", b"")
    with pytest.raises(ValueError, match="bomb.png' looks like a decompression bomb"):
        load_image(path, NextFlowImageProcessorPil.max_pixels)


def test_other_refusals(processor: NextFlowImageProcessorPil):
    with pytest.raises(ValueError, match="got 0 images"):
        processor([])
    with pytest.raises(ValueError, match="mode L, expected RGB"):
        processor(Image.new("L", (9, 9)), do_convert_rgb=False)
    with pytest.raises(Exception, match="colour_space"):
        processor(Image.new("L", (9, 9)), colour_space=3)
    with pytest.raises(ValueError, match="got a size, expected none: `resolution` says how large"):
        processor(Image.new("L", (9, 9)), size={"height": 32, "width": 32})


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff"])
def test_damaged_files_never_raise_anything_else(tmp_path, suffix: str):
    random = np.random.default_rng(1)
    path = saved(Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8)), suffix, tmp_path)
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for position in random.integers(0, len(whole), 6):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(bytes(damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert load_image(path, 10**6).mode == "RGB"
            except ValueError as error:
                assert "image." in str(error)


# ---- back again


def test_post_process_inverts(processor: NextFlowImageProcessorPil):
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (64, 64, 3), np.uint8), generator.integers(0, 256, (128, 32, 3), np.uint8)]
    out = processor(arrays)
    for array, image in zip(arrays, processor.post_process_images(**out), strict=True):
        assert (np.asarray(image) == array).all()
    for array, image in zip(arrays, processor.post_process_images(**out, output_type="np"), strict=True):
        assert image.dtype == np.float32 and np.abs(image * 255 - array).max() < 1e-3
    for array, image in zip(arrays, processor.post_process_images(**out, output_type="pt"), strict=True):
        assert image.shape == (3, *array.shape[:2])


def test_post_process_clamps_and_rounds(processor: NextFlowImageProcessorPil):
    grids = torch.tensor([[[1, 1], [0, 0]]])
    pixels = torch.tensor([2.0, -3.0, 2 * 100.6 / 255 - 1]).view(1, 3, 1, 1).expand(1, 3, 8, 8).bfloat16().float()
    assert processor.post_process_images(pixels, grids)[0].getpixel((0, 0)) == (255, 0, 101)


def test_post_process_refusals(processor: NextFlowImageProcessorPil):
    grids = torch.tensor([[[1, 1], [2, 2]]])
    with pytest.raises(ValueError, match="output_type is 'latent'"):
        processor.post_process_images(torch.zeros(1, 3, 16, 16), grids, output_type="latent")
    with pytest.raises(ValueError, match="got 2 images and 1 rows"):
        processor.post_process_images(torch.zeros(2, 3, 16, 16), grids)
    with pytest.raises(ValueError, match="say 16 x 16 pixels, but the image is 8 x 16"):
        processor.post_process_images(torch.zeros(1, 3, 8, 16), grids)
    with pytest.raises(ValueError, match="1 non-finite"):
        pixels = torch.zeros(1, 3, 16, 16)
        pixels[0, 0, 0, 0] = float("nan")
        processor.post_process_images(pixels, grids)


def test_save_and_load(processor: NextFlowImageProcessorPil, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = NextFlowImageProcessorPil.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**processor.to_dict(), "scale_bases": list(SMALL["scale_bases"])}
    assert (
        loaded.schedule
        == processor.schedule
        == ScaleSchedule(scale_bases=SMALL["scale_bases"], patch_size=8, bucket_area=64)
    )
    assert loaded.to_dict()["image_processor_type"] == "NextFlowImageProcessor"
    image = Image.new("RGB", (50, 70), "blue")
    assert loaded(image)["pixel_values"].equal(processor(image)["pixel_values"])
