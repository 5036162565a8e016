"""The server under load, on the shipped model or another:

    python benchmarks/serving.py                     # on this machine's accelerator, else its CPU
    python benchmarks/serving.py --model path/to/pipeline --device cuda --clients 8 --requests 64

1. 50 clients at once: every image equals the one of the same prompt and seed sampled alone (in float32), and nothing
   fails but with 429, after which a client asks again.
2. Throughput of 8 clients against one at a time, and how long an answer takes (p50, p95).
"""

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import socket
import statistics
import threading
import time

import httpx
import torch
import uvicorn
from PIL import Image

from nextflow_hf.commands import loading
from nextflow_hf.commands.serve import make_parser
from nextflow_hf.serving.app import make_app


PROMPTS = ("a red circle", "a blue square left of a green circle", "a green triangle", "two yellow circles")


def start(pipe, **options) -> tuple[str, uvicorn.Server]:
    """The address of a server of `pipe`, in a thread of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(pipe, name="model", **options), port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{port}", server


def apart(*args) -> tuple[dict[int, bytes], list[float], dict[int, int], float]:
    """[`load`] in a process of its own, as clients are: they must not share the server's interpreter."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_run, args)


def _run(*args):
    return asyncio.run(load(*args))


def body_of(index: int) -> dict:
    return {"prompt": PROMPTS[index % len(PROMPTS)], "seed": index}


async def ask(client: httpx.AsyncClient, index: int, statuses: dict[int, int]) -> tuple[bytes, float]:
    """The image of a request, as often as it takes, and the seconds of the last try."""
    while True:
        started = time.perf_counter()
        answer = await client.post("/v1/images/generations", json=body_of(index))
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        if answer.status_code == 200:
            data = base64.b64decode(answer.json()["data"][0]["b64_json"])
            return data, time.perf_counter() - started
        if answer.status_code != 429:
            raise RuntimeError(f"status {answer.status_code}: {answer.text}")
        await asyncio.sleep(float(answer.headers["retry-after"]) * (0.5 + index % 5 / 4))


async def load(url: str, clients: int, requests: int) -> tuple[dict[int, bytes], list[float], dict[int, int], float]:
    """`requests` by so many clients: images, seconds of each, statuses, and the time of all."""
    images, seconds, statuses, left = {}, [], {}, iter(range(requests))

    async def work(client: httpx.AsyncClient) -> None:
        for index in left:
            images[index], spent = await ask(client, index, statuses)
            seconds.append(spent)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        return images, seconds, statuses, time.perf_counter() - started


def check_equal(pipe, clients: int) -> dict:
    url, server = start(pipe, max_queue=clients // 2, max_wait=0.02)
    images, _, statuses, _ = apart(url, clients, clients)
    server.should_exit = True
    different = []
    for index, data in images.items():
        body = body_of(index)
        generator = torch.Generator().manual_seed(body["seed"])
        (expected,) = pipe(body["prompt"], generator=generator).images
        if Image.open(io.BytesIO(data)).tobytes() != expected.tobytes():
            different.append(index)
    return {"clients": clients, "answers": len(images), "different": different, "statuses": statuses}


def measure(pipe, clients: int, requests: int, max_batch: int) -> dict:
    url, server = start(pipe, max_batch=max_batch, max_wait=0.01 if clients > 1 else 0)
    apart(url, clients, 2 * clients)  # warm
    _, seconds, _, total = apart(url, clients, requests)
    server.should_exit = True
    ordered = sorted(seconds)
    return {
        "clients": clients,
        "images_per_second": round(requests / total, 2),
        "p50_ms": round(1000 * statistics.median(ordered)),
        "p95_ms": round(1000 * ordered[int(0.95 * (len(ordered) - 1))]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--crowd", type=int, default=50, help="clients at once of the first part")
    parser.add_argument("--clients", type=int, default=8, help="clients of the second part")
    parser.add_argument("--requests", type=int, default=48)
    args = parser.parse_args()
    options = make_parser().parse_args([])
    options.model, options.device, options.dtype, options.quiet = args.model, args.device, args.dtype, True
    pipe = loading.load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    equal = check_equal(pipe, args.crowd)
    rows = [measure(pipe, count, args.requests, max(args.clients, 1)) for count in (1, args.clients)]
    ratio = rows[1]["images_per_second"] / rows[0]["images_per_second"]
    print(
        json.dumps({"device": options.device, "equal": equal, "throughput": rows, "ratio": round(ratio, 2)}, indent=1)
    )


if __name__ == "__main__":
    main()
