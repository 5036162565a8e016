"""The text tokenizer of the Shapes world: byte-level BPE, 512 tokens, every frequent word one token.

A vocabulary this small has no room for the intermediate merges of a hundred words. So the words enter the vocabulary
whole (`ignore_merges`: a piece that is in the vocabulary is emitted as it is, as in Llama 3), then trained merges and
reserved tokens fill the rows, and the 256 bytes make any text encodable. It knows nothing about images: the processor
appends the image codes.
"""

import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"
IMAGE_TOKEN = "<|image_pad|>"
SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, END_TOKEN, IMAGE_TOKEN)
CHAT_WORDS = ("system", "user", "assistant")


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int = 512, *, model_max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """
    Builds the tokenizer from a corpus.

    Args:
        texts (`Iterable[str]`): Captions and instructions, without chat markers.
        vocab_size (`int`, *optional*, defaults to 512): Exact size of the vocabulary, special tokens included.
        model_max_length (`int`, *optional*, defaults to 1024): Longest sequence the tokenizer announces.

    Raises:
        `ValueError`: If the special tokens and the bytes alone do not fit.
    """
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {smallest}: special tokens and bytes")

    texts = list(texts)
    word_counts = Counter(piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    vocabulary = list(dict.fromkeys([*SPECIAL_TOKENS, *alphabet, *CHAT_WORDS]))
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
    """Appends the most useful merges until the vocabulary is full; a merge is kept when both its parts are tokens."""
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
