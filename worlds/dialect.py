"""What worlds say differently, as data: each has a [`Dialect`], and one grammar words all of them.

The first of several wordings is the clean one; people use any of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from .scene import BACKGROUNDS, DEFAULT_BACKGROUND, MAX_THINGS, RATIOS


_PLACES = {
    "top left corner": ("in the top left corner", "top left", "in the upper left corner", "at the top left"),
    "top": ("at the top", "on top", "in the upper middle"),
    "top right corner": ("in the top right corner", "top right", "in the upper right corner", "at the top right"),
    "left": ("on the left", "on the left side", "at the left"),
    "middle": ("in the middle", "in the center", "in the centre"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left corner": ("in the bottom left corner", "bottom left", "in the lower left corner"),
    "bottom": ("at the bottom", "in the lower middle"),
    "bottom right corner": ("in the bottom right corner", "bottom right", "in the lower right corner"),
}
_CAPTION_REQUESTS = (
    *("describe the image", "what does the image show?", "what is in this picture?", "what do you see?"),
    *("write a caption", "caption this"),
)
_COLOR_THINGS = {
    "white": ("snow", "milk"),
    "black": ("coal", "the night"),
    "gray": ("an elephant", "ash"),
    "red": ("blood", "a fire engine"),
    "orange": ("a carrot", "a pumpkin"),
    "yellow": ("the sun", "a lemon"),
    "green": ("grass", "a frog"),
    "dark green": ("a fir tree", "spinach"),
    "turquoise": ("a swimming pool", "a lagoon"),
    "sky blue": ("the sky at noon", "forget-me-nots"),
    "blue": ("the deep sea", "a blueberry"),
    "purple": ("a plum", "lavender"),
    "pink": ("a pig", "bubble gum"),
    "brown": ("chocolate", "earth"),
    "beige": ("sand", "oatmeal"),
}
_COUNT_HINTS = {
    2: ("half of four", "one less than three", "as many as you have hands"),
    3: ("one more than two", "one less than four", "as many as a triangle has sides"),
    4: ("twice two", "one more than three", "as many as a square has sides"),
}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """
    Which scenes a world has, and how it words them.

    Args:
        backgrounds (`tuple[str, ...]`): Those of `BACKGROUNDS` that it has.
        default_background (`str`, *optional*):
            Where no words name one. `None`: any of them, which a request then leaves open.
        ratios (`tuple[tuple[int, int], ...]`): Heights to widths of its images.
        sizes (`tuple[str, ...]`): Those of `SIZES` that it has; a single one is never named.
        most_different (`int`): Different sprites in the scenes that captions request and instructions change.
        edits (`tuple[str, ...]`): Kinds of instructions.
        shares (`dict[str, float]`): Task -> its share of the training rows, for those that are not as usual.
        places (`dict[str, tuple[str, ...]]`): Place -> phrases.
        instructions (`dict[str, tuple[str, ...]]`): Kind -> templates, for those that are not as usual.
        caption_requests (`tuple[str, ...]`): Requests for the one full caption.
        caption_joints (`tuple[str, str]`): In it, before the last of its things and before the background.
        question_end (`str`): After a question.
        what_is (`str`), style_is (`str`), how_many (`str`): Questions for a concept, a style and a number.
        names_styles (`bool`): Whether answers and questions of existence name the style as well.
        implied (`tuple[str, ...]`): What prompts may only imply.
        implied_number (`str`): How "{number}" and "{things}" stand together.
        style_hint (`str`), style_thought (`str`): How a hint for a style stands in a prompt; and what "{hint}" means.
        count_hints, color_things (`dict`): Number and colour -> what implies it.
        stories (`dict[str, Callable]`): Kind -> what tells it, for those that are not told as usual.
    """

    backgrounds: tuple[str, ...] = BACKGROUNDS
    default_background: str | None = DEFAULT_BACKGROUND
    ratios: tuple[tuple[int, int], ...] = RATIOS
    sizes: tuple[str, ...] = ("small", "medium", "large")
    most_different: int = MAX_THINGS
    edits: tuple[str, ...] = ("style", "replace", "background", "add", "remove", "move", "resize", "tone", "count")
    shares: dict[str, float] = field(default_factory=dict)
    places: dict[str, tuple[str, ...]] = field(default_factory=lambda: _PLACES)
    instructions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    caption_requests: tuple[str, ...] = _CAPTION_REQUESTS
    caption_joints: tuple[str, str] = (", ", ", on ")
    question_end: str = "?"
    what_is: str = "what is {place}"
    style_is: str = "what style is {thing} in"
    how_many: tuple[str, ...] = ("how many things are there", "how many do you see")
    names_styles: bool = False
    implied: tuple[str, ...] = ("number", "place", "background", "style")
    implied_number: str = "{things}, {number}"
    style_hint: str = "{}"
    style_thought: str = "{hint} is {style} style"
    count_hints: dict[int, tuple[str, ...]] = field(default_factory=lambda: _COUNT_HINTS)
    color_things: dict[str, tuple[str, ...]] = field(default_factory=lambda: _COLOR_THINGS)
    stories: dict[str, Callable] = field(default_factory=dict)

    @property
    def usual_size(self) -> str:
        """The size of a thing that stands alone at a place, unless words name another."""
        return self.sizes[len(self.sizes) // 2]
