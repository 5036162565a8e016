"""What both pipelines share: components and where they compute, one thread at a time, checks of arguments."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from os import PathLike
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.accelerate_utils import apply_forward_hook


Component = TypeVar("Component")
logger = logging.get_logger(__name__)


class NextFlowBasePipeline(DiffusionPipeline):
    """
    A pipeline whose components are all that it is made of. They meet here through data alone, so they are `Any`: this
    package imports none of their classes (the constructors say which ones are meant).
    """

    vision_tokenizer: Any
    progress_bar: Any  # diffusers' decorator hides its signature

    _num_timesteps = 0
    _interrupt = False

    @property
    def num_timesteps(self) -> int:
        """Steps of the call: scales or, of the diffusion decoder, timesteps. Images that differ in schedule are
        sampled one after the other."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """
        Set `pipe._interrupt = True` in a callback to stop there: the images are previews of what was sampled. Set
        while the diffusion decoder samples, it ends that: the images are as far as they have come.
        """
        return self._interrupt

    @property
    def _execution_device(self) -> torch.device:
        # Overwritten: diffusers walks over all modules in search of offloading. That is needed only where a component
        # waits on the CPU, or without data, while there is an accelerator to compute on.
        parts = (getattr(self, "transformer", None), self.vision_tokenizer)
        devices = [part.device for part in parts if part is not None]
        for device in devices:
            if device.type not in ("cpu", "meta"):
                return device
        if torch.accelerator.is_available() or torch.device("meta") in devices:
            return super()._execution_device
        return torch.device("cpu")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | PathLike, **kwargs: Any) -> dict[str, Any]:
        """
        The index of a repository. One that brings its code names that, for `DiffusionPipeline`, which asks for trust
        before it runs any: this class is the same code, and so are those of its components.
        """
        index = super()._dict_from_json_file(json_file, **kwargs)
        package = cls.__module__.split(".")[0]
        if isinstance(index.get("_class_name"), list) and package in LOADABLE_CLASSES:
            index["_class_name"] = index["_class_name"][1]
            for name, entry in index.items():
                if isinstance(entry, list) and hasattr(sys.modules[package], entry[1] or ""):
                    index[name] = [package, entry[1]]
        return index

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
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


@apply_forward_hook
def loaded(model: Component) -> Component:
    """`model`, moved to where it computes: diffusers' offloading does that before `forward` alone."""
    return model


@functools.lru_cache
def warn_once(message: str) -> None:
    """Warn about what an engine does with every request."""
    logger.warning(message)


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


def check_components(transformer: Any, vision_tokenizer: Any, processor: Any, diffusion_decoder: Any) -> None:
    """Raises `ValueError` where components do not know the same codes and tokens. What is None is left out."""
    if diffusion_decoder is not None and vision_tokenizer is not None:
        diffusion_decoder.check_codes(vision_tokenizer)
    if transformer is not None and vision_tokenizer is not None:
        codes, config = vision_tokenizer.config.codebook_size, transformer.config
        if codes != config.codebook_size:
            raise ValueError(f"the vision tokenizer has {codes} codes, the transformer {config.codebook_size}")
        check_fingerprint("transformer", config.vision_tokenizer_fingerprint, vision_tokenizer)
    if transformer is not None and processor is not None:
        check_vocabulary(processor, transformer.config)


def check_vocabulary(processor: Any, config: Any) -> None:
    """Raises `ValueError` where the processor writes tokens or scales that a transformer of `config` does not have."""
    names = ("boi_token_id", "eoi_token_id", "image_token_id")
    found, expected = ({name: getattr(one, name) for name in names} for one in (processor, config))
    if found != expected:
        raise ValueError(f"the processor's tokens are {found}, the transformer's {expected}")
    if len(processor.tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, the transformer {config.vocab_size}: "
            "resize its embeddings"
        )
    if processor.max_scales > config.max_scales:
        raise ValueError(
            f"the processor's images have up to {processor.max_scales} scales, the transformer's "
            f"{config.max_scales} (`max_scales`)"
        )


# Beside the pipelines, not on them: a lock can be neither copied nor pickled.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


@contextmanager
def exclusive(pipeline: DiffusionPipeline) -> Iterator[None]:
    """
    Keep other threads out of `pipeline` in the `with` block: it holds the guidance, the steps and the interruption of
    one call. They get an error rather than a place in a queue: who waits for whom is for the caller to decide. The
    same thread may enter again. Do not use it across a `yield`: the generator may go on in another thread.
    """
    lock = _LOCKS.setdefault(pipeline, threading.RLock())
    if not lock.acquire(blocking=False):
        name = type(pipeline).__name__
        raise RuntimeError(
            f"another thread is in a call of this {name}, which takes one at a time: wait for it, or give each thread "
            f"a pipeline of its own on the same weights, `{name}(**pipe.components)` (not with offloading, which "
            "would move weights that another thread computes with)"
        )
    try:
        yield
    finally:
        lock.release()


def exclusively(method: Callable) -> Callable:
    """Decorates a method of a pipeline that one thread at a time may be in, see [`exclusive`]."""

    @functools.wraps(method)
    def guarded(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        with exclusive(self):
            return method(self, *args, **kwargs)

    return guarded


def check_numbers(least: int = 1, *, is_whole: bool = True, **values: Any) -> None:
    """Raises `ValueError` where an argument is given and is no number of at least `least`. NumPy's scalars are."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral if is_whole else Real):
            kind = "whole number" if is_whole else "number"
            raise ValueError(f"`{name}` is {value!r} ({type(value).__name__}), expected a {kind}")
        if not least <= float(value) < float("inf"):
            raise ValueError(f"`{name}` is {value}, expected at least {least}")


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def one_of(**values: Any) -> Any:
    """The value of an argument that has two names, of which a caller may use one."""
    own, other = values
    if None not in values.values():
        raise ValueError(f"got `{own}` and `{other}`, which is another name for it: pass one")
    return values[other] if values[own] is None else values[own]


def stack_equal(images: list) -> Any:
    """Arrays as one array where they have one shape, else the list."""
    if isinstance(images[0], PIL.Image.Image) or any(image.shape != images[0].shape for image in images):
        return images
    return np.stack(images) if isinstance(images[0], np.ndarray) else torch.stack(images)
