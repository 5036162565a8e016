"""The notebooks and scripts of examples/, as a reader runs them, in a fresh folder."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs(notebook, tmp_path):
    cells = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells.cells), "strip its outputs"
    NotebookClient(cells, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize(
    ("script", "argv", "outputs"),
    [
        ("scales.py", ["a red circle"], ["scales.png"]),
        ("story.py", ["--num-frames", "2"], ["story.gif", "story.txt"]),
        ("best_of_n.py", ["a red circle", "--num-images", "2"], ["best.png"]),
    ],
)
def test_a_script_runs(script, argv, outputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(argv)
    for name in outputs:
        assert Path(name).stat().st_size
        if name.endswith(".png"):
            Image.open(name).verify()
