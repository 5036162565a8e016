"""Prompts that only imply what to draw ("half of four rings in the color of grass"), and the thoughts behind them.

A hint stands in the prompt in place of a colour, a shape, a number or a background; a thought says `hint is meaning`;
the prompt that the thinking arrives at is an ordinary caption.
"""

from dataclasses import dataclass

import numpy as np

from .captions import COUNT_WORDS, PHRASINGS, ObjectSpec, Prompt, in_split, is_held_out, noun_phrase, pick
from .scene import BACKGROUNDS, COLORS, SHAPES


# What stands for what: everybody agrees on it, and no hint has two meanings.
COLOR_THINGS = {
    "red": ("blood", "a cherry"),
    "green": ("grass", "a frog"),
    "blue": ("the sea", "the sky"),
    "yellow": ("the sun", "a lemon"),
    "purple": ("a plum", "a grape"),
    "orange": ("a carrot", "a pumpkin"),
    "cyan": ("ice", "a swimming pool"),
}
BACKGROUND_THINGS = {
    "white": ("snow", "milk"),
    "black": ("coal", "the night"),
    "pink": ("a pig", "a rose"),
}
SHAPE_HINTS = {
    "circle": ("like a ball", "like a coin"),
    "square": ("like a box", "like a tile"),
    "triangle": ("like a tent", "with three sides"),
    "diamond": ("like a kite", "like a gem"),
    "ring": ("like a donut", "like a tire"),
}
COUNT_HINTS = {
    2: ("half of four", "one less than three"),
    3: ("one more than two", "one less than four"),
    4: ("twice two", "one more than three"),
}
THINKING_CATEGORIES = ("color", "shape", "count", "background", "several")


@dataclass(frozen=True)
class ImpliedPrompt:
    """A prompt of the four kinds of hints.

    Args:
        prompt (`Prompt`): What the user says, with what it demands of the picture; its category is one of
            `THINKING_CATEGORIES`, the kind of its one hint, or "several".
        reasoning (`str`): What every hint means.
        explicit (`str`): The prompt without hints.
    """

    prompt: Prompt
    reasoning: str
    explicit: str


def sample_implied(rng: np.random.Generator, category: str | None = None, *, split: str = "train") -> ImpliedPrompt:
    """
    A random implied prompt of `category` (any when None) whose text belongs to `split`. In training the explicit
    prompt is no held-out caption either.
    """
    if category is None:
        category = pick(rng, THINKING_CATEGORIES)
    if category not in THINKING_CATEGORIES:
        raise ValueError(f"unknown category {category!r}, expected one of {THINKING_CATEGORIES}")
    while True:
        implied = _propose(rng, category)
        if in_split(implied.prompt.text, split) and (split == "test" or not is_held_out(implied.explicit)):
            return implied


def _propose(rng: np.random.Generator, category: str) -> ImpliedPrompt:
    kinds = THINKING_CATEGORIES[:-1]
    hinted = {category}
    if category == "several":
        hinted = {kinds[int(index)] for index in rng.permutation(len(kinds))[: int(rng.integers(2, len(kinds) + 1))]}
    shape = pick(rng, SHAPES)
    color = pick(rng, COLORS) if "color" in hinted or rng.random() < 0.5 else None
    is_counted = "count" in hinted or rng.random() < 0.3
    count = int(rng.integers(2, 5)) if is_counted else 1
    background = pick(rng, BACKGROUNDS) if "background" in hinted or rng.random() < 0.3 else None

    # The noun phrase, hint by hint; every thought repeats a hint as the prompt has it
    thoughts = []
    noun, spoken_color = shape, color
    if "shape" in hinted:
        hint = pick(rng, SHAPE_HINTS[shape])
        noun = "shape"
        thoughts.append(f"a shape {hint} is {noun_phrase(shape)}")
    if "color" in hinted:
        thing = pick(rng, COLOR_THINGS[color])
        spoken_color = None
        thoughts.append(f"the color of {thing} is {color}")
    text = noun_phrase(noun, spoken_color, count)
    if "count" in hinted:
        number = pick(rng, COUNT_HINTS[count])
        text = text.replace(COUNT_WORDS[count], number, 1)
        thoughts.insert(0, f"{number} is {COUNT_WORDS[count]}")
    if "shape" in hinted:
        text += f" {hint}"
    if "color" in hinted:
        text += f" in the color of {thing}"
    explicit = noun_phrase(shape, color, count)
    if background is not None:
        explicit += f" on a {background} background"
        if "background" in hinted:
            thing = pick(rng, BACKGROUND_THINGS[background])
            text += f" on a background in the color of {thing}"
            thoughts.append(f"the color of {thing} is {background}")
        else:
            text += f" on a {background} background"
    text = pick(rng, PHRASINGS).format(text)
    prompt = Prompt(text, category, (ObjectSpec(shape, color, count),), background=background)
    return ImpliedPrompt(prompt, ", ".join(thoughts), explicit)
