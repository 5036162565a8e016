"""LoRA on the pipeline's transformer: every layout is the same adapter, and what it adds is added by hand here."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from toy import IDS, SQUARE, grids_tensor
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowForCausalLM, NextFlowPipeline
from nextflow_hf.training.transformer.adapters import IMAGE_MODULES


MATRICES = ["q_proj", "v_proj", "down_proj"]
IDS_OF_TEXT = torch.tensor([[5, 7, 11, 3]])


def make_adapter(seed: int = 0, **options) -> PeftModel:
    """Rank 2, scale 3, no matrix zero."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=MATRICES, init_lora_weights=False, **options)
    model = get_peft_model(toy_pipeline().transformer, config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.5 + torch.rand(len(parameter))
    return model


def by_hand(adapters: dict[PeftModel, float]) -> NextFlowForCausalLM:
    """The toy transformer with the adapters in its weights: W + weight * alpha / r * B A, and DoRA's length on top."""
    model = toy_pipeline().transformer
    for adapter, weight in adapters.items():
        matrices = get_peft_model_state_dict(adapter, save_embedding_layers=False)
        for name, down in matrices.items():
            if not name.endswith("lora_A.weight"):
                continue
            up = matrices[name.replace("lora_A", "lora_B")]
            parameter = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
            parameter.data += weight * 3 * up @ down
            magnitude = matrices.get(name.replace("lora_A.weight", "lora_magnitude_vector"))
            if magnitude is not None:
                parameter.data *= (magnitude / parameter.data.norm(dim=1))[:, None]
    return model


@torch.no_grad()
def logits(model: NextFlowForCausalLM) -> torch.Tensor:
    return model(input_ids=IDS_OF_TEXT).logits


def assert_equal(pipe: NextFlowPipeline, adapters: dict[PeftModel, float]):
    expected = logits(by_hand(adapters))
    torch.testing.assert_close(logits(pipe.transformer), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def adapter() -> PeftModel:
    return make_adapter()


@pytest.fixture(scope="module")
def other() -> PeftModel:
    return make_adapter(seed=1)


def save(adapter: PeftModel, folder) -> None:
    """In diffusers' layout."""
    NextFlowPipeline.save_lora_weights(
        folder,
        transformer_lora_layers={
            name.removeprefix("base_model.model."): value
            for name, value in get_peft_model_state_dict(adapter, save_embedding_layers=False).items()
        },
        transformer_lora_adapter_metadata=adapter.peft_config["default"].to_dict(),
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layout", ["peft", "peft file", "diffusers", "diffusers file"])
def test_every_layout_is_the_same_adapter(layout, dora, tmp_path):
    adapter = make_adapter(use_dora=dora)
    kind, _, is_file = layout.partition(" ")
    if kind == "peft":
        adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    else:
        save(adapter, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    pipe = toy_pipeline()
    plain = logits(pipe.transformer)
    pipe.load_lora_weights(file if is_file else tmp_path)
    assert (logits(pipe.transformer) - plain).abs().max() > 0.1
    assert_equal(pipe, {adapter: 1})
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    pipe.unload_lora_weights()
    torch.testing.assert_close(logits(pipe.transformer), plain, rtol=0, atol=0)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer."])
def test_a_dict_alone_has_scale_1(adapter, prefix):
    matrices = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    pipe = toy_pipeline()
    pipe.load_lora_weights({name.replace("base_model.model.", prefix): value for name, value in matrices.items()})
    assert_equal(pipe, {adapter: 1 / 3})


def test_adapters_are_weighed_switched_and_deleted(adapter, other, tmp_path):
    for name, one in {"first": adapter, "second": other}.items():
        one.save_pretrained(tmp_path / name, save_embedding_layers=False)
    pipe = toy_pipeline()
    plain = logits(pipe.transformer)
    pipe.load_lora_weights(tmp_path / "first", adapter_name="first")
    pipe.load_lora_weights(tmp_path / "second", adapter_name="second")
    assert pipe.get_active_adapters() == ["second"]
    assert_equal(pipe, {other: 1})
    pipe.set_adapters("first", 0.5)
    assert_equal(pipe, {adapter: 0.5})
    pipe.set_adapters(["first", "second"], [0.7, -0.4])
    assert pipe.get_active_adapters() == ["first", "second"]
    assert_equal(pipe, {adapter: 0.7, other: -0.4})
    pipe.disable_lora()
    torch.testing.assert_close(logits(pipe.transformer), plain, rtol=0, atol=0)
    pipe.enable_lora()
    assert_equal(pipe, {adapter: 0.7, other: -0.4})
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {"transformer": ["second"]}
    assert_equal(pipe, {other: -0.4})
    with pytest.raises(ValueError, match="'second' already"):
        pipe.load_lora_weights(tmp_path / "first", adapter_name="second")


def test_fusing_and_back(adapter, other, tmp_path):
    for name, one in {"first": adapter, "second": other}.items():
        one.save_pretrained(tmp_path / name, save_embedding_layers=False)
    pipe = toy_pipeline()
    for name in ("first", "second"):
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["first", "second"], [0.5, 2.0])
    for _ in range(2):  # the second time, nothing is left of the first
        pipe.fuse_lora(lora_scale=0.7)
        assert pipe.fused_loras == {"first", "second"}
        assert_equal(pipe, {adapter: 0.35, other: 1.4})
        with pytest.raises(ValueError, match="\\['first', 'second'\\] are fused already"):
            pipe.fuse_lora()
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0
        assert_equal(pipe, {adapter: 0.5, other: 2.0})
    pipe.set_adapters("first")
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["second"])  # one that is not active
    pipe.disable_lora()
    pipe.unload_lora_weights()
    assert_equal(pipe, {other: 1.0})  # its weight 2.0 of before, halved
    assert pipe.num_fused_loras == 0
    pipe.load_lora_weights(tmp_path / "second", adapter_name="second")
    pipe.unfuse_lora()  # nothing
    pipe.fuse_lora(lora_scale=0.5)
    assert_equal(pipe, {other: 1.5})


def test_a_refused_fusing_changes_nothing(adapter, tmp_path):
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    pipe = toy_pipeline()
    pipe.load_lora_weights(tmp_path)
    expected = logits(pipe.transformer)
    last = pipe.transformer.model.layers[-1].mlp.down_proj.lora_A["default_0"].weight
    kept = last.detach().clone()
    last.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs"):
        pipe.fuse_lora(lora_scale=0.5, safe_fusing=True)
    last.data.copy_(kept)
    torch.testing.assert_close(logits(pipe.transformer), expected, rtol=1e-4, atol=1e-4)


def test_the_pipeline_is_saved_with_the_adapter_in_it_or_without(adapter, tmp_path):
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    pipe = toy_pipeline()
    pipe.load_lora_weights(tmp_path / "adapter", adapter_name="first")
    with pytest.raises(ValueError, match="has the adapters \\['first'\\]"):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    assert_equal(NextFlowPipeline.from_pretrained(tmp_path / "pipe"), {adapter: 1})


def test_it_draws(adapter, tmp_path):
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    pipe = toy_pipeline()
    options = {"output_type": "codes", "guidance_scale": 2.0}
    plain = pipe("a", generator=torch.Generator().manual_seed(0), **options).image_codes
    pipe.load_lora_weights(tmp_path)
    drawn = pipe("a", generator=torch.Generator().manual_seed(0), **options).image_codes
    pipe.transformer = by_hand({adapter: 1})
    expected = pipe("a", generator=torch.Generator().manual_seed(0), **options).image_codes
    assert torch.equal(drawn, expected) and not torch.equal(drawn, plain)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"lora_foo": "lora_foo"}, "has the weights \\['lora_foo'\\], expected names like"),
        ({"transformer.foo.lora_A.weight": "", "transformer.foo.lora_B.weight": ""}, "foo"),
        ({"transformer.lm_head.weight": ""}, "expected names in 'lora_A' and 'lora_B'"),
    ],
    ids=["no prefix", "no place", "no matrices"],
)
def test_what_does_not_fit_is_named_and_changes_nothing(names, message):
    pipe = toy_pipeline()
    plain = logits(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights({name: torch.ones(2, 2) for name in names})
    assert pipe.get_list_adapters() == {}
    assert torch.equal(logits(pipe.transformer), plain)


def test_missing_and_misshapen_matrices_change_nothing(adapter, tmp_path):
    pipe = toy_pipeline()
    plain = logits(pipe.transformer)
    save(adapter, tmp_path)
    state_dict, metadata = pipe.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == 6
    name = next(iter(state_dict))
    for changed in ({name: None}, {name: state_dict[name][:, :-1]}):
        weights = {key: value for key, value in {**state_dict, **changed}.items() if value is not None}
        NextFlowPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers={
                key.removeprefix("transformer."): value.clone() for key, value in weights.items()
            },
            transformer_lora_adapter_metadata=adapter.peft_config["default"].to_dict(),
        )
        with pytest.raises((ValueError, RuntimeError), match=name.removeprefix("transformer.").split(".lora")[0]):
            pipe.load_lora_weights(tmp_path)
        assert pipe.get_list_adapters() == {}
        assert torch.equal(logits(pipe.transformer), plain)


def test_an_adapter_with_whole_modules_is_merged_instead(tmp_path):
    adapter = make_adapter(modules_to_save=IMAGE_MODULES)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "modules_to_save" in name:
                parameter += 1
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    pipe = toy_pipeline()
    with pytest.raises(ValueError, match="\\(modules_to_save\\).*merge_and_unload"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {}
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, tmp_path).merge_and_unload()
    prompt, grids = torch.tensor([[5, 7, IDS["boi_token_id"]]]), grids_tensor(SQUARE)
    prompt[0, -1] = pipe.processor.boi_token_id
    codes = [
        model.generate_images(prompt, image_grids=grids, generator=torch.Generator().manual_seed(0)).image_codes
        for model in (pipe.transformer, copy.deepcopy(adapter).merge_and_unload())
    ]
    assert torch.equal(*codes)


def test_hotswap_puts_other_matrices_in_the_same_place(adapter, other, tmp_path):
    for name, one in {"first": adapter, "second": other}.items():
        one.save_pretrained(tmp_path / name, save_embedding_layers=False)
    pipe = toy_pipeline()
    with pytest.raises(ValueError, match=r"of the adapters \[\] none is 'x': load it first"):
        pipe.load_lora_weights(tmp_path / "first", adapter_name="x", hotswap=True)
    pipe.load_lora_weights(tmp_path / "first", adapter_name="x", hotswap=False)
    matrices = [id(value) for name, value in pipe.transformer.named_parameters() if "lora" in name]
    pipe.load_lora_weights(tmp_path / "second", adapter_name="x", hotswap=True)
    assert [id(value) for name, value in pipe.transformer.named_parameters() if "lora" in name] == matrices
    assert_equal(pipe, {other: 1})
    assert pipe.get_list_adapters() == {"transformer": ["x"]}


def test_hotswap_of_other_ranks_and_scales(adapter, tmp_path):
    """What `enable_lora_hotswap` is for; without it, it is refused and the adapter stays."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=MATRICES, init_lora_weights=False)
    high = get_peft_model(toy_pipeline().transformer, config)
    for name, one in {"low": adapter, "high": high}.items():
        one.save_pretrained(tmp_path / name, save_embedding_layers=False)
    pipe = toy_pipeline()
    pipe.load_lora_weights(tmp_path / "low", adapter_name="x")
    with pytest.raises(ValueError, match="does not fit the adapter 'x'"):
        pipe.load_lora_weights(tmp_path / "high", adapter_name="x", hotswap=True)
    assert_equal(pipe, {adapter: 1})
    with pytest.raises(ValueError, match="before the first"):
        pipe.enable_lora_hotswap(target_rank=8)
    pipe = toy_pipeline()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(tmp_path / "low", adapter_name="x")
    assert_equal(pipe, {adapter: 1})
    for name, one in (("high", high), ("low", adapter)):
        pipe.load_lora_weights(tmp_path / name, adapter_name="x", hotswap=True)
        assert_equal(pipe, {one: 1})


MALFORMED = {
    "no json": ("adapter_config.json", b"{"),
    "a list": ("adapter_config.json", b"[]"),
    "no type": ("adapter_config.json", b'{"r": 2}'),
    "another type": ("adapter_config.json", b'{"peft_type": "NOPE"}'),
    "a prompt": ("adapter_config.json", b'{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}'),
    "a rank of text": ("adapter_config.json", b'{"peft_type": "LORA", "r": "two", "target_modules": ["q_proj"]}'),
    "rank 0": ("adapter_config.json", b'{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}'),
    "no modules": ("adapter_config.json", b'{"peft_type": "LORA", "r": 2, "target_modules": ["nope"]}'),
    "no config": ("adapter_config.json", None),
    "no safetensors": ("adapter_model.safetensors", b"nonsense"),
    "empty": ("adapter_model.safetensors", b""),
    "no weights": ("adapter_model.safetensors", None),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_adapter_is_one_line(name, adapter, tmp_path, monkeypatch):
    """An error that users can put right, as the command line prints it, and names the adapter."""
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("tried to reach the network"))
    adapter.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    file, content = MALFORMED[name]
    if content is None:
        (tmp_path / "lora" / file).unlink()
    else:
        (tmp_path / "lora" / file).write_bytes(content)
    pipe = toy_pipeline()
    with pytest.raises((ValueError, OSError)) as error:
        pipe.load_lora_weights(tmp_path / "lora")
    assert "\n" not in str(error.value).strip() and str(tmp_path / "lora") in str(error.value)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("offload", ["sequential", "group"])
def test_it_comes_into_an_offloaded_transformer(offload, adapter, tmp_path, monkeypatch):
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    pipe = toy_pipeline()
    if offload == "sequential":
        # On a CPU as `enable_sequential_cpu_offload` does it on a GPU.
        monkeypatch.setattr(
            pipe, "enable_sequential_cpu_offload", lambda device: cpu_offload(pipe.transformer, torch.device("cpu"))
        )
        pipe.enable_sequential_cpu_offload(device=None)
        assert pipe.transformer.lm_head.weight.is_meta
    else:
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    pipe.load_lora_weights(tmp_path)
    assert pipe.transformer.lm_head.weight.is_meta == (offload == "sequential")
    assert_equal(pipe, {adapter: 1})
