"""One thread owns a pipeline: it takes requests from a bounded queue in batches, and stops those that are cancelled.

Requests with the same schedule and settings are sampled as one batch. Each image has its own generator, so in float32
it equals the image sampled alone. A second thread decodes images while the next batch is sampled. Knows no HTTP.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image


logger = logging.getLogger(__name__)

# Caused by a request: an argument that the pipeline refuses. Any other exception is a defect of the server.
REFUSALS = (ValueError, TypeError)


class QueueFull(Exception):
    """
    The queue is full.

    Args:
        seconds (`int`): When to try again, in seconds from now.
    """

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full, try again in {seconds} s")
        self.seconds = seconds


class Stopped(Exception):
    """The worker takes no more requests: the server is shutting down."""


class OutOfTime(Exception):
    """A request was not answered within its time, in seconds."""

    def __init__(self, seconds: float):
        super().__init__(f"the request was not answered within {seconds:g} s")


@dataclass
class Partial:
    """A preview from the first scales; `index` counts the previews of a request."""

    image: Image.Image
    index: int


@dataclass
class Images:
    """The images of a request, and the number of codes of each."""

    images: list[Image.Image]
    codes_per_image: int


@dataclass
class Done:
    """The end of an answer that was sent in parts."""


@dataclass(kw_only=True, eq=False)
class Request:
    """
    What a client asked for.

    Args:
        seed (`int`): Seed of the sampling.
        settings (`dict`): Arguments of the pipeline; requests of a batch have the same.
        emit (`Callable`): Receives each result in the worker's threads: [`Partial`], [`Images`], a part of an answer
            (`dict`), [`Done`], or an exception. Must not block.
        seconds (`float`): Time limit, from `submitted` on.
        submitted (`float`): `time.monotonic()` of its arrival.
        count (`int`): Images that it samples.
    """

    seed: int
    settings: dict[str, Any]
    emit: Callable[[Any], None] = lambda found: None
    seconds: float = 600.0
    submitted: float = field(default_factory=time.monotonic)
    count: int = 1
    _is_cancelled: bool = False

    def cancel(self) -> None:
        """Note that the client is gone: the worker stops after the current scale or token."""
        self._is_cancelled = True

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it: it was cancelled, or its time is up."""
        return self._is_cancelled or time.monotonic() - self.submitted > self.seconds

    @property
    def key(self) -> Hashable:
        """Requests with equal keys can share a batch. By default none can."""
        return id(self)

    @staticmethod
    def run(pipe: Any, requests: list["Request"]) -> list[Callable[[], Any]]:
        """
        Sample for `requests`. Returns a function for each request that does the rest, such as decoding, and returns
        the result; it may run while the next batch is sampled.
        """
        raise NotImplementedError


@dataclass(kw_only=True, eq=False)
class ImageRequest(Request):
    """
    Images of one prompt, or of one conversation.

    Args:
        prompt (`str`, *optional*), messages (`list[dict]`, *optional*): One of the two.
        images (`list[PIL.Image.Image]`): Source images of the prompt.
        mask (`PIL.Image.Image`, *optional*): White where the first of them changes.
        negative_prompt (`str`): Text that guidance leads away from.
        schedule (`Hashable`): Equal for images that have the same scale schedule.
        partial_images (`int`): Number of previews to send before the last scale.
        left_out (`int`): Number of last scales that are not sampled.
    """

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    images: list[Image.Image] = field(default_factory=list)
    mask: Image.Image | None = None
    negative_prompt: str = ""
    schedule: Hashable = None
    partial_images: int = 0
    left_out: int = 0

    @property
    def key(self) -> Hashable:
        # By their `repr`, as lists cannot be hashed.
        settings = tuple(sorted((name, repr(value)) for name, value in self.settings.items()))
        # What all requests of a batch have or lack: the pipeline's arguments are lists for the whole batch.
        kind = (self.prompt is None, bool(self.images), self.mask is None)
        return (ImageRequest, kind, self.schedule, self.count, self.left_out, settings)

    def show(self, pipe: Any, count: int, codes: torch.Tensor, grids: torch.Tensor) -> None:
        """Send a preview after the first `count` scales if one is due. Previews are spread evenly over the scales."""
        most, wanted = pipe.num_timesteps - 1, self.partial_images
        # After equal shares of the scales, and never the last, which is the image itself.
        spread = (round((most + 1) * (index + 1) / (wanted + 1)) for index in range(wanted))
        due = sorted({min(max(one, 1), most) for one in spread if most > 0})
        if count in due and not self.is_over:
            (image,) = pipe.decode_codes(codes, grids, num_scales=count)
            self.emit(Partial(image, due.index(count)))

    @staticmethod
    def inputs(requests: list["ImageRequest"]) -> dict[str, Any]:
        """Return the pipeline's prompts and images for a batch."""
        first = requests[0]
        inputs: dict[str, Any] = {"negative_prompt": [request.negative_prompt for request in requests]}
        if first.prompt is None:
            return {**inputs, "messages": [request.messages for request in requests]}
        inputs["prompt"] = [request.prompt for request in requests]
        if first.images:
            inputs["image"] = [request.images for request in requests]
        if first.mask is not None:
            inputs["mask_image"] = [request.mask for request in requests]
        return inputs

    @staticmethod
    def run(pipe: Any, requests: list["ImageRequest"]) -> list[Callable[[], Images]]:
        first, repeats = requests[0], requests[0].count
        is_whole = first.settings.get("decoder") == "diffusion"  # that decoder reads more than codes
        sampled: dict[str, Any] = {}

        def after_scale(pipe: Any, step: int, scale: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            codes, grids = tensors["image_codes"], tensors["image_grids"]
            sampled.update(codes=codes.shape[1], grids=grids, scales=scale + 1)
            is_enough = 0 < first.left_out >= pipe.num_timesteps - scale - 1
            # One call samples the whole batch, so it stops only when nobody waits for any of its images.
            if is_enough or all(request.is_over for request in requests):
                pipe._interrupt = True
                return {}
            for row, request in enumerate(requests):
                own = slice(row * repeats, row * repeats + 1)
                request.show(pipe, scale + 1, codes[own].flatten(), grids[own])
            return {}

        # The pipeline takes one number of its generator for each image: the images of a request differ, whoever shares
        # the batch.
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        output = pipe(
            **ImageRequest.inputs(requests),
            num_images_per_prompt=repeats,
            generator=[generator for generator in generators for _ in range(repeats)],
            callback_on_step_end=after_scale,
            callback_on_step_end_tensor_inputs=["image_codes", "image_grids"],
            output_type="pil" if is_whole else "codes",
            **first.settings,
        )

        def decode(row: int) -> Images:
            own = slice(row * repeats, (row + 1) * repeats)
            if is_whole:
                return Images(output.images[own], sampled["codes"])
            # Requests are decoded apart: rounding depends on the images that are decoded together.
            codes = output.image_codes.view(len(requests) * repeats, -1)[own].flatten()
            images = pipe.decode_codes(codes, sampled["grids"][own], num_scales=sampled["scales"])
            return Images(images, sampled["codes"])

        return [functools.partial(decode, row) for row in range(len(requests))]


@dataclass(kw_only=True, eq=False)
class ChatRequest(Request):
    """The next answer of a conversation, sent in parts of text and at most `max_images` images."""

    messages: list[dict[str, Any]]
    max_images: int = 0

    @staticmethod
    def run(pipe: Any, requests: list["ChatRequest"]) -> list[Callable[[], Done]]:
        (request,) = requests
        generator = torch.Generator().manual_seed(request.seed)
        parts = pipe.interleave(
            request.messages, request.max_images, generator=generator, stream=True, **request.settings
        )

        def check(*_: Any) -> None:
            if request.is_over:
                raise OutOfTime(request.seconds)

        # Before every token and every scale: a part may take many of them.
        hook = pipe.transformer.model.register_forward_pre_hook(check)
        try:
            with contextlib.suppress(OutOfTime):
                for part in parts:
                    request.emit(part)
        finally:
            parts.close()  # returns when the pipeline is free
            hook.remove()
        return [Done]


class Worker:
    """
    A pipeline and its queue.

    Args:
        pipe ([`NextFlowPipeline`]): The pipeline; nothing else may use it.
        max_queue (`int`): Most requests that wait.
        max_batch (`int`): Most images that are sampled together.
        max_wait (`float`): Seconds that a request waits for others to join its batch.
        decodes_beside (`bool`): Whether to decode images while the next batch is sampled; not with offloaded weights.
        on_batch (`Callable`, *optional*): Called with the requests of each batch before it starts.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        max_queue: int = 64,
        max_batch: int = 8,
        max_wait: float = 0.01,
        decodes_beside: bool = True,
        on_batch: Callable[[list[Request]], None] = lambda batch: None,
    ):
        self.pipe = pipe
        self.max_queue = max_queue
        self.max_batch = max_batch
        self.max_wait = max_wait
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._waiting: list[Request] = []
        self._is_stopped = False
        self._seconds = 1.0  # running average of the time of a batch
        self._decoder = ThreadPoolExecutor(1, "nextflow-decoder") if decodes_beside else None
        self._decoding: list[Future] = []
        pipe.set_progress_bar_config(disable=True)
        self._thread = threading.Thread(target=self._work, name="nextflow-worker", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether the thread that owns the pipeline runs."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Put `request` into the queue, or raise [`QueueFull`] or [`Stopped`]."""
        with self._changed:
            if self._is_stopped or not self.is_alive:
                raise Stopped("the server is shutting down")
            self._drop_what_is_over()
            if len(self._waiting) >= self.max_queue:
                # An estimate: the images that wait, in full batches of average duration.
                batches = sum(waiting.count for waiting in self._waiting) / self.max_batch
                raise QueueFull(max(1, round(batches * self._seconds)))
            self._waiting.append(request)
            self._changed.notify()

    def stop(self) -> None:
        """Refuse new requests, answer those in the queue, and end the threads."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._thread.join()
        if self._decoder is not None:
            self._decoder.shutdown()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._on_batch(batch)
            started = time.monotonic()
            self._answer(batch)
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)

    def _next_batch(self) -> list[Request]:
        """Wait for a request, and for others that can join it; return an empty list once the worker is stopped."""
        with self._changed:
            while True:
                self._drop_what_is_over()
                batch, seconds = self._find_batch()
                if seconds == 0:
                    break
                # Until a request comes, or the oldest has waited long enough.
                self._changed.wait(seconds)
            self._waiting = [request for request in self._waiting if request not in batch]
            return batch

    def _find_batch(self) -> tuple[list[Request], float | None]:
        """Return the next batch and the seconds until it starts; `None` if the queue is empty."""
        if not self._waiting:
            return [], 0 if self._is_stopped else None
        # The oldest request decides: others may overtake to join it, but nothing overtakes the oldest.
        first = self._waiting[0]
        alike = [request for request in self._waiting if request.key == first.key]
        most = max(1, self.max_batch // first.count)
        batch = alike[:most]
        # A conversation shares no batch, so it need not wait for others.
        if self._is_stopped or len(alike) >= most or isinstance(first, ChatRequest):
            return batch, 0
        return batch, max(0, first.submitted + self.max_wait - time.monotonic())

    def _drop_what_is_over(self) -> None:
        self._waiting = [request for request in self._waiting if not _ends(request)]

    def _answer(self, batch: list[Request]) -> None:
        """Run a batch. If it fails, run its requests one by one, so that one cannot fail the others."""
        try:
            rest = type(batch[0]).run(self.pipe, batch)
        except Exception as error:
            if not isinstance(error, REFUSALS):  # a defect, or an accelerator without memory; the server continues
                logger.exception("a batch of %d requests failed", len(batch))
            if len(batch) == 1:
                batch[0].emit(error)
                return
            for request in batch:
                if not _ends(request):
                    self._answer([request])
            return
        if self._decoder is None:
            for request, one in zip(batch, rest, strict=True):
                _finish(request, one)
            return
        wait(self._decoding)  # at most one batch waits to be decoded
        self._decoding = [
            self._decoder.submit(_finish, request, one) for request, one in zip(batch, rest, strict=True)
        ]


def _finish(request: Request, rest: Callable[[], Any]) -> None:
    """Do the rest of a request, and emit its result."""
    if _ends(request):
        return
    try:
        request.emit(rest())
    except Exception as error:
        logger.exception("an answer could not be decoded")
        request.emit(error)


def _ends(request: Request) -> bool:
    """Return whether a request is over; if so, emit [`OutOfTime`]."""
    if request.is_over:
        request.emit(OutOfTime(request.seconds))
    return request.is_over
