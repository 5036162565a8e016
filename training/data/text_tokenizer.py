"""`nextflow-hf train text_tokenizer`: byte-level BPE for a model from nothing, each frequent word one token.

A small vocabulary has no room for the intermediate merges of a hundred words. So the words enter the vocabulary whole
(`ignore_merges`: a piece that is in the vocabulary is emitted as it is, as in Llama 3), then trained merges and
reserved tokens fill the rows, and the 256 bytes make any text encodable. Together with a vision tokenizer it becomes
the processor of such a model.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...atomic import replaced_folder
from ...conversion.assemble import make_processor, subfolder_of
from ...modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from ...processing.image_processing_nextflow import NextFlowImageProcessor
from ...processing.processing_nextflow import NextFlowProcessor
from ..common.folders import PROCESSOR_FILE, VISION_TOKENIZERS, check_source
from ..common.refusals import check_numbers
from .description import load_texts, read_description


PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"
IMAGE_TOKEN = "<|image_pad|>"
SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, END_TOKEN, IMAGE_TOKEN)
CHAT_WORDS = ("system", "user", "assistant")


@dataclass
class TextTokenizerArguments:
    """
    What it is made of.

    Args:
        output_dir (`str`): Folder of the tokenizer or the processor.
        data (`str`): Description of data as `nextflow-hf extract` reads it: all texts of its rows.
        vocab_size (`int`, *optional*, defaults to 512): Number of text tokens, special ones included.
        max_texts (`int`, *optional*, defaults to 200000): The first so many are read.
        model_max_length (`int`, *optional*, defaults to 1024): Longest sequence that the tokenizer announces.
        vision_tokenizer_name_or_path (`str`, *optional*):
            With it, the result is a whole processor: the tokens of its codes follow those of the text, and images are
            prepared as for its training.
        image_processor (`dict`, *optional*):
            Fields of [`NextFlowImageProcessor`] that differ from those saved with the vision tokenizer.
        append_last_scale (`bool`, *optional*, defaults to `False`): See [`NextFlowProcessor`].
    """

    output_dir: str
    data: str
    vocab_size: int = 512
    max_texts: int = 200_000
    model_max_length: int = 1024
    vision_tokenizer_name_or_path: str | None = None
    image_processor: dict | None = None
    append_last_scale: bool = False

    def __post_init__(self):
        check_numbers(self, {"max_texts": 1, "model_max_length": 1})


GROUPS = (TextTokenizerArguments,)
MODEL = None


def train(args: TextTokenizerArguments) -> PreTrainedTokenizerFast | NextFlowProcessor:
    """Make the tokenizer, or the processor, and save it in `output_dir`."""
    texts = itertools.islice(load_texts(read_description(args.data)), args.max_texts)
    result = train_text_tokenizer(texts, args.vocab_size, model_max_length=args.model_max_length)
    if args.vision_tokenizer_name_or_path is not None:
        result = build_processor(
            result,
            args.vision_tokenizer_name_or_path,
            append_last_scale=args.append_last_scale,
            **(args.image_processor or {}),
        )
    with replaced_folder(args.output_dir) as staging:
        result.save_pretrained(staging)
    return result


def plan(args: TextTokenizerArguments) -> list[str]:
    """The texts that it would be made of, for `--dry-run`."""
    texts = itertools.islice(load_texts(read_description(args.data)), args.max_texts)
    return [f"data    {args.data}: {sum(1 for _ in texts):,} texts"]


def build_processor(
    tokenizer: PreTrainedTokenizerBase, vision_tokenizer: str, *, append_last_scale: bool = False, **image_options
) -> NextFlowProcessor:
    """
    The processor of a model from nothing.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A text tokenizer, whose vocabulary is extended in place.
        vision_tokenizer (`str`): Folder or Hub id of the vision tokenizer, with the image processor of its training.
        append_last_scale (`bool`, *optional*, defaults to `False`): See [`NextFlowProcessor`].
        image_options: Fields of [`NextFlowImageProcessor`] that differ from that image processor.
    """
    check_source("vision_tokenizer_name_or_path", vision_tokenizer, *VISION_TOKENIZERS, "pipeline")
    where = subfolder_of(vision_tokenizer, "vision_tokenizer")
    config = NextFlowVisionTokenizerConfig.from_pretrained(vision_tokenizer, **where)
    where = subfolder_of(vision_tokenizer, "processor", PROCESSOR_FILE)
    return make_processor(
        NextFlowImageProcessor.from_pretrained(vision_tokenizer, **where, **image_options),
        tokenizer,
        text_vocab_size=len(tokenizer),
        codebook_size=config.codebook_size,
        append_last_scale=append_last_scale,
    )


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int = 512, *, model_max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """
    Build the tokenizer from a corpus.

    Args:
        texts (`Iterable[str]`): Captions and instructions, without chat markers.
        vocab_size (`int`, *optional*, defaults to 512): Exact size of the vocabulary, special tokens included.
        model_max_length (`int`, *optional*, defaults to 1024): Longest sequence the tokenizer announces.

    Raises:
        `ValueError`: If the special tokens, the bytes and the words of a chat alone do not fit.
    """
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = list(dict.fromkeys([*SPECIAL_TOKENS, *alphabet, *CHAT_WORDS]))
    if vocab_size < len(vocabulary):
        raise ValueError(
            f"vocab_size is {vocab_size}, expected at least {len(vocabulary)}: special tokens, bytes and chat words"
        )

    texts = list(texts)
    word_counts = Counter(piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    # ties by spelling: the same corpus gives the same ids on every machine
    for word, _ in sorted(word_counts.items(), key=lambda item: (-item[1], item[0])):
        if len(vocabulary) < vocab_size and word not in vocabulary:
            vocabulary.append(word)
    vocabulary, merges = _fill_with_merges(vocabulary, texts, vocab_size)
    # The image codes come right after: the size has to be exact, however small the corpus.
    reserved = [f"<|reserved_{index}|>" for index in range(vocab_size - len(vocabulary))]
    vocabulary += reserved

    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[START_TOKEN, IMAGE_TOKEN, *reserved],
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _fill_with_merges(
    vocabulary: list[str], texts: list[str], vocab_size: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Append the most useful merges until the vocabulary is full; a merge is kept when both its parts are tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4 * vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    known, merges = set(vocabulary), []
    for left, right in _merges_of(trained):
        if left not in known or right not in known:
            continue
        if left + right not in known:
            if len(vocabulary) == vocab_size:
                continue
            vocabulary.append(left + right)
            known.add(left + right)
        merges.append((left, right))
    return vocabulary, merges


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a trained BPE model in order; the library shows them only in its serialised form."""
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
