"""
Text and pictures to ids and pixels, and back.

`MarsProcessor` lays out prompts for drawing, for super-resolution, for documents and for reading pictures, chats and
training rows, and turns what the model gives back into text and pictures. Single prompts are `prompts_mars.py`'s,
pixels `image_processing_mars.py`'s, the order of codes `code_order_mars.py`'s, codes into embeddings the model's.

Inside a row, pieces of text are lists of ids and pictures are `Picture`s until all sizes are known. A piece that came
from a user is tokenised with special tokens switched off, whatever it says; only pieces that this file or a chat
template wrote can hold special ids.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from itertools import chain, compress, zip_longest
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from .code_order_mars import (
    CODE_ORDERS,
    PictureSpan,
    PictureTokens,
    check_code_order,
    sizes_by_row,
    to_emission_order,
)
from .configuration_mars import MarsConfig
from .image_processing_mars import (
    MarsImageProcessor,
    MarsImageProcessorKwargs,
    MarsImageProcessorPil,
    check_image_size,
    decode_codes,
    encode_pixels,
    new_image_processor,
)
from .prompts_mars import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    extend_tokenizer,
    lowres_ids,
    null_prompt_ids,
    prompt_ids,
    text_ids,
    token_id,
)

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel

Task = Literal["text-to-image", "captioning", "super-resolution"]

IGNORED_LABEL = -100

# Stand for a user's text while a chat template is rendered: characters of Unicode's private use area.
USER_TEXT = "\ue000{}\ue001"
USER_TEXT_PATTERN = re.compile("\ue000(\\d+)\ue001")


class Picture(NamedTuple):
    """The place of a picture in a row; `source` is what `open_picture` takes."""

    source: Any


Row = list[list[int] | Picture]
Size = tuple[int, int]  # height and width in pixels


class MarsProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: MarsImageProcessorKwargs  # type: ignore[misc]


class MarsProcessor(ProcessorMixin):
    r"""
    Processor of MARS: a Qwen tokenizer with the visual vocabulary, an image processor, and optionally a VQ-GAN.

    Build one with [`MarsProcessor.from_text_tokenizer`] or `from_pretrained`. With
    `processor.image_tokenizer = model.vqgan` it encodes pictures itself, so that `input_ids` hold codes, and
    [`~MarsProcessor.decode_images`] works; the VQ-GAN is never saved with it. Without, every code's place is
    kept by an `<imgpad>`, which the model fills from `pixel_values`.

    Args:
        image_processor ([`MarsImageProcessor`]): Turns pictures into pixels.
        tokenizer (`Qwen2Tokenizer`): As [`extend_tokenizer`] returns it.
        chat_template (`str`, *optional*): Jinja template of conversations; `None` takes a Qwen-like one.
        max_image_size (`int`, defaults to 4096): Largest side in pixels of a picture that may be asked for.
        code_order (`str`, defaults to `"raster"`):
            Order in which the model emits codes, `config.code_order`; saved with the processor.
        super_resolution_factor (`int`, *optional*):
            The model's `config.super_resolution_factor`; saved with the processor.

    Example:
        >>> inputs = processor("a red apple", height=64, width=64)
        >>> sequences = model.generate(**inputs, generation_mode="image")

        >>> inputs = processor(images="apple.png")  # asks for a caption
        >>> sequences = model.generate(**inputs, generation_mode="text")

        >>> inputs = processor("How to draw", image_sizes=[[[64, 64], [64, 96]]], generation_mode="interleaved")
        >>> sequences = model.generate(**inputs, generation_mode="interleaved")
        >>> pixels = model.decode_image_tokens(sequences, inputs["image_sizes"])
        >>> processor.post_process_multimodal_output(sequences, generation_mode="interleaved", pixel_values=pixels)
        [['How to draw an apple: a circle', <PIL.Image.Image ...>, ', then a leaf', <PIL.Image.Image ...>]]
    """

    valid_processor_kwargs = MarsProcessorKwargs  # type: ignore[assignment]
    text_kwargs = {"padding": True, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

    image_token = "<imgpad>"
    image_tokenizer: "VQModel | None" = None

    def __init__(
        self,
        image_processor: MarsImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        max_image_size: int = 4096,
        code_order: str = "raster",
        super_resolution_factor: int | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        if code_order not in CODE_ORDERS:
            raise ValueError(f"`code_order` must be one of {', '.join(CODE_ORDERS)}, got {code_order!r}.")
        self.max_image_size = max_image_size
        self.code_order = code_order
        self.super_resolution_factor = super_resolution_factor
        self.image_token_id = token_id(tokenizer, self.image_token)
        self.image_start_token_id = token_id(tokenizer, "<img>")
        self.image_end_token_id = token_id(tokenizer, "</img>")
        self.image_token_offset = token_id(tokenizer, "<code_0>")
        self.codebook_size = self.image_start_token_id - self.image_token_offset

    @classmethod
    def from_text_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, config: MarsConfig, **kwargs: Any
    ) -> "MarsProcessor":
        """
        Build the processor of a new MARS from its language model's tokenizer.

        Args:
            tokenizer (`Qwen2Tokenizer`): The language model's own; not changed.
            config ([`MarsConfig`]): Sizes of the vocabulary and of pictures, and the order of codes.
            kwargs: Further arguments of [`MarsProcessor`].

        Returns:
            [`MarsProcessor`]: Ids and tokens are inverse for every id in `[0, config.vocab_size)`.

        Raises:
            ValueError: If the tokenizer does not fit `config`, see [`extend_tokenizer`].
        """
        if "image_processor" not in kwargs:
            kwargs["image_processor"] = new_image_processor(config)
        kwargs |= {"code_order": config.code_order, "super_resolution_factor": config.super_resolution_factor}
        return cls(tokenizer=extend_tokenizer(tokenizer, config), **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The library looks image processors up in its own table; ours stands next door.
        pil = kwargs.pop("backend", None) == "pil"
        image_processor_class = MarsImageProcessorPil if pil else MarsImageProcessor
        image_processor = image_processor_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # Its own file names its class; in the model's configuration the library would not know the type, and warn.
        kwargs.setdefault("config", PreTrainedConfig())
        return [image_processor, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]

    def to_dict(self) -> dict[str, Any]:
        bare = copy.copy(self)
        bare.image_tokenizer = None  # never saved, and costly to copy
        return super(MarsProcessor, bare).to_dict()

    @property
    def downsample_factor(self) -> int:
        """Side in pixels of the square that one image code stands for; the image processor saves it."""
        return self.image_processor.downsample_factor

    @property
    def _picture_tokens(self) -> PictureTokens:
        ids = (self.image_token_offset, self.image_start_token_id, self.image_end_token_id)
        return PictureTokens(*ids, self.downsample_factor, self.code_order)

    @property
    def model_input_names(self) -> list[str]:
        names = self.tokenizer.model_input_names + self.image_processor.model_input_names
        return [*names, "negative_input_ids", "negative_attention_mask"]

    def __call__(
        self,
        text: str | Sequence[Any] | None = None,
        images: Any = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        image_sizes: Any = None,
        task: Task | None = None,
        return_labels: bool | None = None,
        drop_caption: bool | Sequence[bool] | None = None,
        codes_per_step: int | None = None,
        generation_mode: str | None = None,
        lowres_images: Any = None,
        lowres_codes: Sequence[torch.Tensor] | None = None,
        **kwargs: Unpack[MarsProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Prepare prompts for drawing, for documents, for reading pictures, for plain text, or rows for training.

        - **Drawing**: a size and no `images`. A row is `"{text} {height}x{width}"`, without `<img>`.
        - **Super-resolution**: `lowres_images` or `lowres_codes`, for a model that has learnt it. A row is that of
          drawing, in the size that is to be drawn, and `<lowres>`, the codes of the small picture, `</lowres>`.
        - **Documents**: `generation_mode="interleaved"` and sizes of the pictures to come. Rows are those of reading
          or plain text: the model begins pictures itself, so that no size stands in the text.
        - **Reading**: `images`. In `text` each `<imgpad>` is a picture's place. A row with one picture and no
          `<imgpad>`, or without text, asks for a caption: the picture, a line end, the text. A row may also be a
          list of texts and pictures; such rows bring their own pictures. What
          [`~MarsProcessor.post_process_multimodal_output`] makes of a document is such a list.
        - **Plain text**: neither.
        - **Training**: `task` and `return_labels=True`, with one picture for each caption.

        Rows are padded on the left. Apart from the places of pictures, tokens typed into `text` stay text.

        Args:
            text (`str`, `list[str]` or `list[list]`, *optional*): Prompts, captions, or rows of texts and pictures.
            images (picture, `list` or `list[list]`, *optional*):
                What `open_picture` takes. A flat list is dealt out in order, a nested one holds a list for each row.
            height (`int` or `list[int]`, *optional*):
                In pixels, for all rows or row by row. In reading (one number then) pictures are brought to it.
            width (`int` or `list[int]`, *optional*): In pixels; goes with `height`.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance leads away from, for all rows or row by row. `None` stands for `<null>`.
            image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)` or `(batch, 2)`, or lists, *optional*):
                Another way to give `height` and `width`. A document may have several pictures a row, later ones take
                the last size; pictures of the prompt are not counted.
            task (`str`, *optional*): `"text-to-image"` or `"captioning"`.
            return_labels (`bool`, *optional*): Return `labels`; needs `task`.
            drop_caption (`bool` or `list[bool]`, *optional*):
                In text-to-image training, replace the caption by `<null>`, for all rows or row by row.
            codes_per_step (`int`, *optional*):
                Copies of `<img>` before a picture (next-K-token prediction), 1 if not given. Pass what the model is
                trained for (one of `config.trained_codes_per_step`) and what `generate` gets.
            generation_mode (`str`, *optional*): `"interleaved"` for a document; else the arguments tell.
            lowres_images (picture or `list`, *optional*):
                Pictures to be drawn larger, one for each prompt, brought to the size asked for (`None`: the image
                processor's) divided by `super_resolution_factor`.
            lowres_codes (`list[torch.LongTensor]` of shape `(rows, columns)`, *optional*):
                Their codes instead, as the base model drew them; they decide the size.
            kwargs:
                Of the tokenizer (`padding`, `max_length`, `pad_to_multiple_of`, `return_tensors`) and the image
                processor. Rows are padded on the left and never cut: one that is too long is refused.

        Returns:
            [`BatchFeature`]: With these fields, as far as they apply:

            - **input_ids**, **attention_mask** of shape `(batch, seq)`.
            - **image_sizes** `(batch, pictures, 2)`: heights and widths in pixels; rows with fewer pictures than
              others end in zeros. In a document the prompt's own pictures come first, and rows end in their last size.
            - **negative_input_ids**, **negative_attention_mask** `(batch, negative_seq)`: the unconditional prompts;
              in a document `(batch, pictures, negative_seq)`, `<null> {height}x{width}` for each picture.
            - **pixel_values** `(num, 3, height, width)`, or a list of `(3, height, width)` if sizes differ: all
              pictures of all rows, in order. Not returned with an `image_tokenizer`.
            - **labels** `(batch, seq)`: -100 where nothing is to be learnt.

        Raises:
            ValueError: If sizes, counts or lengths do not fit; the message says what came and what was expected.
        """
        for modality in ("videos", "audio"):
            if kwargs.pop(modality, None) is not None:  # type: ignore[misc]
                raise ValueError(f"MARS takes text and pictures, got `{modality}`.")
        options = self._options(**kwargs)
        k = _check_codes_per_step(codes_per_step)
        if text is not None and isinstance(images, (list, tuple)) and not _flat(images):
            images = None  # as from a batch in which no row has one
        trains = task is not None or return_labels
        if generation_mode is not None and (generation_mode != "interleaved" or trains):
            raise ValueError(
                "`generation_mode` is 'interleaved' for the prompt of a document and else left out, got "
                f"{generation_mode!r} with task={task!r}."
            )
        if trains:
            return self._training_batch(text, images, height, width, task, return_labels, drop_caption, k, options)
        has_size = not (height is None and width is None and image_sizes is None)
        has_lowres = not (lowres_images is None and lowres_codes is None)
        if has_lowres and (images is not None or generation_mode is not None):
            raise ValueError("`lowres_images` and `lowres_codes` are for drawing: leave `images` and the mode out.")
        holds_pictures = images is not None or _holds_rows(text)
        if generation_mode is None and not holds_pictures and (has_size or has_lowres):
            captions = _list_of_prompts(text)
            if has_lowres and not has_size:
                image_sizes = self._sizes_from_lowres(len(captions), lowres_codes)
            sizes = self._target_sizes(len(captions), height, width, image_sizes, k)
            small, features = self._process_lowres(lowres_images, lowres_codes, sizes, options)
            return self._drawing_batch(captions, sizes, negative_prompt, k, options, small, features)
        rows = self._text_rows(text) if images is None else self._rows_with_pictures(text, images)
        target = {"height": height, "width": width, "image_sizes": image_sizes, "negative_prompt": negative_prompt}
        return self._rows_batch(rows, k, options, generation_mode, **target)

    def _rows_batch(
        self,
        rows: list[Row],
        codes_per_step: int,
        options: dict[str, Any],
        generation_mode: str | None = None,
        height: Any = None,
        width: Any = None,
        image_sizes: Any = None,
        negative_prompt: Any = None,
    ) -> BatchFeature:
        """Lay out rows of texts and pictures, to be read or as prompts of documents."""
        if generation_mode == "interleaved":
            sizes = self._target_sizes(len(rows), height, width, image_sizes, codes_per_step)
            return self._document_batch(rows, sizes, negative_prompt, codes_per_step, options)
        if negative_prompt is not None or image_sizes is not None:
            raise ValueError(
                "`negative_prompt` and `image_sizes` belong to drawing: give a size and no `images`, or "
                "`generation_mode='interleaved'` for a document."
            )
        return self._batch(self._reading_data(rows, height, width, codes_per_step, options), options)

    def _options(self, **kwargs: Any) -> dict[str, Any]:
        return self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)

    # ---- drawing

    def _target_sizes(
        self, count: int, height: Any, width: Any, image_sizes: Any, codes_per_step: int
    ) -> list[list[Size]]:
        """Agree on the sizes of the pictures to be drawn in each of `count` rows."""
        if (height is None) != (width is None):
            raise ValueError(f"`height` and `width` go together, got height={height} and width={width}.")
        if height is None and image_sizes is None:
            raise ValueError(
                "A document needs the sizes of the pictures that the model may begin: give `image_sizes`, or `height` "
                "and `width`."
            )
        asked = list(zip(_per_row("height", height, count), _per_row("width", width, count), strict=True))
        sizes = [[size] for size in asked] if image_sizes is None else sizes_by_row(image_sizes)
        contradicts = height is not None and any({size} != {*row} for size, row in zip(asked, sizes, strict=False))
        if len(sizes) != count or contradicts or not all(sizes):
            raise ValueError(
                f"`image_sizes` {sizes} contradict {count} prompt(s) of height={height} and width={width}: give the "
                "sizes of each prompt, in one way."
            )
        for size in chain.from_iterable(sizes):
            check_image_size(*size, self.downsample_factor, self.max_image_size)
            self._check_order(size, codes_per_step)
        return [[(int(row_height), int(row_width)) for row_height, row_width in row] for row in sizes]

    def _check_order(self, size: Sequence[int], codes_per_step: int) -> None:
        height, width = (side // self.downsample_factor for side in size)
        check_code_order(height, width, codes_per_step, self.code_order)

    def _drawing_batch(
        self,
        captions: list[str],
        sizes: list[list[Size]],
        negative_prompt: Any,
        codes_per_step: int,
        options: dict[str, Any],
        small_pictures: list[list[int]],
        features: dict[str, Any],
    ) -> BatchFeature:
        """Lay prompts out; each ends in the ids of its small picture, if there is one."""
        if any(len(row) > 1 for row in sizes):
            raise ValueError(
                f"A drawing has one size for each prompt, got {sizes}. Several are for a document "
                "(`generation_mode='interleaved'`)."
            )
        negatives = _per_row("negative_prompt", negative_prompt, len(captions))
        rows = [prompt_ids(self.tokenizer, caption, *size) for caption, (size,) in zip(captions, sizes, strict=True)]
        negative_rows = [self._negative_ids(one, size) for one, (size,) in zip(negatives, sizes, strict=True)]
        if small_pictures:
            rows = [row + small for row, small in zip(rows, small_pictures, strict=True)]
            negative_rows = [row + small for row, small in zip(negative_rows, small_pictures, strict=True)]
        for row, (size,) in zip(rows + negative_rows, sizes + sizes, strict=True):
            self._refuse_too_long(len(row), options, self._num_picture_tokens(size, codes_per_step))
        negative = {f"negative_{name}": value for name, value in self._pad(negative_rows, options).items()}
        return self._batch({**self._pad(rows, options), "image_sizes": sizes, **negative, **features}, options)

    def _sizes_from_lowres(self, count: int, lowres_codes: Sequence[torch.Tensor] | None) -> list[list[Size]]:
        """Give the sizes to be drawn where none are asked for."""
        if lowres_codes is None:
            return [[(self.image_processor.size["height"], self.image_processor.size["width"])]] * count
        unit = self._require_factor() * self.downsample_factor
        grids = [tuple(codes.shape) for codes in lowres_codes]
        if any(len(grid) != 2 for grid in grids):
            raise ValueError(f"`lowres_codes` must be tensors of shape (rows, columns), got shapes {grids}.")
        return [[(rows * unit, columns * unit)] for rows, columns in grids]

    def _require_factor(self) -> int:
        if self.super_resolution_factor is None:
            raise ValueError(
                "This processor's model draws from text alone (`super_resolution_factor` is None): leave "
                "`lowres_images` and `lowres_codes` out, or take a model of super-resolution."
            )
        return self.super_resolution_factor

    def _process_lowres(
        self,
        lowres_images: Any,
        lowres_codes: Sequence[torch.Tensor] | None,
        sizes: list[list[Size]],
        options: dict[str, Any],
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Turn what super-resolution starts from into ids, codes or places of codes, and what the model needs."""
        if lowres_images is None and lowres_codes is None:
            if self.super_resolution_factor is not None:
                raise ValueError(
                    "This processor's model enlarges pictures (`super_resolution_factor` is "
                    f"{self.super_resolution_factor}): give `lowres_images` or `lowres_codes`."
                )
            return [], {}
        factor = self._require_factor()
        small_sizes = [self._small_size(size, factor) for (size, *_) in sizes]
        if lowres_codes is not None:
            grids = [
                self._code_grid(codes, *size) for codes, size in _paired("lowres_codes", lowres_codes, small_sizes)
            ]
            return [self._lowres_ids(grid) for grid in grids], {}
        pictures, is_one_size = _flat(lowres_images), len(set(small_sizes)) == 1
        paired = list(_paired("lowres_images", pictures, small_sizes))
        pixels: Any = (
            self._pixels(pictures, *small_sizes[0], options)["pixel_values"]
            if is_one_size
            else [self._pixels([picture], *size, options)["pixel_values"][0] for picture, size in paired]
        )
        if self.image_tokenizer is not None:
            return [self._lowres_ids(grid) for grid in encode_pixels(self.image_tokenizer, pixels)], {}
        places = [[self.image_token_id] * self._num_codes(*size) for size in small_sizes]
        return [lowres_ids(self.tokenizer, ids) for ids in places], {"pixel_values": pixels}

    def _small_size(self, size: Size, factor: int) -> Size:
        check_image_size(*size, factor * self.downsample_factor)
        height, width = (side // factor for side in size)
        return height, width

    def _lowres_ids(self, grid: torch.Tensor) -> list[int]:
        return lowres_ids(self.tokenizer, (grid.flatten() + self.image_token_offset).tolist())

    def _negative_ids(self, negative_prompt: str | None, size: Size) -> list[int]:
        if negative_prompt is None:
            return null_prompt_ids(self.tokenizer, *size)
        return prompt_ids(self.tokenizer, negative_prompt, *size)

    def _document_batch(
        self,
        rows: list[Row],
        sizes: list[list[Size]],
        negative_prompt: Any,
        codes_per_step: int,
        options: dict[str, Any],
    ) -> BatchFeature:
        """Lay prompts of documents out; each picture of a row, read or drawn, has a size and a negative prompt."""
        negatives = _per_row("negative_prompt", negative_prompt, len(rows))
        needed = [self._num_picture_tokens(row[0], codes_per_step) for row in sizes]
        data = self._reading_data(rows, None, None, codes_per_step, options, needed)
        read = sizes_by_row(data["image_sizes"]) if "image_sizes" in data else [[] for _ in rows]
        every = [before + after for before, after in zip(read, sizes, strict=True)]
        longest = max(map(len, every))
        every = [row + row[-1:] * (longest - len(row)) for row in every]
        negative_rows = [
            self._negative_ids(one, size) for one, row in zip(negatives, every, strict=True) for size in row
        ]
        negative = {
            f"negative_{name}": [values[start : start + longest] for start in range(0, len(values), longest)]
            for name, values in self._pad(negative_rows, options).items()
        }
        return self._batch({**data, "image_sizes": every, **negative}, options)

    # ---- reading

    def _text_rows(self, text: Any) -> list[Row]:
        rows = [text] if isinstance(text, str) else list(text or [])
        if not rows or not all(isinstance(row, (str, list, tuple)) for row in rows):
            raise ValueError(
                "`text` must be a prompt, a list of at least one prompt, or a list of rows, each a list of texts and "
                f"pictures; got {text!r}."
            )
        return [self._interleaved_row([row] if isinstance(row, str) else row) for row in rows]

    def _interleaved_row(self, segments: Sequence[Any]) -> Row:
        return [text_ids(self.tokenizer, part) if isinstance(part, str) else Picture(part) for part in segments]

    def _rows_with_pictures(self, text: Any, images: Any) -> list[Row]:
        if text is None:
            pictures = _flat(images)
            if not pictures:
                raise ValueError("`images` must hold at least one picture, got none.")
            return [self._caption_row("", picture) for picture in pictures]
        texts = _list_of_prompts(text)
        groups = self._deal_out(texts, images)
        return [self._marked_row(row, pictures) for row, pictures in zip(texts, groups, strict=True)]

    def _deal_out(self, texts: list[str], images: Any) -> list[list[Any]]:
        """Give every text its pictures."""
        if isinstance(images, (list, tuple)) and images and all(isinstance(row, (list, tuple)) for row in images):
            if len(images) != len(texts):
                raise ValueError(f"`images` holds lists for {len(images)} rows, but `text` has {len(texts)}.")
            return [list(row) for row in images]
        pictures = _flat(images)
        places = [row.count(self.image_token) for row in texts]
        if len(texts) == 1:
            places = [len(pictures)]
        elif not any(places):
            places = [1] * len(texts)
        if sum(places) != len(pictures):
            raise self._wrong_count(sum(places), len(pictures))
        remaining = iter(pictures)
        return [[next(remaining) for _ in range(count)] for count in places]

    def _wrong_count(self, places: int, pictures: int) -> ValueError:
        return ValueError(
            f"The text has places for {places} picture(s), but {pictures} came: write one {self.image_token} for each "
            "picture, or none and give every text one picture."
        )

    def _caption_row(self, text: str, picture: Any) -> Row:
        return [Picture(picture), text_ids(self.tokenizer, "\n" + text)]

    def _marked_row(self, text: str, pictures: list[Any]) -> Row:
        parts = text.split(self.image_token)
        if len(parts) == 1 and len(pictures) == 1:
            return self._caption_row(text, pictures[0])
        if len(parts) - 1 != len(pictures):
            raise self._wrong_count(len(parts) - 1, len(pictures))
        return _interleave([text_ids(self.tokenizer, part) for part in parts], pictures)

    def _reading_data(
        self,
        rows: list[Row],
        height: Any,
        width: Any,
        codes_per_step: int,
        options: dict[str, Any],
        to_be_drawn: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Lay rows out, which leave room for so many tokens to be drawn after each."""
        pictures = [piece.source for row in rows for piece in row if isinstance(piece, Picture)]
        picture_ids, features = self._process_pictures(pictures, height, width, codes_per_step, options)
        counts = [sum(isinstance(piece, Picture) for piece in row) for row in rows]
        remaining = iter(picture_ids)
        filled = [self._fill_row(row, remaining, codes_per_step) for row in rows]
        if not all(filled):
            raise ValueError(f"Row {filled.index([])} holds neither text nor a picture: give each at least one.")
        for row, room in zip(filled, to_be_drawn or [0] * len(rows), strict=True):
            self._refuse_too_long(len(row), options, room)
        data = self._pad(filled, options)
        if pictures:
            data["image_sizes"] = _pad_sizes(features.pop("image_sizes"), counts)
        return {**data, **features}

    def _process_pictures(
        self, pictures: list[Any], height: Any, width: Any, codes_per_step: int, options: dict[str, Any]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Turn pictures into their ids, codes as emitted or places of codes, and what the model needs beside them."""
        if not pictures:
            return [], {}
        features = self._pixels(pictures, height, width, options)
        sizes = features["image_sizes"] = torch.as_tensor(features["image_sizes"]).tolist()
        for size in sizes:
            self._check_order(size, codes_per_step)
        if self.image_tokenizer is None:
            return [[self.image_token_id] * self._num_codes(*size) for size in sizes], features
        grids = encode_pixels(self.image_tokenizer, features.pop("pixel_values"))
        return [self._code_ids(grid, codes_per_step) for grid in grids], features

    def _pixels(self, pictures: list[Any], height: Any, width: Any, options: dict[str, Any]) -> dict[str, Any]:
        images_kwargs = dict(options["images_kwargs"], height=height, width=width)
        if self.image_tokenizer is not None:
            images_kwargs["return_tensors"] = "pt"
        return dict(self.image_processor(pictures, **images_kwargs))

    def _code_ids(self, grid: torch.Tensor, codes_per_step: int) -> list[int]:
        return (to_emission_order(grid, codes_per_step, self.code_order) + self.image_token_offset).tolist()

    def _fill_row(self, row: Row, picture_ids: Iterator[list[int]], codes_per_step: int) -> list[int]:
        ids: list[int] = []
        for piece in row:
            ids += self._bracket(next(picture_ids), codes_per_step) if isinstance(piece, Picture) else piece
        return ids

    def _bracket(self, picture_ids: list[int], codes_per_step: int) -> list[int]:
        return [self.image_start_token_id] * codes_per_step + picture_ids + [self.image_end_token_id]

    def _num_codes(self, height: int, width: int) -> int:
        return (height // self.downsample_factor) * (width // self.downsample_factor)

    def _num_picture_tokens(self, size: Size, codes_per_step: int) -> int:
        return codes_per_step + self._num_codes(*size) + 1  # copies of `<img>`, codes, `</img>`

    # ---- batches

    def _pad(self, rows: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
        names = ("padding", "max_length", "pad_to_multiple_of")
        padding = {name: options["text_kwargs"].get(name) for name in names}
        return dict(self.tokenizer.pad({"input_ids": rows}, padding_side="left", **padding))

    def _batch(self, data: dict[str, Any], options: dict[str, Any]) -> BatchFeature:
        ragged = isinstance(data.get("pixel_values"), list)
        return_tensors = options["text_kwargs"].get("return_tensors")
        return BatchFeature(
            data, tensor_type=return_tensors, skip_tensor_conversion=["pixel_values"] if ragged else None
        )

    def _refuse_too_long(self, length: int, options: dict[str, Any], to_be_drawn: int = 0) -> None:
        """Hold a row to `max_length`, and with the picture to be drawn after it to the model's context."""
        _refuse_longer_than(options["text_kwargs"].get("max_length"), length)
        _refuse_longer_than(self.tokenizer.model_max_length, length, to_be_drawn)

    # ---- conversations

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Render conversations, and with `tokenize=True` prepare them for the model.

        Tokens that users write into a conversation stay text when it is tokenised here. The rendered string of
        `tokenize=False` can no longer tell them apart, and neither can the stock `text-generation` pipeline.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages with `role` and `content`: a text, or a list of `{"type": "text", "text": ..}` and
                `{"type": "image", "image": ..}` (also under the key `url`, `path` or `base64`).
            chat_template (`str`, *optional*): Another template, or its name.
            tokenize (`bool`, defaults to `False`): Return ids instead of a string.
            return_dict (`bool`, defaults to `False`): Return all inputs of the model, not only `input_ids`.
            return_tensors (`str`, *optional*, defaults to `"pt"`): Type of the tensors.
            processor_kwargs (`dict`, *optional*):
                Arguments of the tokenizer and the image processor, and of [`MarsProcessor.__call__`] those of
                pictures: `generation_mode="interleaved"` with sizes of those that the answer may have, `height` and
                `width`, `image_sizes`, `negative_prompt`, `codes_per_step`.
            kwargs: `add_generation_prompt`, `continue_final_message`, and variables of the template.

        Returns:
            `str`, `list[str]`, `torch.LongTensor` or [`BatchFeature`]: See [`MarsProcessor.__call__`].
        """
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("`return_assistant_tokens_mask` is not supported: write labels from the rows' parts.")
        kwargs.pop("sanitize_control_tokens", None)  # what follows always does so
        conversations, _ = self._normalize_conversations(conversation)
        rows = [self._chat_row(messages, chat_template, **kwargs) for messages in conversations]
        types = {} if return_tensors == "auto" else {"return_tensors": return_tensors}
        given = dict(processor_kwargs or {})
        mode, k = given.pop("generation_mode", None), _check_codes_per_step(given.pop("codes_per_step", None))
        if mode not in (None, "interleaved"):
            raise ValueError(f"`generation_mode` of a chat is 'interleaved' or left out, got {mode!r}.")
        names = ("height", "width", "image_sizes", "negative_prompt")
        target = {name: given.pop(name) for name in names if name in given}
        batch = self._rows_batch(rows, k, self._options(**types, **given), mode, **target)
        return batch if return_dict else batch["input_ids"]

    def _chat_row(self, messages: Sequence[Any], chat_template: str | None, **kwargs: Any) -> Row:
        """Render a conversation with stand-ins for its texts, then tokenise what users and the template wrote."""
        texts: list[str] = []
        for name in ("tools", "documents"):
            if kwargs.get(name) is not None:
                kwargs[name] = _hide_texts(kwargs[name], texts)
        rendered = super().apply_chat_template(_hide_texts(messages, texts), chat_template, **kwargs)
        pictures = _chat_pictures(messages)
        if rendered.count(self.image_token) != len(pictures):
            raise self._wrong_count(rendered.count(self.image_token), len(pictures))
        remaining = iter(pictures)
        row: Row = []
        for position, piece in enumerate(USER_TEXT_PATTERN.split(rendered)):
            if position % 2:  # the pattern's group: the number of a text
                row.append(text_ids(self.tokenizer, texts[int(piece)]))
                continue
            parts = [self._template_ids(part) for part in piece.split(self.image_token)]
            row += _interleave(parts, [next(remaining) for _ in parts[1:]])
        return row

    def _template_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]

    # ---- training

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text as prompts, captions and documents hold it; tokens written in it stay text."""
        return len(text_ids(self.tokenizer, text))

    def training_example(
        self,
        task: Task,
        caption: str,
        image_codes: torch.Tensor | Sequence[int],
        height: int,
        width: int,
        drop_caption: bool = False,
        max_length: int | None = None,
        codes_per_step: int = 1,
        lowres_codes: torch.Tensor | Sequence[int] | None = None,
    ) -> dict[str, list[int]]:
        r"""
        Write one training row from a caption and a picture's codes.

        - `"text-to-image"`: `{caption} {height}x{width}`, `<img>`, codes, `</img>`; the codes are labelled.
        - `"super-resolution"`: the same with `<lowres>`, `lowres_codes`, `</lowres>` before `<img>`; only the codes
          behind it are labelled.
        - `"captioning"`: `<img>`, codes, `</img>`, a line end, the caption, `<|endoftext|>`; all that follows
          `</img>` is labelled.

        Codes stand in the processor's `code_order`.

        Args:
            task (`str`): `"text-to-image"`, `"super-resolution"` or `"captioning"`.
            caption (`str`): Tokens written in it stay text.
            image_codes (`torch.LongTensor` or `list[int]`): Codebook indices in raster order.
            height (`int`): Of the picture, in pixels.
            width (`int`): Of the picture, in pixels.
            drop_caption (`bool`, defaults to `False`): Replace the caption by `<null>`, as guidance will.
            max_length (`int`, *optional*): Longest row allowed. `None` takes the tokenizer's `model_max_length`.
            codes_per_step (`int`, defaults to 1): Copies of `<img>`: the K of next-K-token prediction.
            lowres_codes (`torch.LongTensor` or `list[int]`, *optional*):
                Codebook indices in raster order of the picture `super_resolution_factor` times smaller on each side.

        Returns:
            `dict[str, list[int]]`: `input_ids` and `labels` of one length; labels stand at the place of their own
            token (the model shifts) and are -100 where nothing is to be learnt.

        Raises:
            ValueError: If the task is unknown, codes, size and K do not fit, or the row is too long.
        """
        k = _check_codes_per_step(codes_per_step)
        picture_ids = self._code_ids(self._code_grid(image_codes, height, width), k)
        small: list[int] = []
        if (task == "super-resolution") != (lowres_codes is not None):
            raise ValueError(f"`lowres_codes` go with the task 'super-resolution' and only with it, got {task!r}.")
        if lowres_codes is not None:
            size = self._small_size((height, width), self._require_factor())
            small = self._lowres_ids(self._code_grid(lowres_codes, *size))
        return self._training_row(task, caption, picture_ids, (height, width), drop_caption, max_length, k, small)

    def training_document(
        self, segments: Sequence[Any], codes_per_step: int = 1, max_length: int | None = None
    ) -> dict[str, Any]:
        r"""
        Write the training row of an interleaved document, ended by `<|endoftext|>`.

        Every text token is labelled, the first `<img>` of each picture, and its codes; the other `<img>` and `</img>`
        are the grammar's.

        Args:
            segments (`list`):
                Texts, and pictures as dictionaries with `image_codes` (raster order), `height` and `width` in pixels.
            codes_per_step (`int`, defaults to 1): Copies of `<img>`: the K of next-K-token prediction.
            max_length (`int`, *optional*): Longest row allowed. `None` takes the tokenizer's `model_max_length`.

        Returns:
            `dict`: `input_ids` and `labels` of one length, and `image_sizes`, a list of `(height, width)`.

        Raises:
            ValueError: If codes, sizes and K do not fit, or the row is too long.
        """
        k = _check_codes_per_step(codes_per_step)
        ids: list[int] = []
        labels: list[int] = []
        sizes: list[Size] = []
        for part in segments:
            if isinstance(part, str):
                text = text_ids(self.tokenizer, part)
                ids, labels = ids + text, labels + text
                continue
            sizes.append((part["height"], part["width"]))
            picture_ids = self._code_ids(self._code_grid(part["image_codes"], *sizes[-1]), k)
            ids += self._bracket(picture_ids, k)
            labels += [self.image_start_token_id, *[IGNORED_LABEL] * (k - 1), *picture_ids, IGNORED_LABEL]
        end = token_id(self.tokenizer, END_OF_TEXT)
        _refuse_longer_than(self.tokenizer.model_max_length if max_length is None else max_length, len(ids) + 1)
        return {"input_ids": [*ids, end], "labels": [*labels, end], "image_sizes": sizes}

    def _training_row(
        self,
        task: Any,
        caption: str,
        picture_ids: list[int],
        size: Size,
        drop_caption: bool,
        max_length: int | None,
        codes_per_step: int,
        small_picture: Sequence[int] = (),
    ) -> dict[str, list[int]]:
        picture = self._bracket(picture_ids, codes_per_step)
        if task == "text-to-image" or small_picture:
            full = prompt_ids(self.tokenizer, caption, *size)
            text = null_prompt_ids(self.tokenizer, *size) if drop_caption else full
            text = [*text, *small_picture]
            ids = text + picture
            labels = [IGNORED_LABEL] * (len(text) + codes_per_step) + picture_ids + [IGNORED_LABEL]
        elif task == "captioning" and not drop_caption:
            text = [*text_ids(self.tokenizer, "\n" + caption), token_id(self.tokenizer, END_OF_TEXT)]
            ids = picture + text
            labels = [IGNORED_LABEL] * len(picture) + text
        else:
            raise ValueError(
                "`task` must be 'text-to-image' or 'captioning' ('super-resolution' with `training_example`), and "
                f"captioning cannot drop its caption; got task={task!r} and drop_caption={drop_caption}."
            )
        _refuse_longer_than(self.tokenizer.model_max_length if max_length is None else max_length, len(ids))
        return {"input_ids": ids, "labels": labels}

    def _training_batch(
        self,
        text: Any,
        images: Any,
        height: Any,
        width: Any,
        task: Any,
        return_labels: bool | None,
        drop_caption: Any,
        codes_per_step: int,
        options: dict[str, Any],
    ) -> BatchFeature:
        if task is None or not return_labels:
            raise ValueError(f"`task` and `return_labels=True` go together, got {task!r} and {return_labels}.")
        captions = _list_of_prompts(text)
        pictures = [] if images is None else _flat(images)
        if len(pictures) != len(captions):
            raise ValueError(f"Training takes one picture for each caption, got {len(pictures)} and {len(captions)}.")
        picture_ids, features = self._process_pictures(pictures, height, width, codes_per_step, options)
        sizes = features.pop("image_sizes")
        dropped = _per_row("drop_caption", drop_caption, len(captions))
        max_length = options["text_kwargs"].get("max_length")
        examples = [
            self._training_row(task, caption, ids, tuple(size), drop, max_length, codes_per_step)
            for caption, ids, size, drop in zip(captions, picture_ids, sizes, dropped, strict=True)
        ]
        data = self._pad([example["input_ids"] for example in examples], options)
        data["labels"] = [
            [IGNORED_LABEL] * (len(ids) - len(example["labels"])) + example["labels"]
            for ids, example in zip(data["input_ids"], examples, strict=True)
        ]
        data["image_sizes"] = [[size] for size in sizes]
        return self._batch({**data, **features}, options)

    # ---- back to text and pictures

    def decode_images(self, codes: torch.Tensor | Sequence[Any], image_sizes: Any) -> list[Image.Image]:
        """
        Turn image codes into pictures with `image_tokenizer`.

        Args:
            codes (`torch.LongTensor` of shape `(num, codes)`, or a list of `torch.LongTensor`):
                For each picture its codebook indices in raster order.
            image_sizes (`torch.LongTensor` of shape `(num, 2)` or `(batch, pictures, 2)`):
                Heights and widths in pixels; one size serves all, rows of zeros are skipped.

        Returns:
            `list[PIL.Image.Image]`: One picture for each.

        Raises:
            ValueError: If there is no `image_tokenizer`, or codes and sizes do not fit.
        """
        vqgan = self._require_image_tokenizer()
        sizes = list(chain.from_iterable(sizes_by_row(image_sizes)))
        sizes = sizes * len(codes) if len(sizes) == 1 else sizes
        if len(sizes) != len(codes):
            raise ValueError(f"`image_sizes` holds {len(sizes)} sizes, but `codes` {len(codes)} pictures.")
        grids = [self._code_grid(picture, *size) for picture, size in zip(codes, sizes, strict=True)]
        return self.image_processor.postprocess(decode_codes(vqgan, grids))

    def _require_image_tokenizer(self) -> "VQModel":
        if self.image_tokenizer is None:
            raise ValueError(
                "Decoding codes needs a VQ-GAN: set `processor.image_tokenizer = model.vqgan` first, or give "
                "`pixel_values=model.decode_image_tokens(sequences, image_sizes)` where they are taken."
            )
        return self.image_tokenizer

    def _code_grid(self, image_codes: Any, height: int, width: int) -> torch.Tensor:
        """Check one picture's codes and lay them out as `(height / f, width / f)`."""
        check_image_size(height, width, self.downsample_factor)
        codes = torch.as_tensor(image_codes)
        expected = self._num_codes(height, width)
        if codes.numel() != expected:
            raise ValueError(f"A picture of {height}x{width} pixels has {expected} codes, got {codes.numel()}.")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(
                f"Image codes must lie in [0, {self.codebook_size}), got {int(codes.min())} to {int(codes.max())}. "
                f"Subtract {self.image_token_offset} (`image_token_offset`) from token ids."
            )
        return codes.reshape(height // self.downsample_factor, width // self.downsample_factor)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """
        Decode generated text; pictures between texts are left out.

        Args:
            generated_outputs (`torch.LongTensor` of shape `(batch, seq)` or `(seq,)`, or a list): Token ids.
            skip_special_tokens (`bool`, defaults to `True`): Leave out the language model's special tokens too.
            kwargs: Further arguments of the tokenizer's `decode`.

        Returns:
            `list[str]`: One text for each row.
        """
        rows = _rows_of_ids(generated_outputs)
        return [self._decode_text(row.tolist(), skip_special_tokens, **kwargs) for row in rows]

    def _decode_text(self, ids: list[int], skip_special_tokens: bool, **kwargs: Any) -> str:
        text = [token for token in ids if token < self.image_token_offset]
        return self.tokenizer.decode(text, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        image_sizes: Any = None,
        pixel_values: Any = None,
        prompt_length: int = 0,
        **kwargs: Any,
    ) -> list[str] | list[Image.Image] | list[list[str | Image.Image]]:
        """
        Turn what the model gave into text, pictures or both, the first two as transformers' `any-to-any` pipeline asks
        for it.

        `"interleaved"` takes what any mode of `generate` returns and gives, for each row, its texts and pictures in
        order. Copies of `<img>`, padding and end tokens are dropped, as are empty texts. An incomplete picture (a
        cancelled one lacks its `</img>`) is left out; its codes are in `generated_outputs`. Such a list is also a row
        that the processor reads: with `do_resize=False` pictures keep their sizes.

        Args:
            generated_outputs (`torch.Tensor` or list of them):
                Token ids for text and documents, whole rows; for pictures the pixels that
                `model.decode_image_tokens` returns.
            skip_special_tokens (`bool`, defaults to `True`): See [`~MarsProcessor.post_process_image_text_to_text`].
            generation_mode (`str`, *optional*): `"text"` (as `None`), `"image"` or `"interleaved"`.
            image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)`, *optional*):
                For documents, the sizes that `generate` got: those of row i stand in row `i // n` of them if there are
                n times as many rows. Later pictures have the last size. If None, pictures are square.
            pixel_values (`list[torch.Tensor]` of shape `(3, height, width)`, *optional*):
                For documents, the pixels of all their pictures, as `model.decode_image_tokens` returns them for
                `generated_outputs`; `image_sizes` are then not needed. If None, `image_tokenizer` decodes.
            prompt_length (`int`, defaults to 0): Columns of the prompt, which a document then leaves out.
            kwargs: Further arguments of the tokenizer's `decode`.

        Returns:
            `list[str]`, `list[PIL.Image.Image]`, or for documents `list[list[str | PIL.Image.Image]]`.

        Raises:
            ValueError: If the mode is unknown, ids came where pixels were expected or the reverse, a picture holds
                what is no code or does not fit its size, or codes need an `image_tokenizer` that is not there.
        """
        if generation_mode == "interleaved":
            rows = _rows_of_ids(generated_outputs)
            spans = [self._picture_tokens.find(row) for row in rows]
            is_wanted = [span.start >= prompt_length for span in chain.from_iterable(spans)]
            pictures = iter(self._open_pictures(rows, spans, is_wanted, image_sizes, pixel_values))
            return [
                self._segments(row.tolist(), own, pictures, prompt_length, skip_special_tokens, **kwargs)
                for row, own in zip(rows, spans, strict=True)
            ]
        if image_sizes is not None or pixel_values is not None or prompt_length:
            raise ValueError(
                "`image_sizes`, `pixel_values` and `prompt_length` go with `generation_mode='interleaved'`, got "
                f"{generation_mode!r}."
            )
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode != "image":
            raise ValueError(f"`generation_mode` must be 'text', 'image' or 'interleaved', got {generation_mode!r}.")
        if not all(torch.is_floating_point(torch.as_tensor(pixels)) for pixels in generated_outputs):
            raise ValueError(
                "Pictures are made from pixels, got token ids: call "
                "`model.decode_image_tokens(sequences, image_sizes)` first."
            )
        return self.image_processor.postprocess(generated_outputs)

    def _open_pictures(
        self,
        rows: list[torch.Tensor],
        spans: list[list[PictureSpan]],
        is_wanted: list[bool],
        image_sizes: Any,
        pixel_values: Any,
    ) -> list[Image.Image]:
        """Give the wanted pictures of documents, from their pixels or decoded from their codes."""
        if pixel_values is None:
            grids = chain.from_iterable(self._picture_tokens.collect(rows, image_sizes))
            wanted = list(compress(grids, is_wanted))
            pixels = decode_codes(self._require_image_tokenizer(), wanted) if wanted else []
        else:
            counts = [span.end - span.first for span in chain.from_iterable(spans)]
            expected = [self._num_codes(*picture.shape[-2:]) for picture in pixel_values]
            if counts != expected:
                raise ValueError(
                    f"`pixel_values` hold pictures of {expected} codes, but the rows hold pictures of {counts}. Give "
                    "what `model.decode_image_tokens` returns for the same rows."
                )
            pixels = list(compress(pixel_values, is_wanted))
        return self.image_processor.postprocess(pixels)

    def _segments(
        self,
        ids: list[int],
        spans: list[PictureSpan],
        pictures: Iterator[Image.Image],
        prompt_length: int,
        skip_special_tokens: bool,
        **kwargs: Any,
    ) -> list[str | Image.Image]:
        """Give the texts and pictures of a row from a column on."""
        segments: list[str | Image.Image] = []
        place = prompt_length
        for span in spans:
            if span.start >= prompt_length:
                segments += [self._decode_text(ids[place : span.start], skip_special_tokens, **kwargs), next(pictures)]
                place = span.end + 1
        segments.append(self._decode_text(ids[place:], skip_special_tokens, **kwargs))
        return [segment for segment in segments if segment != ""]


def _rows_of_ids(generated_outputs: Any) -> list[torch.Tensor]:
    """Rows of token ids, of a batch or of a single row."""
    is_single = torch.as_tensor(generated_outputs[0]).ndim == 0
    rows = [torch.as_tensor(row) for row in ([generated_outputs] if is_single else generated_outputs)]
    for row in rows:
        if row.ndim != 1 or (len(row) and (row.is_floating_point() or int(row.min()) < 0)):
            raise ValueError(
                "Text is decoded from rows of token ids, whole numbers of 0 or more, got a row of "
                f"{row.dtype} of shape {tuple(row.shape)}."
            )
    return rows


def _check_codes_per_step(codes_per_step: Any) -> int:
    k = 1 if codes_per_step is None else codes_per_step
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise ValueError(
            f"`codes_per_step` must be a whole number of 1 or more, got {codes_per_step!r}: pass one that the model "
            "is trained for (`config.trained_codes_per_step`)."
        )
    return int(k)


def _list_of_prompts(text: Any) -> list[str]:
    prompts = [text] if isinstance(text, str) else list(text or [])
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"`text` must be a prompt or a list of at least one prompt, got {text!r}.")
    return prompts


def _paired(name: str, values: Sequence[Any], sizes: list[Size]) -> Iterator[tuple[Any, Size]]:
    if len(values) != len(sizes):
        raise ValueError(f"`{name}` needs one picture for each prompt: got {len(values)} for {len(sizes)}.")
    return zip(values, sizes, strict=True)


def _per_row(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"`{name}` holds {len(value)} values, but there are {count} rows.")
    return list(value)


def _holds_rows(text: Any) -> bool:
    return isinstance(text, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in text)


def _flat(images: Any) -> list[Any]:
    """All pictures of a nested list, or of an array of 4 dimensions."""
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        return [picture for image in images for picture in _flat(image)]
    return [images]


def _refuse_longer_than(limit: int | None, length: int, to_be_drawn: int = 0) -> None:
    if limit is not None and length + to_be_drawn > limit:
        picture = f", and the picture to be drawn {to_be_drawn} more" if to_be_drawn else ""
        raise ValueError(f"The prompt takes {length} tokens{picture}, but only {limit} fit: shorten or shrink it.")


def _interleave(parts: list[list[int]], pictures: list[Any]) -> Row:
    """Text, picture, text, .., text."""
    row: Row = []
    for part, picture in zip_longest(parts, [Picture(source) for source in pictures]):
        row += [part] if picture is None else [part, picture]
    return row


def _pad_sizes(sizes: list[list[int]], counts: list[int]) -> list[list[list[int]]]:
    remaining = iter(sizes)
    return [[next(remaining) for _ in range(count)] + [[0, 0]] * (max(counts) - count) for count in counts]


def _hide_texts(value: Any, texts: list[str]) -> Any:
    """Copy messages with a numbered stand-in for every text but roles and types, and collect the texts."""
    if isinstance(value, str):
        texts.append(value)
        return USER_TEXT.format(len(texts) - 1)
    if isinstance(value, dict):
        return {k: v if k in ("role", "type") else _hide_texts(v, texts) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide_texts(item, texts) for item in value]
    return value


def _chat_pictures(messages: Sequence[Any]) -> list[Any]:
    contents = [message.get("content") or [] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    keys = ("image", "url", "path", "base64")
    return [part[key] for part in parts if part["type"] == "image" for key in keys if part.get(key) is not None]


__all__ = ["MarsProcessor", "extend_tokenizer", "null_prompt_ids", "prompt_ids", "text_ids"]
