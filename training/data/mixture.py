"""Sources of data, in whatever files they lie, as one weighted mixture of `messages` and `images`.

    sources:
      - {path: photos, format: captioned_folder, task: text_to_image, weight: 3}
      - {path: "tars/*.tar", format: webdataset, task: text_to_image, columns: {text: json.caption}, streaming: true}
      - {path: timbrooks/instructpix2pix-clip-filtered, task: edit, weight: 1}

`datasets` reads and mixes them; `recipes/data_example.yaml` shows every kind of source. Nothing is decoded or copied
here: an image is the path or the bytes that its file has.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..common.refusals import check_numbers
from .sources import ROW_FEATURES, DataSource, OpenSource


logger = logging.get_logger(__name__)

PURPOSES = ("training", "evaluation")


@dataclass(kw_only=True)
class MixtureArguments:
    """
    Sources and how they are mixed.

    Args:
        sources (`list[DataSource]` or `list[dict]`): At least one.
        stopping_strategy (`str`, *optional*, defaults to `"first_exhausted"`):
            As in `datasets.interleave_datasets`: `"first_exhausted"` ends with the first source that has no rows
            left, `"all_exhausted"` begins the others again until the last one ends, and
            `"all_exhausted_without_replacement"` takes every row once, whatever the weights.
        num_rows (`int`, *optional*): Ends the mixture after that many rows.
        data_seed (`int`, *optional*, defaults to 0): Seeds the order of the sources, inversion and caption prompts.
    """

    sources: list[dict] = field(default_factory=list)
    stopping_strategy: str = "first_exhausted"
    num_rows: int | None = None
    data_seed: int = 0

    def __post_init__(self):
        if not self.sources:
            raise ValueError("got no sources, expected at least one with a path and a task")
        check_numbers(self, {"num_rows": 1, "data_seed": 0})
        known = {entry.name for entry in fields(DataSource)}
        for index, source in enumerate(self.sources):
            if isinstance(source, DataSource):
                continue
            if unknown := sorted(set(source) - known):
                raise ValueError(f"source {index} has {unknown}, expected some of {sorted(known)}")
            if lacking := sorted({"path", "task"} - set(source)):
                raise ValueError(f"source {index} lacks {lacking}: it has {sorted(source)}")
        self.sources = [source if isinstance(source, DataSource) else DataSource(**source) for source in self.sources]
        labels = [(source.label, source.task) for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError(f"sources are named {labels}: give those of one path and task different labels")

    @property
    def holds_out(self) -> bool:
        """Whether rows are held out for evaluation."""
        return any(source.eval_fraction > 0 for source in self.sources)

    def sources_for(self, purpose: str) -> dict[int, DataSource]:
        """Number -> source, of the sources that have rows for `purpose`."""
        if purpose not in PURPOSES:
            raise ValueError(f"purpose is {purpose!r}, expected one of {PURPOSES}")
        unused = (1.0 if purpose == "training" else 0.0) if self.holds_out else None
        found = {number: one for number, one in enumerate(self.sources) if one.eval_fraction != unused}
        if not found:
            raise ValueError(f"no source has rows for {purpose}: each has the eval_fraction {unused}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """What decides the rows, as JSON holds it."""
        return asdict(self)


def load_mixture(mixture: MixtureArguments, purpose: str = "training") -> Dataset | IterableDataset:
    """
    The rows of all sources in the order in which they are trained on, a function of the arguments and the files alone.

    A `Dataset` (any row by its number; rows are made when they are asked for) or, if a source streams, an
    `IterableDataset`. The columns are those of [`ROW_FEATURES`]: a row that cannot be trained on is there, too, with
    its `error` and nothing else, so that whoever reads decides what happens to it.

    Args:
        mixture ([`MixtureArguments`]): The sources.
        purpose (`str`, *optional*, defaults to `"training"`):
            `"training"` leaves out the rows that sources hold out by their `eval_fraction`, `"evaluation"` reads these
            alone, or everything where no source holds out rows.
    """
    chosen = mixture.sources_for(purpose)
    # The number of a source among all of them seeds its rows: a purpose must not change what a row says.
    sources = [OpenSource(source, number, mixture.data_seed) for number, source in chosen.items()]
    held_out = (purpose == "evaluation") if mixture.holds_out else None
    weights = [source.weight for source in chosen.values()]
    mixing = {
        "probabilities": [weight / sum(weights) for weight in weights],
        "seed": mixture.data_seed,
        "stopping_strategy": mixture.stopping_strategy,
    }
    if any(source.streaming for source in sources):
        rows = datasets.interleave_datasets([source.stream(held_out) for source in sources], **mixing)
        return rows if mixture.num_rows is None else rows.take(mixture.num_rows)

    # Map-style sources are mixed by their numbers alone: `datasets` would copy the images of sources that it mixes.
    numbers = [source.row_numbers(held_out) for source in sources]
    if empty := [source.label for source, rows in zip(sources, numbers) if not len(rows)]:
        raise ValueError(f"sources {empty} have no rows for {purpose}: check their files and their eval_fraction")
    index = datasets.interleave_datasets(
        [
            Dataset.from_dict({"number": np.full(len(rows), number), "row": rows})
            for number, rows in enumerate(numbers)
        ],
        **mixing,
    )
    if mixture.num_rows is not None:
        index = index.select(range(min(mixture.num_rows, len(index))))

    def fetch(batch: dict[str, list[int]]) -> dict[str, list]:
        rows = [sources[number].row(row) for number, row in zip(batch["number"], batch["row"])]
        return {name: [row[name] for row in rows] for name in ROW_FEATURES}

    logger.info(f"{len(index)} rows of {[(source.label, len(rows)) for source, rows in zip(sources, numbers)]}")
    return index.with_transform(fetch)  # rows are made when they are asked for; `map` would copy all images


class MixtureRows:
    """
    The rows of a mixture by the names that its shards have for them: `rows(source, row_id)` is the row with "messages"
    and "images" that the codes were extracted from.

    Args:
        mixture ([`MixtureArguments`]): That of the extraction.
    """

    def __init__(self, mixture: MixtureArguments):
        sources = [OpenSource(source, number, mixture.data_seed) for number, source in enumerate(mixture.sources)]
        self._sources = {source.label: source for source in sources}
        if len(self._sources) < len(sources):
            labels = [source.label for source in sources]
            raise ValueError(
                f"sources are named {labels}, and shards have no other name: give each a label of its own"
            )
        if streamed := [source.label for source in sources if source.streaming]:
            raise ValueError(
                f"{streamed} stream: their rows come in order, not by name, expected sources on this disk"
            )

    def __call__(self, source: str, row_id: str) -> dict[str, Any]:
        if source not in self._sources:
            raise ValueError(f"a shard's row is of source {source!r}, but the sources are {sorted(self._sources)}")
        opened = self._sources[source]
        if row_id not in opened.numbers:
            raise ValueError(f"source {source} has no row {row_id!r}: has it changed since the codes were extracted?")
        return opened.row(opened.numbers[row_id])
