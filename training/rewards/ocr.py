"""Text rendering as a reward (arXiv:2601.02256, equations 11 to 15): can the text be read in the image?

The arithmetic works on words with confidences, from any OCR engine; one engine is ready to use.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class OCRWord:
    """What an engine read: the text, how sure it is (0 to 1), and the box (left, top, right, bottom) in pixels."""

    text: str
    confidence: float
    box: tuple[float, float, float, float] | None = None


OCREngine = Callable[[Image.Image], Sequence[OCRWord]]


EPSILON = 1e-8
PUNCTUATION = "\"'`.,:;!?()[]{}<>“”‘’«»…"


def split_words(text: str, *, ignore_punctuation: bool = False) -> list[str]:
    """The words of a text, lower case; on demand without punctuation around them."""
    words = text.lower().split()
    if ignore_punctuation:
        words = [word.strip(PUNCTUATION) for word in words]
    return [word for word in words if word]


def edit_similarity(first: str, second: str) -> float:
    """Equation 11: 1 minus the Levenshtein distance over the length of the longer text."""
    previous = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            substituted = previous[column - 1] + (letter != other)
            current.append(min(previous[column] + 1, current[-1] + 1, substituted))
        previous = current
    return 1 - previous[-1] / (max(len(first), len(second)) + EPSILON)


def completeness(targets: Sequence[str], words: Sequence[tuple[str, float]]) -> float:
    """Equation 12: share of the target words that were read exactly, each with the lowest confidence among all
    readings of it, so that writing a word again and again gains nothing."""
    if not targets:
        raise ValueError("got no target words: an image without text has no completeness")
    confidences: dict[str, float] = {}
    for text, confidence in words:
        confidences[text] = min(confidence, confidences.get(text, confidence))
    return sum(confidences.get(target, 0.0) for target in targets) / len(targets)


def similarity(targets: Sequence[str], words: Sequence[tuple[str, float]]) -> float:
    """Equation 14: mean over the target words of the [`edit_similarity`] to the nearest word that was read, times the
    confidence of that word; of equally near ones the least sure, as in [`completeness`]."""
    if not targets:
        raise ValueError("got no target words: an image without text has no similarity")
    total = 0.0
    for target in targets:
        if words:
            near, unsure = max((edit_similarity(target, text), -confidence) for text, confidence in words)
            total += near * -unsure
    return total / len(targets)


def bag_distance(targets: Sequence[str], words: Sequence[tuple[str, float]]) -> float:
    """Equation 13 without its weight: letters that are missing or too many, whatever their order, over all letters
    asked for and read, 0 to 1."""
    wanted, read = Counter("".join(targets)), Counter("".join(text for text, _ in words))
    total = wanted.total() + read.total()
    return ((wanted - read).total() + (read - wanted).total()) / total if total else 0.0


def text_rendering_score(
    targets: Sequence[str], words: Sequence[tuple[str, float]], *, distance_weight: float = 0.6
) -> float:
    """Equation 15: `completeness + similarity - distance_weight * bag distance`, at most 2."""
    return completeness(targets, words) + similarity(targets, words) - distance_weight * bag_distance(targets, words)


class RapidOCREngine:
    """`rapidocr` (with `onnxruntime`; extra `ocr`): models for detection and recognition come inside its wheel."""

    def __init__(self, **params: Any):
        from rapidocr import RapidOCR

        self._engine = RapidOCR(**params)

    def __call__(self, image: Image.Image) -> list[OCRWord]:
        result = self._engine(np.asarray(image.convert("RGB"))[..., ::-1])  # BGR, as OpenCV has it
        if result.txts is None:
            return []
        boxes = [(*np.min(box, axis=0).tolist(), *np.max(box, axis=0).tolist()) for box in result.boxes]
        return [OCRWord(text, float(sure), box) for text, sure, box in zip(result.txts, result.scores, boxes)]


class OCRReward:
    """
    Rewards images that show the text they were asked to show.

    One number is easy to please in ways nobody wants (a blank wall under perfect letters): weigh it with a preference
    model, or with a KL penalty (`beta`).

    Args:
        engine (`Callable`, *optional*): Image -> [`OCRWord`]s. Defaults to [`RapidOCREngine`].
        target_column (`str`, *optional*, defaults to `"text"`):
            Column of the data set with what is to be written: a string or a list of strings. Where it is empty the
            reward does not apply. It is never guessed from the prompt.
        distance_weight (`float`, *optional*, defaults to 0.6): Weight of the bag distance.
        ignore_punctuation (`bool`, *optional*, defaults to `False`):
            Compare words without the punctuation around them. The paper's equations know lower case only.
    """

    def __init__(
        self,
        engine: OCREngine | None = None,
        *,
        target_column: str = "text",
        distance_weight: float = 0.6,
        ignore_punctuation: bool = False,
    ):
        self.engine = RapidOCREngine() if engine is None else engine
        self.target_column = target_column
        self.distance_weight = distance_weight
        self.ignore_punctuation = ignore_punctuation
        self.__name__ = "ocr"

    def __call__(
        self,
        images: Sequence[Image.Image],
        report_masks: Callable[[list[np.ndarray | None]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if self.target_column not in columns:
            raise ValueError(f"the data set has no column {self.target_column!r}, which holds the text to be written")
        scores, masks = [], []
        for image, wanted in zip(images, columns[self.target_column], strict=True):
            texts = [wanted] if isinstance(wanted, str) else list(wanted or [])
            targets = [word for text in texts for word in self._words(text)]
            if not targets:
                scores.append(None)
                masks.append(None)
                continue
            found = self.engine(image)
            # An engine reads lines: all words of a line share its confidence.
            words = [(word, line.confidence) for line in found for word in self._words(line.text)]
            scores.append(text_rendering_score(targets, words, distance_weight=self.distance_weight))
            masks.append(boxes_mask([line.box for line in found if line.box is not None], image.size))
        if report_masks is not None:
            report_masks(masks)
        return scores

    def _words(self, text: str) -> list[str]:
        return split_words(text, ignore_punctuation=self.ignore_punctuation)


def boxes_mask(boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> np.ndarray | None:
    """Boolean (height, width), true inside the boxes (left, top, right, bottom) in pixels; None without boxes."""
    if not boxes:
        return None
    mask = np.zeros((size[1], size[0]), dtype=bool)
    for left, top, right, bottom in boxes:
        rows = slice(max(0, int(np.floor(top))), max(0, int(np.ceil(bottom))))
        mask[rows, max(0, int(np.floor(left))) : max(0, int(np.ceil(right)))] = True
    return mask
