"""The pipeline among diffusers' own: every loader finds it, local or on a Hub; what is saved is what was; the command
line runs it; one thread at a time."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    PipelineQuantizationConfig,
)
from diffusers.pipelines import auto_pipeline
from huggingface_hub import constants, hf_api
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from toy_decoder import toy_whole_pipeline
from toy_hub import ToyHub
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import export_pipeline, push_folder


IMAGE = Image.new("RGB", (20, 12), "red")


def draw(pipe: NextFlowPipeline, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a", generator=torch.Generator().manual_seed(0), output_type="codes", **options).image_codes


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    return toy_pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """One repository for transformers and diffusers."""
    card = create_card("model", repo_id="toy/nextflow")
    return export_pipeline(pipe, tmp_path_factory.mktemp("export") / "nextflow", card, include_code=False)


@pytest.fixture(scope="module")
def hub(pipe, tmp_path_factory):
    home = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch, ToyHub() as hub:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made anew, with this address
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", home)
        card = create_card("model", repo_id="your-name/nextflow")
        folder = export_pipeline(pipe, tmp_path_factory.mktemp("pushed"), card, max_shard_size="60KB")
        push_folder(folder, "toy/nextflow", token="toy")
        yield hub.url, home


# --- loading

LOADERS = [NextFlowPipeline, DiffusionPipeline, AutoPipelineForText2Image, AutoPipelineForImage2Image]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_every_loader_finds_it_in_a_folder(pipe, folder, loader):
    loaded = loader.from_pretrained(folder)
    assert type(loaded) is NextFlowPipeline
    assert torch.equal(draw(loaded, image=IMAGE), draw(pipe, image=IMAGE))


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_every_loader_finds_it_on_a_hub(pipe, hub, loader):
    loaded = loader.from_pretrained("toy/nextflow", cache_dir=hub[1])
    assert type(loaded) is NextFlowPipeline
    assert torch.equal(draw(loaded), draw(pipe))


def test_one_pipeline_becomes_the_other(pipe):
    """The class of both tasks is one; no weight is copied."""
    for auto in (AutoPipelineForText2Image, AutoPipelineForImage2Image):
        other = auto.from_pipe(pipe)
        assert type(other) is NextFlowPipeline
        assert all(other.components[name] is component for name, component in pipe.components.items())


def test_the_tables_that_registration_writes_are_there():
    """Private to diffusers: when this fails, registration.py must be looked at."""
    assert auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["nextflow"] is NextFlowPipeline
    assert auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["nextflow"] is NextFlowPipeline
    # Only listed tables are searched for a class's name.
    for table in (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING):
        assert any(table is known for known in auto_pipeline.SUPPORTED_TASKS_MAPPINGS)


@pytest.mark.parametrize(
    "imports",
    [
        "import nextflow_hf; from diffusers import AutoPipelineForText2Image",
        "from diffusers import AutoPipelineForText2Image; import nextflow_hf",
    ],
)
def test_the_auto_class_knows_it_in_either_order_of_imports(imports):
    script = f"""
{imports}
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
assert AUTO_TEXT2IMAGE_PIPELINES_MAPPING["nextflow"] is nextflow_hf.NextFlowPipeline
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_diffusers_command_line(pipe, folder, hub, tmp_path):
    """`nextflow-hf diffusers` is diffusers' own, with NextFlow known to it; here on a folder, then on a Hub."""
    adapted = toy_pipeline().transformer
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    NextFlowPipeline.save_lora_weights(
        tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(adapted, save_embedding_layers=False)
    )
    IMAGE.save(tmp_path / "image.png")
    local = [
        "run",
        "--model",
        folder,
        "--seed",
        0,
        "--output",
        tmp_path / "local.png",
        "--vae-tiling",
        "--vae-slicing",
    ]
    local += ["--lora", json.dumps({"lora_id": str(tmp_path / "lora")}), "--pipeline-kwargs"]
    local += [json.dumps({"prompt": "a", "image": str(tmp_path / "image.png"), "guidance_scale": 2.0})]
    served = ["run", "--model", "toy/nextflow", "--seed", 0, "--output", tmp_path / "served.png", "--pipeline-kwargs"]
    served += [json.dumps({"prompt": "a"})]
    commands = [local, served, ["schema", "--model", "toy/nextflow"]]
    main = "import json, sys; from nextflow_hf import cli\nfor line in sys.argv[1:]: cli.main(json.loads(line))"
    result = subprocess.run(
        [sys.executable, "-c", main, *(json.dumps(["diffusers", *map(str, command)]) for command in commands)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_ENDPOINT": hub[0],
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr

    loaded = NextFlowPipeline.from_pretrained(folder)
    loaded.load_lora_weights(tmp_path / "lora")
    expected = loaded("a", image=IMAGE, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0]
    drawn = Image.open(tmp_path / "local.png")
    assert drawn.size == (20, 12) and drawn.tobytes() == expected.tobytes()
    expected = pipe("a", generator=torch.Generator().manual_seed(0)).images[0]
    assert Image.open(tmp_path / "served.png").tobytes() == expected.tobytes()
    assert "image_guidance_scale" in result.stdout and "num_scales" in result.stdout


# --- saving


def test_shards_and_variants(pipe, tmp_path):
    half = toy_pipeline().to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant="bf16", max_shard_size="30KB")
    assert len(list((tmp_path / "transformer").glob("model.bf16-*.safetensors"))) > 2
    loaded = NextFlowPipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert torch.equal(draw(loaded), draw(half))
    for name in ("transformer", "vision_tokenizer"):
        weights = getattr(half, name).state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in getattr(loaded, name).state_dict().items())
    with pytest.raises((ValueError, OSError), match="variant"):
        NextFlowPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_dtype_for_every_component(folder):
    dtype = {"transformer": torch.bfloat16, "default": torch.float32}
    loaded = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    assert (loaded.transformer.dtype, loaded.vision_tokenizer.dtype) == (torch.bfloat16, torch.float32)
    assert loaded("a", image=IMAGE, output_type="pt").images.isfinite().all()


def test_device_map(pipe, folder):
    loaded = NextFlowPipeline.from_pretrained(folder, device_map="cpu")
    assert torch.equal(draw(loaded, image=IMAGE), draw(pipe, image=IMAGE))
    assert not any(weight.is_meta for weight in loaded.transformer.parameters())


def test_a_quantised_transformer(tmp_path):
    blocks = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    toy_pipeline(**blocks).save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        components_to_quantize=["transformer"],
    )
    loaded = NextFlowPipeline.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert loaded.transformer.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert loaded.vision_tokenizer.dtype == torch.bfloat16
    assert loaded("a", image=IMAGE, guidance_scale=2.0, output_type="pt").images.isfinite().all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved pipeline with a diffusion decoder and every part of it that a UNet has."""
    pipe = toy_whole_pipeline()
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("whole")
    pipe.save_pretrained(folder)
    return pipe, folder


def test_the_diffusion_decoder_is_saved_and_loaded(whole):
    pipe, folder = whole
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    options = {"decoder": "diffusion", "decoder_num_inference_steps": 2, "output_type": "pt"}
    one, other = (each("a", generator=torch.Generator().manual_seed(0), **options).images for each in (pipe, loaded))
    torch.testing.assert_close(one, other)


def test_the_diffusion_decoder_is_left_out(whole, tmp_path):
    pipe, folder = whole
    loaded = NextFlowPipeline.from_pretrained(folder, diffusion_decoder=None, decoder_vae=None)
    absent = {name for name, part in loaded.components.items() if part is None}
    assert {"diffusion_decoder", "decoder_vae"} <= absent and "decoder_scheduler" not in absent
    assert torch.equal(draw(loaded), draw(pipe))
    with pytest.raises(ValueError, match="this pipeline has no diffusion decoder"):
        loaded("a", decoder="diffusion")
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / "diffusion_decoder").exists()
    again = NextFlowPipeline.from_pretrained(tmp_path)
    assert again.diffusion_decoder is None and again.decoder_vae is None
    assert torch.equal(draw(again), draw(pipe))


# --- threads


def in_a_thread(function) -> object:
    """What `function` returns or raises in a thread of its own."""
    result = []

    def run():
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def test_a_second_thread_is_turned_away(pipe):
    expected, errors = draw(pipe, guidance_scale=9.0), []

    def callback(pipe, step, scale, kwargs):
        errors.append(in_a_thread(lambda: pipe("b", guidance_scale=1.0)))
        errors.append(in_a_thread(lambda: conversation.generate_image("b", guidance_scale=1.0)))

    conversation = pipe.start_conversation()
    assert torch.equal(draw(pipe, guidance_scale=9.0, callback_on_step_end=callback), expected)
    assert len(errors) == 8 and all(type(error) is RuntimeError for error in errors)
    assert "NextFlowPipeline(**pipe.components)" in str(errors[0])
    assert torch.equal(in_a_thread(lambda: draw(pipe, guidance_scale=9.0)), expected)  # afterwards it may


def test_an_error_lets_the_next_thread_in(pipe):
    with pytest.raises(ValueError):
        pipe()
    assert torch.equal(in_a_thread(lambda: draw(pipe)), draw(pipe))


def test_a_thread_each_on_the_same_weights(pipe):
    """They take turns at every scale."""
    turns, drawn = threading.Barrier(2, timeout=60), {}

    def callback(pipe, step, scale, kwargs):
        turns.wait()

    def run(guidance_scale: float):
        own = NextFlowPipeline(**pipe.components)
        drawn[guidance_scale] = draw(own, guidance_scale=guidance_scale, callback_on_step_end=callback)

    threads = [threading.Thread(target=run, args=(value,)) for value in (1.0, 5.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(drawn[1.0], draw(pipe, guidance_scale=1.0))
    assert torch.equal(drawn[5.0], draw(pipe, guidance_scale=5.0))
