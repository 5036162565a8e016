"""What the tests of the app are run on: a pipeline that answers as a script says, and decodes images no faster than a
test lets it; files to upload."""

import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
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


def picture(path: Path, width: int = 20, height: int = 12) -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return str(path)


def bomb(path: Path, width: int, height: int) -> str:
    """A PNG of a few bytes that says it is that large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return str(path)
