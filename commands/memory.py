"""`nextflow-hf memory`: what a recipe's training takes of one GPU, before it is rented. Nothing is allocated."""

import argparse
import sys
from collections.abc import Sequence

from .console import OneLineParser, one_line_mistakes
from .options import whole


COMBINATIONS = (  # what is trained, optimizer, dtype of the weights
    ("all", "adamw_torch_fused", "float32"),
    ("all", "adamw_torch_fused", "bfloat16"),
    ("all", "paged_adamw_8bit", "bfloat16"),
    ("alignment", "adamw_torch_fused", "bfloat16"),
    ("lora", "adamw_torch_fused", "bfloat16"),
    ("qlora", "paged_adamw_8bit", "bfloat16"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="nextflow-hf memory", description=__doc__)
    parser.add_argument("recipe", help="a YAML file of `train transformer`, or the name of a shipped recipe")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="replaces a key of the recipe")
    parser.add_argument(
        "--tokens", type=whole(), help="tokens of a micro-batch; default: the most that the recipe allows"
    )
    parser.add_argument(
        "--gpus",
        type=whole(),
        default=1,
        help="GPUs that share weights and optimizer states (FSDP2); default: %(default)s",
    )
    parser.add_argument("--gpu-gb", type=float, default=80, help="memory of a GPU in 1e9 bytes; default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


@one_line_mistakes("memory")
def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of the recipe and of the usual other ways to train the same model."""
    args = make_parser().parse_intermixed_args(argv)
    if not args.gpu_gb > 0:
        raise ValueError(f"--gpu-gb is {args.gpu_gb}, expected more than 0")

    from .train import silence_libraries

    silence_libraries()
    from ..training.common.recipe import load_recipe
    from ..training.common.run import resolve
    from ..training.transformer import memory
    from ..training.transformer.train import GROUPS

    recipe = load_recipe("transformer", args.recipe, args.assignments)
    recipe |= {"output_dir": recipe.get("output_dir") or "unused", "global_batch_size": None}
    _, (model, data, _, training), _ = resolve(recipe, GROUPS)
    training.bf16 = bool(recipe.get("bf16"))  # the estimate is of a GPU, whatever this machine has
    config = memory.recipe_config(model)
    tokens = args.tokens or memory.micro_batch_tokens(config, data, training)
    rows = [("this recipe", memory.recipe_memory(config, model, training, tokens))]
    for trainable, optim, dtype in COMBINATIONS:
        estimate = memory.training_memory(config, trainable=trainable, optim=optim, dtype=dtype, tokens=tokens)
        rows.append((f"{trainable}, {optim}, {dtype}", estimate))
    print(
        f"{rows[0][1].parameters / 1e9:.3f}B parameters, {tokens} tokens a micro-batch, {args.gpus} x {args.gpu_gb:g} "
        f"GB less {memory.HEADROOM:.0%} headroom; the total counts the larger of layer and logits\n"
    )
    print(memory.table([(name, estimate.sharded(args.gpus)) for name, estimate in rows], args.gpu_gb))
    return 0


if __name__ == "__main__":
    sys.exit(main())
