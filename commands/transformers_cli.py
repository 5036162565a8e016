"""transformers' own command line, whose server accepts the models that its tables name when it starts:

nextflow-hf transformers serve path/to/pipeline
nextflow-hf transformers chat path/to/pipeline
"""

import sys
from collections.abc import Sequence

import nextflow_hf  # noqa: F401  (registers with transformers)


def main(argv: Sequence[str] | None = None) -> int:
    """What `transformers` does with `argv`."""
    from transformers.cli import transformers

    try:  # it ends itself, having said what a mistake was
        transformers.app(list(sys.argv[1:] if argv is None else argv), prog_name="transformers")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
