"""The server: OpenAI's API on a toy pipeline, in process; and with OpenAI's own client over a socket."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from toy_pipeline import spelling_pipeline, toy_pipeline

from nextflow_hf.processing import image_loading_nextflow
from nextflow_hf.serving import protocol, worker
from nextflow_hf.serving.app import make_app
from nextflow_hf.serving.protocol import Limits, read_mask


URL = "http://127.0.0.1"
GENERATIONS, EDITS, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"
LIMITS = Limits(images=3, source_images=2, prompt_characters=50, body_bytes=50_000, image_pixels=10_000)


@pytest.fixture(scope="module")
def pipe():
    return spelling_pipeline()


@pytest.fixture(scope="module")
def client(pipe):
    with TestClient(make_app(pipe, name="toy", limits=LIMITS, max_wait=0.0), base_url=URL) as client:
        yield client


def alone(pipe, *args, seed=1, **options):
    """What the pipeline samples for one request, in the thread that owns it."""
    return pipe(*args, generator=torch.Generator().manual_seed(seed), **options).images


def file_of(image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def image_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text.partition("base64,")[2] or text)))


def same(first, second) -> bool:
    return first.size == second.size and first.convert("RGB").tobytes() == second.convert("RGB").tobytes()


def red(width=16, height=16):
    return Image.new("RGB", (width, height), "red")


def events_of(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


# ---- what is answered


def test_a_generation_is_what_the_pipeline_samples(client, pipe):
    options = {"guidance_scale": 2.0, "temperature": 0.7, "top_k": 5, "negative_prompt": "b"}
    answer = client.post(GENERATIONS, json={"prompt": "a", "seed": 1, "n": 2, "size": "28x8", **options}).json()
    expected = alone(pipe, "a", num_images_per_prompt=2, height=8, width=28, **options)
    assert all(same(image_of(one["b64_json"]), image) for one, image in zip(answer["data"], expected, strict=True))
    assert answer["size"] == "28x8" and answer["seed"] == 1 and answer["output_format"] == "png"
    assert answer["usage"]["output_tokens"] == 2 * sum(h * w for h, w in ((1, 1), (1, 4), (2, 5), (2, 7)))


def test_formats(client, pipe):
    for name in ("png", "jpeg", "webp"):
        body = {"prompt": "a", "seed": 1, "output_format": name, "output_compression": 80, "response_format": "url"}
        (one,) = client.post(GENERATIONS, json=body).json()["data"]
        assert one["url"].startswith(f"data:image/{name};base64,") and image_of(one["url"]).format.lower() == name
    assert same(image_of(client.post(GENERATIONS, json={"prompt": "a", "seed": 1}).json()["data"][0]["b64_json"]),
                alone(pipe, "a")[0])  # fmt: skip


def test_low_quality_leaves_the_last_scale_out(client, pipe):
    answer = client.post(GENERATIONS, json={"prompt": "a", "seed": 1, "quality": "low"}).json()
    assert answer["quality"] == "low"
    assert same(image_of(answer["data"][0]["b64_json"]), alone(pipe, "a", num_scales=3)[0])


def test_edits_take_several_images_and_a_mask(client, pipe):
    sources = [red(), red(8, 28)]
    files = [("image[]", (f"{index}.png", file_of(one))) for index, one in enumerate(sources)]
    data = {"prompt": "a", "seed": "1", "image_guidance_scale": "1.5", "guidance_scale[]": ["3", "2", "1", "1"]}
    answer = client.post(EDITS, data=data, files=files).json()
    expected = alone(pipe, "a", image=sources, image_guidance_scale=1.5, guidance_scale=[3, 2, 1, 1])[0]
    assert same(image_of(answer["data"][0]["b64_json"]), expected)
    # Where OpenAI's mask is transparent the image changes; one without alpha is white there.
    white = Image.new("L", (16, 16))
    white.paste(255, (0, 0, 8, 16))
    transparent = red()
    transparent.putalpha(white.point(lambda value: 255 - value))
    expected = alone(pipe, "a", image=[red()], mask_image=white)[0]
    for mask in (white, transparent):
        files = {"image": ("a.png", file_of(red())), "mask": ("m.png", file_of(mask))}
        answer = client.post(EDITS, data={"prompt": "a", "seed": "1"}, files=files).json()
        assert same(image_of(answer["data"][0]["b64_json"]), expected)
    address = f"data:image/png;base64,{base64.b64encode(file_of(red())).decode()}"
    body = {"prompt": "a", "seed": 1, "images": [{"image_url": address}]}
    assert same(image_of(client.post(EDITS, json=body).json()["data"][0]["b64_json"]),
                alone(pipe, "a", image=[red()])[0])  # fmt: skip


def test_a_mask_by_address_is_the_file_that_is_there(monkeypatch):
    transparent = Image.new("RGB", (16, 16), "white")
    transparent.putalpha(Image.linear_gradient("L").resize((16, 16)).point(lambda value: 255 * (value > 127)))
    data = file_of(transparent)
    for module in (image_loading_nextflow, protocol):
        monkeypatch.setattr(module, "fetch", lambda address, **limits: data, raising=False)
    assert same(read_mask("https://example.org/mask.png", LIMITS), read_mask(data, LIMITS))


def test_a_mask_is_turned_as_its_file_says():
    white = Image.linear_gradient("L").resize((16, 8)).point(lambda value: 255 * (value > 127))
    transparent = red(16, 8)
    transparent.putalpha(white.point(lambda value: 255 - value))
    turned = Image.Exif()
    turned[0x112] = 6
    masks = [read_mask(file_of(one, exif=turned), LIMITS) for one in (white, transparent)]
    assert masks[0].size == (8, 16) and same(*masks)


def test_images_are_streamed_scale_by_scale(client, pipe):
    body = {"prompt": "a", "seed": 1, "stream": True, "partial_images": 2}
    events = events_of(client.post(GENERATIONS, json=body).text)
    assert [event["type"] for event in events] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    previews = list(pipe.preview("a", generator=torch.Generator().manual_seed(1)))
    for event, scale in zip(events, (1, 3, 4), strict=True):  # of four
        assert same(image_of(event["b64_json"]), previews[scale - 1].images[0])
    files = {"image": ("a.png", file_of(red()))}
    data = {"prompt": "a", "seed": "1", "stream": "true", "partial_images": "1"}
    events = events_of(client.post(EDITS, data=data, files=files).text)
    assert [event["type"] for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_an_answer_that_ends_at_the_model_s_own_limit_says_so(client, pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer.generation_config, "max_new_tokens", 3)
    body = {"messages": [{"role": "user", "content": "a"}], "temperature": 0}
    assert client.post(CHAT, json=body).json()["choices"][0]["finish_reason"] == "length"


def test_images_take_part_of_the_limit(client):
    body = {"messages": [{"role": "user", "content": "a"}], "modalities": ["text", "image"], "max_images": 2}
    body |= {"max_tokens": 8, "temperature": 1.0, "seed": 5}
    answer = client.post(CHAT, json=body).json()
    message = answer["choices"][0]["message"]
    assert (len(message["content"]), len(message["images"])) == (6, 2)  # of one token each
    assert answer["choices"][0]["finish_reason"] == "length"
    chunks = events_of(client.post(CHAT, json={**body, "stream": True}).text)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_conversations(client, pipe):
    address = f"data:image/png;base64,{base64.b64encode(file_of(red())).decode()}"
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "a"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "seed": 1}
    own = [{"role": "user", "content": [{"type": "image", "image": red()}, {"type": "text", "text": "a"}]}]
    choice = client.post(CHAT, json=body).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": pipe.chat(own, max_new_tokens=12)}
    assert choice["finish_reason"] == "length"
    # Text and images.
    drawn = client.post(CHAT, json={**body, "modalities": ["text", "image"], "max_images": 1}).json()
    parts = pipe.interleave(own, 1, max_new_tokens=12, generator=torch.Generator().manual_seed(1))
    message = drawn["choices"][0]["message"]
    assert message["content"] == "".join(part["text"] for part in parts if part["type"] == "text")
    images = [part["image"] for part in parts if part["type"] == "image"]
    assert images and same(image_of(message["images"][0]["image_url"]["url"]), images[0])
    # An answer goes back with its images; only an image comes out.
    history = [body["messages"][0], message, {"role": "user", "content": "b"}]
    answer = client.post(CHAT, json={"messages": history, "modalities": ["image"], "seed": 1}).json()
    text = {"type": "text", "text": message["content"]}
    ours = [
        own[0],
        {"role": "assistant", "content": [text, {"type": "image", "image": images[0]}]},
        {"role": "user", "content": "b"},
    ]  # fmt: skip
    message = answer["choices"][0]["message"]
    assert message["content"] == "" and same(
        image_of(message["images"][0]["image_url"]["url"]), alone(pipe, messages=ours)[0]
    )


def test_conversations_are_streamed(client, pipe):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 12, "seed": 1}
    body |= {"stream": True, "modalities": ["text", "image"], "stream_options": {"include_usage": True}}
    text = client.post(CHAT, json=body).text
    assert text.endswith("data: [DONE]\n\n")
    *chunks, usage = events_of(text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    parts = pipe.interleave(
        [{"role": "user", "content": "a"}],
        LIMITS.images,
        max_new_tokens=12,
        generator=torch.Generator().manual_seed(1),
    )
    assert "".join(delta.get("content", "") for delta in deltas) == "".join(
        part["text"] for part in parts if part["type"] == "text"
    )
    assert sum("images" in delta for delta in deltas) == sum(part["type"] == "image" for part in parts)
    assert chunks[-1]["choices"][0]["finish_reason"] and usage["choices"] == [] and usage["usage"]["total_tokens"] > 0


def test_models_health_and_metrics(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "toy" and client.get("/v1/models/toy").json() == model
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    client.post(GENERATIONS, json={"prompt": "a"})
    text = client.get("/metrics").text
    assert 'nextflow_requests_total{route="/v1/images/generations",status="200"}' in text
    assert "nextflow_queue_requests 0.0" in text


# ---- what is refused

LONG, PRIVATE = "a" * 51, "http://127.0.0.1:1/a.png"
IMAGE_PART = {"type": "image_url", "image_url": {"url": PRIVATE}}
HALF = {"type": "image_url", "image_url": {"url": "http://\ud800"}}
PER_SCALE = {"guidance_scale": [1] * 9, "stream": True}  # of four scales
REFUSED = {
    "unknown field": (GENERATIONS, {"prompt": "a", "sampler": "euler"}, 400, "sampler"),
    "no prompt": (GENERATIONS, {}, 400, "prompt"),
    "empty prompt": (GENERATIONS, {"prompt": ""}, 400, "prompt"),
    "long prompt": (GENERATIONS, {"prompt": LONG}, 400, "51 characters"),
    "long negative prompt": (GENERATIONS, {"prompt": "a", "negative_prompt": LONG}, 400, "52 characters"),
    "surrogate": (GENERATIONS, {"prompt": "\ud800"}, 400, "unicode"),
    "surrogate in chat": (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    "count": (GENERATIONS, {"prompt": "a", "n": 4}, 400, "n is 4, expected at most 3"),
    "zero": (GENERATIONS, {"prompt": "a", "n": 0}, 400, "n"),
    "size": (GENERATIONS, {"prompt": "a", "size": "large"}, 400, "size is 'large'"),
    "empty size": (GENERATIONS, {"prompt": "a", "size": "0x8"}, 400, "size is '0x8'"),
    "aspect": (GENERATIONS, {"prompt": "a", "size": "10000x1"}, 400, "aspect ratio"),
    "format": (GENERATIONS, {"prompt": "a", "output_format": "gif"}, 400, "output_format"),
    "transparency": (GENERATIONS, {"prompt": "a", "background": "transparent"}, 400, "background"),
    "seed": (GENERATIONS, {"prompt": "a", "seed": -1}, 400, "seed"),
    "infinity": (GENERATIONS, {"prompt": "a", "guidance_scale": float("inf")}, 400, "guidance_scale"),
    "image guidance": (GENERATIONS, {"prompt": "a", "image_guidance_scale": 2}, 400, "image_guidance_scale"),
    "model": (GENERATIONS, {"prompt": "a", "model": "other"}, 404, "'other' is not here"),
    "several in a stream": (GENERATIONS, {"prompt": "a", "stream": True, "n": 2}, 400, "n is 2, expected 1"),
    "no image": (EDITS, {"prompt": "a"}, 400, "image: it is missing"),
    "private address": (EDITS, {"prompt": "a", "images": [{"image_url": PRIVATE}]}, 400, "not public"),
    "path": (EDITS, {"prompt": "a", "images": [{"image_url": "/etc/passwd"}]}, 400, "image 1 is no image"),
    "file address": (EDITS, {"prompt": "a", "images": [{"image_url": "file:///etc/passwd"}]}, 400, "is no image"),
    "three images": (EDITS, {"prompt": "a", "images": [{"image_url": PRIVATE}] * 3}, 400, "got 3 images"),
    "tools": (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, 400, "tools"),
    "role": (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
    "no message": (CHAT, {"messages": []}, 400, "messages"),
    "part": (CHAT, {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, "'video_url'"),
    "private address in chat": (CHAT, {"messages": [{"role": "user", "content": [IMAGE_PART]}]}, 400, "not public"),
    "modality": (CHAT, {"messages": [{"role": "user", "content": "a"}], "modalities": ["audio"]}, 400, "modalities"),
    "refusal of a stream": (GENERATIONS, {"prompt": "a", **PER_SCALE}, 400, "9 entries"),
    "refusal of a stream in chat": (
        CHAT, {"messages": [{"role": "user", "content": "a"}], "modalities": ["image", "text"], **PER_SCALE}, 400,
        "9 entries",
    ),
    "surrogate in an address": (CHAT, {"messages": [{"role": "user", "content": [HALF]}]}, 400, "cannot be fetched"),
    "penalty": (CHAT, {"messages": [{"role": "user", "content": "a"}], "presence_penalty": 1}, 400, "presence_pen"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(client, name):
    route, body, status, message = REFUSED[name]
    answer = client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] in (None, "image", "prompt", *body) or error["param"].startswith("messages.")


def test_bytes_pixels_and_content_types(client):
    large = {"image": ("a.png", file_of(Image.new("RGB", (101, 100))))}
    assert "expected at most 10000" in client.post(EDITS, data={"prompt": "a"}, files=large).json()["error"]["message"]
    broken = {"image": ("a.png", file_of(red())[:40])}
    assert client.post(EDITS, data={"prompt": "a"}, files=broken).status_code == 400
    assert client.post(GENERATIONS, content=b"x" * 50_001).status_code == 413

    def chunks():  # no length is announced
        for _ in range(60):
            yield b"x" * 1000

    assert client.post(GENERATIONS, content=chunks(), headers={"content-type": "application/json"}).status_code == 413
    assert client.post(GENERATIONS, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post(GENERATIONS, content=b"{", headers={"content-type": "Application/JSON"}).status_code == 400
    assert client.post(GENERATIONS, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert client.get("/nowhere").status_code == 404
    assert client.get(GENERATIONS).headers["allow"] == "POST"


def test_only_this_machine_or_a_key(pipe, client):
    assert client.get("/v1/models", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    # No addresses, and the origins of sandboxed frames and of files.
    for name, value in (("host", "[::1"), ("origin", "http://["), ("origin", "null"), ("origin", "file://")):
        assert client.get("/v1/models", headers={name: value}).status_code == 403
    assert client.get("/v1/models", headers={"content-length": "-"}).status_code == 400
    with TestClient(make_app(pipe, name="toy", api_key="sécret"), base_url="http://server.example") as guarded:
        assert guarded.get("/health").status_code == 200
        for route in ("/v1/models", "/metrics"):
            assert guarded.get(route).status_code == 401
            assert guarded.get(route, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert guarded.get(route, headers={"authorization": "sécret".encode()}).status_code == 401
            for scheme in ("Bearer", "bearer"):
                assert guarded.get(route, headers={"authorization": f"{scheme} sécret".encode()}).status_code == 200


def test_a_defect_is_not_told(client, pipe, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("/secret/path/model.safetensors")

    monkeypatch.setattr(type(pipe), "__call__", fail)
    answer = client.post(GENERATIONS, json={"prompt": "a"})
    assert answer.status_code == 500 and "secret" not in answer.text


def test_an_answer_that_fails_outside_the_worker_is_counted(pipe, monkeypatch):
    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(protocol, "encode_image", fail)
    with TestClient(make_app(pipe, name="toy"), base_url=URL, raise_server_exceptions=False) as client:
        assert client.post(GENERATIONS, json={"prompt": "a"}).status_code == 500
        text = client.get("/metrics").text
    assert 'nextflow_requests_total{route="/v1/images/generations",status="500"} 1.0' in text


# ---- the queue


class Requests(list):
    """Requests to a worker, and what each of them got."""

    def __init__(self, own):
        self.worker = own
        self.found = []

    def add(self, prompt, **options):
        request = worker.ImageRequest(prompt=prompt, seed=len(self), settings=options.pop("settings", {}), **options)
        request.emit = lambda found: self.found.append((request, found))
        self.append(request)
        self.worker.submit(request)
        return request

    def last(self, request):
        return next((found for other, found in reversed(self.found) if other is request), None)


def test_a_batch_gives_each_the_image_it_would_get_alone(pipe):
    batches = []
    requests = Requests(worker.Worker(pipe, max_wait=0.5, max_batch=4, on_batch=batches.append))
    for prompt in ("a", "a longer prompt", "b", "c", "d"):
        requests.add(prompt, settings={"guidance_scale": 2.0})
    requests.add("e", settings={"guidance_scale": 3.0})
    requests.worker.stop()
    assert [len(batch) for batch in batches] == [4, 1, 1]
    for request in requests:
        (expected,) = alone(pipe, request.prompt, seed=request.seed, **request.settings)
        assert same(requests.last(request).images[0], expected)


def test_images_are_decoded_beside_the_next_batch(pipe, monkeypatch):
    batches, is_next = [], threading.Event()
    original = type(pipe).decode_codes

    def on_batch(batch):
        batches.append(batch)
        if len(batches) == 2:
            is_next.set()

    def decode(*args, **options):
        assert is_next.wait(20)
        return original(*args, **options)

    monkeypatch.setattr(type(pipe), "decode_codes", decode)
    requests = Requests(worker.Worker(pipe, max_wait=0.0, max_batch=1, on_batch=on_batch))
    requests.add("a")
    requests.add("b")
    requests.worker.stop()
    for request in requests:
        assert same(requests.last(request).images[0], alone(pipe, request.prompt, seed=request.seed)[0])


def test_an_image_that_cannot_be_decoded_is_an_error(pipe, monkeypatch):
    def decode(*args, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(pipe), "decode_codes", decode)
    for decodes_beside in (True, False):
        requests = Requests(worker.Worker(pipe, max_wait=0.0, decodes_beside=decodes_beside))
        request = requests.add("a")
        requests.worker.stop()
        assert isinstance(requests.last(request), RuntimeError)


def test_one_bad_request_does_not_fail_its_batch(pipe):
    requests = Requests(worker.Worker(pipe, max_wait=0.5, max_batch=3))
    good, bad = requests.add("a"), requests.add("a" * 600)  # of 512 tokens
    requests.worker.stop()
    assert isinstance(requests.last(good), worker.Images)
    assert isinstance(requests.last(bad), ValueError)


class Gate:
    """Holds the worker in a call of the pipeline, after its first scale, until it is opened."""

    def __init__(self, pipe, monkeypatch):
        self.reached, self.opened, self.scales = threading.Event(), threading.Event(), 0
        original = type(pipe).__call__

        def call(pipe, *args, callback_on_step_end, **kwargs):
            def after_scale(*step):
                self.scales += 1
                self.reached.set()
                assert self.opened.wait(20)
                return callback_on_step_end(*step)

            return original(pipe, *args, callback_on_step_end=after_scale, **kwargs)

        monkeypatch.setattr(type(pipe), "__call__", call)


def test_a_full_queue_and_a_client_that_goes_away(pipe, monkeypatch):
    gate = Gate(pipe, monkeypatch)
    requests = Requests(worker.Worker(pipe, max_queue=1, max_wait=0.0))
    running = requests.add("a")
    assert gate.reached.wait(20)
    waiting = requests.add("b")
    with pytest.raises(worker.QueueFull) as full:
        requests.add("c")
    assert full.value.seconds >= 1
    waiting.cancel()
    last = requests.add("d")  # the cancelled one has left its place
    running.cancel()
    gate.opened.set()
    requests.worker.stop()
    assert gate.scales == 1 + 4  # the first was interrupted after the scale that it was at
    assert not isinstance(requests.last(running), worker.Images)
    assert isinstance(requests.last(last), worker.Images)
    with pytest.raises(worker.Stopped):
        requests.worker.submit(last)


def test_a_request_ends_in_time(pipe, monkeypatch):
    gate = Gate(pipe, monkeypatch)
    requests = Requests(worker.Worker(pipe, max_wait=0.0))
    late = requests.add("a", seconds=0.05)
    assert gate.reached.wait(20)
    time.sleep(0.06)
    gate.opened.set()
    requests.worker.stop()
    assert gate.scales == 1 and isinstance(requests.last(late), worker.OutOfTime)


def test_a_request_that_waits_ends_in_time(pipe, monkeypatch):
    gate = Gate(pipe, monkeypatch)
    late = threading.Timer(10, gate.opened.set)
    late.start()
    with TestClient(make_app(pipe, name="toy", seconds=0.3), base_url=URL) as client:
        answer = client.post(GENERATIONS, json={"prompt": "a"})
        assert answer.status_code == 504 and not gate.opened.is_set()
        late.cancel(), gate.opened.set()


@pytest.mark.parametrize(("max_images", "cells"), [(0, 1), (3, 4)])
def test_a_conversation_stops_at_a_token_or_a_scale(pipe, max_images, cells):
    messages = [{"role": "user", "content": "a"}]
    request = worker.ChatRequest(messages=messages, max_images=max_images, seed=5, settings={"text_temperature": 1.0})
    sizes = []

    def leave(module, args, kwargs):
        inputs = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        sizes.append(inputs.shape[1])
        if len(sizes) > 1 and sizes[-1] == cells:
            request.cancel()

    hook = pipe.transformer.model.register_forward_pre_hook(leave, with_kwargs=True)
    own = worker.Worker(pipe)
    own.submit(request)
    own.stop()
    hook.remove()
    assert sizes.index(cells, 1) >= len(sizes) - 2  # the next one does not run
    assert pipe.chat(messages, max_new_tokens=2)  # and the pipeline is free


# ---- over a socket


@contextlib.contextmanager
def served(pipe, **options):
    """A server of uvicorn's, as `nextflow-hf serve` starts it: its address, its application and itself."""
    app = make_app(pipe, name="toy", max_queue=4, max_wait=0.0)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    yield f"{URL}:{server.servers[0].sockets[0].getsockname()[1]}", app, server
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def address():
    with served(toy_pipeline()) as (url, app, _):
        yield url, app.state.worker


def test_openai_client_through_every_route(address):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["toy"]
    made = client.images.generate(prompt="a", model="toy", n=2, size="16x16", extra_body={"seed": 1})
    assert len(made.data) == 2 and image_of(made.data[0].b64_json).size == (16, 16) and made.usage.total_tokens > 0
    events = list(client.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"seed": 1}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert events[1].partial_image_index == 1 and events[-1].b64_json == made.data[0].b64_json
    files = [("a.png", file_of(red())), ("b.png", file_of(red(8, 28)))]
    edited = client.images.edit(
        prompt="b", image=files, mask=("m.png", file_of(Image.new("L", (16, 16), "white"))), extra_body={"seed": 1}
    )
    assert image_of(edited.data[0].b64_json).size == (16, 16)
    events = list(client.images.edit(prompt="b", image=files[0], stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    messages = [{"role": "user", "content": "a"}]
    answer = client.chat.completions.create(model="toy", messages=messages, max_tokens=3)
    assert isinstance(answer.choices[0].message.content, str)
    chunks = list(client.chat.completions.create(model="toy", messages=messages, max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    extra = {"modalities": ["image"], "seed": 1}
    drawn = client.chat.completions.create(model="toy", messages=messages, extra_body=extra)
    assert drawn.choices[0].message.images[0]["image_url"]["url"].startswith("data:image/png;base64,")
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="toy", messages=messages, tools=tools)
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="other")


def test_a_connection_that_closes_stops_its_work(address, monkeypatch):
    url, own = address
    gate = Gate(own.pipe, monkeypatch)

    async def leave():
        async with httpx.AsyncClient(timeout=0.5) as client:
            await client.post(url + GENERATIONS, json={"prompt": "a"})

    for stream in (False, True):
        gate.reached.clear(), gate.opened.clear()
        gate.scales = 0
        with pytest.raises(httpx.TimeoutException):
            if stream:
                body = {"prompt": "a", "stream": True, "partial_images": 0}
                httpx.post(url + GENERATIONS, json=body, timeout=0.5)
            else:
                asyncio.run(leave())
        assert gate.reached.is_set()
        time.sleep(0.4)  # until the server has seen it
        gate.opened.set()
        while not (httpx.get(url + "/health").status_code == 200 and own.num_waiting == 0):
            time.sleep(0.01)
        time.sleep(0.1)
        assert gate.scales == 1


def test_a_client_that_leaves_during_its_upload_is_no_error(address, caplog):
    host, port = address[0].removeprefix("http://").split(":")
    with httpx.Client(base_url=address[0]) as client:

        def counted() -> list[str]:
            lines = client.get("/metrics").text.splitlines()
            return [line for line in lines if line.startswith("nextflow_requests_total") and "/images/" in line]

        before = counted()
        with socket.create_connection((host, int(port))) as connection:
            head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 100"
            connection.sendall(f"POST {GENERATIONS} HTTP/1.1\r\n{head}\r\n\r\n{{".encode())
            time.sleep(0.2)
        for _ in range(100):
            if (after := counted()) != before:
                break
            time.sleep(0.02)
        (found,) = set(after) - set(before)
        assert 'status="499"' in found
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_slow_addresses_hold_no_other_answers(address, monkeypatch):
    is_over = threading.Event()

    def fetch(url, **limits):
        is_over.wait(20)
        raise ValueError("it takes too long")

    monkeypatch.setattr(image_loading_nextflow, "fetch", fetch)
    body = {"prompt": "a", "images": [{"image_url": "https://example.org/a.png"}]}
    limits = httpx.Limits(max_connections=50)
    with httpx.Client(base_url=address[0], timeout=60, limits=limits) as client, ThreadPoolExecutor(40) as pool:
        slow = [pool.submit(client.post, EDITS, json=body) for _ in range(40)]
        time.sleep(0.5)
        answer = client.post(GENERATIONS, json={"prompt": "a"})
        assert answer.status_code == 200 and not is_over.is_set() and not any(one.done() for one in slow)
        is_over.set()
        assert {one.result().status_code for one in slow} == {400}


def test_what_the_end_of_the_server_cuts_off_is_said_and_counted(pipe, monkeypatch):
    gate = Gate(pipe, monkeypatch)
    with served(pipe, timeout_graceful_shutdown=1) as (url, app, server), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, url + GENERATIONS, json={"prompt": "a"}, timeout=30)
        assert gate.reached.wait(20)
        server.should_exit = True
        assert answer.result().status_code == 503 and "stopped" in answer.result().text
        gate.opened.set()
    assert app.state.metrics.num_unanswered == 1
