"""Sharded policies (FSDP2) outside of `forward`: sampling from one, and its class when it is saved.

Knows modules and processes, nothing of images and rewards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.distributed.fsdp import FSDPModule

from ...modeling_nextflow.modeling_nextflow import NextFlowModel


Result = TypeVar("Result")


def call_sharded(root: torch.nn.Module, decoder: NextFlowModel, function: Callable[[], Result]) -> Result:
    """
    Call `function`, which runs `decoder` and other parts of `root` in any order and any number of times.

    Under FSDP2 the call counts as one forward of `root`: each decoder layer gathers its weights when it runs, and all
    other weights (embeddings, connector, codebook, head) are gathered once. Processes must gather layers equally
    often, so one that finishes early runs the decoder on a single token until all are finished. Without FSDP2 this
    is a plain call.

    Args:
        root (`torch.nn.Module`): The wrapped policy.
        decoder ([`NextFlowModel`]): The decoder inside it.
        function (`Callable`): Makes no collective call of its own.
    """
    if not isinstance(root, FSDPModule):
        return function()
    in_layers = {module for layer in decoder.layers for module in layer.modules()}
    others = [module for module in root.modules() if isinstance(module, FSDPModule) and module not in in_layers]
    results = []

    def run() -> None:
        for module in others:
            # Parts outside of the layers are called in any order and number: they stay gathered to the end.
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        with _announced(decoder):
            results.append(function())
        weight = decoder.norm.weight
        # The smallest pass that gathers every layer once.
        token = weight.new_zeros(1, 1, len(weight))
        is_any_busy = True
        while is_any_busy:
            is_any_busy = _is_any_busy(weight.device, False)
            # The last pass is everybody's: the backward pass prefetches in the order of the passes before it.
            decoder(inputs_embeds=token, use_cache=False)

    root.run_sharded = run  # FSDP2 takes methods by their name
    torch.distributed.fsdp.register_fsdp_forward_method(root, "run_sharded")
    try:
        root.run_sharded()
    finally:
        del root.run_sharded
    for module in others:
        module.reshard()
    return results[0]


@contextmanager
def _announced(decoder: NextFlowModel) -> Iterator[None]:
    """Tell the other processes before each pass of `decoder` that it takes place."""
    hook = decoder.register_forward_pre_hook(lambda module, _: _is_any_busy(module.norm.weight.device, True))
    try:
        yield
    finally:
        hook.remove()


def _is_any_busy(device: torch.device, is_busy: bool) -> bool | None:
    count = torch.tensor(int(is_busy), device=device)
    torch.distributed.all_reduce(count)
    return None if is_busy else bool(count)  # a busy process does not wait for the answer


@contextmanager
def class_of_user(model: torch.nn.Module) -> Iterator[None]:
    """The model under its own class while it is saved, which writes the class's name and file, not that of FSDP2."""
    wrapped = type(model)
    if issubclass(wrapped, FSDPModule):
        model.__class__ = next(parent for parent in wrapped.__bases__ if not issubclass(parent, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = wrapped
