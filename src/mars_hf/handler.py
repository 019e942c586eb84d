"""
MARS behind a URL: what Hugging Face's Inference Endpoints call in an exported folder.

    {"inputs": "a red apple", "parameters": {"seed": 0}}                          -> [{"generated_image": "<base64>"}]
    {"inputs": {"image": "<base64>"}}                                             -> [{"generated_text": "..."}]
    {"inputs": "red apple", "parameters": {"generation_mode": "interleaved"}}     -> [{"generated_interleaved": [..]}]

Whatever a request holds was written by a stranger: `read_request` checks all of it before the model is asked. A
picture is never looked for under a name, path or URL, and is decoded only after its header says that it is small.

The endpoint's server (https://github.com/huggingface/huggingface-inference-toolkit) answers 200 with what a handler
returns, whatever that is, and 400 with `{"error": str(exception)}` when it raises. So everything that goes wrong is
raised as a [`RequestError`], which says no more than its message; other servers find the status in it.
"""

import base64
import binascii
import json
import logging
import threading
import unicodedata
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import pipeline

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 4000  # of all texts of a request
MAX_MESSAGES = 32
MAX_PICTURES = 8
MAX_PICTURE_BYTES = 10 * 2**20
MAX_PICTURE_PIXELS = 16 * 2**20
MAX_ASPECT_RATIO = 10  # a picture is scaled until it covers the model's size
MAX_SIDE = 1024  # of a picture to be drawn, in pixels
MAX_RESULTS = 4
MAX_NEW_TOKENS = 4096
MAX_SEED = 2**63 - 1
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MODES = ("image", "text", "interleaved")
DOCUMENTS = "documents"  # folder of the adapter that documents are written with, where there is one
ROLES = ("system", "user", "assistant")


class RequestError(ValueError):
    """
    A request that is not answered.

    Args:
        message (`str`): What came, what was expected and what to do, for the one who asked.
        status (`int`, defaults to 400): The HTTP status of it.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status

    def to_dict(self) -> dict[str, Any]:
        """Give the body of the answer."""
        return {"error": str(self), "status": self.status}


def _shown(value: Any) -> str:
    """Quote what came, shortly."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    quoted = repr(value[:40] if isinstance(value, str) else value)
    return quoted[:40] + ".." * (len(quoted) > 40)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"`{name}` must be a text, got {_shown(value)}.")
    if len(value) > MAX_CHARACTERS:
        raise RequestError(f"`{name}` must have at most {MAX_CHARACTERS} characters, got {len(value)}.")
    if (character := forbidden_character(value, "\t\n\r")) is not None:
        raise RequestError(
            f"`{name}` must hold no control characters and no halves of characters, got U+{ord(character):04X}."
        )
    if shows_nothing(value):
        raise RequestError(f"`{name}` must not be empty.")
    return value


def forbidden_character(text: str, kept: str) -> str | None:
    """Find the first control character that is not `kept`, or half of a character."""
    bad = (one for one in text if unicodedata.category(one) in ("Cc", "Cs") and one not in kept)
    return next(bad, None)


def shows_nothing(text: str) -> bool:
    """Whether a text holds nothing that is seen: spaces, line ends and marks without width."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp") for character in text)


def _number(low: float, high: float, whole: bool = False) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not (low <= value <= high):  # also NaN
            kind = "whole number" if whole else "number"
            raise RequestError(f"`{name}` must be a {kind} from {low} to {high}, got {_shown(value)}.")
        return value

    return check


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"`{name}` must be true or false, got {_shown(value)}.")
    return value


def _mode(name: str, value: Any) -> str:
    if value not in MODES:
        raise RequestError(f"`{name}` must be one of {', '.join(MODES)}, got {_shown(value)}.")
    return value


PARAMETERS: dict[str, Callable[[str, Any], Any]] = {
    "generation_mode": _mode,
    "height": _number(1, MAX_SIDE, whole=True),
    "width": _number(1, MAX_SIDE, whole=True),
    "negative_prompt": _text,
    "guidance_scale": _number(0, 100),
    "do_sample": _switch,
    "temperature": _number(0.01, 100),
    "top_k": _number(1, 2**20, whole=True),
    "top_p": _number(0.001, 1),
    "seed": _number(0, MAX_SEED, whole=True),
    "num_return_sequences": _number(1, MAX_RESULTS, whole=True),
    "max_new_tokens": _number(1, MAX_NEW_TOKENS, whole=True),
}


def open_picture(name: str, value: Any) -> Image.Image:
    """
    Open a picture of a request by its header; its pixels are not decoded.

    Args:
        name (`str`): Where it stands, for messages.
        value (`str` or `PIL.Image.Image`):
            A file in base64, also as a data URL; or what the endpoint's server made of an upload.

    Raises:
        RequestError: If it is no picture, or a large one.
    """
    if not isinstance(value, Image.Image):
        value = _opened(name, value)
    width, height = value.size
    if width * height > MAX_PICTURE_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RequestError(
            f"`{name}` must have at most {MAX_PICTURE_PIXELS} pixels and sides of at most 1 to {MAX_ASPECT_RATIO}, "
            f"got {width} x {height}."
        )
    return value


def _opened(name: str, value: Any) -> Image.Image:
    if not isinstance(value, str):
        raise RequestError(f"`{name}` must be a picture file in base64, got {_shown(value)}.")
    if value.startswith("data:"):
        value = value.partition(",")[2]
    if len(value) > -(-MAX_PICTURE_BYTES // 3) * 4:
        raise RequestError(f"`{name}` must be a file of at most {MAX_PICTURE_BYTES} bytes.", status=413)
    try:
        return Image.open(BytesIO(base64.b64decode(value, validate=True)), formats=PICTURE_FORMATS)
    except binascii.Error:
        raise RequestError(f"`{name}` must be a picture file in base64, got something else.") from None
    except Image.DecompressionBombError:
        raise RequestError(f"`{name}` must have at most {MAX_PICTURE_PIXELS} pixels.") from None
    except Exception:  # readers raise whatever they like
        raise RequestError(f"`{name}` must be a picture file ({', '.join(PICTURE_FORMATS)}).") from None


def _known(name: str, value: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"`{name}` must be an object, got {_shown(value)}.")
    if unknown := [key for key in value if key not in keys]:
        raise RequestError(f"`{name}` has no {_shown(unknown[0])}; it takes {', '.join(keys)}.")
    return value


def read_request(data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Check a request.

    Args:
        data (`dict`):
            `inputs`: a text, a picture, or an object with `text`, `image` or `images`, or with `messages` of a chat.
            `parameters`, optional: as in [`PARAMETERS`].

    Returns:
        `tuple[dict, dict]`: What goes into the any-to-any pipeline: `text` and `images`, and its further arguments.

    Raises:
        RequestError: If anything in it is not as it must be.
    """
    data = _known("request", data, ("inputs", "parameters"))
    parameters = _known("parameters", data.get("parameters") or {}, tuple(PARAMETERS))
    arguments = {name: PARAMETERS[name](name, value) for name, value in parameters.items() if value is not None}
    inputs = data.get("inputs")
    if isinstance(inputs, Image.Image):
        inputs = {"image": inputs}
    elif not isinstance(inputs, dict):
        inputs = {"text": inputs}
    given = _known("inputs", inputs, ("text", "image", "images", "messages"))
    arguments.setdefault("generation_mode", "image" if given.keys() == {"text"} else "text")
    if arguments["generation_mode"] != "image":
        arguments["return_full_text"] = False
    if "messages" in given:
        if len(given) > 1:
            raise RequestError(
                "`inputs` has `messages`, which carry their own texts and pictures: leave the rest out."
            )
        return {"text": _messages(given["messages"])}, arguments
    if "image" in given and "images" in given:
        raise RequestError("`inputs` has `image` and `images`: leave one out.")
    pictures = [given["image"]] if "image" in given else given.get("images", [])
    if not isinstance(pictures, list) or len(pictures) > MAX_PICTURES:
        raise RequestError(f"`images` must be a list of at most {MAX_PICTURES} pictures, got {_shown(pictures)}.")
    asked: dict[str, Any] = {}
    if "text" in given or not pictures:
        asked["text"] = _text("text", given.get("text"))
    if pictures:
        asked["images"] = [open_picture("image", picture) for picture in pictures]
        if "text" not in asked:  # a list without text would ask for a caption of each
            asked["text"] = ""
    return asked, arguments


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Check a chat and write it anew, of nothing but what is known."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"`messages` must be a list of 1 to {MAX_MESSAGES} messages, got {_shown(messages)}.")
    checked: list[dict[str, Any]] = []
    for message in messages:
        message = _known("message", message, ("role", "content"))
        if message.get("role") not in ROLES:
            raise RequestError(f"`role` must be one of {', '.join(ROLES)}, got {_shown(message.get('role'))}.")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not parts:
            raise RequestError("`content` must be a text or a list of at least one part, got [].")
        checked.append({"role": message["role"], "content": [_part(part) for part in parts]})
    every = [part for message in checked for part in message["content"]]
    length = sum(len(part["text"]) for part in every if part["type"] == "text")
    pictures = len([part for part in every if part["type"] == "image"])
    if length > MAX_CHARACTERS or pictures > MAX_PICTURES:
        raise RequestError(
            f"A chat must have at most {MAX_CHARACTERS} characters and {MAX_PICTURES} pictures, got {length} and "
            f"{pictures}."
        )
    return checked


def _part(part: Any) -> dict[str, Any]:
    part = _known("content", part, ("type", "text", "image"))
    kind = part.get("type")
    if kind not in ("text", "image") or part.keys() != {"type", kind}:
        raise RequestError(
            'A part of `content` must be {"type": "text", "text": ..} or {"type": "image", "image": <base64>}, got '
            f"{_shown(part)} of type {_shown(kind)}."
        )
    check = _text if kind == "text" else open_picture
    return {"type": kind, kind: check(kind, part[kind])}


def decode_pictures(asked: dict[str, Any]) -> None:
    """Decode the opened pictures of a request, one by one."""
    parts = [part for message in asked["text"] for part in message["content"]] if "images" not in asked else []
    chat = [part["image"] for part in parts if part["type"] == "image"]
    for picture in [*asked.get("images", []), *chat]:
        try:
            picture.load()
        except Exception:  # readers raise whatever they like
            raise RequestError("A picture of the request is truncated or damaged.") from None


def encode_picture(picture: Image.Image) -> str:
    """Give a picture as a PNG file in base64."""
    file = BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _encoded(content: Any) -> Any:
    """Bring text, a picture, or a document of both into JSON's types."""
    if isinstance(content, Image.Image):
        return encode_picture(content)
    if isinstance(content, list):
        parts = [(("text", part) if isinstance(part, str) else ("image", encode_picture(part))) for part in content]
        return [{"type": kind, kind: part} for kind, part in parts]
    return content


class EndpointHandler:
    """
    Answer requests with the MARS of a folder; from several threads, one after the other.

    Args:
        path (`str`): Folder of the checkpoint, as `mars-hf export` writes it.

    Raises:
        ValueError: If the folder holds no MARS, or one whose weights this code does not fit.
    """

    def __init__(self, path: str = ""):
        folder = Path(path or ".")
        config = folder / "config.json"
        if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "mars":
            raise ValueError(f"{folder} holds no MARS: expected a folder that `mars-hf export` wrote.")
        self.pipeline = pipeline("any-to-any", model=str(folder), trust_remote_code=True)
        self.has_adapter = (folder / DOCUMENTS / "adapter_config.json").is_file()
        if self.has_adapter:
            found = self.pipeline.model.load_adapter(str(folder / DOCUMENTS))
            if odd := sorted(map(str, found.missing_keys | found.unexpected_keys)):
                raise ValueError(
                    f"The adapter in {folder / DOCUMENTS} does not fit: {len(odd)} tensors, {odd[0]} first."
                )
            self.pipeline.model.disable_adapters()
        self.lock = threading.Lock()

    def _run(self, asked: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """Run the pipeline; documents are written with the adapter, and all else is done without."""
        with_adapter = self.has_adapter and arguments["generation_mode"] == "interleaved"
        if with_adapter:
            self.pipeline.model.enable_adapters()
        try:
            return self.pipeline(**asked, **arguments)
        finally:
            if with_adapter:
                self.pipeline.model.disable_adapters()

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Answer one request.

        Args:
            data (`dict`): See [`read_request`].

        Returns:
            `list[dict]`: For each result `generated_image` (a PNG in base64), `generated_text`, or
            `generated_interleaved`, a list of `{"type": "text", "text": ..}` and `{"type": "image", "image": ..}`.

        Raises:
            RequestError: If the request cannot be answered.
        """
        try:
            asked, arguments = read_request(data)
            if arguments["generation_mode"] == "interleaved":
                context = self.pipeline.model.config.text_config.max_position_embeddings
                if context > 2 * MAX_NEW_TOKENS:
                    arguments.setdefault("max_new_tokens", MAX_NEW_TOKENS)  # instead of the rest of the context
            with self.lock:  # the pixels of one request at a time, too
                if "images" in asked or not isinstance(asked["text"], str):
                    decode_pictures(asked)
                results = self._run(asked, arguments)
        except RequestError:
            raise
        except ValueError as error:  # MARS's own words for whoever asked
            raise RequestError(str(error)) from None
        except Exception:
            logger.exception("A request failed.")
            raise RequestError("The model failed on this request; the endpoint's log says why.", status=500) from None
        key = f"generated_{arguments['generation_mode']}"
        return [{key: _encoded(result[key])} for result in results]


__all__ = ["EndpointHandler", "RequestError", "read_request"]
