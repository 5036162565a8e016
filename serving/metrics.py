"""What Prometheus reads at `/metrics`."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .worker import Request, Worker


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        mine = {"namespace": "nextflow", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests", ["route", "status"], **mine)
        self.seconds = Histogram("request_seconds", "Time of a request", ["route"], buckets=SECONDS, **mine)
        self.images = Counter("images", "Images that were sent", **mine)
        self.waited = Histogram("queue_seconds", "Time in the queue", buckets=SECONDS, **mine)
        self.batch = Histogram("batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), **mine)
        self.cancelled = Counter("cancelled", "Requests whose client went away", **mine)
        self.waiting = Gauge("queue_requests", "Requests that wait", **mine)
        self.num_unanswered = 0  # cut off where the server stops, when nobody reads the others any more

    def watch(self, worker: Worker) -> None:
        """Report the length of this worker's queue."""
        self.waiting.set_function(lambda: worker.num_waiting)

    def on_batch(self, batch: list[Request]) -> None:
        """Count a batch that begins: its images, and how long its requests waited."""
        self.batch.observe(sum(request.count for request in batch))
        for request in batch:
            self.waited.observe(time.monotonic() - request.submitted)
