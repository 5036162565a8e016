"""The server in Ray Serve: two replicas on CPUs, killed and replaced while clients wait. Minutes: marked `engine`."""

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


def deploy(**options) -> None:
    from ray import serve

    from nextflow_hf.serving.ray_app import Options, build

    own = {"dtype": "float32", "min_replicas": 2, "max_replicas": 2, "gpus_per_replica": 0, "cpus_per_replica": 0.5}
    serve.run(build(Options(**own, **options)), name="nextflow")


@pytest.fixture
def address(monkeypatch):
    from ray import serve

    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    deploy()
    yield "http://127.0.0.1:8765/v1"
    serve.shutdown()
    ray.shutdown()


def replicas() -> list:
    """Names of the actors that have the pipelines."""
    return [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "#nextflow#" in actor["name"]
    ]


class Clients:
    """Threads that ask one after the other, and the images of their seeds."""

    def __init__(self, address: str, count: int):
        self.client = openai.OpenAI(base_url=address, api_key="none", max_retries=8, timeout=120)
        self.images: dict[int, Image.Image] = {}
        self.threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(count)]

    def _ask(self, seed: int) -> None:
        answer = self.client.images.generate(prompt="a red circle", extra_body={"seed": seed})
        self.images[seed] = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))

    @property
    def models(self) -> set[str]:
        return {self.client.models.list().data[0].id for _ in range(8)}

    def check(self) -> None:
        """Everybody got the image that the prompt and the seed give alone."""
        for thread in self.threads:
            thread.join(180)
        assert sorted(self.images) == list(range(len(self.threads)))
        pipe = NextFlowPipeline.from_pretrained(shapes_model_path(), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        for seed, image in self.images.items():
            (expected,) = pipe("a red circle", generator=torch.Generator().manual_seed(seed)).images
            assert image.tobytes() == expected.tobytes()


def test_requests_outlive_a_replica(address):
    clients = Clients(address, 24)
    assert clients.models == {"nextflow-shapes"}
    for thread in clients.threads[:12]:
        thread.start()
    first, second = replicas()
    ray.kill(ray.get_actor(first, namespace="serve"), no_restart=True)
    for thread in clients.threads[12:]:
        thread.start()
        time.sleep(0.1)
    clients.check()
    deadline = time.monotonic() + 120  # it is replaced
    while len(replicas()) < 2 or first in replicas():
        assert time.monotonic() < deadline
        time.sleep(1)


def test_a_reload_loses_no_request(address):
    """Replicas with the new options take over one by one, while clients ask."""
    clients, old = Clients(address, 24), set(replicas())
    reload = threading.Thread(target=deploy, kwargs={"name": "second"})
    for index, thread in enumerate(clients.threads):
        if index == 4:
            reload.start()
        thread.start()
        time.sleep(0.5)
    reload.join(300)
    clients.check()
    assert clients.models == {"second"}
    assert len(replicas()) == 2 and not old & set(replicas())
