"""LoRA and DoRA on the transformer: what they train, that they are saved whole, and that merging changes nothing."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from toy import IDS, SQUARE, WIDE, grids_tensor, image_tokens, random_codes, toy_config, toy_model
from toy_pipeline import toy_pipeline
from transformers import TrainingArguments

from nextflow_hf import NextFlowForCausalLM, NextFlowForConditionalGeneration, NextFlowPipeline
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import export_adapter, export_pipeline
from nextflow_hf.training.transformer.adapters import IMAGE_MODULES, VISION_TOKENIZER, image_token_rows
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS_OF_TWO = torch.tensor([[5, *image_tokens(SQUARE), 7, *image_tokens(WIDE), 1]])
INPUTS = {
    "input_ids": IDS_OF_TWO,
    "image_codes": random_codes(SQUARE, WIDE),
    "image_grids": grids_tensor(SQUARE, WIDE),
}


def config_for(model: NextFlowForCausalLM, kind: str) -> LoraConfig:
    """`lora` and `dora` as they come; `whole` with everything that is new to the language model."""
    options = {"lora": {}, "dora": {"use_dora": True}}.get(kind)
    if options is None:
        options = {
            "trainable_token_indices": image_token_rows(model.config),
            "modules_to_save": IMAGE_MODULES,
        }
    return LoraConfig(r=4, task_type="CAUSAL_LM", **options)


def trained_adapter(kind: str, **overrides) -> PeftModel:
    """Two steps of training: the first only moves what starts at zero."""
    model = toy_model(**overrides)
    model = get_peft_model(model, config_for(model, kind)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(2):
        model(**INPUTS, labels=IDS_OF_TWO).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in trained)
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**INPUTS).logits


def draw(model: NextFlowForCausalLM) -> torch.Tensor:
    prompt = torch.tensor([[5, 7, IDS["boi_token_id"]]])
    generator = torch.Generator().manual_seed(0)
    return model.generate_images(prompt, image_grids=grids_tensor(SQUARE), generator=generator).image_codes


KINDS = [("lora", False), ("dora", False), ("whole", False), ("whole", True)]


@pytest.fixture(scope="module", params=KINDS, ids=["lora", "dora", "whole", "whole tied"])
def adapter(request) -> tuple[PeftModel, dict]:
    kind, tied = request.param
    return trained_adapter(kind, tie_word_embeddings=tied), {"tie_word_embeddings": tied}


def test_default_targets_are_the_decoders_matrices():
    model = get_peft_model(toy_model(), LoraConfig())
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    prefix = "base_model.model.model.layers."
    assert {name.split(".")[-1] for name in adapted} == MATRICES
    assert all(name.startswith(prefix) for name in adapted) and len(adapted) == 2 * len(MATRICES)


def test_transformers_own_way_in_has_the_same_default():
    model = toy_model()
    model.add_adapter(LoraConfig())
    assert model.peft_config["default"].target_modules == MATRICES


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_those_that_the_vocabulary_has_grown_by(tied):
    config = toy_config(tie_word_embeddings=tied)
    rows = image_token_rows(config)
    grown = [*range(config.text_vocab_size, config.vocab_size)]
    two = [config.boi_token_id, config.eoi_token_id]
    assert rows == ({"embed_tokens": grown} if tied else {"embed_tokens": two, "lm_head": grown})


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_new_rows_move(tied):
    before, after = toy_model(tie_word_embeddings=tied), trained_adapter("whole", tie_word_embeddings=tied)
    merged = after.merge_and_unload()
    config = merged.config
    for name, parameter in merged.named_parameters():
        old = before.get_parameter(name)
        changed = (parameter != old).flatten(1).any(1) if parameter.ndim > 1 else (parameter != old)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            whole_head = tied or name == "lm_head.weight"
            first = config.text_vocab_size if whole_head else config.boi_token_id
            assert changed[first:].all() and not changed[:first].any(), name
        else:
            trained = (
                name.split(".")[-2] in MATRICES and name.endswith("weight") or name.split(".")[1] in IMAGE_MODULES
            )
            assert changed.any() == trained, name
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_training_moved_it(adapter):
    model, overrides = adapter
    assert (logits(model) - logits(toy_model(**overrides))).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(toy_model(**overrides)))


def test_saved_and_loaded_it_is_the_same(adapter, tmp_path):
    model, overrides = adapter
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy_model(**overrides), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(draw(loaded.get_base_model()), draw(model.get_base_model()))


# Not DoRA: transformers 5.23 loses its magnitudes and says so. PEFT's own loader has them.
@pytest.mark.parametrize(("kind", "tied"), [("lora", False), ("whole", False), ("whole", True)])
def test_transformers_own_way_in_loads_it(kind, tied, tmp_path):
    model = trained_adapter(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = toy_model(tie_word_embeddings=tied)
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert torch.equal(draw(loaded), draw(model.get_base_model()))


def test_merged_and_saved_it_is_the_same(adapter, tmp_path):
    model, overrides = adapter
    model.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(toy_model(**overrides), tmp_path / "adapter").merge_and_unload().eval()
    assert type(merged) is NextFlowForCausalLM
    assert merged.state_dict().keys() == toy_model(**overrides).state_dict().keys()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    assert torch.equal(draw(merged), draw(model.get_base_model()))
    merged.save_pretrained(tmp_path / "merged")
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.tie_word_embeddings == overrides["tie_word_embeddings"]
    assert torch.equal(logits(loaded), logits(merged))


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        model = toy_model()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model = get_peft_model(model, config_for(model, kind)).train()
        model(**INPUTS, labels=IDS_OF_TWO).loss.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_the_trainer_trains_an_adapter(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_steps=2,
        max_steps=2,
        learning_rate=1e-2,
    )
    ids = [5, 7, *image_tokens(SQUARE), 1]
    labels = [token if token == IDS["boi_token_id"] else -100 for token in ids]
    codes, grids = random_codes(SQUARE), grids_tensor(SQUARE)
    row = {"input_ids": ids, "labels": labels, "image_codes": codes.tolist(), "image_grids": grids.tolist()}
    row |= {"image_target_codes": codes.tolist(), "length": len(ids)}
    losses = []
    for adapt in (False, True):
        model = toy_model()
        if adapt:
            model = get_peft_model(model, config_for(model, "whole"))
            arguments.output_dir = str(tmp_path / "adapter")
        trainer = NextFlowTrainer(model=model, args=arguments, train_dataset=[row] * 4)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][0] == losses[1][0]  # an untrained adapter is none
    assert losses[1][1] < losses[1][0]
    files = {path.name for path in (tmp_path / "adapter" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    loaded = PeftModel.from_pretrained(toy_model(), tmp_path / "adapter" / "checkpoint-2").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_exported_adapter_on_the_exported_model(tmp_path):
    pipe = toy_pipeline()
    base = export_pipeline(pipe, tmp_path / "base", create_card("model", repo_id="toy/base"))
    transformer = NextFlowForCausalLM.from_pretrained(base)
    expected = drawn_by(pipe)
    model = get_peft_model(transformer, LoraConfig(trainable_token_indices=image_token_rows(transformer.config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    card = create_card("adapter", repo_id="toy/adapter", base_model="toy/base")
    folder = export_adapter(model, tmp_path / "adapter", card, base_model="toy/base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("toy/base", "CAUSAL_LM")
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()

    loaded = NextFlowPipeline.from_pretrained(base)
    loaded.transformer.load_adapter(folder)
    drawn = drawn_by(loaded)
    assert not torch.equal(drawn, expected)
    snippet = card.text.split("```python\n")[1].split("```")[0].replace("toy/", f"{tmp_path}/")
    scope = {}
    exec(snippet.replace("torch.bfloat16", "torch.float32"), scope)
    assert type(scope["pipe"].transformer) is NextFlowForCausalLM and scope["image"].size == (16, 16)
    assert torch.equal(drawn_by(scope["pipe"]), drawn)


def drawn_by(pipe: NextFlowPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a", generator=torch.Generator().manual_seed(0), output_type="codes").image_codes


def test_peft_finds_the_base_model_by_itself(tmp_path):
    model = toy_model()
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(init_lora_weights=False))
    card = create_card("adapter", repo_id="toy/adapter", base_model="toy/base")
    folder = export_adapter(model, tmp_path / "adapter", card, base_model=str(tmp_path / "base"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert type(loaded.get_base_model()) is NextFlowForCausalLM
    torch.testing.assert_close(logits(loaded), logits(model.eval()))


def test_an_adapter_of_both_parts_in_one_fits_the_transformer_alone(tmp_path):
    export_pipeline(toy_pipeline(), tmp_path / "model", create_card("model", repo_id="toy/nextflow"))
    both = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "model")
    both = get_peft_model(both, LoraConfig(r=4, init_lora_weights=False, exclude_modules=VISION_TOKENIZER)).eval()
    trained = {name for name, parameter in both.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * len(MATRICES) and not any("vision_tokenizer" in name for name in trained)
    both.save_pretrained(tmp_path / "adapter")
    alone = NextFlowForCausalLM.from_pretrained(tmp_path / "model")
    text = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = alone(text).logits
        adapted = PeftModel.from_pretrained(alone, tmp_path / "adapter").eval()(text).logits
        torch.testing.assert_close(adapted, both(text).logits)
    assert not torch.allclose(adapted, plain)
