"""GenEval: hand-worked rows, painted pictures with planted answers, and random models of the real classes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluators import NAMES, ColourClip, save_clip, save_detector, save_segmenter
from PIL import Image, ImageOps
from torch.nn import functional as F

from mars_hf.evaluation.compbench import Detection, Detector
from mars_hf.evaluation.encoders import ClipEncoder
from mars_hf.evaluation.geneval import GenEval, Segmenter, cut_out, load_detector, relations, scene_holds
from mars_hf.evaluation.metrics import grouped_mean_interval, mean_interval
from mars_hf.evaluation.pictures import Task
from mars_hf.evaluation.prompts import GenEvalPrompts, Prompt, PromptSet
from mars_hf.evaluation.scenes import COLORS, Clause, Scene

RGB = {"red": (255, 0, 0), "orange": (255, 128, 0), "yellow": (255, 255, 0), "green": (0, 255, 0)}
RGB |= {"blue": (0, 0, 255), "purple": (128, 0, 255), "pink": (255, 128, 192), "brown": (128, 64, 0)}
RGB |= {"black": (0, 0, 0), "white": (255, 255, 255)}


def see(label: str, left: float, top: float, right: float, bottom: float, score: float = 1.0) -> Detection:
    return Detection(label, score, (left, top, right, bottom))


# Rules


@pytest.mark.parametrize(
    "first, second, places",
    [
        ((0, 0.4, 0.2, 0.6), (0.7, 0.4, 0.9, 0.6), {"left of"}),
        ((0.7, 0.4, 0.9, 0.6), (0, 0.4, 0.2, 0.6), {"right of"}),
        ((0.4, 0, 0.6, 0.2), (0.4, 0.7, 0.6, 0.9), {"above"}),
        ((0.4, 0.7, 0.6, 0.9), (0.4, 0, 0.6, 0.2), {"below"}),
        ((0, 0, 0.2, 0.2), (0.5, 0.5, 0.7, 0.7), {"left of", "above"}),  # 0.5 - 0.04 is more than 0.707 / 2
        ((0, 0, 0.1, 0.1), (0.2, 0.6, 0.3, 0.7), {"above"}),  # 0.2 - 0.02 is less than 0.632 / 2
        ((0, 0, 0.6, 0.6), (0.2, 0, 0.8, 0.6), set()),  # 0.2 - 0.12 is less than 0.2 / 2
        ((0, 0, 0.6, 0.6), (0.3, 0, 0.9, 0.6), {"left of"}),  # 0.3 - 0.12 is more than 0.3 / 2
        ((0, 0, 0.6, 0.1), (0.3, 0, 0.4, 0.1), set()),  # the second inside the first
        ((0.1, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1), set()),  # points in one place
    ],
)
def test_places_hold_as_worked_out_by_hand(first, second, places) -> None:
    assert relations(see("a", *first), see("b", *second)) == places
    stretched = [see("a", *(50 * edge for edge in box)) for box in (first, second)]
    assert relations(*stretched) == places


RED, GREEN, FAR = see("cup", 0, 0.4, 0.1, 0.5), see("cup", 0.3, 0.4, 0.4, 0.5), see("dog", 0.8, 0.4, 0.9, 0.5)
PAINT = {RED: "red", GREEN: "green", FAR: "brown"}
CUP, DOG, CUPS = Clause("cup", 1), Clause("dog", 1), Clause("cup", 2)
RED_CUP, GREEN_CUP = replace(CUP, color="red"), replace(CUP, color="green")
DOG_RIGHT, DOG_LEFT = replace(DOG, position=("right of", 0)), replace(DOG, position=("left of", 0))


@pytest.mark.parametrize(
    "include, exclude, found, holds",
    [
        ([CUP], [], [RED], True),
        ([CUP], [], [RED, GREEN], True),  # more than asked for
        ([CUP], [], [FAR], False),
        ([CUP], [], [], False),
        ([CUP, DOG], [], [RED, FAR], True),
        ([CUP, DOG], [], [RED, GREEN], False),
        ([CUPS], [Clause("cup", 3)], [RED, GREEN], True),
        ([CUPS], [Clause("cup", 3)], [RED], False),
        ([CUPS], [Clause("cup", 3)], [RED, GREEN, GREEN], False),
        ([], [DOG], [RED], True),
        ([], [DOG], [RED, FAR], False),
        ([RED_CUP], [], [RED], True),
        ([RED_CUP], [], [GREEN], False),
        ([RED_CUP], [], [GREEN, RED], False),  # only the surest is asked
        ([replace(CUPS, color="red")], [], [RED, RED], True),
        ([replace(CUPS, color="red")], [], [RED, GREEN], False),
        ([RED_CUP, replace(DOG, color="brown")], [], [RED, FAR], True),
        ([GREEN_CUP, replace(DOG, color="brown")], [], [RED, FAR], False),
        ([CUP, DOG_RIGHT], [], [RED, FAR], True),
        ([CUP, DOG_LEFT], [], [RED, FAR], False),
        ([CUPS, DOG_RIGHT], [], [RED, GREEN, FAR], True),
        ([CUPS, DOG_LEFT], [], [RED, see("cup", 0.95, 0.4, 1, 0.5), FAR], False),  # left of one of two cups
        ([DOG, replace(CUPS, position=("left of", 0))], [], [RED, GREEN, FAR], True),
    ],
)
def test_scenes_hold_as_worked_out_by_hand(include, exclude, found, holds) -> None:
    objects = {label: [one for one in found if one.label == label] for label in ("cup", "dog")}
    scene = Scene(tuple(include), tuple(exclude))
    assert scene_holds(scene, objects, lambda some, label: [PAINT[one] for one in some]) is holds


def bench(*scenes: tuple[str, Scene], detector=None, clip=None, **thresholds) -> GenEval:
    prompts = [Prompt(str(i), f"prompt {i}", task, scene=scene) for i, (task, scene) in enumerate(scenes)]
    return GenEval(PromptSet("test", prompts), detector, clip, **thresholds)


def test_objects_count_above_a_threshold_that_is_higher_for_counting() -> None:
    geneval = bench(("single_object", Scene((CUP,))), ("counting", Scene((CUP,))))
    single, counting = geneval.prompts.prompts
    picture = Image.new("RGB", (8, 8))
    for score, judged in ((0.3, [False, False]), (0.31, [True, False]), (0.9, [True, False]), (0.91, [True, True])):
        found = [replace(RED, score=score)]
        assert [geneval.is_right(picture, found, prompt) for prompt in (single, counting)] == judged


def test_sixteen_objects_of_a_class_are_counted_at_most() -> None:
    geneval = bench(("counting", Scene((), (Clause("cup", 17),))), ("counting", Scene((), (Clause("cup", 16),))))
    judged = [geneval.is_right(Image.new("RGB", (8, 8)), [RED] * 20, prompt) for prompt in geneval.prompts.prompts]
    assert judged == [True, False]


def test_objects_are_found_by_the_words_of_coco_and_of_other_label_files() -> None:
    pairs = [("tv remote", "remote"), ("tv", "tvmonitor"), ("airplane", "aeroplane"), ("mouse", "mouse")]
    for wanted, word in [*pairs, ("computer mouse", "mouse")]:
        geneval = bench(("single_object", Scene((Clause(wanted, 1),))))
        for label, is_right in ((word, True), (wanted, True), ("cup", False)):
            found = [replace(RED, label=label)]
            assert geneval.is_right(Image.new("RGB", (8, 8)), found, geneval.prompts.prompts[0]) is is_right


def test_an_object_is_cut_out_of_grey_if_its_mask_is_known() -> None:
    picture = Image.new("RGB", (8, 4), "red")
    picture.putpixel((2, 1), (0, 0, 255))
    mask = Image.new("1", (8, 4))
    mask.putpixel((2, 1), 1)
    found = see("cup", 0.25, 0.125, 0.5, 0.375)  # two pixels square
    blue, red, grey = [0, 0, 255], [255, 0, 0], [153, 153, 153]
    assert np.asarray(cut_out(picture, found)).tolist() == [[blue, red], [red, red]]
    assert np.asarray(cut_out(picture, replace(found, mask=mask))).tolist() == [[blue, grey], [grey, grey]]


@pytest.mark.parametrize(
    "box, size",
    [
        ((-0.5, -0.5, 2, 2), (8, 4)),
        ((0.5, 0.25, 0.5, 0.25), (1, 1)),
        ((1, 0.5, 1, 0.5), (1, 1)),
        ((2, 2, 3, 3), (1, 1)),
        ((-3, -3, -2, -2), (1, 1)),
    ],
)
def test_a_cut_out_stays_within_the_picture_and_has_a_pixel(box, size) -> None:
    assert cut_out(Image.new("RGB", (8, 4)), see("cup", *box)).size == size


# Planted answers


class PaintDetector:
    """Sees blocks on grey ground: upright ones are cups, flat ones dogs."""

    name, labels = "detector-paint", {"cup", "dog"}

    def detect(self, pictures) -> list[list[Detection]]:
        return [[self._block(picture, *span) for span in self._spans(picture)] for picture in pictures]

    @staticmethod
    def _painted(picture: Image.Image) -> np.ndarray:
        return (np.asarray(picture) != 128).any(-1)

    def _spans(self, picture: Image.Image) -> list[list[int]]:
        columns = self._painted(picture).any(0)
        return np.flatnonzero(np.diff(np.r_[0, columns, 0])).reshape(-1, 2).tolist()

    def _block(self, picture: Image.Image, left: int, right: int) -> Detection:
        rows = np.flatnonzero(self._painted(picture)[:, left:right].any(1))
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        label = "cup" if bottom - top > right - left else "dog"
        return see(label, *(edge / max(picture.size) for edge in (left, top, right, bottom)))


class PaintClip(ColourClip):
    """A CLIP that sees mean colours and reads GenEval's colour words."""

    def texts(self, texts) -> tuple[torch.Tensor, int]:
        words = [next(word for word in re.findall("[a-z]+", text) if word in RGB) for text in texts]
        return torch.tensor([RGB[word] for word in words]).float() - 127.5, 0


def paint(*blocks: str) -> Image.Image:
    """Paint blocks, such as "red cup", from left to right."""
    picture = Image.new("RGB", (64, 16), (128, 128, 128))
    for number, block in enumerate(blocks):
        color, label = block.split()
        size = (4, 12) if label == "cup" else (12, 4)
        picture.paste(RGB[color], (2 + 16 * number, 2, 2 + 16 * number + size[0], 2 + size[1]))
    return picture


def judge(task: str, scene: Scene, *pictures: Image.Image) -> list[float]:
    geneval = bench((task, scene), detector=PaintDetector(), clip=PaintClip(""))
    tasks = [Task(geneval.prompts.prompts[0], 0, sample, 0) for sample in range(len(pictures))]
    return geneval.rows(list(pictures), tasks).tolist()


def test_swapping_red_and_green_flips_the_colour_score() -> None:
    binding = Scene((RED_CUP, replace(DOG, color="green")))
    pictures = [paint("red cup", "green dog"), paint("green cup", "red dog"), paint("red cup", "red dog")]
    assert judge("color_attr", binding, *pictures) == [1, 0, 0]
    assert judge("colors", Scene((RED_CUP,)), *pictures) == [1, 0, 1]
    assert judge("colors", Scene((GREEN_CUP,)), *pictures) == [0, 1, 0]


@pytest.mark.parametrize("color", COLORS)
def test_each_colour_is_told_from_the_others(color: str) -> None:
    pictures = [paint(f"{other} cup") for other in COLORS]
    wanted = [float(other == color) for other in COLORS]
    assert judge("colors", Scene((replace(CUP, color=color),)), *pictures) == wanted


def test_a_missing_object_and_wrong_counts_fail() -> None:
    assert judge("two_object", Scene((CUP, DOG)), paint("red cup", "red dog"), paint("red cup"), paint()) == [1, 0, 0]
    two = Scene((CUPS,), (Clause("cup", 3),))
    assert judge("counting", two, *(paint(*["red cup"] * count) for count in range(5))) == [0, 0, 1, 0, 0]


def test_a_mirrored_picture_flips_the_position() -> None:
    picture = paint("red cup", "red dog")
    for scene, scores in ((Scene((CUP, DOG_RIGHT)), [1, 0]), (Scene((CUP, DOG_LEFT)), [0, 1])):
        assert judge("position", scene, picture, ImageOps.mirror(picture)) == scores


# Models of the real classes


@pytest.mark.parametrize("kind", ["mask2former", "maskformer"])
def test_segments_are_the_models_own_with_boxes_around_their_masks(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    segmenter = load_detector(save_segmenter(tmp_path, kind), threshold=0.0)
    assert type(segmenter) is Segmenter and segmenter.labels == set(NAMES.values())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    (found,) = segmenter.detect([picture])
    with torch.no_grad():
        output = segmenter.model(**segmenter.image_processor(images=[picture], return_tensors="pt"))
    masks = output.masks_queries_logits
    masks = F.interpolate(masks, size=(384, 384), mode="bilinear") if kind == "mask2former" else masks
    expected = []
    for chances, logits in zip(output.class_queries_logits[0].softmax(-1), masks[0], strict=True):
        inside = F.interpolate((logits > 0).float()[None, None], size=(20, 40), mode="nearest")[0, 0] > 0
        if inside.any():
            ys, xs = np.nonzero(inside.numpy())
            box = (xs.min() / 40, ys.min() / 40, (xs.max() + 1) / 40, (ys.max() + 1) / 40)
            sureness = logits[logits > 0].sigmoid().mean()
            expected += [(float(chance * sureness), NAMES[i], box, inside) for i, chance in enumerate(chances[:-1])]
    assert 0 < len(found) <= 6 and [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert any(
            (one.label, one.score, one.box) == (label, pytest.approx(score, abs=1e-5), pytest.approx(box))
            and np.array_equal(np.asarray(one.mask), inside.numpy())
            for score, label, box, inside in expected
        )


def test_nothing_is_found_above_the_surest_object(tmp_path: Path) -> None:
    segmenter = load_detector(save_segmenter(tmp_path), threshold=0.99)
    assert segmenter.detect([Image.new("RGB", (1, 1)), Image.new("RGB", (1, 1))]) == [[], []]


def test_detectors_are_loaded_by_the_class_that_their_checkpoint_names(tmp_path: Path) -> None:
    assert type(load_detector(save_detector(tmp_path / "yolos"), 0.3)) is Detector
    with pytest.raises(ValueError, match="clip holds a CLIPModel; GenEval needs a Mask2FormerForUniversalSegm"):
        load_detector(save_clip(tmp_path / "clip"), 0.3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no config.json: it is no object detector"):
        load_detector(tmp_path / "empty", 0.3)


def test_colours_are_the_nearest_mean_of_three_texts(tmp_path: Path) -> None:
    geneval = bench(("colors", Scene((RED_CUP,))), clip=ClipEncoder(save_clip(tmp_path)))
    model, tokenizer = geneval.clip.model.double(), geneval.clip.tokenizer
    texts = []
    for color in COLORS:
        words = (f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object")
        with torch.no_grad():
            features = [model.get_text_features(**tokenizer(w, return_tensors="pt")).pooler_output[0] for w in words]
        texts.append(sum(f / f.norm() for f in features))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8))
    objects = [see("cup", left / 64, 0, (left + 16) / 64, 0.25) for left in range(0, 49, 8)]
    expected = []
    for left in range(0, 49, 8):
        crop = picture.crop((left, 0, left + 16, 16))
        pixels = geneval.clip.image_processor(crop, return_tensors="pt")["pixel_values"].double()
        with torch.no_grad():
            seen = model.get_image_features(pixels).pooler_output[0]
        cosines = [float(seen @ text / seen.norm() / text.norm()) for text in texts]
        expected.append(max(range(len(COLORS)), key=lambda i: round(cosines[i], 9)))
    model.float()
    assert geneval.colors(picture, objects, "cup") == [COLORS[i] for i in expected]
    directions = F.normalize(torch.stack(texts), dim=-1).float()
    torch.testing.assert_close(geneval.color_features["cup"], directions, atol=1e-5, rtol=1e-4)


def test_what_differs_from_the_benchmark_is_told(tmp_path: Path) -> None:
    scenes = [(task, Scene((Clause("cat", 1),))) for task in ("single_object", "two_object", "counting", "colors")]
    scenes += [("position", Scene((Clause("giraffe", 1),))), ("color_attr", Scene((Clause("person", 1),)))]
    (unknown,) = bench(*scenes, detector=load_detector(save_segmenter(tmp_path / "a"), 0.3)).notes()
    assert unknown.endswith("1 objects of the prompts, which it never finds: giraffe.")
    thresholds, boxes, _ = bench(*scenes, detector=load_detector(save_detector(tmp_path / "b"), 0.3)).notes()
    assert "detector of type yolos" in thresholds and "boxes without masks" in boxes


def test_measurements_are_named_by_all_that_decides_them() -> None:
    scene, detector, clip = Scene((RED_CUP,)), PaintDetector(), PaintClip("")
    names = {
        bench(("colors", scene), detector=detector, clip=clip).name,
        bench(("color_attr", scene), detector=detector, clip=clip).name,
        bench(("colors", Scene((GREEN_CUP,))), detector=detector, clip=clip).name,
        bench(("colors", scene), detector=detector, clip=clip, threshold=0.4).name,
        bench(("colors", scene), detector=detector, clip=clip, counting_threshold=0.8).name,
        bench(("colors", Scene((CUP,))), detector=detector).name,
    }
    assert len(names) == 6 and all(name.startswith("geneval-detector-paint-") for name in names)


@pytest.mark.parametrize(
    "task, scene, message",
    [
        ("colors", None, "'0' has nothing to look for"),
        ("color", Scene((CUP,)), "group 'color', not of single_object, two_object"),
        ("colors", Scene((RED_CUP,)), "task colors needs `metrics.geneval.clip`"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused(task, scene, message) -> None:
    with pytest.raises(ValueError, match=message):
        bench((task, scene), detector=PaintDetector())


# Prompts


def write_prompts(path: Path, *entries: dict) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_prompts_are_read_as_the_benchmark_writes_them(tmp_path: Path) -> None:
    cup, dog = {"class": "cup", "count": 1}, {"class": "dog", "count": 1}
    right = {**dog, "position": ["right of", 0]}
    two = [{**cup, "count": 2}]
    entries = [
        {"tag": "single_object", "include": [cup], "prompt": "a photo of a cup"},
        {"tag": "single_object", "include": [dog], "prompt": "a photo of a dog"},
        {"tag": "counting", "include": two, "exclude": [{**cup, "count": 3}], "prompt": "a photo of two cups"},
        {"tag": "position", "include": [cup, right], "prompt": "a photo of a dog right of a cup"},
        {"tag": "color_attr", "include": [{**cup, "color": "red"}, dog], "prompt": "a photo of a red cup and a dog"},
    ]
    file = write_prompts(tmp_path / "prompts.jsonl", *entries)
    prompts = GenEvalPrompts(file).load()
    assert [p.id for p in prompts.prompts] == ["00000", "00001", "00002", "00003", "00004"]
    assert prompts.groups() == {"single_object": [0, 1], "counting": [2], "position": [3], "color_attr": [4]}
    _, _, counting, position, color = (p.scene for p in prompts.prompts)
    assert counting == Scene((CUPS,), (Clause("cup", 3),))
    assert (position, color) == (Scene((CUP, DOG_RIGHT)), Scene((RED_CUP, DOG)))
    few = GenEvalPrompts(file, tasks=["position", "single_object"], limit=1).load()
    assert [p.group for p in few.prompts] == ["position", "single_object"] and few.prompts[0].id == "00003"


GOOD = {"class": "cup", "count": 1}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tag": "colours"}, "line 1: `tag` must be one of single_object.*got 'colours'"),
        ({"includes": []}, "unknown key `includes`"),
        ({"include": []}, "name nothing to look for"),
        ({"include": GOOD}, "`include` must be a list of clauses"),
        ({"include": ["cup"]}, "a clause is an object of class, count, color, position, got 'cup'"),
        ({"include": [{**GOOD, "colour": "red"}]}, "a clause is an object of class"),
        ({"include": [{"count": 1}]}, "`class` must name an object, got None"),
        ({"include": [{"class": "cup"}]}, "`count` must be a whole number of 1 or more, got None"),
        ({"include": [{**GOOD, "count": 0}]}, "1 or more, got 0"),
        ({"include": [{**GOOD, "count": True}]}, "1 or more, got True"),
        ({"include": [{**GOOD, "color": "gray"}]}, "`color` must be one of red.*got 'gray'"),
        ({"include": [GOOD, {**GOOD, "position": "above"}]}, "`position` is one of left of"),
        ({"include": [GOOD, {**GOOD, "position": ["under", 0]}]}, "`position` is one of left of"),
        ({"include": [GOOD, {**GOOD, "position": ["above", 1]}]}, "clause 1 must name an earlier one, got 1"),
        ({"include": [GOOD, {**GOOD, "position": ["above", -1]}]}, "earlier one, got -1"),
        ({"exclude": [{**GOOD, "color": "red"}]}, "`exclude`: a clause is an object of class, count, got"),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    entry = {"tag": "single_object", "include": [GOOD], "prompt": "a cup", **change}
    with pytest.raises(ValueError, match=message):
        GenEvalPrompts(write_prompts(tmp_path / "prompts.jsonl", entry)).load()


def test_missing_files_and_tasks_are_named(tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", {"tag": "single_object", "include": [GOOD], "prompt": "a cup"})
    for prompts, message in (
        (GenEvalPrompts("none.jsonl"), "none.jsonl does not exist"),
        (GenEvalPrompts(file, tasks=["colour"]), "`prompts.tasks` are single_object.*got 'colour'"),
        (GenEvalPrompts(file, tasks=["colors"]), "no prompts of the task colors"),
        (GenEvalPrompts(write_prompts(tmp_path / "empty.jsonl")), "there are no prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts.load()


# Intervals


def test_the_interval_of_a_mean_of_groups_resamples_each_group() -> None:
    rng = np.random.default_rng(3)
    groups = [rng.normal(10, 2, 12), rng.normal(50, 5, 30)]
    means = [np.mean([rng.choice(group, len(group)).mean() for group in groups]) for _ in range(4000)]
    found = grouped_mean_interval([torch.tensor(group) for group in groups], 0.9, 4000)
    assert found == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=0.06)
    one = torch.tensor(groups[0])
    assert grouped_mean_interval([one]) == mean_interval(one)
    assert grouped_mean_interval([one, one[:1]]) is None
