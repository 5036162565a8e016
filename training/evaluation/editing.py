"""Benchmarks of edits and of subjects in new scenes: ImgEdit, GEdit-Bench, OmniContext, and the paper's EditCanvas."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .benchmark import (
    Benchmark,
    Question,
    Request,
    Rows,
    Spec,
    by_category,
    find_file,
    mean,
    one_file,
    open_files,
    read_lines,
    with_overall,
)


# ---- ImgEdit (arXiv 2505.20275)

_IMGEDIT_NAMES = {"alter": "adjust", "compose": "hybrid"}  # its files' types, by the names of its tables


def _read_imgedit(folder: Path, language: str) -> Iterator[Request]:
    rows = json.loads(find_file(folder, "basic_edit.json", "singleturn.json").read_text(encoding="utf-8"))
    for key, row in rows.items():
        category = _IMGEDIT_NAMES.get(row["edit_type"], row["edit_type"])
        yield Request(key, row["prompt"], category, row, partial(open_files, find_file(folder, row["id"])))


IMGEDIT = Spec(
    name="imgedit",
    read=_read_imgedit,
    questions=lambda request: [Question(request.row["edit_type"], count=3, low=1, high=5, sources=True)],
    score=lambda request, replies: {"score": mean(replies[0])},
    figures=with_overall,
)


# ---- GEdit-Bench (arXiv 2504.17761) and OmniContext (arXiv 2506.18871)

SEMANTICS, QUALITY = Question("semantics", count=2, sources=True), Question("quality", count=2)
FOLLOWING = Question("prompt_following", sources=True)


def vie_score(semantics: Sequence[float], quality: Sequence[float]) -> tuple[float, float, float]:
    """
    VIEScore (arXiv 2312.14867) as GEdit-Bench uses it: the worst of each list (the edit's success and what it left
    alone; naturalness and freedom from artifacts), and the geometric mean of the two.
    """
    worst, looks = min(semantics), min(quality)
    return worst, looks, math.sqrt(worst * looks)


def _score_edit(request: Request, replies: list[list[float]]) -> dict[str, float]:
    return dict(zip(("PF", "PQ", "Ov."), vie_score(*replies), strict=True))


def _score_subject(request: Request, replies: list[list[float]]) -> dict[str, float]:
    """OmniContext's two scores and their geometric mean."""
    (following,), (consistency,) = replies
    return {"PF": following, "SC": consistency, "Ov.": math.sqrt(following * consistency)}


def _subject_questions(request: Request) -> list[Question]:
    scene = "_with_scene" if "scene" in request.category else ""
    return [FOLLOWING, Question(f"subject_consistency{scene}", sources=True)]


def _read_dataset(rows: Any, language: str, images: str) -> Iterator[Request]:
    """The columns of both; an image is decoded when it is asked for."""
    columns = ["key", "task_type", "instruction", "instruction_language"]
    if missing := {*columns, images} - set(rows.column_names):
        raise ValueError(f"the data set has no column {', '.join(sorted(missing))}")

    def open_images(index: int) -> list[Image.Image]:
        found = rows[index][images]
        return [ImageOps.exif_transpose(image) for image in (found if isinstance(found, list) else [found])]

    for index, row in enumerate(rows.select_columns(columns)):
        if row["instruction_language"] == language:
            id = re.sub(r"[^\w.]", "_", f"{row['task_type']}-{row['key']}")
            yield Request(id, row["instruction"], row["task_type"], row, partial(open_images, index))


def _figures_gedit(rows: Rows) -> dict[str, float]:
    names = {"G_SC": "PF", "G_PQ": "PQ", "G_O": "Ov."}
    return {figure: mean(by_category(rows, name).values()) for figure, name in names.items()}


def _lay_out_gedit(request: Request, files: list[Path]) -> dict[str, Any]:
    folder = f"fullset/{request.category}/{request.row['instruction_language']}/{request.row['key']}"
    (source,) = request.open_images()
    return {f"{folder}.png": files[0], f"{folder}_SRCIMG.png": source.convert("RGB")}


def _figures_omnicontext(rows: Rows) -> dict[str, float]:
    found = {}
    for title, start in {"SINGLE ": "single", "MULTIPLE ": "multi", "SCENE ": "scene", "": ""}.items():
        if chosen := [row for row in rows if row["category"].startswith(start)]:
            for name in ("PF", "SC", "Ov."):
                found[f"{title}{name}"] = mean(by_category(chosen, name).values())
    return found


GEDIT = Spec(
    name="gedit",
    read=partial(_read_dataset, images="input_image"),
    questions=lambda request: [SEMANTICS, QUALITY],
    score=_score_edit,
    figures=_figures_gedit,
    layout=_lay_out_gedit,
)
OMNICONTEXT = Spec(
    name="omnicontext",
    read=partial(_read_dataset, images="input_images"),
    questions=_subject_questions,
    score=_score_subject,
    figures=_figures_omnicontext,
    layout=one_file("fullset/{request.category}/{row[key]}.png"),
)


# ---- EditCanvas (§6.2, appendix B): its 5,221 samples were not released; users bring images in its format

EDIT_CANVAS_TASKS = {  # figures 4, 16, 17 and 25
    "Edit": {
        "text_edit": ("add", "position", "remove", "replace", "rotation", "shape", "size", "style"),
        "global_edit": (
            *("adjust_color", "background", "enhance_image", "lighting_add", "lighting_direction", "lighting_remove"),
            "modality",
        ),
        "local_edit": (
            *("human_age", "human_gender", "human_hair", "human_makeup", "inpainting", "object_add", "object_color"),
            *("object_expression", "object_material", "object_motion", "object_outfit", "object_pose"),
            *("object_position", "object_remove", "object_replace", "object_rotation", "object_shape", "object_size"),
            *("object_texture", "outpainting"),
        ),
        "view_edit": ("camera_view", "camera_zoom_in", "camera_zoom_out"),
        "style_edit": ("real_to_unreal", "unreal_to_real"),
    },
    "SubjectDrivenGeneration": {
        "visual_style": ("style_apply",),
        "human": ("character_place", "face_id_keep", "human_id_place"),
        "common_object": ("object_extract", "object_place", "object_quantity", "object_state", "object_view"),
        "abstract_content": (
            *("design_apply", "logo_extract", "logo_place", "material_apply", "pattern_apply", "photo_extract"),
            "photo_place",
        ),
    },
}
# As the paper writes a task: "Edit/local_edit/object_add".
EDIT_CANVAS_PATHS = [
    f"{kind}/{group}/{task}"
    for kind, groups in EDIT_CANVAS_TASKS.items()
    for group, tasks in groups.items()
    for task in tasks
]


def _read_edit_canvas(folder: Path, language: str) -> Iterator[Request]:
    file = find_file(folder, "metadata.jsonl")
    for index, row in enumerate(read_lines(file)):
        if row["task"] not in EDIT_CANVAS_PATHS:
            raise ValueError(
                f"row {index} of {file} has the task {row['task']!r}, expected {EDIT_CANVAS_PATHS[0]}, ..."
            )
        images = [find_file(folder, name) for name in row["images"]]
        yield Request(f"{index:05d}", row["instruction"], row["task"], row, partial(open_files, *images))


def _is_edit(request: Request) -> bool:
    return request.category.startswith("Edit/")


def _figures_edit_canvas(rows: Rows) -> dict[str, float]:
    """
    Table 11. Sub-categories and aggregates are means over their tasks, which gives the paper's aggregates of editing
    from its sub-categories; "Overall" is the mean of the two aggregates.
    """
    found = {}
    for kind, title, names in (("Edit", "Edit", "PF PQ Ov."), ("SubjectDrivenGeneration", "Subject", "PF SC Ov.")):
        of_kind = [row for row in rows if row["category"].startswith(f"{kind}/")]
        overall = by_category(of_kind, "Ov.")
        for group in EDIT_CANVAS_TASKS[kind]:
            if values := [value for path, value in overall.items() if path.split("/")[1] == group]:
                found[group] = mean(values)
        if of_kind:
            found |= {f"{title} {name}": mean(by_category(of_kind, name).values()) for name in names.split()}
    if {"Edit Ov.", "Subject Ov."} <= found.keys():
        found["Overall"] = (found["Edit Ov."] + found["Subject Ov."]) / 2
    return found


EDIT_CANVAS = Spec(
    name="edit_canvas",
    read=_read_edit_canvas,
    questions=lambda request: [SEMANTICS, QUALITY] if _is_edit(request) else _subject_questions(request),
    score=lambda request, replies: (_score_edit if _is_edit(request) else _score_subject)(request, replies),
    figures=_figures_edit_canvas,
    layout=one_file("{request.category}/{request.id}.png"),
)

imgedit, gedit, omnicontext, edit_canvas = (
    partial(Benchmark, spec) for spec in (IMGEDIT, GEDIT, OMNICONTEXT, EDIT_CANVAS)
)
