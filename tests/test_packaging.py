"""What keeps the package importable from everywhere: clone, editable install, wheel, and the Hub's remote code."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import nextflow_hf
from nextflow_hf import cli, hub_cards


ROOT = Path(__file__).parents[1]
HUB_PACKAGES = ("modeling_nextflow", "processing", "pipelines")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYPROJECT = PROJECT["tool"]["setuptools"]
# Folders of the clone that are no part of the package.
NOT_SHIPPED = {"tests", "benchmarks", "docs", "examples", "integrations", "build", "dist", "runs"}


def modules_of(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).glob("*.py"))]


def run_python(code: str, cwd: Path) -> str:
    """Standard output of `code` in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_listed_packages_are_the_folders_with_an_init():
    inits = (path.relative_to(ROOT).parts[:-1] for path in ROOT.rglob("__init__.py"))
    folders = {parts for parts in inits if not parts or not (parts[0] in NOT_SHIPPED or parts[0].startswith("."))}
    assert set(PYPROJECT["packages"]) == {".".join(("nextflow_hf", *parts)) for parts in folders}


def test_the_lowest_versions_that_are_tested_are_those_that_are_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    needed = ["train", "rl", "quant", "app", "deepspeed", "worlds", "serve"]
    declared = [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]
    floors = {
        Requirement(line).name: specifier.version
        for line in declared
        for specifier in Requirement(line).specifier
        if specifier.operator == ">="
    }
    lines = (ROOT / "constraints-min.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in tested.items()} == {
        name: Version(floors[name]) for name in tested
    }
    for line in [*PROJECT["project"]["dependencies"], *(line for name in needed for line in extras[name])]:
        assert Requirement(line).name in {*tested, "nextflow-hf"}


def test_these_packages_import_siblings_by_name_and_nothing_else_of_ours():
    """`from .sibling import name` is the form that the Hub's remote code copies; `ast.walk` enters functions, too."""
    ours = {"nextflow_hf", "training", "hub_cards", *HUB_PACKAGES}
    for path in modules_of(*HUB_PACKAGES):
        tree = ast.parse(path.read_text())
        for_checkers = [
            node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        unseen = {node for block in for_checkers for node in ast.walk(block)}  # by who runs the code
        for node in set(ast.walk(tree)) - unseen:
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, where
                assert (path.parent / f"{node.module}.py").is_file(), where
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] not in ours, where
            elif isinstance(node, ast.Import):
                assert not ours & {alias.name.split(".")[0] for alias in node.names}, where


@pytest.mark.parametrize(
    ("package", "library"),
    [("modeling_nextflow", "transformers"), ("processing", "transformers"), ("pipelines", "diffusers")],
)
def test_a_package_first_imports_the_library_that_it_registers_with(package, library):
    """registration.py relies on it: see `_RegisteringFinder`."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    first = next(node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert isinstance(first, ast.Import) and [alias.name for alias in first.names] == [library]


def test_module_names_are_unique_across_these_packages():
    """The Hub's remote code is one flat folder."""
    counts = Counter(path.name for path in modules_of(*HUB_PACKAGES) if path.name != "__init__.py")
    assert not [name for name, count in counts.items() if count > 1]


def test_no_training_module_shadows_a_library():
    """`python training/x.py` puts its folder first on `sys.path`."""
    taken = {"accelerate", "datasets", "diffusers", "evaluate", "peft", "torch", "transformers", "trl"}
    assert not taken & {path.stem for path in (ROOT / "training").glob("*.py")}


@pytest.mark.parametrize("name", nextflow_hf._MODULE_OF_NAME)
def test_public_name_is_defined_where_the_root_looks(name):
    assert name in dir(nextflow_hf)
    assert getattr(nextflow_hf, name) is getattr(sys.modules[f"nextflow_hf.{nextflow_hf._MODULE_OF_NAME[name]}"], name)


def test_unknown_name_raises():
    with pytest.raises(AttributeError, match="NoSuchName"):
        nextflow_hf.NoSuchName  # noqa: B018


def test_importing_the_root_loads_no_library(tmp_path):
    code = "import sys, nextflow_hf; print({'torch', 'transformers', 'diffusers', 'numpy'} & set(sys.modules))"
    assert run_python(code, tmp_path).strip() == "set()"


def test_a_second_import_of_the_root_under_another_name_is_inert(tmp_path):
    """pytest does that, under the name of the clone's folder."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("clone", {str(ROOT / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["clone"] = module
finders = list(sys.meta_path)
spec.loader.exec_module(module)
assert sys.meta_path == finders
assert not [name for name in sys.modules if name.startswith(("nextflow_hf", "clone."))]
"""
    run_python(code, tmp_path)


REGISTERED = """
import diffusers, nextflow_hf
from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple, simple_get_class_obj
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

# None of ours has been asked for here: it is the import of the libraries that has registered them.
config_class, tokenizer_config_class = (
    type(AutoConfig.for_model(name)) for name in ("nextflow", "nextflow_vision_tokenizer")
)
assert config_class is nextflow_hf.NextFlowConfig
assert tokenizer_config_class is nextflow_hf.NextFlowVisionTokenizerConfig
assert AutoModel._model_mapping[config_class] is nextflow_hf.NextFlowModel
assert AutoModel._model_mapping[tokenizer_config_class] is nextflow_hf.NextFlowVisionTokenizer
assert AutoModelForCausalLM._model_mapping[config_class] is nextflow_hf.NextFlowForCausalLM
assert PROCESSOR_MAPPING[config_class] is nextflow_hf.NextFlowProcessor
assert IMAGE_PROCESSOR_MAPPING[config_class]["pil"] is nextflow_hf.NextFlowImageProcessorPil

assert diffusers.NextFlowPipeline is nextflow_hf.NextFlowPipeline
assert diffusers.NextFlowDiffusionDecoderPipeline is nextflow_hf.NextFlowDiffusionDecoderPipeline
for name in ("NextFlowForCausalLM", "NextFlowVisionTokenizer", "NextFlowProcessor"):
    component = getattr(nextflow_hf, name)
    assert _fetch_class_library_tuple(component) == ("nextflow_hf", name)
    assert simple_get_class_obj("nextflow_hf", name) is component
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import nextflow_hf, importlib.util; importlib.util.find_spec('transformers')",
        "import diffusers, nextflow_hf",  # diffusers imports transformers later
        "import diffusers, transformers, nextflow_hf",
        "from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule",
        "from nextflow_hf.pipelines.pipeline_nextflow import NextFlowPipeline",
    ],
)
def test_registered_in_every_order_of_imports(imports, tmp_path):
    run_python(f"{imports}\n{REGISTERED}", tmp_path)


def test_command_line_starts_without_torch(tmp_path):
    code = """
import sys
from nextflow_hf import cli
try:
    cli.main(["--version"])
except SystemExit as stop:
    assert not stop.code
assert "torch" not in sys.modules
"""
    assert run_python(code, tmp_path).strip() == f"nextflow-hf {nextflow_hf.__version__}"


def test_commands_have_their_modules():
    for module, _ in cli.COMMANDS.values():
        assert importlib.util.find_spec(module), module


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The clone under another name; the shipped model's files are there, but empty."""
    clone = tmp_path_factory.mktemp("clones") / "any-name of.a clone"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "nextflow-*")
    shutil.copytree(ROOT, clone, ignore=ignored)
    models = [Path("hub_cards", name) for name in hub_cards.SHIPPED]
    files = [path.relative_to(ROOT) for model in models for path in (ROOT / model).rglob("*") if path.is_file()]
    for model in models:
        files += [model / "model_index.json", model / "vision_tokenizer" / "model.safetensors", model / "concepts.txt"]
    for file in files:
        (clone / file).parent.mkdir(parents=True, exist_ok=True)
        (clone / file).touch()
    return clone


@pytest.fixture(scope="module")
def wheel(clone) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(clone.parent), str(clone)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = clone.parent.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_whole_and_nothing_else(wheel, clone):
    folders = [name.removeprefix("nextflow_hf.").split(".")[0] for name in PYPROJECT["packages"][1:]]
    expected = {path for folder in folders for path in (clone / folder).rglob("*") if path.is_file()}
    expected |= {*clone.glob("*.py"), clone / "py.typed"}
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == {f"nextflow_hf/{path.relative_to(clone).as_posix()}" for path in expected}
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"nextflow_hf", f"nextflow_hf-{nextflow_hf.__version__}.dist-info"}


def test_installed_wheel_finds_its_models(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from nextflow_hf.hub_cards import emoji_model_path, shapes_model_path
print(shapes_model_path(), emoji_model_path(), sep="\\n")
"""
    folder = tmp_path / "nextflow_hf" / "hub_cards"
    assert run_python(code, tmp_path).split("\n")[:2] == [str(folder / name) for name in hub_cards.SHIPPED]


def test_missing_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_cards, "files", lambda package: tmp_path)
    for name, path in zip(hub_cards.SHIPPED, (hub_cards.shapes_model_path, hub_cards.emoji_model_path)):
        with pytest.raises(FileNotFoundError, match=f"no {name} at .* train one by `make -C examples/"):
            path()
    assert hub_cards.installed_models() == []
