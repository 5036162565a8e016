"""The judge of the Shapes world: reads a picture back into a scene and checks it against what was asked for.

No neural network: nearest palette colour in CIELAB, connected components, best overlap with rendered templates.
It expects pictures of a lossy decoder (blur, ringing, slight shifts of hue at 24 to 30 dB), and it is strict about
everything that is asked: the exact number of objects, and nothing else in the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from .captions import ObjectSpec, Prompt
from .edits import Edit
from .scene import (
    BACKGROUNDS,
    COLORS,
    REFERENCE_SIZE,
    RING_HOLE,
    SHAPES,
    SQUARE_HALF_SIDE,
    TRIANGLE_HALF_HEIGHT,
    Scene,
    ShapeObject,
    coverage,
    place_of,
    signed_distance,
)


try:
    from scipy import ndimage
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the judge needs scipy: pip install 'nextflow-hf[train]'", name=error.name) from error

UNKNOWN = "unknown"
PALETTE = {**COLORS, **BACKGROUNDS}

MAX_PARSE_SIZE = 96  # larger pictures are reduced to this shorter side: enough for every shape, and fast
FOREGROUND_DELTA = 25.0  # CIELAB distance to the background from which a pixel may belong to an object
MAX_COLOR_DELTA = 38.0  # farther than this from the whole palette, a colour has no name
ALPHA_CONTRAST = 2.5  # steepens the rim of an object, so that halos and blur do not count against its shape
MIN_AREA = 24 / REFERENCE_SIZE**2  # smaller components are specks; the smallest true object has 4 times this area
MIN_COLOR_SHARE = 0.2  # of a component's core, for a colour to count as an object of its own
MIN_CONFIDENCE = 0.75  # overlap with the best template below which a blob is no shape
MIN_RELATION_OFFSET = 0.15  # of the picture: centres must differ by this on the axis of a relation
MAX_SHIFT = 5 / REFERENCE_SIZE  # how far an object may be from its place, in the shorter side

# Area of each shape of radius 1, and how far its centroid lies below the centre of its box: the start of the fit.
_UNIT_AREAS = {
    "circle": np.pi,
    "square": 4 * SQUARE_HALF_SIDE**2,
    "triangle": 2 * TRIANGLE_HALF_HEIGHT,
    "diamond": 2.0,
    "ring": np.pi * (1 - RING_HOLE**2),
}
_UNIT_DROPS = {"triangle": TRIANGLE_HALF_HEIGHT / 3}
_FACTORS = np.array((0.82, 0.88, 0.94, 1.0, 1.06, 1.12), dtype=np.float32).reshape(-1, 1, 1)
_SHIFTS = np.array((-1.0, 0.0, 1.0), dtype=np.float32)


@dataclass(frozen=True)
class ParsedObject:
    """What was seen of one object: `ShapeObject`'s fields in the same units, "unknown" where nothing is near enough,
    and `confidence`, the overlap (0 to 1) with the rendered shape."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    confidence: float

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


@dataclass(frozen=True)
class ParsedScene:
    """What was seen of a picture of `height` x `width` pixels; `background` may be "unknown"."""

    background: str
    objects: tuple[ParsedObject, ...]
    height: int
    width: int


@dataclass(frozen=True)
class Verdict:
    """Whether a picture meets a prompt: `checks` by name, `passed` if all hold."""

    passed: bool
    checks: dict[str, bool]


@dataclass(frozen=True)
class EditVerdict:
    """Whether the asked change is made (`changed`), all else is as before (`preserved`), and both (`passed`)."""

    changed: bool
    preserved: bool
    passed: bool


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255, (..., 3), to CIELAB (D65), float32 of the same shape."""
    linear = _LINEAR[np.clip(rgb, 0, 255).astype(np.uint8)]
    xyz = linear @ _RGB_TO_XYZ
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack((116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])), axis=-1)
    return lab.astype(np.float32)


_levels = np.arange(256) / 255
_LINEAR = np.where(_levels <= 0.04045, _levels / 12.92, ((_levels + 0.055) / 1.055) ** 2.4).astype(np.float32)
_RGB_TO_XYZ = (
    np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    / np.array([[0.95047], [1.0], [1.08883]])
).T.astype(np.float32)
_NAMES = tuple(PALETTE)
_PALETTE_LAB = to_lab(np.array([PALETTE[name] for name in _NAMES]))


def _color_distances(lab: np.ndarray) -> np.ndarray:
    """(..., 3) to distances (..., palette)."""
    squares = (lab**2).sum(-1, keepdims=True) - 2 * lab @ _PALETTE_LAB.T + (_PALETTE_LAB**2).sum(-1)
    return np.sqrt(np.maximum(squares, 0))


def _name_color(rgb: np.ndarray) -> str:
    distances = _color_distances(to_lab(rgb))
    return _NAMES[int(distances.argmin())] if distances.min() <= MAX_COLOR_DELTA else UNKNOWN


def _to_array(image: np.ndarray | Image.Image) -> np.ndarray:
    """Any picture as float32 (height, width, 3) in 0..255, the shorter side at most `MAX_PARSE_SIZE`."""
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 (height, width, 3), got {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    image = image.convert("RGB")
    scale = MAX_PARSE_SIZE / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)


def _overlaps(shape: str, alpha: np.ndarray, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Soft intersection over union of `alpha` (height, width) with the templates that the arguments broadcast to."""
    template = coverage(signed_distance(shape, dx, dy, radius))
    return np.minimum(template, alpha).sum((-2, -1)) / np.maximum(template, alpha).sum((-2, -1))


def _fit_shape(alpha: np.ndarray, size: int) -> tuple[str, float, float, float, float]:
    """Best shape for a soft mask `alpha` (height, width): name, centre x and y, radius in pixels, and overlap.

    Every shape starts from the mask's area and centroid; then the best radius near it, then the best centre.
    """
    area = alpha.sum()
    rows, columns = np.mgrid[: alpha.shape[0], : alpha.shape[1]].astype(np.float32) + 0.5
    centroid_x, centroid_y = (columns * alpha).sum() / area, (rows * alpha).sum() / area
    step = size / REFERENCE_SIZE
    shift_y, shift_x = np.meshgrid(_SHIFTS * step, _SHIFTS * step, indexing="ij")
    shift_y, shift_x = shift_y.reshape(-1, 1, 1), shift_x.reshape(-1, 1, 1)
    best = (UNKNOWN, float(centroid_x), float(centroid_y), float(np.sqrt(area / np.pi)), 0.0)
    for shape in SHAPES:
        radius = np.float32(np.sqrt(area / _UNIT_AREAS[shape]))
        center_x, center_y = centroid_x, centroid_y - np.float32(_UNIT_DROPS.get(shape, 0.0)) * radius
        dx, dy = columns - center_x, rows - center_y
        radius = radius * _FACTORS[_overlaps(shape, alpha, dx, dy, radius * _FACTORS).argmax()].item()
        overlaps = _overlaps(shape, alpha, dx - shift_x, dy - shift_y, np.float32(radius))
        index = int(overlaps.argmax())
        if overlaps[index] > best[-1]:
            x, y = center_x + shift_x[index].item(), center_y + shift_y[index].item()
            best = (shape, float(x), float(y), float(radius), float(overlaps[index]))
    return best


def parse_image(image: np.ndarray | Image.Image) -> ParsedScene:
    """Reads a picture back: its background and the objects on it.

    Args:
        image (`np.ndarray` or `PIL.Image.Image`): uint8 (height, width, 3), or a PIL image, of any size.

    Returns:
        `ParsedScene`: Two objects of one colour that touch are read as one object, as a rule with low confidence.
    """
    pixels = _to_array(image)
    height, width = pixels.shape[:2]
    size = min(height, width)
    min_area = MIN_AREA * size**2
    lab = to_lab(pixels)
    names = _color_distances(lab).argmin(-1)

    # 1. The background is what most of the border has.
    border = np.zeros((height, width), dtype=bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    mode = np.bincount(names[border], minlength=len(_NAMES)).argmax()
    is_mode = border & (names == mode)
    background_rgb = np.median(pixels[is_mode], axis=0)
    background = _name_color(background_rgb)
    if background not in BACKGROUNDS or is_mode.sum() < 0.5 * border.sum():
        background = UNKNOWN

    # 2. Whatever differs from it, in connected pieces; the core of a piece says which colours are in it.
    foreground = np.linalg.norm(lab - to_lab(background_rgb), axis=-1) > FOREGROUND_DELTA
    depth = ndimage.distance_transform_edt(np.pad(foreground, 1))[1:-1, 1:-1]
    pieces, count = ndimage.label(foreground)
    objects: list[ParsedObject] = []
    for piece in range(1, count + 1):
        mask = pieces == piece
        if mask.sum() < min_area:
            continue
        core = mask & (depth >= min(2.5 * size / REFERENCE_SIZE, 0.6 * depth[mask].max()))
        votes = np.bincount(names[core], minlength=len(_NAMES))
        found = [votes.argmax()] if votes.max() < MIN_COLOR_SHARE * core.sum() else []
        found += [index for index in np.argsort(-votes) if votes[index] >= MIN_COLOR_SHARE * core.sum()]
        centers = [np.median(pixels[core & (names == index)], axis=0) for index in found]
        nearest = np.argmin([np.linalg.norm(lab - to_lab(center), axis=-1) for center in centers], axis=0)

        # 3. How much of each pixel is the object: its position on the line from the background's to its colour.
        for index, center in enumerate(centers):
            line = center - background_rgb
            alpha = (pixels - background_rgb) @ line / max(float(line @ line), 1.0)
            alpha = np.clip((alpha - 0.5) * ALPHA_CONTRAST + 0.5, 0, 1)
            own = mask & (nearest == index) if len(centers) > 1 else mask
            parts, part_count = ndimage.label(own & (alpha > 0.5))
            for part in range(1, part_count + 1):
                part_mask = parts == part
                if ndimage.binary_opening(part_mask).sum() < min_area:
                    continue
                # Two pixels more, for the rim with alpha < 0.5, but nothing of a neighbour.
                reach = ndimage.binary_dilation(part_mask, iterations=2) & ~((parts > 0) & ~part_mask)
                soft = alpha * reach if len(centers) == 1 else alpha * (reach & (own | ~mask))
                ys, xs = np.nonzero(part_mask)
                top, left = max(0, int(ys.min()) - 3), max(0, int(xs.min()) - 3)
                window = soft[top : ys.max() + 4, left : xs.max() + 4]
                shape, x, y, radius, overlap = _fit_shape(window, size)
                inner = part_mask & core
                inner = inner if inner.any() else part_mask
                objects.append(
                    ParsedObject(
                        shape=shape if overlap >= MIN_CONFIDENCE else UNKNOWN,
                        color=_name_color(np.median(pixels[inner], axis=0)),
                        x=(left + x) / width,
                        y=(top + y) / height,
                        radius=radius / size,
                        confidence=overlap,
                    )
                )
    return ParsedScene(background, tuple(objects), height, width)


def related(first: ParsedObject | ShapeObject, relation: str, second: ParsedObject | ShapeObject) -> bool:
    """Whether `first` is clearly `relation` `second`."""
    offset = {
        "left of": second.x - first.x,
        "right of": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }[relation]
    return offset >= MIN_RELATION_OFFSET


def judge_prompt(image: np.ndarray | Image.Image, prompt: Prompt) -> Verdict:
    """Checks a picture against a prompt.

    Returns:
        `Verdict`: `checks` has "count" and "shape", and what the prompt states of "color", "position", "background".
        "color" and "position" need one matching of seen objects to asked ones that is right in all of it.
    """
    scene = parse_image(image)
    wanted = [spec for spec in prompt.objects for _ in range(spec.count)]
    checks = {"count": len(scene.objects) == len(wanted)}
    checks["shape"] = sorted(item.shape for item in scene.objects) == sorted(spec.shape for spec in wanted)
    matchings = [order for order in _orders(scene, wanted) if _matches(order, wanted, color=False)]
    if any(spec.color is not None for spec in wanted):
        matchings = [order for order in matchings if _matches(order, wanted, color=True)]
        checks["color"] = bool(matchings)
    if prompt.relation is not None:
        checks["position"] = any(related(order[0], prompt.relation, order[1]) for order in matchings)
    elif any(spec.place is not None for spec in wanted):
        checks["position"] = any(
            all(spec.place in (None, item.place) for item, spec in zip(order, wanted, strict=True))
            for order in matchings
        )
    if prompt.background is not None:
        checks["background"] = scene.background == prompt.background
    return Verdict(all(checks.values()), checks)


def _orders(scene: ParsedScene, wanted: list[ObjectSpec]) -> list[tuple[ParsedObject, ...]]:
    """All ways to match the seen objects with the wanted ones; none when their numbers differ."""
    return list(permutations(scene.objects)) if len(scene.objects) == len(wanted) else []


def _matches(order: tuple[ParsedObject, ...], wanted: list[ObjectSpec], *, color: bool) -> bool:
    return all(
        item.shape == spec.shape and (not color or spec.color in (None, item.color))
        for item, spec in zip(order, wanted, strict=True)
    )


def judge_edit(image: np.ndarray | Image.Image, edit: Edit) -> EditVerdict:
    """Checks an edited picture against the edit.

    "Changed" is what the instruction asks for, "preserved" everything else: each other object with its shape and
    colour within `MAX_SHIFT` of its place, the background, and nothing in the picture that was not asked for.
    """
    scene = parse_image(image)
    left = list(scene.objects)
    kept = [_take(goal, left, scene) for goal in edit.kept]
    preserved = all(kept)
    if edit.task == "background":
        changed = scene.background == edit.target.background
        preserved = preserved and not left
    else:
        preserved = preserved and scene.background == edit.source.background
        if edit.task in ("add", "move"):
            found = [item for item in left if _is_placed(item, edit)]
            changed = bool(found)
            for item in found[:1]:
                left.remove(item)
        else:
            made = [_take(goal, left, scene) for goal in edit.after]
            changed = all(made)
        # What is left where an object should have gone or changed is a failed change; anywhere else it is an extra.
        goals = edit.before + edit.after
        blamed = [item for item in left if any(_distance(item, goal, scene) <= 2 * MAX_SHIFT for goal in goals)]
        changed = changed and not blamed
        preserved = preserved and len(blamed) == len(left)
    return EditVerdict(changed, preserved, changed and preserved)


def judge_scene(image: np.ndarray | Image.Image | ParsedScene, wanted: Scene) -> Verdict:
    """
    Checks a picture against all that it should show: "objects" says whether each is within `MAX_SHIFT` of its place,
    "extras" whether there is nothing else, "background" whether it is the right one.
    """
    scene = image if isinstance(image, ParsedScene) else parse_image(image)
    left = list(scene.objects)
    found = [_take(goal, left, scene) for goal in wanted.objects]
    checks = {"objects": all(found), "extras": not left, "background": scene.background == wanted.background}
    return Verdict(all(checks.values()), checks)


def judge_story(images: Sequence[np.ndarray | Image.Image], wanted: Sequence[Scene]) -> Verdict:
    """
    Checks the pictures of a story. "pictures" says whether there are as many as there should be, "scenes" whether each
    is right, and "consistent" whether what no part of the story changes (the background, the shapes, the colours, the
    places) stays the same from picture to picture, be it right or wrong.
    """
    scenes = [parse_image(image) for image in images]
    checks = {"pictures": len(scenes) == len(wanted)}
    checks["scenes"] = checks["pictures"] and all(
        judge_scene(scene, goal).passed for scene, goal in zip(scenes, wanted, strict=True)
    )
    goals, seen = [_traits(goal) for goal in wanted], [_traits(scene) for scene in scenes]
    constant = [index for index, values in enumerate(zip(*goals)) if len(set(values)) == 1]
    checks["consistent"] = len(seen) > 1 and all(len({traits[index] for traits in seen}) == 1 for index in constant)
    return Verdict(all(checks.values()), checks)


def _traits(scene: Scene | ParsedScene) -> tuple[str | frozenset[str], ...]:
    """Background, shapes, colours and places."""
    looks = ({getattr(item, name) for item in scene.objects} for name in ("shape", "color", "place"))
    return (scene.background, *map(frozenset, looks))


def _distance(item: ParsedObject, goal: ShapeObject, scene: ParsedScene) -> float:
    """Between the centres, in the shorter side of the picture."""
    offset = ((item.x - goal.x) * scene.width, (item.y - goal.y) * scene.height)
    return float(np.hypot(*offset)) / min(scene.height, scene.width)


def _take(goal: ShapeObject, left: list[ParsedObject], scene: ParsedScene) -> bool:
    """Removes the seen object of `scene` that is `goal` at its place from `left`; False when there is none."""
    same = [item for item in left if (item.shape, item.color) == (goal.shape, goal.color)]
    same = [item for item in same if _distance(item, goal, scene) <= MAX_SHIFT]
    if same:
        left.remove(min(same, key=lambda item: _distance(item, goal, scene)))
    return bool(same)


def _is_placed(item: ParsedObject, edit: Edit) -> bool:
    """Whether `item` is what "add" or "move" asks for, anywhere in the place or the relation that was asked for."""
    goal = edit.after[0]
    if (item.shape, item.color) != (goal.shape, goal.color):
        return False
    if edit.place is not None:
        return item.place == edit.place
    return related(item, edit.relation, edit.anchor)
