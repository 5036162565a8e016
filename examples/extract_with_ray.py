"""Extract codes with Ray Data: on one machine or on a cluster, with as many encoders as there are devices.

    pip install "nextflow-hf[ray]"
    python examples/extract_with_ray.py data.yaml --output codes --encoders 8 --gpus-per-encoder 1

The folder is what `nextflow-hf extract data.yaml` writes, row for row: trainings take it as `train_codes`.
"""

import argparse
from pathlib import Path

import ray

from nextflow_hf.training.data.batches import BatchEncoder
from nextflow_hf.training.data.description import load_rows, read_description
from nextflow_hf.training.data.shards import index_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="description of the data, which every encoder reads")
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards, which every encoder writes")
    parser.add_argument("--encoders", type=int, default=1)
    parser.add_argument("--gpus-per-encoder", type=float, default=0)
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch")
    args = parser.parse_args()

    data = read_description(args.data)
    codes = ray.data.range(len(load_rows(data, data.settings.purpose)), override_num_blocks=4 * args.encoders)
    codes = codes.map_batches(
        BatchEncoder,
        fn_constructor_args=(str(Path(args.data).absolute()),),
        compute=ray.data.ActorPoolStrategy(size=args.encoders),
        num_cpus=0.5,  # else encoders on every core leave none to what feeds them
        num_gpus=args.gpus_per_encoder,
        batch_size=args.batch_size,
        batch_format="pyarrow",
    )
    codes.write_parquet(str(args.output.absolute()))
    print(f"{index_shards(args.output)} rows in {args.output}")


if __name__ == "__main__":
    main()
