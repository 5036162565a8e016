"""What a Shapes picture is: objects on a plain background, and how it is drawn.

Everything is in relative units: x and y are fractions of the width and of the height, a radius is a fraction of the
shorter side, so one scene can be drawn at any size and aspect ratio. Knows nothing about language.
"""

from dataclasses import dataclass

import numpy as np


SHAPES = ("circle", "square", "triangle", "diamond", "ring")

COLORS = {
    "red": (214, 32, 44),
    "green": (28, 158, 60),
    "blue": (36, 64, 214),
    "yellow": (250, 222, 40),
    "purple": (138, 36, 164),
    "orange": (250, 130, 16),
    "cyan": (32, 204, 222),
}

BACKGROUNDS = {
    "white": (246, 246, 246),
    "black": (14, 14, 14),
    "pink": (255, 186, 208),
}

# PLACES[row][column] of the 3x3 lattice.
PLACES = (
    ("top left corner", "top center", "top right corner"),
    ("middle left", "center", "middle right"),
    ("bottom left corner", "bottom center", "bottom right corner"),
)
CELLS = {name: (row, column) for row, names in enumerate(PLACES) for column, name in enumerate(names)}

MAX_OBJECTS = 4
REFERENCE_SIZE = 64  # the pixel numbers below are meant at this size
# One size, and one position a cell: what no caption can ask for is not left to chance either, which would cost a small
# model most of its training. Every object fills two by two patches of 8 pixels, the same way wherever it is: its codes
# are then the same in every cell, and an object is learnt once, not nine times.
RADIUS = 7 / REFERENCE_SIZE
CENTERS = (8 / REFERENCE_SIZE, 32 / REFERENCE_SIZE, 56 / REFERENCE_SIZE)

# Proportions that give the five shapes about the same visual weight. All fit the box of half-width `radius`.
SQUARE_HALF_SIDE = 0.86
TRIANGLE_HALF_HEIGHT = 0.866  # equilateral: base 2 radius
RING_HOLE = 0.45


@dataclass(frozen=True)
class ShapeObject:
    """One object.

    Args:
        shape (`str`): One of `SHAPES`.
        color (`str`): One of `COLORS`.
        x (`float`): Centre, as a fraction of the width.
        y (`float`): Centre, as a fraction of the height; 0 is the top.
        radius (`float`): Half the side of the box around it, as a fraction of the shorter side of the picture.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}, expected one of {SHAPES}")
        if self.color not in COLORS:
            raise ValueError(f"unknown color {self.color!r}, expected one of {tuple(COLORS)}")

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """A background (one of `BACKGROUNDS`) and up to `MAX_OBJECTS` objects that do not touch."""

    background: str
    objects: tuple[ShapeObject, ...]

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}, expected one of {tuple(BACKGROUNDS)}")
        if len(self.objects) > MAX_OBJECTS:
            raise ValueError(f"a scene has at most {MAX_OBJECTS} objects, got {len(self.objects)}")


def place_of(x: float, y: float) -> str:
    """Name of the lattice cell that holds a point given in relative units."""
    return PLACES[min(2, max(0, int(y * 3)))][min(2, max(0, int(x * 3)))]


def place_object(shape: str, color: str, cell: tuple[int, int]) -> ShapeObject:
    """An object in the (row, column) `cell` of the lattice. Objects in different cells never touch."""
    row, column = cell
    return ShapeObject(shape, color, CENTERS[column], CENTERS[row], RADIUS)


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape centred at the origin, negative inside; `dy` grows downwards. Broadcasts."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "square":
        return np.maximum(ax, ay) - SQUARE_HALF_SIDE * radius
    if shape == "diamond":
        return (ax + ay - radius) * np.sqrt(0.5, dtype=np.float32)
    if shape == "triangle":  # the base, and the two sides at 60 degrees from the apex (0, -half_height)
        half_height = TRIANGLE_HALF_HEIGHT * radius
        return np.maximum(dy - half_height, np.float32(0.866) * ax - 0.5 * (dy + half_height))
    if shape == "ring":
        distance = np.sqrt(dx * dx + dy * dy)
        return np.maximum(distance - radius, RING_HOLE * radius - distance)
    raise ValueError(f"unknown shape {shape!r}, expected one of {SHAPES}")


def coverage(signed_distances: np.ndarray) -> np.ndarray:
    """Share of each pixel that is inside, from the distance (in pixels) of its centre: the anti-aliasing."""
    return np.clip(0.5 - signed_distances, 0, 1)


def render(scene: Scene, height: int = 64, width: int = 64) -> np.ndarray:
    """Draws a scene, anti-aliased.

    Returns:
        `np.ndarray`: uint8, (height, width, 3).
    """
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        radius = item.radius * min(height, width)
        center_x, center_y = item.x * width, item.y * height
        # Only the box around the object is touched.
        left, right = max(0, int(center_x - radius) - 1), min(width, int(center_x + radius) + 3)
        top, bottom = max(0, int(center_y - radius) - 1), min(height, int(center_y + radius) + 3)
        dx = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - center_x)
        dy = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - center_y)
        alpha = coverage(signed_distance(item.shape, dx[None, :], dy[:, None], np.float32(radius)))[:, :, None]
        window = canvas[top:bottom, left:right]
        window += alpha * (np.array(COLORS[item.color], dtype=np.float32) - window)
    return (canvas + 0.5).astype(np.uint8)
