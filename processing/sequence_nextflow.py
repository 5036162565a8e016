"""The sequence of a prompt: token ids, with every image laid out in them (§2.2).

Owns the layout: an image is `<boi>`, one `<|image_pad|>` per cell of scales 2..K, `<eoi>`, and one row of
`image_grids` per `<boi>`. Knows rendered text and images, neither messages nor templates.
"""

import math
import re
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .image_processing_nextflow import flatten_images
from .messages_nextflow import CUT
from .scale_schedule_nextflow import ScaleSchedule, grids_of_size, square_grids
from .tokenizer_extension_nextflow import code_token


IGNORE_INDEX = -100
SIZE_OPTIONS = ("target_grids", "aspect_ratio", "height", "width")  # of a call, for the image to sample
Grids = list[list[int]]  # a schedule: [height, width] of every scale


class NextFlowSequenceProcessor(ProcessorMixin):
    """What [`NextFlowProcessor`] does once text is rendered; its constructor fills in the attributes."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    image_token: str
    boi_token: str
    eoi_token: str
    image_token_id: int
    boi_token_id: int
    eoi_token_id: int
    append_last_scale: bool

    @property
    def max_scales(self) -> int:
        """Scales of the longest image: the number of rows of an image in `image_grids`."""
        return self.image_processor.schedule.max_scales + self.append_last_scale

    def _model_inputs(
        self,
        texts: list[str],
        images: Any | None,
        options: dict[str, Any],
        *,
        by_assistant: list[list[bool]] | None = None,
        responses: list[list[tuple[int, int]]] | None = None,
        train_on: str | None = None,
        return_mask: bool = False,
    ) -> BatchFeature:
        """
        Rendered texts and their images as model inputs.

        Args:
            texts: One a row. An image stands there as one placeholder, with or without `<boi>` and `<eoi>`.
            images: In reading order, flat or a list a row.
            options: Sorted by [`~NextFlowProcessor._options`].
            by_assistant: For each row and image whether the assistant has sampled it; by default no image is.
            responses: Character spans (start, end) of the assistant's responses in each text.
            train_on: `"responses"` or `"all"` adds `labels`.
            return_mask: Adds `assistant_masks`.
        """
        text_options = options["text_kwargs"]
        return_tensors = text_options.pop("return_tensors", None)
        return_types, return_replacements = (
            text_options.pop(name, None) or options.get(name)
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        )

        if train_on not in (None, "responses", "all"):
            raise ValueError(f'train_on is {train_on!r}, expected "responses" or "all"')

        # 1. Tokens, with one placeholder per image
        rows, in_response = self._tokenize(texts, responses, ends_in_boi=options.get("generation_mode") == "image")
        if train_on == "responses" and not all(map(any, in_response)):
            empty = [index for index, mask in enumerate(in_response) if not any(mask)]
            raise ValueError(f"conversations {empty} have no assistant response to train on")

        # 2. Pixels and schedules
        flat_images = []
        if images is not None or any(self.image_token_id in ids for ids in rows):
            flat_images = self._check_images(rows, images)
        data = dict(self.image_processor(flat_images, **options["images_kwargs"])) if flat_images else {}
        image_grids, target_grids = self._schedules(rows, data, options, by_assistant, in_full=train_on == "all")

        # 3. Every placeholder becomes the cells of its image
        counts = self._expand(rows, in_response, image_grids, text_options)
        schedules = {"image_grids": [grids for row in image_grids for grids in row], "target_grids": target_grids}
        data |= {name: grids for name, grids in schedules.items() if grids}

        # 4. Labels and padding
        columns: dict[str, tuple[list[list[int]], int]] = {}  # each with what fills it at padding
        if train_on is not None:
            columns["labels"] = self._labels(rows, in_response, everything=train_on == "all"), IGNORE_INDEX
        if return_mask:
            columns["assistant_masks"] = [list(map(int, mask)) for mask in in_response], 0
        data |= self._pad(rows, columns, text_options)
        if return_types:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if return_replacements:
            data["text_replacement_offsets"] = list(map(self._replacements, texts, counts))
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _expand(
        self,
        rows: list[list[int]],
        in_response: list[list[bool]],
        image_grids: list[list[Grids]],
        text_options: dict[str, Any],
    ) -> list[list[int]]:
        """Repeat each placeholder, in place, for every cell of its image past the first; returns how often."""
        counts = []
        limit = min(self.tokenizer.model_max_length, text_options.get("max_length") or math.inf)
        for index, (ids, schedules) in enumerate(zip(rows, image_grids, strict=True)):
            cells = [sum(height * width for height, width in grids) for grids in schedules]
            to_sample = cells[-1] if ids[-1:] == [self.boi_token_id] else 0  # cells of scales 2..K, and `<eoi>`
            remaining = iter(cells)
            # Scale 1 is predicted at `<boi>`, so it has no placeholder.
            repeats = [next(remaining) - 1 if token == self.image_token_id else 1 for token in ids]
            counts.append([count for token, count in zip(ids, repeats) if token == self.image_token_id])
            ids = [token for token, count in zip(ids, repeats) for _ in range(count)]
            mask = [inside for inside, count in zip(in_response[index], repeats) for _ in range(count)]
            # An image to sample must fit as well, or sampling would have to stop within it.
            kept = slice(None)
            if len(ids) + to_sample > limit:
                kept = self._kept_tokens(index, len(ids), to_sample, int(limit), text_options, bool(schedules))
            rows[index], in_response[index] = ids[kept], mask[kept]
        return counts

    def _kept_tokens(
        self, row: int, length: int, to_sample: int, limit: int, text_options: dict[str, Any], has_images: bool
    ) -> slice:
        """What truncation leaves of a row that is too long. `ValueError` for one with images, which is not cut."""
        if not has_images and text_options.get("truncation") not in (None, False, "do_not_truncate"):
            return slice(limit) if self.tokenizer.truncation_side == "right" else slice(length - limit, None)
        more = f" and the image to sample {to_sample} more" if to_sample else ""
        raise ValueError(
            f"row {row} has {length} tokens, image cells included{more}, expected at most {limit}: shorten the "
            "text or lower the resolution, as nothing is cut from a row with images"
        )

    def _tokenize(
        self, texts: list[str], responses: list[list[tuple[int, int]]] | None, *, ends_in_boi: bool
    ) -> tuple[list[list[int]], list[list[bool]]]:
        """
        Token ids of rendered chats, and which of them lie in `responses` (character spans). Text is tokenized in
        pieces that end at the spans and at the cuts, so that no token is half inside.
        """
        rows, in_response = [], []
        for index, text in enumerate(texts):
            ids, mask, position = [], [], 0
            # The last span is empty: before it stands the text behind the last response.
            for start, end in [*(responses[index] if responses else ()), (len(text), len(text))]:
                for piece, inside in ((text[position:start], False), (text[start:end], True)):
                    # A cut lies inside what spells a control token, whose halves are tokenized as text.
                    for part in filter(None, piece.split(CUT)):
                        ids += self.tokenizer.encode(part, add_special_tokens=False)
                        mask += [inside] * (len(ids) - len(mask))
                position = end
            ids, mask = self._framed(index, ids, mask)
            if ends_in_boi and ids[-1:] != [self.boi_token_id]:
                ids, mask = [*ids, self.boi_token_id], [*mask, False]
            rows.append(ids)
            in_response.append(mask)
        return rows, in_response

    def _framed(self, row: int, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        """
        Put `<boi>` and `<eoi>` around each placeholder that lacks them, so that every image is
        `<boi><|image_pad|><eoi>`, or the `<boi>` that ends its row. Image codes spelled by name raise `ValueError`.
        """
        frame = [self.boi_token_id, self.image_token_id, self.eoi_token_id]
        framed, inside, position = [], [], 0
        while position < len(ids):
            token, length = ids[position], 1
            if token == self.image_token_id:
                framed += frame
            elif ids[position : position + 3] == frame:
                framed += frame
                length = 3
            elif token in (self.boi_token_id, self.eoi_token_id) or self._first_code_id <= token < self.boi_token_id:
                if token != self.boi_token_id or position < len(ids) - 1:
                    found = self.tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(
                        f"row {row} has {found} at token {len(framed)}, expected "
                        f"images as {self.boi_token}{self.image_token}{self.eoi_token}, or {self.boi_token} as the "
                        "last token"
                    )
                framed.append(token)
            else:
                framed.append(token)
            # A frame that is added belongs to a response if its placeholder does.
            inside += [mask[position]] * (len(framed) - len(inside))
            position += length
        return framed, inside

    def _schedules(
        self,
        rows: list[list[int]],
        data: dict[str, Any],
        options: dict[str, Any],
        by_assistant: list[list[bool]] | None,
        *,
        in_full: bool,
    ) -> tuple[list[list[Grids]], list[Grids]]:
        """
        Schedules of the images of each row and, in interleaved mode, of the images that its answer may have.

        A row that ends in `<boi>` also has the schedule of the image to sample: the size that `options` ask for, else
        that of its last image, else a square. With `in_full` all images are laid out as sampled ones, which have no
        repeated last grid.
        """
        closed = iter(data["image_grids"].tolist() if data else [])
        is_interleaved = options.get("generation_mode") == "interleaved"
        asked = [name for name in SIZE_OPTIONS if options.get(name) is not None]
        requested, schedule = None, self.image_processor.schedule
        # Rows of one length, as `image_grids` is a tensor.
        blank = [[0, 0]] * (schedule.max_scales + self.append_last_scale)
        image_grids, target_grids = [], []
        for index, ids in enumerate(rows):
            shown = [next(closed) for token in ids if token == self.image_token_id]
            schedules = list(shown)
            if not in_full:
                authors = [False] * len(shown) if by_assistant is None else by_assistant[index]
                schedules = [own if is_own else self._as_context(own) for is_own, own in zip(authors, shown)]
            image_grids.append(schedules)
            samples = ids[-1:] == [self.boi_token_id]
            if not (samples or is_interleaved):
                continue
            # Taken from `shown`: an image to sample has no repeated last grid.
            target = shown[-1] if shown and not asked else requested
            if target is None:  # as asked for, else square; once a call, as it may warn
                target = requested = requested_grids(schedule, options, self.image_processor.resolution)
            (schedules if samples else target_grids).append(target)
        if asked and not target_grids and not any(ids[-1:] == [self.boi_token_id] for ids in rows):
            raise ValueError(f"{asked} describe an image to sample, but no row ends in {self.boi_token}")
        image_grids = [[(grids + blank)[: len(blank)] for grids in schedules] for schedules in image_grids]
        return image_grids, [(grids + blank)[: len(blank)] for grids in target_grids]

    def _labels(self, rows: list[list[int]], in_response: list[list[bool]], *, everything: bool) -> list[list[int]]:
        """The rows, with -100 where nothing is learned. A `<boi>` stands for its image, whose tokens are not."""
        silent = (self.image_token_id, self.eoi_token_id)
        return [
            [
                token if token not in silent and (inside or everything) else IGNORE_INDEX
                for token, inside in zip(ids, mask, strict=True)
            ]
            for ids, mask in zip(rows, in_response, strict=True)
        ]

    def _pad(
        self, rows: list[list[int]], columns: dict[str, tuple[list[list[int]], int]], text_options: dict[str, Any]
    ) -> dict[str, list[list[int]]]:
        """The rows with their mask, and further columns with what fills them, padded as the tokenizer does."""
        # Rows are cut already; the tokenizer would cut through images.
        names = ["truncation"] if text_options.get("padding") == "max_length" else ["truncation", "max_length"]
        text_options = {name: value for name, value in text_options.items() if name not in names}
        padded = self.tokenizer.pad({"input_ids": rows}, **text_options)
        data = {name: padded[name] for name in ("input_ids", "attention_mask") if name in padded}
        on_left = text_options.get("padding_side", self.tokenizer.padding_side) == "left"
        for name, (values, filler) in columns.items():
            data[name] = []
            for ids, row in zip(padded["input_ids"], values, strict=True):
                fill = [filler] * (len(ids) - len(row))
                data[name].append([*fill, *row] if on_left else [*row, *fill])
        return data

    @cached_property
    def _first_code_id(self) -> int:
        return self.tokenizer.get_vocab().get(code_token(0), self.boi_token_id)

    def _check_images(self, rows: list[list[int]], images: Any | None) -> list[Any]:
        """`images` as a flat list, as many as there are placeholders, per row where they are given per row."""
        expected = [ids.count(self.image_token_id) for ids in rows]
        flat = flatten_images(images) if images is not None else []
        if len(flat) != sum(expected):
            raise ValueError(
                f"got {len(flat)} images for {sum(expected)} image placeholders (by row: {expected}): the number of "
                f"{self.image_token} tokens in the prompts should be the same as the number of images"
            )
        if isinstance(images, (list, tuple)) and images and all(isinstance(row, (list, tuple)) for row in images):
            given = [len(flatten_images(row)) for row in images]
            if len(given) != len(expected) or given != expected:
                raise ValueError(f"got images by row {given} for image placeholders by row {expected}")
        return flat

    def _as_context(self, grids: list[list[int]]) -> list[list[int]]:
        """The schedule of a given image as it stands in the sequence: with `append_last_scale` its last grid twice."""
        grids = [[int(height), int(width)] for height, width in grids if height > 0]
        return [*grids, grids[-1]] if self.append_last_scale else grids

    def target_image_grids(self, image_grids: torch.Tensor) -> torch.Tensor:
        """Rows of `image_grids` (images, max_scales, 2) of given images, for images to sample at their size."""
        if not self.append_last_scale:
            return image_grids
        # The repeated grid shows the codes of a scale that an image to sample ends with.
        is_last = (image_grids[..., 0] > 0).sum(-1, keepdim=True) - 1 == torch.arange(image_grids.shape[1])
        return image_grids.masked_fill(is_last[..., None], 0)

    def _replacements(self, text: str, counts: list[int]) -> list[dict[str, Any]]:
        """Where the placeholders of a text stand, and what becomes of them, as transformers describes it."""
        found, gained = [], 0
        for match, count in zip(re.finditer(re.escape(self.image_token), text), counts):
            cells = self.image_token * count
            framed = text.endswith(self.boi_token, 0, match.start())
            replacement = cells if framed else f"{self.boi_token}{cells}{self.eoi_token}"
            # The caller never sees the cuts.
            start, length = match.start() - text.count(CUT, 0, match.start()), len(self.image_token)
            found.append(
                {
                    "type": "image",
                    "text": self.image_token,
                    "replacement": replacement,
                    "span": (start, start + length),
                    "new_span": (start + gained, start + gained + len(replacement)),
                }
            )
            gained += len(replacement) - length
        return found


def requested_grids(schedule: ScaleSchedule, options: dict[str, Any], default: int) -> Grids:
    """
    Row of `image_grids` that the [`SIZE_OPTIONS`] in `options` describe, else a square's. Of the `resolution`, where
    one is given, else of the `default` or, for a size in pixels, of one that fits.
    """
    resolution = options["images_kwargs"].get("resolution")
    given = [name for name in SIZE_OPTIONS if options.get(name) is not None]
    if len(given) > 1 and given != ["height", "width"]:
        raise ValueError(f"got {given}, expected one of target_grids, aspect_ratio, or height and width")
    if not given:
        return list(map(list, square_grids(schedule, resolution or default)))
    num_scales = schedule.num_scales(resolution or default)
    if "target_grids" in given:
        grids = schedule.check_grids(options["target_grids"])
    elif "aspect_ratio" in given:
        grids = schedule.grids(schedule.bucket_from_aspect_ratio(options["aspect_ratio"]), num_scales)
    elif len(given) == 1:
        raise ValueError(f"got only {given[0]}, expected height and width")
    else:
        grids = grids_of_size(schedule, options["height"], options["width"], resolution=resolution, default=default)
    return [list(grid) for grid in grids]
