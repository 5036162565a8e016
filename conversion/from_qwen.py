"""Starting points: a NextFlow transformer out of a Qwen checkpoint and a vision tokenizer's codebook (§2.2).

Tables of what goes where. The language model is kept exactly: on text alone its logits do not change. Weights stay
where they are, in the checkpoint's memory-mapped files, until somebody reads them: only the two tables that get new
rows are made anew, so that a 72B takes the memory of these and no more.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from ..modeling_nextflow.configuration_nextflow import NextFlowConfig
from ..modeling_nextflow.generation_configuration_nextflow import NextFlowGenerationConfig
from ..modeling_nextflow.image_settings_nextflow import PAPER_SAMPLING
from ..modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from .checks import check_whole


logger = logging.get_logger(__name__)

# What can be converted. The layers of the third generation norm queries and keys and have no bias.
QWEN_MODEL_TYPES = ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl")

# Fields of Qwen's text config that the transformer takes over as they are.
QWEN_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
)

# Prefix in the checkpoint -> prefix here, the first that fits; nothing: left behind. The vision models of transformers
# 5 and the files of Qwen3-VL have `language_model.`, the files of Qwen2.5-VL and of text models have not.
QWEN_PREFIXES = {
    "model.language_model.": "model.",
    "model.visual.": None,
    "visual.": None,
    "model.": "model.",
    "lm_head.": "lm_head.",
}
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Matrices that have more rows here than in the checkpoint.
GROWN_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
# Modules that the checkpoint does not have.
NEW_MODULES = ("model.image_codebook.", "model.connector.", "model.scale_embedding.")


def check_source(config: PreTrainedConfig) -> None:
    """Raises `ValueError` on a model that is not a dense Qwen with full attention and plain positions."""
    if config.model_type not in QWEN_MODEL_TYPES:
        raise ValueError(
            f"the checkpoint's model_type is {config.model_type!r}, expected one of {', '.join(QWEN_MODEL_TYPES)}: "
            "others have layers that NextFlow has not"
        )
    if (packing := getattr(config, "quantization_config", None)) is not None:
        method = packing["quant_method"] if isinstance(packing, dict) else packing.quant_method
        raise ValueError(f"the checkpoint is quantised ({method}): name the one in bfloat16 that it was made from")
    text = config.get_text_config()
    if getattr(text, "use_sliding_window", False):  # Qwen3-VL has no such field
        raise ValueError("sliding-window attention cannot see a whole image: use_sliding_window must be False")
    if text.rope_parameters["rope_type"] != "default":
        raise ValueError(
            f"rope_type is {text.rope_parameters['rope_type']!r}, expected 'default': what stretches the positions of "
            "text has no meaning for those of images"
        )


def config_from_qwen(config: PreTrainedConfig, *, codebook_size: int, **overrides) -> NextFlowConfig:
    """The transformer's config for the language model of `config`. `overrides` are fields of [`NextFlowConfig`]."""
    check_source(config)
    text = config.get_text_config()
    third_generation = config.model_type.startswith("qwen3")
    head_dim = text.head_dim if third_generation else text.hidden_size // text.num_attention_heads
    rope = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}
    values = {
        **{name: getattr(text, name) for name in QWEN_FIELDS},
        "text_vocab_size": text.vocab_size,
        "codebook_size": codebook_size,
        "vocab_size": text.vocab_size + codebook_size + 2,
        "boi_token_id": text.vocab_size + codebook_size,
        "eoi_token_id": text.vocab_size + codebook_size + 1,
        "rope_parameters": rope,
        "bos_token_id": getattr(text, "bos_token_id", None),
        "tie_word_embeddings": False,
    }
    if third_generation:
        values |= {"qk_norm": True, "attention_bias": text.attention_bias, "head_dim": head_dim}
    # Text models do not name the placeholder, released checkpoints name the other two in their generation config only;
    # Qwen's own ids are then meant.
    for name, source in (("image_token_id", config), ("eos_token_id", text), ("pad_token_id", text)):
        known = getattr(NextFlowConfig, name)
        values[name] = getattr(source, name, None)
        if values[name] is None and known < text.vocab_size:
            values[name] = known
    values |= overrides
    if values["image_token_id"] is None:
        raise ValueError(
            f"the checkpoint has no image_token_id, and Qwen's own, {NextFlowConfig.image_token_id}, is beyond its "
            f"vocabulary of {text.vocab_size}: pass one in config_overrides"
        )
    return NextFlowConfig(**values)


def from_qwen(
    pretrained_model_name_or_path: str | os.PathLike,
    codebook: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    codebook_size: int | None = None,
    seed: int = 0,
    config_overrides: dict | None = None,
    **kwargs,
) -> NextFlowForCausalLM:
    """
    Build the transformer that alignment starts from.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            A checkpoint of Qwen2.5-VL, as in the paper, of Qwen2.5, Qwen3 or Qwen3-VL, dense, of any size: a folder or
            an id on the Hub.
        codebook (`torch.Tensor` of shape `(codebook_size, semantic_code_dim + pixel_code_dim)`, *optional*):
            `NextFlowVisionTokenizer.codebook`: where the visual embedding starts (§2.2). Random if absent.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            Dtype of the weights; `"auto"` leaves them as they are in the files.
        codebook_size (`int`, *optional*): Needed without `codebook`, whose number of rows it is otherwise.
        seed (`int`, *optional*, defaults to 0): Seed of the new rows and modules.
        config_overrides (`dict`, *optional*): Fields of [`NextFlowConfig`], such as `semantic_code_dim`.
        kwargs: Further arguments of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    The rows of image codes, `<boi>` and `<eoi>` in embedding and head are drawn from a normal distribution with the
    mean and the deviation of the text rows, per channel (not specified by the paper). A tied head becomes a copy. The
    generation config samples images as the paper does.

    Raises:
        `ValueError`: on another kind of model, and on a checkpoint that is not whole, naming what is missing.
    """
    folder = checkpoint_folder(pretrained_model_name_or_path, **kwargs)
    source_config = AutoConfig.from_pretrained(folder)
    if codebook is not None:
        if codebook_size not in (None, len(codebook)):
            raise ValueError(f"codebook_size is {codebook_size}, the codebook has {len(codebook)} rows")
        codebook_size = len(codebook)
    if codebook_size is None:
        raise ValueError("pass the vision tokenizer's codebook, or codebook_size")
    config = config_from_qwen(source_config, **{"codebook_size": codebook_size, **(config_overrides or {})})
    width = config.semantic_code_dim + config.pixel_code_dim
    if codebook is not None and codebook.shape[1] != width:
        raise ValueError(f"the codebook is {codebook.shape[1]} wide, expected semantic + pixel code dim = {width}")

    state = convert_qwen(read_checkpoint(folder), empty_model(config), tied=source_config.tie_word_embeddings)
    generator = torch.Generator().manual_seed(seed)
    for name in GROWN_TABLES:
        state[name] = _grow(state[name], config.vocab_size, generator)
    if codebook is not None:
        state["model.image_codebook.weight"] = codebook.detach()
    dtype = state[GROWN_TABLES[0]].dtype if dtype == "auto" else dtype
    with torch.random.fork_rng(), _without_load_report():
        torch.manual_seed(seed)  # of the modules that the checkpoint does not have
        model = NextFlowForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        # Loading initialises only modules that have parameters of their own; this one's scale is known to its parent.
        torch.nn.init.normal_(model.model.scale_embedding.weight, std=model.model.scale_embedding_std)
    model.generation_config = NextFlowGenerationConfig.from_plain(model.generation_config)
    model.generation_config.update(**PAPER_SAMPLING)
    logger.info(
        "kept %d layers and %d text rows, added %d image codes",
        config.num_hidden_layers, config.text_vocab_size, codebook_size,
    )  # fmt: skip
    return model.eval()


def empty_model(config: NextFlowConfig) -> NextFlowForCausalLM:
    """The transformer without weights: names and shapes."""
    with torch.device("meta"):
        # transformers' mixin of `generate` declares what `PreTrainedModel` has.
        return NextFlowForCausalLM(config)  # pyright: ignore[reportAbstractUsage]  # the class is not abstract


def convert_qwen(
    checkpoint: Mapping[str, torch.Tensor], model: NextFlowForCausalLM, *, tied: bool
) -> dict[str, torch.Tensor]:
    """
    The part of `model`'s state dict that `checkpoint` holds, every shape checked. The two tables have the checkpoint's
    rows, the text's; with `tied` the head's are the embedding's.
    """
    expected = {
        name: (model.config.text_vocab_size, *tensor.shape[1:]) if name in GROWN_TABLES else tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(NEW_MODULES)
    }
    converted, unknown = {}, []
    for name, tensor in checkpoint.items():
        prefix = next((prefix for prefix in QWEN_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            unknown.append(name)
        elif QWEN_PREFIXES[prefix] is not None:
            converted[QWEN_PREFIXES[prefix] + name[len(prefix) :]] = tensor
    embedding, head = GROWN_TABLES
    if tied and embedding in converted:
        converted[head] = converted[embedding]
    check_whole(converted, expected, what="checkpoint of its config", unknown=unknown)
    return {name: converted[name] for name in expected}


def checkpoint_folder(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Path:
    """The folder itself, or the one that the Hub's files, weights and text tokenizer, are downloaded to."""
    if Path(pretrained_model_name_or_path).is_dir():
        return Path(pretrained_model_name_or_path)
    files = ["*.json", "*.safetensors", "merges.txt"]
    return Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=files, **kwargs))


def read_checkpoint(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    All tensors of a folder's safetensors files, memory-mapped.

    Raises:
        `FileNotFoundError`: without such files, and where one that the index names is not there.
    """
    index = Path(folder, "model.safetensors.index.json")
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not Path(folder, name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of {len(names)} files of weights: {missing[:5]}")
    tensors: dict[str, torch.Tensor] = {}
    for file_name in names:
        with safe_open(Path(folder, file_name), framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def read_shapes(
    pretrained_model_name_or_path: str | os.PathLike, **kwargs
) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Config and tensors on the meta device: of a model on the Hub only the headers of its files are read."""
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
    if Path(pretrained_model_name_or_path).is_dir():
        tensors = read_checkpoint(pretrained_model_name_or_path)
        return config, {name: tensor.to("meta") for name, tensor in tensors.items()}
    metadata = get_safetensors_metadata(str(pretrained_model_name_or_path), **kwargs)
    return config, {
        name: torch.empty(info.shape, dtype=SAFETENSORS_DTYPES[info.dtype], device="meta")
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of modules that the checkpoint lacks: here that is the point."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _grow(text_rows: torch.Tensor, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Text rows as they are; new rows normal around them."""
    known = len(text_rows)
    table = text_rows.new_empty(num_rows, text_rows.shape[1])
    table[:known] = text_rows
    # In parts: of a 72B, all text rows in float32 would take five gigabytes more.
    zero = text_rows.new_zeros((), dtype=torch.float64)
    mean = sum((chunk.double().sum(0) for chunk in text_rows.split(4096)), zero) / known
    squares = sum(((chunk.double() - mean).square().sum(0) for chunk in text_rows.split(4096)), zero)
    deviation = (squares / (known - 1)).sqrt()
    for rows in table[known:].split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator) * deviation + mean)
    return table
