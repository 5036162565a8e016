"""What a command imports before it has something to do: `--help` answers at once."""

import subprocess
import sys

import pytest

from nextflow_hf.cli import COMMANDS


HEAVY = ("torch", "transformers", "diffusers", "datasets")
CODE = """
import sys
from nextflow_hf import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", [[], ["train"], ["memory"], ["info"], ["generate"], ["extract"]])
def test_help_imports_no_torch(command):
    code = CODE.format(heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "usage: " in result.stdout
    assert result.stderr == "[]\n"


def test_help_names_every_command():
    result = subprocess.run([sys.executable, "-m", "nextflow_hf.cli", "--help"], capture_output=True, text=True)
    assert all(f"    {name}" in result.stdout for name in COMMANDS)
