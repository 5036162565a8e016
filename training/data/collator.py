"""Rows of tokens and codes -> one batch for the transformer: a row of it is a document, or a pack of documents."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from ...modeling_nextflow.configuration_nextflow import NextFlowConfig
from ...modeling_nextflow.loss_nextflow import IGNORE_INDEX


@dataclass
class NextFlowDataCollator:
    """Pads `input_ids` and `labels` on the right; codes and grids of all rows follow each other in reading order.

    Where rows have a `row_id`, the batch has `row_ids`: the trainer names them where a batch is bad.

    Args:
        pad_token_id (`int`): Token at padded places; they are masked and never trained on.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        padding = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        # `torch.tensor` copies: rows of a memory-mapped data set are read-only.
        batch = {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }
        if lengths.min() < lengths.max():
            batch["attention_mask"] = (torch.arange(lengths.max()) < lengths[:, None]).long()
        return batch | _images_and_names(rows)


@dataclass
class PackingCollator:
    """
    Packs of rows -> a batch with a row for each, and integer `position_ids` (batch, length) that restart at every
    document.

    Takes lists of rows, as [`PackedDataset`] has them; a plain row is a pack of one. What fills a row up is a document
    of its own, unsupervised, so there is no `attention_mask`. `row_ids` are as in [`NextFlowDataCollator`].

    Args:
        config ([`NextFlowConfig`]): Config of the model, for its token ids.
        pad_to_multiple_of (`int`, *optional*, defaults to 1): Pads rows to a multiple; 128 suits flex attention.
        length (`int`, *optional*): Length of all rows of all batches, for compiled models. As needed by default.
    """

    config: NextFlowConfig
    pad_to_multiple_of: int = 1
    length: int | None = None

    def __call__(self, packs: list[list[dict] | dict]) -> dict[str, torch.Tensor]:
        packs = [[pack] if isinstance(pack, dict) else pack for pack in packs]
        longest = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
        if self.length is not None and longest > self.length:
            raise ValueError(f"a pack has {longest} tokens, expected at most length={self.length}")
        length = self.length or -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(packs), length), self.config.pad_token_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        position_ids = torch.zeros_like(input_ids)  # not floats: sharded training rounds those
        for index, pack in enumerate(packs):
            start = 0
            for row in pack:
                stop = start + len(row["input_ids"])
                self._place(row, input_ids[index, start:stop], labels[index, start:stop])
                position_ids[index, start:stop] = torch.arange(stop - start)
                start = stop
            position_ids[index, start:] = torch.arange(length - start)
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        return batch | _images_and_names([row for pack in packs for row in pack])

    def _place(self, row: dict, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        input_ids[:] = torch.tensor(row["input_ids"])
        labels[:] = torch.tensor(row["labels"])
        if input_ids[0] == self.config.boi_token_id and labels[0] != IGNORE_INDEX:
            raise ValueError("a document begins with an image to be trained on: packed, a token must come before it")
        labels[0] = IGNORE_INDEX  # else the document before it would be trained to predict it


def _images_and_names(rows: list[dict]) -> dict[str, torch.Tensor | list[str]]:
    batch = {}
    if images := [row for row in rows if len(row["image_grids"])]:
        for name in ("image_codes", "image_target_codes"):
            batch[name] = torch.cat([torch.tensor(row[name]) for row in images])
        # Rows of processors whose schedules have different numbers of scales: what is missing is zero.
        grids = [grid for row in images for grid in torch.tensor(row["image_grids"])]
        batch["image_grids"] = pad_sequence(grids, batch_first=True)
    if "row_id" in rows[0]:
        batch["row_ids"] = [str(row["row_id"]) for row in rows]
    return batch
