"""Several rewards as one, on a common scale, and the check that no failure passes for a number."""

import asyncio
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

    Raises `TypeError` or `ValueError`, which name the reward and the sample, for anything but numbers and `None`.
    """
    is_series = isinstance(values, Iterable) and getattr(values, "ndim", 1) != 0
    if not is_series or isinstance(values, (str, bytes, Mapping)):
        raise TypeError(
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
            raise TypeError(
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


async def call_reward(reward: Reward, **kwargs: Any) -> list[float | None]:
    """The checked values of a reward, awaited where it is asynchronous."""
    values = reward(**kwargs)
    return check_rewards(
        reward_name(reward), await values if inspect.isawaitable(values) else values, kwargs["prompts"]
    )


class Scaled:
    """
    A reward whose `low` becomes 0 and whose `high` becomes 1; values beyond stay beyond. Asynchronous.

    Args:
        reward (`Callable`): The reward to put on the common scale.
        low (`float`): What a useless picture gets.
        high (`float`): What a picture gets that leaves nothing to wish for.
    """

    def __init__(self, reward: Reward, *, low: float, high: float):
        if not high > low:
            raise ValueError(f"low is {low} and high is {high}, expected low < high")
        self.reward, self.low, self.high = reward, low, high
        self.__name__ = reward_name(reward)

    async def __call__(self, **kwargs: Any) -> list[float | None]:
        values = await call_reward(self.reward, **kwargs)
        return [None if value is None else (value - self.low) / (self.high - self.low) for value in values]


class Combined:
    """
    The weighted sum of several rewards as one asynchronous reward; those that are asynchronous run side by side.

    A sample is NaN, and so left out, where any of them fails. Those that do not apply to it (`None`) are left out of
    its sum; where none applies the sum is `None`. The trainer can weigh several rewards itself; this is for rewards
    that only make sense together, and for use without a trainer.

    Args:
        rewards (`list[tuple[Callable, float]]`): Rewards and their weights.
    """

    def __init__(self, rewards: Sequence[tuple[Reward, float]]):
        if not rewards:
            raise ValueError("got no rewards to combine, expected at least one")
        self.rewards = list(rewards)
        self.__name__ = "+".join(reward_name(reward) for reward, _ in self.rewards)

    async def __call__(self, *, log_metric: Callable[[str, float], None] | None = None, **kwargs: Any):
        extra = {} if log_metric is None else {"log_metric": log_metric}
        columns = await asyncio.gather(*(call_reward(reward, **kwargs, **extra) for reward, _ in self.rewards))
        for (reward, _), column in zip(self.rewards, columns):
            known = [value for value in column if value is not None and not math.isnan(value)]
            if log_metric is not None and known:
                log_metric(f"rewards/{reward_name(reward)}", sum(known) / len(known))
        weights = [weight for _, weight in self.rewards]
        totals = []
        for row in zip(*columns):
            terms = [weight * value for weight, value in zip(weights, row) if value is not None]
            totals.append(sum(terms) if terms else None)
        return totals
