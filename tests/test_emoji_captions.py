"""Captions of emoji and how often each comes."""

import random

import pytest
import torch

from mars_hf.data.emoji_captions import CaptionStyle, emoji_caption, subject_weights

RECORD = {"caption_en": "red apple", "caption_zh": "红苹果", "style": "noto"}


@pytest.mark.parametrize(
    ("style", "caption"),
    [
        (CaptionStyle(chinese=0, named_style=0, phrase=0), "red apple"),
        (CaptionStyle(chinese=0, named_style=1, phrase=0), "red apple, noto style"),
        (CaptionStyle(chinese=1, named_style=0, phrase=0), "红苹果"),
        (CaptionStyle(chinese=1, named_style=1, phrase=0), "红苹果，noto 风格"),
    ],
)
def test_captions_take_the_forms_that_are_asked_for(style, caption):
    assert emoji_caption(RECORD, random.Random(0), style) == caption


def test_phrases_come_in_both_languages():
    forms = {emoji_caption(RECORD, random.Random(i), CaptionStyle(named_style=0, phrase=1)) for i in range(200)}
    assert forms == {
        "a red apple",
        "a picture of a red apple",
        "一张红苹果的图片",
        "一个红苹果",
    }


def test_subjects_weigh_less_the_more_variants_they_have():
    codes = ["1F44B", "1F44B-1F3FB", "1F44B-1F3FC", "1F34E"]
    assert torch.allclose(subject_weights(codes, 1.0), torch.tensor([1, 1, 1, 3]) / 6)
    assert torch.allclose(subject_weights(codes, 0.0), torch.full((4,), 0.25))
