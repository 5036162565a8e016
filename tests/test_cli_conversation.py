"""`nextflow-hf chat`, `interleave` and `frames`: what the pipeline says and draws, on the console and as files."""

import importlib.util
import inspect
import io
import itertools
import json

import pytest
import torch
from command_line import pixels, save_picture, use_pipeline
from PIL import Image
from toy_pipeline import spelling_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.commands import frames, interleave
from nextflow_hf.commands.records import read_record


METHODS = ("__call__", "interleave", "frames")
DRAWING = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 8}
OPTIONS = ["--guidance-scale", 3, "--temperature", 1, "--top-k", 8]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def user(text: str, *images) -> dict:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    return spelling_pipeline()


@pytest.fixture
def toy(pipe, monkeypatch) -> str:
    """The name of a model, for which commands load `pipe`."""
    use_pipeline(monkeypatch, pipe)
    return "toy/model"


def type_in(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_settings_are_the_pipelines_arguments():
    of = {method: set(inspect.signature(getattr(NextFlowPipeline, method)).parameters) for method in METHODS}
    assert set(interleave.SETTINGS) <= of["interleave"]
    assert set(frames.SETTINGS) <= of["frames"] | of["interleave"] | of["__call__"]  # `**settings` are theirs


# --- chat


def test_an_answer(command_line, pipe, toy, tmp_path):
    image = save_picture(tmp_path / "image.png")
    run = ["chat", "hi", "--image", image, "--model", toy, "--max-new-tokens", 9]
    expected = pipe.chat([user("hi", image)], max_new_tokens=9)
    assert len(expected) == 9 and command_line.run(*run) == expected + "\n"
    said = command_line.json(*run, "--seed", 4)
    turns = [{"prompt": "hi", "answer": expected, "images": [str(image)]}]
    assert said == {
        "command": "chat",
        "model": toy,
        "device": "cpu",
        "dtype": "float32",
        "seed": 4,
        "answer": expected,
        "turns": turns,
    }


def test_a_sampled_answer_has_a_seed(command_line, pipe, toy):
    settings = {"temperature": 5.0, "top_k": 9, "top_p": 0.9, "max_new_tokens": 9}
    run = ["chat", "hi", "--model", toy, "--temperature", 5, "--top-k", 9, "--top-p", 0.9, "--max-new-tokens", 9]
    assert command_line.run(*run, "--seed", 4) == pipe.chat([user("hi")], generator=seeded(4), **settings) + "\n"


def test_a_question_at_the_end_of_a_conversation(command_line, pipe, toy, tmp_path):
    history = [{"role": "system", "content": "s"}, user("hi"), {"role": "assistant", "content": "yes"}]
    (tmp_path / "messages.json").write_text(json.dumps(history))
    run = ["chat", "why", "--messages", "messages.json", "--model", toy, "--max-new-tokens", 9]
    assert command_line.run(*run) == pipe.chat([*history, user("why")], max_new_tokens=9) + "\n"
    assert "in --messages it is the first message" in command_line.mistake(*run, "--system", "s")


def test_a_conversation_line_by_line(command_line, pipe, toy, tmp_path, monkeypatch):
    image = save_picture(tmp_path / "image.png")
    type_in(
        monkeypatch, "hi", "", "/image image.png", "and this", "/generate a circle", "what is it", "/quit", "never"
    )
    run = ["chat", "--system", "s", "--model", toy, "--max-new-tokens", 9, "--seed", 4, "--output", "drawn"]
    said = command_line.json(*run)
    talk, generator = pipe.start_conversation("s"), seeded(4)
    first = talk.chat("hi", max_new_tokens=9, generator=generator)
    second = talk.chat("and this", image, max_new_tokens=9, generator=generator)
    drawn = talk.generate_image("a circle", generator=generator)
    third = talk.chat("what is it", max_new_tokens=9, generator=generator)
    assert said["turns"] == [
        {"prompt": "hi", "answer": first, "images": []},
        {"prompt": "and this", "answer": second, "images": [str(image)]},
        {"prompt": "a circle", "path": "drawn/a-circle-4.png", "images": []},
        {"prompt": "what is it", "answer": third, "images": []},
    ]
    assert said["answer"] == third
    assert pixels("drawn/a-circle-4.png")[1] == drawn.tobytes()
    record = read_record("drawn/a-circle-4.png")
    assert record.command == "chat" and record.arguments["messages"][0] == {"role": "system", "content": "s"}
    assert "was made by `nextflow-hf chat`" in command_line.mistake("generate", "--from-image", "drawn/a-circle-4.png")


def test_a_mistake_does_not_end_a_conversation(command_line, toy, monkeypatch):
    type_in(monkeypatch, "/image none.png", "/dance", "/help", "hi")
    said = command_line.run("chat", "--model", toy, "--max-new-tokens", 9, status=1)
    assert len(said) == 10
    assert "none.png does not exist" in command_line.errors and command_line.errors.count("/generate TEXT") == 2


def test_mistakes_in_a_chat(command_line, toy):
    run = ["chat", "hi", "--model", toy]
    assert "`max_new_tokens` is 0" in command_line.mistake(*run, "--max-new-tokens", 0)
    assert "expected one, in quotes" in command_line.mistake("chat", "hi", "there", "--model", toy)
    assert "none.png does not exist" in command_line.mistake(*run, "--image", "none.png")
    assert "expected a folder" in command_line.mistake("chat", "--model", toy, "--output", "a.png")


# --- interleave


@pytest.fixture(scope="module")
def story(pipe) -> tuple[int, list[dict]]:
    """A seed with which two images come in an answer, and the answer."""
    for seed in range(50):
        settings = {"max_images": 2, "max_new_tokens": 16, "do_sample": True, "text_temperature": 1.0}
        parts = pipe.interleave([user("tell")], generator=seeded(seed), **settings, **DRAWING)
        if sum(part["type"] == "image" for part in parts) == 2:
            return seed, parts
    raise AssertionError("no seed gives two images")


def test_an_answer_of_text_and_images(command_line, toy, story):
    seed, parts = story
    run = ["interleave", "tell", "--model", toy, "--seed", seed, "--max-images", 2, "--max-new-tokens", 16, *OPTIONS]
    said = command_line.json(*run, "--text-temperature", 1, "--output", "story")
    kinds = [part["type"] for part in parts]
    assert [part["type"] for part in said["parts"]] == kinds
    drawn = [part["image"] for part in parts if part["type"] == "image"]
    for number, image in enumerate(drawn, start=1):
        assert pixels(f"story/{number}.png") == (image.size, image.tobytes())
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    assert "".join(part.get("text", "") for part in said["parts"]) == text
    with open("story/answer.md") as file:
        assert file.read().count("![](") == 2

    shown = command_line.run(*run, "--text-temperature", 1, "--output", "other")
    assert "[other/1.png]" in shown and "[other/2.png]" in shown


def test_an_interrupted_answer_keeps_what_there_is_of_it(command_line, toy, monkeypatch, tmp_path):
    def answer(*args, **kwargs):
        yield {"type": "text", "text": "a"}
        yield {"type": "text", "text": "b"}
        raise KeyboardInterrupt

    monkeypatch.setattr(NextFlowPipeline, "interleave", answer)
    command_line.run("interleave", "tell", "--model", toy, "--output", "story", status=130)
    assert (tmp_path / "story" / "answer.md").read_text() == "ab\n"
    messages = json.loads((tmp_path / "story" / "messages.json").read_text())
    assert messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": "ab"}]}
    monkeypatch.setattr(NextFlowPipeline, "interleave", lambda *args, **kwargs: itertools.islice(answer(), 2, None))
    command_line.run("interleave", "tell", "--model", toy, "--output", "empty", status=130)
    assert not (tmp_path / "empty").exists()


def test_an_answer_is_repeated_from_any_of_its_images(command_line, toy, story):
    seed, _ = story
    run = ["interleave", "tell", "--model", toy, "--seed", seed, "--max-images", 2, "--max-new-tokens", 16, *OPTIONS]
    command_line.run(*run, "--text-temperature", 1, "--output", "story")
    assert command_line.json("interleave", "--from-image", "story/2.png", "--output", "again")["identical"] is True
    assert pixels("again/1.png") == pixels("story/1.png")
    other = ["interleave", "--from-image", "story/2.png", "--seed", seed + 1, "--output", "other"]
    assert command_line.json(*other)["identical"] is None


def test_a_conversation_goes_on_from_its_folder(command_line, pipe, toy, story, tmp_path):
    seed, parts = story
    image = save_picture(tmp_path / "image.png")
    run = ["interleave", "tell", "--image", image, "--model", toy, "--seed", seed, "--max-images", 2]
    command_line.run(*run, "--max-new-tokens", 16, *OPTIONS, "--text-temperature", 1, "--output", "story")
    messages = json.loads((tmp_path / "story" / "messages.json").read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"][0] == {"type": "image", "path": str(image)}
    paths = [part["path"] for part in messages[1]["content"] if part["type"] == "image"]
    assert paths == [f"{number}.png" for number in range(1, len(paths) + 1)]
    answer = command_line.run(
        "chat", "why", "--messages", "story/messages.json", "--model", toy, "--max-new-tokens", 9
    )

    def opened(part):
        folder = tmp_path / "story"
        return {"type": "image", "image": folder / part["path"]} if part["type"] == "image" else part

    shown = [{**message, "content": [opened(part) for part in message["content"]]} for message in messages]
    assert answer == pipe.chat([*shown, user("why")], max_new_tokens=9) + "\n"


def test_an_answer_does_not_overwrite_the_conversation_that_it_goes_on_from(command_line, toy, story):
    seed, _ = story
    run = ["interleave", "tell", "--model", toy, "--seed", seed, "--max-images", 2, "--max-new-tokens", 16, *OPTIONS]
    command_line.run(*run, "--text-temperature", 1, "--output", "story")
    before = pixels("story/1.png")
    on = ["interleave", "go on", "--messages", "story/messages.json", *run[2:], "--seed", seed + 1]
    said = command_line.mistake(*on, "--text-temperature", 1, "--output", "story")
    assert "--output is story, where 1.png is an image of the conversation" in said
    assert pixels("story/1.png") == before
    command_line.run(*on, "--text-temperature", 1, "--output", "story/more")


def test_mistakes_in_an_answer(command_line, toy, tmp_path):
    assert "got no text" in command_line.mistake("interleave", "--model", toy)
    assert "got images without a text" in command_line.mistake("interleave", "--image", "a.png", "--model", toy)
    said = command_line.mistake("interleave", "tell", "--max-images", -1, "--model", toy)
    assert "`max_images` is -1" in said
    (tmp_path / "file").touch()
    assert "is the file file" in command_line.mistake("interleave", "tell", "--output", "file", "--model", toy)


# --- frames


def test_frames_of_texts(command_line, pipe, toy):
    run = ["frames", "a", "b", "c", "--model", toy, "--seed", 2, *OPTIONS, "--frames-dir", "each"]
    said = command_line.json(*run, "--output", "story.gif")
    expected = pipe.frames(["a", "b", "c"], generator=seeded(2), **DRAWING)
    assert said["texts"] == ["a", "b", "c"] and said["frames"] == ["each/1.png", "each/2.png", "each/3.png"]
    for path, frame in zip(said["frames"], expected.frames, strict=True):
        assert pixels(path)[1] == frame.tobytes()
    assert Image.open("story.gif").n_frames == 3
    assert command_line.json("frames", "--from-image", "each/2.png", "--output", "again.gif")["identical"] is True


def test_frames_of_no_name_given_overwrite_nothing(command_line, toy):
    run = ["frames", "a", "b", "--model", toy, "--seed", 5]
    assert [command_line.json(*run, *more)["output"] for more in ([], OPTIONS)] == ["a-5.gif", "a-5-2.gif"]


def test_what_writes_no_video_is_said_before_frames_are_sampled(command_line, toy, monkeypatch):
    find_spec, video = importlib.util.find_spec, ("imageio", "imageio_ffmpeg")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if name in video else find_spec(name, *of))
    monkeypatch.setattr(NextFlowPipeline, "frames", lambda *args, **kwargs: pytest.fail("frames were sampled"))
    monkeypatch.setattr(NextFlowPipeline, "__call__", lambda *args, **kwargs: pytest.fail("an image was sampled"))
    for run in (["frames", "a", "b", "--output", "a.mp4"], ["generate", "a", "--preview", "a.mp4"]):
        assert 'pip install "nextflow-hf[video]"' in command_line.mistake(*run, "--model", toy)


def test_frames_of_a_told_story_on_a_contact_sheet(command_line, pipe, toy):
    run = ["frames", "tell", "--num-frames", 3, "--model", toy, "--seed", 2, "--max-new-tokens", 20, *OPTIONS]
    said = command_line.json(*run, "--output", "sheet.png", "--columns", 2)
    expected = pipe.frames("tell", 3, max_new_tokens=20, generator=seeded(2), **DRAWING)
    assert said["texts"] == expected.texts and len(expected.frames) == 3
    sheet = expected.contact_sheet(columns=2)
    assert sheet.size == (32, 32) and pixels("sheet.png") == (sheet.size, sheet.tobytes())
    assert command_line.json("frames", "--from-image", "sheet.png", "--output", "again.png")["identical"] is True
    assert pixels("again.png") == pixels("sheet.png")
    shown = command_line.run(*run, "--output", "sheet.png").splitlines()
    assert shown[0] == "sheet.png" and len(shown) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "got no storyline"),
        (["a"], "needs --num-frames"),
        (["a", "b", "--num-frames", 3], "`num_frames` is 3 for a storyline of 2"),
        (["a", "b", "--text-top-k", 3], "nothing is written between its frames"),
        (["a", "b", "--output", "a.avi"], "expected one of .gif, .mp4, .png"),
        (["a", "b", "--fps", 0], "--fps: 0 is out of range"),
    ],
)
def test_mistakes_in_frames(command_line, toy, argv, message):
    assert message in command_line.mistake("frames", *argv, "--model", toy)
