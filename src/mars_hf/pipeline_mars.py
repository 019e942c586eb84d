"""
The pipelines of MARS: `"text-to-image"` draws prompts, `"any-to-any"` takes and gives text, pictures and both.

The processor writes the text and makes pictures of pixels, `generate` writes and draws; what is left here is to sort
the arguments to them and to give each input its own results back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers.pipelines import Pipeline
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .super_resolution_mars import Enlarger

# What the pipelines hand on to `generate` under its own name; the rest goes through `generate_kwargs`.
_DRAWING_ARGUMENTS = ("guidance_scale", "do_sample", "temperature", "top_k", "top_p", "seed", "generator")
_WRITING_ARGUMENTS = ("max_new_tokens", "num_return_sequences", "image_kwargs")
# What the any-to-any pipeline hands on to the processor.
_PROCESSOR_ARGUMENTS = ("height", "width", "image_sizes", "negative_prompt")
_DECODING_ARGUMENTS = ("skip_special_tokens", "clean_up_tokenization_spaces")

DEFAULT_NEW_TOKENS = 256  # of a text, as in transformers' pipelines

Segment = str | Image.Image | dict[str, Any]  # a dictionary is a picture as a chat has it


class _MarsBasePipeline(Pipeline):
    """What the pipelines share: they load a processor, and call `generate`."""

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True

    def _generate_arguments(
        self, known: tuple[str, ...], given: dict[str, Any], generate_kwargs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Collect the arguments of `generate`; refuse unknown ones and what is given twice."""
        if unknown := [name for name in given if name not in known]:
            raise TypeError(
                f"The {self.task or 'MARS'} pipeline takes no argument `{unknown[0]}`. What else `generate` takes "
                "goes into `generate_kwargs`."
            )
        named = {name: value for name, value in given.items() if value is not None}
        if twice := sorted(named.keys() & (generate_kwargs or {}).keys()):
            raise ValueError(f"`{twice[0]}` is given twice: by its own name and in `generate_kwargs`. Leave one out.")
        arguments = {**(generate_kwargs or {}), **named}
        if arguments.get("seed") is not None and arguments.get("generator") is not None:
            raise ValueError("`seed` and `generator` are both given, but a generator has its own seed. Leave one out.")
        return arguments


class MarsPipeline(_MarsBasePipeline):
    r"""
    Draw pictures for prompts, task `"text-to-image"`.

    One prompt gives a list of `num_images_per_prompt` dictionaries `{"generated_image": PIL.Image.Image}`, a list of
    prompts a list of such lists.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("text-to-image", model="mars-emoji", trust_remote_code=True)
    >>> picture = pipe("a red apple", height=64, width=64, guidance_scale=3.0)[0]["generated_image"]
    ```
    """

    _enlarger: Enlarger | None = None

    def __call__(self, inputs: str | list[str], **kwargs: Any) -> Any:
        r"""
        Draw pictures.

        Args:
            inputs (`str` or `list[str]`):
                One or several prompts. A generator or a `Dataset` of prompts is drawn as it is read.
            height (`int`, *optional*):
                Height of the pictures in pixels. Defaults to the model's `config.default_image_size`.
            width (`int`, *optional*):
                Width of the pictures in pixels. Defaults to the model's `config.default_image_size`.
            negative_prompt (`str`, *optional*):
                What guidance leads away from. `None` leads away from a picture without a caption.
            num_images_per_prompt (`int`, *optional*):
                Number of pictures for each prompt, 1 if not given.
            guidance_scale (`float`, *optional*):
                Strength of guidance; 1 is none. Like all arguments of `generate` that follow, it defaults to the
                checkpoint's generation config.
            do_sample (`bool`, *optional*):
                Whether to draw codes at random; `False` takes the likeliest.
            temperature (`float`, *optional*):
                Divisor of the logits.
            top_k (`int`, *optional*):
                Number of likeliest codes to choose from.
            top_p (`float`, *optional*):
                Probability mass of the likeliest codes to choose from.
            seed (`int`, *optional*):
                Seed of the choice. Each batch starts from it, so that with the default `batch_size=1` a prompt gives
                the same pictures alone and in a list.
            generator (`torch.Generator`, *optional*):
                Source of chance that goes on from one prompt to the next; takes the place of `seed`.
            super_resolution (`bool`, *optional*, defaults to `False`):
                Draw the pictures larger with the model of super-resolution that the checkpoint's folder carries.
            batch_size (`int`, *optional*):
                Number of prompts that are drawn together, 1 if not given.
            generate_kwargs (`dict`, *optional*):
                Further arguments of `generate`.

        Returns:
            `list[dict]` or `list[list[dict]]`: The pictures of one prompt, or of each.

        Raises:
            ValueError: If a prompt is no string, there is none, an argument is given twice, or there is no model of
                super-resolution.
        """
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if inputs == []:
            raise ValueError("Expected a prompt or a list of at least one, got an empty list.")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int | None = None,
        super_resolution: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess: dict[str, Any] = {"height": height, "width": width, "negative_prompt": negative_prompt}
        if super_resolution:
            self._load_enlarger()  # says at once if there is none
            preprocess["keep_caption"] = True
        forward = self._generate_arguments(_DRAWING_ARGUMENTS, kwargs, generate_kwargs)
        if num_images_per_prompt is not None:
            if num_images_per_prompt < 1:
                raise ValueError(f"`num_images_per_prompt` must be 1 or more, got {num_images_per_prompt}.")
            if "num_return_sequences" in forward:
                raise ValueError("`num_images_per_prompt` is given twice: also as `num_return_sequences`.")
            forward["num_return_sequences"] = num_images_per_prompt
        return {key: value for key, value in preprocess.items() if value is not None}, forward, {}

    def preprocess(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        keep_caption: bool = False,
    ) -> dict[str, Any]:
        if not isinstance(prompt, str):
            raise ValueError(f"A prompt must be a string, got {type(prompt).__name__}: {prompt!r}.")
        size = self.model.config.default_image_size
        inputs = self.processor(
            prompt,
            height=size if height is None else height,
            width=size if width is None else width,
            negative_prompt=negative_prompt,
            return_tensors="pt",
        )
        return {**inputs, "captions": [prompt]} if keep_caption else inputs

    def _load_enlarger(self) -> Enlarger:
        if self._enlarger is None:
            if not (name := self.model.config._name_or_path):
                raise ValueError("`super_resolution` needs a pipeline that was loaded from a folder or repository.")
            self._enlarger = Enlarger.of(name, dtype=self.model.dtype, **getattr(self.model, "_hub_arguments", {}))
            self._enlarger.model.to(self.device)
        return self._enlarger

    def _forward(self, model_inputs: dict[str, Any], seed: int | None = None, **generate_kwargs: Any):
        if seed is not None:
            generate_kwargs["generator"] = torch.Generator(self.device).manual_seed(seed)
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        captions = model_inputs.pop("captions", None)
        sequences = self.model.generate(**model_inputs, **generate_kwargs, generation_mode="image")
        if captions is None:
            pixels = self.model.decode_image_tokens(sequences, model_inputs["image_sizes"])
        else:
            drawn = self.model.collect_image_codes(sequences, model_inputs["image_sizes"])
            flat = [one if isinstance(one, str) else one[0] for one in captions]
            chance = {"generator": generate_kwargs["generator"]} if "generator" in generate_kwargs else {}
            pixels = self._load_enlarger()(flat, [codes for row in drawn for codes in row], **chance)
        # One row for each prompt, which is how the library takes a batch apart.
        return {"pixel_values": torch.stack(pixels).unflatten(0, (len(model_inputs["input_ids"]), -1))}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, Image.Image]]:
        (pixels,) = model_outputs["pixel_values"]  # (pictures, 3, height, width)
        images = self.processor.post_process_multimodal_output(list(pixels), generation_mode="image")
        return [{"generated_image": image} for image in images]


@dataclass(frozen=True)
class _Request:
    """One input of the any-to-any pipeline: a chat, or a text with its pictures."""

    messages: list[dict[str, Any]] | None = None
    text: str = ""
    images: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, inputs: Any) -> "_Request":
        if isinstance(inputs, Chat):
            return cls(messages=list(inputs.messages))
        if isinstance(inputs, (list, tuple)) and inputs and is_valid_message(inputs[0]):
            return cls(messages=list(Chat(inputs).messages))
        if isinstance(inputs, str):
            inputs = {"text": inputs}
        if not isinstance(inputs, dict) or not inputs.keys() <= {"text", "images"}:
            raise ValueError(
                "An input must be a text, a chat (messages with `role` and `content`) or a dictionary with `text` and "
                f"`images`, got {type(inputs).__name__}: {inputs!r:.100}."
            )
        text, images = inputs.get("text"), inputs.get("images")
        if text is not None and not isinstance(text, str):
            if images is not None:
                raise ValueError("A chat carries its pictures in its messages: leave `images` out.")
            return cls.of(text)
        images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        if not text and not images:
            raise ValueError("An input must have a text or pictures, got neither.")
        return cls(text=text or "", images=images)

    def goes_on(self, continue_final_message: bool | None) -> bool:
        """Whether the answer goes on with the chat's last message, by default if that is the assistant's."""
        if self.messages is None or continue_final_message is not None:
            return bool(continue_final_message)
        return self.messages[-1]["role"] == "assistant"

    def contents(self) -> list[list[Segment]]:
        """Give the texts and pictures of each message."""
        if self.messages is None:
            return [[*self.images, self.text]]
        return [_segments(message["content"]) for message in self.messages]

    def has_pictures(self) -> bool:
        return not all(isinstance(segment, str) for content in self.contents() for segment in content)

    def caption(self) -> str:
        """Give what is to be drawn."""
        first, *others = self.contents()
        if others or self.has_pictures():
            raise ValueError(
                "`generation_mode='image'` draws a caption: a text, or a chat of one message without pictures. "
                "`generation_mode='interleaved'` answers longer chats and pictures, also with pictures."
            )
        return "".join(map(str, first))

    def followed_by(self, content: str | list[Segment], goes_on: bool, image_token: str) -> Any:
        """Give the prompt together with what was generated: a text, a list of segments, or a chat."""
        if self.messages is None:
            if isinstance(content, str):
                return self.text + content
            return _joined([*self._laid_out(image_token), *content])
        if not goes_on:
            return [*self.messages, {"role": "assistant", "content": _chat_content(content)}]
        last = self.messages[-1]
        if isinstance(last["content"], str) and isinstance(content, str):
            whole: Any = last["content"] + content
        else:
            whole = _chat_content(_joined([*_segments(last["content"]), *_segments(content)]))
        return [*self.messages[:-1], {**last, "content": whole}]

    def _laid_out(self, image_token: str) -> list[Segment]:
        """Give the segments of a prompt as the processor lays them out."""
        first, *others = self.text.split(image_token)
        if self.images and not others:
            return [*self.images, "\n" + first]
        return [first, *(part for pair in zip(self.images, others, strict=True) for part in pair)]


def _segments(content: Any) -> list[Segment]:
    """Give the texts and pictures of a message's content."""
    if isinstance(content, str):
        return [content]
    parts = content or []
    is_text = [isinstance(part, dict) and part.get("type") == "text" for part in parts]
    return [part["text"] if text else part for part, text in zip(parts, is_text, strict=True)]


def _joined(segments: list[Segment]) -> list[Segment]:
    """Join texts that stand side by side, and drop empty ones."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and isinstance(joined[-1], str) and isinstance(segment, str):
            joined[-1] += segment
        else:
            joined.append(segment)
    return [segment for segment in joined if not (isinstance(segment, str) and segment == "")]


def _chat_content(content: str | list[Segment]) -> str | list[dict[str, Any]]:
    """Write generated text, or segments, as the content of a message."""
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": segment}
        if isinstance(segment, str)
        else segment
        if isinstance(segment, dict)
        else {"type": "image", "image": segment}
        for segment in content
    ]


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Let the library's sampler of words start from a seed, and put the chance of everybody else back afterwards."""
    if seed is None:
        yield
        return
    is_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if is_cpu else [device], device_type="cuda" if is_cpu else device.type):
        torch.manual_seed(seed)
        yield


class MarsAnyToAnyPipeline(_MarsBasePipeline):
    r"""
    Read and write text, pictures and documents of both, task `"any-to-any"`.

    It is called as transformers' pipeline of that name, which needs torchvision and knows no documents. One input
    gives a list of dictionaries, one for each of `num_return_sequences`; a list of inputs gives a list of such lists.
    `generation_mode` says what comes:

    - `"text"` (the default): `{"input_text": .., "generated_text": ..}`.
    - `"image"`: `{"input_text": .., "generated_image": PIL.Image.Image}`.
    - `"interleaved"`: `{"input_text": .., "generated_interleaved": [text, picture, ..]}`, for a chat the chat with
      the answer, whose content holds `{"type": "text", ..}` and `{"type": "image", ..}`.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("any-to-any", model="mars-emoji", trust_remote_code=True)
    >>> picture = pipe("a red apple", generation_mode="image")[0]["generated_image"]
    >>> caption = pipe(images=picture)[0]["generated_text"]
    >>> story = pipe("red apple", generation_mode="interleaved")[0]["generated_interleaved"]
    ```
    """

    def __call__(  # type: ignore[override]
        self, text: Any = None, images: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        r"""
        Answer texts, pictures and chats.

        Args:
            text (`str`, `list[str]`, `list[dict]`, `list[list[dict]]`, `dict` or `list[dict]`, *optional*):
                A text or several, a chat or several, or dictionaries with `text` and `images`. A generator or a
                `Dataset` of any of them is answered as it is read.
            images (picture, `list` or `list[list]`, *optional*):
                All pictures of one text, or for several texts the pictures of each. In a text every `<imgpad>` is a
                picture's place; a single picture may also stand alone in front. Without `text`, captions are asked
                for, one for each picture. A chat carries its pictures in its messages.
            generation_mode (`str`, *optional*): `"text"` (as `None`), `"image"` or `"interleaved"`.
            height (`int`, *optional*):
                In pixels, of the pictures to be drawn; in text mode, of those to be read. Defaults to the model's
                `config.default_image_size`.
            width (`int`, *optional*): Goes with `height`.
            image_sizes (`list`, *optional*):
                Another way to give sizes: in documents one for each picture, see [`MarsProcessor`].
            negative_prompt (`str`, *optional*): What guidance leads away from.
            max_new_tokens (`int`, *optional*):
                Most new tokens. Defaults to 256 for a text, and to what the context has room for in a document.
            num_return_sequences (`int`, *optional*): Number of results for each input, 1 if not given.
            guidance_scale, do_sample, temperature, top_k, top_p, image_kwargs (*optional*): Of `generate`.
            seed (`int`, *optional*):
                Seed of the choice. Each batch starts from it, so that with the default `batch_size=1` an input gives
                the same results alone and in a list.
            generator (`torch.Generator`, *optional*):
                Source of chance of pictures and documents that goes on from one input to the next.
            stop_sequence (`str` or `list[str]`, *optional*): Texts that end a text.
            return_full_text (`bool`, *optional*, defaults to `True`):
                Give the prompt or chat with what was generated, or that alone.
            return_tensors (`bool`, *optional*):
                Give `{"input_text": .., "generated_token_ids": ..}` instead, prompt included.
            continue_final_message (`bool`, *optional*):
                Go on with a chat's last message; by default if it is the assistant's.
            skip_special_tokens, clean_up_tokenization_spaces (`bool`, *optional*): Of the tokenizer's `decode`.
            processor_kwargs (`dict`, *optional*): Further arguments of the processor.
            generate_kwargs (`dict`, *optional*): Further arguments of `generate`.
            batch_size (`int`, *optional*): Number of inputs that are answered together, 1 if not given.

        Returns:
            `list[dict]` or `list[list[dict]]`: The results of one input, or of each.

        Raises:
            ValueError: If there is no input, one is of the wrong kind, or an argument does not belong to the mode.
        """
        for modality, given in (("videos", videos), ("audio", audio)):
            if given is not None:
                raise ValueError(f"MARS takes text and pictures, got `{modality}`.")
        inputs = _collected(text, images)
        if isinstance(inputs, list) and not inputs:
            raise ValueError("Expected an input or a list of at least one, got an empty list.")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        generation_mode: str | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        stop_sequence: str | list[str] | None = None,
        continue_final_message: bool | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        return_full_text: bool | None = None,
        return_tensors: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if generation_mode not in (None, "text", "image", "interleaved"):
            raise ValueError(f"`generation_mode` must be 'text', 'image' or 'interleaved', got {generation_mode!r}.")
        if return_full_text is not None and (return_tensors or generation_mode == "image"):
            raise ValueError(
                "`return_full_text` is for text and documents: leave it out with `return_tensors` and with "
                "`generation_mode='image'`."
            )
        forward = {name: kwargs.pop(name) for name in (*_PROCESSOR_ARGUMENTS, *_DECODING_ARGUMENTS) if name in kwargs}
        if stop_sequence is not None:
            stops = [stop_sequence] if isinstance(stop_sequence, str) else stop_sequence
            generate_kwargs = {**(generate_kwargs or {}), "stop_strings": stops}
        forward |= self._generate_arguments(_DRAWING_ARGUMENTS + _WRITING_ARGUMENTS, kwargs, generate_kwargs)
        shared = {"generation_mode": generation_mode, "continue_final_message": continue_final_message}
        forward |= {**shared, "processor_kwargs": processor_kwargs}
        postprocess = {**shared, "return_full_text": return_full_text, "return_tensors": return_tensors}
        given = [{name: value for name, value in part.items() if value is not None} for part in (forward, postprocess)]
        return {}, given[0], given[1]

    def preprocess(self, inputs: Any) -> dict[str, _Request]:
        # The processor pads what a batch holds, so that it is called where the batch is known.
        return {"requests": _Request.of(inputs)}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        generation_mode: str = "text",
        seed: int | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        requests = model_inputs["requests"]
        requests = requests if isinstance(requests, list) else [requests]
        decoding = {name: arguments.pop(name) for name in _DECODING_ARGUMENTS if name in arguments}
        k = arguments.get("codes_per_step")
        k = self.model.config.trained_codes_per_step[0] if k is None else k
        inputs = self._process(requests, generation_mode, k, arguments)
        inputs = self._ensure_tensor_on_device(dict(inputs), self.device)
        sequences = self._generate(inputs, generation_mode, seed, arguments)
        contents = self._contents(sequences, inputs, generation_mode, decoding)
        count = len(sequences) // len(requests)
        places = [slice(row * count, (row + 1) * count) for row in range(len(requests))]
        # Dictionaries in a list, which is how the library takes a batch of them apart.
        return {
            "outcomes": [
                {"request": request, "sequences": sequences[place], "contents": contents[place]}
                for request, place in zip(requests, places, strict=True)
            ]
        }

    def _process(
        self, requests: list[_Request], mode: str, codes_per_step: int, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Prepare a batch, and take what belongs to that out of `arguments`."""
        options = {name: arguments.pop(name) for name in _PROCESSOR_ARGUMENTS if name in arguments}
        options |= {"codes_per_step": codes_per_step, **arguments.pop("processor_kwargs", {})}
        goes_on = {request.goes_on(arguments.get("continue_final_message")) for request in requests}
        arguments.pop("continue_final_message", None)
        if mode != "text" and "image_sizes" not in options:
            side = self.model.config.default_image_size
            options = {"height": side, "width": side, **options}
        if mode == "image":
            return self.processor([request.caption() for request in requests], **options)
        if mode == "interleaved":
            options["generation_mode"] = mode
        elif (useless := options.keys() & {*_PROCESSOR_ARGUMENTS}) and not any(map(_Request.has_pictures, requests)):
            raise ValueError(f"`{min(useless)}` belongs to pictures, but this call reads and draws none.")
        is_chat = {request.messages is not None for request in requests}
        if len(is_chat) > 1 or len(goes_on) > 1:
            raise ValueError(
                "A batch holds texts, or chats that all end with the assistant's message, or chats that all do not; "
                "this one mixes them. Leave `batch_size` at 1, or call once for each kind."
            )
        if is_chat == {True}:
            chats, (last,) = [request.messages for request in requests], goes_on
            turn = {"continue_final_message": last, "add_generation_prompt": not last}
            return self.processor.apply_chat_template(
                chats, tokenize=True, return_dict=True, processor_kwargs=options, **turn
            )
        images = [request.images for request in requests]
        return self.processor([request.text for request in requests], images if any(images) else None, **options)

    def _generate(
        self, inputs: dict[str, Any], mode: str, seed: int | None, arguments: dict[str, Any]
    ) -> torch.Tensor:
        if mode != "text":
            if seed is not None:
                arguments["generator"] = torch.Generator(self.device).manual_seed(seed)
            arguments = self._prepare_generate_kwargs(arguments)
            return self.model.generate(**inputs, **arguments, generation_mode=mode)
        given = self._get_set_generation_params({**self._generate_kwargs, **arguments})
        length = {} if given.keys() & {"max_new_tokens", "max_length"} else {"max_new_tokens": DEFAULT_NEW_TOKENS}
        if "stop_strings" in arguments:
            arguments["tokenizer"] = self.tokenizer
        arguments = self._prepare_generate_kwargs(arguments, **length)
        with _seeded(seed, self.device):
            return self.model.generate(**inputs, **arguments)

    def _contents(
        self, sequences: torch.Tensor, inputs: dict[str, Any], mode: str, decoding: dict[str, Any]
    ) -> list[Any]:
        """Give for each row its new text, its picture, or its new texts and pictures."""
        read, prompt_length = self.processor.post_process_multimodal_output, inputs["input_ids"].shape[1]
        if mode == "text":
            return read(sequences[:, prompt_length:], generation_mode=mode, **decoding)
        pixels = self.model.decode_image_tokens(sequences, inputs["image_sizes"])
        if mode == "image":
            return read(pixels, generation_mode=mode)
        drawn = {"pixel_values": pixels, "prompt_length": prompt_length}
        return read(sequences, generation_mode=mode, **drawn, **decoding)

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        generation_mode: str = "text",
        continue_final_message: bool | None = None,
        return_full_text: bool = True,
        return_tensors: bool = False,
    ) -> list[dict[str, Any]]:
        outcome = model_outputs["outcomes"]
        (outcome,) = outcome if isinstance(outcome, list) else [outcome]
        request = outcome["request"]
        prompt = {"input_text": request.text if request.messages is None else request.messages}
        if return_tensors:
            return [{**prompt, "generated_token_ids": row} for row in outcome["sequences"]]
        contents = outcome["contents"]
        if return_full_text and generation_mode != "image":
            layout = (request.goes_on(continue_final_message), self.processor.image_token)
            contents = [request.followed_by(content, *layout) for content in contents]
        return [{**prompt, f"generated_{generation_mode}": content} for content in contents]


def _collected(text: Any, images: Any) -> Any:
    """Bring texts and pictures together: one input, a list of them, or what gives them one by one."""
    if text is None and images is None:
        raise ValueError("Expected `text` or `images`, got neither.")
    if images is None:
        return list(text) if isinstance(text, tuple) else text
    if text is None:
        is_many = isinstance(images, (list, tuple))
        return [{"images": image} for image in images] if is_many else {"images": images}
    if isinstance(text, str) or (text and is_valid_message(text[0])):
        return {"text": text, "images": images}
    if not isinstance(images, (list, tuple)) or len(images) != len(text):
        count = len(images) if isinstance(images, (list, tuple)) else 1
        raise ValueError(f"Several texts take the pictures of each: got {len(text)} texts and pictures for {count}.")
    return [{"text": one, "images": own} for one, own in zip(text, images, strict=True)]


__all__ = ["MarsAnyToAnyPipeline", "MarsPipeline"]
