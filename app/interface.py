"""The page: a tab that makes and edits images, a tab for conversations, and what their buttons do.

Whatever needs the model is done by a [`Studio`], in one queue: its users wait for each other.
"""

import base64
import html
import io
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..atomic import write_file
from .studio import ImageRequest, Studio
from .uploads import FILE_TYPES, check_images


SEEDS = 2**32  # a number field of a browser is exact to 2**53
MAX_HISTORY = 48
THUMBNAIL = 144  # pixels of an image in the strip of scales
PROMPT_LENGTH = 2000
# What a user can cause. All else is an error of ours, and its traceback is in the terminal.
USER_ERRORS = (ValueError, TypeError, OSError)
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
PRIVATE = {"api_visibility": "private"}


class App:
    """
    The page and its handlers.

    Args:
        studio ([`Studio`]): Does the work.
        folder (`str`): Where generated images are kept while the app runs.
        save (`Callable`, *optional*):
            `save(image, path, image_request)` writes a generated image. By default its settings are not written.
        name (`str`): Name of the model, shown on the page.
        prompts, conversations (`list[str]`): Examples for the two tabs.
    """

    def __init__(
        self,
        studio: Studio,
        folder: str,
        *,
        save: Callable[[Any, Path, ImageRequest], None] | None = None,
        name: str = "",
        prompts: Sequence[str] = (),
        conversations: Sequence[str] = (),
    ):
        self.studio = studio
        self.folder = Path(folder)
        self.save = save
        self.name = name
        self.prompts = prompts
        self.conversations = conversations

    # ---- images

    def generate(
        self,
        prompt: str,
        references: list[tuple[str, str | None]] | None,
        seed: float | None,
        is_random: bool,
        guidance: float,
        image_guidance: float,
        aspect_ratio: str | None,
        resolution: int | None,
        history: list[tuple[str, ImageRequest]],
        request: gr.Request,
    ) -> Iterator[tuple]:
        """(image, status, scales, seed, history, gallery), after each scale and at the end."""
        paths = paths_of(references)
        if not prompt.strip():
            raise gr.Error("Say what to generate or, with reference images, what to change.", title="No prompt")
        if is_random or seed is None:
            seed = secrets.randbelow(SEEDS)
        image_request = ImageRequest(
            prompt=prompt.strip(),
            references=tuple(paths),
            seed=int(seed),
            guidance_scale=guidance or None,
            image_guidance_scale=image_guidance,
            aspect_ratio=aspect_ratio or None,
            resolution=resolution or None,
        )
        begun = time.perf_counter()
        yield gr.skip(), "Starting …", scales_html([]), image_request.seed, gr.skip(), gr.skip()
        previews, last = [], None
        try:
            check_images(paths)
            for last in self.studio.generate(image_request, owner=request.session_hash):
                previews.append((last.images[0], last.grid))
                height, width = last.grid
                status = f"Scale {last.scale} of {last.num_scales}: {width} × {height} cells"
                yield last.images[0], status, scales_html(previews), gr.skip(), gr.skip(), gr.skip()
        except USER_ERRORS as error:
            status = f"Nothing was generated: {html.escape(str(error))}"
            yield gr.skip(), status, gr.skip(), gr.skip(), gr.skip(), gr.skip()
            raise gr.Error(str(error), title="Cannot generate that", print_exception=False) from error
        if last is None or last.scale < last.num_scales:
            status = f"Stopped after scale {len(previews)}."
            yield gr.skip(), status, gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        image = last.images[0]
        path = self._save(image, image_request)
        history = [(path, image_request), *history][:MAX_HISTORY]
        status = (
            f"{image.width} × {image.height} pixels, seed {image_request.seed}, {time.perf_counter() - begun:.1f} s"
        )
        yield path, status, gr.skip(), gr.skip(), history, gallery_of(history)

    def recall(self, history: list[tuple[str, ImageRequest]], event: gr.SelectData) -> tuple:
        """The settings of an image of the history, back in their fields, and the image."""
        path, image_request = history[event.index]
        return (
            image_request.prompt,
            [(one, None) for one in image_request.references],
            image_request.seed,
            False,
            image_request.guidance_scale or 0,
            image_request.image_guidance_scale,
            image_request.aspect_ratio or "",
            image_request.resolution or 0,
            path,
            f"From the history: seed {image_request.seed}",
            scales_html([]),
        )

    def edit(self, image: str | None) -> list[tuple[str, str | None]]:
        """The generated image as the reference of the next."""
        if image is None:
            raise gr.Error("There is no image yet.", title="Nothing to edit", print_exception=False)
        return [(image, None)]

    def keep_fit(self, references: list[tuple[str, str | None]] | None) -> list[tuple[str, str | None]]:
        """Reference images as they are uploaded, without those that are refused."""
        kept = []
        for path in paths_of(references):
            try:
                check_images([*(one for one, _ in kept), path])
            except ValueError as error:
                gr.Warning(str(error), title="Image refused")
            else:
                kept.append((path, None))
        return kept

    # ---- conversations

    def chat(
        self, said: dict[str, Any], max_images: float, messages: "Conversation", request: gr.Request
    ) -> Iterator[tuple]:
        """(text box, conversation as shown, messages), as the answer comes and at the end."""
        text, paths = (said["text"] or "").strip(), list(said["files"] or ())
        if not text and not paths:
            raise gr.Error("Say something, or show an image.", title="Empty message", print_exception=False)
        content = [{"type": "image", "image": path} for path in paths]
        if text:
            content.append({"type": "text", "text": text})
        asked = [*messages, {"role": "user", "content": content}]
        answer: list[dict[str, Any]] = []
        try:
            check_images(paths)
            yield empty_box(), chat_of(asked), gr.skip()
            parts = self.studio.answer(
                asked, max_images=int(max_images), seed=secrets.randbelow(SEEDS), owner=request.session_hash
            )
            for part in parts:
                if messages.is_over:
                    break
                if part["type"] == "image":
                    answer.append({"type": "image", "image": self._save(part["image"])})
                elif answer and answer[-1]["type"] == "text":
                    answer[-1] = {"type": "text", "text": answer[-1]["text"] + part["text"]}
                else:
                    answer.append(part)
                yield gr.skip(), chat_of([*asked, {"role": "assistant", "content": answer}]), gr.skip()
        except USER_ERRORS as error:
            yield said, chat_of(messages), gr.skip()
            raise gr.Error(str(error), title="Cannot answer that", print_exception=False) from error
        if messages.is_over:
            yield gr.skip(), gr.skip(), gr.skip()  # Gradio shows what comes last a second time
            return
        answered = [*asked, {"role": "assistant", "content": answer or [{"type": "text", "text": ""}]}]
        yield gr.skip(), chat_of(answered), Conversation(answered)

    def begin_conversation(self, messages: "Conversation", request: gr.Request) -> tuple:
        """(conversation as shown, messages), both empty; an answer that is still coming ends."""
        messages.is_over = True
        self.studio.stop(request.session_hash)
        return [], Conversation()

    # ---- both

    def stop(self, request: gr.Request) -> None:
        """Stop what this browser has running."""
        if not self.studio.stop(request.session_hash):
            gr.Info("Nothing of yours is being generated.", title="Stop")

    def _save(self, image: Any, image_request: ImageRequest | None = None) -> str:
        path = self.folder / f"{uuid.uuid4().hex}.png"
        if image_request is not None and self.save is not None:
            self.save(image, path, image_request)
        else:
            write_file(path, image.save)
        return str(path)

    # ---- the page

    def build(self) -> gr.Blocks:
        """The page, to be served."""
        # Files of a session are deleted a day later, and all of them when the app ends.
        with gr.Blocks(title="NextFlow", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            gr.HTML(f"<h1>NextFlow</h1><p>{html.escape(self.name)}</p>", elem_id="head")
            with gr.Tab("Generate", id="generate"):
                self._build_images()
            with gr.Tab("Chat", id="chat-tab"):
                self._build_chat()
        return page

    def _build_images(self) -> None:
        small = ["small-images"] if self.studio.is_small else []
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="What to generate or, with reference images, what to change",
                    max_lines=4,
                    max_length=PROMPT_LENGTH,
                    autofocus=True,
                    elem_id="prompt",
                )
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="generate-button")
                    stop = gr.Button("Stop", variant="secondary", elem_id="stop-button")
                if self.prompts:
                    gr.Examples([[one] for one in self.prompts], prompt, label="For example", **PRIVATE)
                references = gr.Gallery(
                    label="Reference images: none to generate from the prompt alone, one or several to edit",
                    type="filepath",
                    file_types=FILE_TYPES,
                    sources=["upload", "clipboard"],
                    interactive=True,
                    columns=5,
                    fit_columns=False,
                    height=144,
                    object_fit="contain",
                    buttons=[],
                    elem_id="references",
                    elem_classes=small,
                )
                with gr.Row():
                    seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=150, elem_id="seed"
                    )
                    is_random = gr.Checkbox(True, label="Random each time", min_width=150, elem_id="random")
                with gr.Row():
                    guidance = self._build_guidance()
                    image_guidance = gr.Slider(
                        1,
                        5,
                        1,
                        step=0.1,
                        label="Image guidance",
                        info="Towards references. 1: none",
                        buttons=[],
                        min_width=150,
                        elem_id="image-guidance",
                    )
                aspect_ratio, resolution = self._build_size()
            with gr.Column(scale=3, min_width=340):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    format="png" if small else "jpeg",  # of the previews
                    interactive=False,
                    height=400,
                    buttons=["download", "fullscreen"],
                    elem_id="result",
                    elem_classes=small,
                )
                with gr.Row(elem_id="under-result"):
                    status = gr.HTML("", elem_id="status")
                    edit = gr.Button("Edit this image", size="sm", scale=0, min_width=150, elem_id="edit-button")
                scales = gr.HTML(scales_html([]), elem_id="scales", elem_classes=small)
                gallery = gr.Gallery(
                    label="History: select an image to have its settings back",
                    columns=6,
                    fit_columns=False,
                    height=264,
                    object_fit="contain",
                    interactive=False,
                    allow_preview=False,
                    buttons=[],
                    elem_id="history",
                    elem_classes=small,
                )
        uploads_only(references)
        uploads_only(image)
        history = gr.State([])
        fields = [prompt, references, seed, is_random, guidance, image_guidance, aspect_ratio, resolution]
        gr.on(
            [generate.click, prompt.submit],
            self.generate,
            [*fields, history],
            [image, status, scales, seed, history, gallery],
            show_progress="minimal",
            show_progress_on=status,
            **MODEL,
            **PRIVATE,
        )
        stop.click(self.stop, show_progress="hidden", **PRIVATE)  # in a queue of its own
        references.upload(self.keep_fit, references, references, show_progress="hidden", **PRIVATE)
        edit.click(self.edit, image, references, show_progress="hidden", **PRIVATE)
        gallery.select(self.recall, history, [*fields, image, status, scales], show_progress="hidden", **PRIVATE)

    def _build_guidance(self) -> gr.Slider:
        own = self.studio.guidance_scale
        settings = {"step": 0.1, "label": "Guidance", "buttons": [], "min_width": 150, "elem_id": "guidance"}
        if isinstance(own, Sequence):
            own = ", ".join(map(str, own))
            return gr.Slider(0, 10, 0, info=f"1: none. 0: the model's own, {own} by scale", **settings)
        return gr.Slider(1, 10, own, info="Towards the prompt. 1: none", **settings)

    def _build_size(self) -> tuple[gr.Dropdown, gr.Dropdown]:
        ratios, resolutions = self.studio.aspect_ratios(), self.studio.resolutions()
        choices = [("Automatic", "")]
        choices += [(f"{ratio} ({width} × {height})", ratio) for ratio, (width, height) in ratios.items()]
        sizes = [(f"{side} × {side}", 0 if side == self.studio.resolution else side) for side in resolutions]
        with gr.Row(visible=len(ratios) > 1 or len(resolutions) > 1):
            aspect_ratio = gr.Dropdown(
                choices,
                value="",
                label="Aspect ratio",
                info="Automatic: as the first reference, else square",
                visible=len(ratios) > 1,
                min_width=150,
                elem_id="aspect-ratio",
            )
            resolution = gr.Dropdown(
                sizes,
                value=0,
                label="Size",
                info="Of a square image. Best what the model was trained on",
                visible=len(resolutions) > 1,
                min_width=150,
                elem_id="resolution",
            )
        return aspect_ratio, resolution

    def _build_chat(self) -> None:
        chat = gr.Chatbot(
            label="Conversation",
            height=470,
            render_markdown=False,  # what is said is text, and must load nothing
            latex_delimiters=[],
            feedback_options=None,
            buttons=[],
            placeholder="Chat, ask about images, or ask for images and stories",
            elem_id="chat",
            elem_classes=["small-images"] if self.studio.is_small else [],
        )
        box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Say something, and add images if you like",
            file_types=FILE_TYPES,
            file_count="multiple",
            max_lines=6,
            max_plain_text_length=PROMPT_LENGTH,
            elem_id="chat-box",
        )
        with gr.Row():
            max_images = gr.Slider(
                0, 8, 4, step=1, label="Images in an answer, at most", buttons=[], elem_id="max-images"
            )
            stop = gr.Button("Stop", size="md", elem_id="chat-stop", min_width=120)
            clear = gr.Button("New conversation", size="md", elem_id="chat-clear", min_width=120)
        if self.conversations:
            gr.Examples(
                [[{"text": one, "files": []}] for one in self.conversations],
                box,
                label="For example",
                api_visibility="private",
            )
        uploads_only(box)
        messages = gr.State(Conversation())
        box.submit(
            self.chat, [box, max_images, messages], [box, chat, messages], show_progress="minimal", **MODEL, **PRIVATE
        )
        stop.click(self.stop, show_progress="hidden", **PRIVATE)  # in a queue of its own
        # The conversation's own button empties what is shown. In a queue of its own.
        gr.on(
            [clear.click, chat.clear],
            self.begin_conversation,
            messages,
            [chat, messages],
            show_progress="hidden",
            **PRIVATE,
        )


class Conversation(list):
    """Messages of a pipeline; `is_over` once their browser has begun another conversation."""

    is_over = False


def uploads_only(component: gr.components.Component) -> None:
    """
    Gradio also takes the address of an image on the internet in place of an upload, and fetches it itself. The app
    makes no connection to the outside.
    """
    move = component.async_move_resource_to_block_cache

    async def refuse_addresses(path: str | Path | None) -> str | None:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("An image must be uploaded; addresses are not fetched.", print_exception=False)
        return await move(path)

    component.async_move_resource_to_block_cache = refuse_addresses


def paths_of(gallery: list[tuple[str, str | None]] | None) -> list[str]:
    """The files in a gallery."""
    return [path for path, _ in gallery or ()]


def gallery_of(history: list[tuple[str, ImageRequest]]) -> list[tuple[str, str]]:
    """The history as a gallery shows it, each image with the beginning of its prompt."""
    return [(path, image_request.prompt[:80]) for path, image_request in history]


def empty_box() -> dict[str, Any]:
    """The text box of the chat without text and files."""
    return {"text": "", "files": []}


def chat_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a pipeline as Gradio's chat shows them."""
    shown = []
    for message in messages:
        content = [
            html.escape(part["text"]) if part["type"] == "text" else {"path": part["image"]}
            for part in message["content"]
            if part["type"] == "image" or part["text"].strip()
        ]
        shown.append({"role": message["role"], "content": content or "(nothing)"})
    return shown


def scales_html(previews: list[tuple[Any, tuple[int, int]]]) -> str:
    """The image after each scale, with the (height, width) of its grid, side by side."""
    figures = []
    for image, (height, width) in previews:
        small, file = image.copy(), io.BytesIO()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        caption = f"{width} × {height}"
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="strip">{"".join(figures)}</div>'
