"""One model in two processes, each with a part of every matrix: the same text, images and gradients."""

import torch
import torch.distributed as dist
from processes import in_processes
from toy import BOI, SQUARE, grids_tensor, image_tokens, random_codes, toy_model
from transformers.distributed import DistributedConfig

from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM


ROW = torch.tensor([[5, *image_tokens(SQUARE), 7]])
IMAGES = {"image_codes": random_codes(SQUARE), "image_grids": grids_tensor(SQUARE)}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results_of(model: NextFlowForCausalLM) -> dict[str, torch.Tensor]:
    settings = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        results = {
            "logits": model.eval()(input_ids=ROW, **IMAGES).logits,
            "text": model.generate(ROW, **IMAGES, **settings),
            "codes": model.generate_images(
                torch.tensor([[5, BOI]]), image_grids=grids_tensor(SQUARE), temperature=0.0, guidance_scale=1.0
            ).image_codes,
        }
    loss = model.train()(input_ids=ROW, **IMAGES, labels=ROW).loss
    loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {name: whole(result).detach() for name, result in {**results, "loss": loss, **gradients}.items()}


def sharded_results(folder) -> tuple[bool, dict[str, torch.Tensor]]:
    dist.init_process_group("gloo")
    model = NextFlowForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    local = model.model.layers[0].mlp.gate_proj.weight.to_local()
    is_sharded = local.shape[0] == model.config.intermediate_size // 2
    results = results_of(model)
    dist.destroy_process_group()
    return is_sharded, {name: tensor.numpy() for name, tensor in results.items()}


def test_two_processes_are_one_model(tmp_path):
    toy_model().save_pretrained(tmp_path)
    expected = results_of(NextFlowForCausalLM.from_pretrained(tmp_path))
    for is_sharded, results in in_processes(sharded_results, tmp_path):
        assert is_sharded
        found = {name: torch.from_numpy(array) for name, array in results.items()}
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
