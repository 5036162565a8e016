"""Fused layers against transformers': the same numbers in every mode, one copy of the weights, Qwen's names kept."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch.fx.experimental.proxy_tensor import make_fx
from toy import BOI, SQUARE, WIDE, grids_tensor, image_tokens, needs_fused_attention, random_codes, toy_model
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow import fused_nextflow, graphs_nextflow
from nextflow_hf.modeling_nextflow.graphs_nextflow import PassGraphs
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import count_operators  # noqa: E402


KINDS = {"qwen2": {}, "qwen3": {"qk_norm": True, "head_dim": 8, "attention_bias": True}}
CPU = torch.device("cpu")


def fused_model(**overrides) -> NextFlowForCausalLM:
    model = toy_model(**overrides)
    model.fuse_qkv_projections()
    assert model.is_fused
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ROW = [5, *image_tokens(WIDE), 6]
PREFIX = random_codes(SQUARE[:3]).view(1, -1)
BATCH = torch.tensor([[5, 6, 7, BOI], [0, 8, 9, BOI], [0, 0, 10, BOI]])
NEGATIVE = {"negative_input_ids": torch.tensor([[9, BOI]]), "guidance_scale": 3.0}
ONE = {"input_ids": torch.tensor([[5, 6, BOI]]), "image_grids": grids_tensor(SQUARE)}
IMAGES = {
    "plain": ONE,
    "guided": {**ONE, **NEGATIVE, "top_k": 7, "top_p": 0.9},
    "guided early": {**ONE, **NEGATIVE, "guidance_scale": [3.0, 2.0, 1.0, 1.0]},
    "image-guided": {
        **NEGATIVE,
        "input_ids": torch.tensor([[*ROW, BOI]]),
        "image_codes": random_codes(WIDE),
        "image_grids": grids_tensor(WIDE, SQUARE),
        "negative_input_ids": torch.tensor([[*ROW[:-1], BOI]]),
        "imageless_input_ids": torch.tensor([[7, 8, BOI]]),
        "image_guidance_scale": 1.5,
    },
    "prefix": {**ONE, **NEGATIVE, "prefix_codes": PREFIX},
    "mask": {**ONE, **NEGATIVE, "prefix_codes": PREFIX, "prefix_mask": PREFIX % 2 == 0},
    "batch": {
        **NEGATIVE,
        "input_ids": BATCH,
        "attention_mask": (BATCH != 0).long(),
        "image_grids": grids_tensor(SQUARE, SQUARE, SQUARE),
    },
}


def sample(model: NextFlowForCausalLM, arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and the guided logits of all scales."""
    seen, original = [], type(model).guided_logits
    model.guided_logits = lambda *args: seen.append(original(model, *args)) or seen[-1]
    codes = model.generate_images(**arguments, generator=[seeded(row) for row in range(len(arguments["input_ids"]))])
    del model.guided_logits
    return codes.image_codes, torch.cat([logits.flatten(0, 1) for logits in seen])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", IMAGES)
def test_images_are_those_of_transformers_layers(mode, kind, attention):
    plain, fused = toy_model(**KINDS[kind]), fused_model(**KINDS[kind])
    for model in (plain, fused):
        model.set_attn_implementation(attention)
    expected, logits = sample(plain, IMAGES[mode])
    codes, own_logits = sample(fused, IMAGES[mode])
    torch.testing.assert_close(own_logits, logits, atol=1e-5 * float(logits.abs().max()), rtol=0)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("mode", IMAGES)
def test_a_cpu_multiplies_many_rows_in_blocks(mode, monkeypatch):
    expected, logits = sample(fused_model(), IMAGES[mode])
    multiply, heights = torch.mm, []
    monkeypatch.setattr(fused_nextflow, "BLOCK", 4)
    monkeypatch.setattr(torch, "mm", lambda *args, out: heights.append(len(out)) or multiply(*args, out=out))
    codes, own_logits = sample(fused_model(), IMAGES[mode])
    torch.testing.assert_close(own_logits, logits, atol=1e-5 * float(logits.abs().max()), rtol=0)
    assert torch.equal(codes, expected) and len(heights) > 10
    assert min(heights) > 1  # one token alone is multiplied at once


def test_training_and_half_precision_multiply_at_once(monkeypatch):
    monkeypatch.setattr(fused_nextflow, "BLOCK", 1)
    monkeypatch.setattr(torch, "mm", None)
    states, weight = torch.randn(2, 3, 8), torch.nn.Parameter(torch.randn(8 * torch.get_num_threads(), 8))
    assert fused_nextflow.linear_in_blocks(states, weight).grad_fn is not None
    with torch.no_grad():
        fused_nextflow.linear_in_blocks(states.bfloat16(), weight.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused_nextflow.linear_in_blocks(states, weight).dtype == torch.bfloat16
        with pytest.raises(TypeError):
            fused_nextflow.linear_in_blocks(states, weight)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_in_float32_guidance_needs_one_product_of_the_head(dtype, rows):
    model, seen = fused_model().to(dtype), []
    head = model.image_logits
    model.image_logits = lambda states, *product: seen.append(len(states)) or head(states, *product)
    model.generate_images(**{**ONE, **NEGATIVE, "generator": seeded(0)})
    assert set(seen) == {rows}


@pytest.mark.parametrize("mode", IMAGES)
def test_in_bfloat16_they_are_as_close_to_float32(mode):
    arguments = {"temperature": 0.0, **IMAGES[mode]}
    given = {**arguments, "prefix_codes": sample(toy_model(), arguments)[0].view(len(arguments["input_ids"]), -1)}
    given["prefix_mask"] = torch.zeros_like(given["prefix_codes"], dtype=torch.bool)

    def logits(model: NextFlowForCausalLM) -> torch.Tensor:
        """Of all scales, each after the codes that float32 samples."""
        states = []
        model.sample_scale = lambda logits, *_: (
            states.append(logits)
            or given["prefix_codes"][:, sum(one.shape[1] for one in states[:-1]) :][:, : logits.shape[1]]
        )
        model.generate_images(**given)
        return torch.cat([one.flatten() for one in states])

    exact = logits(toy_model())
    plain, fused = ((logits(one.to(torch.bfloat16)) - exact).square().mean() for one in (toy_model(), fused_model()))
    assert 0 < fused < 1.2 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_answers_with_images_are_those_of_transformers_layers(kind):
    prompts = torch.tensor([[5, 6, 7], [0, 0, 8]])

    def begin(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([BOI]), 1e4) if ids.shape[1] % 3 == 1 else scores

    def write(model: NextFlowForCausalLM) -> list[torch.Tensor]:
        greedy = {"do_sample": False, "max_new_tokens": 8}
        mask = {"attention_mask": (prompts != 0).long()}
        text = model.generate(prompts, **mask, **greedy)
        beams = model.generate(prompts, **mask, **greedy, num_beams=3)
        assisted = model.generate(prompts[:1], **greedy, assistant_model=toy_model(**KINDS[kind], num_hidden_layers=1))
        images = {"image_codes": random_codes(WIDE), "image_grids": grids_tensor(WIDE)}
        after = model.generate(torch.tensor([ROW]), **images, **greedy)
        static = model.generate(
            torch.tensor([ROW]), **images, **greedy, cache_implementation="static", disable_compile=True
        )
        mode = {"generation_mode": "interleaved", "logits_processor": [begin], "max_images": 2}
        mode |= {"target_grids": grids_tensor(SQUARE, WIDE), "negative_input_ids": torch.tensor([[9]])}
        answer = model.generate(
            prompts, **mask, **mode, max_new_tokens=8, do_sample=True, guidance_scale=2.0,
            generator=[seeded(1), seeded(2)], return_dict_in_generate=True,
        )  # fmt: skip
        more = torch.cat([answer.sequences, torch.tensor([[11, 12], [13, 14]])], dim=1)
        mask = torch.nn.functional.pad(answer.attention_mask, (0, 2), value=1)
        again = model.generate(
            more, attention_mask=mask, **mode, **greedy, image_codes=answer.image_codes,
            image_grids=answer.image_grids, past_key_values=answer.past_key_values, guidance_scale=1.0,
        )  # fmt: skip
        found = [text, beams, assisted, after, static]
        return [*found, answer.sequences, answer.image_codes, again.sequences, again.image_codes]

    for found, expected in zip(write(fused_model(**KINDS[kind])), write(toy_model(**KINDS[kind])), strict=True):
        assert torch.equal(found, expected)


# ---- weights


def num_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_exist_once_and_come_back(kind):
    model = toy_model(**KINDS[kind])
    size, state = num_bytes(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = [weakref.ref(layer.self_attn.q_proj.weight) for layer in model.model.layers]
    model.fuse_qkv_projections()
    gc.collect()
    assert all(weight() is None for weight in old)
    assert abs(num_bytes(model) - size) < 0.02 * size
    model.unfuse_qkv_projections()
    assert not model.is_fused and abs(num_bytes(model) - size) < 0.02 * size
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    kinds = [{name: type(one) for name, one in every.named_modules()} for every in (model, toy_model(**KINDS[kind]))]
    assert kinds[0] == kinds[1]


def test_files_have_qwens_names(tmp_path):
    model = fused_model()
    model.save_pretrained(tmp_path)
    assert model.is_fused
    loaded, info = NextFlowForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = toy_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_the_model_moves_as_a_whole():
    model = fused_model().to(torch.float64)
    assert {parameter.dtype for parameter in model.model.layers.parameters()} == {torch.float64}
    expected, _ = sample(toy_model().to(torch.float64), IMAGES["guided"])
    assert torch.equal(sample(model, IMAGES["guided"])[0], expected)
    assert {parameter.device.type for parameter in fused_model().to("meta").parameters()} == {"meta"}


def offload_by_module(pipe: NextFlowPipeline, folder: Path) -> None:
    cpu_offload(pipe.transformer, CPU)


def offload_by_group(pipe: NextFlowPipeline, folder: Path) -> None:
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(folder)}
    apply_group_offloading(pipe.transformer, CPU, CPU, **options)


@pytest.mark.parametrize("offload", [offload_by_module, offload_by_group])
def test_offloaded_weights_are_read_in_their_modules_calls(offload, tmp_path):
    def draw(pipe: NextFlowPipeline) -> torch.Tensor:
        return pipe("a", guidance_scale=3.0, generator=seeded(0), output_type="codes").image_codes

    expected, pipe = draw(toy_pipeline()), toy_pipeline()
    pipe.transformer.fuse_qkv_projections()
    offload(pipe, tmp_path)
    assert torch.equal(draw(pipe), expected)


def test_what_is_not_plain_is_not_fused(caplog):
    model = toy_model()
    cpu_offload(model, CPU)
    model.fuse_qkv_projections()
    assert not model.is_fused
    model = toy_model()
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[1].mlp.up_proj.weight.half())
    model.model.layers[1].mlp.up_proj.__class__ = type("QuantizedLinear", (torch.nn.Linear,), {})
    model.fuse_qkv_projections()
    assert not model.is_fused


def test_an_adapter_unfuses_and_acts(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    plain, fused = toy_model(), fused_model()
    for model in (plain, fused):
        torch.manual_seed(1)
        model.add_adapter(config)
    assert not fused.is_fused
    expected, logits = sample(plain, IMAGES["guided"])
    codes, own_logits = sample(fused, IMAGES["guided"])
    assert torch.equal(codes, expected) and torch.equal(logits, own_logits)
    fused.fuse_qkv_projections()
    assert not fused.is_fused  # not plain
    plain.save_pretrained(tmp_path)
    loaded = fused_model()
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(sample(loaded, IMAGES["guided"])[1], logits)


# ---- counts


@needs_fused_attention
def test_operators_waits_and_memory_of_a_pass():
    """28 layers stay below 480 operators; from prefill to the last scale nothing waits and no keys or values move."""
    for negative_length in (8, 5):
        few, more = (
            count_operators.count(count_operators.make_model(layers, fused=True), 256, negative_length)
            for layers in (2, 4)
        )
        a_layer = (max(more.passes[1:]) - max(few.passes[1:])) / 2
        assert max(few.passes[1:]) + 26 * a_layer <= 480
        assert not more.waits and not more.moves
        assert max(more.scales[1:-1]) - max(more.passes[1:]) <= 60  # embedding, head, guidance, sampling


# ---- recorded passes


def capture_by_tracing(run):
    """What CUDA graphs do, on a CPU: the operators of `run` on the very tensors that it reads and writes."""
    graph = make_fx(run)()
    return lambda: graph()


@pytest.mark.parametrize("guidance", [3.0, [3.0, 3.0, 1.0, 1.0]], ids=["constant", "early"])
def test_recorded_passes_serve_other_prompts(monkeypatch, guidance):
    """Nothing in a pass depends on a value: what one prompt recorded is right for another, in the same memory."""
    monkeypatch.setattr(graphs_nextflow, "capture", capture_by_tracing)
    plain, recorded = toy_model(), fused_model()
    recorded.graphs = PassGraphs(max_cells=9)  # the last scale, of 16, is launched
    memory = set()
    for prompt in ([5, 6, BOI], [7, BOI], [8, 9, 10, 11, BOI]):
        arguments = {**ONE, **NEGATIVE, "input_ids": torch.tensor([prompt]), "guidance_scale": guidance}
        expected, logits = sample(plain, arguments)
        codes, own_logits = sample(recorded, arguments)
        torch.testing.assert_close(own_logits, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(codes, expected)
        (workspace,) = recorded.graphs.free
        memory.add(tuple(layer.keys.data_ptr() for layer in workspace.cache.layers))
    assert len(memory) == 1 and len(workspace.passes) == 2
    side_by_side = zip(*(recorded.stream_images(**ONE, guidance_scale=1.0, temperature=0.0) for _ in range(2)))
    assert torch.equal(*(scale.image_codes for scale in list(side_by_side)[-1]))
    scales = recorded.stream_images(**ONE, guidance_scale=1.0, temperature=0.0)
    next(scales)
    recorded.to(torch.float64)
    scales.close()  # what was recorded on the old weights is not used again
    assert not recorded.graphs.free


def test_few_workspaces_wait_to_be_used_again(monkeypatch):
    monkeypatch.setattr(graphs_nextflow, "MAX_FREE", 2)
    config, graphs = toy_model().config, PassGraphs(max_cells=9)
    taken = [graphs.take(config, 1, length) for length in (64, 128, 192)]
    for workspace in taken:
        graphs.give_back(workspace)
    assert graphs.free == taken[1:]
    assert graphs.take(config, 1, 128) is taken[1] and graphs.take(config, 1, 64) is not taken[0]


def test_graphs_need_a_device_that_has_them():
    with pytest.raises(ValueError, match="the model is on cpu, expected a CUDA device"):
        toy_model().compile_sampling()
