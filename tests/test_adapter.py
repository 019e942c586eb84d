"""An adapter for documents that travels with a checkpoint."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_hub_files import run_python
from transformers import AutoModel, AutoModelForMultimodalLM, CompileConfig
from typer.testing import CliRunner

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, hub
from mars_hf.cli import app
from mars_hf.handler import EndpointHandler
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
    alone = Studio.open(base)
    assert alone.adapter is None and alone.storyteller is alone.model


def test_what_was_compiled_without_the_adapter_is_not_called_with_it(carrying):
    studio = Studio.open(carrying)
    studio.model.get_compiled_call(CompileConfig())
    assert "_compiled_call" in vars(studio.model) and "_compiled_call" not in vars(studio.storyteller)


def test_an_endpoint_writes_documents_with_the_adapter_and_all_else_without(base, adapter, carrying):
    asked = {"inputs": "a", "parameters": {"generation_mode": "interleaved", "max_new_tokens": 40, "seed": 3}}
    plain, adapted = EndpointHandler(str(base)), EndpointHandler(str(carrying))
    captioned = {"inputs": "a", "parameters": {"generation_mode": "text", "max_new_tokens": 20}}
    for _ in range(2):
        assert adapted(captioned) == plain(captioned)
        assert adapted(asked) != plain(asked)


def test_an_adapter_of_another_model_is_refused(adapter, carrying, make_model, tiny_processor, tmp_path):
    other = hub.export_checkpoint(make_model(), tiny_processor, tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on the weights of .*mars-tiny, which are others than those"):
        hub.export_folder(other, tmp_path / "out", documents=adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    for changed, message in (
        (
            {name: value for name, value in weights.items() if "layers.0." not in name},
            "does not fit the model: .*first",
        ),
        ({name: value.repeat(2, 2) for name, value in weights.items()}, "does not fit the model"),
    ):
        save_file(changed, carrying / "documents" / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            Studio.open(carrying).tell("a")


def test_an_adapter_that_a_checkpoint_carries_knows_its_weights(
    adapter, carrying, make_model, tiny_processor, tmp_path
):
    other = hub.export_checkpoint(make_model(), tiny_processor, tmp_path / "other")
    with pytest.raises(
        ValueError, match="on the weights of another checkpoint, which are others than those of .*other"
    ):
        hub.export_folder(other, tmp_path / "out", documents=carrying / "documents")
    hub.export_folder(carrying, tmp_path / "again", documents=carrying / "documents")
    base, weights = json.loads((DEFAULT_CHECKPOINT / "documents" / "base.json").read_text()), hub._digest
    assert base == {"sha256": weights(DEFAULT_CHECKPOINT)}


def test_an_adapter_of_another_shape_is_refused_though_its_base_is_not_here(adapter, base, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "far/away"}))
    hub.export_folder(base, tmp_path / "fits", documents=adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("lora_A.weight"))
    weights[name] = weights[name].repeat(1, 2)
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit .*lora_A.weight is .*trained on it"):
        hub.export_folder(base, tmp_path / "out", documents=adapter)


def test_a_whole_checkpoint_with_an_adapter_beside_it_is_loaded_with_it(adapter, base):
    adapted = MarsForConditionalGeneration.from_pretrained(adapter)(WORDS).logits
    for name in hub._ADAPTER:
        shutil.copyfile(adapter / name, base / name)
    for load in (MarsForConditionalGeneration, AutoModelForMultimodalLM):
        model = load.from_pretrained(base)
        assert model.active_adapters() == ["default"] and torch.equal(model.eval()(WORDS).logits, adapted)


def test_a_model_with_an_adapter_on_is_not_exported_as_one_without(adapter, tiny_processor, tmp_path):
    model = MarsForConditionalGeneration.from_pretrained(adapter)
    with pytest.raises(ValueError, match="saved as the adapter alone.*`documents`"):
        hub.export_checkpoint(model, tiny_processor, tmp_path / "out")


def test_an_endpoint_does_not_start_with_half_an_adapter(carrying):
    weights = load_file(carrying / "documents" / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layers.0." not in name},
        carrying / "documents" / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match="does not fit: .* tensors, .*layers.0"):
        EndpointHandler(str(carrying))


def test_an_adapter_is_loaded_on_a_base_that_is_whole(adapter, base):
    for load in (MarsForConditionalGeneration, AutoModel):
        assert load.from_pretrained(adapter, trust_remote_code=True).active_adapters() == ["default"]
    weights = load_file(base / "model.safetensors")
    del weights["vision_head.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for load in (MarsForConditionalGeneration, AutoModel):
        with pytest.raises(ValueError, match="missing: vision_head.weight"):
            load.from_pretrained(adapter, trust_remote_code=True)


def test_an_adapter_that_names_no_base_is_not_loaded_by_itself(carrying):
    with pytest.raises(ValueError, match="names no base.*`model.load_adapter`"):
        MarsForConditionalGeneration.from_pretrained(carrying / "documents")


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
        assert sorted(path.name for path in (out / "documents").iterdir()) == sorted((*hub._ADAPTER, "base.json"))
        stored = json.loads((out / "documents" / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] is None  # no folder of the machine that it was trained on
        assert any(line.startswith("peft") for line in (out / "requirements.txt").read_text().splitlines())
        assert "load_adapter" in (out / "README.md").read_text(encoding="utf-8")
    for out in (carrying, again):
        model = MarsForConditionalGeneration.from_pretrained(out)
        plain = model(WORDS).logits
        model.load_adapter(str(out / "documents"))
        logits = model(WORDS).logits
        model.disable_adapters()
        assert torch.equal(model(WORDS).logits, plain) and not torch.equal(logits, plain)
        if out == carrying:
            assert torch.equal(logits, MarsForConditionalGeneration.from_pretrained(adapter)(WORDS).logits)


def test_what_is_no_adapter_is_not_carried_along(base, adapter, tmp_path):
    with pytest.raises(ValueError, match="holds no PEFT adapter: adapter_config.json"):
        hub.export_folder(base, tmp_path / "out", documents=base)
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        hub.export_folder(base, tmp_path / "out", documents=broken)
    assert not (tmp_path / "out").exists()
    assert "load_adapter" not in (base / "README.md").read_text(encoding="utf-8")


@pytest.mark.integration
def test_every_block_of_the_card_runs_as_pasted_with_an_adapter(carrying, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (carrying / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert any("load_adapter" in block for block in blocks)
    alone = 'import os, sys\nsys.modules["mars_hf"] = None'  # the folder brings its own code
    code = f"{alone}\nos.chdir({str(tmp_path)!r})\n" + "\n".join(blocks)
    said = run_python(code, HF_HOME=str(tmp_path / "home"), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert said.splitlines()[-1] == "iVBORw0KGgoAAAANSUhE"
