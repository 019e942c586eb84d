"""
Runs on two ranks against the same run on one: unequal lengths, other tasks, a rank without any visual token, recipes;
and a rank that is told to stop.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from safetensors.torch import load_file

from mars_hf import MarsForConditionalGeneration
from mars_hf.training.text import last_checkpoint

ACCELERATE = Path(__file__).parents[1] / "examples" / "accelerate"
RANK = Path(__file__).parent / "distributed_rank.py"
pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "start")
    tiny_processor.save_pretrained(tmp_path / "start")
    return tmp_path


def start(folder, spread):
    launch = (
        [] if spread.endswith("alone") else ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    )
    command = [sys.executable, *launch, str(RANK), str(folder), spread]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def run(folder, spread):
    done = start(folder, spread)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{spread}.json").read_text())


def assert_the_same_run(folder, alone, spread, parameters):
    spread_out = run(folder, spread)
    assert spread_out["processes"] == 2 and parameters in spread_out["parameters"]
    assert len(alone["logs"]) == 30
    for one, two in zip(alone["logs"], spread_out["logs"], strict=True):
        assert one.keys() == two.keys() and abs(one["loss"] - two["loss"]) < 1e-5
        assert abs(one["grad_norm"] - two["grad_norm"]) < 1e-3 * one["grad_norm"]
        of_tasks = [name for name in one if "/" in name]  # of both ranks, rounded to four digits
        assert of_tasks and all(abs(one[name] - two[name]) < 3e-4 for name in of_tasks), (one, two)
    start = "-".join([*spread.split("-")[:-1], "alone"])
    one, two = (
        MarsForConditionalGeneration.from_pretrained(folder / name / "checkpoint-30") for name in (start, spread)
    )
    for name, parameter in two.named_parameters():
        assert torch.allclose(parameter, one.get_parameter(name), atol=1e-4), name


def test_two_ranks_train_as_one_replicated_and_sharded(folder):
    alone = run(folder, "alone")
    assert_the_same_run(folder, alone, "ddp", "Parameter")
    assert_the_same_run(folder, alone, "fsdp", "DTensor")


def test_sharded_ranks_that_accumulate_train_as_one_and_keep_no_whole_gradients(folder):
    assert_the_same_run(folder, run(folder, "accumulated-alone"), "accumulated-fsdp", "DTensor")
    assert json.loads((folder / "accumulated-fsdp.json").read_text())["has_gradients_between"]


def test_a_loss_of_one_rank_that_is_no_number_stops_all_and_the_last_checkpoint_is_good(folder):
    done = start(folder, "broken-ddp")
    assert done.returncode != 0 and "The loss is nan in step 16" in done.stderr
    found = last_checkpoint(folder / "broken-ddp")
    assert found.endswith("checkpoint-16") and (folder / "broken-ddp" / "bad-batch-16-1.safetensors").exists()
    assert all(weight.isfinite().all() for weight in load_file(f"{found}/model.safetensors").values())


def test_two_ranks_stop_at_the_same_step_when_one_of_them_is_told_to(folder):
    run(folder, "stopped-ddp")
    steps = {(folder / f"stopped-ddp-{rank}.step").read_text() for rank in (0, 1)}
    (step,) = steps
    assert 5 <= int(step) < 30 and last_checkpoint(folder / "stopped-ddp").endswith(f"checkpoint-{step}")
    assert len(list((folder / "stopped-ddp" / f"checkpoint-{step}").glob("rng_state_*.pth"))) == 2


def test_sharded_ranks_train_in_bfloat16_with_checkpointing_log_exact_losses_and_go_on_where_they_stopped(folder):
    logs = run(folder, "rounded-fsdp")["logs"]
    shutil.rmtree(folder / "rounded-fsdp" / "checkpoint-30")
    again = run(folder, "rounded-fsdp")
    assert again["logs"] == logs and again["parameters"] == ["DTensor"] and again["dtypes"] == ["torch.float32"]
    exact = run(folder, "fsdp")["logs"]
    assert len(logs) == 30 and abs(logs[0]["loss"] - exact[0]["loss"]) < 3e-3 * exact[0]["loss"]
    assert max(abs(one["loss"] - two["loss"]) for one, two in zip(logs, exact, strict=True)) < 0.1


@pytest.fixture
def recipes(folder):
    """
    The documents of mars-emoji in small, with its optimizer, with AdamW and as a LoRA: pictures of several sizes,
    captions of several lengths, and every second document is text alone. And its super-resolution.
    """
    rng = torch.Generator().manual_seed(0)
    pairs = []
    for number in range(16):
        height, width = [(16, 8), (16, 16), (8, 24)][number % 3]
        codes = torch.randint(0, 40, (height * width // 16,), generator=rng).tolist()
        caption = "abcdefghijklmnop"[: number + 1]
        pairs.append({"image_codes": codes, "height": height, "width": width, "caption_en": caption})
        pairs[-1] |= {"lowres_codes": codes[::4], "enlarged_codes": codes[::-1]}
    pictures = [{"text": None, **{name: pair[name] for name in ("image_codes", "height", "width")}} for pair in pairs]
    words = [{"text": f"{pair['caption_en']}\n"} | dict.fromkeys(("image_codes", "height", "width")) for pair in pairs]
    stories = [[words[n], words[-n] if n % 2 else pictures[n], words[n - 3]] for n in range(16)]
    Dataset.from_list(pairs).to_parquet(folder / "pairs.parquet")
    Dataset.from_list([{"segments": story} for story in stories]).to_parquet(folder / "stories.parquet")
    source = {"source": str(folder / "pairs.parquet")}
    training = {"max_steps": 30, "per_device_train_batch_size": 2, "save_steps": 30, "logging_steps": 1, "bf16": False}
    values = {
        "stage": "documents",
        "model": {"base": str(folder / "start")},
        "data": [
            {"source": str(folder / "stories.parquet"), "task": "documents", "share": 0.5},
            {**source, "task": "text-to-image", "share": 0.35, "code_noise": 1.0},
            {**source, "task": "captioning", "share": 0.15},
        ],
        "loss": {"scope": "grammar", "label_spread": 0.5, "chunk_size": 16},
        "training": training,
    }
    for name, optimizer in (("muon", {"name": "muon", "muon_learning_rate": 6e-3}), ("adamw", {}), ("lora", {})):
        model = {**values["model"], **({"adapter": {"r": 4, "experts": "all"}} if name == "lora" else {})}
        recipe = {**values, "model": model, "optimizer": {**optimizer, "learning_rate": 3e-3}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    fields = {"super_resolution_factor": 2, "codes_per_step": [4, 1], "code_order": "block2x2", "max_grid_size": 8}
    fields |= {"cell_embedding": True, "lowres_embedding": True}
    enlarge = {**values, "stage": "super-resolution", "model": {**values["model"], "config": fields}}
    enlarge |= {"data": [{**source, "task": "super-resolution", "code_noise": 0.3}], "codes_per_step": [4, 1]}
    (folder / "enlarge.yaml").write_text(yaml.safe_dump({**enlarge, "optimizer": {"learning_rate": 3e-3}}))
    return folder


def assert_a_recipe_trains_the_same(folder, alone, spread):
    """The losses of all steps, and the way that each weight has gone."""
    for name in (alone, spread):
        done = start(folder, name)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        for state in (folder / name / "checkpoint-30" / "trainer_state.json" for name in (alone, spread))
    )
    assert len(one) == 30 and max(abs(a - b) for a, b in zip(one, two, strict=True)) < 2e-3
    file = "model.safetensors"
    before = load_file(folder / "start" / file)
    if alone.startswith("lora"):
        file, before = "adapter_model.safetensors", {}
    mine, theirs = (load_file(folder / name / "final" / file) for name in (alone, spread))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        way = weight - before.get(name, torch.zeros(()))  # of a LoRA's B, which begins at zero; of A, its size
        assert (weight - theirs[name]).norm() <= 0.05 * way.norm(), name


def test_a_recipe_on_two_ranks_trains_as_on_one_with_muon(recipes):
    assert_a_recipe_trains_the_same(recipes, "muon-alone", "muon-ddp")


def test_a_recipe_on_two_sharded_ranks_trains_as_on_one_with_adamw_and_refuses_muon(recipes):
    assert_a_recipe_trains_the_same(recipes, "adamw-alone", "adamw-fsdp")
    refused = start(recipes, "muon-fsdp")
    assert refused.returncode != 0 and "Muon orthogonalises whole matrices" in refused.stderr


@pytest.mark.parametrize("name", ["lora", "enlarge"])
def test_an_adapter_and_super_resolution_train_on_two_ranks_as_on_one(recipes, name):
    assert_a_recipe_trains_the_same(recipes, f"{name}-alone", f"{name}-ddp")


def test_the_configurations_of_accelerate_that_ship_are_ones(recipes):
    for name, kind, fields in (
        ("fsdp2", "FSDP", {"fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": "MarsDecoderLayer"}),
        ("zero3", "DEEPSPEED", {"zero_stage": 3, "zero3_save_16bit_model": True}),
    ):
        config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))  # refuses keys that it does not know
        assert config.distributed_type == kind and config.num_processes == 8 and config.mixed_precision == "bf16"
        assert fields.items() <= (config.fsdp_config or config.deepspeed_config).items()
    names = {
        type(layer).__name__ for layer in MarsForConditionalGeneration.from_pretrained(recipes / "start").modules()
    }
    assert "MarsDecoderLayer" in names


def test_two_ranks_read_packs_of_a_stream_as_one_does(folder):
    assert_the_same_run(folder, run(folder, "packs-alone"), "packs-ddp", "Parameter")


def test_two_ranks_train_as_one_under_zero3(folder, monkeypatch):
    pytest.importorskip(
        "deepspeed", reason="pip install wheel ninja; DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert_the_same_run(folder, run(folder, "alone"), "zero3", "Parameter")
