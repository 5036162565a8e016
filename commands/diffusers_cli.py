"""diffusers' own command line, which loads a pipeline of another package only after that was imported:

nextflow-hf diffusers run --model user/nextflow --pipeline-kwargs '{"prompt": "a red circle"}' --seed 0
nextflow-hf diffusers schema --model user/nextflow
"""

import sys
from collections.abc import Sequence

import nextflow_hf  # noqa: F401  (registers with diffusers)


def main(argv: Sequence[str] | None = None) -> int:
    """What `diffusers-cli` does with `argv`."""
    from diffusers.commands import diffusers_cli

    if argv is not None:
        sys.argv = ["diffusers-cli", *argv]  # its parser reads nothing else
    diffusers_cli.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
