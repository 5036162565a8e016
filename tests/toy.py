"""A toy NextFlow: 24 codes, grids up to 4x4. Shared by the tests of the transformer and of its generation."""

import pytest
import torch
import torch.nn.functional as F

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM


TEXT, CODES = 40, 24
PAD, EOS, IMAGE, BOI, EOI = 0, 1, 2, TEXT + CODES, TEXT + CODES + 1
SQUARE = [(1, 1), (2, 2), (3, 3), (4, 4)]
WIDE = [(1, 1), (1, 3), (2, 5)]
IDS = {"boi_token_id": BOI, "image_token_id": IMAGE}


def attention_is_fused() -> bool:
    """Whether this CPU has one kernel for grouped key heads. PyTorch 2.7 and 2.8 compose it, and keep the scores."""
    queries, keys = (torch.ones(1, heads, 4, 8, requires_grad=True) for heads in (2, 1))
    attended = F.scaled_dot_product_attention(queries, keys, keys, is_causal=True, enable_gqa=True)
    return "FlashAttentionForCpu" in attended.grad_fn.name()


needs_fused_attention = pytest.mark.skipif(
    not attention_is_fused(), reason="counts or measures a fused attention, which this PyTorch has not on a CPU"
)


def toy_config(**overrides) -> NextFlowConfig:
    values = {
        "vocab_size": TEXT + CODES + 2,
        "text_vocab_size": TEXT,
        "codebook_size": CODES,
        "semantic_code_dim": 6,
        "pixel_code_dim": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "max_scales": 5,
        "boi_token_id": BOI,
        "eoi_token_id": EOI,
        "image_token_id": IMAGE,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    return NextFlowConfig(**{**values, **overrides})


def grids_tensor(*schedules) -> torch.Tensor:
    rows = torch.zeros(len(schedules), 5, 2, dtype=torch.long)
    for index, schedule in enumerate(schedules):
        rows[index, : len(schedule)] = torch.tensor(schedule)
    return rows


def image_tokens(schedule) -> list[int]:
    return [BOI, *[IMAGE] * sum(h * w for h, w in schedule[1:]), EOI]


def random_codes(*schedules, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CODES, (sum(h * w for s in schedules for h, w in s),), generator=generator)


def toy_model(**overrides) -> NextFlowForCausalLM:
    """Random weights, larger than the trained initialisation's, so that every path shows in the logits."""
    torch.manual_seed(0)
    model = NextFlowForCausalLM(toy_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model
