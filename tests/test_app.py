"""The app without a browser: what it lets in, how requests share a pipeline, what its buttons do, what it serves."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
import torch
from PIL import Image
from toy_app import bomb, picture, scripted_pipeline
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.app import command
from nextflow_hf.app.interface import App, Conversation, chat_of
from nextflow_hf.app.server import is_loopback, serve, warnings_about
from nextflow_hf.app.studio import ImageRequest, Studio
from nextflow_hf.app.uploads import MAX_IMAGES, check_image, check_images
from nextflow_hf.commands import edit, generate


ANNA, BERT = SimpleNamespace(session_hash="anna"), SimpleNamespace(session_hash="bert")


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    return scripted_pipeline()


@pytest.fixture
def studio(pipe) -> Studio:
    return Studio(pipe)


@pytest.fixture
def app(studio, tmp_path) -> App:
    return App(studio, str(tmp_path), name="a <toy>", prompts=("a circle",), conversations=("hello",))


# ---- uploads


def test_images_are_judged_by_their_header(tmp_path, monkeypatch):
    good = picture(tmp_path / "good.png")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(Path(good).read_bytes()[:60])  # its pixels are the image processor's business
    text = tmp_path / "text.png"
    text.write_text("no image")
    drawing = tmp_path / "drawing.eps"
    Image.open(good).save(drawing)

    def decode(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for path in (good, truncated):
        check_image(str(path))
    with pytest.raises(ValueError, match=r"good.png has \d+ bytes, expected at most 104"):
        check_image(good, max_bytes=104)
    with pytest.raises(ValueError, match=r"good.png has 240 pixels \(12 x 20\), expected at most 239"):
        check_image(good, max_pixels=239)
    with pytest.raises(ValueError, match=r"large.png has 80000000 pixels \(8000 x 10000\)"):
        check_image(bomb(tmp_path / "large.png", 10_000, 8_000))
    with pytest.raises(ValueError, match="bomb.png looks like a decompression bomb and was not decoded"):
        check_image(bomb(tmp_path / "bomb.png", 100_000, 100_000))
    for path in (text, drawing):
        with pytest.raises(ValueError, match=f"{path.name} is truncated, .*not an image of the formats PNG, JPEG, "):
            check_image(str(path))
    with pytest.raises(ValueError, match=f"got {MAX_IMAGES + 1} images, expected at most {MAX_IMAGES}"):
        check_images([good] * (MAX_IMAGES + 1))


# ---- the studio


def test_a_drawing_is_that_of_the_pipeline(studio, pipe, tmp_path):
    reference = picture(tmp_path / "reference.png")
    plain = ImageRequest(prompt="a", seed=3, guidance_scale=2.0, aspect_ratio="5:3", image_guidance_scale=2.0)
    edit = ImageRequest(prompt="a", seed=3, references=(reference,), image_guidance_scale=2.0)
    for drawing, call in (
        (plain, {"guidance_scale": 2.0, "aspect_ratio": "5:3"}),  # there is no image to guide towards
        (edit, {"image": reference, "image_guidance_scale": 2.0}),
        (ImageRequest(prompt="a", seed=4, resolution=8), {"resolution": 8}),
    ):
        previews = list(studio.generate(drawing))
        expected = pipe("a", generator=torch.Generator().manual_seed(drawing.seed), **call).images[0]
        assert [preview.scale for preview in previews] == list(range(1, previews[-1].num_scales + 1))
        assert previews[-1].images[0].tobytes() == expected.tobytes()


def test_what_a_model_offers(studio, pipe, monkeypatch):
    assert studio.resolution == 16 and studio.is_small
    assert studio.resolutions() == [4, 8, 12, 16]
    # Its buckets are 4:4, 3:5, 5:3, 2:7, 7:2, 2:8, 8:2 (height : width).
    assert studio.aspect_ratios() == {
        "1:1": (16, 16),
        "16:9": (20, 12),
        "4:1": (32, 8),
        "9:16": (12, 20),
        "1:4": (8, 32),
    }
    assert studio.guidance_scale == 1.0
    numbers = vars(pipe.processor.image_processor)
    monkeypatch.setitem(numbers, "max_aspect_ratio", 1.0)
    monkeypatch.setitem(numbers, "scale_bases", (1, 4))
    assert list(studio.aspect_ratios()) == ["1:1"] and studio.resolutions() == [4, 16]


def test_the_owner_stops_a_drawing(studio):
    steps = studio.generate(ImageRequest(prompt="a"), owner="anna")
    assert not studio.stop("anna")
    next(steps)
    assert not studio.stop("bert") and studio.stop("anna")
    assert list(steps) == [] and not studio.stop("anna")
    assert len(list(studio.generate(ImageRequest(prompt="a"), owner="anna"))) == 4


MESSAGES = [{"role": "user", "content": "hello"}]


def test_what_a_browser_leaves_behind_is_closed_by_the_next(studio):
    left = studio.generate(ImageRequest(prompt="a"), owner="anna")
    next(left)
    parts = studio.answer(MESSAGES, max_images=1, seed=0, owner="bert")
    assert next(parts)["type"] == "text"
    with pytest.raises(RuntimeError, match="another request began"):
        next(left)
    del parts  # a thread of the pipeline is at it
    assert [one.scale for one in studio.generate(ImageRequest(prompt="a"))] == [1, 2, 3, 4]


def test_what_is_left_does_not_stop_the_next_of_the_same_browser(studio):
    left, following = (studio.generate(ImageRequest(prompt=prompt), owner="anna") for prompt in "ab")
    next(left)
    next(following)
    left.close()
    assert [one.scale for one in following] == [2, 3, 4]


def test_an_error_ends_a_request_alone(studio):
    with pytest.raises(ValueError, match="aspect_ratio"):
        list(studio.generate(ImageRequest(prompt="a", aspect_ratio="wide"), owner="anna"))
    assert not studio.stop("anna")
    assert len(list(studio.generate(ImageRequest(prompt="a")))) == 4


# ---- the buttons

FIELDS = {
    "prompt": " a circle ",
    "references": None,
    "seed": 5,
    "is_random": False,
    "guidance": 2.0,
    "image_guidance": 1.0,
    "aspect_ratio": "",
    "resolution": 0,
}


def said(value) -> bool:
    return not (isinstance(value, dict) and value.get("__type__") == "update")


def test_drawing_shows_every_scale_and_keeps_the_image(app):
    steps = list(app.generate(**FIELDS, history=[], request=ANNA))
    assert steps[0][3] == 5 and [step[1] for step in steps[1:-1]] == [
        f"Scale {scale} of 4: {scale} × {scale} cells" for scale in (1, 2, 3, 4)
    ]
    assert [step[2].count("<figure>") for step in steps[:-1]] == [0, 1, 2, 3, 4]
    path, status, _, _, history, gallery = steps[-1]
    assert status.startswith("16 × 16 pixels, seed 5, ")
    assert Image.open(path).tobytes() == steps[-2][0].tobytes()
    assert history == [(path, ImageRequest(prompt="a circle", seed=5, guidance_scale=2.0, image_guidance_scale=1.0))]
    assert gallery == [(path, "a circle")]
    again = list(app.generate(**FIELDS, history=history, request=ANNA))[-1]
    assert Image.open(again[0]).tobytes() == Image.open(path).tobytes() and len(again[4]) == 2


def test_a_random_seed_is_shown_and_draws_the_same_again(app):
    first, second = (list(app.generate(**{**FIELDS, "is_random": True}, history=[], request=ANNA)) for _ in range(2))
    assert first[0][3] != second[0][3]
    again = list(app.generate(**{**FIELDS, "seed": first[0][3]}, history=[], request=ANNA))
    assert Image.open(again[-1][0]).tobytes() == Image.open(first[-1][0]).tobytes()


def test_the_settings_of_an_image_come_back(app, tmp_path):
    reference = picture(tmp_path / "reference.png")
    fields = {**FIELDS, "references": [(reference, None)], "image_guidance": 1.5, "aspect_ratio": "1:1"}
    history = list(app.generate(**fields, history=[], request=ANNA))[-1][4]
    recalled = app.recall(history, SimpleNamespace(index=0))
    assert dict(zip(FIELDS, recalled)) == {**fields, "prompt": "a circle"}
    assert recalled[len(FIELDS)] == history[0][0]
    assert app.edit(history[0][0]) == [(history[0][0], None)]
    with pytest.raises(gr.Error, match="no image yet"):
        app.edit(None)


def test_mistakes_are_said_and_leave_the_history(app, tmp_path):
    with pytest.raises(gr.Error, match="Say what to generate"):
        next(app.generate(**{**FIELDS, "prompt": " "}, history=[], request=ANNA))
    long = [(picture(tmp_path / "long.png", 900, 10), None)]
    large = [(bomb(tmp_path / "bomb.png", 100_000, 100_000), None)]
    for references, message in ((long, "aspect ratio"), (large, "decompression bomb")):
        steps = app.generate(**{**FIELDS, "references": references}, history=[], request=ANNA)
        seen = []
        with pytest.raises(gr.Error, match=message):
            seen.extend(iter(steps.__next__, None))
        assert seen[-1][1].startswith("Nothing was generated: ") and message in seen[-1][1] and not said(seen[-1][4])


def test_refused_uploads_are_left_out_and_named(app, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", lambda message, title: warnings.append(message))
    good, large = picture(tmp_path / "good.png"), bomb(tmp_path / "large.png", 10_000, 8_000)
    assert app.keep_fit([(large, None), (good, None)]) == [(good, None)]
    assert len(warnings) == 1 and "large.png has 80000000 pixels" in warnings[0]
    assert len(app.keep_fit([(good, None)] * (MAX_IMAGES + 2))) == MAX_IMAGES
    assert app.keep_fit(None) == []


def test_a_stopped_drawing_says_so(app, monkeypatch):
    infos = []
    monkeypatch.setattr(gr, "Info", lambda message, title: infos.append(message))
    steps = app.generate(**FIELDS, history=[], request=ANNA)
    shown = [next(steps) for _ in range(3)]
    assert shown[-1][1].startswith("Scale 2 of 4")
    app.stop(BERT)
    assert len(infos) == 1
    app.stop(ANNA)
    (last,) = steps
    assert last[1] == "Stopped after scale 2." and not said(last[4]) and len(infos) == 1


def test_an_answer_comes_in_parts(app, tmp_path):
    shown = picture(tmp_path / "shown.png")
    steps = list(app.chat({"text": "what is <b>it</b>?", "files": [shown]}, 1, Conversation(), ANNA))
    box, chat, _ = steps[0]
    assert box == {"text": "", "files": []}
    assert chat == [{"role": "user", "content": [{"path": shown}, "what is &lt;b&gt;it&lt;/b&gt;?"]}]
    assert len(steps) > 4  # word by word
    messages = steps[-1][2]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    first, drawn, last = messages[1]["content"]
    assert (first["text"], last["text"]) == ("first, a circle ", " and no more")
    assert Image.open(drawn["image"]).size == (20, 12)  # as the image that was shown
    assert steps[-1][1][1]["content"] == ["first, a circle ", {"path": drawn["image"]}, " and no more"]
    more = list(app.chat({"text": "go on", "files": []}, 1, messages, ANNA))[-1][2]
    assert len(more) == 4 and more[:2] == messages


def test_a_failed_answer_gives_the_words_back(app, tmp_path):
    with pytest.raises(gr.Error, match="Say something"):
        next(app.chat({"text": "", "files": []}, 1, Conversation(), ANNA))
    words = {"text": "hello", "files": [bomb(tmp_path / "bomb.png", 100_000, 100_000)]}
    steps, seen = app.chat(words, 1, Conversation(), ANNA), []
    with pytest.raises(gr.Error, match="decompression bomb"):
        seen.extend(iter(steps.__next__, None))
    assert seen[-1][:2] == (words, []) and not said(seen[-1][2])


def test_an_empty_answer_is_shown_as_one():
    messages = [{"role": "assistant", "content": [{"type": "text", "text": " "}]}]
    assert chat_of(messages) == [{"role": "assistant", "content": "(nothing)"}]


# ---- the server


@pytest.fixture(scope="module")
def address(pipe, tmp_path_factory):
    app = App(Studio(pipe), str(tmp_path_factory.mktemp("drawn")), name="a <toy>", prompts=("a circle",))
    page = app.build()
    yield serve(page)
    page.close(verbose=False)


def test_only_this_machine_is_answered_and_nothing_is_loaded_from_outside(address):
    assert address.startswith("http://127.0.0.1:")
    answer = httpx.get(address)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    assert httpx.get(address, headers={"host": "elsewhere.example"}).status_code == 400
    config = httpx.get(f"{address}config").json()
    heads = [one["props"]["value"] for one in config["components"] if one["props"].get("elem_id") == "head"]
    assert heads == ["<h1>NextFlow</h1><p>a &lt;toy&gt;</p>"]
    assert config["analytics_enabled"] is False and config["run_history"] is False
    assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}


def test_the_server_refuses_large_files(address, monkeypatch):
    def upload(size: int) -> httpx.Response:
        return httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", bytes(size))})

    assert upload(1000).status_code == 200
    assert upload(20 * 1024**2 + 1).status_code == 413


def test_addresses_are_not_fetched(address):
    config = httpx.get(f"{address}config").json()
    kinds = {one["id"]: one["type"] for one in config["components"]}
    (check,) = (one for one in config["dependencies"] if [kinds[i] for i in one["inputs"]] == ["gallery"])
    image = {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [[{"image": image, "caption": None}]], "fn_index": check["id"], "session_hash": "s"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=body).status_code == 200
    with httpx.stream("GET", f"{address}gradio_api/queue/data", params={"session_hash": "s"}) as events:
        for line in events.iter_lines():
            if "process_completed" in line:
                break
    assert "addresses are not fetched" in line


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("[::1]", True), ("0.0.0.0", False), ("example", False)],
)
def test_others_than_this_machine_are_warned_about(host, here):
    assert is_loopback(host) is here
    assert bool(warnings_about(host, False)) is not here
    assert any("public address" in one for one in warnings_about(host, True))


# ---- the command


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    def nothing(name):
        raise FileNotFoundError(f"no {name} at /x")

    monkeypatch.setattr("nextflow_hf.hub_cards.shipped_model_path", nothing)
    assert command.main([]) == 2
    assert "no nextflow-shapes at /x" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command.main([]) == 2
    assert 'nextflow-hf app: the app needs Gradio: pip install "nextflow-hf[app]" (' in capsys.readouterr().err


def test_the_command_serves_a_model_whose_images_say_how_they_were_made(tmp_path, monkeypatch, capsys):
    toy_pipeline().save_pretrained(tmp_path / "toy")
    monkeypatch.setattr("nextflow_hf.app.interface.App", KeptApp)
    pages, drawn = [], []

    def visit(page):
        pages.append(httpx.get(page.local_url).text)
        fields = {**FIELDS, "aspect_ratio": "16:9"}
        drawn.append(list(KeptApp.made[-1].generate(**fields, history=[], request=ANNA))[-1][0])
        reference = shutil.copy(drawn[0], tmp_path / "reference.png")
        fields = {**FIELDS, "references": [(reference, None)], "image_guidance": 1.5}
        drawn.append(list(KeptApp.made[-1].generate(**fields, history=[], request=ANNA))[-1][0])
        for name, path in zip(("drawn.png", "edited.png"), drawn):
            shutil.copy(path, tmp_path / name)
        page.close(verbose=False)

    monkeypatch.setattr(gr.Blocks, "block_thread", visit)
    assert command.main(["--model", str(tmp_path / "toy"), "--device", "cpu"]) == 0
    assert "NextFlow is at http://127.0.0.1:" in capsys.readouterr().out
    assert "toy on cpu" in pages[0]
    assert not Path(drawn[0]).exists()  # kept while the app ran
    for main, name in ((generate.main, "drawn.png"), (edit.main, "edited.png")):
        again = ["--from-image", str(tmp_path / name), "--output", str(tmp_path / "again.png"), "--allow-model"]
        assert main([*again, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["images"][0]["identical"] is True


class KeptApp(App):
    made: list[App] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made.append(self)
