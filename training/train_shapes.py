"""Trains the small real model of the Shapes world from nothing, stage by stage: a complete NextFlow in miniature.

    python -m nextflow_hf.training.train_shapes --output-dir runs/shapes
    python -m nextflow_hf.training.train_shapes --output-dir runs/shapes --stage tokenizer

A finished stage is skipped and an interrupted one goes on from its last checkpoint, so the same command resumes. The
numbers are in `recipes/shapes_<stage>.yaml`; they fit two CPU cores, and a GPU is used where there is one.
"""

import argparse
import functools
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, Siglip2Model, Siglip2VisionModel, TrainingArguments, set_seed

from ..hub_cards.cards import shapes_card
from ..hub_cards.export import cast_copy, export_pipeline
from ..modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from ..modeling_nextflow.generation_configuration_nextflow import NextFlowGenerationConfig
from ..modeling_nextflow.loss_nextflow import IGNORE_INDEX
from ..modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..modeling_nextflow.pixel_cnn_nextflow import convolution_layout
from ..pipelines.pipeline_nextflow import NextFlowPipeline
from ..processing.image_processing_nextflow import NextFlowImageProcessor
from ..processing.processing_nextflow import NextFlowProcessor
from ..processing.scale_schedule_nextflow import ScaleSchedule
from ..processing.tokenizer_extension_nextflow import extend_tokenizer
from .common.checkpoints import last_checkpoint
from .common.recipe import RECIPES, read_recipe
from .data.extraction import extract_codes, load_codes
from .data.images import pixels_from_uint8
from .evaluation.reconstruction_report import measure_batch
from .evaluation.shapes import evaluate_shapes, pipeline_functions
from .shapes import describe, render, sample_edit, sample_prompt, sample_scene
from .shapes.dataset import shapes_sample
from .shapes.teacher import CaptionedPictures, train_teacher
from .shapes.text_tokenizer import train_text_tokenizer
from .transformer.arguments import NextFlowTrainingArguments
from .transformer.model_loading import new_transformer
from .transformer.trainer import NextFlowTrainer
from .vision_tokenizer.arguments import NextFlowVisionTokenizerTrainingArguments
from .vision_tokenizer.codebook import distinct_codes, with_codes
from .vision_tokenizer.trainer import NextFlowVisionTokenizerTrainer


logger = logging.getLogger(__name__)


class Pictures(Dataset):
    """Square pictures uint8 (n, size, size, 3) as the tokenizer's inputs, with the scale schedule of their size."""

    def __init__(self, pictures: np.ndarray, schedule: ScaleSchedule):
        self.pictures = pictures
        bucket = schedule.nearest_bucket(*pictures.shape[1:3])
        self.image_grids = torch.tensor(schedule.grids(bucket, schedule.num_scales(pictures.shape[1])))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels_from_uint8(self.pictures[index]), "image_grids": self.image_grids}


def load_recipe(stage: str) -> dict:
    """The numbers of a stage."""
    return read_recipe(RECIPES / f"shapes_{stage.replace('-', '_')}.yaml")


def draw_pictures(folder: Path) -> tuple[np.ndarray, list[str]]:
    """
    Pictures uint8 (n, size, size, 3), memory-mapped, and their captions; drawn once, so that no training renders. The
    last `num_eval` are for evaluation.
    """
    recipe = load_recipe("pictures")
    pictures_file, captions_file = folder / "pictures.npy", folder / "captions.json"
    with PartialState(cpu=not torch.accelerator.is_available()).local_main_process_first():
        if not captions_file.exists():
            rng = np.random.default_rng(recipe["seed"])
            shape = (recipe["num_train"] + recipe["num_eval"], recipe["size"], recipe["size"], 3)
            pictures = np.empty(shape, np.uint8)
            captions = []
            for index in range(len(pictures)):
                if index % 2:
                    prompt = sample_prompt(rng, split="train" if index < recipe["num_train"] else "test")
                    scene, caption = sample_scene(rng, prompt), prompt.text
                else:  # anything anywhere, and a caption that says all there is to see
                    scene = sample_edit(rng).target
                    caption = describe(scene, rng)
                pictures[index] = render(scene, recipe["size"], recipe["size"])
                captions.append(caption)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(pictures_file, pictures)
            captions_file.write_text(json.dumps(captions))
    return np.load(pictures_file, mmap_mode="r"), json.loads(captions_file.read_text())


def pictures_schedule() -> ScaleSchedule:
    """The scale schedules of the small model."""
    numbers = load_recipe("pictures")["schedule"]
    return ScaleSchedule(**{**numbers, "scale_bases": tuple(numbers["scale_bases"])})


def text_tokenizer_stage(folder: Path) -> None:
    """All that is said in the world to a byte-level tokenizer."""
    recipe = load_recipe("text-tokenizer")
    rng = np.random.default_rng(recipe["seed"])
    texts = []
    for index in range(recipe["num_texts"]):
        edit = sample_edit(rng)
        texts += [sample_prompt(rng).text, describe(edit.target, rng), edit.instruction]
        row = shapes_sample(recipe["seed"], index, tasks=load_recipe("extract")["tasks"])
        parts = [part for message in row["messages"] for part in message["content"]]
        texts += [part["text"] for part in parts if part["type"] == "text"]
    train_text_tokenizer(texts, recipe["vocab_size"]).save_pretrained(folder / "text_tokenizer")


def teacher_stage(folder: Path) -> None:
    """A SigLIP2-shaped teacher by contrastive learning."""
    recipe = load_recipe("teacher")
    pictures, captions = draw_pictures(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
    args = TrainingArguments(output_dir=folder / "teacher_run", **device_arguments(), **recipe["training"])
    set_seed(args.seed)
    model, accuracy = train_teacher(
        CaptionedPictures(pictures, captions), tokenizer, args, patch_size=recipe["patch_size"]
    )
    logger.info("teacher finds the right one of 64 captions for %.1f%% of held-out pictures", 100 * accuracy)
    model.save_pretrained(folder / "teacher")


def tokenizer_stage(folder: Path) -> None:
    """The dual-codebook vision tokenizer, distilled from the teacher."""
    recipe = load_recipe("tokenizer")
    teacher = Siglip2Model.from_pretrained(folder / "teacher").vision_model
    config = NextFlowVisionTokenizerConfig(semantic_config=teacher.config.to_dict(), **recipe["model"])
    # On a CPU, eager attention trains in bf16 1.5 times as fast as sdpa, and channels-last small convolutions twice.
    model = NextFlowVisionTokenizer._from_config(config, attn_implementation="eager")
    # The semantic encoder starts as the teacher, whose last layer and last norm it does not have (§2.1).
    model.semantic_encoder.load_state_dict(
        {name: value for name, value in teacher.state_dict().items() if name in model.semantic_encoder.state_dict()}
    )
    train_tokenizer(folder, model, teacher, recipe["training"], "tokenizer_run", "vision_tokenizer_start")


def sharpen_stage(folder: Path) -> None:
    """The vision tokenizer again, for outlines: every scale in every step, and a louder loss on the edges."""
    recipe = load_recipe("sharpen")
    teacher = Siglip2Model.from_pretrained(folder / "teacher").vision_model
    model = NextFlowVisionTokenizer.from_pretrained(
        folder / "vision_tokenizer_start", attn_implementation="eager", **recipe["model"]
    )
    train_tokenizer(folder, model, teacher, recipe["training"], "sharpen_run", "vision_tokenizer_sharp")


def train_tokenizer(
    folder: Path,
    model: NextFlowVisionTokenizer,
    teacher: Siglip2VisionModel | None,
    training: dict,
    run: str,
    result: str,
) -> None:
    """Train `model` in the folder `run` and save it as `result`."""
    pictures, _ = draw_pictures(folder)
    schedule = pictures_schedule()
    args = NextFlowVisionTokenizerTrainingArguments(output_dir=folder / run, **device_arguments(), **training)
    set_seed(args.seed)
    num_eval = load_recipe("pictures")["num_eval"]
    trainer = NextFlowVisionTokenizerTrainer(
        model.to(memory_format=convolution_layout(args.device)),
        args,
        semantic_teacher=teacher,
        train_dataset=Pictures(pictures[:-num_eval], schedule),
        eval_dataset=Pictures(pictures[-num_eval:], schedule),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.evaluate()
    trainer.save_model(folder / result)
    trainer.save_state()


def merge_stage(folder: Path) -> None:
    """The vision tokenizer with fewer codes: of those that are nearly the same, one."""
    recipe = load_recipe("merge")
    model = NextFlowVisionTokenizer.from_pretrained(folder / "vision_tokenizer_sharp").eval()
    pictures, _ = draw_pictures(folder)
    inputs = Pictures(pictures[: recipe["num_pictures"]], pictures_schedule())
    counts = torch.zeros(model.config.codebook_size, dtype=torch.long)
    for batch in DataLoader(inputs, batch_size=64):
        with torch.no_grad():
            codes = model.encode(batch["pixel_values"], batch["image_grids"]).image_codes
        counts += torch.bincount(codes, minlength=len(counts))
    merged = with_codes(model, distinct_codes(model.quantizer, counts, recipe["codebook_size"]))
    merged.save_pretrained(folder / "vision_tokenizer_merged")


def pixel_decoder_stage(folder: Path) -> None:
    """The vision tokenizer's pixel decoder alone, on the codes that are left, which stay as they are."""
    recipe = load_recipe("pixel-decoder")
    model = NextFlowVisionTokenizer.from_pretrained(folder / "vision_tokenizer_merged", attn_implementation="eager")
    train_tokenizer(folder, model, None, recipe["training"], "pixel_decoder_run", "vision_tokenizer")


def make_processor(folder: Path) -> NextFlowProcessor:
    """The small model's processor: its text tokenizer with the image codes, and its schedule of scales."""
    schedule, codebook_size = load_recipe("pictures")["schedule"], load_recipe("merge")["codebook_size"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
    extend_tokenizer(
        tokenizer, text_vocab_size=load_recipe("text-tokenizer")["vocab_size"], codebook_size=codebook_size
    )
    image_processor = NextFlowImageProcessor(resolution=load_recipe("pictures")["size"], **schedule)
    # An edit must see the finest codes of its source: with four scales they hold most of the outlines.
    return NextFlowProcessor(image_processor, tokenizer, append_last_scale=True)


def extract_stage(folder: Path) -> None:
    """Rows of every task, as tokens and codes."""
    recipe = load_recipe("extract")
    data_seed, num_rows, tasks = recipe.pop("data_seed"), recipe.pop("num_rows"), recipe.pop("tasks")
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    vision_tokenizer = NextFlowVisionTokenizer.from_pretrained(folder / "vision_tokenizer", dtype=torch.bfloat16)
    if device.type == "cpu" and not multiplies_faster_in_bf16():
        vision_tokenizer = vision_tokenizer.float()  # of the weights that are shipped, which are rounded
    vision_tokenizer = vision_tokenizer.eval().to(device, memory_format=convolution_layout(device))
    extract_codes(
        lambda index: shapes_sample(data_seed, index, tasks=tasks),
        num_rows,
        folder / "codes",
        processor=make_processor(folder),
        vision_tokenizer=vision_tokenizer,
        data={"seed": data_seed, "tasks": tasks},
        **recipe,
    )
    (folder / "codes" / "finished").touch()


def transformer_stage(folder: Path) -> None:
    """The transformer, text-to-image first: what a picture is made of is learnt there at half the tokens a row."""
    recipe = load_recipe("transformer")
    processor = make_processor(folder)
    vision_tokenizer = NextFlowVisionTokenizer.from_pretrained(folder / "vision_tokenizer")
    set_seed(recipe["training"]["seed"])
    model = new_transformer(processor, vision_tokenizer, **training_attention(), **recipe["model"])
    rows = load_codes(folder / "codes", vision_tokenizer=model.config.vision_tokenizer_fingerprint)
    boi_token_id = model.config.boi_token_id

    def draws_one_picture(input_ids: np.ndarray, labels: np.ndarray, image_grids: np.ndarray) -> bool:
        return len(image_grids) == 1 and labels[input_ids == boi_token_id].item() != IGNORE_INDEX

    rows = rows.filter(draws_one_picture, input_columns=["input_ids", "labels", "image_grids"])
    train_transformer(folder, model, rows, recipe["training"], "transformer_run", "transformer_start")


def mixture_stage(folder: Path) -> None:
    """The transformer on every task, among them those of the first part."""
    model = NextFlowForCausalLM.from_pretrained(folder / "transformer_start", **training_attention())
    rows = load_codes(folder / "codes", vision_tokenizer=model.config.vision_tokenizer_fingerprint)
    train_transformer(folder, model, rows, load_recipe("mixture")["training"], "mixture_run", "transformer")


def train_transformer(
    folder: Path, model: NextFlowForCausalLM, rows: Dataset, training: dict, run: str, result: str
) -> None:
    """Train `model` in the folder `run` and save it, with its losses, as `result`."""
    args = NextFlowTrainingArguments(
        output_dir=folder / run, train_sampling_strategy="group_by_length", **device_arguments(), **training
    )
    set_seed(args.seed)
    trainer = NextFlowTrainer(model, args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.save_model(folder / result)
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(folder / result / "trainer_state.json")


def reconstruct(pipeline: NextFlowPipeline, pictures: np.ndarray, batch_size: int = 32) -> tuple[float, np.ndarray]:
    """Mean PSNR in decibel of pictures uint8 (n, size, size, 3) through the vision tokenizer, and what came back."""
    tokenizer, processor = pipeline.vision_tokenizer, pipeline.processor.image_processor
    ratios, images = [], []
    for start in range(0, len(pictures), batch_size):
        inputs = processor(list(pictures[start : start + batch_size]))
        measured = measure_batch(
            tokenizer, inputs["pixel_values"].to(tokenizer.device), inputs["image_grids"].to(tokenizer.device)
        )
        ratios.append(measured.values["psnr"].cpu())
        images += processor.post_process_images(measured.decoded, inputs["image_grids"], output_type="np")
    return torch.cat(ratios).mean().item(), np.stack(images)


def training_curve(folder: Path, points: int = 6) -> str:
    """The transformer's losses over the parts of its training, as a Markdown table."""
    results = {"text to image": "transformer_start", "every task": "transformer"}
    parts = {}
    for part, result in results.items():
        history = json.loads((folder / result / "trainer_state.json").read_text())["log_history"]
        entries = [entry for entry in history if "image_loss" in entry]
        parts[part] = [entries[round(index * (len(entries) - 1) / (points - 1))] for index in range(points)]
    last = parts["every task"][-1]
    scales = sorted(int(name.removeprefix("loss_scale_")) for name in last if name.startswith("loss_scale_"))
    names = ["text_loss", "image_loss", *(f"loss_scale_{scale}" for scale in scales)]
    head = ["part", "step", "text", "all codes", *(f"scale {scale}" for scale in scales)]
    rows = [
        [part, str(entry["step"]), *(f"{entry.get(name, float('nan')):.2f}" for name in names)]
        for part, picked in parts.items()
        for entry in picked
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows])


def export_stage(folder: Path) -> None:
    """Judge the model, and write it with its card as one Hub repository."""
    recipe, size = load_recipe("export"), load_recipe("pictures")["size"]
    # What is judged is what is written: half precision, codebooks apart.
    transformer = cast_copy(NextFlowForCausalLM.from_pretrained(folder / "transformer"), torch.bfloat16)
    tokenizer = cast_copy(NextFlowVisionTokenizer.from_pretrained(folder / "vision_tokenizer"), torch.bfloat16)
    transformer.generation_config = NextFlowGenerationConfig(
        eos_token_id=transformer.config.eos_token_id,
        pad_token_id=transformer.config.pad_token_id,
        **recipe["generation"],
    )
    pipeline = NextFlowPipeline(transformer, tokenizer, make_processor(folder))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(PartialState(cpu=not torch.accelerator.is_available()).device)
    functions = pipeline_functions(pipeline, recipe["judge"]["seed"])
    report = evaluate_shapes(functions, size=(size, size), **recipe["judge"])
    logger.info("\n%s", report.to_markdown())
    pictures, _ = draw_pictures(folder)
    held_out = np.array(pictures[-load_recipe("pictures")["num_eval"] :])
    psnr, images = reconstruct(pipeline, held_out)
    output_dir = folder / "nextflow-shapes"
    output_dir.mkdir(parents=True, exist_ok=True)
    sheets = [path.name for path in report.save_contact_sheets(output_dir)]
    rows = [np.concatenate(list(row), axis=1) for row in (held_out[:12], (images[:12] * 255).round().astype(np.uint8))]
    Image.fromarray(np.concatenate(rows)).resize((12 * 2 * size, 4 * size), Image.NEAREST).save(
        output_dir / "reconstruction.png"
    )
    context = {
        "judge": report.to_dict(),
        "reconstruction_psnr": psnr,
        "training": f"{recipe['training']}\nCross-entropy of the transformer in nats:\n\n{training_curve(folder)}",
        "pictures": {name: recipe["pictures"][name] for name in (*sheets, "reconstruction.png")},
    }
    # It ships inside the package, which is its code.
    export_pipeline(pipeline, output_dir, shapes_card(pipeline, context), include_code=False)


# Stages that one process does, while the others wait.
ALONE = {"text-tokenizer", "merge", "export"}

# Stage -> its function and the file that is there when it is finished.
STAGES = {
    "text-tokenizer": (text_tokenizer_stage, "text_tokenizer/tokenizer.json"),
    "teacher": (teacher_stage, "teacher/model.safetensors"),
    "tokenizer": (tokenizer_stage, "vision_tokenizer_start/model.safetensors"),
    "sharpen": (sharpen_stage, "vision_tokenizer_sharp/model.safetensors"),
    "merge": (merge_stage, "vision_tokenizer_merged/model.safetensors"),
    "pixel-decoder": (pixel_decoder_stage, "vision_tokenizer/model.safetensors"),
    "extract": (extract_stage, "codes/finished"),
    "transformer": (transformer_stage, "transformer_start/model.safetensors"),
    "mixture": (mixture_stage, "transformer/model.safetensors"),
    "export": (export_stage, "nextflow-shapes/model_index.json"),
}


def device_arguments() -> dict:
    """The CPU when there is no accelerator, and half precision where it is faster."""
    use_cpu = not torch.accelerator.is_available()
    return {"bf16": not use_cpu or multiplies_faster_in_bf16(), "use_cpu": use_cpu, "report_to": "none"}


@functools.cache
def multiplies_faster_in_bf16(size: int = 1024, repeats: int = 20) -> bool:
    """
    Of this CPU: some multiply 2.5 times as fast in bf16, others half as fast. All processes get the answer of the main
    one, since they train one model: all of them must ask.
    """
    matrices = {dtype: torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    times = {dtype: [] for dtype in matrices}
    for _ in range(repeats):  # in turn: what else the machine does hits both
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            matrix @ matrix
            times[dtype].append(time.perf_counter() - start)
    answer = [min(times[torch.bfloat16]) < min(times[torch.float32])]
    return broadcast_object_list(answer)[0]


def training_attention() -> dict:
    """On a CPU, eager attention trains in bf16 1.5 times as fast as sdpa; in fp32 it is no faster."""
    eager = not torch.accelerator.is_available() and multiplies_faster_in_bf16()
    return {"attn_implementation": "eager"} if eager else {}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="Folder of all stages.")
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES), help="Default: all, in order.")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not torch.accelerator.is_available():
        multiplies_faster_in_bf16()  # here, where all processes are
    for stage in STAGES:
        run_stage, finished = STAGES[stage]
        if stage in args.stage and not (args.output_dir / finished).exists():
            logger.info("stage %s", stage)
            if state.is_main_process or stage not in ALONE:
                run_stage(args.output_dir)
        state.wait_for_everyone()


if __name__ == "__main__":
    main()
