"""PSNR, SSIM and the Fréchet distance against independent statements; pictures good and bad; the command's report."""

import logging
import sys

import datasets
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from transformers import AutoImageProcessor, ConvNextConfig, ConvNextImageProcessorPil, ConvNextModel

from nextflow_hf.processing.image_processing_nextflow import NextFlowImageProcessor
from nextflow_hf.training.data.description import load_images, read_description
from nextflow_hf.training.data.images import ImageRows, NextFlowImageDataset, NextFlowVisionTokenizerCollator
from nextflow_hf.training.evaluation.frechet import FeatureStatistics, frechet_distance, load_feature_model
from nextflow_hf.training.evaluation.reconstruction import structural_similarity


def test_ssim_is_that_of_gaussian_filters():
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(2, 3, 20, 31, generator=generator, dtype=torch.float64)
    decoded = (true + 0.2 * torch.randn(true.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)

    def expected(first: np.ndarray, second: np.ndarray) -> float:
        values = []
        for x, y in zip(first, second):
            smooth = lambda image: gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]  # noqa: E731
            mx, my = smooth(x), smooth(y)
            vx, vy, vxy = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
            top = (2 * mx * my + 0.0001) * (2 * vxy + 0.0009)
            values.append((top / ((mx**2 + my**2 + 0.0001) * (vx + vy + 0.0009))).mean())
        return float(np.mean(values))

    values = structural_similarity(decoded, true)
    assert values.tolist() == pytest.approx([expected(a.numpy(), b.numpy()) for a, b in zip(decoded, true)], rel=1e-6)
    assert 0.2 < values.max() < 0.95
    assert structural_similarity(true, true).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match=r"images are \(10, 31\) pixels, expected at least 11"):
        structural_similarity(true[..., :10, :], true[..., :10, :])


def statistics_of(features: np.ndarray) -> FeatureStatistics:
    statistics = FeatureStatistics()
    for part in np.array_split(features, 3):
        statistics.update(torch.from_numpy(part))
    return statistics


def test_frechet_distance_is_that_of_the_matrix_root():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    second = rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6))
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    gap = first.mean(0) - second.mean(0)
    expected = gap @ gap + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    one, other = statistics_of(first), statistics_of(second)
    np.testing.assert_allclose(one.covariance.numpy(), c1)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_known_gaussians(caplog):
    known = []
    for mean, deviations in ((torch.tensor([1.0, 2.0]), [2.0, 3.0]), (torch.tensor([0.0, 4.0]), [1.0, 5.0])):
        statistics = FeatureStatistics()
        # Four points with exactly this mean and this (unbiased) diagonal covariance.
        spread = torch.tensor(deviations) * 1.5**0.5
        points = torch.cat([torch.diag(spread), -torch.diag(spread)])
        statistics.update(points + mean)
        known.append(statistics)
    # |m1 - m2|^2 + sum (s1 - s2)^2
    assert frechet_distance(*known) == pytest.approx(1 + 4 + 1 + 4, rel=1e-6)
    single = statistics_of(np.eye(3))
    with caplog.at_level(logging.WARNING):
        frechet_distance(single, statistics_of(np.random.default_rng(0).normal(size=(2, 3))))
    assert "2 images' features of 3 dimensions is biased" in caplog.text


def test_inception_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"nextflow-hf\[eval\]"):
        load_feature_model("inception")


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("convnext")
    torch.manual_seed(0)
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4], depths=[1, 1], num_stages=2)).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return str(folder)


def test_features_are_the_models_pooled_output(vision_model):
    pictures = [np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8) for size in ((16, 24, 3), (40, 20, 3))]
    features = load_feature_model(vision_model)(pictures)
    inputs = AutoImageProcessor.from_pretrained(vision_model)(pictures, return_tensors="pt")
    with torch.no_grad():
        expected = ConvNextModel.from_pretrained(vision_model).eval()(**inputs).pooler_output
    torch.testing.assert_close(features, expected)


@pytest.fixture
def folder(tmp_path):
    """Five pictures of several ratios, and one that is none."""
    rng = np.random.default_rng(0)
    path = tmp_path / "pictures"
    path.mkdir()
    for index, (height, width) in enumerate([(40, 40), (30, 60), (33, 47), (64, 32), (20, 20)]):
        smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
        smooth.save(path / f"{index}.png")
    (path / "2_broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return path


PROCESSOR = {"scale_bases": [1, 2, 4], "patch_size": 4, "bucket_area": 16, "min_bucket_fill": 0.5, "resolution": 16}


def dataset_of(path, on_bad_row: str = "skip", columns: dict | None = None, **options) -> NextFlowImageDataset:
    source = {"path": str(path), "task": "image", "columns": columns or {}}
    images = load_images(read_description({"sources": [source], "on_bad_row": on_bad_row}))
    return NextFlowImageDataset(images, NextFlowImageProcessor(**PROCESSOR), **options)


def test_a_bad_image_is_named_and_the_next_one_takes_its_place(folder, caplog):
    data = dataset_of(folder)
    assert len(data) == 6 and data.images.bad_rows == []
    bad = next(i for i in range(6) if "broken" in str(data.images.rows[i]["images"][0]["path"]))
    with caplog.at_level(logging.WARNING):
        items = [data[index] for index in range(6)]
    assert data.images.bad_rows == [bad] and "2_broken.png" in caplog.text
    assert torch.equal(items[bad]["pixel_values"], items[bad + 1]["pixel_values"])
    assert items[0]["image_grids"].tolist()[0] == [1, 1] and (items[0]["image_grids"] > 0).all()
    batch = NextFlowVisionTokenizerCollator()(items)
    assert len({tuple(map(tuple, item["image_grids"].tolist())) for item in items}) > 1
    assert len(batch["pixel_values"]) == 6
    with pytest.raises(ValueError, match=f"row {bad} .* is bad: .*2_broken.png.*on_bad_row"):
        dataset_of(folder, "raise")[bad]
    with pytest.raises(ValueError, match="all 1 rows are bad"):
        NextFlowImageDataset(ImageRows([data.images.rows[bad]], on_bad_row="skip"), data.image_processor)[0]


def test_workers_report_their_bad_images(folder):
    data = dataset_of(folder)
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=1, collate_fn=lambda items: items)
    assert sum(len(batch) for batch in loader) == 6 and len(data.images.bad_rows) == 1


def test_crops_and_flips_are_a_function_of_epoch_and_index(folder):
    data, again = (dataset_of(folder, random_crop=0.5, random_flip=True, seed=3) for _ in range(2))
    first = data[0]["pixel_values"]
    assert torch.equal(first, again[0]["pixel_values"])
    again.set_epoch(1)
    assert not torch.equal(first, again[0]["pixel_values"])


def test_images_of_a_data_set_on_disk(folder, tmp_path):
    rows = datasets.Dataset.from_dict({"photo": [str(folder / "0.png"), None]}).cast_column("photo", datasets.Image())
    rows.save_to_disk(tmp_path / "saved")
    data = dataset_of(tmp_path / "saved", columns={"image": "photo"})
    assert torch.equal(data[0]["pixel_values"], data[1]["pixel_values"]) and data.images.bad_rows == [1]
    with pytest.raises(ValueError, match=r"but the columns are \['photo'\]: name it, as in columns: {image: ...}"):
        dataset_of(tmp_path / "saved")
