"""Every kind of folder that a command writes, given to every command that takes a model: taken, or refused in one line
with the command that makes a model of it or that uses it."""

import json
import shutil
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
from nextflow_hf.training.common.folders import Run, read_run
from nextflow_hf.training.common.run import write_run


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
    pipe.processor.save_pretrained(root / "processor")
    save_qwen(root / "qwen")
    return root


PIPELINES = {"saved pipeline", "exported pipeline", "standalone pipeline"}
TRANSFORMERS = {"run of a transformer", "run of a transformer/checkpoint-5", "run of rewards"}
TOKENIZERS = {"run of a tokenizer", "vision tokenizer"}
ADAPTERS = {"run of an adapter", "exported adapter"}
PROCESSORS = {"processor", "run of a text tokenizer"}
OTHERS = {
    *("unfinished run", "run of a decoder", "run of a teacher", "run of a text tokenizer"),
    *("codes", "data", "evaluation", "answer", "empty", "processor"),
}
KINDS = sorted(PIPELINES | TRANSFORMERS | TOKENIZERS | ADAPTERS | OTHERS)
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
    "serve": (["serve", "FOLDER"], PIPELINES),
    "app": (["app", "--model", "FOLDER"], PIPELINES),
    "memory": (
        ["memory", "recipe.yaml", "model_name_or_path=FOLDER", "train_codes=[codes]"],
        PIPELINES | TRANSFORMERS | ADAPTERS,
    ),
    "extract model": (["extract", "data.yaml", "model=FOLDER"], PIPELINES),
    "extract vision_tokenizer": (
        ["extract", "data.yaml", "model=PIPELINE", "vision_tokenizer=FOLDER"],
        PIPELINES | TOKENIZERS,
    ),
    "extract processor": (["extract", "data.yaml", "model=PIPELINE", "processor=FOLDER"], PIPELINES | PROCESSORS),
}
TRAIN = ["output_dir=out", "use_cpu=true", "bf16=false", "report_to=none"]
BASE = ["base_model=BASE", "denoiser=unet"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16}
NEW = ["processor_name_or_path=PIPELINE", "vision_tokenizer_name_or_path=PIPELINE", f"config_overrides={SIZES}"]
# The keys of a training that name a model, what stands beside them, and the kinds that they take.
TRAININGS = {
    "transformer model_name_or_path": (["train_codes=[CODES]"], PIPELINES | TRANSFORMERS | ADAPTERS),
    "transformer processor_name_or_path": (["train_codes=[CODES]", *NEW], PIPELINES | PROCESSORS),
    "transformer vision_tokenizer_name_or_path": (["train_codes=[CODES]", *NEW], PIPELINES | TOKENIZERS),
    "tokenizer vision_tokenizer_name_or_path": (["stage=decoder", "data=images"], PIPELINES | TOKENIZERS),
    "tokenizer semantic_teacher": (["stage=joint", "data=images"], {"run of a teacher"}),
    "decoder model": (["data=data.yaml", "codes=CODES", *BASE], PIPELINES),
    "decoder decoder_name_or_path": (
        ["data=data.yaml", "codes=CODES", "model=PIPELINE", *BASE],
        {"run of a decoder"},
    ),
    "decoder base_model": (["data=data.yaml", "codes=CODES", "model=PIPELINE", *BASE], set()),
    "grpo model": (["prompts=data.yaml", "rewards=['test_folders:reward']", "num_generations=2"], PIPELINES),
    "teacher text_tokenizer_name_or_path": (
        ["data=data.yaml", "num_eval=0"],
        PIPELINES | PROCESSORS,
    ),
    "text_tokenizer vision_tokenizer_name_or_path": (["data=data.yaml"], PIPELINES | TOKENIZERS),
}


def reward(images, **columns):
    return [0.0] * len(images)


@pytest.fixture
def run(folders, tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own, in which FOLDER is one of a kind; returns its status and errors."""

    def run_command(argv: list[str], kind: str) -> tuple[int, str]:
        (tmp_path / kind / "images").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / kind)
        for file in ("image.png", "images/image.png"):
            save_picture(tmp_path / kind / file)
        Path("images/image.txt").write_text("an image")
        source = {"path": "images", "format": "captioned_folder", "task": "text_to_image"}
        Path("data.yaml").write_text(yaml.safe_dump({"sources": [source], "output_dir": "codes"}))
        Path("recipe.yaml").write_text("{}")
        names = {"PIPELINE": "exported pipeline", "RUN": "run of a transformer", "QWEN": "qwen", "CODES": "shards"}
        places = {name: folders / place for name, place in {**names, "BASE": "base", "FOLDER": kind}.items()}
        for name, place in places.items():
            argv = [word.replace(name, str(place)) for word in argv]
        status = cli.main(argv)
        return status, capsys.readouterr().err

    return run_command


def check(kind: str, is_taken: bool, status: int, errors: str) -> None:
    if is_taken:
        assert status == 0, (kind, errors)
    else:
        assert status == 2 and "Traceback" not in errors and "`nextflow-hf " in errors.splitlines()[-1], (kind, errors)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_is_taken_or_refused_with_a_command(command, run, monkeypatch):
    push = "nextflow_hf.hub_cards.export.push_folder"
    monkeypatch.setattr(push, lambda *args, **kwargs: SimpleNamespace(commit_url=""))
    monkeypatch.setattr("uvicorn.run", lambda *args, **kwargs: None)
    monkeypatch.setattr("nextflow_hf.app.server.serve", lambda *args, **kwargs: "")
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda self: None)
    argv, taken = COMMANDS[command]
    for kind in KINDS:
        check(kind, kind in taken, *run(argv, kind))


@pytest.mark.parametrize("key", TRAININGS)
def test_a_folder_is_trained_on_or_refused_with_a_command(key, folders, run, monkeypatch):
    """All but the steps of the training."""
    training, name = key.split()
    for module in ("transformer", "vision_tokenizer", "diffusion_decoder", "grpo"):
        monkeypatch.setattr(f"nextflow_hf.training.{module}.train.train_to_the_end", lambda *args: None)
    monkeypatch.setattr("nextflow_hf.training.vision_tokenizer.teacher.train_to_the_end", lambda *args: None)
    if not (folders / "shards").exists():
        assert run(["extract", "data.yaml", "model=PIPELINE", f"output_dir={folders / 'shards'}"], "empty")[0] == 0
    others, taken = TRAININGS[key]
    for kind in KINDS:
        options = TRAIN if training != "text_tokenizer" else TRAIN[:1]
        argv = ["train", training, "recipe.yaml", *options, *others, f"{name}=FOLDER"]
        check(kind, kind in taken, *run(argv, kind))


def test_a_damaged_note_of_a_run_is_one_line(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("kind: [")
    assert cli.main(["export", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "run.yaml: this is no YAML" in capsys.readouterr().err


def test_a_run_is_exported_from_another_directory_than_it_was_trained_in(folders, tmp_path, monkeypatch):
    """The names of its recipe are relative to the directory of the training; a long text is no name."""
    shutil.copytree(folders / "run of a transformer", tmp_path / "run")
    recipe = {"processor_name_or_path": "processor", "model_name_or_path": "exported pipeline", "note": "long " * 100}
    monkeypatch.chdir(folders)
    write_run(tmp_path / "run", "transformer", recipe, model="exported pipeline", command=["nextflow-hf", "train"])
    monkeypatch.chdir(tmp_path)
    run = read_run("run")
    assert run.base_pipeline == str(folders / "exported pipeline")
    assert run.recipe == {**recipe, **{name: str(folders / recipe[name]) for name in (*recipe,)[:2]}}
    assert cli.main(["export", "run", "--output", "out"]) == 0
    assert str(folders) not in (tmp_path / "out" / "README.md").read_text()
    assert str(folders) not in (tmp_path / "out" / "stages.json").read_text()


def test_stages_in_folders_of_one_name_have_names_of_their_own(tmp_path):
    """Of three trainings in folders that are called `run`, each keeps its plot on a card."""
    before = None
    for place in ("a", "b", "c"):
        folder = tmp_path / place / "run"
        folder.mkdir(parents=True)
        note(folder, "transformer", before, {"max_steps": place})
        (folder / "loss.png").write_text(place)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": ord(place)}))
        before = folder
    stages = Run(folder=before, result=before, kind="transformer", model=str(tmp_path / "b" / "run")).stages()
    assert [(stage.name, stage.plot_name, stage.plot.read_text()) for stage in stages] == [
        ("run", "loss_run.png", "a"),
        ("run_2", "loss_run_2.png", "b"),
        ("run_3", "loss_run_3.png", "c"),
    ]
