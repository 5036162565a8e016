"""The model `nextflow` of lmms-eval: answers questions about images, or samples the images of a task.

python -m lmms_eval --model nextflow --model_args pretrained=MODEL --tasks mme
python -m lmms_eval --model nextflow --model_args pretrained=MODEL,mode=generation,output_dir=out --tasks imgedit
"""

import json
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ..pipelines.pipeline_nextflow import NextFlowPipeline


MODES = ("understanding", "generation")


class NextFlow(lmms):
    """
    Args:
        pretrained (`str`): Folder or Hub id of a pipeline.
        mode (`str`, *optional*, defaults to `"understanding"`): Or `"generation"`: answers are the paths of images.
        output_dir (`str`, *optional*): Where the images of `mode="generation"` go.
        batch_size (`int`, *optional*, defaults to 1), device (`str`, *optional*), dtype (`str`, *optional*):
            As in any model of lmms-eval.
        seed (`int`, *optional*, defaults to 0): Seed of every image.
        options: Arguments of the pipeline for images, such as `guidance_scale`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        mode: str = "understanding",
        output_dir: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,  # of the harness, for models that search for a size
        **options: Any,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {MODES}")
        if mode == "generation" and output_dir is None:
            raise ValueError("mode=generation needs output_dir=FOLDER, where the images go")
        loading = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        self.pipe = NextFlowPipeline.from_pretrained(pretrained, **loading)
        if device is not None:
            self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.mode = mode
        self.output_dir = output_dir and Path(output_dir)
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.options = options

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to the requests, in their order: texts, or paths of sampled images."""
        answer = self._answer if self.mode == "understanding" else self._sample
        answers: list[str] = []
        with tqdm(total=len(requests), disable=self.rank != 0) as progress:
            for batch in _batches([request.args for request in requests], self.batch_size):
                answers += answer(batch)
                progress.update(len(batch))
        return answers

    def _answer(self, batch: list[tuple]) -> list[str]:
        settings = batch[0][1]
        conversations = [
            [{"role": "user", "content": [*({"type": "image", "image": one} for one in images), _text(context)]}]
            for (context, *_), images in zip(batch, map(self._images, batch), strict=True)
        ]
        sampling: dict[str, Any] = {"do_sample": False}  # whatever the model's own default is
        if settings.get("temperature"):
            names = ("temperature", "top_p", "top_k")
            sampling = {name: settings[name] for name in names if settings.get(name) is not None}
        texts = self.pipe.chat(conversations, max_new_tokens=settings.get("max_new_tokens", 128), **sampling)
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        return [min((text.split(stop)[0] for stop in until if stop), key=len, default=text).strip() for text in texts]

    def _sample(self, batch: list[tuple]) -> list[str]:
        """For each request the text and the paths that tasks of generation read."""
        sources = [self._images(one) for one in batch]
        images = self.pipe(
            [context for context, *_ in batch],
            image=sources if any(sources) else None,
            generator=[torch.Generator().manual_seed(self.seed) for _ in batch],
            **self.options,
        ).images
        answers = []
        for (_, _, _, doc_id, task, split), image in zip(batch, images, strict=True):
            path = self.output_dir / task / split / f"{doc_id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            answers.append(json.dumps({"text": "", "images": [str(path)]}))
        return answers

    def _images(self, args: tuple) -> list[Image.Image]:
        _, _, doc_to_visual, doc_id, task, split = args
        return list(doc_to_visual(self.task_dict[task][split][doc_id]) or []) if doc_to_visual is not None else []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raises `NotImplementedError`."""
        raise NotImplementedError("the model nextflow has no loglikelihood: use tasks that generate")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises `NotImplementedError`."""
        raise NotImplementedError("the model nextflow has no rounds: use tasks of a single one")


def _batches(rows: list[tuple], size: int) -> list[list[tuple]]:
    """Rows in their order, cut where the settings of generation change."""
    batches: list[list[tuple]] = []
    for row in rows:
        if batches and len(batches[-1]) < size and batches[-1][0][1] == row[1]:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
