"""The composite: pixels for codes everywhere, one repository with its parts, and transformers' pipelines."""

import json
import shutil

import pytest
import torch
import transformers
from PIL import Image
from toy_pipeline import toy_pipeline
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.pipelines import any_to_any, image_text_to_text

from nextflow_hf import (
    NextFlowForConditionalGeneration,
    NextFlowGenerationConfig,
    NextFlowPipeline,
    NextFlowVisionTokenizer,
)
from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig


GREEDY = {"do_sample": False, "image_temperature": 0.0}
SQUARE = [[1, 1], [2, 2], [3, 3], [4, 4]]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("tried to reach the network"))


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    pipe = toy_pipeline()
    pipe.transformer.generation_config = NextFlowGenerationConfig(
        eos_token_id=pipe.transformer.config.eos_token_id,
        pad_token_id=pipe.transformer.config.pad_token_id,
        image_target_grids=SQUARE,
    )
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """Laid out as the pipeline's repository: it is what the parts write themselves."""
    folder = tmp_path_factory.mktemp("repository")
    pipe.transformer.save_pretrained(folder)
    pipe.processor.save_pretrained(folder)
    pipe.vision_tokenizer.save_pretrained(folder / "vision_tokenizer")
    return folder


@pytest.fixture(scope="module")
def model(folder) -> NextFlowForConditionalGeneration:
    return AutoModelForMultimodalLM.from_pretrained(folder)


def test_a_folder_without_a_vision_tokenizer_says_so(pipe, tmp_path):
    """Whoever loads it, and whatever lies there instead; and what makes one."""
    pipe.transformer.save_pretrained(tmp_path / "alone")
    pipe.save_pretrained(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "vision_tokenizer")
    shutil.copy(tmp_path / "alone" / "config.json", tmp_path / "pipe")  # laid out as a repository of all classes
    for load in (
        lambda: NextFlowForConditionalGeneration.from_pretrained(tmp_path / "alone"),
        lambda: NextFlowVisionTokenizer.from_pretrained(tmp_path / "alone"),
        lambda: NextFlowPipeline.from_pretrained(tmp_path / "pipe"),
    ):
        with pytest.raises(
            FileNotFoundError, match="no vision tokenizer in .*`nextflow-hf convert tokenflow`"
        ) as error:
            load()
        assert "\n" not in str(error.value)


def messages(*parts, color: str = "red"):
    image = Image.new("RGB", (16, 16), color)
    content = [
        {"type": "image", "image": image} if part == "<image>" else {"type": "text", "text": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs_of(pipe, conversation, **options):
    return pipe.processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", **{"generation_mode": "text", **options}
    )


def codes_of(pipe, inputs, count: int):
    return pipe.vision_tokenizer.encode(inputs["pixel_values"], inputs["image_grids"][:count]).image_codes


# ---- one repository


def test_parts_are_bit_exact(pipe, model):
    assert type(model) is NextFlowForConditionalGeneration
    expected = pipe.transformer.state_dict()
    expected |= {f"vision_tokenizer.{name}": value for name, value in pipe.vision_tokenizer.state_dict().items()}
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items()
    )
    assert model.config.vision_tokenizer_config.to_dict() == model.vision_tokenizer.config.to_dict()
    assert not model.training and not any(p.requires_grad for p in model.vision_tokenizer.parameters())


def test_it_saves_the_repository_it_came_from(pipe, folder, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert model.config.vision_tokenizer_config is not None
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    files -= {name for name in files if name.endswith(".py")}  # tests/test_remote_code.py
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "vision_tokenizer/config.json",
        "vision_tokenizer/model.safetensors",
    }
    for name in files - {"config.json", "vision_tokenizer/config.json"}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    config, source = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert config.pop("architectures") == ["NextFlowForConditionalGeneration"]
    assert source.pop("architectures") == ["NextFlowForCausalLM"]
    # A save adds the auto class of its own to those it was loaded with; the exporter names all.
    assert source["auto_map"].keys() == {"AutoConfig", "AutoModelForCausalLM"}
    assert config.pop("auto_map").keys() - source.pop("auto_map").keys() == {"AutoModelForMultimodalLM"}
    assert config == source
    # and so everything that reads the one reads the other
    again = NextFlowForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    transformer = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = transformer.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in pipe.transformer.state_dict().items())


def test_a_given_state_dict_is_what_is_saved(model, tmp_path):
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    for value in state_dict.values():
        value += 1
    model.save_pretrained(tmp_path, state_dict=state_dict)
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state_dict.items())


def test_dtype_and_device_map(folder):
    half = NextFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16 and half.vision_tokenizer.quant_conv.weight.dtype == torch.bfloat16
    quantizer = half.vision_tokenizer.quantizer
    assert {parameter.dtype for parameter in quantizer.parameters()} == {torch.float32}
    parts = NextFlowForConditionalGeneration.from_pretrained(
        folder, dtype={"": torch.bfloat16, "vision_tokenizer": torch.float32}, device_map={"": "cpu"}
    )
    assert parts.dtype == torch.bfloat16 and parts.vision_tokenizer.dtype == torch.float32
    apart = NextFlowForConditionalGeneration.from_pretrained(
        folder, device_map={"model": "cpu", "lm_head": "cpu", "vision_tokenizer": "cpu"}
    )
    assert {parameter.device.type for parameter in apart.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="expected an entry 'vision_tokenizer' or one for all"):
        NextFlowForConditionalGeneration.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "cpu"})


def test_loading_info_names_both_parts(folder):
    _, info = NextFlowForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_missing_vision_tokenizer_is_an_error(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="vision_tokenizer"):
        NextFlowForConditionalGeneration.from_pretrained(tmp_path)


def test_from_a_configuration_with_both(model):
    config = NextFlowConfig.from_dict(model.config.to_dict())
    fresh = AutoModelForMultimodalLM.from_config(config)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    config.vision_tokenizer_config.codebook_size += 1
    with pytest.raises(ValueError, match="has 25 codes, the transformer 24"):
        NextFlowForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["vision_tokenizer", "vision_tokenizer_config"])
def test_attention_of_both_and_of_each(folder, name):
    def of(model) -> tuple[str, str, str]:
        parts = (model, model.vision_tokenizer, model.vision_tokenizer.semantic_encoder)
        return tuple(part.config._attn_implementation for part in parts)

    load = NextFlowForConditionalGeneration.from_pretrained
    assert of(load(folder, attn_implementation="eager")) == ("eager",) * 3
    assert of(load(folder, attn_implementation="flex_attention")) == ("flex_attention", "sdpa", "sdpa")
    model = load(folder, attn_implementation={"": "sdpa", name: "eager"})
    assert of(model) == ("sdpa", "eager", "eager")
    model.set_attn_implementation({"": "eager", "vision_tokenizer_config": "sdpa"})
    assert of(model) == ("eager", "sdpa", "sdpa")
    config = NextFlowConfig.from_dict(model.config.to_dict())
    config._attn_implementation = "flex_attention"  # reaches the configuration of each part
    assert of(NextFlowForConditionalGeneration(config)) == ("flex_attention", "sdpa", "sdpa")


def test_parts_that_stay_in_float32_are_known(model):
    assert "quantizer" in model._keep_in_fp32_modules_strict
    assert "NextFlowMultiScaleQuantizer" in model._no_split_modules


# ---- pixels for codes


def test_pixels_with_embeddings_and_of_new_images_alone(pipe, model):
    conversation = messages("<image>", "ab")
    inputs = inputs_of(pipe, conversation)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(**inputs, **settings)
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    assert torch.equal(model.generate(**embedded, **settings).sequences, first.sequences[:, -3:])
    torch.testing.assert_close(model(**embedded).logits, model(**inputs).logits)

    second = inputs_of(pipe, messages("<image>", "c", color="blue"))
    ids = torch.cat([first.sequences, second["input_ids"]], dim=1)
    following = {"input_ids": ids, "image_grids": torch.cat([inputs["image_grids"], second["image_grids"]])}
    whole = torch.cat([inputs["pixel_values"], second["pixel_values"]])
    expected = model.generate(**following, pixel_values=whole, **settings).sequences
    for pixels in (whole, second["pixel_values"]):
        cache = model.generate(**inputs, **settings).past_key_values
        found = model.generate(**following, pixel_values=pixels, past_key_values=cache, **settings)
        assert torch.equal(found.sequences, expected)
    with pytest.raises(ValueError, match="has 3 images, input_ids hold 1 after those in past_key_values"):
        cache = model.generate(**inputs, **settings).past_key_values
        model.generate(**following, pixel_values=whole[[0, 0, 1]], past_key_values=cache, **settings)


def test_forward_with_pixels_equals_forward_with_codes(pipe, model):
    inputs = inputs_of(pipe, messages("<image>", "a", "<image>"))
    pixels = dict(inputs)
    codes = {name: value for name, value in inputs.items() if name != "pixel_values"}
    codes["image_codes"] = codes_of(pipe, inputs, 2)
    labels = inputs["input_ids"].clone()
    expected = pipe.transformer(**codes, labels=labels)
    found = model(**pixels, labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    model.train()(**pixels, labels=labels).loss.backward()
    assert model.lm_head.weight.grad is not None and model.vision_tokenizer.quant_conv.weight.grad is None
    assert not model.vision_tokenizer.training
    model.eval().zero_grad()


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_generate_with_pixels_equals_generate_with_codes(pipe, model, mode):
    conversations = [messages("<image>", "ab"), messages("c", "<image>", color="blue")]
    inputs = inputs_of(pipe, conversations, generation_mode=mode)
    counts = (inputs["input_ids"] == pipe.processor.boi_token_id).sum(1).tolist()
    sources = torch.cat([grids[:1] for grids in inputs["image_grids"].split(counts)])
    codes = {name: value for name, value in inputs.items() if name != "pixel_values"}
    codes["image_codes"] = pipe.vision_tokenizer.encode(inputs["pixel_values"], sources).image_codes
    settings = {"generation_mode": mode}
    if mode != "image":
        settings |= {"max_new_tokens": 6, "do_sample": False}
    expected, found = (
        generate(**given, **settings, **({} if mode == "text" else {"generator": [seeded(0), seeded(1)]}))
        for generate, given in ((pipe.transformer.generate, codes), (model.generate, inputs))
    )
    if mode == "text":
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found.image_codes, expected.image_codes)
        assert torch.equal(found.image_grids, expected.image_grids)
    if mode == "image":  # and what the pipeline draws
        drawn = pipe.decode_codes(expected.image_codes, expected.image_grids, output_type="pt")
        pixels = pipe.processor.post_process_multimodal_output(
            model.decode_image_tokens(found), generation_mode="image", output_type="pt"
        )
        torch.testing.assert_close(torch.stack(list(pixels)), torch.stack(list(drawn)))


def test_interleaved_answer_becomes_text_and_pictures(pipe, model):
    inputs = inputs_of(pipe, messages("<image>", "ab"), generation_mode="interleaved")

    def begin(ids, scores):
        scores = scores.clone()
        scores[:, pipe.processor.boi_token_id] = torch.where(ids[:, -1] == ord("z"), 1e4, -1e4)
        if not (ids[:, -1] == ord("z")).any():
            scores[:, ord("z")] = 1e4
        return scores

    out = model.generate(
        **inputs, **GREEDY, generation_mode="interleaved", max_new_tokens=5, max_images=1, logits_processor=[begin]
    )
    answer = out.answer()
    (content,) = pipe.processor.post_process_multimodal_output(
        answer.sequences,
        generation_mode="interleaved",
        pixel_values=model.decode_image_tokens(answer),
        image_grids=answer.image_grids,
    )
    kinds = [part["type"] for part in content]
    assert kinds == ["text", "image", "text"]
    assert content[1]["image"].size == (16, 16)
    assert content[0]["text"] == pipe.processor.tokenizer.decode([ord("z")])
    # The answer is a message like any other: with it, the conversation goes on.
    conversation = [*messages("<image>", "ab"), {"role": "assistant", "content": content}, *messages("more")]
    following = inputs_of(pipe, conversation)
    assert model.generate(**following, do_sample=False, max_new_tokens=2).shape[0] == 1


def test_interleaved_text_ends_where_a_string_ends(pipe, model):
    tokenizer = pipe.processor.tokenizer
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")

    def spell(ids, scores):
        following = {a: b, b: c}.get(int(ids[0, -1]), a)
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([following]), 1e4)

    inputs = inputs_of(pipe, messages("hi"), generation_mode="interleaved")
    settings = {**GREEDY, "generation_mode": "interleaved", "max_new_tokens": 8, "logits_processor": [spell]}
    config = NextFlowGenerationConfig(stop_strings="bc", eos_token_id=model.config.eos_token_id)
    for given in ({"stop_strings": ["bc"]}, {"generation_config": config}):
        out = model.generate(**inputs, **settings, **given, tokenizer=tokenizer)
        assert tokenizer.decode(out.answer().sequences[0]) == "abc"
    assert config.stop_strings == "bc"


@pytest.mark.parametrize("mode", ["image", "text"], ids=["prompt ends in boi", "boi is put there"])
def test_guidance_is_the_pipelines(pipe, model, mode):
    source = Image.new("RGB", (16, 16), "red")
    drawn = pipe("ab", image=source, guidance_scale=3.0, generator=seeded(0), output_type="codes").image_codes
    prompts = {
        name: inputs_of(pipe, messages("<image>", "ab"), generation_mode="image", **options)
        for name, options in {"plain": {"negative_prompt": None}, "guided": {}}.items()
    }
    inputs = prompts["guided"]
    assert set(inputs) - set(prompts["plain"]) == {"negative_input_ids", "negative_attention_mask"}
    if mode == "text":
        inputs = {name: value[:, :-1] if value.ndim == 2 else value for name, value in inputs.items()}
        inputs["image_grids"] = inputs["image_grids"][:1]
    seed = int(torch.randint(2**63 - 1, (), generator=seeded(0)))  # the pipeline's way to a generator for each image
    found = model.generate(**inputs, generation_mode="image", guidance_scale=3.0, generator=seeded(seed))
    assert torch.equal(found.image_codes, drawn)
    plain = model.generate(**prompts["plain"], generation_mode="image", generator=seeded(seed))
    assert not torch.equal(plain.image_codes, drawn)


def test_interleaved_guidance_sees_the_images_of_the_prompt(pipe, model):
    def begin(ids, scores):
        scores = scores.clone()
        scores[:, pipe.processor.boi_token_id] = 1e4
        return scores

    inputs = inputs_of(pipe, messages("<image>", "ab"), generation_mode="interleaved", negative_prompt="x")
    settings = {"guidance_scale": 3.0, "generation_mode": "interleaved", "max_new_tokens": 1}
    out = model.generate(**inputs, **settings, logits_processor=[begin], generator=seeded(1))
    drawing = inputs_of(pipe, messages("<image>", "ab"), generation_mode="image", negative_prompt="x")
    expected = model.generate(**drawing, guidance_scale=3.0, generation_mode="image", generator=seeded(1))
    assert torch.equal(out.answer().image_codes, expected.image_codes)
    blind = {**inputs, "negative_input_ids": inputs["negative_input_ids"][:, -3:]}
    del blind["negative_attention_mask"]
    other = model.generate(**blind, **settings, logits_processor=[begin], generator=seeded(1))
    assert not torch.equal(other.image_codes, out.image_codes)


BAD_CALLS = {
    "both": ({"image_codes": torch.zeros(30, dtype=torch.long)}, "pass one, `get_image_tokens` gives codes"),
    "no grids": ({"image_grids": None}, "need input_ids and image_grids"),
    "two pictures": ({"pixel_values": torch.zeros(2, 3, 16, 16)}, "has 2 images, input_ids hold 1"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_pixels_are_refused(pipe, model, case):
    change, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        model.generate(**{**inputs_of(pipe, messages("<image>")), **change})


def test_codes_alone_are_not_decoded(model):
    with pytest.raises(ValueError, match="codes alone say no size"):
        model.decode_image_tokens(torch.zeros(30, dtype=torch.long))


# ---- transformers' pipelines


@pytest.fixture
def without_torchvision(monkeypatch):
    """The pipelines insist on it for models that take images; ours has a backend without."""
    for module in (any_to_any, image_text_to_text):
        monkeypatch.setattr(module, "requires_backends", lambda *args: None)


def test_image_text_to_text_pipeline(pipe, model, without_torchvision):
    pipeline = transformers.pipeline("image-text-to-text", model=model, processor=pipe.processor)
    conversation = messages("<image>", "ab")
    (record,) = pipeline(text=conversation, max_new_tokens=4, return_full_text=False)
    tokens = model.generate(**inputs_of(pipe, conversation), max_new_tokens=4)
    prompt = inputs_of(pipe, conversation)["input_ids"].shape[1]
    assert record["generated_text"] == pipe.processor.tokenizer.decode(tokens[0, prompt:], skip_special_tokens=True)


def test_pipelines_batch_prompts_of_several_lengths(pipe, folder, without_torchvision):
    """transformers pads them itself, on the side that the tokenizer was saved with."""
    pipeline = transformers.pipeline("image-text-to-text", model=str(folder))
    conversations = [messages("<image>", "ab"), messages("<image>", "a longer question", color="blue")]
    options = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}, "return_full_text": False}
    alone = [pipeline(text=one, **options)[0]["generated_text"] for one in conversations]
    batch = [record["generated_text"] for (record,) in pipeline(text=conversations, batch_size=2, **options)]
    assert batch == alone


def test_any_to_any_pipeline_takes_text_and_images_apart(pipe, model, without_torchvision):
    pipeline = transformers.pipeline("any-to-any", model=model, processor=pipe.processor)
    image = messages("<image>")[0]["content"][0]["image"]
    options = {"max_new_tokens": 3, "return_full_text": False}
    (record,) = pipeline(text="<|image_pad|>what", images=image, **options)
    tokens = model.generate(**pipe.processor(text="<|image_pad|>what", images=image), max_new_tokens=3)
    assert record["generated_text"] == pipe.processor.tokenizer.decode(tokens[0, -3:], skip_special_tokens=True)
    (record,) = pipeline(text="ab", generation_mode="image")
    assert record["generated_image"].size == (16, 16)
    with pytest.raises(ValueError, match="got videos: NextFlow reads text and images"):
        pipeline(text="ab", videos=[image])


def test_any_to_any_pipeline_writes(pipe, folder, without_torchvision):
    pipeline = transformers.pipeline("any-to-any", model=str(folder))
    assert type(pipeline.model) is NextFlowForConditionalGeneration
    conversation = messages("<image>", "ab")
    (record,) = pipeline(text=conversation, max_new_tokens=4, return_full_text=False)
    tokens = pipeline.model.generate(**inputs_of(pipe, conversation), max_new_tokens=4)
    prompt = inputs_of(pipe, conversation)["input_ids"].shape[1]
    assert record["generated_text"] == pipe.processor.tokenizer.decode(tokens[0, prompt:], skip_special_tokens=True)


def test_any_to_any_pipeline_draws(pipe, model, without_torchvision):
    pipeline = transformers.pipeline("any-to-any", model=model, processor=pipe.processor)
    conversation = messages("<image>", "ab")
    generate_kwargs = {"image_temperature": 0.0}
    (record,) = pipeline(text=conversation, generation_mode="image", generate_kwargs=generate_kwargs)
    inputs = inputs_of(pipe, conversation, generation_mode="image")
    drawn = model.generate(**inputs, **GREEDY, generation_mode="image")
    (expected,) = pipe.decode_codes(drawn.image_codes, drawn.image_grids)
    assert record["generated_image"].tobytes() == expected.tobytes()
