"""
Preference studies, as in the paper's section 4.2: which of two pictures is better, and which fits its prompt better?

[`write_study`] makes one HTML file that shows pairs blind, in random order and on random sides, and needs no server:
a participant opens it, answers, and saves a file of votes. Which side was whose stands in a file that stays at home.
[`tally`] puts both together.
"""

import base64
import hashlib
import html
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..picture_files import replace_file

QUESTIONS = {"quality": "Which picture looks better?", "alignment": "Which picture fits the text better?"}
CHOICES = ("left", "right", "equal")

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Which picture?</title>
<style>
body {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; text-align: center }}
section {{ margin: 3rem 0; border-top: 1px solid #ccc }}
.pair img {{ width: 45%; image-rendering: auto; margin: 1% }}
fieldset {{ border: 0 }} label {{ margin: 0 1rem }}
</style>
<h1>Which picture?</h1>
<p>For each pair, answer both questions, then save your votes at the end and send the file back.</p>
<form id="votes" data-study="{study}">
{pairs}
<button type="submit">Save my votes</button>
</form>
<script>
const voter = Array.from(crypto.getRandomValues(new Uint8Array(8)), byte => byte.toString(16)).join("");
document.getElementById("votes").addEventListener("submit", event => {{
  event.preventDefault();
  const form = event.target, votes = Object.fromEntries(new FormData(form));
  const content = JSON.stringify({{study: form.dataset.study, voter, saved: Date.now(), votes}});
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], {{type: "application/json"}}));
  link.download = "votes-" + Date.now() + ".json";
  link.click();
}});
</script></html>
"""


@dataclass(frozen=True)
class Preference:
    """
    What a study found for one question.

    Args:
        question (`str`): `quality` or `alignment`.
        share (`float`): Of the votes with a preference, those for the first folder; NaN if there are none.
        interval (`tuple[float, float]`): Its Wilson interval at 95 %, for votes that are independent.
        first (`int`): Votes for the first folder.
        second (`int`): Votes for the second folder.
        equal (`int`): Votes without a preference.
    """

    question: str
    share: float
    interval: tuple[float, float]
    first: int
    second: int
    equal: int


def write_study(first: Path, second: Path, out: Path, num_pairs: int = 100, seed: int = 0) -> int:
    """
    Make a study of two folders of pictures that an evaluation drew.

    Args:
        first (`Path`): Such a folder, e.g. `runs/evaluation/pictures/guidance-4`.
        second (`Path`): Another one, of the same prompts.
        out (`Path`): Folder to write `study.html` (to give away) and `key.json` (to keep) to.
        num_pairs (`int`, defaults to 100): Prompts, chosen at random; the paper took 100.
        seed (`int`, defaults to 0): Of the choice, the order and the sides.

    Returns:
        `int`: Number of pairs.

    Raises:
        ValueError: If a folder holds no pictures, the two share no prompt, or `out` holds a study already.
    """
    if (out / "key.json").exists():
        raise ValueError(f"{out} holds a study already, whose key must not be lost. Choose another folder.")
    pictures = [_first_pictures(folder) for folder in (first, second)]
    shared = sorted(pictures[0].keys() & pictures[1].keys())
    if not shared:
        raise ValueError(f"{first} and {second} share no prompt.")
    rng = random.Random(seed)
    chosen = rng.sample(shared, min(num_pairs, len(shared)))
    swapped = [rng.random() < 0.5 for _ in chosen]
    sections = []
    for number, (prompt, swap) in enumerate(zip(chosen, swapped, strict=True)):
        sections.append(_section(number, prompt[1], [pictures[swap][prompt], pictures[not swap][prompt]]))
    study = hashlib.sha256("".join(sections).encode()).hexdigest()[:16]
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "study.html", _PAGE.format(study=study, pairs="\n".join(sections)).encode())
    key = {"study": study, "first": str(first), "second": str(second), "first_is_right": swapped}
    key["prompts"] = [list(prompt) for prompt in chosen]
    replace_file(out / "key.json", json.dumps(key, ensure_ascii=False).encode())
    return len(chosen)


def _first_pictures(folder: Path) -> dict[tuple[str, str], Path]:
    """Find the first picture of each prompt, by id and text."""
    rows = [
        (manifest.parent, json.loads(line))
        for manifest in sorted(Path(folder).glob("*/metadata.jsonl"))
        for line in manifest.read_text(encoding="utf-8").split("\n")  # and at no other line end of Unicode
        if line
    ]
    if not rows:
        raise ValueError(f"{folder} holds no pictures of an evaluation.")
    return {(row["id"], row["prompt"]): shard / row["file_name"] for shard, row in rows if row["sample"] == 0}


def _section(number: int, prompt: str, sides: Sequence[Path]) -> str:
    """Write one pair; the pictures are in the page, so that no file name tells whose they are."""
    images = "".join(
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(side.read_bytes()).decode()}">' for side in sides
    )
    questions = "".join(
        f"<fieldset><legend>{question}</legend>"
        + "".join(
            f'<label><input type="radio" required name="{number}-{name}" value="{choice}">{choice}</label>'
            for choice in CHOICES
        )
        + "</fieldset>"
        for name, question in QUESTIONS.items()
    )
    return f'<section><h2>{html.escape(prompt)}</h2><div class="pair">{images}</div>{questions}</section>'


def _last_of_each(votes: Sequence[Path], study: str) -> list[tuple[Path, dict[str, Any]]]:
    """Read files of votes; of a participant's several the last."""
    last: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in votes:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or saved.get("study") != study:
            raise ValueError(f"{path} holds no votes of the study {study}.")
        voter = str(saved.get("voter") or Path(path).resolve())
        if voter not in last or saved.get("saved", 0) >= last[voter][1].get("saved", 0):
            last[voter] = (path, saved)
    return list(last.values())


def tally(key: Path, votes: Sequence[Path]) -> list[Preference]:
    """
    Count the votes of a study, of each participant those that were saved last.

    Args:
        key (`Path`): `key.json` of the study.
        votes (`Sequence[Path]`): Files that participants saved; one who saved again is known by the page's own number.

    Raises:
        ValueError: If there are no votes, a file belongs to another study, or a vote is none.
    """
    from scipy.stats import binomtest

    content = json.loads(Path(key).read_text(encoding="utf-8"))
    sides = content["first_is_right"]
    counts = {name: {"first": 0, "second": 0, "equal": 0} for name in QUESTIONS}
    if not votes:
        raise ValueError("There are no files of votes to count.")
    for path, saved in _last_of_each(votes, content["study"]):
        for name, choice in saved["votes"].items():
            number, _, question = name.partition("-")
            if question not in QUESTIONS or choice not in CHOICES or not number.isdigit() or int(number) >= len(sides):
                raise ValueError(f"{path} holds something that is no vote: {name} = {choice}.")
            first_side = "right" if sides[int(number)] else "left"
            winner = "equal" if choice == "equal" else "first" if choice == first_side else "second"
            counts[question][winner] += 1
    found = []
    for question, count in counts.items():
        decided = count["first"] + count["second"]
        interval = binomtest(count["first"], decided).proportion_ci(method="wilson") if decided else (0.0, 1.0)
        share = count["first"] / decided if decided else float("nan")
        found.append(Preference(question, share, (float(interval[0]), float(interval[1])), **count))
    return found
