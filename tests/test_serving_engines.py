"""The calls that inference engines and evaluation harnesses make on our pipeline, with the defaults that they send.

The sets of arguments are data, read from vLLM-Omni 0.30.0 (diffusers_adapter/pipeline_diffusers_adapter.py,
diffusion_engine.py), SGLang 0.5.23 (pipelines/diffusers_pipeline.py, sample/diffusers_generic.py) and EvalScope 1.14.1
(models/text2image_model.py, image_edit_model.py, config.py).
"""

import base64
import io
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.commands import transformers_cli
from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.pipelines import helpers_nextflow
from nextflow_hf.serving import plugins


VLLM_OMNI = {"num_images_per_prompt": 1, "resolution": 640}
SGLANG = {
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 30,
    "guidance_scale": 7.5,
    "output_type": "pt",
}
EVALSCOPE = {"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 9.0}
SOURCE = Image.new("RGB", (16, 16), "red")
WHOLE = 4  # scales of a toy's image
CALLS = {
    "vLLM-Omni, generation": (VLLM_OMNI, WHOLE),
    "vLLM-Omni, generation with a size": ({**VLLM_OMNI, "height": 1024, "width": 1024}, WHOLE),
    "vLLM-Omni, warm-up": (
        {**VLLM_OMNI, "height": 512, "width": 512, "num_inference_steps": 1, "guidance_scale": 0.0, "image": SOURCE},
        1,
    ),
    "vLLM-Omni, edit": (
        {**VLLM_OMNI, "image": [SOURCE, SOURCE], "negative_prompt": "b", "guidance_scale": 4.0},
        WHOLE,
    ),
    "vLLM-Omni, output type": ({**VLLM_OMNI, "output_type": "np", "num_inference_steps": 50}, WHOLE),
    "SGLang, generation": (SGLANG, WHOLE),
    "SGLang, two images": ({**SGLANG, "num_images_per_prompt": 2, "negative_prompt": "b"}, WHOLE),
    "SGLang, edit": ({**SGLANG, "image": SOURCE}, WHOLE),
    "EvalScope, text to image": (EVALSCOPE, WHOLE),
    "EvalScope, edit": ({"image": SOURCE, "num_inference_steps": 50}, WHOLE),
}
# In the order in which vLLM-Omni tries them, on CUDA, by default; the first that does not raise is used.
VLLM_OMNI_BACKENDS = [
    "_flash_3_hub", "_flash_3_varlen_hub", "_flash_3", "_flash_varlen_3", "flash_hub", "flash_varlen_hub", "flash",
    "flash_varlen", "_native_flash",
]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


@pytest.fixture
def warnings(monkeypatch):
    """What the pipeline warns of, as if for the first time."""
    helpers_nextflow.warn_once.cache_clear()
    said: list[str] = []
    monkeypatch.setattr(helpers_nextflow.logger, "warning", said.append)
    return said


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_engines(pipe, name):
    arguments, num_scales = CALLS[name]
    with torch.inference_mode():  # as vLLM-Omni calls it
        output = pipe(prompt="a cat", **arguments, generator=torch.Generator().manual_seed(0))
    count = arguments.get("num_images_per_prompt", 1)
    assert len(output.images) == count
    assert (output.image_grids.prod(-1) > 0).sum() == count * num_scales
    if arguments.get("output_type") == "pt":
        assert output.images.shape == (count, 3, 16, 16)


def test_a_resolution_that_no_model_has_is_the_nearest_with_one_warning(pipe, warnings):
    images = [pipe("a", resolution=11, generator=torch.Generator().manual_seed(0)).images[0] for _ in range(2)]
    assert [image.size for image in images] == [(12, 12)] * 2
    assert warnings == ["`resolution` is 11, which is none of (4, 8, 12, 16): the nearest is taken, 12"]


def test_a_size_wins_over_a_resolution_that_no_model_has(pipe, warnings):
    assert pipe("a", resolution=5, height=16, width=16).images[0].size == (16, 16)
    assert warnings == ["`resolution` is 5, which is none of (4, 8, 12, 16): `height` and `width` say the size"]


def test_more_steps_than_scales_are_all_scales_with_one_warning(pipe, warnings):
    images = [pipe("a", num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).images[0]
              for steps in (30, 30, 4)]  # fmt: skip
    assert images[0].tobytes() == images[2].tobytes()
    assert warnings == ["`num_inference_steps` is 30, more than the scales of an image: all are sampled"]
    with pytest.raises(ValueError, match="`num_scales` is 30, expected at most 4"):
        pipe("a", num_scales=30)


def test_engines_choose_an_attention_that_can_mask():
    """Flash kernels raise, so that the engine goes on to one that reads prompts with images."""
    transformer = toy_pipeline().transformer
    transformer.set_attn_implementation("eager")
    chosen = None
    for name in VLLM_OMNI_BACKENDS:
        try:
            transformer.set_attention_backend(name)
        except ValueError as error:
            assert "others take no mask" in str(error)
        else:
            chosen = name
            break
    assert chosen == "_native_flash" and transformer.config._attn_implementation == "sdpa"
    transformer.set_attention_backend("flex")
    assert transformer.config._attn_implementation == "flex_attention"
    transformer.set_attention_backend("native")
    assert transformer.config._attn_implementation == transformer.model.config._attn_implementation == "sdpa"


# ---- entry points


def modules(monkeypatch, **contents):
    """Modules of an engine that is not installed, with what our plugin takes from them; `__` stands for a dot."""
    for name, content in contents.items():
        name = name.replace("__", ".")
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            part = ".".join(parts[:count])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        for key, value in content.items():
            setattr(sys.modules[name], key, value)
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], sys.modules[name], raising=False)


def test_entry_points_name_functions_of_ours():
    groups = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups == {
        "vllm_omni.general_plugins": {"nextflow": "nextflow_hf.serving.plugins:register_with_vllm_omni"},
        "sglang.multimodal_gen.plugins": {"nextflow": "nextflow_hf.serving.plugins:register_with_sglang"},
        "lmms_eval.models": {"nextflow": "nextflow_hf.serving.plugins:lmms_eval_manifest"},
    }
    for group in groups.values():
        assert callable(getattr(plugins, group["nextflow"].partition(":")[2]))


def test_vllm_omni_leaves_resolution_and_guidance_to_the_model(monkeypatch):
    class Utils:
        pass

    class Sampling:
        resolution = 640
        guidance_scale_provided = False

    registry = {}
    content = {"BasePipelineUtils": Utils, "PIPELINE_UTILS_REGISTRY": registry}
    modules(monkeypatch, vllm_omni__diffusion__models__diffusers_adapter__pipeline_utils=content)
    for _ in range(2):  # in every process, maybe several times
        plugins.register_with_vllm_omni()
    own = registry["NextFlowPipeline"]()
    assert isinstance(own, Utils)
    for resolution, left in ((640, {}), (8, {"resolution": 8})):
        arguments = {"resolution": resolution, "guidance_scale": 1.0}  # which stands for "not given"
        own.update_call_kwargs(None, Sampling(), None, arguments)
        assert arguments == left
    Sampling.guidance_scale_provided = True
    own.update_call_kwargs(None, Sampling(), None, arguments := {"guidance_scale": 1.0})
    assert arguments == {"guidance_scale": 1.0}


def test_sglang_learns_that_the_model_takes_images(monkeypatch):
    registered = {}
    configs = "sglang__multimodal_gen__configs__"
    contents = {
        "sglang__multimodal_gen__registry": {"register_configs": lambda **given: registered.update(given)},
        f"{configs}pipeline_configs__diffusers_generic": {"DiffusersTI2IPipelineConfig": "images"},
        f"{configs}sample__diffusers_generic": {"DiffusersGenericSamplingParams": "defaults"},
    }
    modules(monkeypatch, **contents)
    plugins.register_with_sglang()
    (detects,) = registered.pop("model_detectors")
    assert registered == {"sampling_param_cls": "defaults", "pipeline_config_cls": "images"}
    assert detects("nextflowpipeline") and not detects("fluxpipeline")


# ---- the engines' own adapters, where they are installed: docs/serving says how on a CPU


@pytest.fixture(scope="module")
def shapes():
    pipe = NextFlowPipeline.from_pretrained(shapes_model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.engine
def test_vllm_omni_adapter(shapes):
    pytest.importorskip("vllm_omni")
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    plugins.register_with_vllm_omni()
    config = OmniDiffusionConfig(
        model=str(shapes_model_path()),
        dtype=torch.float32,
        diffusion_load_format="diffusers",
        model_class_name=plugins.PIPELINE,
    )
    adapter = DiffusersAdapterPipeline(od_config=config, device=torch.device("cpu"))
    adapter.load_weights()

    def ask(prompt, **sampling):
        params = OmniDiffusionSamplingParams(seed=1, generator_device="cpu", **sampling)
        request = OmniDiffusionRequest(prompt=prompt, sampling_params=params, request_id="1")
        (image,) = adapter.forward(DiffusionRequestBatch([request])).output
        return image.tobytes()

    def own(*args, **options):
        return shapes(*args, **options, generator=torch.Generator().manual_seed(1)).images[0].tobytes()

    prompt = "a blue square left of a green circle"
    assert ask(prompt) == own(prompt)
    options = {"guidance_scale": 4.0, "height": 64, "width": 64}
    assert ask({"prompt": prompt, "negative_prompt": "red"}, **options) == own(
        prompt, negative_prompt="red", **options
    )
    edit = {"prompt": "make the circle blue", "multi_modal_data": {"image": SOURCE.resize((64, 64))}}
    assert ask(edit) == own("make the circle blue", image=SOURCE.resize((64, 64)))
    ask({"prompt": "dummy", "multi_modal_data": {"image": SOURCE}}, num_inference_steps=1, height=512, width=512)


# ---- transformers serve


def test_transformers_serve_answers_about_images(monkeypatch):
    """The command, up to its server's socket."""
    apps = []
    monkeypatch.setattr(uvicorn, "Server", lambda config: types.SimpleNamespace(run=lambda: apps.append(config.app)))
    assert transformers_cli.main(["serve", "--device", "cpu", "--dtype", "float32"]) == 0
    buffer = io.BytesIO()
    SOURCE.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what color is it"}]
    model = str(shapes_model_path())
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    with TestClient(apps[0]) as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    own = [{"role": "user", "content": [{"type": "image", "image": SOURCE}, content[1]]}]
    expected = NextFlowPipeline.from_pretrained(model, dtype=torch.float32).chat(own, max_new_tokens=4)
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_transformers_cli_is_passed_through(capsys):
    assert transformers_cli.main(["serve", "--help"]) == 0
    assert "Usage: transformers serve" in capsys.readouterr().out
