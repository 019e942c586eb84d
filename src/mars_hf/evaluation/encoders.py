"""
Models that look at pictures for a metric: CLIP, any other vision model, FID's Inception.

Each gives one row of features for a picture and has a `name`, under which they are kept: what it is and the first
letters of the hash of its weights. What this file leaves to others: the metrics.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from .provenance import checkpoint_folder, fingerprint


def evaluator_config(path: str, what: str) -> tuple[Any, Path]:
    """
    Find an evaluator.

    Args:
        path (`str`): Folder or Hub name.
        what (`str`): What errors call it.

    Returns:
        `tuple`: Its configuration and its folder.

    Raises:
        ValueError: If there is none.
    """
    folder = checkpoint_folder(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is no {what}.")
    return AutoConfig.from_pretrained(folder), folder


def load_evaluator(path: str, what: str, model_types: Sequence[str], load: Callable[[Path], Any]) -> tuple[Any, Path]:
    """
    Load an evaluator.

    Args:
        path (`str`): Folder or Hub name.
        what (`str`): What errors call it.
        model_types (`Sequence[str]`): The `model_type`s that serve; all if empty.
        load (`Callable`): Loads the model from its folder.

    Returns:
        `tuple`: The model, in eval mode, and its folder.

    Raises:
        ValueError: If there is none, or it is of another type.
    """
    config, folder = evaluator_config(path, what)
    if model_types and config.model_type not in model_types:
        raise ValueError(
            f"{folder} holds a model of type {config.model_type!r}; a {what} is of {' or '.join(model_types)}."
        )
    return load(folder).eval(), folder


class ClipEncoder:
    """
    A CLIP model: features of pictures and of texts.

    Args:
        path (`str` or `Path`): Folder or Hub name of a `CLIPModel` with its image processor and tokenizer.

    Raises:
        ValueError: If it is none, or its tokenizer does not end a text as the model expects.
    """

    def __init__(self, path: str | os.PathLike):
        self.model, folder = load_evaluator(str(path), "CLIP model", ["clip"], CLIPModel.from_pretrained)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_length = self.model.config.text_config.max_position_embeddings
        self.name = f"clip-{fingerprint(folder)[:16]}"
        self._check_end(folder)

    def _check_end(self, folder: Path) -> None:
        """The text's feature stands at its end token: without one the model would take it from elsewhere, silently."""
        ids, end = self.tokenizer("a")["input_ids"], self.model.config.text_config.eos_token_id
        end = self.tokenizer.eos_token_id if end == 2 else end  # what old configurations say, and what is not used
        if end not in ids:
            raise ValueError(
                f"The tokenizer of {folder} ends no text with the end token {end} (`text_config.eos_token_id`), where "
                "CLIP takes a text's feature from. Save it with a post-processor that adds it."
            )

    def to(self, device: torch.device) -> "ClipEncoder":
        self.model.to(device)
        return self

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Give the features of pictures, of shape `(num, projection_dim)`, not normalised."""
        pixels = self.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixels.to(self.model.device)).pooler_output.float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 256) -> tuple[torch.Tensor, int]:
        """
        Give the features of texts.

        Returns:
            `tuple[torch.Tensor, int]`: Features of shape `(num, projection_dim)`, not normalised, and the number of
            texts that were longer than the model reads and were cut.
        """
        features, cut = [], 0
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            cut += sum(len(ids) > self.max_length for ids in self.tokenizer(batch, verbose=False)["input_ids"])
            inputs = self.tokenizer(
                batch, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            features.append(self.model.get_text_features(**inputs).pooler_output.float().cpu())
        return torch.cat(features), cut


class VisionEncoder:
    """
    Any vision model of transformers: its pooled output.

    Args:
        path (`str` or `Path`): Folder or Hub name of the model with its image processor.

    Raises:
        ValueError: If there is none, or it pools nothing.
    """

    def __init__(self, path: str | os.PathLike):
        self.model, folder = load_evaluator(str(path), "vision model", [], AutoModel.from_pretrained)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.name = f"vision-{fingerprint(folder)[:16]}"
        if self.images([Image.new("RGB", (64, 64))]) is None:
            raise ValueError(f"The model in {folder} has no pooled output, so it gives no feature of a whole picture.")

    def to(self, device: torch.device) -> "VisionEncoder":
        self.model.to(device)
        return self

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Give the features of pictures, of shape `(num, dim)`."""
        pixels = self.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        pooled = getattr(self.model(pixels.to(self.model.device)), "pooler_output", None)
        return None if pooled is None else pooled.flatten(1).float().cpu()


class InceptionEncoder:
    """
    The Inception v3 of the FID protocol, 2,048 features, as torchmetrics has it.

    Args:
        weights (`str` or `Path`): File of its weights, `pt_inception-2015-12-05-6726825d.pth`.

    Raises:
        ValueError: If there is no such file.
        ModuleNotFoundError: If torch-fidelity, which defines the network, is not installed.
    """

    def __init__(self, weights: str | os.PathLike):
        if not Path(weights).is_file():
            raise ValueError(
                f"{weights} does not exist. FID's Inception is pt_inception-2015-12-05-6726825d.pth of "
                "https://github.com/toshas/torch-fidelity/releases."
            )
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
        self.model.use_antialias = False  # FID resizes as TensorFlow 1 did, torchmetrics by default otherwise
        self.name = f"inception-tf1-{fingerprint(weights)[:16]}"

    def to(self, device: torch.device) -> "InceptionEncoder":
        self.model.to(device)
        return self

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Give the features of pictures of one size, of shape `(num, 2048)`."""
        pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
        device = next(self.model.parameters()).device
        return self.model(pixels.to(device)).float().cpu()
