"""Every kind of folder that a command writes, given to every command that takes a model: taken, or refused in one line
with the command that makes a model of it or that uses it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from command_line import save_picture
from peft import LoraConfig
from toy_decoder import toy_base_model, toy_decoder
from toy_pipeline import toy_pipeline
from toy_qwen import save_qwen

from nextflow_hf import cli
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import export_adapter, export_pipeline, export_vision_tokenizer


def note(folder: Path, kind: str, model: Path | None = None, recipe: dict | None = None) -> None:
    """What a training writes of itself."""
    folder.mkdir(exist_ok=True)
    values = {"kind": kind, "recipe": recipe or {}, "model": model and str(model), "command": ["nextflow-hf", "train"]}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """As `convert`, `export`, `train`, `extract`, `evaluate`, `world` and the commands that sample write them."""
    root = tmp_path_factory.mktemp("folders")
    pipe = toy_pipeline()
    pipe.save_pretrained(root / "saved pipeline")
    model = export_pipeline(pipe, root / "exported pipeline", create_card("model", repo_id="toy/nextflow"))
    export_pipeline(pipe, root / "standalone pipeline", create_card("model", repo_id="toy/nextflow"), standalone=True)

    pipe.transformer.save_pretrained(root / "run of a transformer")
    note(root / "run of a transformer", "transformer", model)
    for name in ("checkpoint-5", "checkpoint-10"):
        pipe.transformer.save_pretrained(root / "run of a transformer" / name)
    pipe.transformer.save_pretrained(root / "run of rewards")
    note(root / "run of rewards", "grpo", model)
    note(root / "unfinished run", "transformer", model)
    pipe.transformer.save_pretrained(root / "unfinished run" / "checkpoint-5")

    adapted = toy_pipeline().transformer
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(root / "run of an adapter")
    config = root / "run of an adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(model)}))
    note(root / "run of an adapter", "transformer", model)
    card = create_card("adapter", repo_id="toy/adapter", base_model="toy/nextflow")
    export_adapter(root / "run of an adapter", root / "exported adapter", card, base_model=str(model))

    for name in ("run of a tokenizer", "vision tokenizer"):
        card = create_card("vision_tokenizer", repo_id="toy/tokenizer")
        export_vision_tokenizer(pipe.vision_tokenizer, pipe.processor.image_processor, root / name, card)
    note(root / "run of a tokenizer", "tokenizer")

    toy_decoder("unet").save_pretrained(root / "run of a decoder")
    toy_base_model("unet").save_pretrained(root / "base")
    recipe = {"base_model": str(root / "base"), "denoiser": "unet", "model": str(model)}
    note(root / "run of a decoder", "decoder", model, recipe)

    pipe.transformer.save_pretrained(root / "run of a teacher")
    (root / "run of a teacher" / "config.json").write_text('{"model_type": "siglip2"}')
    note(root / "run of a teacher", "teacher")
    pipe.processor.save_pretrained(root / "run of a text tokenizer")
    note(root / "run of a text tokenizer", "text_tokenizer")

    files = {"codes": "manifest.json", "data": "data.yaml", "evaluation": "report.json", "answer": "answer.md"}
    for name, file in files.items():
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    (root / "empty").mkdir()
    save_qwen(root / "qwen")
    return root


PIPELINES = {"saved pipeline", "exported pipeline", "standalone pipeline"}
TRANSFORMERS = {"run of a transformer", "run of a transformer/checkpoint-5", "run of rewards"}
TOKENIZERS = {"run of a tokenizer", "vision tokenizer"}
ADAPTERS = {"run of an adapter", "exported adapter"}
OTHERS = {
    *("unfinished run", "run of a decoder", "run of a teacher", "run of a text tokenizer"),
    *("codes", "data", "evaluation", "answer", "empty"),
}
GENERATE = ["generate", "a", "--output", "out.png"]
# The command, and the kinds that it takes.
COMMANDS = {
    "generate": ([*GENERATE, "--model", "FOLDER"], PIPELINES),
    "edit": (["edit", "a", "--image", "image.png", "--model", "FOLDER", "--output", "out.png"], PIPELINES),
    "chat": (["chat", "a", "--max-new-tokens", "2", "--model", "FOLDER"], PIPELINES),
    "interleave": (["interleave", "a", "--max-new-tokens", "2", "--model", "FOLDER", "--output", "out"], PIPELINES),
    "frames": (["frames", "a", "b", "--model", "FOLDER", "--output", "out.gif"], PIPELINES),
    "reconstruct": (["reconstruct", "image.png", "--model", "FOLDER", "--output", "out.png"], PIPELINES | TOKENIZERS),
    "info": (["info", "FOLDER"], PIPELINES | TOKENIZERS | TRANSFORMERS),
    "evaluate": (["evaluate", "reconstruction", "FOLDER", "data=images", "--output-dir", "out"], PIPELINES),
    "push": (
        ["push", "FOLDER", "toy/pushed"],
        {*PIPELINES, "vision tokenizer", "exported adapter"} - {"saved pipeline"},
    ),
    "export": (["export", "FOLDER", "--output", "out"], TRANSFORMERS | TOKENIZERS | ADAPTERS | {"run of a decoder"}),
    "export --model": (["export", "RUN", "--model", "FOLDER", "--output", "out"], PIPELINES),
    "--transformer": (
        [*GENERATE, "--model", "PIPELINE", "--transformer", "FOLDER"],
        PIPELINES | TRANSFORMERS | ADAPTERS,
    ),
    "--vision-tokenizer": (
        [*GENERATE, "--model", "PIPELINE", "--vision-tokenizer", "FOLDER"],
        PIPELINES | TOKENIZERS,
    ),
    "--lora": ([*GENERATE, "--model", "PIPELINE", "--lora", "FOLDER"], ADAPTERS),
    "convert": (["convert", "qwen", "FOLDER", "out", "--vision-tokenizer", "PIPELINE"], set()),
    "convert --vision-tokenizer": (
        ["convert", "qwen", "QWEN", "out", "--vision-tokenizer", "FOLDER", "--dry-run"],
        PIPELINES | TOKENIZERS,
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_is_taken_or_refused_with_a_command(command, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "nextflow_hf.hub_cards.export.push_folder", lambda *args, **kwargs: SimpleNamespace(commit_url="")
    )
    argv, taken = COMMANDS[command]
    places = {"PIPELINE": "exported pipeline", "RUN": "run of a transformer", "QWEN": "qwen"}
    for kind in sorted(PIPELINES | TRANSFORMERS | TOKENIZERS | ADAPTERS | OTHERS):
        (tmp_path / kind / "images").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / kind)
        for file in ("image.png", "images/image.png"):
            save_picture(tmp_path / kind / file)
        names = {name: str(folders / place) for name, place in {**places, "FOLDER": kind}.items()}
        status = cli.main([names.get(word, word) for word in argv])
        errors = capsys.readouterr().err
        if kind in taken:
            assert status == 0, (kind, errors)
        else:
            last = errors.splitlines()[-1]
            assert status == 2 and "Traceback" not in errors and "`nextflow-hf " in last, (kind, errors)
