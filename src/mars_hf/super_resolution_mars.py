"""The cascade: a base model draws small pictures, a model of super-resolution in its folder draws them larger."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .configuration_mars import MarsConfig
from .image_processing_mars import to_rgb
from .modeling_mars import MarsForConditionalGeneration
from .processing_mars import MarsProcessor
from .weights_mars import HUB_ARGUMENTS

FOLDER = "super_resolution"  # in the base model's


class Enlarger:
    """
    A model of super-resolution with its processor (the paper's Stage III).

    Args:
        model ([`MarsForConditionalGeneration`]): With `config.super_resolution_factor`.
        processor ([`MarsProcessor`]): Of the same checkpoint.

    Raises:
        ValueError: If the model draws from text alone.

    Example:
        >>> enlarger = Enlarger.of("mars-emoji")
        >>> grids = [codes for row in model.collect_image_codes(sequences, image_sizes) for codes in row]
        >>> pixels = enlarger(["a red apple"], grids)
    """

    def __init__(self, model: MarsForConditionalGeneration, processor: MarsProcessor):
        if model.config.super_resolution_factor is None:
            raise ValueError("This model draws from text alone: `config.super_resolution_factor` is None.")
        self.model, self.processor = model.eval(), processor

    @classmethod
    def of(cls, name: str | Path, **kwargs: Any) -> "Enlarger":
        """
        Load the model of super-resolution that a base model carries in its folder or repository.

        Args:
            name (`str` or `Path`): Folder or Hub name of the base model, or folder of such a model itself.
            kwargs: Of `from_pretrained`, such as `dtype`.

        Raises:
            ValueError: If there is none.
        """
        hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
        place = {**hub, "subfolder": FOLDER}
        if Path(name).is_dir():
            inside = Path(name) / FOLDER
            name, place = inside if inside.is_dir() else name, hub
        try:
            config = MarsConfig.from_pretrained(name, **place)
        except OSError as error:
            raise ValueError(f"{name} carries no model of super-resolution (`{FOLDER}`): {error}") from None
        if config.super_resolution_factor is None:
            raise ValueError(f"{name} carries no model of super-resolution: there is no folder `{FOLDER}` in it.")
        model = MarsForConditionalGeneration.from_pretrained(name, **{**kwargs, **place})
        return cls(model, MarsProcessor.from_pretrained(name, **place))

    @property
    def factor(self) -> int:
        """How many times larger each side becomes."""
        return self.model.config.super_resolution_factor  # type: ignore[return-value]

    def __call__(
        self, captions: Sequence[str], grids: Sequence[torch.Tensor], **generate_kwargs: Any
    ) -> list[torch.Tensor]:
        """
        Draw small pictures larger.

        Args:
            captions (`list[str]`): What they show; several pictures of a caption stand together.
            grids (`list[torch.LongTensor]` of shape `(rows, columns)`): Their codes, a whole number for each caption.
            generate_kwargs: Further arguments of `generate`; the checkpoint's own hold for what is left out.

        Returns:
            `list[torch.Tensor]`: Pixels `(3, height, width)` in [-1, 1] for each picture.

        Raises:
            ValueError: If captions and pictures do not fit.
        """
        copies, rest = divmod(len(grids), max(len(captions), 1))
        if rest or not copies:
            raise ValueError(f"{len(grids)} pictures cannot be shared out among {len(captions)} captions.")
        texts = [caption for caption in captions for _ in range(copies)]
        inputs = self.processor(texts, lowres_codes=list(grids), return_tensors="pt").to(self.model.device)
        drawn = self.model.generate(**inputs, generation_mode="image", **generate_kwargs)
        return self.model.decode_image_tokens(drawn, inputs["image_sizes"])

    def upscale(self, picture: Image.Image, caption: str, **generate_kwargs: Any) -> Image.Image:
        """
        Draw any picture larger; its sides are first brought to whole codes.

        Args:
            picture (`PIL.Image.Image`): The small picture.
            caption (`str`): What it shows.
            generate_kwargs: Further arguments of `generate`.

        Raises:
            ValueError: If it is larger than the model can take.
        """
        unit, picture = self.processor.downsample_factor, to_rgb(picture)  # upright: its sides may change places
        height, width = (self.factor * unit * max(1, round(side / unit)) for side in (picture.height, picture.width))
        inputs = self.processor([caption], lowres_images=[picture], height=height, width=width, return_tensors="pt")
        drawn = self.model.generate(**inputs.to(self.model.device), generation_mode="image", **generate_kwargs)
        pixels = self.model.decode_image_tokens(drawn, inputs["image_sizes"])
        return self.processor.post_process_multimodal_output(pixels, generation_mode="image")[0]  # type: ignore


__all__ = ["FOLDER", "Enlarger"]
