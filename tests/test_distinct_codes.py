"""Codes that are nearly the same become one, and a tokenizer goes on with those that are left."""

import pytest
import torch
from toy_pipeline import toy_vision_tokenizer

from nextflow_hf import NextFlowVisionTokenizer
from nextflow_hf.training.vision_tokenizer.codebook import distinct_codes, with_codes


@pytest.fixture
def tokenizer() -> NextFlowVisionTokenizer:
    return toy_vision_tokenizer().eval()


def test_of_the_two_nearest_codes_the_less_used_one_goes(tokenizer):
    quantizer = tokenizer.quantizer
    with torch.no_grad():  # codes 3 and 5 are almost code 0 and code 1
        for book in (quantizer.semantic_codebook.weight, quantizer.pixel_codebook.weight):
            book[3] = book[0] * 1.5 + 1e-3 * torch.randn_like(book[0])
            book[5] = book[1] * 0.5 + 1e-3 * torch.randn_like(book[1])
    size = tokenizer.config.codebook_size
    counts = torch.ones(size)
    counts[3], counts[1] = 9, 9  # of (0, 3) code 3 is used more, of (1, 5) code 1
    left = distinct_codes(quantizer, counts, size - 2)
    assert left.tolist() == [code for code in range(size) if code not in (0, 5)]
    assert distinct_codes(quantizer, counts + torch.arange(size) / size, 1).tolist() == [3]


def test_only_what_the_search_counts_makes_codes_near(tokenizer):
    tokenizer.config.semantic_distance_weight = 0.0
    quantizer = tokenizer.quantizer
    with torch.no_grad():
        quantizer.pixel_codebook.weight[2] = 3 * quantizer.pixel_codebook.weight[4]  # the same direction
    size = tokenizer.config.codebook_size
    counts = torch.ones(size)
    counts[4] = 2
    left = distinct_codes(quantizer, counts, size - 1)
    assert 2 not in left.tolist() and 4 in left.tolist()


@pytest.mark.parametrize("num_codes", [0, 10**6])
def test_a_number_of_codes_that_cannot_be_left_is_refused(tokenizer, num_codes):
    with pytest.raises(ValueError, match="num_codes"):
        distinct_codes(tokenizer.quantizer, torch.ones(tokenizer.config.codebook_size), num_codes)


def test_the_smaller_tokenizer_decodes_as_the_larger_and_has_no_other_codes(tokenizer):
    codes = torch.arange(1, tokenizer.config.codebook_size, 3)
    smaller = with_codes(tokenizer, codes).eval()
    assert smaller.config.codebook_size == len(codes) < tokenizer.config.codebook_size
    torch.testing.assert_close(smaller.codebook, tokenizer.codebook[codes], rtol=0, atol=0)
    grids = torch.tensor([[[1, 1], [2, 2]]])
    chosen = torch.randint(len(codes), (5,))
    torch.testing.assert_close(smaller.decode(chosen, grids), tokenizer.decode(codes[chosen], grids), rtol=0, atol=0)
    pixels = torch.rand(1, 3, *(2 * tokenizer.config.patch_size,) * 2) * 2 - 1
    assert smaller.encode(pixels, grids).image_codes.max() < len(codes)
