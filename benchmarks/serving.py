"""The server as users run it, by OpenAI's own client, on the shipped model or another:

    python benchmarks/serving.py                     # this environment's `nextflow-hf serve`
    python benchmarks/serving.py --clean             # that of a new environment, into which HEAD is installed first
    python benchmarks/serving.py --model path/to/pipeline --device cuda --dtype bfloat16

1. Every route, streaming included.
2. 50 clients at once: every image equals the one of the same prompt and seed sampled alone (in float32), and nothing
   fails but with 429, after which a client asks again.
3. Throughput of 8 clients against one at a time, and how long an answer takes (p50, p95), of the same server.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import torch
from PIL import Image

from nextflow_hf.commands import loading
from nextflow_hf.commands.serve import make_parser


ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("a red circle", "a blue square left of a green circle", "a green triangle", "two yellow circles")
TRIES = 50  # of a client, which waits between them as long as the server says


def install(folder: str) -> str:
    """The Python of a new environment, with HEAD and the extra `serve` installed."""
    source = Path(folder, "source")
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
    subprocess.run([sys.executable, "-m", "venv", f"{folder}/environment"], check=True)
    python = f"{folder}/environment/bin/python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(source / "constraints.txt")]
    subprocess.run([*pip, f"{source}[serve]"], check=True)
    return python


@contextlib.contextmanager
def served(python: str, args: argparse.Namespace, *options: object) -> Iterator[str]:
    """The address of a server in a process of its own, which ends by SIGTERM and says that it answered all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "nextflow_hf.cli", "serve", *([args.model] if args.model else []), "--port", port]
    command += ["--dtype", args.dtype, *(["--device", args.device] if args.device else []), *options]
    env = {name: value for name, value in os.environ.items() if python == sys.executable or name != "PYTHONPATH"}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as elsewhere:
        where = {"cwd": elsewhere} if python != sys.executable else {}
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=env, **where)
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server ended with status {server.returncode}: {log.read()[-2000:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            status = server.wait(120)
    if status != 0:
        raise RuntimeError(f"the server ended with status {status} after SIGTERM, expected 0")


def image_of(text: str) -> Image.Image:
    """An image of base64 or of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(text.rpartition("base64,")[2])))


def check_routes(url: str) -> list[str]:
    """Every route by OpenAI's client; the names of those that answered as they should."""
    client = openai.OpenAI(base_url=url, api_key="none")
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    answer = client.images.generate(prompt=PROMPTS[0], n=2, extra_body={"seed": 1})
    image = image_of(answer.data[1].b64_json)
    events = list(client.images.generate(prompt=PROMPTS[0], stream=True, partial_images=1, extra_body={"seed": 1}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
    file = io.BytesIO()
    image.save(file, "PNG")
    source = ("image.png", file.getvalue())
    assert (
        image_of(client.images.edit(prompt="make the circle blue", image=source).data[0].b64_json).size == image.size
    )
    stream = client.images.edit(prompt="make the circle blue", image=[source, source], stream=True, partial_images=1)
    assert [event.type for event in stream][-1] == "image_edit.completed"
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "what color is the circle"}]
    messages = [{"role": "user", "content": content}]
    settings = {"model": model.id, "messages": messages, "temperature": 0, "max_tokens": 16}
    text = client.chat.completions.create(**settings).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**settings, stream=True)
    ]
    assert text and "".join(pieces) == text
    asked = [{"role": "user", "content": PROMPTS[0]}]
    said = client.chat.completions.create(model=model.id, messages=asked, extra_body={"modalities": ["image"]})
    assert image_of(said.choices[0].message.images[0]["image_url"]["url"]).size == image.size
    for kind in ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"messages": []}):
        with contextlib.suppress(openai.BadRequestError):
            client.chat.completions.create(**{"model": model.id, "messages": asked, **kind})
            raise AssertionError(f"{kind} was answered, expected a refusal")
    assert b"nextflow_requests_total" in urllib.request.urlopen(url.replace("/v1", "/metrics")).read()
    return ["models", "generations", "edits", "chat/completions", "streams of the three", "health", "metrics"]


def body_of(index: int) -> dict:
    return {"prompt": PROMPTS[index % len(PROMPTS)], "extra_body": {"seed": index}}


async def load(url: str, clients: int, requests: int) -> tuple[dict[int, Image.Image], list[float], float]:
    """`requests` by so many clients: images, seconds of each, and of all."""
    images, seconds, left = {}, [], iter(range(requests))
    client = openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=TRIES)

    async def work() -> None:
        for index in left:
            begin = time.perf_counter()
            answer = await client.images.generate(**body_of(index))
            seconds.append(time.perf_counter() - begin)
            images[index] = image_of(answer.data[0].b64_json)

    async with client:
        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        return images, seconds, time.perf_counter() - begin


def statuses(url: str) -> dict[str, int]:
    """How often the server answered a generation with each status."""
    lines = urllib.request.urlopen(url.replace("/v1", "/metrics")).read().decode().splitlines()
    rows = [line for line in lines if line.startswith("nextflow_requests_total") and "generations" in line]
    return {row.partition('status="')[2].partition('"')[0]: int(float(row.split()[-1])) for row in rows}


def check_equal(url: str, args: argparse.Namespace) -> dict:
    images, _, _ = asyncio.run(load(url, args.crowd, args.crowd))
    options = make_parser().parse_args([])
    options.model, options.device, options.dtype, options.quiet = args.model, args.device, args.dtype, True
    pipe = loading.load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    different = []
    for index, image in sorted(images.items()):
        generator = torch.Generator().manual_seed(index)
        (expected,) = pipe(PROMPTS[index % len(PROMPTS)], generator=generator).images
        if image.tobytes() != expected.tobytes():
            different.append(index)
    return {"clients": args.crowd, "answers": len(images), "different": different, "statuses": statuses(url)}


def measure(url: str, clients: int, requests: int) -> dict:
    asyncio.run(load(url, clients, 2 * clients))  # warm
    _, seconds, total = asyncio.run(load(url, clients, requests))
    ordered = sorted(seconds)
    return {
        "clients": clients,
        "images_per_second": round(requests / total, 2),
        "p50_ms": round(1000 * statistics.median(ordered)),
        "p95_ms": round(1000 * ordered[int(0.95 * (len(ordered) - 1))]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="from a new environment")
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--crowd", type=int, default=50, help="clients at once of the second part")
    parser.add_argument("--clients", type=int, default=8, help="clients of the third part")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=1, help="of the third part, whose medians count")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = "1"  # one thread for the model, another for decoding
        torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        python = install(stack.enter_context(tempfile.TemporaryDirectory())) if args.clean else sys.executable
        with served(python, args, "--max-queue", args.crowd // 2) as url:
            print(json.dumps({"routes": check_routes(url)}), flush=True)
            print(json.dumps({"equal": check_equal(url, args)}), flush=True)
        with served(python, args) as url:
            ratios = []
            for _ in range(args.repeats):
                rows = [measure(url, clients, args.requests) for clients in (1, args.clients)]
                ratios.append(rows[1]["images_per_second"] / rows[0]["images_per_second"])
                print(
                    json.dumps({"throughput": rows, "ratio": round(ratios[-1], 2)}),
                    flush=True,
                )
    print(json.dumps({"ratio": round(statistics.median(ratios), 2)}))


if __name__ == "__main__":
    main()
