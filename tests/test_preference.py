"""Preference studies: pairs are blind, and votes are counted for the right folder."""

import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mars_hf.cli import app
from mars_hf.evaluation.preference import tally, write_study

RED, GREEN = (255, 0, 0), (0, 128, 0)


def write_pictures(folder: Path, colour: tuple[int, int, int], count: int = 12) -> Path:
    shard = folder / "00000-of-00001"
    shard.mkdir(parents=True)
    rows = []
    for number in range(count):
        Image.new("RGB", (4, 4), colour).save(shard / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "id": str(number), "prompt": f"<b>{number}</b>", "sample": 0})
    (shard / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    first, second = write_pictures(tmp_path / "first", RED), write_pictures(tmp_path / "second", GREEN)
    assert write_study(first, second, tmp_path / "study", num_pairs=10) == 10
    return tmp_path / "study"


def shown(study: Path) -> list[list[tuple[int, int, int]]]:
    """Give the colours of each pair, left and right, as the page shows them."""
    sections = re.findall(r"<section>.*?</section>", (study / "study.html").read_text(), re.DOTALL)
    pictures = [re.findall(r"base64,([^\"]+)", section) for section in sections]
    return [[Image.open(BytesIO(b64decode(one))).getpixel((0, 0)) for one in pair] for pair in pictures]


def save_votes(study: Path, name: str, votes: dict[str, str]) -> Path:
    content = {"study": json.loads((study / "key.json").read_text())["study"], "votes": votes}
    (study / name).write_text(json.dumps(content))
    return study / name


def test_votes_for_a_folder_count_for_it_on_whichever_side_it_stands(study: Path) -> None:
    pairs = shown(study)
    sides = ["left" if pair[0] == RED else "right" for pair in pairs]
    assert {tuple(pair) for pair in pairs} == {(RED, GREEN), (GREEN, RED)}  # both sides occur
    votes = {f"{n}-quality": side for n, side in enumerate(sides)} | {f"{n}-alignment": "equal" for n in range(9)}
    votes["9-alignment"] = "left" if sides[9] == "right" else "right"
    quality, alignment = tally(study / "key.json", [save_votes(study, "votes.json", votes)])
    assert (quality.first, quality.second, quality.equal, quality.share) == (10, 0, 0, 1.0)
    assert (alignment.first, alignment.second, alignment.equal) == (0, 1, 9)
    # Wilson's interval of ten of ten: 1 / (1 + z^2 / n) below, 1 above.
    assert quality.interval == pytest.approx((1 / (1 + 1.959964**2 / 10), 1.0), abs=1e-6)


def test_a_participant_who_saves_again_counts_once(study: Path) -> None:
    sides = ["left" if pair[0] == RED else "right" for pair in shown(study)]
    of_one = [{"0-quality": "equal"}, {"0-quality": sides[0]}]
    files = []
    for number, votes in enumerate(of_one):
        files.append(save_votes(study, f"votes-{number}.json", votes))
        content = {**json.loads(files[-1].read_text()), "voter": "a1", "saved": 10 - number}
        files[-1].write_text(json.dumps(content))
    other = save_votes(study, "votes-2.json", {"0-quality": sides[0]})
    quality, _ = tally(study / "key.json", [*files, other, other])
    assert (quality.first, quality.equal) == (1, 1)  # the first file was saved last, and one was named twice
    assert "voter" in (study / "study.html").read_text()


def test_the_page_tells_nothing_of_whose_a_picture_is_and_runs_no_prompt(study: Path) -> None:
    page = (study / "study.html").read_text()
    assert "first" not in page and "second" not in page and "key" not in page
    assert "<b>" not in page and "&lt;b&gt;" in page


def test_what_is_no_vote_of_the_study_is_refused(study: Path, tmp_path: Path) -> None:
    for votes in ({"99-quality": "left"}, {"0-quality": "up"}, {"x": "left"}):
        with pytest.raises(ValueError, match="something that is no vote"):
            tally(study / "key.json", [save_votes(study, "bad.json", votes)])
    (study / "other.json").write_text('{"study": "other", "votes": {}}')
    with pytest.raises(ValueError, match="no votes of the study"):
        tally(study / "key.json", [study / "other.json"])
    with pytest.raises(ValueError, match="no files of votes"):
        tally(study / "key.json", [])
    with pytest.raises(ValueError, match="holds a study already"):
        write_study(tmp_path / "first", tmp_path / "second", study)
    with pytest.raises(ValueError, match="holds no pictures"):
        write_study(tmp_path / "first", tmp_path / "none", tmp_path / "new")


def test_a_study_is_made_and_counted_from_the_command_line(study: Path, tmp_path: Path) -> None:
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    made = CliRunner().invoke(app, ["study", "make", *folders, "--out", str(tmp_path / "new"), "--pairs", "3"])
    assert made.exit_code == 0 and "3 pairs" in made.output
    votes = save_votes(tmp_path / "new", "votes.json", {"0-quality": "left", "1-quality": "equal"})
    counted = CliRunner().invoke(app, ["study", "tally", str(tmp_path / "new"), str(votes)])
    assert counted.exit_code == 0 and "quality" in counted.output and "1 equal" in counted.output
