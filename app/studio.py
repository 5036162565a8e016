"""Runs the pipeline for the app: images scale by scale, answers part by part, one request at a time, with a stop.

Knows neither Gradio nor the browser.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


# "width:height", from square to wide; [`Studio.aspect_ratios`] adds the tall ones.
ASPECT_RATIOS = ("1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "21:9", "3:1", "4:1")
RATIO_TOLERANCE = 1.1  # an aspect ratio is offered where the nearest bucket is within 10%
SMALL = 256  # pixels; smaller images are shown enlarged, without smoothing


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Settings of one image, which make it again; `None` stands for the model's default."""

    prompt: str
    references: tuple[str, ...] = ()
    seed: int = 0
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    aspect_ratio: str | None = None
    resolution: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the pipeline that differ from the model's defaults; no image guidance without references."""
        settings = {
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale if self.references else None,
            "aspect_ratio": self.aspect_ratio,
            "resolution": self.resolution,
        }
        return {name: value for name, value in settings.items() if value is not None}


class Studio:
    """
    A pipeline that several browsers share, one request at a time. The app's queue orders the requests; a new one
    closes the one before it, which a browser may have left unfinished.

    Args:
        pipe ([`NextFlowPipeline`]): Makes images and answers. Nobody else may use it meanwhile.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)
        self._lock = threading.Lock()
        self._running: Iterator | None = None
        self._owner: Any = None

    # ---- what the model offers

    @property
    def guidance_scale(self) -> float | Sequence[float]:
        """The model's default."""
        return self.pipe.get_image_settings()["guidance_scale"]

    @property
    def resolution(self) -> int:
        """The model's default: side of a square image in pixels."""
        return self.pipe.processor.image_processor.resolution

    @property
    def is_small(self) -> bool:
        """Whether images are shown enlarged."""
        return self.resolution < SMALL

    def resolutions(self) -> list[int]:
        """Resolutions to choose from: the model's default, all above it, and those below down to a quarter of it."""
        known = self.pipe.processor.image_processor.schedule.resolutions
        return [resolution for resolution in known if 4 * resolution >= self.resolution]

    def aspect_ratios(self) -> dict[str, tuple[int, int]]:
        """The usual aspect ratios that the model can sample, with the (width, height) of their images in pixels."""
        schedule = self.pipe.processor.image_processor.schedule
        num_scales = schedule.num_scales(self.resolution)
        found = {}
        for ratio in (*ASPECT_RATIOS, *(":".join(reversed(one.split(":"))) for one in ASPECT_RATIOS[1:])):
            width, height = (int(side) for side in ratio.split(":"))
            if max(width / height, height / width) > schedule.max_aspect_ratio:
                continue
            bucket = schedule.bucket_from_aspect_ratio(ratio)
            error = bucket[1] / bucket[0] / (width / height)
            size = schedule.pixel_size(bucket, num_scales)[::-1]
            if max(error, 1 / error) <= RATIO_TOLERANCE and size not in found.values():
                found[ratio] = size
        return found

    # ---- what it does

    def generate(self, request: ImageRequest, *, owner: Any = None) -> Iterator[Any]:
        """Yield the image after each scale, as [`~NextFlowPipeline.preview`] does, with or without references."""
        references = list(request.references)
        return self._in_turn(
            lambda: self.pipe.preview(
                request.prompt,
                image=references or None,
                generator=torch.Generator().manual_seed(request.seed),
                **request.settings,
            ),
            owner,
        )

    def answer(
        self, messages: list[dict[str, Any]], *, max_images: int, seed: int, owner: Any = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the parts of the next answer, text and images, as [`~NextFlowPipeline.interleave`] does."""
        generator = torch.Generator().manual_seed(seed)
        return self._in_turn(
            lambda: self.pipe.interleave(messages, max_images, generator=generator, stream=True), owner
        )

    def stop(self, owner: Any = None) -> bool:
        """Stop the request of `owner` after the current scale or token; return whether one was running."""
        if self._running is None or self._owner != owner:
            return False
        self.pipe._interrupt = True
        return True

    def _in_turn(self, start: Callable[[], Iterator], owner: Any) -> Iterator:
        """
        Yield what `start()` iterates over. The lock is held during a step, not between steps: a browser that leaves
        asks for no more steps and would never release it. The next request closes what it left.
        """
        with self._lock:
            if self._running is not None:
                self._running.close()
            self._running = self._owner = None
            running = start()
            self._running, self._owner = running, owner
        try:
            while True:
                try:
                    item = self._step(running)
                except StopIteration:
                    return
                yield item
        except GeneratorExit:  # stop without waiting: the server's event loop may be closing this
            if self._running is running:  # not another request of the same owner
                self.pipe._interrupt = True
            raise

    def _step(self, running: Iterator) -> Any:
        with self._lock:
            if self._running is not running:
                raise RuntimeError("another request began before this one was done")
            try:
                return next(running)
            except BaseException:  # also StopIteration, its end
                self._running = self._owner = None
                raise
