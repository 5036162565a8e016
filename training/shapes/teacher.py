"""The semantic teacher of the Shapes world: a small SigLIP2 (NaFlex form) trained on pictures and their captions.

The real tokenizer is distilled from SigLIP2-so400m; a world of its own needs a teacher of its own. Class, loss and
file format are those of transformers' `Siglip2Model`, so everything that takes the real teacher takes this one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Siglip2Config, Siglip2Model, Trainer, TrainingArguments


MAX_CAPTION_TOKENS = 32


class CaptionedPictures(Dataset):
    """Pictures uint8 (n, height, width, 3) with their captions, as `{"picture", "caption"}`."""

    def __init__(self, pictures: np.ndarray, captions: list[str]):
        if len(pictures) != len(captions):
            raise ValueError(f"got {len(pictures)} pictures and {len(captions)} captions, expected as many of each")
        self.pictures = pictures
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        return {"picture": self.pictures[index], "caption": self.captions[index]}


@dataclass
class ContrastiveCollator:
    """Items of [`CaptionedPictures`] to the inputs of [`~transformers.Siglip2Model`], with its loss asked for."""

    tokenizer: PreTrainedTokenizerBase
    patch_size: int = 8

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor | bool]:
        pictures = torch.from_numpy(np.stack([item["picture"] for item in items]))
        batch, rows, columns = len(items), *(size // self.patch_size for size in pictures.shape[1:3])
        # (n, height, width, 3) -> (n, patches, patch_size**2 * 3), in the order of Siglip2's image processor
        patches = pictures.view(batch, rows, self.patch_size, columns, self.patch_size, 3).transpose(2, 3)
        # SigLIP reads the last token, and was trained with padding up to a fixed length.
        text = self.tokenizer(
            [item["caption"] for item in items],
            padding="max_length",
            truncation=True,
            max_length=MAX_CAPTION_TOKENS,
            return_tensors="pt",
        )
        return {
            "input_ids": text["input_ids"],
            "pixel_values": patches.reshape(batch, rows * columns, -1).float().div(127.5).sub(1),
            "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.long),
            "spatial_shapes": torch.tensor([[rows, columns]]).expand(batch, 2),
            "return_loss": True,
        }


def build_teacher(tokenizer: PreTrainedTokenizerBase, *, patch_size: int = 8, num_patches: int = 64) -> Siglip2Model:
    """An untrained teacher for pictures of about `num_patches` patches."""
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4}
    config = Siglip2Config(
        vision_config={**shape, "num_hidden_layers": 4, "patch_size": patch_size, "num_patches": num_patches},
        text_config={
            **shape,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_CAPTION_TOKENS,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    model = Siglip2Model(config)
    with torch.no_grad():  # SigLIP's own start, so that the many negatives do not dominate
        model.logit_scale.fill_(np.log(10.0))
        model.logit_bias.fill_(-10.0)
    return model


def train_teacher(
    data: CaptionedPictures, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments, *, patch_size: int = 8
) -> tuple[Siglip2Model, float]:
    """
    Trains a teacher with SigLIP's sigmoid loss; resumes from the last checkpoint in `args.output_dir` if there is one.

    Returns:
        The model, and its retrieval accuracy: how often the right one of 64 captions is the nearest to a picture,
        on the last pictures of `data`, which are not trained on.
    """
    args.remove_unused_columns = False
    held_out, height, width = 512, *data.pictures.shape[1:3]
    train_data = CaptionedPictures(data.pictures[:-held_out], data.captions[:-held_out])
    model = build_teacher(tokenizer, patch_size=patch_size, num_patches=height * width // patch_size**2)
    collator = ContrastiveCollator(tokenizer, patch_size)
    trainer = Trainer(model, args, train_dataset=train_data, data_collator=collator)
    trainer.train()

    model.eval()
    items = [data[index] for index in range(len(data) - held_out, len(data))]
    correct = 0
    with torch.no_grad():
        for start in range(0, held_out, 64):
            batch = items[start : start + 64]
            inputs = {key: value for key, value in collator(batch).items() if key != "return_loss"}
            nearest = model(**trainer._prepare_inputs(inputs)).logits_per_image.argmax(-1).tolist()
            # Equal captions are equally right.
            correct += sum(batch[row]["caption"] == batch[column]["caption"] for row, column in enumerate(nearest))
    return model, correct / held_out
