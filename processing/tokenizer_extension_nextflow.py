"""A text tokenizer with NextFlow's tokens: image codes, `<boi>`, `<eoi>`, and the chat markers (§3.2.2)."""

from transformers import AddedToken, PreTrainedTokenizerBase


def code_token(code: int) -> str:
    """The token of an image code."""
    return f"<|image_code_{code}|>"


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, text_vocab_size: int, codebook_size: int
) -> PreTrainedTokenizerBase:
    """
    Makes a text tokenizer NextFlow's, in place: `len(tokenizer) == text_vocab_size + codebook_size + 2`, as in the
    model.

    Chat markers and `<|image_pad|>` are added where missing, the text range is filled up to `text_vocab_size` (the
    language model's padded vocabulary), then come `<|image_code_0|>` ..., `<boi>` and `<eoi>`, all special.
    `<|im_end|>` becomes the end-of-sequence token and `<|endoftext|>` the padding token. A tokenizer that is already
    extended is left as it is.
    """
    expected = text_vocab_size + codebook_size + 2
    if "<boi>" in (vocabulary := tokenizer.get_vocab()):
        found = (len(tokenizer), vocabulary["<boi>"], vocabulary.get(code_token(0)))
        if found != (expected, expected - 2, text_vocab_size):
            raise ValueError(
                f"the tokenizer is extended for other sizes: (length, <boi>, first code) is {found}, expected "
                f"{(expected, expected - 2, text_vocab_size)}"
            )
        return tokenizer

    def add(tokens: list[str]) -> None:
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=True) for token in tokens], special_tokens=True
        )

    add(
        [
            token
            for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
            if token not in vocabulary
        ]
    )
    if len(tokenizer) > text_vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, expected at most text_vocab_size = {text_vocab_size}"
        )
    add([f"<|text_filler_{index}|>" for index in range(len(tokenizer), text_vocab_size)])  # Qwen pads its embedding
    add([*map(code_token, range(codebook_size)), "<boi>", "<eoi>"])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    # Pad on the left, for generation. The tokenizer saves only what is among its arguments.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"

    ids = [tokenizer.convert_tokens_to_ids(token) for token in (code_token(0), "<boi>", "<eoi>")]
    if len(tokenizer) != expected or ids != [text_vocab_size, expected - 2, expected - 1]:
        raise ValueError(
            f"the tokenizer's ids have gaps: (length, first code, <boi>, <eoi>) is {(len(tokenizer), *ids)}, expected "
            f"{(expected, text_vocab_size, expected - 2, expected - 1)}"
        )
    return tokenizer
