"""Runs that are killed, terminated or out of disk, against one that is left alone."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from mars_hf.training.recipe import Recipe
from mars_hf.training.run import train
from mars_hf.training.text import last_checkpoint

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


def start(recipe, out):
    code = "import sys, torch; torch.set_num_threads(1); from mars_hf.cli import main; sys.argv[0] = 'mars-hf'; main()"
    command = [sys.executable, "-c", code, "train", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process, out, count):
    """Wait until a run has `count` checkpoints more than it had, or has ended."""
    wanted = count + (int(last_checkpoint(out).rsplit("-", 1)[1]) if last_checkpoint(out) else 0)
    while process.poll() is None:
        found = last_checkpoint(out)
        if found and int(found.rsplit("-", 1)[1]) >= wanted:
            return
        time.sleep(0.005)


def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(recipe, tmp_path, one_thread):
    whole = train(Recipe.load(recipe), tmp_path / "whole")
    out, rng = tmp_path / "killed", random.Random(0)
    for _ in range(5):
        process = start(recipe, out)
        wait_for_steps(process, out, 3)
        time.sleep(rng.random() * 0.5)  # some of these fall into the writing of a checkpoint, which takes most time
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "final").exists()
    process = start(recipe, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out / "final", whole))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_a_run_that_is_terminated_writes_a_checkpoint_and_ends(recipe, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out)
    wait_for_steps(process, out, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert last_checkpoint(out) and not (out / "final").exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(recipe, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "run"
    values = yaml.safe_load(recipe.read_text())
    values["training"]["max_steps"] = 6
    recipe.write_text(yaml.safe_dump(values))
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
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out / "final", alone))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    shutil.rmtree(out)
