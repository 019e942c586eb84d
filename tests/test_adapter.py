"""An adapter for documents that travels with a checkpoint."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_hub_files import run_python
from typer.testing import CliRunner

from mars_hf import MarsForConditionalGeneration, MarsProcessor, hub
from mars_hf.cli import app
from mars_hf.studio import Studio
from mars_hf.training.recipe import ADAPTED_MODULES

WORDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def base(tmp_path, tiny_model, tiny_processor):
    return hub.export_checkpoint(tiny_model, tiny_processor, tmp_path / "mars-tiny")


@pytest.fixture
def adapter(tmp_path, base):
    """As a run leaves it, of weights that are not zero."""
    model = MarsForConditionalGeneration.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=ADAPTED_MODULES["all"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def carrying(tmp_path, base, adapter):
    return hub.export_folder(base, tmp_path / "carrying", hub.CardFacts(), documents=adapter)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_stories_are_told_with_the_adapter_and_all_else_is_done_without(base, adapter, carrying):
    plain, adapted = (MarsForConditionalGeneration.from_pretrained(folder).eval() for folder in (base, adapter))
    studio = Studio.open(carrying)
    assert torch.equal(studio.storyteller(WORDS).logits, adapted(WORDS).logits)
    assert torch.equal(studio.model(WORDS).logits, plain(WORDS).logits)
    assert not torch.equal(adapted(WORDS).logits, plain(WORDS).logits)
    own = {weight.data_ptr() for weight in studio.model.parameters()}
    new = [name for name, weight in studio.storyteller.named_parameters() if weight.data_ptr() not in own]
    assert new and all("lora_" in name for name in new)  # the weights of the base are in memory once
    told = studio.tell("a", seed=3, max_new_tokens=40)
    assert told == Studio.open(base, adapter).tell("a", seed=3, max_new_tokens=40)
    assert told != Studio.open(base).tell("a", seed=3, max_new_tokens=40)
    assert Studio.open(base).storyteller is not None and Studio.open(base).adapter is None


def test_the_command_line_takes_an_adapter_and_says_what_is_none(base, adapter, tmp_path):
    options = ["--model", base, "--max-new-tokens", 40, "--json"]
    told = run("story", "a", "--out", tmp_path / "a.md", *options, "--adapter", adapter)
    assert told.exit_code == 0, told.output
    segments = Studio.open(base, adapter).tell("a", max_new_tokens=40)
    assert json.loads(told.stdout)["segments"] == [part if isinstance(part, str) else None for part in segments]
    refused = run("story", "a", "--out", tmp_path / "a.md", *options, "--adapter", base)
    assert refused.exit_code == 2 and "holds no PEFT adapter: adapter_config.json, adapter_model" in refused.stderr


def test_an_export_carries_the_adapter_along(adapter, carrying, tmp_path):
    expected = load_file(adapter / "adapter_model.safetensors")
    again = hub.export_folder(carrying, tmp_path / "again", weights_dtype="bfloat16")
    for out, dtype in ((carrying, torch.float32), (again, torch.bfloat16)):
        found = load_file(out / "documents" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name].to(dtype)) for name, value in found.items())
        assert sorted(path.name for path in (out / "documents").iterdir()) == sorted(hub._ADAPTER)
        stored = json.loads((out / "documents" / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] is None  # no folder of the machine that it was trained on
        assert any(line.startswith("peft") for line in (out / "requirements.txt").read_text().splitlines())
        assert "load_adapter" in (out / "README.md").read_text(encoding="utf-8")
    model = MarsForConditionalGeneration.from_pretrained(carrying)
    model.load_adapter(str(carrying / "documents"))
    assert torch.equal(model(WORDS).logits, MarsForConditionalGeneration.from_pretrained(adapter)(WORDS).logits)


def test_what_is_no_adapter_is_not_carried_along(base, adapter, tmp_path):
    with pytest.raises(ValueError, match="holds no PEFT adapter: adapter_config.json"):
        hub.export_folder(base, tmp_path / "out", documents=base)
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        hub.export_folder(base, tmp_path / "out", documents=broken)
    assert not (tmp_path / "out").exists()
    assert MarsProcessor.from_pretrained(base) and "load_adapter" not in (base / "README.md").read_text()


@pytest.mark.integration
def test_every_block_of_the_card_runs_as_pasted_with_an_adapter(carrying, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (carrying / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert any("load_adapter" in block for block in blocks)
    alone = 'import os, sys\nsys.modules["mars_hf"] = None'  # the folder brings its own code
    code = f"{alone}\nos.chdir({str(tmp_path)!r})\n" + "\n".join(blocks)
    said = run_python(code, HF_HOME=str(tmp_path / "home"), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert said.splitlines()[-1] == "iVBORw0KGgoAAAANSUhE"
