"""HPSv3 and sequence classifiers as rewards, on random weights in their published layout."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BatchFeature,
    LayoutLMv3Config,
    LayoutLMv3ForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from nextflow_hf.training.rewards.hpsv3 import CHAT, INSTRUCTION, HPSv3Reward, reward_head
from nextflow_hf.training.rewards.preference import SequenceScoreReward


SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|pad|>"]
IMAGES = [
    Image.new("RGB", size, color) for size, color in [((64, 64), "red"), ((96, 48), "green"), ((30, 70), "blue")]
]
PROMPTS = ["a", "two words", "a <|Reward|> and <|image_pad|>"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny Qwen2-VL, and the model with the reward token among its embeddings."""
    folder = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>")
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {
        "num_key_value_heads": 1,
        "vocab_size": 300,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    text["rope_parameters"]["mrope_section"] = [1, 1, 2]
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    config.text_config.vocab_size = len(tokenizer) + 1
    return folder, Qwen2VLForConditionalGeneration(config).eval(), len(tokenizer)


@pytest.mark.parametrize("layout", ["published", "today"])
def test_hpsv3(base, layout, tmp_path):
    """The whole of it written out: instruction, image of 256 tokens, plain positions, and the first output."""
    folder, model, reward_id = base
    torch.manual_seed(1)
    head = reward_head(16)
    weights = {**model.state_dict(), **{f"rm_head.{name}": weight for name, weight in head.state_dict().items()}}
    if layout == "published":  # by transformers 4.45
        names = {name: re.sub(r"^model\.visual\.", "visual.", name) for name in weights}
        weights = {
            re.sub(r"^model\.language_model\.", "model.", names[name]): weight for name, weight in weights.items()
        }
        assert {"visual.merger.ln_q.weight", "model.norm.weight", "lm_head.weight", "rm_head.5.bias"} <= set(weights)
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, tmp_path / "HPSv3.safetensors")
    options = {"processor_id": str(folder), "device": "cpu", "dtype": torch.float32, "batch_size": 2}
    reward = HPSv3Reward(str(tmp_path), **options)
    got = reward(images=IMAGES, prompts=PROMPTS)

    for image, prompt, value in zip(IMAGES, PROMPTS, got):
        side = {(64, 64): (128, 128), (96, 48): (184, 96), (30, 70): (88, 200)}[image.size]
        pixels = reward.processor(images=[image.resize(side)], do_resize=False, return_tensors="pt")
        assert pixels["image_grid_thw"].tolist() == [[1, side[1] // 4, side[0] // 4]]
        tokens = side[0] * side[1] // 64
        assert 256 <= tokens < 280
        text = CHAT.format(image="<|image_pad|>" * tokens, text=INSTRUCTION.format(prompt=prompt.replace("<|", "< |")))
        ids = reward.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            embeds = model.model.language_model.embed_tokens(ids)
            features = model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
            embeds[ids == model.config.image_token_id] = features
            positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
            states = model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
            mean, _ = head.eval()(states[ids == reward_id])[0]
        assert value == pytest.approx(mean.item(), rel=1e-4, abs=1e-5)
    assert len(set(got)) == 3 and reward.__name__ == tmp_path.name

    del weights["rm_head.0.bias" if layout == "today" else "visual.merger.ln_q.weight"]
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, tmp_path / "HPSv3.safetensors")
    with pytest.raises((ValueError, RuntimeError), match="rm_head|0.bias|visual.merger.ln_q.weight"):
        HPSv3Reward(str(tmp_path), **options)(images=IMAGES[:1], prompts=["a"])
    assert HPSv3Reward().model_id == "MizzenAI/HPSv3"


class TinyProcessor:
    chat_template = None

    def __call__(self, images, text, padding, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == (True, True, "pt")
        rows = [[ord(letter) % 40 for letter in row] for row in text]
        length = max(map(len, rows))
        pixels = np.stack([np.asarray(image.resize((8, 8)), np.float32).transpose(2, 0, 1) / 255 for image in images])
        return BatchFeature({
            "input_ids": torch.tensor([row + [1] * (length - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            "pixel_values": torch.from_numpy(pixels),
        })  # fmt: skip


class ChatProcessor(TinyProcessor):
    chat_template = "{{ messages }}"

    def apply_chat_template(self, conversations, tokenize, return_dict, **options):
        images, texts = [], []
        for ((message,),) in zip(conversations):
            assert tokenize and return_dict and message["role"] == "user"
            image, text = message["content"]
            images.append(image["image"])
            texts.append(text["text"])
        return self(images, texts, truncation=True, **options)


@pytest.mark.parametrize("processor", [TinyProcessor(), ChatProcessor()])
@pytest.mark.parametrize("labels", [["score"], ["bad", "good"]])
def test_sequence_classifiers(processor, labels, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {
        "vocab_size": 50,
        "input_size": 8,
        "patch_size": 4,
        "coordinate_size": 2,
        "shape_size": 4,
        "pad_token_id": 1,
    }
    model = LayoutLMv3ForSequenceClassification(LayoutLMv3Config(**sizes, id2label=dict(enumerate(labels)))).eval()
    model.save_pretrained(tmp_path)
    label = "good" if len(labels) == 2 else None
    reward = SequenceScoreReward(str(tmp_path), label=label, device="cpu", batch_size=2)
    reward.processor = processor
    got = reward(images=IMAGES, prompts=PROMPTS)
    for image, prompt, value in zip(IMAGES, PROMPTS, got):
        with torch.no_grad():
            logits = model(**TinyProcessor()([image], [prompt], True, True, "pt")).logits[0]
        assert value == pytest.approx((logits.softmax(-1)[1] if label else logits[0]).item(), rel=1e-3, abs=1e-5)
    assert len(set(got)) == 3
    if label:
        with pytest.raises(ValueError, match="name one with `label`"):
            SequenceScoreReward(str(tmp_path), device="cpu")(images=IMAGES, prompts=PROMPTS)
