"""The server in Ray Serve: replicas on any number of machines, each with a pipeline of its own.

    serve run nextflow_hf.serving.ray_app:build model=path/to/pipeline max_replicas=4

Ray's proxy spreads requests over the replicas, starts more while they are busy, and replaces those that die.
"""

import os
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve


class Options(BaseModel):
    """
    Arguments of [`build`], on the command line or in a file of `serve deploy`.

    Args:
        model (`str`, *optional*): Folder that all machines see, or Hub id; by default the shipped model.
        name (`str`, *optional*): What clients call it; by default the folder's name or the Hub id.
        dtype (`str`, *optional*), device (`str`, *optional*): As in `nextflow-hf serve`.
        min_replicas, max_replicas (`int`): Bounds of autoscaling.
        gpus_per_replica (`float`), cpus_per_replica (`float`): What each takes; without a GPU 0.
        max_queue (`int`), max_batch (`int`), max_wait_ms (`float`), timeout (`float`): Per replica.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    name: str | None = None
    dtype: str | None = None
    device: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    gpus_per_replica: float = 1
    cpus_per_replica: float = 1
    max_queue: int = 64
    max_batch: int = 8
    max_wait_ms: float = 10
    timeout: float = 600


def build(options: Options) -> serve.Application:
    """The application for `serve run`. The API key is that of the environment, `NEXTFLOW_API_KEY`."""
    api_key = os.environ.get("NEXTFLOW_API_KEY")

    def load() -> Any:  # in each replica
        from nextflow_hf.commands import serve as command

        args = command.make_parser().parse_args([])
        own = options.model_dump(include=vars(args).keys(), exclude_none=True)
        vars(args).update(own, served_name=options.name, api_key=api_key, quiet=True)
        return command.load_app(args)

    deployment = serve.deployment(
        serve.ingress(load)(),
        name="nextflow",
        ray_actor_options={"num_gpus": options.gpus_per_replica, "num_cpus": options.cpus_per_replica},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.max_batch,
        },
        max_ongoing_requests=options.max_queue + options.max_batch,
        graceful_shutdown_timeout_s=options.timeout,
        health_check_period_s=5,
    )
    return deployment.bind()
