"""Says what an image of a world shows: a small classifier of sprites looks at boxes, the rest is detection.

The classifier learns from true sprites only, held-out pairs included, composed here with seeds that no data set uses;
never from a reconstruction or a generated image. Backgrounds are read off the border, numbers and sizes off whatever
differs from the background, and what an edit must keep is compared pixel by pixel.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..atomic import write_file, write_json, write_text
from ..training.common.processes import computes_bfloat16
from .edits import changed_boxes
from .sampling import Context
from .scene import BACKGROUNDS, CELLS, COLORS, Canvas, Scene, Thing, backdrop, box, canvases, fits, render
from .sprites import Sprite, Sprites


SIDES = (64, 128)  # resolutions that the report is of
CROP = 48  # pixels of what the classifier sees
MARGIN = 0.125  # of a box, that is seen around it
NOTHING = "nothing"
FOREGROUND = 36  # difference from the background, of 255, of what counts as foreground
EXTRA_SHARE = 0.02  # of the image, that may be foreground outside of the boxes
KEPT_PSNR = 20.0  # dB, of what an edit must keep
BACKGROUND_DISTANCE = 40.0  # of the border from a background, of 255
SMALLEST_EXTENT = 0.75  # of what a sprite should extend over


class Classifier(nn.Module):
    """Map crops (n, 3, `CROP`, `CROP`) in [0, 1] to logits of pairs and nothing, and of no tone and all tones."""

    def __init__(self, num_pairs: int, num_tones: int, width: int = 24):
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

        self.features = nn.Sequential(
            *(block(3, width, 2), block(width, 2 * width), nn.MaxPool2d(2)),
            *(block(2 * width, 4 * width), block(4 * width, 4 * width), nn.MaxPool2d(2)),
            *(block(4 * width, 8 * width), block(8 * width, 8 * width), nn.AdaptiveAvgPool2d(3), nn.Flatten()),
            *(nn.Linear(72 * width, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True)),
        )
        self.heads = nn.ModuleList(nn.Linear(256, size + 1) for size in (num_pairs, num_tones))

    def forward(self, crops: torch.Tensor) -> list[torch.Tensor]:
        features = self.features(crops * 2 - 1)
        return [head(features) for head in self.heads]


@dataclass(frozen=True)
class Look:
    """The sprite in a box, whose concept may be `NOTHING`, and the probability of that concept."""

    sprite: Sprite
    confidence: float


class Judge:
    """
    Looks at images.

    Args:
        folder (`Path`): Written by [`train_judge`].
    """

    backgrounds, sizes = BACKGROUNDS, ("small", "medium", "large")

    def __init__(self, folder: Path):
        names = json.loads((folder / "judge.json").read_text())
        self.pairs, self.tones = [*names["pairs"], [NOTHING, ""]], ["", *names["tones"]]
        self.extents = {Sprite(*key): extent for *key, extent in names["extents"]}
        numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in self.pairs))}
        self._concepts = torch.tensor([numbers[name] for name, _ in self.pairs])
        self.classifier = Classifier(len(names["pairs"]), len(names["tones"]))
        self.classifier.load_state_dict(load_file(folder / "judge.safetensors"))
        self.classifier.eval()

    @torch.no_grad()
    def look(self, pixels: np.ndarray, boxes: Sequence[tuple[int, int, int]]) -> list[Look]:
        """Classify each box (left, top, side) of a uint8 image: the likeliest concept, then its likeliest style."""
        crops = torch.stack([crop(pixels, *place) for place in boxes])
        pairs, tones = (logits.softmax(-1) for logits in self.classifier(crops))
        concepts = torch.zeros_like(pairs).index_add_(1, self._concepts, pairs).max(-1)
        of_concept = torch.where(self._concepts == concepts.indices[:, None], pairs, -1.0).argmax(-1)
        return [
            Look(Sprite(*self.pairs[pair], self.tones[tone]), float(sure))
            for pair, tone, sure in zip(of_concept, tones.argmax(-1), concepts.values)
        ]

    def judge_image(self, image: Image.Image | np.ndarray, scene: Scene) -> dict[str, bool]:
        """
        Whether an image shows a scene, by name: "concept" (every thing is there, wherever), "place" (where it should
        be), "style", "tone" (where the scene has tones), "size", "count" (nothing else is there), "background", and
        "passed", that is all of them.
        """
        pixels = to_pixels(image)
        canvas = pixels.shape[:2]
        boxes = [box(thing, canvas) for thing in scene.things]
        looks = self.look(pixels, boxes)
        name = background_of(pixels, self.backgrounds)
        mask = foreground(pixels, name or scene.background or self.backgrounds[0])
        wanted = [thing.sprite for thing in scene.things]
        placed = [look.sprite.concept == sprite.concept for look, sprite in zip(looks, wanted)]
        checks = {
            "concept": all(placed) or not Counter(s.concept for s in wanted) - self._concepts_anywhere(pixels),
            "place": all(placed),
            "style": all(look.sprite.style == sprite.style for look, sprite in zip(looks, wanted)),
            "size": all(self._extends(mask, place, sprite) for place, sprite in zip(boxes, wanted)),
            "count": _outside(mask, boxes) <= EXTRA_SHARE,
            "background": name is not None if scene.background is None else name == scene.background,
        }
        if any(sprite.tone for sprite in wanted):
            checks["tone"] = all(look.sprite.tone == s.tone for look, s in zip(looks, wanted) if s.tone)
        return {**checks, "passed": all(checks.values())}

    def judge_edit(
        self,
        image: Image.Image | np.ndarray,
        source: Scene,
        target: Scene,
        reference: Image.Image | np.ndarray,
    ) -> dict[str, bool]:
        """
        Whether an image is `target` and keeps what `source` has: "changed" (it shows the target, judged as an image
        is), "kept" (outside of what changes it has at least `KEPT_PSNR` against `reference`, which is the source image
        as the vision tokenizer gives it back; where the background changes, the things alone must stay), "passed".
        """
        checks = self.judge_image(image, target)
        pixels, before = to_pixels(image), to_pixels(reference)
        boxes = changed_boxes(source, target, pixels.shape[:2])
        kept = checks["place"] and checks["style"] if boxes is None else kept_psnr(pixels, before, boxes) >= KEPT_PSNR
        return {"changed": checks["passed"], "kept": kept, "passed": checks["passed"] and kept}

    def _concepts_anywhere(self, pixels: np.ndarray) -> Counter:
        """Count the concepts in all boxes of the lattice; of overlapping boxes, only the surest counts."""
        canvas = pixels.shape[:2]
        things = [Thing(Sprite("", ""), place, size) for place in CELLS for size in self.sizes]
        seen = list(zip(things, self.look(pixels, [box(thing, canvas) for thing in things])))
        found: list[Thing] = []
        names: Counter = Counter()
        for thing, look in sorted(seen, key=lambda pair: -pair[1].confidence):
            if look.sprite.concept != NOTHING and fits([*found, thing], canvas):
                found.append(thing)
                names[look.sprite.concept] += 1
        return names

    def _extends(self, mask: np.ndarray, place: tuple[int, int, int], sprite: Sprite) -> bool:
        """Tell whether the content of a box is about as large as the sprite; a larger one would leave the box."""
        left, top, side = place
        rows, columns = np.nonzero(mask[top : top + side, left : left + side])
        if not len(rows):
            return False
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        return extent >= SMALLEST_EXTENT * side * self.extents.get(sprite, 0.0)


def reward(judge: Judge, images: Sequence[Image.Image], scenes: Sequence[Sequence[str]]) -> list[float]:
    """Return, for GRPO, the share of the checks that each image passes against the last scene of its row."""
    found = []
    for image, of_row in zip(images, scenes, strict=True):
        checks = judge.judge_image(image, Scene.from_json(json.loads(of_row[-1])))
        passed = checks.pop("passed")
        found.append(1.0 if passed else sum(checks.values()) / (len(checks) + 1))
    return found


def looked_at(image: Image.Image, scenes: Sequence[str]) -> np.ndarray:
    """Return the mask (height, width) of the boxes where the things of the last scene should be."""
    mask = np.zeros((image.height, image.width), dtype=bool)
    for thing in Scene.from_json(json.loads(scenes[-1])).things:
        left, top, side = box(thing, mask.shape)
        mask[top : top + side, left : left + side] = True
    return mask


def to_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """Convert an image to uint8 (height, width, 3)."""
    return np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image


def crop(pixels: np.ndarray, left: int, top: int, side: int) -> torch.Tensor:
    """Cut out a box and its margin as (3, `CROP`, `CROP`) in [0, 1]; outside of the image, its border is repeated."""
    margin = round(MARGIN * side)
    rows = np.clip(np.arange(top - margin, top + side + margin), 0, pixels.shape[0] - 1)
    columns = np.clip(np.arange(left - margin, left + side + margin), 0, pixels.shape[1] - 1)
    image = Image.fromarray(pixels[rows[:, None], columns]).resize((CROP, CROP), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def background_of(pixels: np.ndarray, backgrounds: Sequence[str] = BACKGROUNDS) -> str | None:
    """Return the background that is nearest to the border of the image; None where none is near."""
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[2:-2, 2:-2] = False
    seen = pixels[border].astype(np.float32)
    distances = {
        name: np.median(np.linalg.norm(seen - backdrop(name, pixels.shape[:2])[border], axis=-1))
        for name in backgrounds
    }
    name = min(distances, key=distances.get)
    return name if distances[name] <= BACKGROUND_DISTANCE else None


def foreground(pixels: np.ndarray, background: str) -> np.ndarray:
    """Return the mask (height, width) where an image differs from a background."""
    difference = np.abs(pixels.astype(np.int16) - backdrop(background, pixels.shape[:2]))
    return difference.max(-1) > FOREGROUND


def _outside(mask: np.ndarray, boxes: Sequence[tuple[int, int, int]]) -> float:
    """Return the share of an image that is foreground outside of the boxes and their rims."""
    rest = mask.copy()
    for left, top, side in boxes:
        rim = 1 + side // 16
        rest[max(0, top - rim) : top + side + rim, max(0, left - rim) : left + side + rim] = False
    return float(rest.mean())


def kept_psnr(pixels: np.ndarray, reference: np.ndarray, boxes: Sequence[tuple[int, int, int]]) -> float:
    """Return the PSNR in dB outside of the boxes."""
    kept = np.ones(pixels.shape[:2], dtype=bool)
    for left, top, side in boxes:
        kept[top : top + side, left : left + side] = False
    error = np.mean((pixels[kept].astype(np.float64) - reference[kept]) ** 2) if kept.any() else 0.0
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


# ---- training


class _Crops:
    """Random crops around sprites as [`crop`] sees them in scenes, reconstructions and generated images."""

    def __init__(self, sprites: Sprites, device: torch.device):
        self.drawings = sorted(sprites.all)
        self.pairs = sorted({(sprite.concept, sprite.style) for sprite in self.drawings})
        self.tones = sorted({sprite.tone for sprite in self.drawings} - {""})
        rasters = np.stack([np.asarray(sprites.draw(sprite, 64)) for sprite in self.drawings])
        self.rasters = torch.from_numpy(rasters).permute(0, 3, 1, 2).contiguous().to(device)
        numbers = {pair: number for number, pair in enumerate(self.pairs)}
        labels = [
            (numbers[sprite.concept, sprite.style], ("", *self.tones).index(sprite.tone)) for sprite in self.drawings
        ]
        self.labels = torch.tensor(labels, device=device)
        # Sprites with tones are many drawings of one: each of them is seen as often as the plain ones together.
        plain = torch.tensor([not sprite.tone for sprite in self.drawings], dtype=torch.float)
        self.weights = (plain + (1 - plain) / max(1, len(self.tones))).to(device)

    def __call__(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample crops (count, 3, `CROP`, `CROP`) and labels (count, 2); a tenth of them show nothing."""

        def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
            return torch.rand(*shape, generator=generator, device=generator.device) * (high - low) + low

        chosen, others = (torch.multinomial(self.weights, count, True, generator=generator) for _ in range(2))
        labels = self.labels[chosen].clone()
        empty = uniform(count) < 0.1
        labels[empty, 0] = len(self.pairs)
        colors = torch.tensor(list(COLORS.values()), device=generator.device) / 255
        ends = colors[torch.randint(len(colors), (2, count), generator=generator, device=generator.device)]
        ends = torch.where(uniform(1, count, 1) < 0.3, uniform(2, count, 3), ends)
        ends[1] = torch.where(uniform(count, 1) < 0.3, ends[1], ends[0])
        share = torch.linspace(0, 1, CROP, device=generator.device)[:, None]
        crops = torch.lerp(ends[0][..., None, None], ends[1][..., None, None], share).expand(-1, -1, CROP, CROP)
        # A neighbour beside it, then itself, a little off its place and size.
        aside = uniform(count, 2, low=-0.2, high=0.2)
        aside[torch.arange(count), (uniform(count) < 0.5).long()] = uniform(count, low=1.05, high=1.5)
        aside = aside * torch.where(uniform(count, 1) < 0.5, 1, -1)
        crops = self._paste(crops, others, uniform(count, low=0.8, high=1.2), aside, uniform(count) < 0.4)
        shift = uniform(count, 2, low=-0.09, high=0.09)
        crops = self._paste(crops, chosen, uniform(count, low=0.88, high=1.12), shift, ~empty)
        return self._worsen(crops, uniform), labels

    def _paste(
        self, crops: torch.Tensor, chosen: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, shown: torch.Tensor
    ) -> torch.Tensor:
        """Paste sprites, `scale` times as large as the box and shifted by `shift` boxes."""
        seen = 1 + 2 * MARGIN
        matrices = torch.zeros(len(chosen), 2, 3, device=crops.device)
        matrices[:, 0, 0] = matrices[:, 1, 1] = seen / scale
        matrices[:, :, 2] = -2 * shift / scale[:, None]
        grid = F.affine_grid(matrices, (len(chosen), 4, CROP, CROP), align_corners=False)
        layers = (
            F.grid_sample(self.rasters[chosen].float() / 255, grid, align_corners=False) * shown[:, None, None, None]
        )
        return layers[:, :3] + (1 - layers[:, 3:]) * crops

    @staticmethod
    def _worsen(crops: torch.Tensor, uniform) -> torch.Tensor:
        """Degrade crops as small sprites and imperfect images are: coarse, above all in color, and uneven."""
        parts = []
        for part in crops.chunk(8):
            size, color_size = int(uniform(1, low=16, high=CROP + 16)), int(uniform(1, low=8, high=CROP + 16))
            part = _coarser(part, size)
            light = part.mean(1, keepdim=True)
            parts.append(light + _coarser(part - light, min(size, color_size)))
        crops = torch.cat(parts)
        count = len(crops)
        crops = crops * uniform(count, 3, 1, 1, low=0.94, high=1.06) + uniform(count, 3, 1, 1, low=-0.03, high=0.03)
        for side in (CROP // 4, CROP // 2, CROP):  # errors of several widths
            noise = uniform(count, 3, side, side, low=-1) * uniform(count, 1, 1, 1, low=-0.04, high=0.06).relu()
            crops = crops + F.interpolate(noise, size=CROP, mode="bilinear")
        return crops.clamp(0, 1)


def _coarser(images: torch.Tensor, size: int) -> torch.Tensor:
    """Reduce the detail of images to that of `size` pixels."""
    if size >= images.shape[-1]:
        return images
    small = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[-1], mode="bilinear")


def train_judge(
    sprites: Sprites,
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 8000,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    save_steps: int = 500,
    check_scenes: int = 500,
) -> dict:
    """
    Trains the classifier, goes on where it was interrupted, and says what it gets right on true scenes.

    Args:
        sprites ([`Sprites`]): All that it is to know; those that are held out from other training, too.
        folder (`Path`): Gets `judge.safetensors`, `judge.json` and `report.json`.
        seed (`int`, *optional*, defaults to 0): Seed of everything.
        steps, batch_size, learning_rate (*optional*): As usual; AdamW with one cycle.
        save_steps (`int`, *optional*, defaults to 500): How often a checkpoint is written.
        check_scenes (`int`, *optional*, defaults to 500): True scenes of each resolution that the report is of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(seed)
    crops = _Crops(sprites, device)
    classifier = Classifier(len(crops.pairs), len(crops.tones))
    classifier = classifier.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), learning_rate, weight_decay=0.02)
    # A tenth of the steps must be two for the rate to rise.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 20), pct_start=0.1)
    parts = {"classifier": classifier, "optimizer": optimizer, "schedule": schedule}
    settings = {"seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    settings |= {"pairs": crops.pairs, "tones": crops.tones}
    checkpoint, done = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state.get("settings") != settings:
            raise ValueError(
                f"{checkpoint} is of a judge of other sprites, or of other settings: delete it, or name another folder"
            )
        done = state["done"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="judge")
    for step in progress:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)  # so that it can go on anywhere
        loss, right = _train_step(classifier, *crops(batch_size, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.3f}")
        if (step + 1) % save_steps == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            write_file(checkpoint, partial(torch.save, {**state, "done": step + 1, "settings": settings}))
    names = {"pairs": crops.pairs, "tones": crops.tones}
    names["extents"] = [[*vars(sprite).values(), extent(sprites, sprite)] for sprite in crops.drawings]
    write_text(folder / "judge.json", json.dumps(names))
    weights = {name: value.contiguous().cpu() for name, value in classifier.state_dict().items()}
    write_file(folder / "judge.safetensors", partial(save_file, weights))
    report = {str(side): check_judge(sprites, Judge(folder), canvases(side), check_scenes) for side in SIDES}
    write_json(folder / "report.json", report)
    return report


def _train_step(classifier: Classifier, crops: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the loss and the accuracy of the pairs; the loss of the tone counts only where there is a sprite."""
    classifier.train()
    crops = crops.contiguous(memory_format=torch.channels_last)
    device = crops.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=computes_bfloat16(device == "cpu")):
        pairs, tones = (logits.float() for logits in classifier(crops))
    there = labels[:, 0] < pairs.shape[1] - 1
    loss = F.cross_entropy(pairs, labels[:, 0], label_smoothing=0.02)
    loss = loss + 0.5 * F.cross_entropy(tones[there], labels[there, 1])
    return loss, (pairs.argmax(-1) == labels[:, 0]).float().mean().item()


def extent(sprites: Sprites, sprite: Sprite) -> float:
    """Return the longer side of the area that a sprite covers, relative to its size."""
    rows, columns = np.nonzero(np.asarray(sprites.draw(sprite, 64))[..., 3] > 64)
    return round(float(max(np.ptp(rows), np.ptp(columns)) + 1) / 64, 3) if len(rows) else 0.0


def check_judge(sprites: Sprites, judge: Judge, sizes: list[Canvas], count: int) -> dict:
    """Judge true scenes: return the rate of every check, and the most frequent confusions."""
    passed, seen, confused = Counter(), Counter(), Counter()
    for number in range(count):
        rng = Random(f"judge/{number}")
        context = Context(sprites, rng, rng.choice(sizes), pool="held_out" if number % 10 == 0 else "seen")
        scene = context.scene()
        pixels = render(scene, sprites, context.canvas)
        for name, value in judge.judge_image(pixels, scene).items():
            seen[name] += 1
            passed[name] += value
        looks = judge.look(pixels, [box(thing, context.canvas) for thing in scene.things])
        for thing, look in zip(scene.things, looks):
            seen["things"] += 1
            passed["things"] += look.sprite.concept == thing.sprite.concept
            for true, found in zip(vars(thing.sprite).values(), vars(look.sprite).values()):
                confused[f"{true or 'no tone'} -> {found or 'no tone'}"] += true != found
    rates = {name: round(passed[name] / seen[name], 4) for name in seen}
    return {**rates, "confusions": {name: n for name, n in confused.most_common(40) if n}}
