"""`nextflow-hf evaluate`: a suite by import path, resumed at every sample, shared by processes, scored elsewhere."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from accelerate import PartialState
from command_line import use_pipeline
from huggingface_hub import ModelCard
from PIL import Image
from processes import in_processes
from toy_decoder import toy_whole_pipeline
from toy_pipeline import toy_pipeline

from nextflow_hf.training.evaluation.answering import answer_sample
from nextflow_hf.training.evaluation.card import _title
from nextflow_hf.training.evaluation.report import (
    FRAME,
    TILE,
    TRUE_COLOR,
    _sheet,
    summarize,
    to_markdown,
    wilson_interval,
)
from nextflow_hf.training.evaluation.runner import EvaluationRun
from nextflow_hf.training.evaluation.suite import Sample, Turn, images_of, make_suite


TOY = """
from PIL import Image
from nextflow_hf.training.evaluation.suite import Sample, Turn, images_of, text_of

def say(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]

class Toy:
    name = "toy"
    def __init__(self, count):
        self.ids = [f"{kind}-{n}" for n in range(count) for kind in ("image", "talk")]
    def sample(self, id):
        kind, number = id.split("-")
        turns = [Turn("image", say(f"a red circle {number}"))]
        if kind == "talk":
            turns += [Turn("text", say("what is it")), Turn("image", say("make it blue"))]
        true = [Image.new("RGB", (16, 16), "lime")] if kind == "image" else []
        settings = {"height": 16, "width": 16, "max_new_tokens": 2}
        return Sample(id, turns, kind, settings=settings, true_images=true)
    def score(self, sample, answer):
        (image,) = images_of(answer[0])
        return {"passed": len(answer) == len(sample.turns), "corner": image.getpixel((0, 0))[0]}
    def summarize(self, answers, results):
        return {"answers": sum(1 for _ in answers)}

def suite(count: int = 2):
    return Toy(count)
"""


@pytest.fixture
def evaluate(command_line, tmp_path, monkeypatch):
    (tmp_path / "toy_suite.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    use_pipeline(monkeypatch, toy_pipeline())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "NextFlowPipeline"}')

    def run(*argv, mistake=False):
        command = ["evaluate", "toy_suite:suite", "model", *argv]
        return command_line.mistake(*command) if mistake else command_line.run(*command)

    return run


def lines(folder, kind):
    rows = [line for path in folder.glob(f"{kind}-*.jsonl") for line in path.read_text().split("\n") if line]
    return sorted(rows)


def test_the_report_and_what_is_kept(evaluate, tmp_path):
    folder = tmp_path / "out"
    out = evaluate("--output-dir", folder, "--seed", "3", "--set", "guidance_scale=1.5")
    report = json.loads((folder / "report.json").read_text())
    assert report["complete"] and report["groups"]["talk"]["values"]["passed"] == 1 and report["settings"]
    assert report["values"] == {"answers": 4} and "answers: 4" in out
    assert "| talk | samples | passed" in (folder / "report.md").read_text() and str(folder / "talk.png") in out
    with Image.open(folder / "images" / "talk-1-2-0.png") as image:
        assert image.size == (16, 16) and "make it blue" in image.text["prompt"] and image.text["seed"]
        assert json.loads(image.text["settings"])["guidance_scale"] == 1.5
    assert "another --output-dir" in evaluate("--output-dir", folder, "--seed", "4", mistake=True)


def test_evaluations_of_one_suite_are_told_apart():
    options = {
        "folder": "/data",
        "resolution": 64,
        "sizes": [[64, 64], [32, 96]],
        "categories": ["single"],
        "count": 9,
    }
    assert _title({"suite": "emoji", "options": options}) == (
        "emoji, resolution 64, sizes 64x64 and 32x96, categories single"
    )


def test_sheets_have_room_for_long_prompts_and_rows_as_high_as_their_highest():
    tiles = [Image.new("RGB", (128, height), color) for height, color in ((90, "red"), (200, "green"), (90, "blue"))]
    sheet = _sheet([*tiles, *[tiles[0]] * 6])
    assert sheet.height == 200 + 90 and sheet.getpixel((128, 199)) == (0, 128, 0)
    assert sheet.getpixel((0, 201)) == (255, 0, 0) and sheet.getpixel((0, 199)) == (255, 255, 255)


def test_sheets_show_what_is_true_beside_as_many_samples_as_asked_for(evaluate, tmp_path):
    folder = tmp_path / "out"

    def widths(*argv):
        evaluate("--output-dir", folder, *argv)
        with Image.open(folder / "image.png") as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        lime = (pixels[FRAME + TILE // 2] == (0, 255, 0)).all(axis=1).sum()
        blue = (pixels[FRAME + TILE // 2] == TRUE_COLOR).all(axis=1).sum()
        return lime, blue

    assert widths() == (2 * TILE, 4 * FRAME)  # two samples, each with its true image in a blue frame
    assert widths("--score-only", "--sheet-samples", "1") == (TILE, 2 * FRAME)
    assert "--sheet-samples: 0 is out of range" in evaluate("--sheet-samples", "0", mistake=True)


def test_generate_only_then_score_only_is_the_whole(evaluate, tmp_path):
    evaluate("--output-dir", tmp_path / "whole")
    evaluate("--output-dir", tmp_path / "parts", "--generate-only")
    assert not (tmp_path / "parts" / "report.json").exists()
    evaluate("--output-dir", tmp_path / "parts", "--score-only")
    for kind in ("answers", "results"):
        assert lines(tmp_path / "whole", kind) == lines(tmp_path / "parts", kind)
    whole, parts = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "parts"))
    assert whole.pop("provenance")["weights"] == parts.pop("provenance")["weights"] and whole == parts


def test_answers_of_other_weights_are_not_gone_on_with(evaluate, tmp_path, monkeypatch):
    evaluate("--output-dir", tmp_path / "out")
    before = (tmp_path / "out" / "origin.json").read_text()
    trained_on = toy_pipeline()
    trained_on.transformer.model.norm.weight.data.add_(0.1)
    use_pipeline(monkeypatch, trained_on)
    assert "other values of weights" in evaluate("--output-dir", tmp_path / "out", mistake=True)
    assert (tmp_path / "out" / "origin.json").read_text() == before


def test_scores_of_a_judge_that_was_trained_on_in_its_place_are_not_gone_on_with(evaluate, tmp_path, monkeypatch):
    import toy_suite

    judge, folder = torch.nn.Linear(2, 2), tmp_path / "out"
    monkeypatch.setattr(toy_suite.Toy, "judged_by", {"judge_weights": judge, "questions": ["?"]}, raising=False)
    evaluate("--output-dir", folder)
    evaluate("--output-dir", folder, "--score-only")
    known = (folder / "judge.json").read_text()
    assert json.loads(known).items() <= json.loads((folder / "report.json").read_text())["provenance"].items()
    judge.weight.data.add_(0.1)
    assert "other values of judge_weights" in evaluate("--output-dir", folder, "--score-only", mistake=True)
    assert (folder / "judge.json").read_text() == known
    (folder / "judge.json").unlink()  # older evaluations have none
    evaluate("--output-dir", folder, "--score-only")


@pytest.mark.process
def test_processes_share_the_samples_and_leave_their_group(evaluate, tmp_path):
    def main():
        PartialState._reset_state()  # of this process, which forks
        evaluate("--output-dir", tmp_path / "out")
        return torch.distributed.is_initialized()

    assert in_processes(main) == [False, False]
    assert [len(lines_of(tmp_path / "out" / f"answers-{rank}.jsonl")) for rank in range(2)] == [2, 2]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["complete"]


def test_mistakes_are_one_line(evaluate, command_line, tmp_path):
    assert "unexpected keyword argument 'size'" in evaluate("size=3", mistake=True)
    unknown = command_line.mistake("evaluate", "shapes", "nextflow-shapes", "cuont=1")
    assert "the suite shapes, which takes (" in unknown and "got an unexpected keyword argument 'cuont'" in unknown
    assert "expected key=value" in evaluate("size", mistake=True)
    assert "there is no suite 'nonsense', expected" in command_line.mistake("evaluate", "nonsense", "model")
    assert "toy_suite has no 'other', but [" in command_line.mistake("evaluate", "toy_suite:other", "model")
    assert "os:path is module, expected a function" in command_line.mistake("evaluate", "os:path", "model")
    assert "--seed: -1 is out of range, expected 0 to" in evaluate("--seed", "-1", mistake=True)
    assert "--seed: 99999999999999 is out of range" in evaluate("--seed", "99999999999999", mistake=True)
    assert "settings: got an unexpected keyword argument 'guidance'" in evaluate("--set", "guidance=3", mistake=True)
    assert "SUITE and MODEL are missing" in command_line.mistake("evaluate")
    assert "nextflow_hf.worlds.shapes:suite" in command_line.run("evaluate", "--list")


def test_a_suite_may_be_a_file_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "suite_of_mine.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as an installed command has it
    assert make_suite("suite_of_mine:suite", {"count": 1}).ids == ["image-0", "talk-0"]


def test_a_models_card_gets_its_rates_and_sheets_and_none_of_other_weights(
    evaluate, command_line, tmp_path, monkeypatch
):
    for index in range(2):
        evaluate("--output-dir", tmp_path / f"out{index}", f"count={index + 2}")
    readme = tmp_path / "model" / "README.md"
    readme.write_text("---\nlicense: mit\n---\n\n# Mine\n\n## Evaluation\n\nOld.\n\n## Limits\n\nMany.\n")
    command = ["evaluate", "card", "model", "update=true", f"folders=[{tmp_path / 'out0'},{tmp_path / 'out1'}]"]
    command_line.run(*command)
    once = readme.read_text()
    command_line.run(*command)
    assert readme.read_text() == once  # an older section gives way
    text = ModelCard.load(readme).text
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Evaluation", "## Limits"]
    assert "Old." not in text and text.count("### toy_suite:suite\n") == 2
    assert "| | samples | passed | 95% interval | corner |" in text and "| **talk** | 3 | 1 | 0.44 to 1.00 |" in text
    assert "Only the first" not in text and "| **talk** | 2 |" not in text.split("### toy_suite:suite")[2]
    assert "![talk: the first samples, none left out" in text and str(tmp_path) not in text
    assert (tmp_path / "model" / "evaluation-2-talk.png").read_bytes() == (tmp_path / "out1" / "talk.png").read_bytes()
    rates = {one.dataset_name: one.metric_value for one in ModelCard.load(readme).data.eval_results}
    assert rates == {"toy_suite:suite: image": 1, "toy_suite:suite: talk": 1}
    other = toy_pipeline()
    other.vision_tokenizer.pixel_decoder.conv_in.weight.data.add_(0.1)
    use_pipeline(monkeypatch, other)
    assert "an evaluation of other weights than" in command_line.mistake(*command)


class Numbers:
    """A suite without a model."""

    name = "numbers"
    ids = [f"n{index}" for index in range(7)]

    def sample(self, id):
        return Sample(id, [Turn("image", [])], "numbers")

    def score(self, sample, answer):
        return {"value": np.asarray(images_of(answer[0])[0])[0, 0, 0]}


DESCRIPTION = {"suite": "numbers", "model": "none", "seed": 0}


def answer(sample, seed):
    return [[{"type": "image", "image": Image.new("RGB", (2, 2), (int(sample.id[1:]) * 9, 0, 0))}]]


def run_in(folder, rank=0, ranks=1):
    run = EvaluationRun(Numbers(), folder, DESCRIPTION)
    run.state = type(
        "State",
        (),
        {
            "process_index": rank,
            "num_processes": ranks,
            "is_main_process": rank == 0,
            "wait_for_everyone": lambda self: None,
        },
    )()
    return run


@pytest.mark.parametrize("cut", ['{"id": "n3", "answer": [[{"ty', '{"id": "n3", "answer": [[{"type": "text"}'])
def test_a_kill_loses_at_most_the_sample_in_work(tmp_path, cut):
    run_in(tmp_path / "whole").generate(answer)
    asked = []

    def dying(sample, seed):
        asked.append(sample.id)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return answer(sample, seed)

    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "parts").generate(dying)
    file = tmp_path / "parts" / "answers-0.jsonl"
    file.write_text(file.read_text() + cut)  # as a kill leaves it
    run = run_in(tmp_path / "parts")
    assert set(run.rows("answers")) == {"n0", "n1", "n2"}
    run.generate(dying)
    assert asked == ["n0", "n1", "n2", "n3", "n3", "n4", "n5", "n6"]
    assert run.rows("answers") == run_in(tmp_path / "whole").rows("answers")
    assert not list(tmp_path.rglob("*.tmp*"))


def test_processes_share_what_is_left(tmp_path):
    run_in(tmp_path / "one").generate(answer)
    for rank in range(2):  # each sees what was done before either began
        run = run_in(tmp_path / "two", rank, 2)
        run.rows = lambda kind: {}
        run.generate(answer)
    counts = [len(lines_of(tmp_path / "two" / f"answers-{rank}.jsonl")) for rank in range(2)]
    assert sorted(counts) == [3, 4]
    assert run_in(tmp_path / "two").rows("answers") == run_in(tmp_path / "one").rows("answers")


def lines_of(path):
    return [line for line in path.read_text().split("\n") if line]


def test_rates_means_and_intervals():
    rows = [
        {"group": "g", "category": category, "scores": {"passed": passed, **more}}
        for category, passed, more in [("a", 1, {"x": 2}), ("a", 1, {}), ("b", 0, {"x": 4}), ("b", 1, {"x": math.nan})]
    ]
    found = summarize(rows)["g"]
    assert found["total"] == 4 and found["values"] == {"passed": 0.75, "x": 3.0}
    assert found["overall"] == 0.75 and found["categories"]["b"]["values"]["passed"] == 0.5
    rows[2]["scores"] = rows[3]["scores"] = {"x": 4}
    summary = {"values": {}, "groups": summarize(rows)}
    assert "| a | 2 | 1.000 | 0.342 to 1.000 | 2.000 |\n| b | 2 |  |  | 4.000 |" in to_markdown("t", summary)
    assert found["interval"] == wilson_interval(3, 4) and wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)


def test_reconstruction_is_what_the_tokenizer_gives_back(command_line, tmp_path, monkeypatch):
    pipe = toy_pipeline()
    use_pipeline(monkeypatch, pipe)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "NextFlowPipeline"}')
    (tmp_path / "images").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for index, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    command_line.run("evaluate", "reconstruction", "model", "data=images", "--output-dir", "out")
    found = json.loads((tmp_path / "out" / "report.json").read_text())["groups"]["reconstruction"]
    assert found["total"] == 3 and set(found["values"]) == {"psnr", "ssim", "gmsd", "sharpness"}
    processor, expected = pipe.processor.image_processor, []
    for pixels in values:
        inputs = processor(Image.fromarray(pixels), return_tensors="pt")
        codes = pipe.vision_tokenizer.encode(inputs["pixel_values"], inputs["image_grids"]).image_codes
        decoded = pipe.vision_tokenizer.decode(codes, inputs["image_grids"]).detach()
        expected.append(-10 * np.log10(((decoded - inputs["pixel_values"]) / 2).square().mean().item()))
    assert found["values"]["psnr"] == pytest.approx(np.mean(expected), abs=0.02)
    # A bad image leaves no second sample of the next one.
    (tmp_path / "images" / "1.png").write_bytes(b"broken")
    (tmp_path / "data.yaml").write_text("sources: [{path: images, task: image}]\non_bad_row: skip\n")
    command_line.run("evaluate", "reconstruction", "model", "data=data.yaml", "--output-dir", "skipped")
    report = json.loads((tmp_path / "skipped" / "report.json").read_text())
    assert report["groups"]["reconstruction"]["total"] == 2 and not report["complete"]
    left = np.mean([expected[0], expected[2]])
    assert report["groups"]["reconstruction"]["values"]["psnr"] == pytest.approx(left, abs=0.02)


def test_a_decoder_of_twice_the_size_is_compared_with_the_enlarged_images_of_the_tokenizer(
    command_line, tmp_path, monkeypatch
):
    pipe = toy_whole_pipeline()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    turn = Turn("reconstruct", [{"role": "user", "content": [{"type": "image", "image": image}]}])
    sample = Sample("a", [turn], "reconstruction", settings={"resolution": 16, "upscale_factor": 2})
    codes, grids = pipe.encode_images(image, resolution=16)
    true, enlarged = images_of(answer_sample(pipe, sample, 3, {})[0])
    assert true.tobytes() == image.tobytes()
    assert enlarged == pipe.decode_codes(codes, grids)[0].resize((32, 32), Image.Resampling.BICUBIC)
    settings = {"decoder": "diffusion", "decoder_num_inference_steps": 2, "decoder_strength": 0.5}
    again, decoded = images_of(answer_sample(pipe, sample, 3, settings)[0])
    (expected,) = pipe.diffusion_decoder_pipeline(
        codes, grids, num_inference_steps=2, strength=0.5, generator=torch.Generator().manual_seed(3)
    ).images
    assert again == true and decoded == expected.resize((32, 32), Image.Resampling.BICUBIC) != enlarged
    for wrong in ({"decoder": "vae"}, {"decoder_strength": 0.5}):
        with pytest.raises(ValueError, match="expected decoder=diffusion with decoder_strength and the like"):
            answer_sample(pipe, sample, 3, wrong)
    # The figures are those of this decoder.
    use_pipeline(monkeypatch, pipe)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "NextFlowPipeline"}')
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "0.png")
    evaluation = ["evaluate", "reconstruction", "model", "data=images", "upscale_factor=2", "--output-dir", "out"]
    evaluation += ["--set", "decoder=diffusion", "decoder_num_inference_steps=2"]
    command_line.run(*evaluation)
    pipe.diffusion_decoder.condition_projection.weight.data.add_(0.1)
    assert "other values of weights" in command_line.mistake(*evaluation)
