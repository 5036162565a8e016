"""What an adapter of the transformer trains besides its low-rank matrices. Knows names and rows, not PEFT.

`LoraConfig()` alone (also with `use_dora=True`) adapts every matrix of the decoder and nothing else: right where the
model already makes images. One that still has to learn it trains the parts that are new to the language model, too:

    LoraConfig(trainable_token_indices=image_token_rows(model.config), modules_to_save=IMAGE_MODULES)

Around [`NextFlowForConditionalGeneration`], whose vision tokenizer has matrices of the same names, pass
`exclude_modules=VISION_TOKENIZER` too; the adapter then also fits the transformer alone.

`hub_cards.export.export_adapter` writes the result for others.
"""

from ...modeling_nextflow.configuration_nextflow import NextFlowConfig


# New, and small: saved whole in the adapter.
IMAGE_MODULES = ["connector", "image_codebook", "scale_embedding"]

VISION_TOKENIZER = r".*\bvision_tokenizer\..*"


def image_token_rows(config: NextFlowConfig) -> dict[str, list[int]]:
    """
    The rows that NextFlow added to the embedding and to the head, for PEFT's `trainable_token_indices`.

    The head has one for every image code, `<boi>` and `<eoi>`; the embedding is read at the last two alone, since a
    code enters through the connector. A tied head shares the embedding's rows.
    """
    head = list(range(config.text_vocab_size, config.vocab_size))
    if config.tie_word_embeddings:
        return {"embed_tokens": head}
    return {"embed_tokens": sorted([config.boi_token_id, config.eoi_token_id]), "lm_head": head}
