"""What training takes of the memory, by arithmetic: against sums worked out by hand, and what autograd keeps."""

import pytest
import torch
from toy import needs_fused_attention, toy_config

from nextflow_hf import NextFlowConfig, NextFlowForCausalLM, cli
from nextflow_hf.training.transformer.arguments import ModelArguments
from nextflow_hf.training.transformer.memory import adapter_bytes_per_token, layer_bytes_per_token, training_memory
from nextflow_hf.training.transformer.model_loading import add_adapter


def test_memory_of_the_7b():
    config = NextFlowConfig()
    body = 28 * (3584 * (3584 + 512 + 512 + 3584) + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584) + 3584
    tables = 2 * 184834 * 3584 + 32768 * 40 + 18 * 3584
    connector = 40 * 3584 + 3584 + 3584 * 3584 + 3584
    memory = training_memory(config, optim="adamw_torch_fused", dtype="float32", tokens=8192)
    assert memory.parameters == memory.trained_parameters == body + tables + connector
    assert memory.gradients == 4 * memory.parameters and memory.optimizer == 8 * memory.parameters
    assert not memory.fits(80)
    assert memory.checkpoints == 28 * 8192 * 3584 * 2
    selective = training_memory(config, dtype="float32", tokens=8192, selective=True)
    assert selective.checkpoints - memory.checkpoints == 28 * 8192 * 2 * (4 * 3584 + 2 * 512)
    half = training_memory(config, optim="paged_adamw_8bit")
    assert half.weights == half.gradients == 2 * memory.parameters
    embeddings = 184834 * 3584 + 32768 * 40 + 18 * 3584
    small = memory.parameters - embeddings
    assert half.optimizer == half.paged_optimizer == pytest.approx(8 * embeddings + small * 2 * (1 + 4 / 256))
    matrices = 28 * (3584 * (3584 + 512 + 512 + 3584) + 3 * 3584 * 18944)  # one state of Muon, two of AdamW
    assert training_memory(config, use_muon=True).optimizer == 2 * (2 * memory.parameters - matrices)
    assert half.fits(80) and training_memory(config, optim="adamw_8bit").fits(80)
    aligned = training_memory(config, trainable="alignment")
    assert aligned.trained_parameters == connector + 32770 * 3584
    lora = training_memory(config, trainable="lora", lora_r=16)
    shapes = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584), (3584, 18944), (3584, 18944), (18944, 3584)]
    assert lora.trained_parameters == 28 * 16 * sum(rows + columns for rows, columns in shapes)
    assert training_memory(config, trainable="qlora", optim="paged_adamw_8bit").fits(24)


@needs_fused_attention
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_what_a_layer_keeps_is_what_autograd_keeps(adapted):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = toy_config(**shape, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model = NextFlowForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
    expected = layer_bytes_per_token(config, frozen=adapted)
    if adapted:  # without dropout: on a CPU it keeps more than the byte of a mask
        model = add_adapter(model, ModelArguments("random", use_peft=True, lora_r=1, lora_dropout=0.0))
        inputs = 5 * 256 + 256 + 1024
        expected += adapter_bytes_per_token(config) - inputs - 2 * 4 * 1024  # what is there only while it is read
    tokens, kept = 512, {}
    embeds = torch.randn(1, tokens, 256, dtype=torch.bfloat16, requires_grad=True)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    decoder = model.get_base_model().model if adapted else model.model
    positions = decoder.rotary_emb(embeds, torch.arange(tokens).float().expand(3, 1, tokens))
    shared = {tensor.untyped_storage().data_ptr() for tensor in positions}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters | shared:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=adapted),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        decoder.layers[0](embeds, attention_mask=None, position_embeddings=positions)
    measured = sum(size for size, _ in kept.values()) / tokens
    assert expected == pytest.approx(measured, rel=0.02)


def test_the_command_prints_a_recipe_and_other_ways(capsys):
    assert cli.main(["memory", "sft_1024", "lora_r=8", "--tokens", "4096", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "7.865B" in printed and "| this recipe | 7.865B | 5.7 | 3.9 | 7.9 |" in printed
    assert cli.main(["memory", "sft_1024_24gb", "--gpu-gb", "24"]) == 0
    assert "20480 tokens a micro-batch" in (printed := capsys.readouterr().out)
    assert "| this recipe | 0.040B | 6.5 | 0.2 |" in printed and "| all, paged_adamw_8bit, bfloat16 |" in printed
    muon = ["use_muon=true", "optim=adamw_torch"]
    assert cli.main(["memory", "sft_1024_24gb", *muon]) == 2
    assert "use_peft trains an adapter" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["memory", "sft_1024", "--gpus", "0"])
    with pytest.raises(ValueError, match="expected one of"):
        training_memory(NextFlowConfig(), optim="adam")
