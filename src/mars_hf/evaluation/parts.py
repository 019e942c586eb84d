"""
What T2I-CompBench asks about a prompt: its noun phrases, its objects and their place.

The benchmark's scripts find them with spaCy, which is an optional package here; prompts of one's own can carry them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ATTRIBUTES = ("color", "shape", "texture")
CATEGORIES = (*ATTRIBUTES, "spatial", "non_spatial", "complex")
# In the order in which they are looked for. The benchmark's scripts know the last one but never score its place.
PLACES = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
COMPLEX_PLACES = (("on", "top", "of"), ("on", "bottom", "of"), ("on", "the", "left"), ("on", "the", "right"))
COMPLEX_PLACES += (("next", "to"), ("on", "side", "of"), ("near",))

ASPECTS = ("attribute", "spatial", "non_spatial")

# Noun phrases that name no thing, and the most that are asked about: as in the benchmark's scripts.
NO_THINGS = ("top", "the side", "the left", "the right")
MAX_PHRASES = 8


@dataclass(frozen=True)
class PromptParts:
    """
    What is asked about a prompt's picture.

    Args:
        noun_phrases (`tuple[str, ...]`): Each becomes a question: `"a red apple?"`.
        objects (`tuple[str, ...]`): The two that have a place to each other; empty if there are none.
        place (`str`, *optional*): One of `PLACES`: where the first object is, seen from the second.
        aspects (`tuple[str, ...]`): What a complex prompt is about, of `attribute`, `spatial`, `non_spatial`.
        plain (`str`, *optional*): What CLIP compares a complex picture with: the prompt without adjectives.
    """

    noun_phrases: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    place: str | None = None
    aspects: tuple[str, ...] = ()
    plain: str | None = None


def load_parser(name: str) -> Any:
    """
    Load a spaCy pipeline, which finds noun phrases as the benchmark does.

    Raises:
        ValueError: If the pipeline is missing.
        ModuleNotFoundError: If spaCy is not installed.
    """
    try:
        import spacy
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "T2I-CompBench's prompts are parsed by spaCy, which is not installed: `pip install spacy`, then `python "
            f"-m spacy download {name}`. Or give the parts yourself, in prompts of the kind jsonl"
        ) from None
    try:
        return spacy.load(name)
    except OSError:
        raise ValueError(
            f"spaCy has no pipeline {name!r} here: `python -m spacy download {name}`, or set `prompts.parser`."
        ) from None


def parse_prompt(doc: Any, category: str, aspect: str = "both") -> PromptParts:
    """
    Find the parts of a prompt.

    Args:
        doc (`spacy.tokens.Doc`): The parsed prompt.
        category (`str`): One of `CATEGORIES`.
        aspect (`str`, defaults to `"both"`): Beside attributes, a complex prompt is about `spatial`, `action` or both.

    Returns:
        [`PromptParts`]: All that can be asked; `place` is the first of `PLACES` in the prompt.
    """
    text = doc.text
    chunks = [chunk.text for chunk in doc.noun_chunks]
    noun_phrases = tuple([text for text in chunks if text not in NO_THINGS] or chunks)[:MAX_PHRASES]
    place = next((place for place in PLACES if place in text), None)
    nouns = [token.text for token in doc if token.pos_ == "NOUN"]
    if category != "complex":
        objects = (nouns[0], nouns[-1]) if nouns else ()
        return PromptParts(noun_phrases, objects if category == "spatial" else (), place)
    aspects = {"spatial": ("attribute", "spatial"), "action": ("attribute", "non_spatial")}
    plain = " ".join(token.text for token in doc if token.pos_ != "ADJ")
    about = aspects.get(aspect, ("attribute", "spatial", "non_spatial"))
    return PromptParts(noun_phrases, _objects_beside_place(list(doc)), place, about, plain)


def _objects_beside_place(tokens: Sequence[Any]) -> tuple[str, ...]:
    """Take the last noun before the only place in a sentence and the first one after it; nothing if that fails."""
    words, found = [token.text for token in tokens], []
    for start in range(len(words)):
        place = next((p for p in COMPLEX_PLACES if tuple(words[start : start + len(p)]) == p), None)
        if place is not None:
            before = [t.text for t in tokens[:start] if t.pos_ in ("NOUN", "PROPN")]
            after = [t.text for t in tokens[start + len(place) :] if t.pos_ == "NOUN"]
            after = after or [t.text for t in tokens[start + len(place) :] if t.pos_ == "PROPN"]
            found += [*before[-1:], *after[:1]]
    return tuple(found) if len(found) == 2 else ()
