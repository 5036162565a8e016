"""The figures of the concepts page as SVG: `python docs/figures/make.py` writes them beside this file."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule


TEXT, MARK, CELL, TRAINED, PLAIN = "#d9dee6", "#f4b860", "#8fb8de", "#7cc48a", "#ffffff"
STYLE = "font-family: system-ui, sans-serif; font-size: 13px"


def rectangle(x: float, y: float, width: float, height: float, fill: str = PLAIN) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="#333"/>'


def label(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def box(x: float, y: float, width: float, height: float, text: str, fill: str = PLAIN) -> str:
    return rectangle(x, y, width, height, fill) + label(x + width / 2, y + height / 2 + 5, text)


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="#333" marker-end="url(#head)"/>'


def grid(x: float, y: float, rows: int, columns: int, cell: float, fill: str = CELL) -> str:
    cells = [(x + column * cell, y + row * cell) for row in range(rows) for column in range(columns)]
    return "".join(rectangle(left, top, cell, cell, fill) for left, top in cells)


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = '<path d="M0 0 L8 4 L0 8 z" fill="#333"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" style="{STYLE}">\n<title>{escape(title)}</title>\n<defs><marker id="head" markerWidth="8" '
        f'markerHeight="8" refX="7" refY="4" orient="auto">{head}</marker></defs>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def layout() -> str:
    """The sequence of one image: what goes in, and what each part predicts."""
    blocks = [("a", TEXT), ("red", TEXT), ("circle", TEXT), ("<boi>", MARK), ("2x2", CELL), ("3x3", CELL)]
    blocks += [("…", CELL), ("KxK", CELL), ("<eoi>", MARK), ("text", TEXT)]
    predicts = ["red", "circle", "<boi>", "codes 1x1", "codes 2x2", "codes 3x3", "…", "codes KxK", "text", "text"]
    inputs = ["", "", "", "", "codes 1x1", "codes 2x2", "…", "codes of K-1", "", ""]
    parts = []
    for index, ((text, fill), output, source) in enumerate(zip(blocks, predicts, inputs, strict=True)):
        x = 10 + index * 86
        parts += [box(x, 70, 80, 34, text, fill), label(x + 40, 20, output, size=12)]
        parts += [arrow(x + 40, 68, x + 40, 28)] if output else []
        parts += [label(x + 40, 150, source, size=12), arrow(x + 40, 136, x + 40, 106)] if source else []
    parts += [
        label(
            10,
            185,
            "below: what is resized to the block's grid as its input; above: what is predicted",
            anchor="start",
        )
    ]
    return svg(870, 200, "Layout of a sequence with one image", parts)


def scales() -> str:
    """The first grids of a square and of a wide schedule."""
    schedule, parts = ScaleSchedule(), []
    for row, bucket in enumerate([(16, 16), (8, 32)]):
        x, grids = 120.0, schedule.grids(bucket, 18)
        parts.append(label(10, 70 + row * 120, f"{bucket[0]} : {bucket[1]}", anchor="start"))
        for number in (1, 2, 3, 4, 6, 8):
            rows, columns = grids[number - 1]
            parts.append(grid(x, 60 + row * 120 - rows * 4, rows, columns, 8))
            parts.append(label(x + columns * 4, 115 + row * 120, f"{rows}x{columns}", size=11))
            x += columns * 8 + 40
        parts.append(label(x, 70 + row * 120, f"… {grids[-1][0]}x{grids[-1][1]}", anchor="start"))
    return svg(900, 250, "Scales of a square and of a wide image", parts)


def positions() -> str:
    """The three coordinates of text, marks and cells around an image of 2x2 and 3x3."""
    parts, row = [], [("text", "(8, 8, 8)", TEXT), ("<boi>", "(9, 9, 9)", MARK)]
    for x, (name, coordinates, fill) in zip((10, 110), row, strict=True):
        parts += [box(x, 90, 90, 40, name, fill), label(x + 45, 150, coordinates, size=12)]
    for x, side, scale in ((220, 2, 10), (400, 3, 11)):
        cell = 140 / side
        parts += [
            grid(x, 40, side, side, cell),
            label(x + 70, 200, f"{side}x{side}: first coordinate {scale}", size=12),
        ]
        for index in range(side * side):
            i, j = divmod(index, side)
            at = f"{2 * i + 1}/{2 * side}, {2 * j + 1}/{2 * side}"
            parts.append(label(x + (j + 0.5) * cell, 44 + (i + 0.5) * cell, at, size=10))
    for x, name, at, fill in ((580, "<eoi>", "(12, 12, 12)", MARK), (690, "text", "(13, 13, 13)", TEXT)):
        parts += [box(x, 90, 90, 40, name, fill), label(x + 45, 150, at, size=12)]
    parts.append(
        label(
            10,
            230,
            "numbers in cells: row and column as fractions of the extent C, equal for all scales",
            anchor="start",
        )
    )
    return svg(800, 245, "Positions of text and image cells", parts)


def codebooks() -> str:
    """Two branches, one index, two codebooks."""
    parts = [
        box(10, 80, 70, 40, "image"), box(120, 30, 160, 40, "semantic encoder (ViT)", TEXT),
        box(120, 130, 160, 40, "pixel encoder (CNN)", MARK), box(330, 70, 150, 60, "nearest pair", CELL),
        label(405, 150, "one index a cell,", size=12), label(405, 166, "scale by scale, on residuals", size=12),
        box(540, 30, 150, 40, "semantic codebook", TEXT), box(540, 130, 150, 40, "pixel codebook", MARK),
        box(740, 30, 150, 40, "semantic decoder", TEXT), box(740, 130, 150, 40, "pixel decoder", MARK),
        label(815, 22, "predicts the teacher's features", size=11), label(815, 188, "decodes to pixels", size=11),
        arrow(80, 95, 118, 52), arrow(80, 105, 118, 148), arrow(280, 52, 328, 90), arrow(280, 148, 328, 112),
        arrow(480, 90, 538, 52), arrow(480, 110, 538, 148), arrow(690, 50, 738, 50), arrow(690, 150, 738, 150),
        arrow(690, 55, 760, 128),
    ]  # fmt: skip
    return svg(910, 200, "The two codebooks of the vision tokenizer", parts)


def self_correction() -> str:
    """A sampled code goes in; the target corrects it at the next scale."""
    parts = [
        box(10, 40, 150, 40, "residual of scale k"), box(220, 10, 190, 40, "nearest code: target", TRAINED),
        box(220, 80, 190, 40, "one of the 10 nearest: input", MARK), box(480, 80, 190, 40, "residual − that code"),
        box(740, 40, 150, 40, "residual of scale k+1"), arrow(160, 55, 218, 32), arrow(160, 65, 218, 98),
        arrow(410, 100, 478, 100), arrow(670, 95, 738, 66),
        label(455, 150, "The next target is the nearest code of what the sampled code left: it corrects the mistake."),
    ]  # fmt: skip
    return svg(910, 165, "Self-correction", parts)


def prefix_rl() -> str:
    """The first m scales are trained; the finer ones are only sampled for the reward."""
    parts, x = [], 20.0
    for number, side in enumerate((1, 2, 3, 4, 6, 8, 10), start=1):
        fill = TRAINED if number <= 4 else PLAIN
        parts += [grid(x, 70 - side * 3.5, side, side, 7, fill), label(x + side * 3.5, 125, f"{side}x{side}", size=11)]
        x += side * 7 + 35
    parts += [
        label(120, 20, "first m scales: policy gradient"), label(400, 20, "finer scales: sampled, no gradient"),
        arrow(x - 25, 70, x + 5, 70), box(x + 10, 50, 70, 40, "image"), arrow(x + 80, 70, x + 110, 70),
        box(x + 115, 50, 80, 40, "reward", MARK),
        f'<path d="M{x + 155:g} 92 V150 H90 V132" fill="none" stroke="#333" marker-end="url(#head)"/>',
        label(x / 2 + 60, 168, "advantage: the reward, compared with those of the other samples of the same prompt"),
    ]  # fmt: skip
    return svg(int(x + 215), 185, "Reinforcement learning on the first scales", parts)


FIGURES: tuple[Callable[[], str], ...] = (layout, scales, positions, codebooks, self_correction, prefix_rl)


if __name__ == "__main__":
    for figure in FIGURES:
        Path(__file__).with_name(f"{figure.__name__}.svg").write_text(figure(), encoding="utf-8")
