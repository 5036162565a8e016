"""Rows of tokens and codes -> one right-padded batch for the transformer."""

from dataclasses import dataclass

import torch

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
        # `torch.tensor` copies: rows of a memory-mapped data set are read-only.
        lengths = [len(row["input_ids"]) for row in rows]
        shape = (len(rows), max(lengths))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for index, (row, length) in enumerate(zip(rows, lengths)):
            input_ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            attention_mask[index, :length] = 1
        batch = {"input_ids": input_ids, "labels": labels}
        if min(lengths) < max(lengths):
            batch["attention_mask"] = attention_mask
        with_images = [row for row in rows if len(row["image_grids"])]
        if with_images:
            for name in ("image_codes", "image_target_codes", "image_grids"):
                batch[name] = torch.cat([torch.tensor(row[name]) for row in with_images])
        if "row_id" in rows[0]:
            batch["row_ids"] = [str(row["row_id"]) for row in rows]
        return batch
