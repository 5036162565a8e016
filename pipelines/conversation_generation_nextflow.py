"""Control of an answer while it is generated: when it begins an image, when it stops, and its parts as they come."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer


class ImagesBeforeEnding(LogitsProcessor):
    """
    Answers of at least `num_images` images: what would end one before begins the next image instead, and so does text
    that leaves no room for the images still to come, of which each counts as one token.

    Args:
        input_ids (`torch.Tensor` of shape `(rows, length)`): The prompts.
        num_images (`int`): Images that a row must have.
        max_new_tokens (`int`): Tokens of text, with one for each image.
        config ([`NextFlowConfig`]): Knows the tokens that images are written with.
        pad_token_id (`int`): Padding.
        eos_token_ids (`Sequence[int]`): What ends an answer.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        *,
        num_images: int,
        max_new_tokens: int,
        config: Any,
        pad_token_id: int,
        eos_token_ids: Sequence[int],
    ):
        self.num_images = num_images
        self.max_new_tokens = max_new_tokens
        self.boi_token_id = config.boi_token_id
        uncounted = [config.eoi_token_id, config.image_token_id, pad_token_id]
        self.uncounted = torch.tensor(uncounted, device=input_ids.device)
        self.ending = sorted({*eos_token_ids, pad_token_id})
        self.prompts = self._count(input_ids)
        self.was_forced = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _count(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images begun, and tokens that count, of every row."""
        return (ids == self.boi_token_id).sum(1), (~torch.isin(ids, self.uncounted)).sum(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        begun, tokens = (now - before for now, before in zip(self._count(input_ids), self.prompts))
        missing = self.num_images - begun
        needs_image = missing > 0
        # The length that is left is just enough for the missing images.
        forced = needs_image & (tokens + missing >= self.max_new_tokens)
        self.was_forced |= forced
        changed = scores.clone()
        # What would have ended the answer begins an image instead, with the same probability.
        changed[:, self.boi_token_id] = scores[:, [self.boi_token_id, *self.ending]].logsumexp(1)
        changed[:, self.ending] = -float("inf")
        changed[forced] = -float("inf")
        changed[forced, self.boi_token_id] = 0
        return torch.where(needs_image[:, None], changed, scores)


class StopWhen(StoppingCriteria):
    """All rows end once `is_stopped()`; an image that has begun is finished first."""

    def __init__(self, is_stopped: Callable[[], bool]):
        self.is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_stopped(), dtype=torch.bool, device=input_ids.device)


class PartStreamer(TextStreamer):
    """
    Hands `emit` the parts of an answer as they come: `{"type": "text", "text": ...}` with whole words, and
    `{"type": "image", "image": ...}`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        emit: Callable[[dict[str, Any]], None],
        decode_image: Callable[[torch.Tensor, torch.Tensor], Any],
    ):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit
        self.decode_image = decode_image

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Whole words, from transformers' streamer."""
        if text:
            self.emit({"type": "text", "text": text})

    def put_image(self, image_codes: torch.Tensor, image_grids: torch.Tensor) -> None:
        """The codes (codes,) and the schedule (max_scales, 2) of an image, from our transformer."""
        self.end()  # the words before it
        self.next_tokens_are_prompt = False  # what `end` supposes
        self.emit({"type": "image", "image": self.decode_image(image_codes, image_grids)})


def iterate(work: Callable[[Callable[[Any], None]], None], stop: Callable[[], None]) -> Iterator[Any]:
    """
    What `work(emit)` emits, one by one, while it runs in a thread of its own. An exception there is raised here;
    leaving the loop early calls `stop`, and waits for the thread.
    """
    # Unbounded, so the thread never waits for a reader who has left.
    parts: queue.SimpleQueue = queue.SimpleQueue()
    done, failures = object(), []

    @torch.no_grad()  # this, too, is a thread's own
    def run() -> None:
        try:
            work(parts.put)
        except BaseException as error:
            failures.append(error)
        parts.put(done)

    thread = threading.Thread(target=run, name="nextflow-answer", daemon=True)
    thread.start()
    try:
        while (part := parts.get()) is not done:
            yield part
        if failures:
            raise failures[0]
    finally:
        stop()
        thread.join()
