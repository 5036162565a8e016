"""Every command and Python block of README and docs runs, page by page, in a fresh folder; the site builds."""

import importlib.util
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from docs_runner import PageRunner, blocks, commands
from PIL import Image

import nextflow_hf
from nextflow_hf.hub_cards import shapes_model_path


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# docs/serving/ starts servers: its own tests run it.
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if path.parts[-2] not in ("serving", "_build")),
]
# Files that a page takes from another one.
FILES_FROM = {"README.md": "how-to/fine-tune.md", "diffusion-decoder.md": "how-to/fine-tune.md"}

# Commands that are not run -> why. Patterns match from the beginning.
EXEMPT = {
    r"make (demo|test)": "installs; .ci/run runs `make test`",
    r"pip install": "installs",
    r"nextflow-hf push": "writes to the Hub; tests/test_user_way.py pushes to a toy hub",
    r"nextflow-hf app": "serves until it is stopped; tests/test_app.py and test_app_browser.py",
    r"(torchrun|accelerate launch)": "several GPUs; tests/test_sharded_training.py and others do so with gloo",
    r"nextflow-hf convert \S+ \S*(tokenflow_clipb_32k_enhanced\.pt|Qwen/)": "weights of several GB from the Hub",
    r"nextflow-hf (train|export) .*decoder_?1b": "GPU-only, and needs a base model from the Hub",
    r"nextflow-hf train decoder 1b": "GPU-only, and needs a base model from the Hub",
    r"nextflow-hf evaluate (geneval2?|gedit) ": "prompts and judges of several GB; tests/test_benchmarks.py",
    r"nextflow-hf evaluate understanding": "lmms-eval; tests/test_benchmarks.py has a stub of it",
}
# Commands that do not exist yet -> the branch that brings them.
PENDING: dict[str, str] = {}


def reason_not_to_run(command: str) -> str | None:
    for pattern, reason in {**EXEMPT, **PENDING}.items():
        if re.match(pattern, command):
            return reason
    return None


@pytest.fixture(scope="session")
def placeholders(tmp_path_factory) -> dict[str, str]:
    """Placeholder -> what a reader would put there, small."""
    folder = tmp_path_factory.mktemp("placeholders")
    (folder / "images").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        (folder / "images" / f"{index}.txt").write_text(f"image number {index}")
    from toy_qwen import save_qwen, save_tokenizer

    return {
        "<MODEL>": str(shapes_model_path()),
        "<IMAGES>": str(folder / "images"),
        "<QWEN>": str(save_qwen(folder / "qwen")),
        "<VISION_TOKENIZER>": str(save_tokenizer(folder / "tokenizer")),
    }


def run_page(page: Path, folder: Path, placeholders: dict[str, str]) -> None:
    def substitute(text: str) -> str:
        for name, value in placeholders.items():
            text = text.replace(name, value)
        assert not (unknown := re.findall(r"<[A-Z_]+>", text)), f"{page.name} has placeholders {unknown}"
        return text

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(socket.socket, "connect", refuse_connection)
        if page.name in FILES_FROM:
            for block in blocks(DOCS / FILES_FROM[page.name]):
                if block.file is not None:
                    Path(block.file).write_text(substitute(block.text))
        PageRunner(substitute, reason_not_to_run).run(page)


def refuse_connection(self: socket.socket, address: object) -> None:
    raise AssertionError(f"the page connects to {address}, expected nothing but local files")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, placeholders) -> Path:
    """The folder in which the page on fine-tuning was run."""
    folder = tmp_path_factory.mktemp("fine-tune")
    run_page(DOCS / "how-to" / "fine-tune.md", folder, placeholders)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page, tmp_path, placeholders, request):
    names = dict(placeholders)
    if page.name in ("fine-tune.md", "export.md"):
        names["<RUN>"] = str(request.getfixturevalue("trained") / "runs" / "mine")
    if page.name != "fine-tune.md":  # `trained` has run it
        run_page(page, tmp_path, names)


def test_each_exemption_is_used_and_nothing_is_pending():
    assert not PENDING
    lines = [shlex.join(words) for page in PAGES for block in blocks(page) if block.language == "bash"
             for words in commands(block)]  # fmt: skip
    for pattern in EXEMPT:
        assert any(re.match(pattern, line) for line in lines), f"no page has a command like {pattern}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_between_pages_and_files_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_figures_are_those_of_the_script():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures" / "make.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    for figure in figures.FIGURES:
        assert (DOCS / "figures" / f"{figure.__name__}.svg").read_text() == figure(), figure.__name__


NO_SOURCES = ("tests", "docs", "build", "benchmarks")


def test_troubleshooting_quotes_messages_of_the_code():
    """What stands between the parts that differ (…) is in the sources."""
    folders = [path for path in ROOT.iterdir() if not path.name.startswith(".")]  # without virtual environments
    files = [*ROOT.glob("*.py")]
    files += [file for path in folders if path.name not in NO_SOURCES for file in path.rglob("*.py")]
    code = "".join(re.sub(r'"\n\s+f?"', "", file.read_text()) for file in files)
    code = code.replace("`", "").replace("{{", "{").replace("}}", "}")
    for quoted in re.findall(r"^`(.+?)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE):
        for piece in quoted.replace("`", "").split("…"):
            piece = piece.strip(" ,:[]")
            assert piece in code, f"{piece!r} of {quoted!r}"


# --- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it: warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_public_name_is_in_the_reference(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, uri: uri)
    names = {
        name for kind in ("py:class", "py:function", "py:attribute", "py:data") for name in inventory.get(kind, ())
    }
    assert {f"nextflow_hf.{name}" for name in nextflow_hf._MODULE_OF_NAME} <= names


def test_a_docstring_is_rendered(site):
    """Sections, types and defaults of Hugging Face's format, as readers see them."""
    page = re.sub(r"<[^>]+>", "", (site / "reference.html").read_text())
    assert re.search(r"class nextflow_hf\.NextFlowPipeline\(transformer: PreTrainedModel, vision_tokenizer", page)
    assert re.search(r"load_image\(source", page)
    assert re.search(
        r"prefix_scales\s*– \(int, optional, defaults to 8\) Scales m that are trained", " ".join(page.split())
    )


def test_docstrings_become_restructured_text():
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        from huggingface_docstrings import to_rst
    finally:
        sys.path.pop(0)
    lines = """\
Sample `n` images, see [`NextFlowPipeline`].

Args:
    prompt (`str` or `list[str]`): What to show.
    top_k (`int`, *optional*, defaults to 5):
        Codes to sample from; `0` is all.

        - one thing
    **kwargs: Everything else.

Returns:
    `torch.Tensor` of shape (n, 3), all * of it.

Raises:
    ValueError: where `n` is 0.

Example:

    ```python
    >>> a_b = 1
    ```
""".splitlines()
    text = "\n".join(to_rst(lines))
    assert "Sample ``n`` images, see ``NextFlowPipeline``." in text
    assert ":param prompt: (``str`` or ``list[str]``) What to show." in text
    assert ":param top_k: (``int``, *optional*, defaults to 5)" in text
    assert r":param \*\*kwargs: Everything else." in text
    assert r":returns: ``torch.Tensor`` of shape (n, 3), all \* of it." in text
    assert ":raises ValueError: where ``n`` is 0." in text
    assert ".. code-block:: python\n\n    >>> a_b = 1" in text
