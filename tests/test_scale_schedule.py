"""The schedule rule against every number of table 14, and its refusals."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule, num_cells


TABLE = json.loads((Path(__file__).parent / "data" / "scale_schedules.json").read_text())
SMALL = ScaleSchedule(scale_bases=(1, 2, 3, 4, 5, 6, 8), patch_size=8, bucket_area=64)


def bucket_of(row: dict) -> tuple[int, int]:
    height, width = row["schedule"][-1]
    return height // 4, width // 4


def test_buckets_are_the_41_rows_of_the_table():
    assert len(TABLE["ratios"]) == 41
    # The table is sorted by its printed labels, some of which are off; ours by the true ratio.
    rows = sorted(map(bucket_of, TABLE["ratios"]), key=lambda bucket: Fraction(*bucket))
    assert ScaleSchedule().buckets == tuple(rows)


@pytest.mark.parametrize("row", TABLE["ratios"], ids=lambda row: row["ratio"])
def test_grids_are_the_table(row: dict):
    schedule = ScaleSchedule()
    assert [list(grid) for grid in schedule.grids(bucket_of(row), 18)] == row["schedule"]
    for resolution, level in row["levels"].items():
        assert schedule.num_scales(int(resolution)) == level["num_scales"]
        assert schedule.pixel_size(bucket_of(row), level["num_scales"]) == (level["h"], level["w"])
        assert num_cells(schedule.grids(bucket_of(row), level["num_scales"])) == level["tokens"]


@pytest.mark.parametrize(
    "resolution, scales, cells", [(64, 4, 30), (256, 12, 900), (512, 16, 3684), (1024, 18, 10084)]
)
def test_square_levels(resolution: int, scales: int, cells: int):
    schedule = ScaleSchedule()
    assert schedule.num_scales(resolution) == scales
    assert num_cells(schedule.grids((16, 16), scales)) == cells
    assert schedule.pixel_size((16, 16), scales) == (resolution, resolution)


@pytest.mark.parametrize("row", TABLE["ratios"], ids=lambda row: row["ratio"])
def test_true_size_finds_its_bucket(row: dict):
    schedule = ScaleSchedule()
    height, width = row["schedule"][-1]
    assert schedule.nearest_bucket(height, width) == bucket_of(row)
    assert schedule.bucket_from_aspect_ratio(f"{width}:{height}") == bucket_of(row)
    assert schedule.nearest_bucket(width, height) == bucket_of(row)[::-1]


@pytest.mark.parametrize(
    "aspect_ratio, bucket",
    [
        ("1:1", (16, 16)),
        ("16:9", (12, 21)),
        ("9:16", (21, 12)),
        ("4:3", (14, 18)),
        ("2.39:1", (10, 24)),
        ("7:1", (8, 32)),
    ],
)
def test_aliases_resolve_to_the_nearest_bucket(aspect_ratio: str, bucket: tuple[int, int]):
    assert ScaleSchedule().bucket_from_aspect_ratio(aspect_ratio) == bucket


def test_misprinted_labels_resolve_by_their_numbers():
    # The paper's "10:29" (height : width) sits on a 2:5 grid; 10/29 itself is nearer to 9:26.
    assert Fraction(*ScaleSchedule().bucket_from_aspect_ratio("29:10")) == Fraction(9, 26)


def test_small_numbers_same_rule():
    assert SMALL.num_scales(64) == 7
    assert num_cells(SMALL.grids((8, 8), 7)) == 155
    assert (4, 16) in SMALL.buckets and (16, 4) in SMALL.buckets
    for bucket in SMALL.buckets:
        assert SMALL.grids(bucket, 7)[-1] == bucket
        assert SMALL.check_grids(SMALL.grids(bucket, 7))


def test_image_grids_pads_with_zeros():
    rows = SMALL.image_grids([SMALL.grids((8, 8), 3), SMALL.grids((8, 8), 7)])
    assert rows[0] == [[1, 1], [2, 2], [3, 3], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert rows[1][-1] == [8, 8]
    assert num_cells(rows[0]) == 14


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ScaleSchedule().num_scales(500), "resolution is 500, expected one of .*512"),
        (lambda: ScaleSchedule().nearest_bucket(100, 2001), "20.01, expected at most 20"),
        (lambda: ScaleSchedule().nearest_bucket(0, 8), "must be positive, got 0 and 8"),
        (lambda: ScaleSchedule().nearest_bucket(float("nan"), 8), "must be positive"),
        (lambda: ScaleSchedule().bucket_from_aspect_ratio("wide"), "'wide', expected"),
        (lambda: ScaleSchedule().grids((16, 16), 19), "num_scales is 19, expected 1 to 18"),
        (lambda: ScaleSchedule().image_grids([[(2, 2)]]), r"first grid is \(2, 2\)"),
        (lambda: ScaleSchedule().image_grids([[(1, 1), (4, 4), (3, 4)]]), r"\(3, 4\) after \(4, 4\)"),
        (lambda: SMALL.image_grids([[(1, 1)] * 8]), "got 8 grids, expected 1 to 7"),
        (lambda: ScaleSchedule(bucket_area=200), "square number, got 200"),
        (lambda: ScaleSchedule(scale_bases=(2, 4)), "increase strictly from 1"),
        (lambda: ScaleSchedule(scale_bases=()), "increase strictly from 1"),
        (lambda: ScaleSchedule(min_bucket_fill=0.0), "min_bucket_fill"),
        (lambda: ScaleSchedule(max_aspect_ratio=0.5), "max_aspect_ratio"),
        (lambda: ScaleSchedule(patch_size=0), "patch_size"),
    ],
)
def test_refusals_name_both_numbers(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_papers_own_cost_estimate():
    # Appendix A.2 counts, per layer and over the hidden size, 12 per token and 4 per query-key pair, with 100 tokens
    # of text: its two totals are exact only for 18 scales of h * w slots each, the 1x1 scale being one query.
    schedule = ScaleSchedule()
    slots = [height * width for height, width in schedule.grids(schedule.nearest_bucket(1, 1), 18)]
    assert 12 * (sum(slots) + 100) == 122_208
    assert 4 * (100**2 + sum(count * (100 + sum(slots[: k + 1])) for k, count in enumerate(slots))) == 256_215_912
