"""Callbacks of the trainer: images that the model samples, beside the curves of its losses."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import DistributedType
from diffusers.utils import make_image_grid
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ...atomic import write_file
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...pipelines.pipeline_nextflow import NextFlowPipeline
from ...processing.processing_nextflow import NextFlowProcessor
from ..common.recipe import check_call


if TYPE_CHECKING:
    from .trainer import NextFlowTrainer


class SampleImagesCallback(TrainerCallback):
    """
    Samples images of fixed prompts with fixed seeds at every evaluation, with the model as it is then.

    The images go to `output_dir/samples/step-N.png`, one grid a step, and to every tracker of `report_to` that shows
    images: tensorboard, wandb and trackio.

    Args:
        trainer ([`NextFlowTrainer`]): Whose model samples.
        vision_tokenizer ([`NextFlowVisionTokenizer`]): Makes pixels of the codes.
        processor ([`NextFlowProcessor`]): Makes tokens of the prompts.
        prompts (`list[str]`): One image of each is sampled.
        seed (`int`, *optional*, defaults to 0): Prompt i uses `seed + i`.
        settings (`dict`, *optional*): Other arguments of [`NextFlowPipeline.__call__`].
    """

    def __init__(
        self,
        trainer: "NextFlowTrainer",
        vision_tokenizer: NextFlowVisionTokenizer,
        processor: NextFlowProcessor,
        *,
        prompts: list[str],
        seed: int = 0,
        settings: dict | None = None,
    ):
        if not prompts:
            raise ValueError("prompts is empty, expected at least one prompt")
        # Before the training, and not at its first evaluation.
        own = {"self": None, "prompt": prompts, "generator": None}
        check_call(NextFlowPipeline.__call__, {**own, **(settings or {})}, "sample_settings")
        self.trainer = trainer
        self.vision_tokenizer = vision_tokenizer
        self.processor = processor
        self.prompts = prompts
        self.seed = seed
        self.settings = settings or {}

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        # A process that has all weights samples alone; where they are sharded, a forward is everybody's.
        if not (state.is_world_process_zero or self._is_sharded):
            return
        images = self.sample()
        if state.is_world_process_zero:
            grid = make_image_grid(images, rows=1, cols=len(images))
            write_file(Path(args.output_dir, "samples", f"step-{state.global_step:07d}.png"), grid.save)
            self._log(images, state.global_step)

    @property
    def _is_sharded(self) -> bool:
        return self.trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @torch.no_grad()
    def sample(self) -> list[Image.Image]:
        """One image for each prompt."""
        accelerator = self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model_wrapped)
        if accelerator.is_fsdp2:
            torch.distributed.fsdp.register_fsdp_forward_method(model, "generate_images")
        transformer = model.get_base_model() if hasattr(model, "peft_config") else model
        was_training = transformer.training
        pipeline = NextFlowPipeline(transformer.eval(), self.vision_tokenizer.to(accelerator.device), self.processor)
        pipeline.set_progress_bar_config(disable=True)
        # Generators of our own, so that sampling leaves the random state of the training alone.
        generators = [torch.Generator(accelerator.device).manual_seed(self.seed + i) for i in range(len(self.prompts))]
        images = pipeline(self.prompts, generator=generators, **self.settings).images
        transformer.train(was_training)
        return images

    def _log(self, images: list[Image.Image], step: int) -> None:
        named = {f"samples/{index}": image for index, image in enumerate(images)}
        captions = dict(zip(named, self.prompts))
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, image in named.items():
                    callback.tb_writer.add_image(
                        f"{name}: {captions[name]}", np.asarray(image), step, dataformats="HWC"
                    )
                callback.tb_writer.flush()
            elif isinstance(callback, (WandbCallback, TrackioCallback)):
                if isinstance(callback, WandbCallback):
                    import wandb as tracker
                else:
                    import trackio as tracker
                logged = {name: tracker.Image(image, caption=captions[name]) for name, image in named.items()}
                # As the integrations log: the step is a column, for trackers count their own.
                tracker.log({**logged, "train/global_step": step})
