"""T2I-CompBench: hand-worked rows, a planted answerer of questions, and random models of the real classes."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluators import ColourAnswerer, save_blip, save_detector
from PIL import Image

from mars_hf.evaluation.compbench import (
    CompBench,
    Detection,
    Detector,
    QuestionAnswerer,
    place_score,
    spatial_score,
)
from mars_hf.evaluation.parts import PromptParts, load_parser, parse_prompt
from mars_hf.evaluation.pictures import Task
from mars_hf.evaluation.prompts import CompBenchPrompts, Prompt, PromptSet

BOTH = ("attribute", "spatial", "non_spatial")


def see(label: str, left: float, top: float, right: float, bottom: float, score: float = 1.0) -> Detection:
    return Detection(label, score, (left, top, right, bottom))


def halves(left: str, right: str) -> Image.Image:
    picture = Image.new("RGB", (16, 16), left)
    picture.paste(Image.new("RGB", (8, 16), right), (8, 0))
    return picture


@dataclass
class Token:
    text: str
    pos_: str


class Doc(list):
    """What spaCy finds in a sentence, by a small dictionary: a noun phrase is an article, adjectives and a noun."""

    TAGS = {"a": "DET", "the": "DET", "red": "ADJ", "green": "ADJ", "soft": "ADJ", "cup": "NOUN", "apple": "NOUN"}
    TAGS |= {"pillow": "NOUN", "boy": "NOUN", "rug": "NOUN", "left": "NOUN"}

    def __init__(self, text: str):
        super().__init__(Token(word, self.TAGS.get(word, "X")) for word in text.split())
        self.text = text

    @property
    def noun_chunks(self) -> list[Token]:
        chunks, words = [], []
        for token in self:
            words = [*words, token.text] if token.pos_ in ("DET", "ADJ", "NOUN") else []
            if token.pos_ == "NOUN":
                chunks.append(Token(" ".join(words), "NP"))
                words = []
        return chunks


LEFT, RIGHT = see("cat", 0.0, 0.4, 0.2, 0.6), see("dog", 0.7, 0.4, 0.9, 0.6)
TOP, BOTTOM = see("cat", 0.4, 0.0, 0.6, 0.2), see("dog", 0.4, 0.5, 0.6, 0.9)
OVER = see("dog", 0.1, 0.4, 0.3, 0.6)  # shares a third of its union with LEFT


@pytest.mark.parametrize(
    "place, first, second, score",
    [
        ("on the left of", LEFT, RIGHT, 1.0),
        ("on the left of", RIGHT, LEFT, 0.0),
        ("on the right of", RIGHT, LEFT, 1.0),
        ("on the right of", LEFT, RIGHT, 0.0),
        ("on the top of", TOP, BOTTOM, 1.0),
        ("on the bottom of", TOP, BOTTOM, 0.0),
        ("on the bottom of", BOTTOM, TOP, 1.0),
        ("on the left of", TOP, BOTTOM, 0.0),  # apart, but across
        ("on the left of", LEFT, OVER, 0.1 / (1 / 3)),  # overlap lessens it
        ("next to", LEFT, RIGHT, 1.0),  # level with each other
        ("near", LEFT, see("dog", 0.8, 0.8, 1.0, 1.0), (150 / 512) / 0.8),
        ("on side of", TOP, BOTTOM, 1.0),
        ("on top of", TOP, BOTTOM, 0.0),  # as in the benchmark's scripts
        (None, LEFT, RIGHT, 0.0),
    ],
)
def test_places_score_as_worked_out_by_hand(place, first, second, score) -> None:
    assert place_score(place, first, second) == pytest.approx(score)


def test_spatial_scores_take_the_surest_objects_and_drop_what_is_below_a_half() -> None:
    parts = PromptParts(objects=("cat", "boy"), place="on the left of")
    cat, boy = see("cat", 0.0, 0.4, 0.2, 0.6, 0.8), see("person", 0.7, 0.4, 0.9, 0.6, 0.6)
    wrong = see("cat", 0.8, 0.4, 1.0, 0.6, 0.4)
    assert spatial_score(parts, [cat, boy, wrong]) == pytest.approx(0.2 + 0.15 + 0.5)
    assert spatial_score(replace(parts, place="on the right of"), [cat, boy]) == 0.0  # 0.35 is below a half
    assert spatial_score(parts, [cat]) == spatial_score(parts, []) == spatial_score(PromptParts(), [cat, boy]) == 0.0


def colour_bench(prompts: list[Prompt]) -> CompBench:
    return CompBench(PromptSet("test", prompts), ColourAnswerer(), None, has_clip=True)


def test_swapping_red_and_green_flips_the_colour_score() -> None:
    parts = PromptParts(noun_phrases=("a red apple", "a green cup"))
    prompt = Prompt("0", "a red apple and a green cup", "color", parts)
    tasks = [Task(prompt, 0, sample, 0) for sample in range(3)]
    pictures = [halves("red", "lime"), halves("lime", "red"), halves("red", "red")]
    scores = colour_bench([prompt]).attribute_rows(pictures, tasks)
    third = 1 - 2 / 3  # the wrong one of red and green misses two of three channels
    assert scores.tolist() == pytest.approx([1.0, third * third, third], abs=1e-6)


def test_complex_prompts_average_what_they_are_about() -> None:
    def about(id: str, aspects: tuple[str, ...]) -> Prompt:
        return Prompt(id, f"prompt {id}", "complex", PromptParts(("a cup",), aspects=aspects))

    prompts = [about("s", ("attribute", "spatial")), about("a", ("attribute", "non_spatial")), about("b", BOTH)]
    bench = CompBench(PromptSet("test", prompts), ColourAnswerer(), object(), has_clip=True)
    values = {"attribute": 0.6, "spatial": 0.3, "non_spatial": 0.9}
    rows = {aspect: torch.full((3, 2), value) for aspect, value in values.items()}
    assert bench.total(rows)[:, 0].tolist() == pytest.approx([45, 75, 60])
    assert bench.clip_texts() == ["prompt s", "prompt a", "prompt b"]


def test_prompts_are_measured_by_what_their_group_asks_and_nothing_else() -> None:
    prompts = [
        Prompt("c", "a red cup", "color", PromptParts(("a red cup",))),
        Prompt("n", "a boy runs", "non_spatial"),
    ]
    tasks = [Task(prompt, number, 0, 0) for number, prompt in enumerate(prompts)]
    rows = colour_bench(prompts).attribute_rows([halves("red", "red")] * 2, tasks)
    assert rows[0] == 1.0 and rows[1].isnan()


@pytest.mark.parametrize(
    "prompt, message",
    [
        (Prompt("0", "a cup", "en"), "is of the group 'en'; T2I-CompBench has color"),
        (Prompt("0", "a cup", "color"), "has no `noun_phrases`"),
        (Prompt("0", "a cup", "complex", PromptParts(("a cup",))), "has no `aspects`"),
        (Prompt("0", "a cup", "spatial", PromptParts()), "needs `metrics.compbench.detector`"),
    ],
)
def test_prompts_without_their_parts_and_missing_evaluators_are_refused(prompt: Prompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        colour_bench([prompt])


def test_yes_is_as_likely_as_the_plain_forward_says_whatever_else_is_in_the_batch(tmp_path: Path) -> None:
    answerer = QuestionAnswerer(save_blip(tmp_path))
    questions = ["a red apple?", "cup?", "a green cup and a blue apple?"]
    pictures = [halves("red", "blue"), halves("lime", "white"), halves("yellow", "red")]
    found = answerer.yes(pictures, questions)
    for i, question in enumerate(questions):
        pixels = answerer.image_processor(pictures[i], return_tensors="pt")["pixel_values"]
        ids = answerer.tokenizer(question, return_tensors="pt")["input_ids"]
        written = answerer.model.generate(
            ids, pixels, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        yes, no = written.logits[0][0, answerer.tokenizer.convert_tokens_to_ids(["yes", "no"])].exp().tolist()
        assert found[i] == pytest.approx(yes / (yes + no), abs=1e-5)
    assert len(set(found.tolist())) == 3


def test_a_tokenizer_without_yes_cannot_answer(tmp_path: Path) -> None:
    folder = save_blip(tmp_path)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"yes"', '"yeah"'))
    with pytest.raises(ValueError, match="no token 'yes'"):
        QuestionAnswerer(folder)


def test_detections_are_the_models_own_with_boxes_as_shares_of_the_longer_side(tmp_path: Path) -> None:
    detector = Detector(save_detector(tmp_path), threshold=0.0)
    picture = halves("red", "blue").resize((40, 20))
    (found,) = detector.detect([picture])
    with torch.no_grad():
        output = detector.model(**detector.image_processor(images=[picture], return_tensors="pt"))
    chances = output.logits[0].softmax(-1)[:, :-1]
    expected = []
    for chance, (x, y, w, h) in zip(chances, output.pred_boxes[0].tolist(), strict=True):
        box = (x - w / 2, (y - h / 2) / 2, x + w / 2, (y + h / 2) / 2)  # half as high as wide
        expected.append((float(chance.max()), ("cat", "dog", "person")[int(chance.argmax())], box))
    expected.sort(key=lambda row: -row[0])
    assert len(found) == len(expected) == 5
    for one, (score, label, box) in zip(found, expected, strict=True):
        assert (one.label, one.score) == (label, pytest.approx(score, abs=1e-6))
        assert one.box == pytest.approx(box, abs=1e-5)


def test_objects_that_the_detector_has_no_word_for_are_told(tmp_path: Path) -> None:
    parts = PromptParts(objects=("boy", "giraffe"), place="near")
    bench = CompBench(
        PromptSet("t", [Prompt("0", "x", "spatial", parts)]), None, Detector(save_detector(tmp_path)), False
    )
    assert bench.unknown_objects() == ["giraffe"]  # a boy is a person
    tasks = [Task(bench.prompts.prompts[0], 0, 0, 0)]
    assert bench.spatial_rows([halves("red", "blue")], tasks).tolist() == [0.0]


def test_prompts_are_parsed_as_the_benchmark_does(tmp_path: Path, monkeypatch) -> None:
    files = {
        "color_val": "a red apple and a green cup\n",
        "spatial_val": "a boy on the left of a cup\n",
        "complex_val": "The soft pillow on top of the red rug.\nThe red cup next to the soft rug.\n",
        "complex_val_spatial": "The soft pillow on top of the red rug.\n",
        "complex_val_action": "",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.setattr("mars_hf.evaluation.prompts.load_parser", lambda name: Doc)
    categories = ["color", "spatial", "complex"]
    color, spatial, first, second = CompBenchPrompts(str(tmp_path), categories).load().prompts
    assert color.parts.noun_phrases == ("a red apple", "a green cup")
    # With this dictionary "left" is a noun too, but neither the first nor the last one.
    assert (spatial.parts.objects, spatial.parts.place) == (("boy", "cup"), "on the left of")
    assert first.text == "the soft pillow on top of the red rug"
    assert (first.parts.objects, first.parts.place) == (("pillow", "rug"), "on top of")
    assert first.parts.aspects == ("attribute", "spatial") and second.parts.aspects == BOTH
    assert second.parts.plain == "the cup next to the rug"
    with pytest.raises(ValueError, match="shape_val.txt does not exist"):
        CompBenchPrompts(str(tmp_path)).load()


class Phrases:
    """A parsed prompt of given noun phrases."""

    text = "the book on the left of the vase"

    def __init__(self, *phrases: str) -> None:
        self.noun_chunks = [SimpleNamespace(text=phrase) for phrase in phrases]

    def __iter__(self):
        return iter(())


def test_phrases_that_name_a_place_are_not_asked_about_and_no_more_than_eight_are() -> None:
    of_things = parse_prompt(Phrases("the book", "the left", "the vase"), "complex").noun_phrases
    assert of_things == ("the book", "the vase")
    many = [f"thing {number}" for number in range(10)]
    assert parse_prompt(Phrases(*many), "color").noun_phrases == tuple(many[:8])


def test_a_complex_prompt_with_two_places_has_no_pair_of_objects() -> None:
    text = "a cup next to a pillow near a rug"
    assert parse_prompt(Doc(text), "complex").objects == ()


def test_without_spacy_the_way_out_is_told(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(ModuleNotFoundError, match="pip install spacy"):
        load_parser("en_core_web_sm")
