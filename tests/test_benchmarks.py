"""The scripts of `benchmarks/` as their readers run them, on models small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ("--layers", "1", "--scale", "8", "--codes", "16", "--batch", "1", "--dtype", "fp32", "--repeats", "2")
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
        assert all(prefill < min(times["seconds"]) for prefill in times["prefill"])
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
