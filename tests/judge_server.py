"""A stub of a judge on loopback: an OpenAI-compatible server whose answers a test writes."""

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


Reply = Callable[[str, list[Image.Image]], str | dict | int | tuple[int, str]]


class JudgeServer(ThreadingHTTPServer):
    """
    `reply(text, images)` gives the words of an answer, or a dict of first tokens with their log-probabilities, or an
    HTTP status, or a status with the words of its error. `asked` has the (text, images) of all requests.
    """

    def __init__(self, reply: Reply):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.asked = reply, []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *parts, text = body["messages"][0]["content"]
        images = [part["image_url"]["url"].partition(",")[2] for part in parts]
        images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in images]
        self.server.asked.append((text["text"], images))
        reply = self.server.reply(text["text"], images)
        status, reply = reply if isinstance(reply, tuple) else (reply, "") if isinstance(reply, int) else (200, reply)
        self.send_response(status)
        self.end_headers()
        if isinstance(reply, dict):
            top = [{"token": token, "logprob": value} for token, value in reply.items()]
            choice = {"message": {"content": next(iter(reply))}, "logprobs": {"content": [{"top_logprobs": top}]}}
        else:
            choice = {"message": {"content": reply}}
        body = {"choices": [choice]} if status == 200 else {"error": {"message": reply}}
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def judge_server(reply: Reply) -> Iterator[JudgeServer]:
    server = JudgeServer(reply)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
