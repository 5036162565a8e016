"""What the pipelines share: calls that offloading sees, one thread at a time, a generator for every image, arrays of
one shape as one."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


logger = logging.get_logger(__name__)
# Bounds of the numbers in a call that may be 0 or a fraction.
LEAST_NUMBERS = {"keep_scales": {"least": 0, "is_whole": True}, "mask_coverage": {"least": 0}}


@functools.lru_cache
def warn_once(message: str) -> None:
    """For what an engine does with every request."""
    logger.warning(message)


@apply_forward_hook
def call_component(model: nn.Module, method: str, *args, **kwargs) -> Any:
    """A method of `model` that is not `forward`, the one that diffusers' offloading hooks into."""
    return getattr(model, method)(*args, **kwargs)


def check_fingerprint(name: str, expected: str | None, vision_tokenizer: Any) -> None:
    """Raises `ValueError` where the component `name` knows the codes of another vision tokenizer."""
    if expected is None:
        return
    found = vision_tokenizer.get_codes_fingerprint()
    if found is None:
        logger.warning(
            "the vision tokenizer does not say whose codes it gives (its config has no `codes_fingerprint`), so that "
            f"the {name} knows them is not checked: load it in float32 and save it again"
        )
    elif found != expected:
        raise ValueError(
            f"the {name} knows the codes of the vision tokenizer {expected}, got {found}: use the tokenizer that it "
            "was trained with"
        )


# Beside the pipelines, not on them: a lock can be neither copied nor pickled.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


@contextmanager
def exclusive(pipeline: Any) -> Iterator[None]:
    """
    Keeps other threads out of `pipeline`, on which a call leaves its guidance, its steps and whether to stop. They get
    an error rather than a place in a queue: who waits for whom is for the caller to decide. The same thread may enter
    again. Not for use across a `yield`, after which a generator may go on in another thread. What is the same for all
    of a call is kept in `pipeline._call` meanwhile.
    """
    lock = _LOCKS.setdefault(pipeline, threading.RLock())
    if not lock.acquire(blocking=False):
        name = type(pipeline).__name__
        raise RuntimeError(
            f"another thread is in a call of this {name}, which takes one at a time: wait for it, or give each thread "
            f"a pipeline of its own on the same weights, `{name}(**pipe.components)` (not with offloading, which "
            "would move weights that another thread computes with)"
        )
    outer = vars(pipeline).get("_call")
    vars(pipeline)["_call"] = {} if outer is None else outer
    try:
        yield
    finally:
        vars(pipeline)["_call"] = outer
        lock.release()


def exclusively(method: Callable) -> Callable:
    """A method of a pipeline, [`exclusive`]."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with exclusive(self):
            return method(self, *args, **kwargs)

    return guarded


class SharedComponentsMixin:
    """For pipelines whose components are all that they are made of."""

    @property
    def _execution_device(self) -> torch.device:
        # Overwritten: diffusers walks over all modules to find it, and a call needs it at every step.
        call = vars(self).get("_call")
        if call is None:
            return super()._execution_device
        if "device" not in call:
            call["device"] = super()._execution_device
        return call["device"]

    @classmethod
    def _dict_from_json_file(cls, json_file: str | PathLike) -> dict[str, Any]:
        """
        The index of a repository. One that brings its code names that, for `DiffusionPipeline`, which asks for trust
        before it runs any: this class is the same code, and so are those of its components.
        """
        index = super()._dict_from_json_file(json_file)
        package = cls.__module__.split(".")[0]
        if isinstance(index.get("_class_name"), list) and package in LOADABLE_CLASSES:
            index["_class_name"] = index["_class_name"][1]
            for name, entry in index.items():
                if isinstance(entry, list) and hasattr(sys.modules[package], entry[1] or ""):
                    index[name] = [package, entry[1]]
        return index

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """
        A pipeline on the components of another one, of which `kwargs` replace some. Overwritten: without a `dtype`
        diffusers casts them to float32, and with them those of the pipeline that it was given.
        """
        if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
            return super().from_pipe(pipeline, **kwargs)
        names = inspect.signature(cls.__init__).parameters
        shared = {name: part for name, part in pipeline.components.items() if name in names}
        made = cls(**{**shared, **kwargs})
        made.register_to_config(**{name: value for name, value in pipeline.config.items() if name.startswith("_")})
        return made


def generator_per_image(
    generator: torch.Generator | list[torch.Generator] | None, num_images: int
) -> list[torch.Generator] | None:
    """Each image gets a generator of its own, seeded with one number of the given one or of its entry in a list."""
    if generator is None:
        return None
    sources = list(generator) if isinstance(generator, (list, tuple)) else [generator] * num_images
    if not all(isinstance(source, torch.Generator) for source in sources):
        raise ValueError(f"`generator` is {generator!r:.80}, expected a torch.Generator or a list of them")
    if len(sources) != num_images:
        raise ValueError(f"`generator` has {len(sources)} entries for {num_images} images, expected one or as many")
    seeds = [int(torch.randint(2**63 - 1, (), generator=source, device=source.device)) for source in sources]
    return [torch.Generator(source.device).manual_seed(seed) for source, seed in zip(sources, seeds, strict=True)]


def check_number(name: str, value: Any, *, least: float = 0, is_whole: bool = False) -> None:
    """Raise where a setting is given and is no number of at least `least`. NumPy's scalars are numbers, too."""
    if value is None:
        return
    kind = "whole number" if is_whole else "number"
    if isinstance(value, bool) or not isinstance(value, Integral if is_whole else Real):
        raise ValueError(f"`{name}` is {value!r} ({type(value).__name__}), expected a {kind}")
    if not least <= value < float("inf"):
        raise ValueError(f"`{name}` is {value}, expected at least {least}")


def check_numbers(**values: Any) -> None:
    """[`check_number`] of arguments by their names; all but those of [`LEAST_NUMBERS`] are whole and at least 1."""
    for name, value in values.items():
        check_number(name, value, **LEAST_NUMBERS.get(name, {"least": 1, "is_whole": True}))


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def one_of(**values: Any) -> Any:
    """The value of an argument that has two names, of which a caller may use one."""
    found = given(**values)
    if len(found) > 1:
        own, other = found
        raise ValueError(f"got `{own}` and `{other}`, which is another name for it: pass one")
    return next(iter(found.values()), None)


def one_per_prompt(name: str, value: Any, num_prompts: int) -> list:
    """A list with an entry for each prompt; anything else is that of them all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * num_prompts
    if len(values) != num_prompts:
        raise ValueError(f"`{name}` has {len(values)} entries for {num_prompts} prompts, expected one for each")
    return values


def stack_equal(images: list) -> list | np.ndarray | torch.Tensor:
    """Arrays as one array where they have one shape."""
    if isinstance(images[0], PIL.Image.Image) or any(image.shape != images[0].shape for image in images):
        return images
    return np.stack(images) if isinstance(images[0], np.ndarray) else torch.stack(images)
