"""`loss.png` of a run: its losses over the steps, of every scale where these are logged; a GRPO run's rewards.

Plotted with Pillow, at each checkpoint and at the end.
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from transformers import TrainerCallback

from ...atomic import write_file


PLOT_FILE = "loss.png"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 960, 540, 70, 20, 160, 40
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
TICKS = 5


class LossPlotCallback(TrainerCallback):
    """Plot the losses that were logged so far."""

    def on_save(self, args, state, control, **kwargs) -> None:
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        curves = loss_curves(state.log_history)
        if state.is_world_process_zero and curves:
            write_file(Path(args.output_dir, PLOT_FILE), plot(curves).save)


def loss_curves(history: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of the curves in a trainer's `log_history`."""
    entries = [entry for entry in history if "loss" in entry or "reward" in entry]
    names = {name for entry in entries for name in entry}
    scales = sorted((name for name in names if name.startswith("loss_scale_")), key=lambda name: int(name[11:]))
    shown = [*(["text_loss"] if "text_loss" in names else []), *scales]
    shown = shown or (["reward"] if "reward" in names else ["loss"])
    curves = {
        name: [(entry["step"], float(entry[name])) for entry in entries if math.isfinite(entry.get(name, math.nan))]
        for name in shown
    }
    return {name: points for name, points in curves.items() if points}


def plot(curves: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Lines with axes and a legend."""
    steps, values = zip(*(point for points in curves.values() for point in points))
    (first, last), (low, high) = (_range(numbers) for numbers in (steps, values))
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    for tick in range(TICKS + 1):
        value, step = low + (high - low) * tick / TICKS, first + (last - first) * tick / TICKS
        (left, y), (right, _) = place(first, value), place(last, value)
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((LEFT - 8, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
        draw.text((place(step, low)[0], HEIGHT - BOTTOM + 8), f"{step:.0f}", fill="black", font=font, anchor="mt")
    for index, (name, points) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        draw.line([place(*point) for point in points], fill=color, width=2)
        draw.text((WIDTH - RIGHT + 12, TOP + 20 * index), name, fill=color, font=font)
    return image


def _range(numbers: tuple[float, ...]) -> tuple[float, float]:
    low, high = min(numbers), max(numbers)
    margin = max(1, abs(low) / 10)  # beside a large number, 1 is nothing
    return (low, high) if high > low else (low - margin, high + margin)
