"""OpenAI's API on one pipeline: images, edits, conversations, models, health and metrics.

    app = make_app(pipe, name="nextflow-shapes")

Every answer is made by the [`Worker`] of the app; what is here reads requests and writes responses.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import protocol, worker
from .addresses import is_loopback
from .metrics import Metrics
from .protocol import BadRequest, Limits
from .worker import Worker


logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # how soon it is seen that a client went away
MAX_READERS = 16  # requests whose images are fetched and decoded at once
STATUSES = {worker.QueueFull: 429, worker.Stopped: 503, worker.OutOfTime: 504}


def make_app(
    pipe: Any,
    *,
    name: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    seconds: float = 600.0,
    **queue: Any,
) -> FastAPI:
    """
    The server's application.

    Args:
        pipe, queue: As in [`~serving.worker.Worker`].
        name (`str`): What clients call the model.
        api_key (`str`, *optional*): What clients have to send as `Authorization: Bearer`. Without one, requests of
            web pages from elsewhere are refused.
        limits ([`~serving.protocol.Limits`], *optional*): What one request may ask for.
        seconds (`float`, *optional*, defaults to 600): In which a request has to be sent, and answered.
    """
    metrics = Metrics()
    own = Worker(pipe, on_batch=metrics.on_batch, **queue)
    metrics.watch(own)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(own.stop)

    app = FastAPI(title="NextFlow", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    api = Api(own, metrics, name=name, limits=limits or Limits(), seconds=seconds)
    app.state.worker, app.state.metrics, app.state.name = own, metrics, name
    app.post("/v1/images/generations")(api.generate)
    app.post("/v1/images/edits")(api.edit)
    app.post("/v1/chat/completions")(api.chat)
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{model:path}")(api.model)
    app.get("/health")(api.health)
    app.get("/metrics")(api.metrics)
    for kind in (BadRequest, HTTPException, worker.QueueFull, worker.Stopped):
        app.add_exception_handler(kind, lambda _, error: error_response(error))
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=499))
    app.add_middleware(Guard, api_key=api_key, max_bytes=api.limits.body_bytes, metrics=metrics)
    return app


def error_body(error: Exception) -> dict[str, Any]:
    """An error as OpenAI writes it. What is no mistake of the client's is not told: it may name files."""
    status = status_of(error)
    message = str(getattr(error, "detail", error)) if status != 500 else "internal error"
    message = message.encode(errors="replace").decode()  # it may quote half of a surrogate pair
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": None}}


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed, in OpenAI's shape."""
    headers = error.headers if isinstance(error, HTTPException) else None
    if isinstance(error, worker.QueueFull):
        headers = {"Retry-After": str(error.seconds)}
    return JSONResponse(error_body(error), status_of(error), headers)


def status_of(error: Exception) -> int:
    """The HTTP status of an error: its own, 400 for what the pipeline refuses, else 500."""
    if isinstance(error, (BadRequest, HTTPException)):
        return error.status if isinstance(error, BadRequest) else error.status_code
    return STATUSES.get(type(error), 400 if isinstance(error, worker.REFUSALS) else 500)


class Guard:
    """ASGI middleware: who may ask, how many bytes a request may have, and what is counted."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_bytes: int, metrics: Metrics):
        self.app = app
        self.api_key = api_key
        self.max_bytes = max_bytes
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, num_bytes = time.monotonic(), None, 0

        async def counting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            # Counted on arrival: a chunked request announces no length.
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise BadRequest(f"the request has more than {self.max_bytes} bytes", status=413)
            return message

        refusal = self._refuse(Headers(scope=scope), scope["path"])
        try:
            if refusal is None:
                await self.app(scope, limited, counting)
            else:
                await error_response(refusal)(scope, receive, counting)
        except asyncio.CancelledError:  # the server stops, and waits no longer
            self.metrics.num_unanswered += 1
            if status is None:
                await error_response(worker.Stopped("the server has stopped"))(scope, receive, counting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status or 500).inc()  # what an error leaves to the server
            self.metrics.seconds.labels(route).observe(time.monotonic() - started)

    def _refuse(self, headers: Headers, path: str) -> BadRequest | None:
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return BadRequest(f"the content length is {length[:40]!r}, expected a number of bytes")
        if int(length) > self.max_bytes:
            return BadRequest(f"the request has more than {self.max_bytes} bytes", status=413)
        if self.api_key is None:
            # A page in a browser on this machine may be anyone's, and its name may lead here.
            try:
                # An origin without a host, such as "null", is that of a sandboxed frame.
                asking = [urlsplit(origin).hostname or "?" for origin in headers.getlist("origin")]
                asking += [urlsplit(f"//{host}").hostname or "" for host in headers.getlist("host")]
            except ValueError:  # no address at all
                asking = ["?"]
            if any(host and not is_loopback(host) for host in asking):
                return BadRequest("this server answers its own machine alone", status=403)
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Compared in constant time, which tells nothing of the key; as bytes, which starlette reads as Latin-1.
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode())
        if path != "/health" and not (is_right and scheme.lower() == "bearer"):
            return BadRequest("the API key is missing or wrong: send `Authorization: Bearer KEY`", status=401)
        return None


class Api:
    """The routes."""

    def __init__(self, own: Worker, metrics: Metrics, *, name: str, limits: Limits, seconds: float):
        self.worker = own
        self.numbers = metrics
        self.name = name
        self.limits = limits
        self.seconds = seconds
        self.created = int(time.time())
        self.readers = anyio.CapacityLimiter(MAX_READERS)

    # ---- images

    async def generate(self, request: Request) -> Response:
        body = self._parse(protocol.GenerationBody, await self._json(request))
        protocol.check_counts(body, self.limits, 0)
        return await self._images(request, body, "image_generation", [], None)

    async def edit(self, request: Request) -> Response:
        if request.headers.get("content-type", "").lower().startswith("application/json"):
            body = self._parse(protocol.EditBody, await self._json(request))
            sources = [image.get("image_url", "") for image in body.images]
            mask = None if body.mask is None else body.mask.get("image_url", "")
        else:
            fields, sources, mask = await self._form(request)
            body = self._parse(protocol.EditBody, fields)
        if not sources:
            raise BadRequest("image: it is missing, and an edit needs one or several", "image")
        protocol.check_counts(body, self.limits, len(sources))

        def read() -> tuple[list, Any]:
            images = [protocol.read_image(one, self.limits, f"image {index + 1}") for index, one in enumerate(sources)]
            return images, None if mask is None else protocol.read_mask(mask, self.limits)

        return await self._images(request, body, "image_edit", *await self._read(read))

    async def _images(self, request: Request, body: Any, event: str, images: list, mask: Any) -> Response:
        if body.stream and body.n != 1:
            raise BadRequest(f"n is {body.n}, expected 1 with stream: events do not say which image they show", "n")
        job = worker.ImageRequest(
            prompt=body.prompt,
            images=images,
            mask=mask,
            schedule=self._schedule(images),
            partial_images=body.partial_images if body.stream else 0,
            **self._image_job(body, body.settings),
        )
        events = self._start(request, job)
        first = _checked(await anext(events))  # before a stream begins, as it has status 200
        if body.stream:
            return _stream(self._image_events(body, event, job, first, events))
        async with contextlib.aclosing(events):
            files = [await self._encode(image, body) for image in first.images]
        self.numbers.images.inc(len(files))
        if body.response_format == "url":
            data = [{"url": f"data:image/{body.output_format};base64,{file}"} for file in files]
        else:
            data = [{"b64_json": file} for file in files]
        common = {"created": int(time.time()), "seed": body.seed, "usage": self._image_usage(job, first)}
        return JSONResponse({"data": data, **common, **_described(body, first.images[0])})

    async def _encode(self, image: Any, body: Any) -> str:
        return await asyncio.to_thread(protocol.encode_image, image, body.output_format, body.output_compression)

    def _image_usage(self, job: worker.ImageRequest, answer: worker.Images) -> dict[str, Any]:
        """Tokens of the texts, and codes of the images that were sampled."""
        texts = [job.prompt] if job.prompt is not None else _texts(job.messages)
        given, made = self._num_tokens(texts), answer.codes_per_image * len(answer.images)
        return {
            "input_tokens": given,
            "input_tokens_details": {"text_tokens": given, "image_tokens": 0},
            "output_tokens": made,
            "total_tokens": given + made,
        }

    async def _image_events(
        self, body: Any, event: str, job: worker.ImageRequest, first: Any, events: AsyncIterator[Any]
    ) -> AsyncIterator[str]:
        async with contextlib.aclosing(events):
            async for found in _after(first, events):
                if isinstance(found, Exception):
                    yield _sse(error_body(found), "error")
                    return
                image = found.image if isinstance(found, worker.Partial) else found.images[0]
                data = {"b64_json": await self._encode(image, body), "created_at": int(time.time())}
                if isinstance(found, worker.Partial):
                    kind, more = f"{event}.partial_image", {"partial_image_index": found.index}
                else:
                    kind, more = f"{event}.completed", {"seed": body.seed, "usage": self._image_usage(job, found)}
                    self.numbers.images.inc()
                yield _sse({"type": kind, **data, **_described(body, image), **more}, kind)
                if isinstance(found, worker.Images):
                    return

    def _image_job(self, body: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Arguments of an `ImageRequest` that do not depend on what is asked."""
        quality = protocol.QUALITIES.get(body.quality, "medium")
        if quality == "high" and self.worker.pipe.diffusion_decoder is not None:
            settings = {**settings, "decoder": "diffusion"}
        return {
            "seed": body.seed,
            "count": body.n,
            "settings": settings,
            "left_out": int(quality == "low" and body.num_inference_steps is None),
            "negative_prompt": body.negative_prompt,
        }

    def _schedule(self, images: list) -> Any:
        """An edit keeps the shape of its first image."""
        if not images:
            return None
        try:
            return self.worker.pipe.processor.image_processor.schedule.nearest_bucket(
                images[0].height, images[0].width
            )
        except ValueError as error:
            raise BadRequest(str(error), "image") from error

    # ---- conversations

    async def chat(self, request: Request) -> Response:
        body = self._parse(protocol.ChatBody, await self._json(request))
        protocol.check_counts(body, self.limits, body.num_images)
        if body.n != 1:
            raise BadRequest(f"n is {body.n}, expected 1 in a conversation", "n")
        messages = await self._read(functools.partial(body.conversation, self.limits))
        if set(body.modalities) == {"image"}:
            # A schedule of its own keeps a conversation out of batches: its size follows from its images.
            job: Any = worker.ImageRequest(
                messages=messages, schedule=uuid.uuid4(), **self._image_job(body, body.image_settings)
            )
        else:
            job = worker.ChatRequest(
                messages=messages,
                max_images=(body.max_images or min(4, self.limits.images)) if "image" in body.modalities else 0,
                seed=body.seed,
                settings=body.interleave_settings(self.limits),
            )
        parts = self._chat_parts(job, self._start(request, job))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        first = _checked(await anext(parts))
        if body.stream:
            return _stream(self._chat_events(body, job, head, first, parts))
        texts_of_answer, images = [], []
        async with contextlib.aclosing(parts):
            async for part in _after(first, parts):
                _checked(part)
                if isinstance(part, worker.Done):
                    break
                (texts_of_answer if part["type"] == "text" else images).append(part)
        text = "".join(part["text"] for part in texts_of_answer)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if images:
            message["images"] = [{**part, "index": index} for index, part in enumerate(images)]
        usage = self._chat_usage(job, text)
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": self._finish(job, usage, len(images)),
            "logprobs": None,
        }
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _chat_parts(self, job: Any, events: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Parts of an answer as OpenAI's clients read them, then `Done`; or an exception."""
        async with contextlib.aclosing(events):
            async for found in events:
                if isinstance(found, worker.Images):
                    for image in found.images:
                        yield await self._image_part(image)
                    yield worker.Done()
                elif isinstance(found, dict) and found["type"] == "image":
                    yield await self._image_part(found["image"])
                else:
                    yield found

    async def _image_part(self, image: Any) -> dict[str, Any]:
        self.numbers.images.inc()
        file = await asyncio.to_thread(protocol.encode_image, image)
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{file}"}}

    async def _chat_events(
        self, body: Any, job: Any, head: dict[str, Any], first: Any, parts: AsyncIterator[Any]
    ) -> AsyncIterator[str]:
        head, text, num_images = {**head, "object": "chat.completion.chunk"}, "", 0

        def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
            return _sse({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        async with contextlib.aclosing(parts):
            yield chunk({"role": "assistant", "content": ""})
            async for part in _after(first, parts):
                if isinstance(part, Exception):
                    yield _sse(error_body(part))
                    return
                if isinstance(part, worker.Done):
                    break
                if part["type"] == "text":
                    text += part["text"]
                    yield chunk({"content": part["text"]})
                else:
                    yield chunk({"images": [{**part, "index": num_images}]})
                    num_images += 1
        usage = self._chat_usage(job, text)
        yield chunk({}, self._finish(job, usage, num_images))
        if (body.stream_options or {}).get("include_usage"):
            yield _sse({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _chat_usage(self, job: Any, text: str) -> dict[str, int]:
        given, made = self._num_tokens(_texts(job.messages)), self._num_tokens([text])
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}

    def _finish(self, job: Any, usage: dict[str, int], num_images: int) -> str:
        most = self.worker.pipe.get_text_settings(job.settings.get("max_new_tokens"))["max_new_tokens"]
        # Of that limit an image takes one token.
        return "length" if usage["completion_tokens"] + num_images >= most else "stop"

    def _num_tokens(self, texts: list[str]) -> int:
        return sum(len(self.worker.pipe.processor.tokenizer.tokenize(text)) for text in texts)

    # ---- the rest

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "nextflow-hf"}

    async def health(self) -> Response:
        if self.worker.is_alive:
            return JSONResponse({"status": "ok"})
        return error_response(worker.Stopped("the worker has ended"))

    async def metrics(self) -> Response:
        return Response(generate_latest(self.numbers.registry), media_type=CONTENT_TYPE_LATEST)

    # ---- reading requests, and waiting for what the worker makes of them

    def _check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            raise BadRequest(f"the model {model[:80]!r} is not here, expected {self.name!r}", "model", status=404)

    def _parse(self, kind: Any, data: Any) -> Any:
        body = protocol.parse(kind, data)
        self._check_model(body.model)
        return body

    async def _json(self, request: Request) -> Any:
        if not request.headers.get("content-type", "").lower().startswith("application/json"):
            raise BadRequest("the content type is not application/json", status=415)
        with _in_time(self.seconds):
            data = await request.body()
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the request is no JSON: {error}"[:200]) from error

    async def _form(self, request: Request) -> tuple[dict[str, Any], list[Any], Any]:
        """Fields, images and mask of a multipart form, in which OpenAI's client writes `image[]` for several."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise BadRequest("the content type is neither multipart/form-data nor application/json", status=415)
        fields: dict[str, Any] = {}
        sources, mask = [], None
        with _in_time(self.seconds):
            async with request.form(max_files=self.limits.source_images + 1, max_fields=100) as form:
                for name, value in form.multi_items():
                    read = await value.read() if isinstance(value, UploadFile) else value
                    if name in ("image", "image[]"):
                        sources.append(read)
                    elif name == "mask":
                        mask = read
                    elif isinstance(read, str) and name.endswith("[]"):  # a list, an entry at a time
                        fields.setdefault(name.removesuffix("[]"), []).append(read)
                    elif isinstance(read, bytes) or name in fields:
                        raise BadRequest(f"{name[:80]}: a file, or there twice", name[:80])
                    else:
                        fields[name] = read
        return fields, sources, mask

    async def _read(self, read: Callable[[], Any]) -> Any:
        """`read()` in a thread of its own kind: slow addresses must not hold the threads that write answers."""
        with _in_time(self.seconds):
            return await anyio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=self.readers)

    def _start(self, request: Request, job: Any) -> AsyncIterator[Any]:
        """Puts `job` into the queue; what the worker then emits. Ends, and cancels the work, when the client goes."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def emit(found: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(events.put_nowait, found)

        job.emit, job.seconds = emit, self.seconds
        self.worker.submit(job)
        return self._events(request, job, events)

    async def _events(self, request: Request, job: Any, events: asyncio.Queue) -> AsyncIterator[Any]:
        is_done = False
        try:
            while not is_done:
                try:
                    found = await asyncio.wait_for(events.get(), POLL_SECONDS)
                except TimeoutError:
                    # A client that has gone is noticed only when asked for.
                    if await request.is_disconnected():
                        raise ClientDisconnect from None
                    if not job.is_over:
                        continue
                    found = worker.OutOfTime(job.seconds)  # the worker may be busy with another's answer
                is_done = isinstance(found, (worker.Images, worker.Done, Exception))
                yield found
        finally:
            if not is_done:
                job.cancel()
                self.numbers.cancelled.inc()


@contextlib.contextmanager
def _in_time(seconds: float) -> Any:
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError:
        raise BadRequest(f"the request was not sent within {seconds:g} s", status=408) from None


def _checked(found: Any) -> Any:
    """What the worker made, or the response to its failure."""
    if isinstance(found, Exception):
        raise BadRequest(error_body(found)["error"]["message"], status=status_of(found))
    return found


async def _after(first: Any, others: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for one in others:
        yield one


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


def _described(body: Any, image: Any) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": body.output_format,
        "quality": protocol.QUALITIES.get(body.quality, "medium"),
        "size": f"{image.width}x{image.height}",
    }


def _sse(data: dict[str, Any], event: str | None = None) -> str:
    """A server-sent event."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data)}\n\n"


def _stream(events: AsyncIterator[str]) -> StreamingResponse:
    async def until_gone() -> AsyncIterator[str]:
        async with contextlib.aclosing(events):
            with contextlib.suppress(ClientDisconnect):
                async for event in events:
                    yield event

    return StreamingResponse(until_gone(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


__all__ = ["Api", "Guard", "make_app"]
