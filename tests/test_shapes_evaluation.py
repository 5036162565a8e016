"""The evaluation of Shapes: a model that knows the answers gets everything right, every kind of mistake is counted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.processing import split_reasoning
from nextflow_hf.training.evaluation.shapes import (
    DEFAULT_COUNTS,
    ShapesFunctions,
    evaluate_shapes,
    main,
    make_parser,
    pipeline_functions,
)
from nextflow_hf.training.evaluation.shapes_report import wilson_interval
from nextflow_hf.training.evaluation.shapes_trials import KINDS, pictures_of, text_of


COUNTS = {kind: 2 * len(KINDS[kind].categories) for kind in KINDS}


def key_of(messages: list) -> str:
    """A conversation as a string, pictures included."""
    parts = [part for message in messages for part in message["content"]]
    return repr([part["text"] if part["type"] == "text" else part["image"].tobytes() for part in parts])


@pytest.fixture(scope="module")
def solutions() -> dict[str, list]:
    trials = [kind.trial(3, index) for name, kind in KINDS.items() for index in range(COUNTS[name])]
    return {key_of(trial.messages): trial.solution for trial in trials}


def scripted(solutions: dict[str, list], change=lambda parts: parts) -> ShapesFunctions:
    """A model that looks its answers up and changes them."""

    def answers(conversations: list) -> list[list]:
        return [change(solutions[key_of(messages)]) for messages in conversations]

    return ShapesFunctions(
        draw=lambda conversations: [pictures_of(parts)[0] for parts in answers(conversations)],
        chat=lambda conversations: [text_of(parts) for parts in answers(conversations)],
        think=answers,
        interleave=answers,
    )


def test_a_perfect_model_gets_everything_right(solutions, tmp_path):
    report = evaluate_shapes(scripted(solutions), COUNTS, seed=3, batch_size=5)
    summary = json.loads(json.dumps(report.to_dict()))
    assert set(summary) == {"seed", *KINDS}
    for kind, count in COUNTS.items():
        assert summary[kind]["overall"] == 1.0 and summary[kind]["all"]["total"] == count
        assert all(rate == 1.0 for rate in summary[kind]["all"]["checks"].values())
        assert {row["total"] for row in summary[kind]["categories"].values()} == {2}
    assert summary["storyline"]["all"]["checks"].keys() == {"pictures", "scenes", "consistent"}
    assert summary["caption"]["all"]["checks"].keys() == {"objects", "background"}
    markdown = report.to_markdown()
    assert "| counting | 2 | 2 | 1.000 |" in markdown and "| Storylines | passed |" in markdown
    sheets = report.save_contact_sheets(tmp_path)
    assert {path.stem for path in sheets} == {kind.plural for kind in KINDS.values()}
    assert all(Image.open(path).size[0] > 400 for path in sheets)


def mirrored(parts: list) -> list:
    """Pictures upside down with their colours turned, and other words."""
    changed = []
    for part in parts:
        if part["type"] == "image":
            pixels = np.asarray(part["image"])[::-1, :, [1, 2, 0]]
            changed.append({**part, "image": Image.fromarray(np.ascontiguousarray(pixels))})
        else:
            changed.append({**part, "text": f"not {part['text']}"})
    return changed


def test_a_model_that_is_wrong_gets_nothing_right(solutions):
    report = evaluate_shapes(scripted(solutions, mirrored), COUNTS, seed=3)
    rates = {kind: report.to_dict()[kind]["overall"] for kind in KINDS}
    settled = ("edit", "caption", "question", "storyline", "example")
    assert {kind: rates[kind] for kind in settled} == dict.fromkeys(settled, 0.0)
    # A prompt for a shape alone leaves colour and background open.
    assert all(rates[kind] < 0.5 for kind in ("prompt", "thinking", "direct"))
    assert report.to_dict()["thinking"]["all"]["checks"]["reasoning"] == 0.0


def test_an_answer_without_its_pictures_is_wrong(solutions, tmp_path):
    def silent(parts: list) -> list:
        return [part for part in parts if part["type"] == "text"]

    functions = scripted(solutions, silent)
    functions = ShapesFunctions(think=functions.think, interleave=functions.interleave)
    report = evaluate_shapes(functions, COUNTS, seed=3)
    assert {kind for kind in KINDS if report.select(kind)} == {"thinking", "storyline"}
    assert not any(item.passed for item in report.results)
    assert report.to_dict()["thinking"]["all"]["checks"] == {"reasoning": 1.0}
    report.save_contact_sheets(tmp_path)


def test_a_caption_counts_its_objects(solutions):
    def forgetful(parts: list) -> list:
        return [{**part, "text": part["text"].replace("circle", "disc")} for part in parts if part["type"] == "text"]

    report = evaluate_shapes(ShapesFunctions(chat=scripted(solutions, forgetful).chat), {"caption": 8}, seed=3)
    for item in report.results:
        trial_text = item.answer
        objects = trial_text.count(" the ")
        assert item.checks["objects"] == pytest.approx(1 - trial_text.count("disc") / objects)
        assert item.passed == ("disc" not in trial_text) and item.checks["background"]
    assert 0 < report.to_dict()["caption"]["overall"] < 1


def test_thinking_and_direct_are_asked_the_same():
    for index in range(10):
        thinking, direct = KINDS["thinking"].trial(0, index), KINDS["direct"].trial(0, index)
        assert thinking.text == direct.text and thinking.messages[1:] == direct.messages
        assert thinking.messages[0]["role"] == "system"


def test_wrong_numbers_and_names_are_refused(solutions):
    functions = ShapesFunctions(draw=lambda conversations: scripted(solutions).draw(conversations)[1:])
    with pytest.raises(ValueError, match="got 4 answers of 'draw' for 5 conversations"):
        evaluate_shapes(functions, {"prompt": 5}, seed=3)
    with pytest.raises(ValueError, match=r"unknown kinds \['prompts'\]"):
        evaluate_shapes(functions, {"prompts": 5})


class FakePipeline:
    """The calls of a pipeline, answered by the first number of the generator or by what it was asked."""

    def __call__(self, *, messages, generator, think=False, guidance_scale=None):
        images = [Image.new("L", (1, 1), one.initial_seed()) for one in generator]
        asked = [text_of(conversation[-1]["content"]) for conversation in messages]
        return SimpleNamespace(images=images, thoughts=asked if think else None, final_prompts=asked)

    def chat(self, messages, *, max_new_tokens, do_sample):
        assert max_new_tokens > 100 and not do_sample
        return [text_of(conversation[-1]["content"]) for conversation in messages]

    def interleave(self, messages, *, max_images, generator, guidance_scale=None):
        seeds = [one.initial_seed() for one in generator]
        return [[{"type": "text", "text": f"{max_images} {seed} {guidance_scale}"}] for seed in seeds]


def test_a_pipeline_is_asked_with_one_generator_per_answer():
    conversations = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in "abc"]
    functions = pipeline_functions(FakePipeline(), 0, guidance_scale=2.0)
    alone = [image for one in conversations for image in functions.draw([one])]
    together = pipeline_functions(FakePipeline(), 0).draw(conversations)
    assert [image.getpixel((0, 0)) for image in alone] == [image.getpixel((0, 0)) for image in together] == [0, 1, 2]
    assert functions.chat(conversations) == ["a", "b", "c"]
    (text, image), *_ = functions.think(conversations)
    assert split_reasoning(text["text"]) == ("a", "a") and image["image"].getpixel((0, 0)) == 3
    assert functions.interleave(conversations[:1]) == [[{"type": "text", "text": "3 6 2.0"}]]


def test_every_kind_has_its_option():
    args = make_parser().parse_args(["--model", "m", "--num-storylines", "7"])
    assert {kind: getattr(args, kind) for kind in KINDS} == DEFAULT_COUNTS | {"storyline": 7}


def test_wilson_interval():
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.490, abs=1e-3) and high == pytest.approx(0.943, abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_the_command_judges_a_checkpoint_of_a_training(tmp_path):
    pipe = NextFlowPipeline.from_pretrained(shapes_model_path())
    torch.manual_seed(0)
    pipe.transformer.lm_head.weight.data.normal_()
    pipe.transformer.save_pretrained(tmp_path / "checkpoint-1")
    rates = []
    for others in ([], ["--transformer", str(tmp_path / "checkpoint-1")]):
        counts = [f"--num-{kind.plural}={4 if name == 'prompt' else 0}" for name, kind in KINDS.items()]
        main(["--model", str(shapes_model_path()), *counts, *others, "--json", str(tmp_path / "report.json")])
        rates.append(json.loads((tmp_path / "report.json").read_text())["prompt"]["overall"])
    assert rates[0] >= 0.5 and rates[1] == 0
