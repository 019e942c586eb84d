"""
T2I-CompBench (https://huggingface.co/papers/2307.06350): do attributes, places and relations of a prompt hold?

Its protocol with evaluators of transformers: a BLIP that answers questions for color, shape and texture, an object
detector for places, CLIP for relations without a place, and the mean of those that a complex prompt is about. The
benchmark's own detector, UniDet, has no class in transformers; any detector stands in for it, and what it cannot
know is counted. Facts of the protocol that its paper leaves open were read off the benchmark's scripts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoTokenizer,
    BlipForQuestionAnswering,
)

from .encoders import load_evaluator
from .parts import ATTRIBUTES, CATEGORIES, PromptParts
from .pictures import Task
from .prompts import PromptSet
from .provenance import fingerprint

BESIDE = ("on side of", "next to", "near")
MAX_OVERLAP = 0.1  # intersection over union up to which a place counts in full
NEAR = 150 / 512  # the benchmark's 150 pixels, of pictures with a longer side of 512
LEAST_SPATIAL = 0.5  # a lower score counts as nothing
PEOPLE = ("girl", "boy", "man", "woman")


class QuestionAnswerer:
    """
    BLIP-VQA: how likely is "yes" to a question about a picture?

    Args:
        path (`str` or `Path`): Folder or Hub name of a `BlipForQuestionAnswering` with its processor.

    Raises:
        ValueError: If it is none, or its tokenizer does not know "yes" and "no".
    """

    def __init__(self, path: str | os.PathLike):
        load = BlipForQuestionAnswering.from_pretrained
        self.model, folder = load_evaluator(str(path), "BLIP for question answering", ["blip"], load)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name = f"vqa-{fingerprint(folder)[:16]}"
        ids = {answer: self.tokenizer.convert_tokens_to_ids(answer) for answer in ("yes", "no")}
        unknown = self.tokenizer.unk_token_id
        if missing := [answer for answer, id in ids.items() if id in (None, unknown)]:
            raise ValueError(f"The tokenizer of {folder} has no token {missing[0]!r}, so no answer can be read off.")
        self.answer_ids = [ids["yes"], ids["no"]]

    def to(self, device: torch.device) -> "QuestionAnswerer":
        self.model.to(device)
        return self

    @torch.no_grad()
    def yes(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> torch.Tensor:
        """
        Ask one question about each picture.

        Returns:
            `torch.Tensor` of shape `(num,)`: `p(yes) / (p(yes) + p(no))` for the answer's first token.
        """
        pixels = self.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        seen = self.model.vision_model(pixels.to(self.model.device)).last_hidden_state
        asked = self.tokenizer(list(questions))["input_ids"]
        answers = torch.empty(len(asked))
        # By length, without padding: BLIP's decoder does not keep an answer from looking at its question's padding.
        for length in {len(ids) for ids in asked}:
            rows = [i for i, ids in enumerate(asked) if len(ids) == length]
            answers[rows] = self._answer(seen[rows], torch.tensor([asked[i] for i in rows], device=seen.device))
        return answers

    def _answer(self, seen: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        """Answer questions of one length, of shape `(num, length)`, about what was seen."""
        question = self.model.text_encoder(input_ids=questions, encoder_hidden_states=seen)[0]
        start = torch.full((len(question), 1), self.model.decoder_start_token_id, device=question.device)
        logits = self.model.text_decoder(input_ids=start, encoder_hidden_states=question).logits[:, 0]
        return logits[:, self.answer_ids].float().softmax(-1)[:, 0].cpu()


@dataclass(frozen=True)
class Detection:
    """
    An object that a detector sees.

    Args:
        label (`str`): Its name.
        score (`float`): How sure the detector is, 0 to 1.
        box (`tuple[float, float, float, float]`): Left, top, right, bottom, as shares of the picture's longer side.
        mask (`PIL.Image.Image`, *optional*): Its pixels, white on black, from a detector that tells them.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Image.Image | None = None


class Detector:
    """
    An object detector.

    Args:
        path (`str` or `Path`): Folder or Hub name of an `AutoModelForObjectDetection` and its image processor.
        threshold (`float`, defaults to 0.3): Least score of an object. Not the benchmark's, whose detector is another.
    """

    kind, auto_class = "detector", AutoModelForObjectDetection

    def __init__(self, path: str | os.PathLike, threshold: float = 0.3):
        self.model, folder = load_evaluator(str(path), "object detector", [], self.auto_class.from_pretrained)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.threshold = threshold
        self.name = f"{self.kind}-{fingerprint(folder)[:16]}"
        self.labels = {label.lower() for label in self.model.config.id2label.values()}

    def to(self, device: torch.device) -> "Detector":
        self.model.to(device)
        return self

    @torch.no_grad()
    def detect(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        """List the objects of each picture, the surest first."""
        inputs = self.image_processor(images=list(pictures), return_tensors="pt").to(self.model.device)
        sizes = [(p.height / max(p.size), p.width / max(p.size)) for p in pictures]
        found = self.image_processor.post_process_object_detection(
            self.model(**inputs), threshold=self.threshold, target_sizes=sizes
        )
        names = self.model.config.id2label
        detections = []
        for one in found:
            order = one["scores"].argsort(descending=True).tolist()
            rows = [(one["labels"][i].item(), one["scores"][i].item(), one["boxes"][i].tolist()) for i in order]
            detections.append([Detection(names[label].lower(), score, tuple(box)) for label, score, box in rows])
        return detections


def place_score(place: str | None, first: Detection, second: Detection) -> float:
    """
    Tell how well a place holds between the boxes of two objects, 0 to 1.

    A direction holds if the centres lie further apart along it than across it; overlap beyond a tenth lessens it.
    Beside and near hold within about 0.3 of the picture's longer side, further away ever less.

    Example:
        >>> left, right = Detection("cat", 1.0, (0, 0.4, 0.2, 0.6)), Detection("dog", 1.0, (0.7, 0.4, 0.9, 0.6))
        >>> place_score("on the left of", left, right), place_score("on the left of", right, left)
        (1.0, 0.0)
    """
    (l1, t1, r1, b1), (l2, t2, r2, b2) = first.box, second.box
    right, down = (l2 + r2 - l1 - r1) / 2, (t2 + b2 - t1 - b1) / 2  # from the first centre to the second
    if place in BESIDE:
        distance = max(abs(right), abs(down))
        return 1.0 if min(abs(right), abs(down)) < NEAR else NEAR / distance
    along = {"on the left of": right, "on the right of": -right, "on the top of": down, "on the bottom of": -down}
    across = abs(down) if place in ("on the left of", "on the right of") else abs(right)
    if along.get(place, 0.0) <= across:
        return 0.0
    shared = max(0.0, min(r1, r2) - max(l1, l2)) * max(0.0, min(b1, b2) - max(t1, t2))
    overlap = shared / max((r1 - l1) * (b1 - t1) + (r2 - l2) * (b2 - t2) - shared, 1e-12)
    return 1.0 if overlap < MAX_OVERLAP else MAX_OVERLAP / overlap


def spatial_score(parts: PromptParts, detections: Sequence[Detection]) -> float:
    """
    Score a picture by its objects: a quarter for the sureness of each, a half for their place.

    Args:
        parts ([`PromptParts`]): With two `objects` and their `place`.
        detections (`Sequence[Detection]`): The surest first.

    Returns:
        `float`: 0 to 1; less than a half counts as 0, as in the benchmark.
    """
    surest = {found.label: found for found in reversed(detections)}
    seen = [surest[_label(name)] for name in parts.objects if _label(name) in surest]
    if len(seen) != 2:
        return 0.0
    first, second = seen
    score = (first.score + second.score) / 4 + place_score(parts.place, first, second) / 2
    return score if score >= LEAST_SPATIAL else 0.0


def _label(name: str) -> str:
    """Give the detector's word for an object."""
    return "person" if name in PEOPLE else name.lower()


class CompBench:
    """
    Scores pictures of T2I-CompBench's prompts.

    Args:
        prompts ([`PromptSet`]): Their groups are categories, and each has its `parts`.
        vqa ([`QuestionAnswerer`], *optional*): Needed for color, shape, texture and complex.
        detector ([`Detector`], *optional*): Needed for spatial and complex.
        has_clip (`bool`): Whether there is a CLIP model; needed for non_spatial and complex.

    Raises:
        ValueError: If a group is no category, a prompt lacks a part that its category asks about, or an evaluator is
            missing.
    """

    def __init__(self, prompts: PromptSet, vqa: QuestionAnswerer | None, detector: Detector | None, has_clip: bool):
        self.prompts, self.vqa, self.detector = prompts, vqa, detector
        for prompt in prompts.prompts:
            if prompt.group not in CATEGORIES:
                raise ValueError(
                    f"Prompt {prompt.id!r} is of the group {prompt.group!r}; T2I-CompBench has "
                    f"{', '.join(CATEGORIES)}."
                )
            aspects = self.aspects(prompt.group, prompt.parts)
            parts = prompt.parts or PromptParts()
            if not aspects or ("attribute" in aspects and not parts.noun_phrases):
                lacking = "noun_phrases" if aspects else "aspects"
                raise ValueError(f"Prompt {prompt.id!r} ({prompt.group}) has no `{lacking}` among its parts.")
            tools = {"attribute": ("vqa", vqa), "spatial": ("detector", detector), "non_spatial": ("clip", has_clip)}
            for name, tool in (tools[aspect] for aspect in aspects):
                if not tool:
                    raise ValueError(f"The group {prompt.group} needs `metrics.compbench.{name}`, but there is none.")

    @staticmethod
    def aspects(group: str, parts: PromptParts | None) -> tuple[str, ...]:
        """Tell what a prompt is about."""
        if group == "complex":
            return parts.aspects if parts else ()
        return ("attribute",) if group in ATTRIBUTES else (group,)

    def unknown_objects(self) -> list[str]:
        """List the objects that the detector has no word for: their pictures score 0 for their place."""
        if self.detector is None:
            return []
        names = {name for p in self.prompts.prompts if p.parts for name in p.parts.objects}
        return sorted(name for name in names if _label(name) not in self.detector.labels)

    def attribute_rows(self, pictures: list[Image.Image], tasks: list[Task]) -> torch.Tensor:
        """
        Multiply the answers to the questions about each picture.

        Returns:
            `torch.Tensor` of shape `(num,)`: NaN for prompts that are not about attributes.
        """
        asked = [self._asked(task, "attribute") for task in tasks]
        pairs = [(i, f"{phrase}?") for i, parts in enumerate(asked) if parts for phrase in parts.noun_phrases]
        scores = torch.tensor([float("nan") if parts is None else 1.0 for parts in asked])
        size = len(pictures)
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            yes = self.vqa.yes([pictures[i] for i, _ in batch], [question for _, question in batch])
            for (i, _), probability in zip(batch, yes, strict=True):
                scores[i] *= probability
        return scores

    def spatial_rows(self, pictures: list[Image.Image], tasks: list[Task]) -> torch.Tensor:
        """
        Score the places of objects in each picture.

        Returns:
            `torch.Tensor` of shape `(num,)`: NaN for prompts that are not about places.
        """
        asked = [self._asked(task, "spatial") for task in tasks]
        scores = torch.full((len(tasks),), float("nan"))
        wanted = [i for i, parts in enumerate(asked) if parts is not None]
        if wanted:
            found = self.detector.detect([pictures[i] for i in wanted])
            scores[wanted] = torch.tensor([spatial_score(asked[i], d) for i, d in zip(wanted, found, strict=True)])
        return scores

    def clip_texts(self) -> list[str]:
        """Give what CLIP compares each prompt's pictures with."""
        plain = (p.parts.plain if p.group == "complex" and p.parts else None for p in self.prompts.prompts)
        return [text or prompt.text for text, prompt in zip(plain, self.prompts.prompts, strict=True)]

    def total(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Average what each prompt is about, in percent.

        Args:
            rows (`dict`): For each aspect scores of shape `(prompts, pictures)`, 0 to 1.

        Returns:
            `torch.Tensor` of shape `(prompts, pictures)`.
        """
        means = []
        for number, prompt in enumerate(self.prompts.prompts):
            about = self.aspects(prompt.group, prompt.parts)
            means.append(torch.stack([rows[aspect][number] for aspect in about]).mean(0))
        return 100 * torch.stack(means)

    def _asked(self, task: Task, aspect: str) -> PromptParts | None:
        about = self.aspects(task.prompt.group, task.prompt.parts)
        return (task.prompt.parts or PromptParts()) if aspect in about else None
