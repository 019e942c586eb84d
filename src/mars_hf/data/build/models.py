"""
What models add to records: scores, new captions and codes.

All models are parameters, loaded once by the process or actor that uses them. What a model sees together is decided by
the records alone, and sums run on one thread of a processor, so that numbers are the same wherever they are computed.
"""

import functools
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, BatchFeature

from ... import register
from ...conversion.checkpoints import Checkpoint
from ...evaluation.provenance import fingerprint
from ...image_processing_mars import MarsImageProcessorPil, encode_pixels
from ..encode import PIXEL_SETTINGS, describe_tokenizer, load_image_tokenizer
from .pictures import clean_text
from .recipe import LANGUAGES, Recipe


def _device(recipe: Recipe) -> torch.device:
    """Ray leaves GPUs visible to a task that asked for none."""
    wanted = recipe.engine.gpus_per_worker != 0 and torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")


@contextmanager
def _one_thread() -> Iterator[None]:
    """How many threads share a sum changes its rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


# Scores


def clip_models(recipe: Recipe) -> list[str]:
    """Name the CLIP models that the scores need, each once."""
    names = [stage.model for stage in (recipe.clip, recipe.aesthetic) if stage]
    return list(dict.fromkeys(names))


class ClipInputs:
    """Pictures to what each CLIP model takes; the half of scoring that processors do."""

    def __init__(self, recipe: Recipe):
        self.processors = [AutoProcessor.from_pretrained(name) for name in clip_models(recipe)]

    def __call__(self, pictures: list[Image.Image]) -> list[np.ndarray]:
        """Give for each model an array of float32 `(pictures, 3, height, width)`."""
        return [
            processor.image_processor(pictures, return_tensors="np")["pixel_values"].astype(np.float32)
            for processor in self.processors
        ]


class Scorer:
    """
    CLIP and aesthetic scores.

    The CLIP score is the cosine of the embeddings of picture and caption. The aesthetic score is a head's answer to
    the picture's embedding at length 1 (https://github.com/christophschuhmann/improved-aesthetic-predictor).
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.device = recipe, _device(recipe)
        self.names = clip_models(recipe)
        self.models = [
            AutoModel.from_pretrained(name, dtype=torch.float32).eval().to(self.device) for name in self.names
        ]
        if recipe.clip:
            self.tokenizer = AutoProcessor.from_pretrained(recipe.clip.model).tokenizer
        if recipe.aesthetic:
            width = self.models[self.names.index(recipe.aesthetic.model)].config.projection_dim
            self.head = load_head(Path(recipe.aesthetic.head), width).to(self.device)

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """
        Score a batch.

        Args:
            row (`dict`): `shard`, `positions`, `captions`, and for each CLIP model `pixels` (bytes of float32) of the
                shape in `shapes`.
        """
        with _one_thread():
            embeddings = {
                name: self._embed(model, pixels, shape)
                for name, model, pixels, shape in zip(
                    self.names, self.models, row["pixels"], row["shapes"], strict=True
                )
            }
            scores = {}
            if self.recipe.clip:
                pictures = embeddings[self.recipe.clip.model]
                scores["score_clip"] = (pictures * self._embed_texts(row["captions"])).sum(-1).tolist()
            if self.recipe.aesthetic:
                scores["score_aesthetic"] = self.head(embeddings[self.recipe.aesthetic.model]).squeeze(-1).tolist()
        for name, values in scores.items():
            if not np.isfinite(values).all():
                raise RuntimeError(f"`{name}` of a record is not finite: its model is broken.")
        yield {"shard": row["shard"], "positions": list(row["positions"]), **scores}

    def _embed(self, model: nn.Module, pixels: bytes, shape: list[int]) -> torch.Tensor:
        values = torch.frombuffer(bytearray(pixels), dtype=torch.float32).view(*shape).to(self.device)
        return F.normalize(model.get_image_features(pixel_values=values).pooler_output, dim=-1)

    def _embed_texts(self, captions: list[str]) -> torch.Tensor:
        model = self.models[self.names.index(self.recipe.clip.model)]
        longest = model.config.text_config.max_position_embeddings
        padding = {"padding": "max_length", "truncation": True, "max_length": longest}
        tokens = self.tokenizer(list(captions), **padding, return_tensors="pt").to(self.device)
        return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)


def load_head(path: Path, width: int) -> nn.Sequential:
    """
    Load an aesthetic head: linear layers, one after the other.

    Args:
        path (`Path`): Safetensors, or PyTorch's format (of which tensors alone are read).
        width (`int`): Length of the embeddings that it reads.

    Raises:
        ValueError: If the file holds something else, or layers that do not lead from `width` numbers to one.
    """
    tensors: Mapping[str, torch.Tensor] = Checkpoint.find(path)
    names = sorted((n for n in tensors if n.endswith("weight")), key=lambda n: [int(i) for i in re.findall(r"\d+", n)])
    is_matrix = all(tensors[name].ndim == 2 for name in names)
    layers = [nn.utils.skip_init(nn.Linear, *reversed(tensors[name].shape)) for name in names] if is_matrix else []
    sizes = [width, *(layer.out_features for layer in layers)]
    chained = all(layer.in_features == size for layer, size in zip(layers, sizes, strict=False))
    if not layers or not chained or sizes[-1] != 1 or len(tensors) != 2 * len(layers):
        shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in tensors)
        raise ValueError(f"{path} must hold linear layers that lead from {width} numbers to one, got {shapes}.")
    for name, layer in zip(names, layers, strict=True):
        layer.load_state_dict({"weight": tensors[name], "bias": tensors[f"{name.removesuffix('weight')}bias"]})
    return nn.Sequential(*layers).float().eval()


# Captions and codes


class Captioner:
    """Fine-grained captions by a vision-language model, without sampling (the paper used CogVLM)."""

    def __init__(self, recipe: Recipe):
        register()  # a MARS captions, too
        self.settings, self.device = recipe.recaption, _device(recipe)
        name = self.settings.model
        self.processor = AutoProcessor.from_pretrained(name)
        self.is_asked_in_chat = getattr(self.processor, "chat_template", None) is not None
        self.model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval().to(self.device)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, pictures: list[Image.Image], prompt: str) -> list[str]:
        """Describe pictures as the prompt asks for, in one printable line each."""
        size = self.settings.batch_size
        batches = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        return [clean_text(text)[0] for batch in batches for text in self._describe(batch, prompt)]

    def _describe(self, pictures: list[Image.Image], prompt: str) -> list[str]:
        with _one_thread():
            inputs = self._inputs(pictures, prompt).to(self.device, self.model.dtype)
            ids = self.model.generate(**inputs, max_new_tokens=self.settings.max_new_tokens, do_sample=False)
        asked, decode = inputs["input_ids"], functools.partial(self.processor.batch_decode, skip_special_tokens=True)
        if self.is_asked_in_chat:
            return decode(ids[:, asked.shape[1] :])
        # Of the prompt such models repeat all ids, some or none: it is taken off as text.
        return [said.removeprefix(question) for said, question in zip(decode(ids), decode(asked), strict=True)]

    def _inputs(self, pictures: list[Image.Image], prompt: str) -> BatchFeature:
        if not self.is_asked_in_chat:
            texts = [prompt] * len(pictures)
            return self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
            for picture in pictures
        ]
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(conversations, **template, processor_kwargs={"padding": True})


class CodeEncoder:
    """Pictures to the codes of a VQ-GAN."""

    def __init__(self, recipe: Recipe):
        self.settings = recipe.codes
        self.vqgan, stored = load_image_tokenizer(self.settings.model, _device(recipe))
        own = {name: getattr(stored, name) for name in ("downsample_factor", *PIXEL_SETTINGS)}
        self.image_processor = MarsImageProcessorPil(do_resize=False, **own)

    def __call__(self, pictures: list[Image.Image]) -> list[dict[str, Any]]:
        """Give for each picture `image_codes` in raster order, `codes_height` and `codes_width`."""
        codes: list[torch.Tensor] = []
        for start in range(0, len(pictures), self.settings.batch_size):
            batch = pictures[start : start + self.settings.batch_size]
            with _one_thread():
                # Pictures of several sizes come as a list.
                pixels = self.image_processor(batch, return_tensors="pt")["pixel_values"]
                codes += [grid.cpu() for grid in encode_pixels(self.vqgan, pixels)]
        sizes = [dict(zip(("codes_height", "codes_width"), grid.shape, strict=True)) for grid in codes]
        return [{"image_codes": grid.flatten().tolist(), **size} for grid, size in zip(codes, sizes, strict=True)]


def check_models(recipe: Recipe) -> dict[str, Any]:
    """
    Look at the models before any work is done.

    Returns:
        `dict`: What tells each model from another one of its name: a hash, or its commit on the Hub; under `codes`
        what `codes.json` says of the tokenizer.

    Raises:
        ValueError: If one does not fit what it is to do.
    """
    register()
    widths = {}
    for name in clip_models(recipe):
        widths[name] = getattr(AutoConfig.from_pretrained(name), "projection_dim", None)
        if widths[name] is None:
            raise ValueError(f"{name} is no CLIP model: its configuration has no `projection_dim`.")
    if recipe.aesthetic:
        load_head(Path(recipe.aesthetic.head), widths[recipe.aesthetic.model])
    names = [*widths, *(stage.model for stage in (recipe.recaption,) if stage)]
    names += [stage.head for stage in (recipe.aesthetic,) if stage]
    found: dict[str, Any] = {name: _identity(name) for name in names}
    if recipe.recaption:
        config = AutoConfig.from_pretrained(recipe.recaption.model)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise ValueError(
                f"{recipe.recaption.model} is a {config.model_type}, which describes no pictures: `recaption.model` "
                "must be an image-text-to-text model."
            )
    if recipe.codes:
        vqgan, _ = load_image_tokenizer(recipe.codes.model)
        found["codes"] = describe_tokenizer(vqgan)
        factor = found["codes"]["downsample_factor"]
        if recipe.resize.multiple_of % factor:
            raise ValueError(
                f"A code of {recipe.codes.model} stands for {factor} x {factor} px: `resize.multiple_of` must be a "
                f"multiple of {factor}, got {recipe.resize.multiple_of}."
            )
    return found


def _identity(name: str) -> str | None:
    return fingerprint(name) if Path(name).exists() else AutoConfig.from_pretrained(name)._commit_hash


def open_all(records: list[dict[str, Any]]) -> list[Image.Image]:
    """Open the pictures of records that passed the decoder."""
    return [Image.open(io.BytesIO(record["image"])).convert("RGB") for record in records]


def recaption_records(records: list[dict[str, Any]], captioner: Captioner) -> None:
    """Put fine-grained captions beside those that records have; an empty answer is none."""
    pictures = open_all(records)
    for language in LANGUAGES:
        prompt = captioner.settings.prompts.get(language)
        answers = captioner(pictures, prompt) if prompt else [""] * len(records)
        for record, answer in zip(records, answers, strict=True):
            record[f"fine_caption_{language}"] = answer or None
