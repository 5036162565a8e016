"""CUDA graphs of the decoder's passes, recorded where launching kernels is what a pass costs.

A graph belongs to the memory that it was recorded on: keys and values of one size, for so many rows. Prompts are
padded to one of few lengths, so other prompts find the graphs of the first. Knows passes, not what runs through them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .attention_nextflow import PLACE, layers_of, reserved_cache
from .configuration_nextflow import NextFlowConfig


logger = logging.get_logger(__name__)

PROMPT_LENGTHS = 64  # graphs are for prompts of a multiple of it
MAX_FREE = 8  # workspaces that wait to be used again: at 7B, 1,024 pixels and guidance 1.2 GB each


@dataclass(eq=False)
class Workspace:
    """Keys and values of one call at a time, and the passes that were recorded on them."""

    graphs: "PassGraphs"  # to which it is given back, and whose weights its passes read
    key: tuple[int, int]
    cache: DynamicCache
    passes: dict[tuple, "RecordedPass"] = field(default_factory=dict)


@dataclass
class RecordedPass:
    """Copies inputs to where the graph reads them, and replays it."""

    inputs: list[torch.Tensor]
    replay: Callable[[], torch.Tensor]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        # On the current stream, where the replay follows: the copies are done before it reads.
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        return self.replay()


class PassGraphs:
    """
    Workspaces that no call uses at the moment, at most `MAX_FREE`: those that were used last.

    Args:
        max_cells (`int`): Cells of the largest block that is recorded. Larger ones are compute-bound.
    """

    def __init__(self, max_cells: int):
        self.max_cells = max_cells
        self.free: list[Workspace] = []  # used last at the end

    def take(self, config: NextFlowConfig, rows: int, length: int) -> Workspace:
        """A workspace of so many rows and tokens, of this call alone until it is given back."""
        key = (rows, length)
        workspace = next((one for one in reversed(self.free) if one.key == key), None)
        if workspace is None:
            workspace = Workspace(self, key, reserved_cache(config, length))
        else:
            self.free.remove(workspace)
        # The positions that the last call left on the cache are not this prompt's.
        vars(workspace.cache).pop(PLACE, None)
        # Rewind instead of allocating: graphs write to the addresses they were recorded with.
        for layer in layers_of(workspace.cache):
            layer.resize(0)
        return workspace

    def give_back(self, workspace: Workspace) -> None:
        """Keep a workspace, with its graphs, for the next call."""
        self.free.append(workspace)
        # Prompts of many lengths and batches of many sizes would fill the device with memory that nobody uses.
        del self.free[:-MAX_FREE]

    def run(
        self, workspace: Workspace, cache: DynamicCache, function: Callable[..., torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        """`function(*inputs)`, which appends to rows of the workspace's keys and values, by its graph."""
        length, cells = cache.get_seq_length(), inputs[1].shape[1]
        # A graph is bound to its shapes and to the place that it writes to.
        key = (len(inputs[0]), cells, length)
        if key not in workspace.passes:
            start = time.perf_counter()
            # The graph reads these copies at every replay: callers' tensors lie elsewhere each time.
            own = [tensor.clone() for tensor in inputs]

            def run() -> torch.Tensor:
                # The function runs once to warm up and once to record, and both must append at the same place.
                for layer in layers_of(cache):
                    layer.resize(length)
                return function(*own)

            workspace.passes[key] = RecordedPass(own, capture(run))
            logger.info(f"recorded a pass of {key[0]} x {cells} cells in {time.perf_counter() - start:.2f} s")
        # A replay runs kernels only: no Python counts the tokens that they append.
        result = workspace.passes[key](*inputs)
        for layer in layers_of(cache):
            layer.resize(length + cells)
        return result


def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A CUDA graph of `run`, which reads and writes the same memory at each replay."""
    stream = torch.cuda.Stream()
    # Warm up on another stream, as PyTorch asks for before a capture.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their workspaces outside of the graph
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        # Always the same tensor, which the next replay overwrites.
        return result

    return replay
