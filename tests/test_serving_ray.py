"""The server in Ray Serve: two replicas on CPUs, of which one is killed while clients wait. Minutes: marked slow."""

import base64
import io
import os
import threading
import time

import pytest
import torch
from PIL import Image

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path


openai = pytest.importorskip("openai")
ray = pytest.importorskip("ray")

pytestmark = pytest.mark.engine


@pytest.fixture
def address(monkeypatch):
    from ray import serve

    from nextflow_hf.serving.ray_app import Options, build

    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    options = Options(dtype="float32", min_replicas=2, max_replicas=2, gpus_per_replica=0, cpus_per_replica=0.5)
    serve.run(build(options), name="nextflow")
    yield "http://127.0.0.1:8765/v1"
    serve.shutdown()
    ray.shutdown()


def replicas() -> list:
    """Names of the actors that have the pipelines."""
    return [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "#nextflow#" in actor["name"]
    ]


def test_requests_outlive_a_replica(address):
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=8, timeout=120)
    assert client.models.list().data[0].id == "nextflow-shapes"
    images: dict[int, str] = {}

    def ask(seed: int) -> None:
        answer = client.images.generate(prompt="a red circle", extra_body={"seed": seed})
        images[seed] = answer.data[0].b64_json

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
    for thread in threads[:12]:
        thread.start()
    first, second = replicas()
    ray.kill(ray.get_actor(first, namespace="serve"), no_restart=True)
    for thread in threads[12:]:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(180)
    assert sorted(images) == list(range(24))
    pipe = NextFlowPipeline.from_pretrained(shapes_model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for seed, image in images.items():
        (expected,) = pipe("a red circle", generator=torch.Generator().manual_seed(seed)).images
        assert Image.open(io.BytesIO(base64.b64decode(image))).tobytes() == expected.tobytes()
    deadline = time.monotonic() + 120  # it is replaced
    while len(replicas()) < 2 or first in replicas():
        assert time.monotonic() < deadline
        time.sleep(1)
