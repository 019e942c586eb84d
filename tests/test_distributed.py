"""Runs on two ranks against the same run on one: unequal lengths, other tasks, a rank without any visual token."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mars_hf import MarsForConditionalGeneration

RANK = Path(__file__).parent / "distributed_rank.py"
pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "start")
    tiny_processor.save_pretrained(tmp_path / "start")
    return tmp_path


def run(folder, spread):
    launch = (
        [] if spread.endswith("alone") else ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    )
    command = [sys.executable, *launch, str(RANK), str(folder), spread]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{spread}.json").read_text())


def assert_the_same_run(folder, alone, spread, parameters):
    spread_out = run(folder, spread)
    assert spread_out["processes"] == 2 and parameters in spread_out["parameters"]
    gaps = [abs(a - b) for a, b in zip(alone["losses"], spread_out["losses"], strict=True)]
    assert len(gaps) == 30 and max(gaps) < 1e-5
    start = "packs-alone" if spread.startswith("packs-") else "alone"
    one, two = (
        MarsForConditionalGeneration.from_pretrained(folder / name / "checkpoint-30") for name in (start, spread)
    )
    for name, parameter in two.named_parameters():
        assert torch.allclose(parameter, one.get_parameter(name), atol=1e-4), name


def test_two_ranks_train_as_one_replicated_and_sharded(folder):
    alone = run(folder, "alone")
    assert_the_same_run(folder, alone, "ddp", "Parameter")
    assert_the_same_run(folder, alone, "fsdp", "DTensor")


def test_two_ranks_read_packs_of_a_stream_as_one_does(folder):
    assert_the_same_run(folder, run(folder, "packs-alone"), "packs-ddp", "Parameter")


def test_two_ranks_train_as_one_under_zero3(folder, monkeypatch):
    pytest.importorskip(
        "deepspeed", reason="pip install wheel ninja; DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert_the_same_run(folder, run(folder, "alone"), "zero3", "Parameter")
