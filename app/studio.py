"""What the app does with a pipeline: it samples scale by scale, answers in text and images, and stops.

Knows neither Gradio nor the browser.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


# "width:height", from square to wide; the tall ones are these upside down.
ASPECT_RATIOS = ("1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "21:9", "3:1", "4:1")
RATIO_TOLERANCE = 1.1  # an aspect ratio is offered where the nearest bucket is within 10%
SMALL = 256  # sides below it are shown enlarged, pixel by pixel


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """How one image was made; `None` is the model's own. The same settings make it again."""

    prompt: str
    references: tuple[str, ...] = ()
    seed: int = 0
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    aspect_ratio: str | None = None
    resolution: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the pipeline's arguments that are not the model's own. Without references nothing guides there."""
        settings = {
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale if self.references else None,
            "aspect_ratio": self.aspect_ratio,
            "resolution": self.resolution,
        }
        return {name: value for name, value in settings.items() if value is not None}


class Studio:
    """
    A pipeline that several browsers share. That requests come one after the other is for the app's queue to see to:
    one that begins ends what was left behind.

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
        """The model's own."""
        return self.pipe.get_image_settings()["guidance_scale"]

    @property
    def resolution(self) -> int:
        """The model's own: side in pixels of a square image."""
        return self.pipe.processor.image_processor.resolution

    @property
    def is_small(self) -> bool:
        """Whether images are shown enlarged."""
        return self.resolution < SMALL

    def resolutions(self) -> list[int]:
        """To choose from: the model's own, those above, and those below down to a quarter of it."""
        known = self.pipe.processor.image_processor.schedule.resolutions
        return [resolution for resolution in known if 4 * resolution >= self.resolution]

    def aspect_ratios(self) -> dict[str, tuple[int, int]]:
        """The usual ratios that the model has, each with the (width, height) in pixels of its images."""
        schedule = self.pipe.processor.image_processor.schedule
        num_scales = schedule.num_scales(self.resolution)
        found = {}
        for ratio in (*ASPECT_RATIOS, *(":".join(reversed(one.split(":"))) for one in ASPECT_RATIOS[1:])):
            width, height = (int(side) for side in ratio.split(":"))
            if max(width / height, height / width) > schedule.max_aspect_ratio:
                continue
            bucket = schedule.bucket_from_aspect_ratio(ratio)
            off = bucket[1] / bucket[0] / (width / height)
            size = schedule.pixel_size(bucket, num_scales)[::-1]
            if max(off, 1 / off) <= RATIO_TOLERANCE and size not in found.values():
                found[ratio] = size
        return found

    # ---- what it does

    def generate(self, request: ImageRequest, *, owner: Any = None) -> Iterator[Any]:
        """The image after each scale, as [`~NextFlowPipeline.preview`] gives it, without and with reference images."""
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
        """The parts of the next answer as they come, as [`~NextFlowPipeline.interleave`] gives them."""
        generator = torch.Generator().manual_seed(seed)
        return self._in_turn(
            lambda: self.pipe.interleave(messages, max_images, generator=generator, stream=True), owner
        )

    def stop(self, owner: Any = None) -> bool:
        """Stop what `owner` has running after the scale, the word or the image it is at; whether there was any."""
        if self._running is None or self._owner != owner:
            return False
        self.pipe._interrupt = True
        return True

    def _in_turn(self, start: Callable[[], Iterator], owner: Any) -> Iterator:
        """
        What `start()` iterates over. The lock is held for a step, not from one to the next: a browser that leaves asks
        for no more. What it left is closed by the next request.
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
        except GeneratorExit:  # without waiting: the one who closes may be the server's event loop
            self.stop(owner)
            raise

    def _step(self, running: Iterator) -> Any:
        with self._lock:
            if self._running is not running:
                raise RuntimeError("another request began before this one was done")
            try:
                return next(running)
            except BaseException:  # its end, too
                self._running = self._owner = None
                raise
