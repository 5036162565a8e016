"""What a command imports before it has something to do: `--help` answers at once."""

import os
import signal
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


ABORTED_AS_IT_ENDS = """
import atexit, os, sys
from nextflow_hf import cli

class Thread:
    def __del__(self):
        os.abort()

def main():
    atexit.register(print, "what others do at the end")
    print("finished")
    return {status}

sys.modules["group"] = Thread()  # goes when the interpreter takes down its modules
cli.main = main
cli.run()
"""


@pytest.mark.parametrize("status", [0, 2])
def test_one_process_of_several_is_not_aborted_as_it_ends(status):
    command = [sys.executable, "-c", ABORTED_AS_IT_ENDS.format(status=status)]
    for world_size, expected in (("2", status), ("1", -signal.SIGABRT)):
        environment = {**os.environ, "WORLD_SIZE": world_size}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == expected, result.stderr
        assert expected < 0 or result.stdout == "finished\nwhat others do at the end\n"
