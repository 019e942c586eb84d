"""Runs that are killed, terminated or out of disk, against one that is left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from mars_hf.training.recipe import Recipe
from mars_hf.training.run import train
from mars_hf.training.text import last_checkpoint

RUN = Path(__file__).parent / "faulty_run.py"
SCRIPT = Path(__file__).parents[1] / "examples" / "accelerate" / "train.slurm"
pytestmark = pytest.mark.integration


@pytest.fixture
def recipe(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_processor.save_pretrained(tmp_path / "base")
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 40, (16, 16), generator=rng).tolist()
    pairs = {"image_codes": codes, "height": [16] * 16, "width": [16] * 16, "caption_en": list("abcdefghijklmnop")}
    Dataset.from_dict(pairs).to_parquet(tmp_path / "pairs.parquet")
    source = {"source": str(tmp_path / "pairs.parquet"), "code_noise": 0.5}
    training = {"max_steps": 120, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 10}
    values = {
        "stage": "alignment",
        "model": {"base": str(tmp_path / "base")},
        "data": [{**source, "task": "text-to-image"}, {**source, "task": "captioning"}],
        "optimizer": {"name": "muon", "learning_rate": 1e-3, "muon_learning_rate": 1e-3},
        "training": {**training, "disable_tqdm": True},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def one_thread():
    """Sums are the same to the bit in every process; other tests get their threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(recipe, out, dies="not"):
    command = [sys.executable, "-u", str(RUN), dies, "train", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def changed(recipe, **training):
    """Change arguments of the Trainer in a recipe."""
    values = yaml.safe_load(recipe.read_text())
    values["training"].update(training)
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def assert_the_same_weights(folder, other):
    mine, theirs = (load_file(one / "model.safetensors") for one in (folder, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def step_of(checkpoint):
    return int(checkpoint.rsplit("-", 1)[1])


def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(recipe, tmp_path, one_thread):
    whole = train(Recipe.load(recipe), tmp_path / "whole")
    out, rng = tmp_path / "killed", random.Random(0)
    for dies, last_good in (("in-state", 3), ("in-optimizer", 6)):  # each dies in its second checkpoint
        process = start(recipe, out, dies)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors[-3000:]
        assert step_of(last_checkpoint(out)) == last_good and (out / f"checkpoint-{last_good + 3}").exists()
    assert not (out / "checkpoint-9" / "trainer_state.json").exists()
    for _ in range(5):  # of 120 steps, each start makes 10 before it is killed
        process = start(recipe, out)
        process.stdout.readline()  # it trains: its first losses are told
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "final").exists()
    process = start(recipe, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert_the_same_weights(out / "final", whole)


def test_a_run_that_is_terminated_writes_a_checkpoint_and_goes_on_from_there(recipe, tmp_path, one_thread):
    recipe, out = changed(recipe, save_steps=1000, logging_steps=1), tmp_path / "run"
    process = start(recipe, out)
    process.stdout.readline()  # the first step is told
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "the same line goes on" in errors, errors[-3000:]
    assert 1 <= step_of(last_checkpoint(out)) < 120 and not (out / "final").exists()
    assert_the_same_weights(train(Recipe.load(recipe), out), train(Recipe.load(recipe), tmp_path / "whole"))


def test_a_full_disk_leaves_the_last_good_checkpoint(recipe, tmp_path, monkeypatch):
    out, recipe = tmp_path / "run", changed(recipe, max_steps=6)
    torch_save = torch.save
    written = []

    def full(value, file, *args, **kwargs):
        written.append(file)
        if any("checkpoint-6" in str(name) for name in written):
            raise OSError(28, "No space left on device")
        return torch_save(value, file, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            train(Recipe.load(recipe), out)
    assert last_checkpoint(out).endswith("checkpoint-3")
    train(Recipe.load(recipe), out)
    alone = train(Recipe.load(recipe), tmp_path / "alone")
    assert_the_same_weights(out / "final", alone)


@pytest.fixture
def slurm_calls(tmp_path, monkeypatch):
    """Put programs of Slurm in the path that note how they are called; a run is what `SRUN` says."""
    programs = tmp_path / "bin"
    programs.mkdir()
    bodies = {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" != show ] || echo node-0',
        "scancel": 'echo "scancel $*" >> "$CALLS"',
        "srun": 'echo "srun $*" >> "$CALLS"; eval "$SRUN"',
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return tmp_path / "calls"


TOLD = 'until grep -q "scancel --signal=TERM 7" "$CALLS"; do sleep 0.05; done'
RUNS = {
    "ends": "exit 0",
    "fails": "exit 1",
    "is stopped": f"{TOLD}; exit 1",
    "is stopped at its end": f'{TOLD}; touch "$OUT/final/processor_config.json"',
}


@pytest.mark.parametrize("run", RUNS)
def test_the_slurm_job_requeues_itself_if_and_only_if_its_run_was_stopped_before_the_end(
    slurm_calls, tmp_path, monkeypatch, run
):
    out = tmp_path / "run"
    (out / "final").mkdir(parents=True)
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setenv("SRUN", RUNS[run])
    job = subprocess.Popen(["bash", str(SCRIPT), "paper/stage1", str(out)])
    if "stopped" in run:
        while not (slurm_calls.exists() and "srun" in slurm_calls.read_text()):
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
    status, calls = job.wait(timeout=120), slurm_calls.read_text()
    assert f"launch paper/stage1 --out {out}" in calls
    assert ("scontrol requeue 7" in calls) == (run == "is stopped")
    assert (status == 0) == (run != "fails")
