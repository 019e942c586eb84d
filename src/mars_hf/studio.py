"""
A checkpoint at work for people: what the command line and the demo share.

Reading order: `check_prompt` and `check_seed` refuse what no model should see; [`Studio`] draws, captions and tells
stories.
What this file leaves to others: files (`picture_files.py`, `documents.py`), pages and options.
"""

import copy
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.generation import BaseStreamer

from . import MarsForConditionalGeneration, MarsProcessor, register
from .evaluation.config import RunConfig
from .evaluation.drawing import Drawer
from .evaluation.provenance import checkpoint_folder
from .handler import MAX_CHARACTERS, MAX_SEED, forbidden_character, shows_nothing
from .hub import carried_adapter, require_adapter, require_checkpoint
from .image_processing_mars import check_image_size
from .super_resolution_mars import FOLDER as SUPER_RESOLUTION
from .super_resolution_mars import Enlarger
from .weights_mars import put_on_adapter

MAX_PROMPT_LENGTH = MAX_CHARACTERS  # how many tokens fit is the processor's to say
MAX_CAPTION_TOKENS = 128
STORY_PICTURES = 4  # that a story has room for, beside its words
STORY_WORD_TOKENS = 256
KEPT_CONTROLS = "\n\t"


def check_prompt(text: str) -> str:
    """
    Refuse what is no prompt. Any script, emoji and marks of direction are.

    Returns:
        `str`: The text.

    Raises:
        ValueError: If there is nothing to see in it, it is longer than `MAX_PROMPT_LENGTH`, or it holds control
            characters or bytes that are no text.
    """
    if len(text) > MAX_PROMPT_LENGTH:
        raise ValueError(
            f"A prompt has at most {MAX_PROMPT_LENGTH:,} characters, but this one has {len(text):,}: shorten it."
        )
    if (character := forbidden_character(text, KEPT_CONTROLS)) is not None:
        raise ValueError(f"A prompt must be text, but this one holds U+{ord(character):04X}: remove it.")
    if shows_nothing(text):
        raise ValueError("The prompt is empty: say what to draw, for example 'a red apple'.")
    return text


def check_seed(seed: int) -> int:
    """
    Refuse what is no seed.

    Returns:
        `int`: The seed.

    Raises:
        ValueError: If it is no whole number from 0 to `MAX_SEED`.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"A seed must be a whole number from 0 to {MAX_SEED}, got {seed}.")
    return seed


class Studio:
    """
    A loaded checkpoint and what people do with it.

    Args:
        model ([`MarsForConditionalGeneration`]): The checkpoint.
        processor ([`MarsProcessor`]): Its processor; it is given the model's VQ-GAN.
        folder (`Path`, *optional*): Where it lies, perhaps with a model of super-resolution or an adapter inside.
        adapter (`Path`, *optional*):
            Folder of a PEFT adapter to tell stories with. Defaults to the one that the checkpoint carries, if any.

    Example:
        >>> studio = Studio.open("mars-emoji")
        >>> (picture,) = studio.drawer(guidance_scale=3.0).draw(["a red apple"], seeds=[0])
        >>> studio.caption(picture)
        'red apple'
    """

    def __init__(
        self,
        model: MarsForConditionalGeneration,
        processor: MarsProcessor,
        folder: Path | None = None,
        adapter: Path | None = None,
    ):
        if adapter is None and folder is not None:
            adapter = carried_adapter(folder)
        if adapter is not None:
            require_adapter(adapter)
        self.model, self.processor, self.folder, self.adapter = model, processor, folder, adapter
        processor.image_tokenizer = model.vqgan

    @classmethod
    def open(cls, name: str | os.PathLike, adapter: Path | None = None) -> "Studio":
        """
        Load a checkpoint onto the accelerator, if there is one.

        Args:
            name (`str` or `os.PathLike`): A folder; else `"mars-emoji"`, the embedded one; or a name on the Hub.
            adapter (`Path`, *optional*): See above.

        Raises:
            ValueError: If there is no MARS, or no adapter.
        """
        folder = checkpoint_folder(str(name))
        require_checkpoint(folder)
        register()
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        model = MarsForConditionalGeneration.from_pretrained(folder).to(device)
        return cls(model.eval(), MarsProcessor.from_pretrained(folder), folder, adapter)

    @property
    def can_enlarge(self) -> bool:
        """Whether the checkpoint carries a model of super-resolution."""
        return self.folder is not None and (self.folder / SUPER_RESOLUTION / "config.json").is_file()

    @cached_property
    def enlarger(self) -> Enlarger:
        """
        The model of super-resolution, loaded when it is first needed.

        Raises:
            ValueError: If there is none.
        """
        if not self.can_enlarge:
            raise ValueError(f"The checkpoint {self.folder or ''} carries no model of super-resolution: draw without.")
        enlarger = Enlarger.of(self.folder)
        enlarger.model.to(self.model.device)
        return enlarger

    @cached_property
    def storyteller(self) -> MarsForConditionalGeneration:
        """
        The model with the adapter for stories, made when it is first needed; the model itself if there is none.

        It shares its weights, which are frozen from then on, with the model, which draws and captions without the
        adapter.

        Raises:
            ValueError: If the adapter is one of another model.
        """
        if self.adapter is None:
            return self.model
        twin = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        vars(twin).pop("_compiled_call", None)  # the model's own, which knows no adapter
        put_on_adapter(twin, self.adapter)
        return twin.eval()

    def drawer(
        self, height: int | None = None, width: int | None = None, super_resolution: bool = False, **sampling: Any
    ) -> Drawer:
        """
        Settle a way of drawing.

        Args:
            height (`int`, *optional*): Of the pictures, in pixels. Defaults to the model's.
            width (`int`, *optional*): Of the pictures, in pixels. Defaults to the model's.
            super_resolution (`bool`, defaults to `False`): Draw them larger afterwards.
            sampling: Fields of [`RunConfig`]; what is None or left out is as the checkpoint has it.

        Returns:
            [`Drawer`]: Draws with every knob spelled out.

        Raises:
            ValueError: If the checkpoint cannot draw so.
        """
        size = self.image_size(height, width)
        for name, value in sampling.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}.")
        try:
            run = RunConfig(**sampling)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from None
        return Drawer(self.model, self.processor, run, *size, self.enlarger if super_resolution else None)

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """
        Complete a size in pixels by the model's, and check it.

        Raises:
            ValueError: If a side has no whole number of codes or is too long.
        """
        side = self.model.config.default_image_size
        size = (side if height is None else height, side if width is None else width)
        check_image_size(*size, self.processor.downsample_factor, self.processor.max_image_size)
        return size

    def caption(self, picture: Image.Image | Path, max_new_tokens: int = MAX_CAPTION_TOKENS) -> str:
        """
        Say what is in a picture.

        Args:
            picture (`PIL.Image.Image` or `Path`): Refused by its header if it has too many pixels.
            max_new_tokens (`int`, defaults to 128): Longest caption.

        Raises:
            ValueError: If it cannot be read.
        """
        k = self.model.config.trained_codes_per_step[0]
        inputs = self.processor(images=picture, codes_per_step=k, return_tensors="pt").to(self.model.device)
        written = self.model.generate(**inputs, generation_mode="text", max_new_tokens=max_new_tokens, do_sample=False)
        (text,) = self.processor.post_process_image_text_to_text(written[:, inputs["input_ids"].shape[1] :])
        return text.strip()

    def tell(
        self,
        title: str,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        max_new_tokens: int | None = None,
        guidance_scale: float | None = None,
        streamer: BaseStreamer | None = None,
    ) -> list[str | Image.Image]:
        """
        Write a document with pictures: the model begins them where it likes.

        Args:
            title (`str`): The first line.
            height (`int`, *optional*): Of the pictures, in pixels. Defaults to the model's.
            width (`int`, *optional*): Of the pictures, in pixels. Defaults to the model's.
            seed (`int`, defaults to 0): Of pictures, and of words if the checkpoint samples them.
            max_new_tokens (`int`, *optional*):
                Longest document, in words' tokens and codes. Defaults to 256 and the codes of 4 pictures, as far as
                the model's context has room.
            guidance_scale (`float`, *optional*): Of pictures. Defaults to the checkpoint's.
            streamer (`BaseStreamer`, *optional*): Hears tokens as they come, see [`ImageStreamer`].

        Returns:
            `list[str | PIL.Image.Image]`: The title with a line end, then texts and pictures.

        Raises:
            ValueError: If the title is no prompt or too long, or a number is out of range.
        """
        heading = check_prompt(title).strip() + "\n"
        height, width = self.image_size(height, width)
        if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be a finite number of 0 or more, got {guidance_scale}.")
        image_kwargs = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        inputs = self.processor(
            heading, height=height, width=width, generation_mode="interleaved", return_tensors="pt"
        ).to(self.model.device)
        prompt_length = inputs["input_ids"].shape[1]
        if max_new_tokens is None:
            max_new_tokens = self._room_for_a_story(prompt_length, height, width)
        generator = torch.Generator(self.model.device).manual_seed(check_seed(seed))
        written = self.storyteller.generate(
            **inputs,
            generation_mode="interleaved",
            generator=generator,
            image_kwargs=image_kwargs,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
        )
        (told,) = self.processor.post_process_multimodal_output(
            written, generation_mode="interleaved", image_sizes=inputs["image_sizes"], prompt_length=prompt_length
        )
        return [heading, *told]

    def _room_for_a_story(self, prompt_length: int, height: int, width: int) -> int:
        config = self.model.config
        num_codes = (height // config.downsample_factor) * (width // config.downsample_factor)
        marks = config.trained_codes_per_step[0] + 1  # copies of `<img>`, and `</img>`
        wanted = STORY_WORD_TOKENS + STORY_PICTURES * (num_codes + marks)
        return min(wanted, config.text_config.max_position_embeddings - prompt_length)


__all__ = ["Studio", "check_prompt", "check_seed"]
