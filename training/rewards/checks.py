"""The kinds of callables that are rewards, and the check that no failure passes for a number."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

Reward = Callable[..., Any]


def reward_name(reward: Reward) -> str:
    """The name of a function (also behind `functools.partial`), or of the class of a callable object."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def is_async_reward(reward: Reward) -> bool:
    """Whether calling it gives something to await; a callable object has its `async` at `__call__`."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def check_rewards(name: str, values: Iterable[float | None], prompts: Sequence[Any]) -> list[float | None]:
    """The values as floats, one per prompt. NaN and infinite ones are reported with their sample and become NaN.

    Raises `ValueError`, which names the reward and the sample, for anything but numbers and `None`.
    """
    is_series = isinstance(values, Iterable) and getattr(values, "ndim", 1) != 0
    if not is_series or isinstance(values, (str, bytes, Mapping)):
        raise ValueError(
            f"the reward {name!r} returned {type(values).__name__}, expected a list with a number or None for each of "
            f"the {len(prompts)} samples"
        )
    values = list(values)
    if len(values) != len(prompts):
        raise ValueError(f"the reward {name!r} gave {len(values)} values for {len(prompts)} samples, expected as many")
    checked = []
    for index, (value, prompt) in enumerate(zip(values, prompts)):
        try:
            number = None if value is None else float(_not_text(value))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"the reward {name!r} gave {one_line(value)} for sample {index}, expected a number or None. The "
                f"sample's prompt: {one_line(prompt)}"
            ) from error
        if number is not None and not math.isfinite(number):
            logger.warning(
                f"the reward {name!r} is {number} for sample {index}, which is left out: {one_line(prompt)}"
            )
            number = math.nan
        checked.append(number)
    return checked


def one_line(value: Any, length: int = 200) -> str:
    """The beginning of a value's `repr`, for errors."""
    return " ".join(repr(value).split())[:length]


def _not_text(value: Any) -> Any:
    if isinstance(value, (str, bytes)):  # `float` would read a number in it
        raise TypeError("a text is no number")
    return value
