"""The app around a toy pipeline that answers as a script says, and decodes images no faster than a test lets it."""

import threading

import torch
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline


def scripted_pipeline(before: str = "first, a circle ", after: str = " and no more") -> NextFlowPipeline:
    """A toy each of whose answers is `before`, an image, and `after`."""
    pipe = toy_pipeline()
    tokenizer = pipe.processor.tokenizer
    script = [*tokenizer.encode(before), pipe.processor.boi_token_id]
    script += [*tokenizer.encode(after), tokenizer.eos_token_id]
    written = 0

    def recite(module, args, logits):
        nonlocal written
        wanted = torch.full_like(logits, -1e4)
        wanted[..., script[written % len(script)]] = 0
        written += 1
        return wanted

    pipe.transformer.lm_head.register_forward_hook(recite)  # images are drawn without it
    interleave = pipe.interleave

    def interleave_from_the_start(*args, **kwargs):
        nonlocal written
        written = 0
        return interleave(*args, **kwargs)

    pipe.interleave = interleave_from_the_start
    return pipe


class Gate:
    """Holds a pipeline before it decodes: `let(n)` lets it decode `n` times, `open()` as often as it likes."""

    def __init__(self, pipe: NextFlowPipeline):
        self._places = threading.Semaphore(0)
        self._is_open = True
        decode = pipe.decode_codes

        def decode_codes(*args, **kwargs):
            if not self._is_open and not self._places.acquire(timeout=120):
                raise TimeoutError("nobody opened the gate")
            return decode(*args, **kwargs)

        pipe.decode_codes = decode_codes

    def close(self) -> None:
        self._places, self._is_open = threading.Semaphore(0), False

    def let(self, count: int) -> None:
        self._places.release(count)

    def open(self) -> None:
        self._is_open = True
        self._places.release(1000)
