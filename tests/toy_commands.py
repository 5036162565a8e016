"""Every command that trains or extracts, on toys: what it is given, and what must be the same at the end."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from processes import in_a_process
from toy_decoder import toy_base_model
from toy_pipeline import toy_pipeline

from nextflow_hf.commands import extract, train


TRAINING = {
    "max_steps": 5, "save_steps": 2, "save_total_limit": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
    "learning_rate": 0.01, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


def brightness(images: list[Image.Image], **columns) -> list[float]:
    """A reward, named `toy_commands:brightness` in recipes."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


def one_number(images: list[Image.Image], **columns) -> float:
    """A mistake: no list of numbers."""
    return 1.0


@dataclass
class ToyCommand:
    """
    Args:
        main (`Callable`): Of the command.
        argv (`Callable`): Its arguments, of the folder to write.
        results (`str`): Pattern of the files, in that folder, that depend on neither its name nor the time.
    """

    main: Callable[[list[str]], int]
    argv: Callable[[Path], list[str]]
    results: str = "**/*.safetensors"

    def run(self, output: Path, *more: str) -> int:
        return self.main([*self.argv(output), *more])

    def start(self, output: Path, prepare: Callable[[], None] = lambda: None) -> Process:
        """The command in a process of its own, after `prepare`."""
        return in_a_process(self._in_a_process, output, prepare)

    def _in_a_process(self, output: Path, prepare: Callable[[], None]) -> None:
        torch.set_num_threads(1)  # another pool of threads does not survive the fork
        output.parent.mkdir(parents=True, exist_ok=True)
        prepare()
        with open(os.devnull, "w") as sys.stdout, open(output.with_suffix(".log"), "a") as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            logging.basicConfig(force=True)  # not pytest's handlers
            sys.exit(self.run(output))

    def result(self, output: Path) -> dict[str, bytes]:
        files = [path for path in output.glob(self.results) if "checkpoint-" not in str(path.relative_to(output))]
        return {str(path.relative_to(output)): path.read_bytes() for path in files if not path.name.startswith(".")}


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder, with its times."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def toy_commands(folder: Path) -> dict[str, ToyCommand]:
    """All of them, with what they need in `folder`."""
    toy_pipeline().save_pretrained(folder / "model")
    for name in ("transformer", "vision_tokenizer", "processor"):
        getattr(toy_pipeline(), name).save_pretrained(folder / "model" / name)
    for name in ("pictures", "captioned"):
        (folder / name).mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        for name in ("pictures", "captioned"):
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
        (folder / "captioned" / f"{index}.txt").write_text(f"picture {index}")
    toy_base_model("unet").save_pretrained(folder / "base_model")

    def write(name: str, recipe: dict) -> str:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        return str(folder / f"{name}.yaml")

    source = {"path": str(folder / "captioned"), "format": "captioned_folder", "task": "text_to_image"}
    data = {"model": str(folder / "model"), "sources": [source], "rows_per_shard": 2, "dtype": "float32"}
    data |= {"batch_size": 1, "stopping_strategy": "all_exhausted_without_replacement"}
    data = write("data", {**data, "output_dir": str(folder / "codes")})
    assert extract.main([data]) == 0
    transformer = {
        **TRAINING, "max_steps": 13, "model_name_or_path": str(folder / "model" / "transformer"), "use_peft": True,
        "lora_dropout": 0.3, "train_codes": [str(folder / "codes")],
    }  # fmt: skip
    tokenizer = {
        **TRAINING, "max_steps": 13, "stage": "pixel", "data": str(folder / "pictures"),
        "vision_tokenizer_name_or_path": str(folder / "model" / "vision_tokenizer"), "random_flip": True,
        "image_processor": json.loads((folder / "model" / "processor" / "processor_config.json").read_text())[
            "image_processor"
        ],
        "perceptual_loss_weight": 0.0, "ema_decay": 0.9,
    }  # fmt: skip
    tokenizer["image_processor"].pop("image_processor_type", None)
    decoder = {
        **TRAINING, "base_model": str(folder / "base_model"), "denoiser": "unet", "ema_decay": 0.9, "data": data,
        "frozen_dtype": "float32",
    }  # fmt: skip
    (folder / "prompts.txt").write_text("".join(f"{word}\n" for word in "abcdefghijklmnopqrstuvwx"))
    grpo = {
        **TRAINING, "model": str(folder / "model"), "prompts": str(folder / "prompts.txt"), "use_peft": True,
        "lora_r": 2, "lora_target_modules": ["q_proj"], "rewards": ["toy_commands:brightness"], "num_generations": 4,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False, "prefix_scales": 2,
        "gradient_checkpointing": False,
    }  # fmt: skip
    write("window", {**grpo, "num_iterations": 2, "save_steps": 1})
    recipes = {"transformer": transformer, "tokenizer": tokenizer, "decoder": decoder, "grpo": grpo}
    for name, recipe in recipes.items():
        write(name, recipe)

    def training(kind: str, recipe: str) -> ToyCommand:
        path = str(folder / f"{recipe}.yaml")
        return ToyCommand(train.main, lambda out: [kind, path, f"output_dir={out}"])

    return {
        "extract": ToyCommand(extract.main, lambda out: [data, f"output_dir={out}"], "*[!g].*[!p]"),
        **{kind: training(kind, kind) for kind in recipes},
        "grpo in a rollout window": training("grpo", "window"),
    }
