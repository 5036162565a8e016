"""Rewards as TRL calls them: failures become infinite, and what a reward reports beside its values is kept.

Knows nothing of the trainer and of how images are sampled.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..rewards.checks import check_rewards, is_async_reward, reward_name
from ..rewards.preference import CLIPReward


class RewardCalls:
    """
    The functions that TRL's trainer is given, and what they leave behind.

    Args:
        rewards (`Callable` or `str` or a list of them): A string is the Hub id of a CLIP-like model.
        takes_masks (`bool`): Whether rewards get `report_masks`.
    """

    def __init__(self, rewards: Callable | str | Sequence[Callable | str], *, takes_masks: bool):
        self.takes_masks = takes_masks
        self.num_failed = 0
        self.masks: list[np.ndarray | None] = []
        rewards = rewards if isinstance(rewards, list) else [rewards]
        self.functions = [self._wrap(CLIPReward(one) if isinstance(one, str) else one) for one in rewards]
        names = [function.__name__ for function in self.functions]
        if len(set(names)) < len(names):
            raise ValueError(f"the rewards are called {names}: give each a `__name__` of its own")

    def _wrap(self, reward: Callable) -> Callable:
        if isinstance(reward, torch.nn.Module) or not callable(reward):
            raise TypeError(
                f"a reward is {type(reward).__name__}, expected a function of `images` and `prompts`: the models that "
                "TRL takes score text"
            )
        name = reward_name(reward)
        masks = {"report_masks": self.report_masks} if self.takes_masks else {}

        async def awaited(prompts: Sequence[Any], **columns: Any) -> list[float | None]:
            with _named(name):
                values = await reward(prompts=prompts, **columns, **masks)
            return self._mark_failures(check_rewards(name, values, prompts))

        def called(prompts: Sequence[Any], **columns: Any) -> list[float | None]:
            with _named(name):
                values = reward(prompts=prompts, **columns, **masks)
            return self._mark_failures(check_rewards(name, values, prompts))

        # TRL awaits the coroutines of all rewards together, and calls plain functions one by one.
        function = awaited if is_async_reward(reward) else called
        function.__name__ = name
        return function

    def _mark_failures(self, values: list[float | None]) -> list[float | None]:
        """NaN becomes infinity: TRL gathers numbers, and makes NaN of `None`."""
        failed = [value is not None and value != value for value in values]
        self.num_failed += sum(failed)
        return [float("inf") if bad else value for value, bad in zip(values, failed)]

    def report_masks(self, masks: Sequence[np.ndarray | None]) -> None:
        """Pixels that a reward looked at, one boolean (height, width) or None per image; rewards add up."""
        if len(masks) != len(self.masks):
            raise ValueError(f"a reward reports {len(masks)} masks for {len(self.masks)} images, expected as many")
        for index, mask in enumerate(masks):
            if mask is None:
                continue
            mask, known = np.asarray(mask, bool), self.masks[index]
            if mask.ndim != 2 or (known is not None and known.shape != mask.shape):
                expected = "(height, width)" if known is None else f"{known.shape} as another reward's"
                raise ValueError(f"the mask of sample {index} has the shape {mask.shape}, expected {expected}")
            self.masks[index] = mask if known is None else known | mask


@contextmanager
def _named(reward: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"It was raised by the reward {reward!r}")
        raise
