"""lmms-eval's own evaluator with the model `nextflow`, on a task of two rows. Its 90 packages are few people's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.serving import plugins


pytest.importorskip("lmms_eval")

pytestmark = pytest.mark.slow
COLORS = ("red", "blue")
QUESTION = "what color is the square"


FUNCTIONS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def question(doc):
    return "what color is the square"  # as `QUESTION`

def judge(doc, results):
    return {"right": float(doc["answer"] in results[0])}
"""
TASK = """
task: colors
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: !function functions.question
doc_to_target: answer
process_results: !function functions.judge
generation_kwargs: {{max_new_tokens: 8, temperature: 0, until: ["\\n"]}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Whether the model says the color of a square."""
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for color in COLORS:
        image = Image.new("RGB", (64, 64), "white")
        image.paste(color, (20, 20, 44, 44))
        image.save(folder / f"{color}.png")
        rows.append({"image": str(folder / f"{color}.png"), "answer": color})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "colors.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def evaluate(folder, **model_args):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    arguments = {"pretrained": shapes_model_path(), "dtype": "float32", **model_args}
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(
        "nextflow", model_args=text, tasks=["colors"], batch_size=2, bootstrap_iters=0, task_manager=manager
    )


def test_the_entry_point_names_a_model():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(plugins.lmms_eval_manifest())
    assert registry.get_model_class("nextflow").__module__ == "nextflow_hf.serving.lmms_eval_model"


@pytest.fixture(autouse=True)
def known():
    """As the entry point of an installed package does it."""
    from lmms_eval import models

    models.MODEL_REGISTRY_V2.register_manifest(plugins.lmms_eval_manifest(), overwrite=True)


def test_understanding(task_folder):
    results = evaluate(task_folder)
    said = [sample["filtered_resps"][0] for sample in results["samples"]["colors"]]
    pipe = NextFlowPipeline.from_pretrained(shapes_model_path(), dtype=torch.float32)
    for answer, color in zip(said, COLORS, strict=True):
        content = [{"type": "image", "image": str(task_folder / f"{color}.png")}, {"type": "text", "text": QUESTION}]
        assert answer == pipe.chat([{"role": "user", "content": content}], max_new_tokens=8)
    right = sum(color in answer for color, answer in zip(COLORS, said)) / len(COLORS)
    assert results["results"]["colors"]["right,none"] == right


@pytest.mark.parametrize("temperature, asked", [(0, {"do_sample": False}), (0.5, {"temperature": 0.5})])
def test_the_task_says_whether_answers_are_sampled(temperature, asked):
    """Not the model's generation config, in which sampling may be the default."""
    from nextflow_hf.serving.lmms_eval_model import NextFlow

    def chat(conversations, *, max_new_tokens, **sampling):
        assert sampling == asked
        return ["red"]

    model = object.__new__(NextFlow)
    model.pipe = SimpleNamespace(chat=chat)
    assert model._answer([("what", {"temperature": temperature}, None, 0, "task", "test")]) == ["red"]


def test_generation(task_folder, tmp_path):
    results = evaluate(task_folder, mode="generation", output_dir=tmp_path)
    pipe = NextFlowPipeline.from_pretrained(shapes_model_path(), dtype=torch.float32)
    for sample, color in zip(results["samples"]["colors"], COLORS, strict=True):
        (path,) = json.loads(sample["filtered_resps"][0])["images"]
        source = Image.open(sample["doc"]["image"]).convert("RGB")
        generator = torch.Generator().manual_seed(0)
        (expected,) = pipe(QUESTION, image=source, generator=generator).images
        difference = np.asarray(Image.open(path), int) - np.asarray(expected, int)
        assert abs(difference).max() <= 1, color  # a batch is decoded as one, which rounds in another order
