"""A vision language model as the judge, behind any server that speaks OpenAI's chat completions (vLLM, SGLang, ...).

Knows HTTP and nothing of the model that samples. The standard library is enough: no client package.
"""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import math
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from transformers.utils import logging

from .checks import one_line


logger = logging.get_logger(__name__)

QUESTION = (
    "An image was made for this request:\n\n{prompt}\n\nHow well does it fulfil the request, and is it free of "
    'visible errors? Answer with JSON only: {{"score": <number from {low} to {high}>}}'
)
MAX_ANSWER_BYTES, MAX_ERROR_BYTES = 2**20, 2**12
RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}


def parse_score(answer: str) -> float:
    """The number after `"score"` in an answer, or the answer if it is a number. Raises `ValueError` otherwise."""
    found = re.search(r'"score"\s*:\s*"?(-?\d+(?:\.\d+)?)', answer)
    if found is None:
        found = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*", answer)
    if found is None:
        raise ValueError(f"the judge's answer has no score: {answer[:200]!r}")
    return float(found.group(1))


def answer_text(answer: bytes) -> str:
    """The text of a chat completion, without thoughts before it. Raises `ValueError` for anything else."""
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"the answer is no chat completion: {one_line(answer)}") from error
    if not isinstance(text, str):
        raise ValueError(f"the content of the answer is {one_line(text)}, expected a text")
    return without_thoughts(text)


def without_thoughts(text: str) -> str:
    """What a reasoning model says after its thoughts: these may weigh other scores, or the opposite answer."""
    return text.rpartition("</think>")[2]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, new_url):
        reason = f"redirects to {new_url}, set base_url to the address of the server itself"
        raise urllib.error.HTTPError(request.full_url, code, reason, headers, file)


_OPENER = urllib.request.build_opener(_NoRedirect)


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body. The time limit of a socket starts anew with every byte, this one does not."""
    body = b""
    while chunk := response.read1(MAX_ANSWER_BYTES):
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise ValueError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer takes longer than `timeout`")
    if response.length:  # the server announced more
        raise http.client.IncompleteRead(body, response.length)
    return body


def prompt_text(prompt: str | list[dict]) -> str:
    """What the user wrote: the prompt, or the texts of the user's messages."""
    if isinstance(prompt, str):
        return prompt
    texts = []
    for message in prompt:
        content = message["content"]
        if message["role"] == "user":
            texts += [content] if isinstance(content, str) else [part["text"] for part in content if part.get("text")]
    return "\n".join(texts)


class VLMJudge:
    """
    Asks a model for a score of every image; an asynchronous reward between 0 and 1.

    A request that fails for good, or an answer without a score in the range, is NaN for its sample: logged in one line
    and excluded. Redirects are not followed, as they would carry the key elsewhere and lose the images.

    Args:
        base_url (`str`): The server, such as `"http://localhost:8000/v1"`.
        model (`str`): The model's name on the server.
        api_key (`str`, *optional*): Sent as bearer token.
        question (`str`, *optional*): With `{prompt}`, `{low}` and `{high}`; must lead to `{"score": number}`.
        score_range (`tuple[float, float]`, *optional*, defaults to `(0, 10)`): Scores of the worst and the best.
        timeout (`float`, *optional*, defaults to 60): Seconds until the server answers, and until its answer is whole.
        retries (`int`, *optional*, defaults to 3):
            Further attempts after a time-out, a lost connection or a busy server, after 1, 2, 4, ... times `backoff`.
        backoff (`float`, *optional*, defaults to 1): Seconds before the first further attempt.
        concurrency (`int`, *optional*, defaults to 8): Requests at the same time.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        question: str = QUESTION,
        score_range: tuple[float, float] = (0, 10),
        timeout: float = 60,
        retries: int = 3,
        backoff: float = 1,
        concurrency: int = 8,
    ):
        if not score_range[0] < score_range[1]:
            raise ValueError(f"score_range is {score_range}, expected (low, high) with low < high")
        if urllib.parse.urlsplit(base_url).scheme not in ("http", "https"):
            raise ValueError(f"base_url is {base_url!r}, expected an address such as 'http://localhost:8000/v1'")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key has a line break or another character that no header can hold")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model = model
        self.question = question
        self.score_range = score_range
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.num_requests = 0
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="vlm-judge")
        self.__name__ = "vlm_judge"

    async def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[Any],
        source_images: Sequence[Sequence[Image.Image]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        sources = source_images if source_images is not None else [[]] * len(images)
        loop = asyncio.get_running_loop()
        # Threads, as the standard library's client blocks; the pool bounds how many ask at once.
        scores = await asyncio.gather(
            *(
                loop.run_in_executor(self._pool, self.score, image, prompt, given)
                for image, prompt, given in zip(images, prompts, sources, strict=True)
            )
        )
        if log_metric is not None:
            log_metric("vlm_judge/requests", float(self.num_requests))
            log_metric("vlm_judge/failed", sum(map(math.isnan, scores)) / len(scores))
        return list(scores)

    def score(self, image: Image.Image, prompt: Any, source_images: Sequence[Image.Image] = ()) -> float:
        """Score of one image, the sources of an edit shown before it; NaN where the judge did not give one."""
        low, high = self.score_range
        text = self.question.format(prompt=prompt_text(prompt), low=low, high=high)
        content = [image_part(one) for one in (*source_images, image)] + [{"type": "text", "text": text}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        try:
            score = parse_score(answer_text(self._request(body)))
            if not low <= score <= high:
                raise ValueError(f"the score is {score:g}, expected {low} to {high}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = " ".join(str(error).split())
            logger.warning(f"no score from {self.url} for {one_line(prompt)}: {type(error).__name__}: {reason}")
            return math.nan
        return (score - low) / (high - low)

    def _request(self, body: dict) -> bytes:
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            with self._lock:
                self.num_requests += 1
            request = urllib.request.Request(self.url, data, self._headers)
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return _read(response, time.monotonic() + self.timeout)
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED_STATUS or attempt == self.retries:
                    with contextlib.suppress(OSError, http.client.HTTPException):  # a connection that is lost by now
                        if words := error.read1(MAX_ERROR_BYTES):
                            error.msg += f": {one_line(words.decode(errors='replace'))}"
                    raise
            except (OSError, http.client.HTTPException):  # time-outs and lost connections, or no HTTP
                if attempt == self.retries:
                    raise
            time.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")


def image_part(image: Image.Image) -> dict:
    """A content part of a chat completion: the image as PNG in a data URL."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}
