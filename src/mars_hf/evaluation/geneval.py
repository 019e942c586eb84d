"""
GenEval (https://huggingface.co/papers/2310.11513): are the objects of a prompt there, as many, of their colors, in
their places?

Its protocol with evaluators of transformers: a detector finds objects, CLIP names their colors, and a picture is right
or wrong. A task's score is its share of right pictures, the overall score the mean of its tasks. Facts of the protocol
that its paper leaves open were read off the benchmark's script (https://github.com/djghosh13/geneval), which can drop
boxes that overlap but by default drops none.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForUniversalSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .compbench import Detection, Detector
from .encoders import ClipEncoder, evaluator_config
from .pictures import Task
from .prompts import Prompt, PromptSet
from .scenes import COLORS, TASKS, Scene

MAX_OBJECTS = 16  # of a class; the surest
TOLERANCE = 0.1  # share of both objects' sizes by which an offset must exceed nothing
COLOR_TEXTS = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
BACKGROUND = (153, 153, 153)  # what surrounds an object that CLIP sees
# How COCO and the label files of some detectors call what the benchmark calls otherwise.
OTHER_WORDS = {
    "airplane": ("aeroplane",),
    "computer keyboard": ("keyboard",),
    "computer mouse": ("mouse",),
    "couch": ("sofa",),
    "dining table": ("diningtable",),
    "motorcycle": ("motorbike",),
    "potted plant": ("pottedplant",),
    "tv": ("tvmonitor",),
    "tv remote": ("remote",),
}


class Segmenter(Detector):
    """
    A detector that also gives each object's mask.

    Args:
        path (`str` or `Path`): Folder or Hub name of a Mask2Former or MaskFormer and its image processor.
        threshold (`float`, defaults to 0.3): Least score of an object.
    """

    kind, auto_class = "segmenter", AutoModelForUniversalSegmentation

    @torch.no_grad()
    def detect(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        """List the objects of each picture, the surest first; a box is the smallest around its mask."""
        inputs = self.image_processor(images=list(pictures), return_tensors="pt").to(self.model.device)
        found = self.image_processor.post_process_instance_segmentation(
            self.model(**inputs),
            threshold=self.threshold,
            target_sizes=[(picture.height, picture.width) for picture in pictures],
            return_binary_maps=True,  # objects may overlap
        )
        detections = []
        for one in found:
            segments = one["segments_info"]
            masks = one["segmentation"].bool().cpu().numpy() if segments else []
            objects = [self._detection(*pair) for pair in zip(segments, masks, strict=True)]
            detections.append(sorted(objects, key=lambda found: -found.score))
        return detections

    def _detection(self, segment: dict[str, Any], pixels: np.ndarray) -> Detection:
        mask = Image.fromarray(pixels)
        box = tuple(edge / max(mask.size) for edge in mask.getbbox())
        return Detection(self.model.config.id2label[segment["label_id"]].lower(), segment["score"], box, mask)


def load_detector(path: str | os.PathLike, threshold: float) -> Detector:
    """
    Load a detector of the class that its checkpoint names.

    Raises:
        ValueError: If it is neither an object detector nor a Mask2Former or MaskFormer.
    """
    config, folder = evaluator_config(str(path), "object detector")
    architecture = next(iter(config.architectures or []), None)
    if architecture in ("Mask2FormerForUniversalSegmentation", "MaskFormerForInstanceSegmentation"):
        return Segmenter(path, threshold)
    if architecture in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.values():
        return Detector(path, threshold)
    raise ValueError(
        f"{folder} holds a {architecture}; GenEval needs a Mask2FormerForUniversalSegmentation, a "
        "MaskFormerForInstanceSegmentation or an object detector such as DetrForObjectDetection."
    )


def relations(first: Detection, second: Detection) -> set[str]:
    """
    Tell where an object is, seen from another: nowhere, in one of `PLACES`, or in two.

    Along an axis, the offset of their centres less a tenth of both sizes must exceed half of the whole offset.

    Example:
        >>> left, right = Detection("cat", 1.0, (0, 0.4, 0.2, 0.6)), Detection("dog", 1.0, (0.7, 0.4, 0.9, 0.6))
        >>> relations(left, right), relations(right, left), relations(left, left)
        ({'left of'}, {'right of'}, set())
    """
    (l1, t1, r1, b1), (l2, t2, r2, b2) = first.box, second.box
    right, down = (l1 + r1 - l2 - r2) / 2, (t1 + b1 - t2 - b2) / 2  # from the second centre to the first
    width, height = TOLERANCE * (r1 - l1 + r2 - l2), TOLERANCE * (b1 - t1 + b2 - t2)
    offsets = {"left of": -right - width, "right of": right - width, "above": -down - height, "below": down - height}
    return {place for place, offset in offsets.items() if offset > math.hypot(right, down) / 2}


def scene_holds(
    scene: Scene,
    objects: Mapping[str, Sequence[Detection]],
    colors: Callable[[Sequence[Detection], str], Sequence[str]],
) -> bool:
    """
    Tell whether all of a scene's clauses hold.

    Args:
        scene ([`Scene`]): What is asked about.
        objects (`Mapping`): What was found of each class, the surest first.
        colors (`Callable`): Names the colors of some objects of a class.

    Returns:
        `bool`: Color and place are asked of as many of the surest objects as there must be, and must hold of all.
    """
    matched: list[Sequence[Detection]] = []
    for wanted in scene.include:
        surest = objects.get(wanted.label, ())[: wanted.count]
        if len(surest) < wanted.count:
            return False
        if wanted.color is not None and any(color != wanted.color for color in colors(surest, wanted.label)):
            return False
        if wanted.position is not None:
            place, seen_from = wanted.position
            if any(place not in relations(one, other) for one in surest for other in matched[seen_from]):
                return False
        matched.append(surest)
    return all(len(objects.get(unwanted.label, ())) < unwanted.count for unwanted in scene.exclude)


def cut_out(picture: Image.Image, found: Detection) -> Image.Image:
    """Cut out an object's box, grey around the object if the detector gave its mask; at least one pixel."""
    if found.mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, BACKGROUND), found.mask)
    left, top, right, bottom = (round(edge * max(picture.size)) for edge in found.box)
    left, top = min(max(left, 0), picture.width - 1), min(max(top, 0), picture.height - 1)
    right, bottom = max(left + 1, min(right, picture.width)), max(top + 1, min(bottom, picture.height))
    return picture.crop((left, top, right, bottom))


def _words(label: str) -> set[str]:
    """Give the words by which detectors know a class."""
    return {label.lower(), *OTHER_WORDS.get(label.lower(), ())}


class GenEval:
    """
    Scores pictures of GenEval's prompts.

    Args:
        prompts ([`PromptSet`]): Their groups are tasks, and each has its `scene`.
        detector ([`Detector`]): Finds objects.
        clip ([`ClipEncoder`], *optional*): Names colors; needed if a prompt asks about one.
        threshold (`float`, defaults to 0.3): An object is one that the detector is surer of.
        counting_threshold (`float`, defaults to 0.9): The same, for the task of counting.

    Raises:
        ValueError: If a prompt has no scene, its group is no task, or it asks about a color without a CLIP model.
    """

    def __init__(
        self,
        prompts: PromptSet,
        detector: Detector,
        clip: ClipEncoder | None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
    ):
        self.prompts, self.detector, self.clip = prompts, detector, clip
        self.thresholds = dict.fromkeys(TASKS, threshold) | {"counting": counting_threshold}
        self.color_features: dict[str, torch.Tensor] = {}
        for prompt in prompts.prompts:
            if prompt.scene is None:
                raise ValueError(
                    f"Prompt {prompt.id!r} has nothing to look for; GenEval needs `prompts.kind: geneval`."
                )
            if prompt.group not in TASKS:
                raise ValueError(f"Prompt {prompt.id!r} is of the group {prompt.group!r}, not of {', '.join(TASKS)}.")
            if clip is None and any(clause.color for clause in prompt.scene.include):
                raise ValueError(f"The task {prompt.group} needs `metrics.geneval.clip`, but there is none.")

    @property
    def name(self) -> str:
        """What measurements are kept under: the evaluators, and a hash of what is asked."""
        scenes = [[prompt.group, asdict(prompt.scene)] for prompt in self.prompts.prompts]
        asked = hashlib.sha256(json.dumps([scenes, self.thresholds]).encode()).hexdigest()[:8]
        return "-".join(["geneval", self.detector.name, *([self.clip.name] if self.clip else []), asked])

    def to(self, device: torch.device) -> "GenEval":
        self.detector.to(device)
        if self.clip is not None:
            self.clip.to(device)
        return self

    def notes(self) -> list[str]:
        """Tell what differs from the benchmark."""
        notes = []
        kind = self.detector.model.config.model_type
        if kind != "mask2former":
            notes.append(
                "GenEval's thresholds were chosen for the scores of a Mask2Former, which a detector of type "
                f"{kind} may not match; its results are not comparable with others'."
            )
        if not isinstance(self.detector, Segmenter):
            notes.append("The detector gives boxes without masks, so colors are judged with what surrounds an object.")
        wanted = {clause.label for prompt in self.prompts.prompts for clause in prompt.scene.clauses}
        if unknown := sorted(label for label in wanted if not _words(label) & self.detector.labels):
            notes.append(
                f"The detector has no word for {len(unknown)} objects of the prompts, which it never finds: "
                f"{', '.join(unknown[:20])}{', ...' if len(unknown) > 20 else ''}."
            )
        tasks = self.prompts.groups()
        if missing := [task for task in TASKS if task not in tasks]:
            notes.append(f"GenEval's overall score is a mean without the tasks {', '.join(missing)}.")
        return notes

    @torch.no_grad()
    def rows(self, pictures: list[Image.Image], tasks: list[Task]) -> torch.Tensor:
        """
        Judge pictures.

        Returns:
            `torch.Tensor` of shape `(num,)`: 1 for a picture that is right, 0 for one that is not.
        """
        found = self.detector.detect(pictures)
        judged = [self.is_right(*each) for each in zip(pictures, found, (t.prompt for t in tasks), strict=True)]
        return torch.tensor(judged, dtype=torch.float32)

    def is_right(self, picture: Image.Image, detections: Sequence[Detection], prompt: Prompt) -> bool:
        """Judge one picture by its objects, the surest first."""
        sure = [found for found in detections if found.score > self.thresholds[prompt.group]]
        objects = {
            label: [found for found in sure if found.label in _words(label)][:MAX_OBJECTS]
            for label in {clause.label for clause in prompt.scene.clauses}
        }
        return scene_holds(prompt.scene, objects, lambda some, label: self.colors(picture, some, label))

    def colors(self, picture: Image.Image, objects: Sequence[Detection], label: str) -> list[str]:
        """Name the color of each object: the one whose texts CLIP finds nearest to its cut-out."""
        if label not in self.color_features:
            texts = [text.format(color=color, label=label) for color in COLORS for text in COLOR_TEXTS]
            features = F.normalize(self.clip.texts(texts)[0], dim=-1).unflatten(0, (len(COLORS), len(COLOR_TEXTS)))
            self.color_features[label] = F.normalize(features.mean(1), dim=-1)  # (colors, dim)
        seen = self.clip.images([cut_out(picture, found) for found in objects])
        return [COLORS[i] for i in (seen @ self.color_features[label].t()).argmax(-1).tolist()]
