"""The scripts of `benchmarks/` as their readers run them, on models small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import write_data

ROOT = Path(__file__).parent.parent
TINY = ("--layers", "1", "--scale", "8", "--codes", "16", "--batch", "1", "--dtype", "fp32", "--repeats", "2")
SMALL = ("--layers", "1", "--scale", "16", "--codes", "16", "--prompt", "8", "--batch", "2", "--repeats", "2")
pytestmark = pytest.mark.integration


def generation(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / "generation.py", *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_every_system_draws_and_stands_in_the_table_of_the_generation_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "generation.json"
    arguments = ("--parts", "drawing", "bookkeeping", "prefill", "--json", str(file))
    done = generation(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    titles = ["(the floor)", "`Qwen2ForCausalLM`", "`Emu3ForConditionalGeneration`", "`JanusForConditionalGeneration`"]
    titles += [f"ours, K = {k}{kind} |" for k in (1, 4, 16) for kind in ("", ", compiled")]
    for title in titles:
        assert title in done.stdout
    data = json.loads(file.read_text())
    cell = data["drawing"]["fp32 16 1"]
    assert len(cell) == len(titles)
    for times in cell.values():
        assert len(times["seconds"]) == 2 and min(times["seconds"]) > 0
        calls = times["seconds"] if times["prefill"] else []  # a compiled call is not taken apart
        assert all(prefill < call for prefill, call in zip(times["prefill"], calls, strict=True))
    assert [len(data[part]) for part in ("bookkeeping", "prefill")] == [6, 2]
    assert all(0 < share < 1 for result in data["bookkeeping"].values() for share in result["share"])

    again = generation(*arguments, "--resume")
    assert again.stdout == done.stdout  # nothing was measured anew
    other = generation(*arguments, "--resume", "--systems", "floor")
    assert other.returncode != 0 and "cannot be resumed" in other.stderr
    assert json.loads(file.read_text()) == data


def test_the_memory_of_a_system_is_measured_beside_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "generation.json"
    done = generation("--parts", "memory", "--systems", "floor", "ours-1", "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads(file.read_text())["memory"]
    hidden, inner, text, codes = 112, 608, 18_992, 1024  # an eighth of Qwen2.5-0.5B's
    kv = hidden // 7
    attention = hidden * (hidden + 1) + 2 * kv * (hidden + 1)
    feed_forward = 3 * hidden * inner
    shared = attention + hidden * hidden + feed_forward + 3 * hidden
    assert memory["floor fp32 16 1"]["weights"] == 4 * (shared + (text + codes + codes) * hidden)
    visual = attention + feed_forward + 2 * (codes + 8) * hidden  # six specials and padding
    assert memory["ours-1 fp32 16 1"]["weights"] == 4 * (shared + text * hidden + visual)
    assert all(result["added"] < result["before"] for result in memory.values())


def training(*arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        ROOT / "benchmarks" / "training.py",
        *SMALL,
        "--loader-batch",
        "4",
        "--rows",
        "64",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_a_step_of_training_is_timed_and_its_memory_measured_beside_dense_fine_tuning(tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    done = training("--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(file.read_text())
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in data["time"]["time"].values())
    memory = data["memory"]
    hidden, inner, text, codes = 56, 304, 9496, 512  # a sixteenth of Qwen2.5-0.5B's
    kv = hidden // 7
    attention = hidden * (hidden + 1) + 2 * kv * (hidden + 1)
    feed_forward, shared = 3 * hidden * inner, hidden * hidden + 3 * hidden
    dense = attention + feed_forward + shared + (text + codes + 8) * hidden  # six specials and padding
    visual = attention + feed_forward + 2 * (codes + 8) * hidden
    frozen = attention + feed_forward + shared + text * hidden
    assert memory["dense"]["weights"] == 4 * dense and memory["grammar"]["weights"] == 4 * visual + 2 * frozen
    for name, trained in (("dense", dense), ("grammar", visual), ("joint", visual)):
        assert memory[name]["gradients"] == 4 * trained
        assert 8 * trained <= memory[name]["states"] < 8.1 * trained
        assert memory[name]["peak"] > 0
    assert len(data["loader"]["mars-emoji"]["wait"]) == 2
    assert all(0 <= found["waste"] < 0.5 for found in data["packing"]["packing"].values())
    assert all(found["rows"] == 64 for found in data["packing"]["packing"].values())
    for bound in ("at most 0.80x of the dense one", "at most 0.90x of the dense one", "above 95 %", "under 2 %"):
        assert bound in done.stdout

    again = training("--json", str(file), "--resume")
    assert again.stdout == done.stdout  # nothing was measured anew
    other = training("--json", str(file), "--resume", "--batch", "3")
    assert other.returncode != 0 and "cannot be resumed" in other.stderr


def test_lengths_of_a_file_are_packed(tmp_path: Path) -> None:
    lengths, file = tmp_path / "lengths", tmp_path / "training.json"
    lengths.write_text("60\n40\n50\n30\n20\n")
    done = training("--parts", "packing", "--lengths", str(lengths), "--pack", "100", "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())["packing"]["packing"]["lengths"]
    assert (found["packs"], found["waste"]) == (2, 0.0)  # 60 and 40; 50, 30 and 20


def test_files_planted_among_pictures_are_caught_by_the_command_and_nothing_else_is(tmp_path: Path) -> None:
    write_data(tmp_path / "emoji", 64)
    command = [sys.executable, ROOT / "benchmarks" / "data.py", "--folder", "work", "--plant", "emoji"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HOME": "hub"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| exact_duplicate | 2 | 2 |" in done.stdout and "| too_many_pixels | 1 | 1 |" in done.stdout
    assert "of which 1 were to stay" in done.stdout and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codes", "9"), "--codes must be 16 or more"),
        (("--resume",), "--resume needs --json"),
        (("--scale", "3"), "--scale 3 leaves no even width"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_model_is_made(arguments: tuple, message: str) -> None:
    done = generation(*arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "numbers must be 1 or more"),
        (("--resume",), "--resume needs --json"),
        (("--lengths", "nowhere"), "there is no such file"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_model_is_made(arguments: tuple, message: str) -> None:
    done = training(*arguments)
    assert done.returncode == 2 and message in done.stderr
