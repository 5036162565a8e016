"""Model cards for everything that training makes: whole models, vision tokenizers, adapters and decoders.

A card is a Jinja template (`<kind>_card.md` beside this file, all on `base_card.md`), metadata that the Hub sorts and
filters by, and what was measured. Measured results are written once and stand in both.
"""

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..atomic import write_text
from ..pipelines.pipeline_nextflow import NextFlowPipeline
from ..training.common.folders import STAGES_FILE, without_folders


if TYPE_CHECKING:
    from ..training.common.folders import Run

TAGS = ["nextflow", "next-scale-prediction", "autoregressive", "arxiv:2601.02204"]
IMAGES = ["text-to-image", "image-to-image"]
# What the Hub is told of each kind. The library is one that loads the repository by itself, its code trusted:
# diffusers does where the repository is standalone; a decoder needs this package.
METADATA = {
    "model": {
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "tags": [*TAGS, *IMAGES, "diffusers"],
    },
    "vision_tokenizer": {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": [*TAGS, "image-tokenizer", "vector-quantization"],
    },
    "adapter": {"library_name": "peft", "pipeline_tag": "any-to-any", "tags": [*TAGS, *IMAGES, "lora"]},
    "decoder": {"library_name": "nextflow-hf", "pipeline_tag": "image-to-image", "tags": [*TAGS, "image-decoder"]},
}
# In the names of repositories whose owner is not known yet: `nextflow-hf push` puts the true name there.
PLACEHOLDER_OWNER = "your-name"
# Keys of recipes that name data.
DATA_KEYS = ("train_codes", "train_images", "train_data", "data", "sources", "prompts")
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
)


def create_card(
    kind: str,
    *,
    repo_id: str,
    title: str | None = None,
    summary: str | None = None,
    example: str = "a red circle",
    use: str | None = None,
    facts: Mapping[str, str] | None = None,
    training: str | None = None,
    results: Sequence[EvalResult] = (),
    limits: str | None = None,
    credits: str | None = None,
    images: Mapping[str, str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    language: str | Sequence[str] = "en",
    tags: Sequence[str] = (),
    standalone: bool = False,
    include_code: bool = True,
) -> ModelCard:
    """
    The card of one repository.

    Args:
        kind (`str`): `"model"`, `"vision_tokenizer"`, `"adapter"` or `"decoder"`.
        repo_id (`str`): `"user/name"`: what the snippets load.
        title (`str`, *optional*): Defaults to the repository's name.
        summary (`str`, *optional*): First paragraph, Markdown. A line on the kind by default.
        example (`str`, *optional*, defaults to `"a red circle"`): Prompt of the snippet.
        use (`str`, *optional*): How it is loaded and called, Markdown, instead of the snippet of its kind.
        facts (`Mapping[str, str]`, *optional*): Rows of the table on the model, such as [`pipeline_facts`].
        training (`str`, *optional*): How it was trained, Markdown.
        results (`Sequence[EvalResult]`, *optional*): What was measured: a table, and the Hub's `model-index`.
        limits (`str`, *optional*): What it cannot do, Markdown.
        credits (`str`, *optional*): Whose work it was made from, and their licences, Markdown.
        images (`Mapping[str, str]`, *optional*): Captions by file names relative to the repository.
        license (`str`, *optional*): The Hub's identifier, such as `"apache-2.0"`.
        base_model (`str`, *optional*): `"user/name"` of what it was made from. An adapter and a decoder have one.
        datasets (`Sequence[str]`, *optional*): The Hub's names of the training data.
        language (`str` or `Sequence[str]`, *optional*, defaults to `"en"`): Language of the prompts.
        tags (`Sequence[str]`, *optional*): More than those of the kind.
        standalone (`bool`, *optional*, defaults to `False`): Write that diffusers loads the model without the package.
        include_code (`bool`, *optional*, defaults to `True`): Write that transformers does.

    Raises:
        `ValueError`: where the kind is unknown, or lacks what its card says.
    """
    if kind not in METADATA:
        raise ValueError(f"kind is {kind!r}, expected one of {list(METADATA)}")
    if kind in ("adapter", "decoder") and base_model is None:
        raise ValueError(f"the card of a {kind} needs base_model, the model that it goes with")
    title = title or repo_id.split("/")[-1]
    of_kind = METADATA[kind]
    metadata = ModelCardData(
        license=license,
        language=language if isinstance(language, str) else list(language),
        library_name="diffusers" if standalone else of_kind["library_name"],
        pipeline_tag=of_kind["pipeline_tag"],
        tags=[*of_kind["tags"], *tags],
        base_model=base_model,
        base_model_relation={"adapter": "adapter", "model": "finetune"}.get(kind) if base_model else None,
        datasets=list(datasets) or None,
        model_name=title if results else None,
        eval_results=list(results) or None,
    )
    text = TEMPLATES.get_template(f"{kind}_card.md").render(
        card_data=metadata.to_yaml(),
        standalone=standalone,
        include_code=include_code,
        title=title,
        repo_id=repo_id,
        base_model=base_model,
        summary=summary,
        example=example,
        use=use,
        facts=facts,
        training=training,
        results=results,
        limits=limits,
        credits=credits,
        images=images or {},
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text))  # parts that are left out leave their blank lines


def converted_card(pipeline: NextFlowPipeline, name: str, source: str, vision_tokenizer: str) -> ModelCard:
    """The card of a pipeline that is still to be trained, made of a language model and a vision tokenizer."""
    sources = [_public(source), _public(vision_tokenizer)]
    return create_card(
        "model",
        repo_id=f"{PLACEHOLDER_OWNER}/{name}",
        summary=f"A [NextFlow](https://arxiv.org/abs/2601.02204) before its first step: the language model of "
        f"`{sources[0]}` with the codes of the vision tokenizer `{sources[1]}`. It writes text as before and cannot "
        "generate images yet.",
        facts=pipeline_facts(pipeline),
        training="Not trained." + _licence_section(sources),
        base_model=_hub_name(source),
    )


def run_card(
    kind: str, name: str, run: "Run", *, pipeline: NextFlowPipeline | None = None, **options: Any
) -> ModelCard:
    """
    The card of what a run of training made: what it started from, its data, steps, losses and command.

    Args:
        name (`str`): Name of the repository, without its owner.
        options: Passed to [`create_card`]. Without `license` the card asks for one.

    The card names plots that [`save_stages`] puts beside it.
    """
    ancestors = list(run.ancestors())
    training = _training_section(run, [_public(model) for model in ancestors])
    if not options.get("license"):
        training += _licence_section([_public(model) for model in ancestors])
    options.setdefault("base_model", next((model for model in ancestors if _hub_name(model)), None))
    return create_card(
        kind,
        repo_id=f"{PLACEHOLDER_OWNER}/{name}",
        facts=None if pipeline is None else pipeline_facts(pipeline),
        training=training,
        **options,
    )


def _training_section(run: "Run", ancestors: list[str]) -> str:
    state = run.state()
    rows = {"What": run.kind, "Started from": ", then ".join(f"`{name}`" for name in reversed(ancestors))}
    data = [value for key, value in run.recipe.items() if key in DATA_KEYS and value is not None]
    rows["Data"] = ", ".join(f"`{_public(value)}`" for value in data)
    if state:
        rows["Steps"] = f"{state['global_step']:,}" + (f", {state['epoch']:.3g} epochs" if state.get("epoch") else "")
    losses: dict[str, float] = {}  # the last of each
    for entry in state.get("log_history", ()):
        losses |= {key: value for key, value in entry.items() if "loss" in key and isinstance(value, (int, float))}
    losses.pop("train_loss", None)  # `Trainer`'s mean since it was last started, not a last loss
    rows |= {f"Last `{key}`": f"{value:.4g}" for key, value in losses.items()}
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)]
    stages = run.stages()
    if len(stages) > 1:
        lines += ["", "It was made in stages:", "", "| stage | training | steps | seconds |", "|---|---|---:|---:|"]
        lines += [f"| `{one.name}` | {one.kind} | {_thousands(one.steps)} | {one.seconds} |" for one in stages]
    if commands := [shlex.join(stage.command) for stage in stages if stage.command]:
        lines += ["", "```bash", *commands, "```"]
    for stage in stages:
        lines += ["", f"![Losses of the stage {stage.name}]({stage.plot_name})"] if stage.plot else []
    return "\n".join(lines)


def _thousands(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def save_stages(run: "Run", folder: Path) -> None:
    """Write the stages of a run beside its card, for the cards of what starts from that folder, and their plots."""
    stages = run.stages()
    names = ("name", "kind", "steps", "seconds", "command")
    records = [{name: getattr(stage, name) for name in names} for stage in stages]
    write_text(folder / STAGES_FILE, json.dumps(records, indent=1) + "\n")
    for stage in stages:
        if stage.plot:
            shutil.copyfile(stage.plot, folder / stage.plot_name)


def _licence_section(sources: Sequence[str]) -> str:
    names = ", ".join(f"`{name}`" for name in sources)
    return (
        "\n\n## Licence\n\nTo be filled in, here and as `license:` at the top of this card: it must agree with the "
        f"licences of {names + ' and of ' if names else ''}the training data."
    )


def _hub_name(source: str) -> str | None:
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else None


def _public(value: Any) -> str:
    """A value without the folders of this machine."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_public, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_public(one)}" for key, one in value.items())
    return without_folders(str(value))


def pipeline_facts(pipeline: NextFlowPipeline) -> dict[str, str]:
    """Sizes of a pipeline's parts, for the table of a card."""
    transformer, vision_tokenizer = pipeline.transformer, pipeline.vision_tokenizer
    config, image_processor = transformer.config, pipeline.processor.image_processor
    schedule, resolution = image_processor.schedule, image_processor.resolution
    square = schedule.grids(schedule.nearest_bucket(1, 1), schedule.num_scales(resolution))
    sides = ", ".join(str(height) for height, _ in square)
    codes = sum(height * width for height, width in square)
    return {
        "Transformer": f"{transformer.num_parameters():,} parameters, {config.num_hidden_layers} layers, "
        f"width {config.hidden_size}",
        "Vision tokenizer": f"{vision_tokenizer.num_parameters():,} parameters, "
        f"{vision_tokenizer.config.codebook_size:,} codes in two codebooks (semantic and pixel)",
        "Images": f"{resolution} x {resolution} pixels in {len(square)} scales, {sides} cells wide: {codes} codes",
    }


__all__ = [
    "converted_card",
    "create_card",
    "pipeline_facts",
    "run_card",
    "save_stages",
]
