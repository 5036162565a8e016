"""After `import nextflow_hf`, every auto class of transformers gives the class that a user expects."""

import pytest
from toy_pipeline import toy_pipeline
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

import nextflow_hf


CLASSES = {
    AutoConfig: "NextFlowConfig",
    AutoModel: "NextFlowModel",
    AutoModelForCausalLM: "NextFlowForCausalLM",
    AutoModelForImageTextToText: "NextFlowForConditionalGeneration",
    AutoModelForMultimodalLM: "NextFlowForConditionalGeneration",
    AutoProcessor: "NextFlowProcessor",
}
VISION_TOKENIZER_CLASSES = {AutoConfig: "NextFlowVisionTokenizerConfig", AutoModel: "NextFlowVisionTokenizer"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pipe, folder = toy_pipeline(), tmp_path_factory.mktemp("repository")
    pipe.transformer.save_pretrained(folder)
    pipe.processor.save_pretrained(folder)
    pipe.vision_tokenizer.save_pretrained(folder / "vision_tokenizer")
    return folder


@pytest.mark.parametrize("auto_class", CLASSES)
def test_the_repository(folder, auto_class):
    assert type(auto_class.from_pretrained(folder)) is getattr(nextflow_hf, CLASSES[auto_class])


@pytest.mark.parametrize("auto_class", VISION_TOKENIZER_CLASSES)
def test_its_vision_tokenizer(folder, auto_class):
    expected = getattr(nextflow_hf, VISION_TOKENIZER_CLASSES[auto_class])
    assert type(auto_class.from_pretrained(folder, subfolder="vision_tokenizer")) is expected


def test_parts_of_the_processor(folder):
    processor = AutoProcessor.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    assert type(image_processor) is type(processor.image_processor)
    assert image_processor.to_dict() == processor.image_processor.to_dict()
    assert len(AutoTokenizer.from_pretrained(folder)) == len(processor.tokenizer)
