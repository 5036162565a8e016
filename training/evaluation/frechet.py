"""Fréchet distance of two sets of images: FID and r-FID with Inception's features, FD with those of another model.

Heusel et al. (2017) fit a Gaussian to each set's features. Numbers are comparable only for one feature model and one
set of images: published FIDs are Inception's.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel


logger = logging.getLogger(__name__)

# Images, uint8 (height, width, 3) of any sizes, to features (n, dim).
FeatureModel = Callable[[Sequence[np.ndarray]], torch.Tensor]


class FeatureStatistics:
    """Mean and covariance of features that arrive in parts, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: torch.Tensor | int = 0
        self.products: torch.Tensor | int = 0

    def update(self, features: torch.Tensor) -> None:
        """Adds features (n, dim)."""
        # Products less squared means cancel in the covariance: float32 would lose its small eigenvalues.
        features = features.double().cpu()
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the features (dim,), float64."""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, as numpy's and every FID's."""
        if self.count < 2:
            raise ValueError(f"got the features of {self.count} images, expected at least 2")
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of the two Gaussians."""
    if min(first.count, second.count) < len(first.mean):
        logger.warning(
            "the Fréchet distance of %d images' features of %d dimensions is biased upwards: use more images",
            min(first.count, second.count),
            len(first.mean),
        )
    # C1 C2 has the eigenvalues of the symmetric S C2 S where S is the root of C1: no root of a general matrix.
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum()
    return (distance + first.covariance.trace() + second.covariance.trace() - 2 * overlap).item()


def load_feature_model(source: str, device: torch.device | str = "cpu") -> FeatureModel:
    """
    Args:
        source (`str`): `"inception"`: FID's own network, by the package torchmetrics. Else Hub id or folder of a
            vision model of transformers with its image processor, DINOv2 for example: its pooled output, or the mean
            of its last hidden state where it pools nothing.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where it runs.
    """
    return _load_inception(device) if source == "inception" else _load_vision_model(source, device)


def _load_inception(device: torch.device | str) -> FeatureModel:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(
            "the features 'inception' need the package torchmetrics: pip install 'nextflow-hf[eval]', or name a "
            "vision model of transformers instead"
        ) from error
    inception = FrechetInceptionDistance(feature=2048).inception.to(device).eval()

    @torch.no_grad()
    def features(images: Sequence[np.ndarray]) -> torch.Tensor:
        # One by one, for they have different sizes; the network resizes as the original does.
        tensors = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device) for image in images)
        return torch.cat([inception(tensor) for tensor in tensors])

    return features


def _load_vision_model(source: str, device: torch.device | str) -> FeatureModel:
    processor, model = AutoImageProcessor.from_pretrained(source), AutoModel.from_pretrained(source).to(device).eval()

    @torch.no_grad()
    def features(images: Sequence[np.ndarray]) -> torch.Tensor:
        inputs = processor(list(images), return_tensors="pt").to(device)
        outputs = model(**inputs)
        pooled = outputs.get("pooler_output")
        if pooled is None:
            pooled = outputs.last_hidden_state.flatten(2).mean(-1 if outputs.last_hidden_state.ndim == 4 else 1)
        return pooled.flatten(1).float()

    return features
