"""SGLang's own adapter on the shown model, where it is installed: docs/serving/sglang.md says how on a CPU."""

from importlib.util import find_spec

import pytest
import torch


if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed", allow_module_level=True)
# torchvision of PyPI is built for CUDA: beside a CPU's torch its operators are missing, which nothing here calls.
# Before transformers, which imports torchvision where it finds it.
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
if torch.version.cuda is None:
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image  # noqa: E402
from test_serving_engines import SGLANG  # noqa: E402

from nextflow_hf import NextFlowPipeline  # noqa: E402
from nextflow_hf.hub_cards import shapes_model_path  # noqa: E402
from nextflow_hf.serving import plugins  # noqa: E402


pytestmark = pytest.mark.engine


def test_sglang_adapter(tmp_path):
    from sglang.multimodal_gen import registry
    from sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline import DiffusersExecutionStage
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    plugins.register_with_sglang()
    folder = str(tmp_path / "model")
    pipe = NextFlowPipeline.from_pretrained(shapes_model_path(), dtype=torch.bfloat16)  # as SGLang loads it
    pipe.save_pretrained(folder)  # it wants a folder for every component
    info = registry.get_model_info(folder, backend="diffusers")
    args = ServerArgs.from_kwargs(model_path=folder, backend="diffusers")
    set_global_server_args(args)
    assert args.pipeline_config.task_type.name == "TI2I"
    stage = DiffusersExecutionStage(info.pipeline_cls(folder, args).diffusers_pipe)
    source = Image.new("RGB", (16, 16), "red")
    source.save(tmp_path / "source.png")
    for given, own in (({}, {}), ({"image_path": str(tmp_path / "source.png")}, {"image": source})):
        request = Req(sampling_params=info.sampling_param_cls(prompt="a red circle", seed=1, **given))
        expected = pipe("a red circle", **SGLANG, **own, generator=torch.Generator().manual_seed(1)).images
        assert torch.equal(stage.forward(request, args).output, expected.float())
