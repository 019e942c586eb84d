"""
Captions of emoji records in the forms that the emoji language model was taught, and how often each record comes.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .text import caption_phrases, with_style

SKIN_TONES = frozenset(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))


@dataclass(frozen=True)
class CaptionStyle:
    """
    How often a caption takes which form. Shares are probabilities.

    Args:
        chinese (`float`): Chinese instead of English.
        named_style (`float`): The drawing style is named: "red apple, twemoji style", "红苹果，twemoji 风格".
        phrase (`float`): An article or "a picture of" in either language stands in front.
    """

    chinese: float = 0.5
    named_style: float = 0.75
    phrase: float = 0.2


def emoji_caption(record: dict[str, str], rng: random.Random, style: CaptionStyle = CaptionStyle()) -> str:  # noqa: B008
    """
    Write a caption of an emoji record in one of its forms.

    Args:
        record (`dict`): With `caption_en`, `caption_zh` and `style`.
        rng (`random.Random`): Decides the form.
        style ([`CaptionStyle`]): How often which form.

    Example:
        >>> emoji_caption({"caption_en": "red apple", "caption_zh": "红苹果", "style": "noto"}, random.Random(1))
        '红苹果'
    """
    chinese, named, phrased = (rng.random() < share for share in (style.chinese, style.named_style, style.phrase))
    language = "zh" if chinese else "en"
    label, *phrases = caption_phrases(record[f"caption_{language}"], language)  # the forms that the LM was taught
    caption = rng.choice(phrases) if phrased and phrases else label
    return with_style(caption, record["style"], language) if named else caption


def subject_weights(hexcodes: Sequence[str], exponent: float = 0.5) -> torch.Tensor:
    """
    Weigh emoji so that subjects with many variants of skin tone do not crowd out those with one.

    Args:
        hexcodes (`Sequence[str]`): Code points of each record, joined by "-".
        exponent (`float`, defaults to 0.5): 0 weighs records alike, 1 subjects.

    Returns:
        `torch.Tensor` of shape `(num,)`: Sums to 1.

    Example:
        >>> subject_weights(["1F44B", "1F44B-1F3FB", "1F44B-1F3FC", "1F34E"], exponent=1.0)
        tensor([0.1667, 0.1667, 0.1667, 0.5000])
    """
    subjects = ["-".join(part for part in code.split("-") if part not in SKIN_TONES) for code in hexcodes]
    sizes = Counter(subjects)
    weights = torch.tensor([sizes[subject] ** -exponent for subject in subjects])
    return weights / weights.sum()


__all__ = ["CaptionStyle", "emoji_caption", "subject_weights"]
