"""What a vision tokenizer makes of images: PSNR, SSIM, GMSD and sharpness of each; LPIPS and r-FID where asked for.

    nextflow-hf evaluate reconstruction MODEL data=path/to/images [count=1000] [resolution=512] [features=inception]
        [perceptual=lpips-alex] [upscale_factor=2] [--set decoder=diffusion decoder_strength=0.5]

`data` is a description of data (a YAML file, as `nextflow-hf extract` reads it; its rows for evaluation), a folder of
images, or a data set with a column `image`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image

from ..data.description import load_images, read_description
from ..vision_tokenizer.losses import load_perceptual_loss
from .frechet import FeatureStatistics, frechet_distance, load_feature_model
from .reconstruction import edge_steepness, fidelity
from .suite import Answer, Sample, Turn, UnscoredError, check_upscale_factor, images_of


class ReconstructionSuite:
    """
    Every image through the vision tokenizer and back.

    Args:
        data (`str`): A data description, a folder of images, or a data set.
        count (`int`, *optional*): Only the first so many rows.
        resolution (`int`, *optional*): Side in pixels of a square image with as many scales.
        features (`str`, *optional*): For r-FID: "inception", or a vision model by folder or Hub id.
        perceptual (`str`, *optional*): "lpips-alex", "lpips-vgg" (LPIPS, by the package lpips, which needs
            torchvision), or a vision model by folder or Hub id: see [`load_perceptual_loss`].
        upscale_factor (`int`, *optional*, defaults to 1):
            Side of the images that are compared, in units of what the vision tokenizer decodes to; decoded images of
            another size are resized bicubically.
    """

    name = "reconstruction"

    def __init__(
        self,
        data: str,
        *,
        count: int | None = None,
        resolution: int | None = None,
        features: str | None = None,
        perceptual: str | None = None,
        upscale_factor: int = 1,
    ):
        self.rows = load_images(read_description(data), "evaluation")
        self.features = features
        self.distance = None if perceptual is None else load_perceptual_loss(perceptual)
        self.settings = {"upscale_factor": check_upscale_factor(upscale_factor)}
        self.settings |= {} if resolution is None else {"resolution": resolution}
        total = len(self.rows)
        self.ids = [f"{index:08d}" for index in range(total if count is None else min(count, total))]

    def sample(self, id: str) -> Sample:
        """One image; the processor opens and resizes it."""
        item = self.rows[int(id)]
        if item["row_id"].partition(":")[0] != str(int(id)):
            raise UnscoredError("its row is bad, and the next one, which the log names, has a sample of its own")
        messages = [{"role": "user", "content": [{"type": "image", "image": item["image"]}]}]
        return Sample(id, [Turn("reconstruct", messages)], "reconstruction", settings=self.settings)

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """Of the decoded image against the resized one. SSIM is not a number below its window."""
        true, decoded = (_pixels(image) for image in images_of(answer[0]))
        values = fidelity(decoded, true)
        values["sharpness"] = edge_steepness(decoded) / edge_steepness(true).clamp(min=1e-8)
        if self.distance is not None:
            values["perceptual"] = self.distance(decoded * 2 - 1, true * 2 - 1)
        return {name: value.item() for name, value in values.items() if not value.isnan()}

    def summarize(self, answers: Iterable[tuple[Sample, Answer]], results: Sequence[dict]) -> dict[str, float]:
        """`rfid`: the Fréchet distance of the images and their reconstructions, with a feature model."""
        if self.features is None:
            return {}
        model, statistics = load_feature_model(self.features), (FeatureStatistics(), FeatureStatistics())
        for _, answer in answers:
            for of_kind, image in zip(statistics, images_of(answer[0]), strict=True):
                of_kind.update(model([np.array(image)]))
        return {"rfid": frechet_distance(*statistics)}


def _pixels(image: Image.Image) -> torch.Tensor:
    """(1, 3, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


suite = ReconstructionSuite
