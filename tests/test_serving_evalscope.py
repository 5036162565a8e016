"""EvalScope's own adapters of images on a pipeline in this process, with its defaults. Few people have it."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path


pytest.importorskip("evalscope")
pytest.importorskip("modelscope")

pytestmark = pytest.mark.slow
OPTIONS = {"torch_dtype": "float32", "device_map": "cpu", "pipeline_cls": "DiffusionPipeline"}


def image_of(output) -> Image.Image:
    uri = output.choices[0].message.content[0].image
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def alike(first: Image.Image, second: Image.Image) -> bool:
    """But for JPEG, as which EvalScope hands images on."""
    return np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() < 5


def test_generation_and_editing():
    from evalscope.api.messages import ChatMessageUser, ContentImage, ContentText
    from evalscope.api.model import GenerateConfig
    from evalscope.models.image_edit_model import ImageEditAPI
    from evalscope.models.text2image_model import Text2ImageAPI

    model = str(shapes_model_path())
    pipe = NextFlowPipeline.from_pretrained(model, dtype=torch.float32)
    config = GenerateConfig(height=1024, width=1024, num_inference_steps=50, guidance_scale=9.0)
    makes, edits = Text2ImageAPI(model, **OPTIONS), ImageEditAPI(model, **OPTIONS)
    torch.manual_seed(0)
    output = makes.generate([ChatMessageUser(content="a red circle")], [], "none", config)
    torch.manual_seed(0)
    assert alike(image_of(output), pipe("a red circle", guidance_scale=9.0).images[0])
    uri = output.choices[0].message.content[0].image
    messages = [ChatMessageUser(content=[ContentText(text="make the circle blue"), ContentImage(image=uri)])]
    torch.manual_seed(0)
    edited = edits.generate(messages, [], "none", GenerateConfig(num_inference_steps=50))
    torch.manual_seed(0)
    assert alike(image_of(edited), pipe("make the circle blue", image=image_of(output)).images[0])
