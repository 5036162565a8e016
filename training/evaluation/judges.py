"""A vision language model that answers questions about images: behind an OpenAI-compatible server, or in this process.

Knows no benchmark: it is asked for a text, or for the probability that its first token is one of some.
"""

import http.client
import json
import math
import os
import re
import urllib.error
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..rewards.vlm_judge import VLMJudge, answer_text, image_part, without_thoughts
from .suite import UnscoredError


MAX_NEW_TOKENS = 1024  # of a local model's answer
# What a server says of one request: a filter refuses it, or it is too large.
STATUS_OF_ONE_SAMPLE = {400, 413, 422}
TOP_LOGPROBS = 20  # the most that OpenAI's servers give
_NUMBER = r"-?\d+(?:\.\d+)?"


class Judge(Protocol):
    """What a benchmark asks. `name` stands in the report."""

    name: str

    def ask(self, images: Sequence[Image.Image], text: str) -> str:
        """The likeliest answer to `text`, which follows the images."""

    def probability(self, images: Sequence[Image.Image], text: str, answers: Sequence[str]) -> float:
        """How likely the answer begins with one of `answers`."""


class EndpointJudge(VLMJudge):
    """
    A model behind a server that speaks OpenAI's chat completions; its key is the environment's `OPENAI_API_KEY`.

    Args:
        base_url (`str`): The server, such as `"http://localhost:8000/v1"`.
        model (`str`): The model's name on the server.
        options: Options of [`VLMJudge`], such as `timeout` and `retries`.
    """

    def __init__(self, base_url: str, model: str, **options: Any):
        super().__init__(base_url, model, api_key=os.environ.get("OPENAI_API_KEY") or None, **options)
        self.name = model

    def ask(self, images: Sequence[Image.Image], text: str) -> str:
        answer = self._complete(images, text)
        try:
            return answer_text(answer)
        except ValueError as error:
            raise UnscoredError(str(error)) from error

    def probability(self, images: Sequence[Image.Image], text: str, answers: Sequence[str]) -> float:
        """
        The sum over the answers among the server's 20 likeliest first tokens; what is not among them counts as 0.
        """
        answer = self._complete(images, text, max_tokens=1, logprobs=True, top_logprobs=TOP_LOGPROBS)
        try:
            likeliest = json.loads(answer)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            return sum(math.exp(one["logprob"]) for one in likeliest if one["token"] in answers)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"the judge at {self.url} gives no `top_logprobs`: this benchmark needs a server that does (vLLM, "
                "SGLang), or a local model"
            ) from error

    def _complete(self, images: Sequence[Image.Image], text: str, **options: Any) -> bytes:
        content = [*map(image_part, images), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        try:
            return self._request({"model": self.model, "messages": messages, "temperature": 0, **options})
        except (OSError, http.client.HTTPException) as error:
            words = " ".join(str(error).split())
            if isinstance(error, urllib.error.HTTPError) and error.code in STATUS_OF_ONE_SAMPLE:
                raise UnscoredError(f"the judge at {self.url} refuses it ({words})") from error
            raise OSError(
                f"the judge at {self.url} does not answer ({words}): what is there is kept; "
                "start its server and repeat the command with --score-only"
            ) from error


class LocalJudge:
    """
    A vision language model of transformers.

    Args:
        model (`PreTrainedModel`): Generates text from images and text.
        processor (`ProcessorMixin`): Its processor, with a chat template.
        name (`str`): For the report.
    """

    def __init__(self, model: Any, processor: Any, name: str):
        self.model, self.processor, self.name = model.eval(), processor, name

    @classmethod
    def from_pretrained(cls, source: str) -> "LocalJudge":
        """By Hub id or folder, in the weights' own dtype, on the accelerator where there is one."""
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto").to(device)
        return cls(model, AutoProcessor.from_pretrained(source), source)

    def ask(self, images: Sequence[Image.Image], text: str) -> str:
        output, prompt_length = self._generate(images, text, MAX_NEW_TOKENS)
        texts = self.processor.batch_decode(output.sequences[:, prompt_length:], skip_special_tokens=True)
        return without_thoughts(texts[0])

    def probability(self, images: Sequence[Image.Image], text: str, answers: Sequence[str]) -> float:
        """The sum over the first tokens of the answers, each counted once."""
        output, _ = self._generate(images, text, 1)
        encode = self.processor.tokenizer.encode
        first = sorted({encode(answer, add_special_tokens=False)[0] for answer in answers})
        return output.scores[0][0].float().softmax(-1)[first].sum().item()

    @torch.no_grad()
    def _generate(self, images: Sequence[Image.Image], text: str, limit: int) -> tuple[Any, int]:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, dtype=self.model.dtype)
        options = {"max_new_tokens": limit, "do_sample": False, "output_scores": True}
        output = self.model.generate(**inputs, **options, return_dict_in_generate=True)
        return output, inputs["input_ids"].shape[1]


def check_judge(judge: str | None, model: str | None, suite: str) -> None:
    """
    Raises where a judge cannot be; loads nothing, as a model is to generate first.

    Args:
        judge (`str`, *optional*): The address of a server, or a model by Hub id or folder.
        model (`str`, *optional*): The model's name on the server.
        suite (`str`): What is judged, for the message.
    """
    if judge is None:
        raise ValueError(
            f"{suite} has no score without a judge: name one with --judge (http://HOST:PORT/v1 with --judge-model "
            "NAME, or a vision language model by Hub id or folder), or pass --generate-only"
        )
    if not judge.startswith(("http://", "https://")):
        AutoConfig.from_pretrained(judge)
    elif model is None:
        raise ValueError(f"the server {judge} needs --judge-model, the name of the model that it serves")


def load_judge(judge: str | None, model: str | None, suite: str) -> Judge:
    """The judge of a command line, see [`check_judge`]."""
    check_judge(judge, model, suite)
    return EndpointJudge(judge, model) if judge.startswith("http") else LocalJudge.from_pretrained(judge)


def read_scores(answer: str, count: int, low: float, high: float) -> list[float]:
    """
    The `count` numbers from `low` to `high` of a judge's answer: `"score": 8` or `"score": [8, 7]` as in JSON, else
    the number that ends each line such as `Realism: 2`. Raises [`UnscoredError`] otherwise.
    """
    found = re.search(rf'"scores?"\s*:\s*(\[[^\]]*\]|"?{_NUMBER})', answer)
    lines = rf"(?m)^[^:\n]*:[*\s]*({_NUMBER})[*\s]*$"
    numbers = [float(one) for one in (re.findall(_NUMBER, found.group(1)) if found else re.findall(lines, answer))]
    if len(numbers) != count or not all(low <= number <= high for number in numbers):
        raise UnscoredError(
            f"the judge's answer has the scores {numbers}, expected {count} from {low:g} to {high:g}: {answer[:200]!r}"
        )
    return numbers


def read_yes(answer: str) -> bool:
    """Whether an answer begins with yes; with anything but yes and no it has no score."""
    word = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    if word is None:
        raise UnscoredError(f"the judge's answer is neither yes nor no: {answer[:200]!r}")
    return word.group(1).lower() == "yes"
