"""Talking, drawing and thinking with the pipeline, against `generate` called by hand and whole forwards."""

import functools
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from toy_pipeline import spelling_pipeline, toy_processor
from transformers import TextIteratorStreamer

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow.image_settings_nextflow import CONFIG_NAMES
from nextflow_hf.processing import THINKING_PROMPT, join_reasoning, split_reasoning


SQUARE = [[1, 1], [2, 2], [3, 3], [4, 4]]
DRAWING = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 8}
BY_HAND = {CONFIG_NAMES[name]: value for name, value in DRAWING.items()}


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    return spelling_pipeline()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inner(seed: int) -> torch.Generator:
    """The generator of its own that a row gets."""
    return torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=seeded(seed))))


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts) -> dict:
    kinds = {str: "text", Image.Image: "image"}
    return {"role": "user", "content": [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts]}


def inputs_of(pipe, messages, mode, **options) -> dict:
    inputs = pipe.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, generation_mode=mode, **options
    )
    if "pixel_values" in inputs:
        closed = inputs["image_grids"]
        if mode == "image":
            opens = (inputs["input_ids"] == pipe.processor.boi_token_id).sum(1).cumsum(0) - 1
            closed = closed[[index for index in range(len(closed)) if index not in opens.tolist()]]
        inputs["image_codes"] = pipe.vae.encode(inputs.pop("pixel_values"), closed).image_codes
    return inputs


def comparable(parts) -> list:
    return [part["text"] if part["type"] == "text" else part["image"].tobytes() for part in parts]


CHATS = {
    "text": [user("hello")],
    "image": [user(picture(seed=1), "what is it?")],
    "turns": [user(picture(20, 12), "what?"), {"role": "assistant", "content": "it"}, user(picture(), "and this?")],
}


# ---- talking


@pytest.mark.parametrize("name", CHATS)
def test_chat_is_text_generation(pipe, name):
    expected = pipe.transformer.generate(**inputs_of(pipe, CHATS[name], "text"), max_new_tokens=8, do_sample=False)
    answer = pipe.chat(CHATS[name], max_new_tokens=8)
    prompt = inputs_of(pipe, CHATS[name], "text")["input_ids"].shape[1]
    assert answer == pipe.processor.tokenizer.decode(expected[0, prompt:], skip_special_tokens=True) != ""


def test_chat_of_a_batch_is_that_of_each(pipe):
    settings = {"max_new_tokens": 8, "temperature": 0.7, "top_k": 20}
    together = pipe.chat(list(CHATS.values()), **settings, generator=[seeded(seed) for seed in range(3)])
    alone = [pipe.chat(chat, **settings, generator=seeded(seed)) for seed, chat in enumerate(CHATS.values())]
    assert together == alone and len(set(alone)) == 3
    assert pipe.chat(CHATS["text"], **settings, generator=seeded(5)) != alone[0]
    (in_a_list,) = pipe.chat([CHATS["text"]], **settings, generator=[seeded(0)])
    assert in_a_list == alone[0]
    assert pipe.chat(CHATS["text"], max_new_tokens=8, temperature=0) == pipe.chat(CHATS["text"], max_new_tokens=8)


def test_chat_never_draws_and_streams(pipe, monkeypatch):
    assert len(pipe.interleave(CHATS["text"], max_new_tokens=12)) > 1  # it would
    monkeypatch.setattr(pipe.transformer.generation_config, "image_top_k", [1, 2, 3, 4])  # of no image
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(pipe.chat(CHATS["text"], max_new_tokens=12, streamer=streamer))
    )
    thread.start()
    assert ["".join(streamer)] == (thread.join() or found)


# ---- text and images


def by_hand(pipe, messages, *, generator, max_images=2, **options):
    """`generate` called by hand, and its answer as parts."""
    inputs = inputs_of(pipe, messages, "interleaved", negative_prompt="", **options)
    output = pipe.transformer.generate(
        **inputs,
        generation_mode="interleaved",
        max_images=max_images,
        max_new_tokens=14,
        do_sample=True,
        temperature=0.3,
        generator=generator,
        **BY_HAND,
    )
    answer = output.answer()
    pixels = pipe.vae.decode(answer.image_codes, answer.image_grids)
    (parts,) = pipe.processor.post_process_multimodal_output(
        answer.sequences, generation_mode="interleaved", pixel_values=pixels, image_grids=answer.image_grids
    )
    return parts


DRAWN = {"max_images": 2, "max_new_tokens": 14, **DRAWING}
INTERLEAVED = {**DRAWN, "text_temperature": 0.3}


@pytest.mark.parametrize("size", [{}, {"aspect_ratio": "5:3"}], ids=["size of the last image", "aspect ratio"])
def test_interleaved_parts_are_those_of_generate(pipe, size):
    parts = pipe.interleave(CHATS["turns"], **INTERLEAVED, **size, generator=seeded(1))
    assert comparable(parts) == comparable(by_hand(pipe, CHATS["turns"], generator=inner(1), **size))
    images = [part["image"] for part in parts if part["type"] == "image"]
    assert [image.size for image in images] == ([(20, 12)] * 2 if size else [(16, 16)] * 2)
    assert len(parts) > 2
    # and they are the next turn of the conversation
    messages = [*CHATS["turns"], {"role": "assistant", "content": parts}, user("which was the first?")]
    assert pipe.chat(messages, max_new_tokens=4) and pipe(messages=messages).images[0].size == images[0].size


def test_interleaved_batch_is_each_alone(pipe):
    chats = [CHATS["text"], CHATS["image"]]
    together = pipe.interleave(chats, **INTERLEAVED, generator=[seeded(1), seeded(2)])
    alone = [pipe.interleave(chat, **INTERLEAVED, generator=seeded(seed)) for seed, chat in enumerate(chats, start=1)]
    assert list(map(comparable, together)) == list(map(comparable, alone))
    assert any(part["type"] == "image" for parts in alone for part in parts)


def test_stream_gives_the_same_parts_as_they_come(pipe):
    parts = pipe.interleave(CHATS["text"], **DRAWN, generator=seeded(1))
    stream = pipe.interleave(CHATS["text"], **DRAWN, generator=seeded(1), stream=True)
    joined = []
    for part in stream:
        if joined and part["type"] == joined[-1]["type"] == "text":
            joined[-1]["text"] += part["text"]
        else:
            joined.append(dict(part))
    assert comparable(joined) == comparable(parts) and {part["type"] for part in parts} == {"text", "image"}


def drawing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nextflow-answer"]


def test_a_stream_can_be_left_and_carries_errors(pipe, monkeypatch):
    counts = []
    hook = pipe.transformer.register_forward_hook(lambda *args: counts.append(1))
    for part in pipe.interleave(CHATS["text"], max_new_tokens=200, stream=True):
        if part["type"] == "image":
            break
    hook.remove()
    assert not drawing_threads() and 0 < len(counts) < 100

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(pipe.vision_tokenizer, "decode", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(pipe.interleave(CHATS["text"], **DRAWN, generator=seeded(1), stream=True))
    assert not drawing_threads()


def test_interrupt_ends_an_answer_after_its_image(pipe, monkeypatch):
    decode = pipe.decode_codes

    def interrupt(*args, **kwargs):
        pipe._interrupt = True
        return decode(*args, **kwargs)

    monkeypatch.setattr(pipe, "decode_codes", interrupt)  # as each streamed image is done
    parts = list(pipe.interleave(CHATS["text"], **{**DRAWN, "max_new_tokens": 100}, generator=seeded(1), stream=True))
    assert [part["type"] for part in parts] == ["text", "image"]
    assert pipe.chat(CHATS["text"], max_new_tokens=4) and not pipe.interrupt


# ---- a conversation on one cache


class Spy:
    """Counts the tokens that go through the transformer, and keeps the calls of `generate`."""

    def __init__(self, pipe, monkeypatch):
        self.tokens, self.calls = 0, []
        generate = pipe.transformer.generate

        def count(module, args, kwargs):
            given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            self.tokens += given.shape[1]

        def spy(**kwargs):
            output = generate(**kwargs)
            self.calls.append((kwargs, output))
            return output

        self.hook = pipe.transformer.model.register_forward_pre_hook(count, with_kwargs=True)
        monkeypatch.setattr(pipe.transformer, "generate", spy)


@pytest.mark.parametrize("appended", [False, True], ids=["", "last scale appended"])
def test_a_conversation_runs_every_token_once(pipe, monkeypatch, appended):
    monkeypatch.setattr(pipe.processor, "append_last_scale", appended)
    generate = pipe.transformer.generate
    spy = Spy(pipe, monkeypatch)
    conversation = pipe.start_conversation("Be brief.")
    drawn = conversation.generate_image("a", temperature=0)
    answers = [
        conversation.chat("what?", max_new_tokens=3),
        conversation.ask(picture(20, 12), "and?", max_new_tokens=3),
    ]
    again = conversation.generate_image("b", temperature=0)
    parts = conversation.interleave("a story", 2, min_images=1, max_new_tokens=9, temperature=0)
    spy.hook.remove()

    # 1. Nothing runs twice: all tokens but the last, which no call has needed yet
    *_, (_, last) = spy.calls
    assert (
        spy.tokens == last.past_key_values.get_seq_length() in (last.sequences.shape[1] - 1, last.sequences.shape[1])
    )

    # 2. Every answer is what it is without a cache
    for arguments, output in spy.calls:
        arguments = {**arguments, "past_key_values": None}
        for processor in arguments["logits_processor"] or []:
            processor.was_forced[:] = False
        uncached = generate(**arguments)
        assert torch.equal(uncached.sequences, output.sequences)
        assert torch.equal(uncached.image_codes, output.image_codes)

    # 3. The sequence is what the template makes of the messages, with the codes as they were drawn
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 5]
    whole = inputs_of(pipe, conversation.messages[:-1], "text")
    assert (drawn.size, again.size) == ((16, 16), (20, 12)) and all(answers) and len(parts) >= 1
    arguments, output = spy.calls[-1]
    assert arguments["input_ids"].tolist() == whole["input_ids"].tolist()
    assert arguments["image_grids"].tolist() == whole["image_grids"].tolist()
    shown, given, second = whole["image_grids"].prod(-1).count_nonzero(-1).tolist()
    assert (shown, given, second) == (4, 4 + appended, 4)


def test_the_first_drawing_of_a_conversation_is_the_pipelines(pipe):
    for think in (False, True):
        settings = {**DRAWING, "negative_prompt": "blurry", **({"max_new_tokens": 6} if think else {})}
        conversation = pipe.start_conversation(think=think)
        image = conversation.generate_image("a circle", **settings, generator=seeded(3))
        output = pipe("a circle", **settings, think=think, generator=seeded(3))
        assert image.tobytes() == output.images[0].tobytes()
        assert image.tobytes() != pipe("a circle", think=not think, **DRAWING, generator=seeded(3)).images[0].tobytes()
        again = conversation.generate_image("a circle", **settings, generator=seeded(3))
        assert again.tobytes() != image.tobytes()


def test_guidance_in_a_conversation_leads_away_from_it_without_the_users_text(pipe, monkeypatch):
    spy = Spy(pipe, monkeypatch)
    conversation = pipe.start_conversation(think=True)
    conversation.generate_image("a", max_new_tokens=3, temperature=0)
    conversation.generate_image(
        [{"type": "image", "image": picture()}, {"type": "text", "text": "b"}], negative_prompt="no", **DRAWING
    )
    arguments, _ = spy.calls[-1]
    messages = [user(), conversation.messages[1], user(picture(), "no")]
    expected = inputs_of(pipe, messages, "text")["input_ids"]
    assert arguments["negative_input_ids"].tolist() == expected.tolist()
    assert conversation.messages[0]["role"] == "user"


def test_a_resolution_alone_keeps_the_shape_of_the_last_image(pipe):
    conversation = pipe.start_conversation()
    sizes = [{"height": 12, "width": 20}, {}, {"resolution": 12}, {"resolution": 16}]
    images = [conversation.generate_image("a", **size, guidance_scale=1.0) for size in sizes]
    assert [image.size for image in images] == [(20, 12), (20, 12), (16, 8), (20, 12)]


def test_a_call_between_two_steps_of_a_turn_leaves_its_guidance(pipe, monkeypatch):
    """As another thread's call may be."""
    expected = pipe.start_conversation().generate_image("a", **DRAWING, generator=seeded(0))
    get_interleaved_settings = pipe.get_interleaved_settings

    def interrupted(**settings):
        found = get_interleaved_settings(**settings)
        pipe("b", guidance_scale=1.0, output_type="codes")
        return found

    monkeypatch.setattr(pipe, "get_interleaved_settings", interrupted)
    image = pipe.start_conversation().generate_image("a", **DRAWING, generator=seeded(0))
    assert image.tobytes() == expected.tobytes()


def test_a_conversation_survives_an_error(pipe, monkeypatch):
    conversation = pipe.start_conversation()
    conversation.generate_image("a", temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr(pipe.transformer, "generate", lambda **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            conversation.chat("what?", max_new_tokens=4)
    other = pipe.start_conversation()
    other.generate_image("a", temperature=0)
    assert conversation.chat("b", max_new_tokens=4) == other.chat("b", max_new_tokens=4)


def test_a_conversation_goes_on_outside_of_the_inference_mode_that_it_began_in(pipe):
    inside, outside = pipe.start_conversation(), pipe.start_conversation()
    with torch.inference_mode():
        inside.generate_image("a", temperature=0)
    outside.generate_image("a", temperature=0)
    assert inside.chat("b", max_new_tokens=4) == outside.chat("b", max_new_tokens=4)


# ---- thinking


def test_a_thought_image_is_drawn_in_one_sequence(pipe):
    """Against `generate` on one cache, where the model begins the image itself."""
    settings = {"num_images_per_prompt": 1, "max_new_tokens": 30, **DRAWING}
    output = pipe("hello", think=True, **settings, generator=seeded(4))
    inputs = inputs_of(pipe, [user("hello")], "interleaved", negative_prompt="", enable_thinking=True)
    expected = pipe.transformer.generate(
        **inputs,
        generation_mode="interleaved",
        max_images=1,
        max_new_tokens=30,
        do_sample=False,
        generator=inner(4),
        **BY_HAND,
    )
    ids = expected.answer().sequences[0].tolist()
    boi = ids.index(pipe.processor.boi_token_id)
    assert boi > 0
    assert torch.equal(output.image_codes, expected.answer().image_codes)
    assert output.thoughts == [""]  # the toy does not know the marks
    assert output.final_prompts == [pipe.processor.tokenizer.decode(ids[:boi], skip_special_tokens=True).strip()]


def test_thinking_is_returned_and_seen(pipe, monkeypatch):
    said = join_reasoning("grass is green", "a green circle")
    boi = pipe.processor.boi_token_id

    class Answer:
        sequences = torch.tensor([[*pipe.processor.tokenizer.encode(said), boi]])
        attention_mask = torch.ones_like(sequences)

        def answer(self):
            return self

    monkeypatch.setattr(pipe, "generate_answers", lambda *args, **kwargs: Answer())
    output = pipe("a circle", think=True, **DRAWING, generator=seeded(2))
    assert (output.thoughts, output.final_prompts) == (["grass is green"], ["a green circle"])
    messages = [user("a circle"), {"role": "assistant", "content": said}]
    options = {"continue_final_message": True, "enable_thinking": True}
    inputs = inputs_of(pipe, messages, "image", **options)
    without = inputs_of(pipe, [user()], "image")["input_ids"]
    inputs |= {"negative_input_ids": without, "negative_attention_mask": torch.ones_like(without)}
    expected = pipe.transformer.generate(**inputs, generation_mode="image", **BY_HAND, generator=inner(2))
    assert torch.equal(output.image_codes, expected.image_codes)


def test_thinking_that_is_interrupted_ends_the_call(pipe, monkeypatch):
    """After the first scale, as an interruption that comes while images are sampled does at the latest."""

    class Stop:
        def is_set(self) -> bool:  # asked after each token
            pipe._interrupt = True
            return False

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "generate_answers", functools.partial(pipe.generate_answers, stop=Stop()))
        output = pipe("a", think=True, max_new_tokens=20, **DRAWING, generator=seeded(0))
    assert pipe.interrupt and len(output.image_codes) == 1
    assert len(pipe("a", **DRAWING, generator=seeded(0)).image_codes) == 30 and not pipe.interrupt


def test_thinking_of_a_batch_is_that_of_each(pipe, caplog, monkeypatch):
    monkeypatch.setattr(pipe.transformer.generation_config, "do_sample", True)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    settings = {"think": True, "max_new_tokens": 5, **DRAWING}
    prompts, sources = ["a circle", "b"], [None, picture(20, 12)]
    together = pipe(prompts, image=sources, **settings, generator=[seeded(0), seeded(1)])
    assert "had not begun their images after `max_new_tokens` (5) tokens" in caplog.text
    alone = [
        pipe(prompt, image=source, **settings, generator=seeded(seed))
        for seed, (prompt, source) in enumerate(zip(prompts, sources))
    ]
    assert together.final_prompts == [text for output in alone for text in output.final_prompts]
    assert torch.equal(together.image_codes, torch.cat([output.image_codes for output in alone]))
    assert together.final_prompts[0] != together.final_prompts[1]
    twice = pipe("a circle", **settings, num_images_per_prompt=2, generator=[seeded(0), seeded(7)])
    assert twice.final_prompts[0] == alone[0].final_prompts[0] != twice.final_prompts[1]
    caplog.clear()
    assert pipe("a", **DRAWING).thoughts is None and not caplog.text


# ---- examples, and frames


def test_example_pairs_are_drawn_on(pipe):
    """As one message, and as turns: the images of the turns stand as they are drawn."""
    pairs = [(picture(seed=1), picture(seed=2)), (picture(seed=3), picture(seed=4))]
    flat = [part for before, after in pairs for part in (before, "is to", after, "as")]
    turns = [
        message
        for before, after in pairs
        for message in (user(before), {"role": "assistant", "content": [{"type": "image", "image": after}]})
    ]
    results = []
    for messages in ([user(*flat, picture(), "is to")], [*turns, user(picture())]):
        output = pipe(messages=messages, **DRAWING, generator=seeded(1))
        inputs = inputs_of(pipe, messages, "image", negative_prompt="")
        assert len(inputs["image_grids"]) == 6
        expected = pipe.transformer.generate(**inputs, generation_mode="image", **BY_HAND, generator=inner(1))
        assert torch.equal(output.image_codes, expected.image_codes)
        results.append(output.image_codes.tolist())
    assert results[0] != results[1]


def test_images_of_the_assistant_stand_as_they_are_drawn():
    processor = toy_processor()
    processor.append_last_scale = True
    shown = {"role": "assistant", "content": [{"type": "image", "image": picture()}]}
    messages = [user(picture(), "edit"), shown, user("again")]
    given, drawn, target = (SQUARE + [[4, 4]]), SQUARE + [[0, 0]], SQUARE + [[0, 0]]
    options = {"tokenize": True, "return_dict": True}
    inference = processor.apply_chat_template(messages, generation_mode="image", **options)
    assert inference["image_grids"].tolist() == [given, drawn, target]
    training = processor.apply_chat_template([*messages, shown], return_labels=True, **options)
    assert training["image_grids"].tolist() == [given, drawn, target]
    length = inference["input_ids"].shape[1]
    assert training["input_ids"][:, :length].tolist() == inference["input_ids"].tolist()


def test_frames_of_a_told_story(pipe, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    story = pipe.frames("hello", 3, max_new_tokens=40, **DRAWING, generator=seeded(0))
    assert len(story.frames) == len(story.texts) == 3 and not caplog.text
    assert len({frame.tobytes() for frame in story.frames}) == 3 and story.texts[0]
    short = pipe.frames("hello", 3, max_new_tokens=3, **DRAWING, generator=seeded(0))
    assert len(short.frames) == 3 and short.texts == ["", "", ""]


def test_a_story_that_would_end_early_draws_its_frames(pipe):
    eos, boi = pipe.processor.tokenizer.eos_token_id, pipe.processor.boi_token_id

    def end(module, args, logits):  # wherever it would draw else
        logits = logits.clone()
        logits[..., eos], logits[..., boi] = logits[..., boi], -1e4
        return logits

    hook = pipe.transformer.lm_head.register_forward_hook(end)
    try:
        (text,) = pipe.interleave([user("hello")], max_new_tokens=60)
        story = pipe.frames("hello", 2, max_new_tokens=60, **DRAWING, generator=seeded(0))
    finally:
        hook.remove()
    assert len(story.frames) == 2 and story.texts[0] == text["text"]


def test_frames_of_prompts_see_those_before(pipe):
    prompts = ["a", "b", "c"]
    story = pipe.frames(prompts, **DRAWING, aspect_ratio="5:3", generator=seeded(0))
    again = pipe.frames(prompts, **DRAWING, aspect_ratio="5:3", generator=seeded(0))
    assert story.texts == prompts and [frame.size for frame in story.frames] == [(20, 12)] * 3
    assert [frame.tobytes() for frame in story.frames] == [frame.tobytes() for frame in again.frames]
    conversation, generator = pipe.start_conversation(), seeded(0)
    for prompt, frame in zip(prompts, story.frames):
        assert (
            conversation.generate_image(prompt, **DRAWING, aspect_ratio="5:3", generator=generator).tobytes()
            == frame.tobytes()
        )
    other = pipe.frames(["z", *prompts[1:]], **DRAWING, aspect_ratio="5:3", generator=seeded(0))
    assert other.frames[1].tobytes() != story.frames[1].tobytes()


def test_frames_are_saved(pipe, tmp_path, monkeypatch):
    story = pipe.frames(["a", "b", "c"], resolution=8, generator=seeded(0))
    assert story[0] is story.frames
    with Image.open(story.save(tmp_path / "story.gif", fps=4)) as saved:
        assert saved.n_frames == 3 and saved.info["duration"] == 250
    with Image.open(story.save(tmp_path / "story.png", columns=2)) as saved:
        assert saved.size == (16, 16)
        assert saved.crop((8, 0, 16, 8)).tobytes() == story.frames[1].tobytes()
        assert saved.getpixel((15, 15)) == (255, 255, 255)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"nextflow-hf\[video\]"):
        story.save(tmp_path / "story.mp4")
    with pytest.raises(ValueError, match=r"suffix '.txt', expected .gif, .mp4"):
        story.save(tmp_path / "story.txt")


def test_frames_are_saved_as_a_film(pipe, tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    path = pipe.frames(["a", "b"], temperature=0).save(tmp_path / "story.mp4")
    assert len(imageio.imread(path)) == 2


# ---- mistakes

BAD_CALLS = {
    "type of top-k": (lambda pipe: pipe.chat([user("a")], top_k=2.5), r"`top_k` is 2.5 \(float\), expected a whole"),
    "temperature": (lambda pipe: pipe.chat([user("a")], temperature=float("nan")), "`temperature` is nan"),
    "bool": (lambda pipe: pipe.chat([user("a")], max_new_tokens=True), r"`max_new_tokens` is True \(bool\)"),
    "fraction of an image": (
        lambda pipe: pipe.interleave([user("a")], 1.5),
        r"`max_images` is 1.5 \(float\), expected a whole",
    ),
    "no messages": (lambda pipe: pipe.chat([]), "got 0 messages, expected at least 1"),
    "a string": (lambda pipe: pipe.chat("hello"), "messages are 'hello' .* expected a list such as"),
    "too short": (
        lambda pipe: pipe.chat(CHATS["text"], max_new_tokens=0),
        "`max_new_tokens` is 0, expected at least 1",
    ),
    "not sampled": (
        lambda pipe: pipe.chat(CHATS["text"], do_sample=False, top_p=0.5),
        "got \\['top_p'\\] without sampling",
    ),
    "sampled cold": (
        lambda pipe: pipe.interleave(CHATS["text"], do_sample=True, text_temperature=0),
        "`do_sample=True` with `text_temperature=0`",
    ),
    "generators": (
        lambda pipe: pipe.chat(CHATS["text"], generator=[seeded(0)] * 2),
        "`generator` has 2 entries for 1 images",
    ),
    "images": (lambda pipe: pipe.interleave(CHATS["text"], max_images=-1), "`max_images` is -1, expected at least 0"),
    "streams": (
        lambda pipe: pipe.interleave([CHATS["text"]] * 2, stream=True),
        "takes a single conversation, got a list",
    ),
    "size": (lambda pipe: pipe.interleave(CHATS["text"], height=16), "only height, expected height and width"),
    "scales": (
        lambda pipe: pipe.interleave(CHATS["text"], top_k=[1, 2]),
        "top_k has 2 entries, expected one for each",
    ),
    "minimum": (
        lambda pipe: pipe.start_conversation().interleave("a", 1, min_images=2),
        "`min_images` is 2 and `max_images` 1",
    ),
    "thoughtless": (lambda pipe: pipe("a", max_new_tokens=4), "`max_new_tokens` is 4 without `think=True`"),
    "no thoughts": (
        lambda pipe: pipe("a", think=True, max_new_tokens=0),
        "`max_new_tokens` is 0, expected at least 1",
    ),
    "thoughtless talk": (
        lambda pipe: pipe.start_conversation().generate_image("a", max_new_tokens=4),
        "`max_new_tokens` is 4 without `think=True`",
    ),
    "image guidance": (
        lambda pipe: pipe.start_conversation().generate_image("a", image_guidance_scale=1.5),
        "`image_guidance_scale` is 1.5, which guides images of `pipe\\(...\\)` alone",
    ),
    "frames": (lambda pipe: pipe.frames("a story"), "`num_frames` is missing"),
    "no frames": (lambda pipe: pipe.frames("a story", 0), "`num_frames` is 0, expected at least 1"),
    "frames of parts": (lambda pipe: pipe.frames(["a"], 2), "`num_frames` is 2 for a storyline of 1"),
    "text of parts": (
        lambda pipe: pipe.frames(["a"], do_sample=True),
        "got \\['do_sample'\\] with a storyline in parts",
    ),
    "room for frames": (
        lambda pipe: pipe.frames("a story", 3, max_new_tokens=2),
        "`max_new_tokens` is 2, expected at least 3",
    ),
    "no story": (lambda pipe: pipe.frames([]), "`storyline` is \\[\\], expected a string or"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_mistakes_are_named(pipe, case):
    call, message = BAD_CALLS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call(pipe)


MALFORMED = {
    "no type": ([{"role": "user", "content": [{"text": "a"}]}], "message 0, part 0 of the user has the type None"),
    "no content": ([{"role": "user"}], r"message 0 has the keys \['role'\]"),
    "no message": ([user("a"), None], "message 1 is None"),
    "surrogate": ([user("\ud800")], "message 0.* has the lone surrogate"),
    "number": (5, r"messages are 5 \(int\)"),
    "a message": (user("a"), "messages are {"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_messages_are_named_by_every_method(pipe, case):
    messages, message = MALFORMED[case]
    for call in (pipe.chat, pipe.interleave, lambda given: pipe(messages=given, guidance_scale=2.0)):
        with pytest.raises(ValueError, match=message):
            call(messages)


@pytest.mark.parametrize(
    ("text", "message"),
    [(5, r"part 0 has the text 5 \(int\)"), ([{"text": "a"}], "the type None"), ("\ud800", "lone surrogate")],
)
def test_a_malformed_turn_leaves_the_conversation_as_it_was(pipe, text, message):
    conversation = pipe.start_conversation()
    conversation.chat("a", max_new_tokens=1)
    for turn in (conversation.chat, conversation.generate_image, conversation.interleave):
        with pytest.raises(ValueError, match=message):
            turn(text)
    assert len(conversation.messages) == 2 and conversation.chat("b", max_new_tokens=1) is not None


# ---- the format of thinking


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (join_reasoning("grass is green", "a green circle"), ("grass is green", "a green circle")),
        ("<think>\ngrass is green\n</think>\n\na green circle", ("grass is green", "a green circle")),
        ("<think>grass is", ("grass is", "")),
        ("a green circle", (None, "a green circle")),
        ("<think></think>", ("", "")),
    ],
)
def test_thinking_is_parsed(text, expected):
    assert split_reasoning(text) == toy_processor().split_reasoning(text) == expected


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, THINKING_PROMPT),
        ("Be brief.", f"{THINKING_PROMPT}\nBe brief."),
        ([{"type": "text", "text": "Be brief."}], f"{THINKING_PROMPT}\nBe brief."),
        (THINKING_PROMPT, THINKING_PROMPT),
        ("", THINKING_PROMPT),
    ],
)
def test_a_system_message_asks_for_thinking(system, expected):
    processor, user = toy_processor(), {"role": "user", "content": "a circle"}
    messages = [user] if system is None else [{"role": "system", "content": system}, user]
    text = processor.apply_chat_template(messages, enable_thinking=True, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{expected}<|im_end|>\n<|im_start|>user\na circle<|im_end|>\n<|im_start|>assistant\n"
    )
    # rows that have the system message may ask again
    asked = [{"role": "system", "content": expected}, user]
    assert processor.apply_chat_template(asked, enable_thinking=True, add_generation_prompt=True) == text


def test_the_unconditional_prompt_does_not_think():
    processor, messages = toy_processor(), [{"role": "user", "content": "a circle"}]
    options = {"tokenize": True, "return_dict": True, "generation_mode": "image", "negative_prompt": ""}
    plain = processor.apply_chat_template(messages, **options)
    asked = [{"role": "system", "content": THINKING_PROMPT}, *messages]
    for thinking in (
        processor.apply_chat_template(messages, **options, enable_thinking=True),
        processor.apply_chat_template([asked], **options),
    ):
        assert thinking["negative_input_ids"].tolist() == plain["negative_input_ids"].tolist()
    brief = [{"role": "system", "content": "Be brief."}, *messages]
    thinking = processor.apply_chat_template(brief, **options, enable_thinking=True)
    assert "Be brief." in (unconditional := processor.tokenizer.decode(thinking["negative_input_ids"][0]))
    assert THINKING_PROMPT not in unconditional
    assert THINKING_PROMPT in processor.tokenizer.decode(thinking["input_ids"][0])


def test_a_conversation_of_text_alone_goes_on(pipe):
    """Without an image nothing but the cache says where the rotary positions are."""
    conversation = pipe.start_conversation()
    answers = [conversation.chat(text, max_new_tokens=4) for text in ("a", "b", "c")]
    talk = []
    for text, answer in zip(("a", "b", "c"), answers, strict=True):
        talk.append({"role": "user", "content": text})
        assert pipe.chat(talk, max_new_tokens=4) == answer
        talk.append({"role": "assistant", "content": answer})
    image = conversation.generate_image("d", generator=seeded(0))
    fresh = pipe(messages=[*talk, user("d")], generator=seeded(0)).images[0]
    assert image.size == fresh.size


# ---- the end of the context


CELLS = 4 + 9 + 16  # of a square, but for its first scale


@pytest.fixture
def context(pipe, monkeypatch):
    """Sets the number of tokens that the model can hold."""
    return lambda tokens: monkeypatch.setattr(pipe.transformer.config, "max_position_embeddings", tokens)


def length(conversation) -> int:
    return conversation._sequence["input_ids"].shape[1]


def test_a_conversation_ends_before_its_context_is_full(pipe, context):
    conversation = pipe.start_conversation()
    conversation.generate_image("a", generator=seeded(0))
    conversation.chat("b", max_new_tokens=4)
    there, said = length(conversation), list(conversation.messages)
    context(there + 60)
    with pytest.raises(ValueError, match=rf"\d+ tokens and needs at least 1 more, .* context is {there + 60} "):
        conversation.chat("long " * 20)
    assert conversation.messages == said and length(conversation) == there
    # A shorter turn fits: its answer goes to the end of the context, and is cut there, with a word.
    answer = conversation.chat("b", max_new_tokens=200)
    assert answer and length(conversation) <= there + 60 and len(conversation.messages) == len(said) + 2
    # Nothing fits any more.
    for turn in (conversation.chat, conversation.generate_image):
        with pytest.raises(ValueError, match="begin a new conversation"):
            turn("b")
    assert len(conversation.messages) == len(said) + 2


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_needs_room_for_all_its_cells(pipe, context, guidance_scale):
    conversation = pipe.start_conversation()
    conversation.chat("a", max_new_tokens=4)
    probe = pipe.start_conversation()
    probe.chat("a", max_new_tokens=4)
    probe.generate_image("b", generator=seeded(0), guidance_scale=guidance_scale)
    context(length(probe) - 1)
    with pytest.raises(ValueError, match=rf"needs at least {CELLS + 1} more, but the model's context is"):
        conversation.generate_image("b", generator=seeded(0), guidance_scale=guidance_scale)
    assert len(conversation.messages) == 2
    context(length(probe))
    image = conversation.generate_image("b", generator=seeded(0), guidance_scale=guidance_scale)
    assert image.tobytes() == probe.messages[-1]["content"][-1]["image"].tobytes()


def test_images_that_do_not_fit_are_not_begun(pipe, context):
    """The model is then not asked; the text goes on to the end."""
    messages = [user("tell")]
    free = pipe.interleave(messages, max_images=3, max_new_tokens=40, generator=seeded(3))
    assert sum(part["type"] == "image" for part in free) > 1
    prompt = inputs_of(pipe, messages, "text")["input_ids"].shape[1]
    context(prompt + CELLS + 2 + 6)
    parts = pipe.interleave(messages, max_images=3, max_new_tokens=400, generator=seeded(3))
    assert sum(part["type"] == "image" for part in parts) <= 1
    context(prompt + CELLS)
    parts = pipe.interleave(messages, max_images=3, max_new_tokens=400, generator=seeded(3))
    assert [part["type"] for part in parts] == ["text"] and len(parts[0]["text"]) == CELLS


def test_rows_end_each_at_its_own_place(pipe, context):
    """Padding is no part of the context: in a batch a row ends where it would alone."""
    rows = [[user("tell me more")], [user("b")]]
    context(60)
    alone = [pipe.chat(row, max_new_tokens=100) for row in rows]
    assert pipe.chat(rows, max_new_tokens=100) == alone and len(alone[1]) > len(alone[0])


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_no_mode_goes_beyond_the_context(pipe, context, mode):
    inputs = inputs_of(pipe, [user("hello")], "image" if mode == "image" else "text")
    prompt = inputs["input_ids"].shape[1]
    needed = CELLS if mode == "image" else 1
    context(prompt + needed)
    options = {"generation_mode": mode, **({} if mode == "image" else {"max_new_tokens": 1, "max_images": 0})}
    if mode == "text":
        del options["max_images"]
    pipe.transformer.generate(**inputs, **options)
    context(prompt + needed - 1)
    with pytest.raises(ValueError, match=f"has {prompt} tokens and needs at least {needed} more"):
        pipe.transformer.generate(**inputs, **options)


def test_thinking_leaves_room_for_the_image(pipe, context):
    prompt = pipe.encode_messages([[user("a")]], enable_thinking=True)[0].input_ids
    context(len(prompt) + CELLS + 4)
    with pytest.raises(ValueError, match="needs at least"):
        pipe("a", think=True, max_new_tokens=40)
    pipe("a", think=True, max_new_tokens=3)
