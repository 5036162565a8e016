"""What quantisation and half precision leave alone, and that an image is drawn through what they changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import IDS, SQUARE, grids_tensor, image_tokens, random_codes, toy_model
from toy_pipeline import toy_pipeline, toy_vision_tokenizer
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from nextflow_hf import NextFlowForCausalLM, NextFlowModel, NextFlowPipeline


LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
DECODER = {f"layers.{index}.{name}" for index in range(2) for name in LAYER}
# Four-bit weights come in blocks of 64, and a row must be whole blocks.
BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
PROMPT = torch.tensor([[5, 7, IDS["boi_token_id"]]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    toy_model(**BLOCKS).save_pretrained(folder)
    return folder


def draw(model: NextFlowForCausalLM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model.generate_images(PROMPT, image_grids=grids_tensor(SQUARE), generator=generator).image_codes


def logits(model: NextFlowForCausalLM) -> torch.Tensor:
    ids = torch.tensor([[5, *image_tokens(SQUARE), 7]])
    with torch.no_grad():
        output = model(input_ids=ids, image_codes=random_codes(SQUARE), image_grids=grids_tensor(SQUARE))
    return output.logits.float()


def quantised_modules(model: nn.Module, skipped: list[str] | None = None) -> set[str]:
    """The matrices that a transformers quantiser takes: by module names (bitsandbytes) and by weights (torchao)."""
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    matrices = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    taken = {name for name in matrices if should_convert_module(name, kept)}
    assert taken == {name for name in matrices if should_convert_module(f"{name}.weight", kept)}
    return taken


@pytest.mark.parametrize("tied", [False, True])
def test_quantisation_takes_the_decoder_alone(tied):
    model = toy_model(tie_word_embeddings=tied)
    assert quantised_modules(model) == {f"model.{name}" for name in DECODER}
    assert quantised_modules(model.model) == DECODER


def test_a_list_of_ones_own_replaces_the_heads_place_but_not_the_connectors():
    taken = quantised_modules(toy_model(), skipped=["model.layers.0"])
    assert taken == {f"model.{name}" for name in DECODER if name.startswith("layers.1.")} | {"lm_head"}


def test_patterns_hold_inside_a_larger_model():
    class Composite(nn.Module):
        def __init__(self, model: NextFlowModel):
            super().__init__()
            self.model = nn.ModuleDict({"language_model": model})

    names = [name for name, _ in Composite(toy_model().model).named_modules()]
    patterns = NextFlowForCausalLM._keep_in_fp32_modules
    kept = {name for name in names if not should_convert_module(name, patterns)}
    expected = ("connector", "connector.linear_1", "connector.act", "connector.linear_2")
    expected += ("scale_embedding", "image_codebook")
    assert kept == {f"model.language_model.{name}" for name in expected}


class Int8Linear(nn.Module):
    """A matrix as quantisers keep it: integers, which are no dtype to compute in, and a scale a row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127, requires_grad=False)
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("skipped", [None, []], ids=["head kept", "head quantised"])
def test_drawing_through_integers_is_drawing_through_the_rounded_matrices(skipped):
    model, rounded = toy_model(), toy_model()
    for name in quantised_modules(model, skipped):
        module = Int8Linear(model.get_submodule(name))
        model.set_submodule(name, module)
        with torch.no_grad():
            rounded.get_submodule(name).weight.copy_(module.weight * module.scale)
    assert isinstance(model.lm_head, Int8Linear) == (skipped == [])
    assert torch.equal(draw(model), draw(rounded))
    torch.testing.assert_close(logits(model), logits(rounded))


def test_float16_keeps_the_small_modules_in_float32(folder):
    model = NextFlowForCausalLM.from_pretrained(folder, dtype=torch.float16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    linears = {f"connector.linear_{index}.{kind}" for index in (1, 2) for kind in ("weight", "bias")}
    assert kept == {f"model.{name}" for name in (*linears, "scale_embedding.weight", "image_codebook.weight")}
    assert model.dtype == torch.float16
    assert draw(model).shape == (30,)
    torch.testing.assert_close(logits(model), logits(toy_model(**BLOCKS)), atol=0.05, rtol=0.05)


def test_bfloat16_is_bfloat16_all_over(folder):
    model = NextFlowForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert draw(model).shape == (30,)


BITS = {
    8: {"load_in_8bit": True},
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(folder, bits, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = {8: bitsandbytes.nn.Linear8bitLt, 4: bitsandbytes.nn.Linear4bit}[bits]
    config = BitsAndBytesConfig(**BITS[bits])
    model = NextFlowForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    quantised = {name for name, module in model.named_modules() if isinstance(module, linear)}
    assert quantised == {f"model.{name}" for name in DECODER}
    assert model.model.connector.linear_1.weight.dtype == torch.float32
    half = NextFlowForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float16)
    assert torch.equal(half.model.rotary_emb.inv_freq, toy_model(**BLOCKS).model.rotary_emb.inv_freq)
    # Before the first pass: on a CPU it repacks four-bit weights, and what is saved after it is wrong.
    model.save_pretrained(tmp_path)
    again = NextFlowForCausalLM.from_pretrained(tmp_path).eval()
    expected = logits(toy_model(**BLOCKS))
    found = logits(model.eval())
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > (0.99 if bits == 8 else 0.9)
    torch.testing.assert_close(logits(again), found, atol=1e-2, rtol=1e-2)
    assert draw(model).shape == (30,)


def test_a_pipeline_with_a_four_bit_transformer(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from diffusers import PipelineQuantizationConfig

    toy_pipeline(**BLOCKS).save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        components_to_quantize=["transformer"],
    )
    pipe = NextFlowPipeline.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    four_bit = [name for name, one in pipe.components.items() if isinstance(one, nn.Module)]
    four_bit = [name for name in four_bit if _has(pipe.components[name], bitsandbytes.nn.Linear4bit)]
    assert four_bit == ["transformer"]
    assert pipe("a").images[0].size == (16, 16)


def _has(model: nn.Module, kind: type) -> bool:
    return any(isinstance(module, kind) for module in model.modules())


def test_four_bit_lora_trains(folder):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    config = BitsAndBytesConfig(**BITS[4])
    model = NextFlowForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(task_type="CAUSAL_LM")).train()
    ids = torch.tensor([[5, *image_tokens(SQUARE), 7]])
    codes, grids = random_codes(SQUARE), grids_tensor(SQUARE)
    model(input_ids=ids, image_codes=codes, image_grids=grids, labels=ids).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(DECODER)
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(folder, kind):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(getattr(torchao, kind)())
    model = NextFlowForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    quantised = {name for name, one in model.named_modules() if isinstance(one, nn.Linear) and _is_quantised(one)}
    assert quantised == {f"model.{name}" for name in DECODER}
    torch.testing.assert_close(logits(model), logits(toy_model(**BLOCKS)), atol=0.2, rtol=0.2)
    assert draw(model).shape == (30,)


def _is_quantised(linear: nn.Linear) -> bool:
    return type(linear.weight.data) is not torch.Tensor


def test_a_quantised_vision_tokenizer_does_not_take_pixels_for_bytes(tmp_path):
    """Inputs are cast to the type of what is not quantised."""
    whole, grids = toy_vision_tokenizer(), grids_tensor(SQUARE)[:, :4]
    whole.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    tokenizer = type(whole).from_pretrained(tmp_path, quantization_config=config)
    assert tokenizer.decode_task_layer[0].weight.dtype == torch.int8
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        codes = whole.encode(pixels, grids).image_codes
        assert (tokenizer.encode(pixels, grids).image_codes == codes).float().mean() > 0.8
        found, expected = (one.decode_features(codes, grids).semantic_features for one in (tokenizer, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.abs().max()))
