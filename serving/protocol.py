"""OpenAI's requests for images and conversations, and ours beside them: what is accepted, within which limits.

Fields of OpenAI's mean what they mean there; sampling has the pipeline's names (in a conversation, where `temperature`
and `top_p` are the text's, the generation config's: `image_temperature`). Unknown fields are refused by name. Knows
neither HTTP nor a pipeline.
"""

import base64
import io
import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..processing.image_fetching_nextflow import fetch
from ..processing.image_loading_nextflow import load_image, open_header


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
QUALITIES = {"low": "low", "high": "high", "hd": "high", "xhigh": "high", "max": "high"}  # the others are medium
MAX_SEED = 2**63 - 1
TOOLS = ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls")


class BadRequest(ValueError):
    """
    What a client can put right.

    Args:
        message (`str`): What was wrong, and what is expected.
        param (`str`, *optional*): The field.
        status (`int`, *optional*, defaults to 400): HTTP status of the answer.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400):
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """
    What one request may ask for.

    Args:
        images (`int`): Images that are sampled, `n` or `max_images`.
        source_images (`int`): Images that are sent.
        prompt_characters (`int`): Most characters of all texts together.
        new_tokens (`int`): Most new tokens of an answer.
        body_bytes (`int`): Most bytes of a request.
        image_bytes (`int`), image_pixels (`int`): Most bytes and pixels of an image that is sent or fetched.
        fetch_seconds (`float`): In which an address has to deliver it.
    """

    images: int = 10
    source_images: int = 16
    prompt_characters: int = 32_000
    new_tokens: int = 4096
    body_bytes: int = 100 * 2**20
    image_bytes: int = 50 * 2**20
    image_pixels: int = 50_000_000
    fetch_seconds: float = 10.0


Number = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
PerScale = Number | Annotated[list[Number], Field(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
CountPerScale = Count | Annotated[list[Count], Field(min_length=1, max_length=64)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Pixels = Annotated[int, Field(ge=1, le=2**16)]
# Fields of OpenAI's that change nothing here.
Ignored = Any


class Body(BaseModel):
    """What every request says of its images."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    size: str = "auto"
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = "auto"
    seed: Seed = Field(default_factory=lambda: secrets.randbelow(2**32))
    stream: bool = False
    user: Ignored = None
    safety_identifier: Ignored = None
    # Ours, by the pipeline's names.
    negative_prompt: str = ""
    guidance_scale: PerScale | None = None
    guidance_schedule: Literal["constant", "linear", "early"] | None = None
    image_guidance_scale: PerScale | None = None
    aspect_ratio: str | None = None
    resolution: Pixels | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None

    @model_validator(mode="before")
    @classmethod
    def leave_out_nulls(cls, data: Any) -> Any:
        """Treat a field that is null as one that is not given."""
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """`size` as (height, width) in pixels, or `None` for `"auto"`; raises [`BadRequest`] for anything else."""
        if self.size == "auto":
            return None
        match = SIZE.fullmatch(self.size)
        if match is None or "0" in match.groups():
            raise BadRequest(
                f'size is {self.size[:40]!r}, expected "auto" or "WIDTHxHEIGHT", as in "1024x1024"', "size"
            )
        return int(match[2]), int(match[1])

    def sampling(self, **own: Any) -> dict[str, Any]:
        """Arguments of the pipeline; `own` are those that have other names here."""
        size = self.height_and_width
        height, width = size or (None, None)
        settings = {
            "height": height,
            "width": width,
            "aspect_ratio": self.aspect_ratio,
            "resolution": self.resolution,
            "guidance_scale": self.guidance_scale,
            "guidance_schedule": self.guidance_schedule,
            "image_guidance_scale": self.image_guidance_scale,
            "num_inference_steps": self.num_inference_steps,
            **own,
        }
        return {name: value for name, value in settings.items() if value is not None}


class ImageOptions(Body):
    """What `/v1/images/generations` and `/v1/images/edits` share."""

    prompt: Annotated[str, Field(min_length=1)]
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    response_format: Literal["b64_json", "url"] = "b64_json"
    partial_images: Annotated[int, Field(ge=0, le=32)] = 0
    background: Literal["auto", "opaque"] = "auto"  # nothing is transparent here
    moderation: Ignored = None
    temperature: PerScale | None = None
    top_k: CountPerScale | None = None
    top_p: PerScale | None = None

    @property
    def texts(self) -> list[str]:
        """All text of the request, whose length is limited."""
        return [self.prompt]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of sampling that were given, by the names of the pipeline's arguments."""
        return self.sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class GenerationBody(ImageOptions):
    """`/v1/images/generations`."""

    style: Ignored = None


class EditBody(ImageOptions):
    """`/v1/images/edits`: images and mask are files of the form, or `images` with addresses in JSON."""

    images: list[dict[Literal["image_url"], str]] = Field(default_factory=list)
    mask: dict[Literal["image_url"], str] | None = None
    input_fidelity: Ignored = None  # `image_guidance_scale` says how close an edit stays


class TextPart(BaseModel):
    """A text of a message."""

    type: Literal["text"]
    text: str

    def load(self, limits: Limits) -> dict[str, Any]:
        """The part as the pipeline's messages have it."""
        return self.model_dump()


class ImagePart(BaseModel):
    """An image by a public address or a data URI: `{"url": address}`, or the address alone."""

    type: Literal["image_url"]
    image_url: dict[str, Any] | str

    def load(self, limits: Limits) -> dict[str, Any]:
        """
        The part as the pipeline's messages have it, with its image read; raises [`BadRequest`] where it cannot be.
        """
        address = self.image_url if isinstance(self.image_url, str) else self.image_url.get("url")
        return {"type": "image", "image": read_image(address, limits, "an image of the messages")}


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    images: list[ImagePart] = []  # where an answer of ours comes back, beside its text
    tool_calls: Annotated[list | None, Field(max_length=0)] = None

    @model_validator(mode="before")
    @classmethod
    def as_parts(cls, data: Any) -> Any:
        """Turn a text into a list of one part, and missing content into an empty list."""
        if not isinstance(data, dict):
            return data
        content = data.get("content") or []
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return {**data, "content": content, "images": data.get("images") or []}

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Its texts and images; an earlier answer has its images after the text."""
        return [*self.content, *self.images]


class ChatBody(Body):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    modalities: list[Literal["text", "image"]] = ["text"]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    max_images: Annotated[int, Field(ge=1)] | None = None
    image_temperature: PerScale | None = None
    image_top_k: CountPerScale | None = None
    image_top_p: PerScale | None = None
    # OpenAI's, with the one value that asks for nothing.
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] = False
    stream_options: dict[str, Any] | None = None
    metadata: Ignored = None
    store: Literal[False] = False

    @property
    def texts(self) -> list[str]:
        """All text of the request, whose length is limited."""
        return [part.text for message in self.messages for part in message.parts if isinstance(part, TextPart)]

    @property
    def num_images(self) -> int:
        """Number of images in all messages."""
        return sum(isinstance(part, ImagePart) for message in self.messages for part in message.parts)

    def conversation(self, limits: Limits) -> list[dict[str, Any]]:
        """The pipeline's messages, with their images loaded."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": [part.load(limits) for part in message.parts],
            }
            for message in self.messages
        ]

    @property
    def image_settings(self) -> dict[str, Any]:
        """The settings of sampling images that were given, by the names of the pipeline's arguments."""
        return self.sampling(temperature=self.image_temperature, top_k=self.image_top_k, top_p=self.image_top_p)

    def interleave_settings(self, limits: Limits) -> dict[str, Any]:
        """Arguments of the pipeline's `interleave`: text, and images where they are asked for."""
        if "image" not in self.modalities:
            return self.text_settings(limits)
        for name in ("num_inference_steps", "image_guidance_scale"):
            if getattr(self, name) is not None:
                raise BadRequest(f'{name} goes with `modalities: ["image"]`, expected none beside text', name)
        return {**self.text_settings(limits), **self.image_settings, "negative_prompt": self.negative_prompt}

    def text_settings(self, limits: Limits) -> dict[str, Any]:
        """The settings of text that were given, by the names of `interleave`'s arguments."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.temperature == 0:
            given = {"temperature": 0.0}  # the best token, of which no share or rank takes anything away
        settings = {f"text_{name}": value for name, value in given.items() if value is not None}
        most = self.max_completion_tokens or self.max_tokens
        return settings if most is None else {**settings, "max_new_tokens": min(most, limits.new_tokens)}


def parse(kind: type[Body], data: Any) -> Any:
    """`data` as a request, or [`BadRequest`] with its first mistake."""
    if isinstance(data, dict) and kind is ChatBody:
        for name in TOOLS:
            if data.pop(name, None) not in (None, [], "none", "auto"):
                raise BadRequest(f"{name} is not supported: this model calls no tools", name)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Without what pydantic calls the kinds of a union, as in `temperature.constrained-float`.
        where = first["loc"][:3] if first["loc"][:1] == ("messages",) else first["loc"][:1]
        name = ".".join(map(str, where))
        message = "it is not known here" if first["type"] == "extra_forbidden" else first["msg"]
        raise BadRequest(f"{name or 'the request'}: {message}"[:300], name or None) from None


def check_counts(body: ImageOptions | ChatBody, limits: Limits, num_images: int) -> None:
    """What depends on the limits."""
    texts = [*body.texts, body.negative_prompt]
    characters = sum(map(len, texts))
    if characters > limits.prompt_characters:
        raise BadRequest(f"the prompt has {characters} characters, expected at most {limits.prompt_characters}")
    if num_images > limits.source_images:
        raise BadRequest(f"got {num_images} images, expected at most {limits.source_images}", "image")
    for name in ("n", "max_images"):
        if (value := getattr(body, name, None) or 0) > limits.images:
            raise BadRequest(f"{name} is {value}, expected at most {limits.images}", name)
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise BadRequest("the prompt has half of a surrogate pair, expected Unicode text")


def read_image(source: Any, limits: Limits, name: str) -> Image.Image:
    """An image that a client sent: the bytes of a file, a data URI, or a public address. Never a path."""
    if not isinstance(source, bytes) and not (isinstance(source, str) and is_address(source)):
        raise BadRequest(f"{name} is no image: expected a file, a data:image/...;base64, URI or an http(s) address")
    try:
        return load_image(
            source,
            limits.image_pixels,
            max_bytes=limits.image_bytes,
            timeout=limits.fetch_seconds,
            formats=FORMATS,
            name=name,
        )
    except ValueError as error:
        raise BadRequest(str(error)[:300]) from error


def read_mask(source: Any, limits: Limits) -> Image.Image:
    """
    A mask, white where the image changes. As OpenAI has it, that is where the file is transparent; without an alpha
    channel it is where it is white.
    """
    reading = {"max_bytes": limits.image_bytes, "formats": FORMATS, "name": "the mask"}
    try:
        if isinstance(source, str) and DATA_URI.match(source):
            source = base64.b64decode(source.partition(",")[2], validate=True)
        elif isinstance(source, str) and is_address(source):
            source = fetch(source, max_bytes=limits.image_bytes, timeout=limits.fetch_seconds)
        if isinstance(source, bytes):
            with open_header(source, limits.image_pixels, **reading) as image:
                if image.has_transparency_data:
                    alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
                    return alpha.point(lambda value: 0 if value else 255)
    except Exception as error:  # of Pillow: OSError, SyntaxError, struct.error, ...
        raise BadRequest(f"the mask: {error}"[:300], "mask") from error
    return read_image(source, limits, "the mask")


def is_address(text: str) -> bool:
    """Whether `text` is a web address or a data URI."""
    return text.lower().startswith(("http://", "https://")) or DATA_URI.match(text) is not None


def encode_image(image: Image.Image, output_format: str = "png", compression: int = 100) -> str:
    """An image as base64 of a file; `compression` is the quality of JPEG and WebP."""
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": compression}
    image.save(buffer, format=output_format, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
