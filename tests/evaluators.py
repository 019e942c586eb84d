"""Tiny evaluators: random models of the classes that evaluations load, and planted ones that know colours."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    DetrConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessorPil,
    PreTrainedTokenizerFast,
    SwinConfig,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255,) * 3}
COLOURS |= {"cyan": (0, 255, 255), "pink": (255, 128, 192)}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[DEC]",
    "yes",
    "no",
    "?",
    "a",
    "apple",
    "cup",
    "and",
    "cat",
    "dog",
    *COLOURS,
]
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {**TEXT, "image_size": 16, "patch_size": 8}
NAMES = {0: "cat", 1: "dog", 2: "person"}
LABELS = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}


def word_tokenizer(ends: bool = True) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words; `ends` writes an end token, as CLIP needs it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[SEP]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_clip(folder: Path, ends: bool = True) -> Path:
    """Save a random CLIPModel with four features."""
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    text = {**TEXT, "vocab_size": len(WORDS), "max_position_embeddings": 12, **ids}
    config = CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=4)
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side).save_pretrained(folder)
    word_tokenizer(ends).save_pretrained(folder)
    return folder


def save_vision(folder: Path) -> Path:
    """Save a random ViT."""
    ViTModel(ViTConfig(**IMAGE)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """Save a random BLIP that answers questions."""
    ids = {"bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**TEXT, "vocab_size": len(WORDS), "max_position_embeddings": 16, "encoder_hidden_size": 16, **ids}
    config = BlipConfig(text_config={**text, "initializer_range": 0.3}, vision_config=IMAGE, projection_dim=8)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_segmenter(folder: Path, kind: str = "mask2former", cats_only: bool = False) -> Path:
    """Save a random Mask2Former or MaskFormer that knows cats, dogs and people; `cats_only` has it see cats alone."""
    stages = {"depths": [1] * 4, "num_heads": [1] * 4, "out_features": [f"stage{i}" for i in range(1, 5)]}
    swin = SwinConfig(image_size=64, embed_dim=8, window_size=2, **stages)
    side = {"size": {"height": 64, "width": 64}, "size_divisor": 32}
    if kind == "mask2former":
        dims = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"), 32)
        layers = {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 16}
        config = Mask2FormerConfig(backbone_config=swin, **dims, **layers, num_queries=6, **LABELS)
        model = Mask2FormerForUniversalSegmentation(config)
        model.class_predictor.bias.data[0] += 9 * cats_only
        model.save_pretrained(folder)
        Mask2FormerImageProcessorPil(**side).save_pretrained(folder)
        return folder
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    detr = DetrConfig(d_model=16, num_queries=6, **layers, **heads)
    config = MaskFormerConfig(
        backbone_config=swin, decoder_config=detr, fpn_feature_size=32, mask_feature_size=32, **LABELS
    )
    MaskFormerForInstanceSegmentation(config).save_pretrained(folder)
    MaskFormerImageProcessorPil(**side).save_pretrained(folder)
    return folder


def save_detector(folder: Path) -> Path:
    """Save a random YOLOS that knows cats, dogs and people."""
    image = {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 5}
    config = YolosConfig(**image, **LABELS)
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def mean_colour(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=float).reshape(-1, 3).mean(0)


class ColourClip:
    """A CLIP that sees mean colours and reads colour words."""

    name, max_length = "clip-colours", 12

    def __init__(self, path: str):
        self.path = path

    def to(self, device: torch.device) -> "ColourClip":
        return self

    def images(self, pictures) -> torch.Tensor:
        return torch.tensor(np.array([mean_colour(picture) for picture in pictures]) - 127.5).float()

    def texts(self, texts) -> tuple[torch.Tensor, int]:
        colours = [next(COLOURS[word] for word in text.split() if word in COLOURS) for text in texts]
        return torch.tensor(colours).float() - 127.5, 0


class ColourAnswerer:
    """A VQA that says how much of the asked colour the picture's left ("apple") or right half ("cup") has."""

    name = "vqa-colours"

    def to(self, device: torch.device) -> "ColourAnswerer":
        return self

    def yes(self, pictures, questions) -> torch.Tensor:
        answers = []
        for picture, question in zip(pictures, questions, strict=True):
            left = 0 if "apple" in question else picture.width // 2
            half = picture.crop((left, 0, left + picture.width // 2, picture.height))
            colour = next(np.array(COLOURS[word]) for word in question.rstrip("?").split() if word in COLOURS)
            answers.append(1 - np.abs(mean_colour(half) - colour).mean() / 255)
        return torch.tensor(answers).float()
