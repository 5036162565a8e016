"""Rewards: the equations of text rendering by hand, models of the Hub's shape, the judge behind a server, Shapes."""

import asyncio
import base64
import contextlib
import functools
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import (
    BatchFeature,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)

from nextflow_hf.training.rewards import OCRReward, OCRWord, RapidOCREngine, VLMJudge
from nextflow_hf.training.rewards.checks import check_rewards, is_async_reward, reward_name
from nextflow_hf.training.rewards.ocr import (
    bag_distance,
    boxes_mask,
    completeness,
    edit_similarity,
    similarity,
    split_words,
    text_rendering_score,
)
from nextflow_hf.training.rewards.preference import CLIPReward, ImageScoreReward
from nextflow_hf.training.rewards.vlm_judge import answer_text, parse_score


PICTURE = Image.new("RGB", (8, 8), "red")


# ---- text rendering


def test_words():
    assert split_words("  Open 24-hours, “today”! ") == ["open", "24-hours,", "“today”!"]
    assert split_words("  Open 24-hours, “today”! ", ignore_punctuation=True) == ["open", "24-hours", "today"]
    assert split_words("...", ignore_punctuation=True) == [] and split_words(" ") == []


def test_edit_similarity():
    def distance(a: str, b: str) -> int:  # by its recursive definition
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    for first, second in [("kitten", "sitting"), ("abc", ""), ("abc", "abc"), ("ab", "ba"), ("flaw", "lawn")]:
        expected = 1 - distance(first, second) / max(len(first), len(second))
        assert edit_similarity(first, second) == pytest.approx(expected, abs=1e-6)
    assert edit_similarity("", "") == 1 and edit_similarity("ab", "ab") == 1


def test_text_rendering_by_hand():
    """Asked: "big red big". Read: "big" (.9), "rad" (.6), "big" (.5), "extra" (.8)."""
    targets = ["big", "red", "big"]
    words = [("big", 0.9), ("rad", 0.6), ("big", 0.5), ("extra", 0.8)]
    assert completeness(targets, words) == pytest.approx((0.5 + 0.5) / 3)  # the less sure of the two, both times
    assert completeness(["big"], words) == pytest.approx(0.5)
    assert completeness(["big"], words[:2]) == pytest.approx(0.9)
    # "red" is nearest to "rad", one letter of three: .6 * 2/3 = .4
    assert similarity(targets, words) == pytest.approx((0.5 + 0.4 + 0.5) / 3)
    # The nearest word counts, however unsure: not the surest word that is a little less near.
    assert similarity(["abcd"], [("abcx", 1.0), ("abcd", 0.1)]) == pytest.approx(0.1)
    # wanted bb ii gg r e d; read bb ii gg r a d e x t r a: missing none, too many a a r x t
    assert bag_distance(targets, words) == pytest.approx(5 / (9 + 14))
    expected = 1 / 3 + 1.4 / 3 - 0.6 * 5 / 23
    assert text_rendering_score(targets, words) == pytest.approx(expected)
    assert text_rendering_score(targets, [(word, 1.0) for word in targets]) == pytest.approx(2)
    assert text_rendering_score(targets, []) == pytest.approx(-0.6)
    # Writing it again gains nothing: letters too many, and the least sure reading counts.
    assert text_rendering_score(["big"], [("big", 0.9)]) > text_rendering_score(["big"], [("big", 0.9), ("big", 0.8)])
    # Anagrams: no letter is wrong, no word is right.
    assert bag_distance(["abc"], [("cba", 1.0)]) == 0 and completeness(["abc"], [("cba", 1.0)]) == 0
    for equation in (completeness, similarity):
        with pytest.raises(ValueError, match="no target words"):
            equation([], words)


def test_ocr_reward_and_its_masks():
    lines = {"red": [OCRWord("Hello, World", 0.8, (1.2, 2, 5, 3.5)), OCRWord("x", 0.1)], "blue": []}

    def engine(image):
        return lines["red" if image.getpixel((0, 0)) == (255, 0, 0) else "blue"]

    masks = []
    pictures = [PICTURE, Image.new("RGB", (8, 8), "blue"), PICTURE]
    rewards = OCRReward(engine)(
        images=pictures, prompts=["a"] * 3, text=["hello world", ["hello"], None], report_masks=masks.extend
    )
    words = [("hello,", 0.8), ("world", 0.8), ("x", 0.1)]
    expected = [text_rendering_score(["hello", "world"], words), text_rendering_score(["hello"], []), None]
    assert rewards == pytest.approx(expected)
    assert masks[0].sum() == 2 * 4 and masks[0][2:4, 1:5].all() and masks[1] is None and masks[2] is None
    (bare,) = OCRReward(engine, ignore_punctuation=True)(images=[PICTURE], prompts=["a"], text=["hello world!"])
    assert bare == pytest.approx(text_rendering_score(["hello", "world"], [("hello", 0.8), *words[1:]]))
    with pytest.raises(ValueError, match="no column 'words'"):
        OCRReward(engine, target_column="words")(images=[PICTURE], prompts=["a"], text=["a"])


def test_boxes_outside_the_picture():
    assert boxes_mask([(-5, -5, 2, 1), (7, 7, 20, 20)], (8, 8)).sum() == 2 + 1


def test_the_engine_reads(monkeypatch):
    def read(array):
        assert array.shape == (8, 8, 3) and array[0, 0].tolist() == [0, 0, 255]  # blue, green, red
        box = np.array([[1, 2], [5, 1], [5, 4], [1, 4]])
        return SimpleNamespace(txts=("hi",), scores=(0.7,), boxes=box[None])

    engine = RapidOCREngine.__new__(RapidOCREngine)
    engine._engine = read
    assert engine(PICTURE) == [OCRWord("hi", 0.7, (1, 1, 5, 4))]
    engine._engine = lambda array: SimpleNamespace(txts=None, scores=None, boxes=None)  # a blank picture
    assert engine(PICTURE) == []


def test_the_real_engine_reads():
    for package in ("rapidocr", "onnxruntime"):
        pytest.importorskip(package)
    picture = Image.new("RGB", (320, 80), "white")
    ImageDraw.Draw(picture).text((20, 20), "HELLO WORLD", fill="black", font=ImageFont.load_default(36))
    masks = []
    columns = {"prompts": ["a", "b"], "text": ["Hello world", "x"], "report_masks": masks.extend}
    read, blank = OCRReward()(images=[picture, Image.new("RGB", (320, 80), "white")], **columns)
    assert read > 1.8 and blank == pytest.approx(-0.6)
    assert masks[0][30:50, 30:250].all() and not masks[0][:8].any() and masks[1] is None


# ---- what counts as a number


def ones_and_none(prompts, **columns):
    return [1.0, None, math.nan][: len(prompts)]


async def doubled(prompts, **columns):
    return [2.0] * len(prompts)


def test_a_failure_is_reported_with_its_sample(monkeypatch):
    messages = []
    monkeypatch.setattr("nextflow_hf.training.rewards.checks.logger.warning", messages.append)
    values = check_rewards("taste", ones_and_none(["a", "b", "c"]), ["a", "b", "c"])
    assert values[:2] == [1.0, None] and math.isnan(values[2])
    assert len(messages) == 1 and "'taste'" in messages[0] and "sample 2" in messages[0] and "'c'" in messages[0]


WRONG = {
    "a number": (lambda **columns: 1.0, "returned float, expected a list with a number or None for each of the 2"),
    "nothing": (lambda **columns: None, "returned NoneType, expected a list"),
    "a text": (lambda **columns: "12", "returned str"),
    "a mapping": (lambda **columns: {0: 1.0, 1: 2.0}, "returned dict"),
    "a number as a tensor": (lambda **columns: torch.tensor(1.0), "returned Tensor"),
    "too few": (lambda **columns: [1.0], "gave 1 values for 2 samples"),
    "dicts": (lambda **columns: [1.0, {"score": 1.0}], r"gave \{'score': 1.0\} for sample 1, .*prompt: 'b c'"),
    "texts": (lambda **columns: ["1.0", "2.0"], "gave '1.0' for sample 0, .*prompt: 'a'"),
    "vectors": (lambda **columns: torch.ones(2, 3), r"gave tensor\(\[1., 1., 1.\]\) for sample 0"),
    "complex": (lambda **columns: [1.0, 2j], "gave 2j for sample 1"),
    "too large": (lambda **columns: [10**400, 0], "gave 10+ for sample 0, expected a number"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_rewards_of_another_shape_are_named(wrong):
    reward, match = WRONG[wrong]
    with pytest.raises(ValueError, match=f"the reward 'taste' {match}") as error:
        check_rewards("taste", reward(), ["a", "b c"])
    assert "\n" not in str(error.value)


def test_numbers_of_every_kind():
    kinds = [
        [1, 2.5, None], (True, np.float32(2.5), None), np.array([1, 2.5, 4]), torch.tensor([[1], [2.5], [4]]),
        torch.tensor([1, 2.5, 4], dtype=torch.bfloat16), (value for value in (1, 2.5, 4)),
    ]  # fmt: skip
    for values in kinds:
        got = check_rewards("r", values, "abc")
        assert got[:2] == [1, 2.5] and got[2] in (None, 4) and all(type(value) is float for value in got[:2])


def test_kinds_of_callables():
    class Slow:
        async def __call__(self, **columns):
            return []

    half = functools.partial(functools.partial(doubled), low=1)
    assert [reward_name(reward) for reward in (doubled, half, Slow())] == ["doubled", "doubled", "Slow"]
    assert [is_async_reward(reward) for reward in (half, Slow(), functools.partial(Slow()))] == [True] * 3
    assert not is_async_reward(ones_and_none) and not is_async_reward(CLIPReward("a/b"))


# ---- models of the Hub's shape


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 49, "bos_token_id": 48}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


class TinyProcessor:
    """Letters are tokens."""

    def __call__(self, images, text=None, return_tensors="pt", **options):
        pixels = torch.stack(
            [torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1) for image in images]
        )
        inputs = {"pixel_values": pixels / 255}
        if text is not None:
            assert options == {"padding": True, "truncation": True}
            rows = [[48, *(ord(letter) % 40 for letter in row), 49] for row in text]
            length = max(map(len, rows))
            inputs["input_ids"] = torch.tensor([row + [49] * (length - len(row)) for row in rows])
            inputs["attention_mask"] = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows])
        return BatchFeature(inputs)


@pytest.mark.parametrize("scaled", [False, True])
def test_clip_reward(tmp_path, scaled):
    model = tiny_clip().eval()
    model.save_pretrained(tmp_path)
    reward = CLIPReward(str(tmp_path), scaled=scaled, batch_size=2, device="cpu")
    assert "model" not in vars(reward)  # nothing is loaded before it is needed
    reward.processor = TinyProcessor()
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "c"}]}]
    got = reward(images=pictures, prompts=["a", "bcd", chat], other=1)
    for picture, text, value in zip(pictures, ["a", "bcd", "c"], got):
        inputs = TinyProcessor()([picture], [text], padding=True, truncation=True)
        with torch.no_grad():
            image = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
            text = model.get_text_features(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).pooler_output
        cosine = torch.nn.functional.cosine_similarity(image, text).item()
        assert value == pytest.approx(cosine * (model.logit_scale.exp().item() if scaled else 1), rel=1e-3)
    assert len(set(got)) == 3 and reward.__name__ == tmp_path.name
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_a_score_by_siglip_does_not_depend_on_its_batch(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 12}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}))
    model.save_pretrained(tmp_path)
    reward = CLIPReward(str(tmp_path), device="cpu")

    def processor(images, text, padding, truncation, max_length=None, **options):
        rows = [[ord(letter) % 40 for letter in row] for row in text]
        length = max_length if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [49] * (length - len(row)) for row in rows])  # no mask, as SigLIP's tokenizers
        return BatchFeature({**TinyProcessor()(images), "input_ids": ids})

    reward.processor = processor
    together = reward(images=[PICTURE] * 2, prompts=["a", "bcdef"])
    alone = reward(images=[PICTURE], prompts=["a"]) + reward(images=[PICTURE], prompts=["bcdef"])
    assert together == pytest.approx(alone, abs=1e-5) and together[0] != pytest.approx(together[1], abs=1e-3)


def test_image_score_reward(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"image_size": 8, "patch_size": 4}
    for labels in (["bad", "good"], ["score"]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**sizes, id2label=dict(enumerate(labels)))).eval()
        folder = tmp_path / str(len(labels))
        model.save_pretrained(folder)
        label = "good" if len(labels) == 2 else None
        reward = ImageScoreReward(str(folder), label=label, device="cpu")
        reward.processor = TinyProcessor()
        with torch.no_grad():
            logits = model(**TinyProcessor()([PICTURE])).logits[0]
        expected = logits.softmax(-1)[1] if label else logits[0]
        assert reward(images=[PICTURE], prompts=["a"]) == [pytest.approx(expected.item(), rel=1e-4)]
    one = ImageScoreReward(str(tmp_path / "1"), label="score", device="cpu")  # its name changes nothing
    many = ImageScoreReward(str(tmp_path / "2"), label="good", device="cpu", problem_type="multi_label_classification")
    one.processor = many.processor = TinyProcessor()
    assert one(images=[PICTURE], prompts=["a"]) == [pytest.approx(expected.item(), rel=1e-4)]
    logits = many.model(**TinyProcessor()([PICTURE])).logits[0]  # labels do not exclude each other
    assert many(images=[PICTURE], prompts=["a"]) == [pytest.approx(logits.sigmoid()[1].item(), rel=1e-4)]
    for label, match in ((None, "name one"), ("best", "no label 'best'")):
        reward = ImageScoreReward(str(tmp_path / "2"), label=label, device="cpu")
        with pytest.raises(ValueError, match=match):
            reward(images=[PICTURE], prompts=["a"])


# ---- the judge behind a server


@pytest.fixture
def server():
    """Answers with the next of `server.answers`: a text, an HTTP status, seconds to be silent, raw bytes, or an
    iterator of them, every 0.1 seconds."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                httpd.requests.append((self.path, dict(self.headers), body))
                answer = httpd.answers.pop(0) if len(httpd.answers) > 1 else httpd.answers[0]
            if isinstance(answer, float):
                time.sleep(answer)
                return
            if not isinstance(answer, (str, int)):
                with contextlib.suppress(OSError):
                    for part in [answer] if isinstance(answer, bytes) else answer:
                        self.wfile.write(part)
                        time.sleep(0 if isinstance(answer, bytes) else 0.1)
                self.close_connection = True
                return
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            if isinstance(answer, str):
                message = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                self.wfile.write(json.dumps(message).encode())

        def log_message(self, *args):
            pass

    lock = threading.Lock()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.answers = [], ['{"score": 7.5}']
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1/"
    thread = threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def ask(judge, prompts=("a red square",), **columns) -> list[float]:
    return asyncio.run(judge(images=[PICTURE] * len(prompts), prompts=list(prompts), **columns))


def test_judge_shows_the_pictures_and_reads_the_score(server):
    judge = VLMJudge(server.url, "judge-7b", api_key="k", score_range=(0, 10))
    metrics = {}
    sources = [[Image.new("RGB", (4, 4), "blue")], []]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "make it red"}]}]
    assert ask(judge, [chat, "b"], source_images=sources, log_metric=metrics.__setitem__) == [0.75, 0.75]
    assert metrics == {"vlm_judge/requests": 2, "vlm_judge/failed": 0}
    path, headers, body = next(entry for entry in server.requests if "make it red" in json.dumps(entry[2]))
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k" and body["model"] == "judge-7b"
    *pictures, text = body["messages"][0]["content"]
    assert "make it red" in text["text"] and "0 to 10" in text["text"]
    sizes = []
    for part in pictures:
        data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes == [(4, 4), (8, 8)]  # the source, then the result


def test_judge_tries_again(server):
    server.answers = [503, 429, 0.6, '{"score": 10}']
    judge = VLMJudge(server.url, "m", retries=3, backoff=0.01, timeout=0.3)
    assert ask(judge) == [1.0] and judge.num_requests == 4


REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n"
BODY = b"HTTP/1.1 200 OK\r\n\r\n"
FAILURES = {
    "busy": (503, 2, "HTTP Error 503"), "refused": (400, 1, "HTTP Error 400"),
    "filtered": (b"HTTP/1.1 400 Bad Request\r\n\r\n{'message':\n 'our filter'}", 1, "'our filter'}"),
    "silent": (0.6, 2, "timed out"),
    "no score": ("no idea", 1, "has no score: 'no idea'"), "empty": ("{}", 1, "has no score"),
    "out of range": ('{"score": 11}', 1, "the score is 11, expected 0 to 10"),
    "huge": ('{"score": ' + "9" * 400 + "}", 1, "the score is inf, expected 0 to 10"),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n", 2, "BadStatusLine"), "gone": (b"", 2, "RemoteDisconnected"),
    "cut short": (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{}", 2, "IncompleteRead(2 bytes read, 88 more"),
    "bad chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 2, "IncompleteRead"),
    "no JSON": (BODY + b"<html>\n</html>", 1, "no chat completion: b'<html>"),
    "nested": (BODY + b"[" * 200_000, 1, "no chat completion"),
    "a list": (BODY + b"[]", 1, "no chat completion"), "null": (BODY + b'{"choices": null}', 1, "no chat completion"),
    "no text": (BODY + b'{"choices": [{"message": {"content": [1]}}]}', 1, "is [1], expected a text"),
    "not UTF-8": (BODY + b"\xff\xfe{", 1, "no chat completion"),
    "long": (BODY + b"a" * 2**21, 1, "longer than 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_judge_that_fails_gives_no_number(server, failure, monkeypatch):
    messages = []
    monkeypatch.setattr("nextflow_hf.training.rewards.vlm_judge.logger.warning", messages.append)
    answer, requests, reason = FAILURES[failure]
    server.answers = [answer]
    judge = VLMJudge(server.url, "m", retries=1, backoff=0.01, timeout=0.3)
    assert math.isnan(ask(judge)[0])
    (message,) = messages
    assert judge.num_requests == requests and reason in message and judge.url in message
    assert "a red square" in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_judge_does_not_carry_its_key_elsewhere(server, host, monkeypatch):
    messages = []
    monkeypatch.setattr("nextflow_hf.training.rewards.vlm_judge.logger.warning", messages.append)
    address = f"http://{host}:{server.server_port}/elsewhere"
    server.answers = [REDIRECT % address.encode(), '{"score": 10}']
    assert math.isnan(ask(VLMJudge(server.url, "m", api_key="secret", retries=3))[0])
    assert [path for path, *_ in server.requests] == ["/v1/chat/completions"]
    assert f"redirects to {address}, set base_url" in messages[0] and "secret" not in messages[0]


def test_judge_that_drips_is_left(server):
    """Each byte comes in time, the answer never ends."""
    server.answers = [iter([BODY, *[b" "] * 40])]
    start = time.monotonic()
    assert math.isnan(ask(VLMJudge(server.url, "m", retries=0, timeout=0.3))[0])
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    "options", [{"base_url": "file:///etc/passwd"}, {"base_url": "localhost:8000"}, {"api_key": "a\nb"}]
)
def test_judge_refuses_addresses_and_keys(options):
    (name,) = options
    with pytest.raises(ValueError, match=name) as error:
        VLMJudge(**{"base_url": "http://localhost/v1", "model": "m", **options})
    assert "a\nb" not in str(error.value)


def test_scores_in_answers():
    assert parse_score('```json\n{"score": "6"}\n```') == 6
    assert parse_score('{"reason": "2 errors", "score": 3.5}') == 3.5
    assert parse_score(" 4.0\n") == 4
    thoughts = '<think>Is it {"score": 9}? No: the hand is wrong.</think>\n{"score": 2}'
    completion = {"choices": [{"message": {"content": thoughts}}]}
    assert parse_score(answer_text(json.dumps(completion).encode())) == 2
    for answer in ("I give it 7 of 10", "", '{"score": null}'):
        with pytest.raises(ValueError, match="no score"):
            parse_score(answer)
