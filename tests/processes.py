"""Forked processes: what is imported already is not imported again."""

import multiprocessing
import os
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.std import tqdm


# By default it is shared with forked processes, and one that is killed while it writes never gives it back.
tqdm.set_lock(threading.RLock())


def in_a_process(function: Callable[..., Any], *args) -> multiprocessing.Process:
    """`function(*args)` in a process of its own, started."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def in_processes(
    function: Callable[..., Any], *args, count: int = 2, seconds: float = 120, **environment
) -> list[Any]:
    """
    What `function(*args)` returns in each of `count` gloo processes that know of each other; one that raises fails.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, **environment,
        }  # fmt: skip
        child = context.Process(target=_run, args=(theirs, function, args, variables))
        child.start()
        theirs.close()
        children.append((child, ours))
    results = []
    for _, ours in children:
        if not ours.poll(seconds):
            for other, _ in children:
                other.kill()
            _release_builds()
            raise TimeoutError(f"a process is silent for {seconds} s: they wait for each other")
        try:
            results.append(ours.recv())
        except EOFError:
            results.append((False, "the process died"))
    for child, _ in children:
        child.join(10)
        child.kill()
    failures = [result for is_fine, result in results if not is_fine]
    assert not failures, "\n".join(failures)
    return [result for _, result in results]


def _release_builds() -> None:
    """A process that is killed while it builds an extension of torch leaves a lock, at which all later ones wait."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    for lock in Path(root).glob("*/*/lock"):
        lock.unlink(missing_ok=True)


def _run(pipe, function: Callable[..., Any], args: tuple, variables: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # the parent's clean-up is none of ours
