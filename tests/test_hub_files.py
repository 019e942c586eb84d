"""The files that travel with the weights: what they may import, how they are exported, and that they work alone."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

import mars_hf
from mars_hf import hub
from mars_hf.configuration_mars import MARS_FORMAT
from mars_hf.evaluation.provenance import fingerprint
from mars_hf.training.run import with_other_config

PACKAGE = Path(mars_hf.__file__).parent
LIBRARIES = {"torch", "transformers", "diffusers", "PIL", "numpy"}
SITE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a fresh process; its output, or a failure that shows what it said."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**SITE, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_processor_loads_without_a_word_before_anything_is_registered() -> None:
    code = "import sys; sys.stderr = sys.stdout; from mars_hf import DEFAULT_CHECKPOINT, MarsProcessor; "
    assert run_python(code + "MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT)") == ""


# What may be imported


@pytest.mark.parametrize("name", hub.HUB_FILES)
def test_a_hub_file_imports_only_its_siblings_and_five_libraries(name: str) -> None:
    allowed = LIBRARIES | sys.stdlib_module_names
    for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in allowed for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` is not seen by transformers, and a folder or a parent does not travel.
            assert node.level == 1 and f"{node.module}.py" in hub.HUB_FILES, ast.unparse(node)


@pytest.mark.parametrize("name", hub.HUB_FILES)
def test_transformers_finds_no_sibling_that_does_not_travel(name: str) -> None:
    # The library's own search, by pattern: it also sees what stands in a docstring.
    source = (PACKAGE / name).read_text(encoding="utf-8")
    seen = re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
    assert {f"{module}.py" for module in seen} <= set(hub.HUB_FILES)
    assert not re.findall(r"^\s*import\s+\.", source, flags=re.MULTILINE)


def test_importing_mars_hf_loads_no_library_and_takes_no_time() -> None:
    code = (
        "import sys, time; started = time.perf_counter(); import mars_hf; taken = time.perf_counter() - started; "
        f"assert not {LIBRARIES!r} & set(sys.modules); print(taken)"
    )
    assert min(float(run_python(code)) for _ in range(3)) < 0.2


def test_the_command_line_helps_without_loading_torch() -> None:
    code = "import sys, mars_hf.cli, mars_hf.hub; assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    run_python(code)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MarsConfg'"):
        mars_hf.MarsConfg  # noqa: B018


# Export, on a folder that looks like a checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {"model_type": "mars", "default_image_size": 32, "downsample_factor": 4, "codebook_size": 16}
    image_processor = {"image_processor_type": "MarsImageProcessor"}
    contents = {
        "config.json": config,
        "generation_config.json": {"guidance_scale": 2.0},
        "processor_config.json": {"image_processor": image_processor, "processor_class": "MarsProcessor"},
        "tokenizer_config.json": {"processor_class": "MarsProcessor"},
        "tokenizer.json": {"model": {}},
        "trainer_state.json": {"global_step": 7},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    weights = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4),
        "model.layers.0.self_attn.visual_q_proj.weight": torch.randn(4, 4).bfloat16(),
        "model.visual_embed_tokens.weight": torch.randn(24, 4),
        "vision_head.weight": torch.randn(24, 4),
        "vqgan.quantize.embedding.weight": torch.randn(16, 2),
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.pt").write_bytes(b"not for readers")
    return folder


def test_an_export_holds_the_checkpoint_as_stored_the_code_and_the_maps(tmp_path: Path, checkpoint: Path) -> None:
    out = hub.export_folder(checkpoint, tmp_path / "out" / "mars-tiny")
    carried = {"config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == {
        *carried, *hub.HUB_FILES, "tokenizer.json", "model.safetensors", "chat_template.jinja", "README.md",
        "requirements.txt",
    }  # fmt: skip
    assert (out / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    for name in hub.HUB_FILES:
        assert (out / name).read_bytes() == (PACKAGE / name).read_bytes()

    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"].keys() == {
        "AutoConfig", "AutoModel", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM",
        "AutoProcessor",
    }  # fmt: skip
    pipelines = {task: info["impl"] for task, info in config["custom_pipelines"].items()}
    assert pipelines == {
        "text-to-image": "pipeline_mars.MarsPipeline",
        "any-to-any": "pipeline_mars.MarsAnyToAnyPipeline",
    }
    processor = json.loads((out / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_mars.MarsProcessor"}
    assert processor["image_processor"]["auto_map"]["AutoImageProcessor"].keys() == {"torchvision", "pil"}
    assert list(out.parent.iterdir()) == [out]


def test_the_card_counts_parameters_and_states_the_facts(tmp_path: Path, checkpoint: Path) -> None:
    facts = hub.CardFacts("Draws squares.", limits=("No circles.",), training_data="Squares.", training="An hour.")
    card = (hub.export_folder(checkpoint, tmp_path / "mars-tiny", facts) / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: other\n") and "# mars-tiny" in card
    for words in (
        "Draws squares.",
        "- No circles.",
        "## Training data\n\nSquares.\n\n## Training\n\nAn hour.\n\n## Licence",
        "(frozen) | 16 |",
        "head | 208 |",
        "pixels) | 32 |",
    ):
        assert words in card


def test_the_card_of_the_embedded_checkpoint_names_every_maker_and_licence() -> None:
    facts = hub.emoji_facts()
    for package in [*hub.STYLES.values(), hub.NAMES]:
        assert f"| {package.license} | {package.holder} | {package.source} |" in facts.training_data
    assert "minutes" in facts.training and "## Training\n" not in hub.model_card(
        hub.DEFAULT_CHECKPOINT, hub.CardFacts()
    )


def test_the_requirements_of_a_folder_are_those_of_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parents[1] / "setup.cfg")
    packages = setup["options"]["install_requires"].split()
    needed = LIBRARIES - {"PIL"} | {"pillow", "safetensors"}
    assert set(hub.REQUIREMENTS) == {line for line in packages if re.match(r"[a-z_]+", line)[0] in needed}


RESULTS = {
    "prompts": "emoji, test split",
    "scores": [
        {"run": run, "pictures": "single", "group": "all", "metric": metric, "value": value, "interval": [0.1, 0.2],
         "prompts": 7}
        for run, metric, value in (("plain", "clip_score", 31.25), ("references", "clip_score", 40.0))
    ],
}  # fmt: skip


@pytest.mark.parametrize("card", [None, "---\nlicense: mit\n---\n# By hand\n"])
def test_results_stand_where_the_hub_looks_for_them_and_in_a_table(
    tmp_path: Path, checkpoint: Path, card: str | None
) -> None:
    if card is not None:
        (checkpoint / "README.md").write_text(card)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({**RESULTS, "checkpoint_sha256": fingerprint(checkpoint)}))
    out = hub.export_folder(checkpoint, tmp_path / "mars-tiny", results=results)
    written = ModelCard.load(out / "README.md")
    (result,) = written.data.eval_results  # of the model's own pictures, not of the references
    assert (result.dataset_name, result.metric_type, result.metric_value) == (RESULTS["prompts"], "clip_score", 31.25)
    assert written.data.license == ("other" if card is None else "mit")
    assert ("| plain | single | all | 7 | 31.25 [0.10, 0.20] |" in written.text) is (card is None)


def test_results_of_another_checkpoint_or_of_nothing_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    results = tmp_path / "results.json"
    with pytest.raises(ValueError, match="does not exist"):
        hub.export_folder(checkpoint, tmp_path / "out", results=results)
    for content in ("{", "[]", "{}"):
        results.write_text(content)
        with pytest.raises(ValueError, match="is no `results.json`"):
            hub.export_folder(checkpoint, tmp_path / "out", results=results)
    results.write_text(json.dumps({**RESULTS, "checkpoint_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="was measured on checkpoint 0000000000000000"):
        hub.export_folder(checkpoint, tmp_path / "out", results=results)
    with pytest.raises(ValueError, match="without `weights_dtype`"):
        hub.export_folder(checkpoint, tmp_path / "out", results=results, weights_dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_the_gallery_holds_what_the_model_draws_and_travels_with_its_card(
    tmp_path: Path, tiny_model, tiny_processor
) -> None:
    facts = hub.CardFacts(prompts=("a red apple", "红苹果", "a ship"))
    out = hub.export_checkpoint(tiny_model, tiny_processor, tmp_path / "mars-tiny", facts, gallery=2)
    pipe = mars_hf.MarsPipeline(model=tiny_model, processor=tiny_processor)
    widget = ModelCard.load(out / "README.md").data.to_dict()["widget"]
    assert [one["text"] for one in widget] == ["a red apple", "红苹果"]
    for one in widget:
        (drawn,) = pipe(one["text"], guidance_scale=facts.guidance_scale, seed=0)
        with Image.open(out / one["output"]["url"]) as picture:
            assert np.array_equal(picture, drawn["generated_image"])
    again = hub.export_folder(out, tmp_path / "again")
    assert (again / "README.md").read_bytes() == (out / "README.md").read_bytes()
    assert all((again / one["output"]["url"]).is_file() for one in widget)
    with pytest.raises(ValueError, match="`gallery` must be 0 to 2, the number of prompts"):
        hub.export_folder(out, tmp_path / "third", gallery=3)
    assert not (tmp_path / "third").exists()


def test_a_card_of_the_source_is_kept(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("# Written by hand")
    assert (hub.export_folder(checkpoint, tmp_path / "out") / "README.md").read_text() == "# Written by hand"


@pytest.mark.parametrize(
    "name", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
)
def test_an_incomplete_source_is_refused_by_what_it_lacks(tmp_path: Path, checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=name.replace("model", r"\*") + " is missing"):
        hub.export_folder(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_without_one_of_its_shards_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="no complete MARS checkpoint: model-00002-of-00002.safetensors is missing"):
        hub.export_folder(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("kept", [-8, 100, 4])
def test_weights_that_are_cut_off_or_a_pointer_to_them_are_refused(
    tmp_path: Path, checkpoint: Path, kept: int
) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept] if kept != 4 else b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(ValueError, match="model.safetensors is damaged or no safetensors file.*Fetch it again"):
        hub.export_folder(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_goes_through_a_link_and_not_to_where_it_cannot_be_put(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "mars")
    hub.export_folder(checkpoint, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "mars" / "config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="a mount point or the current folder"):
        hub.export_folder(checkpoint, ".")
    monkeypatch.setattr(hub.os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(ValueError, match="a mount point or the current folder"):
        hub.export_folder(checkpoint, tmp_path / "volume")


def test_a_card_calls_frozen_only_what_is(tmp_path: Path, checkpoint: Path) -> None:
    assert "| language model (frozen) |" in (hub.export_folder(checkpoint, tmp_path / "a") / "README.md").read_text()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "use_visual_expert": False}))
    assert "| language model |" in (hub.export_folder(checkpoint, tmp_path / "b") / "README.md").read_text()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="type 'qwen2', expected 'mars'"):
        hub.export_folder(checkpoint, tmp_path / "out")


def test_a_folder_in_use_is_refused_and_an_earlier_export_is_replaced_only_on_request(
    tmp_path: Path, checkpoint: Path
) -> None:
    out = hub.export_folder(checkpoint, tmp_path / "out")
    (out / "notes.txt").write_text("old")
    with pytest.raises(ValueError, match="not empty"):
        hub.export_folder(checkpoint, out)
    assert (out / "notes.txt").exists()
    hub.export_folder(checkpoint, out, overwrite=True)
    assert (out / "config.json").exists() and not (out / "notes.txt").exists()

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not overwritten"):
        hub.export_folder(checkpoint, tmp_path / "home", overwrite=True)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_a_failing_export_leaves_nothing_behind(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.export_folder(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_an_export_that_cannot_take_its_place_leaves_the_earlier_one_there(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace = hub.export_folder(checkpoint, tmp_path / "out"), os.replace
    (out / "notes.txt").write_text("old")

    def fails_on_the_new_one(source, target):
        if Path(target) == out and Path(source).name != "replaced":
            raise PermissionError("no")
        replace(source, target)

    monkeypatch.setattr(hub.os, "replace", fails_on_the_new_one)
    with pytest.raises(PermissionError):
        hub.export_folder(checkpoint, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "old" and (out / "config.json").exists()


def test_whoever_may_read_an_exports_configuration_may_read_its_weights(tmp_path: Path, checkpoint: Path) -> None:
    out = hub.export_folder(checkpoint, tmp_path / "out", weights_dtype="bfloat16", separate_frozen=True)
    modes = {path.stat().st_mode for path in [*out.glob("*.safetensors"), out / "config.json"]}
    assert len(list(out.glob("*.safetensors"))) == 2 and len(modes) == 1


# The real thing, in processes of their own

# As in an environment that holds four packages and what they need: all else cannot be imported, mars_hf first of all.
BARE = """
import sys
from importlib.metadata import packages_distributions, requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def with_all_it_needs(names):
    found = set()
    while names:
        name = names.pop()
        found.add(name)
        for need in map(Requirement, requires(name) or []):
            if not need.marker or need.marker.evaluate({"extra": ""}):
                names |= {canonicalize_name(need.name)} - found
    return found

installed = {module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()}
bare = with_all_it_needs({"transformers", "torch", "diffusers", "pillow"})
for module in {"mars_hf"} | {module for module, names in installed.items() if not names & bare}:
    if module not in sys.modules:
        sys.modules[module] = None
assert all(sys.modules[name] is None for name in ("mars_hf", "datasets", "pytest", "scipy") if name in installed)
"""

LOAD_WITH_ALL_AUTO_CLASSES = (
    BARE
    + """
import json
import numpy, torch, transformers
from safetensors.torch import save_file

name, out = sys.argv[1:]
trusted = {"trust_remote_code": True}
ids = torch.tensor(json.load(open(out + "/ids.json")))
classes, tensors = {}, {}
for auto in ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer"):
    loaded = getattr(transformers, auto).from_pretrained(name, **trusted)
    classes[auto] = type(loaded).__name__
for auto in ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM"):
    model = getattr(transformers, auto).from_pretrained(name, **trusted).eval()
    classes[auto] = type(model).__name__
    with torch.no_grad():
        tensors[auto] = model(ids).logits

pipe = transformers.pipeline("text-to-image", model=name, **trusted)
one = pipe("a red apple", **json.load(open(out + "/call.json")))
two = pipe(["a red apple", "红苹果"], **json.load(open(out + "/call.json")))
tensors["one"] = torch.tensor(numpy.stack([picture["generated_image"] for picture in one]))
tensors["two"] = torch.tensor(numpy.stack([[p["generated_image"] for p in pictures] for pictures in two]))
classes["pipeline"] = type(pipe).__name__

picture = one[0]["generated_image"]
chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
pipes = {
    task: transformers.pipeline(task, model=name, **trusted)
    for task in ("any-to-any", "image-text-to-text", "text-generation")
}
classes["pipelines"] = {task: type(pipe).__name__ for task, pipe in pipes.items()}
short = {"max_new_tokens": 5, "return_full_text": False}
answers = {task: pipes[task](text=chat, **short) for task in ("any-to-any", "image-text-to-text")}
said = [{"role": "user", "content": "What?"}]
short["do_sample"] = False  # the stock pipeline would sample
answers |= {"words": pipes["text-generation"]("What?", **short), "chat": pipes["text-generation"](said, **short)}
answers |= {"own words": pipes["any-to-any"]("What?", **short), "own chat": pipes["any-to-any"](said, **short)}
classes["answers"] = {name: answer["generated_text"] for name, (answer,) in answers.items()}
document = pipes["any-to-any"]("ab", generation_mode="interleaved", max_new_tokens=20)[0]["generated_interleaved"]
classes["document"] = [type(part).__name__ for part in document][0]
classes["from"] = sorted({m.split(".")[0] for m in sys.modules if m.endswith("_mars")})
save_file(tensors, out + "/tensors.safetensors")
print(json.dumps(classes))
"""
)


@pytest.fixture
def exported(tmp_path: Path, tiny_model, tiny_processor) -> Path:
    return hub.export_checkpoint(tiny_model, tiny_processor, tmp_path / "mars-tiny")


def as_hub_cache(folder: Path, home: Path) -> str:
    """Lay a folder out as the Hub's cache does, under a repository's name."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / "models--someone--mars-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return "someone/mars-tiny"


def pixels_of(drawn: list) -> torch.Tensor:
    return torch.tensor(np.stack([np.asarray(picture["generated_image"]) for picture in drawn]))


@pytest.mark.integration
@pytest.mark.parametrize("place", ["folder", "hub cache"])
def test_an_export_works_alone_with_all_auto_classes_and_the_pipeline(
    tmp_path: Path, exported: Path, tiny_model, tiny_processor, place: str
) -> None:
    side = tiny_model.config.default_image_size
    call = {"height": side, "width": 2 * side, "guidance_scale": 3.0, "num_images_per_prompt": 2}
    call |= {"do_sample": True, "seed": 7}
    ids = tiny_processor("a red apple", height=side, width=side)["input_ids"]
    codes = torch.arange(4)[None] + tiny_model.config.image_token_offset
    ids = torch.cat([ids, torch.tensor([[tiny_model.config.image_start_token_id]]), codes], dim=1)
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    (tmp_path / "call.json").write_text(json.dumps(call))
    home = tmp_path / "home"
    name = str(exported) if place == "folder" else as_hub_cache(exported, home)

    said = run_python(
        LOAD_WITH_ALL_AUTO_CLASSES, name, str(tmp_path), HF_HOME=str(home), HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    classes = json.loads(said.splitlines()[-1])
    models = ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")
    assert classes.pop("from") == ["transformers_modules"]
    assert classes.pop("pipelines") == {
        "any-to-any": "MarsAnyToAnyPipeline",
        "image-text-to-text": "ImageTextToTextPipeline",
        "text-generation": "TextGenerationPipeline",
    }
    answers = classes.pop("answers")
    assert answers["any-to-any"] == answers["image-text-to-text"] and classes.pop("document") == "str"
    assert answers["own words"] == answers["words"] and answers["own chat"] == answers["chat"]
    assert classes == {
        **dict.fromkeys(models, "MarsForConditionalGeneration"),
        "AutoConfig": "MarsConfig",
        "AutoProcessor": "MarsProcessor",
        "AutoImageProcessor": type(tiny_processor.image_processor).__name__,
        "AutoTokenizer": type(tiny_processor.tokenizer).__name__,
        "pipeline": "MarsPipeline",
    }

    tensors = load_file(tmp_path / "tensors.safetensors")
    with torch.no_grad():
        logits = tiny_model.eval()(ids).logits
    assert all(torch.equal(tensors[auto], logits) for auto in models)
    pipe = mars_hf.MarsPipeline(model=tiny_model, processor=tiny_processor)
    assert tensors["one"].shape == (2, side, 2 * side, 3) and tensors["two"].shape == (2, 2, side, 2 * side, 3)
    assert torch.equal(tensors["one"], pixels_of(pipe("a red apple", **call)))
    assert torch.equal(tensors["two"][0], tensors["one"])
    assert torch.equal(tensors["two"][1], pixels_of(pipe("红苹果", **call)))


@pytest.mark.integration
def test_every_block_of_the_card_runs_as_pasted(tmp_path: Path, exported: Path) -> None:
    blocks = re.findall(r"```(\w*)\n(.*?)```", (exported / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "python", "python", "python"]
    # All that it installs is here already, so that pip, which may look nowhere, has nothing to do.
    offline = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
    installed = subprocess.run(["bash", "-ec", blocks[0][1]], capture_output=True, text=True, env={**SITE, **offline})
    assert installed.returncode == 0 and "Successfully installed" not in installed.stdout, installed.stderr
    code = f"{BARE}\nimport os\nos.chdir({str(tmp_path)!r})\n" + "\n".join(code for _, code in blocks[1:])
    said = run_python(code, HF_HOME=str(tmp_path / "home"), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert said.splitlines()[-1] == "iVBORw0KGgoAAAANSUhE"  # how PNG files begin
    for number in range(2):
        with Image.open(tmp_path / f"picture-{number}.png") as picture:
            assert picture.size == (json.loads((exported / "config.json").read_text())["default_image_size"],) * 2


@pytest.mark.integration
def test_the_card_of_a_model_of_super_resolution_runs_as_pasted(tmp_path: Path, tiny_model, tiny_processor) -> None:
    changes = {"super_resolution_factor": 2, "default_image_size": 32}
    model, processor = with_other_config(tiny_model, tiny_processor, changes)
    out = hub.export_checkpoint(model, processor, tmp_path / "mars-tiny-large")
    blocks = re.findall(r"```(\w*)\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python"]
    code = f"{BARE}\nimport os\nos.chdir({str(tmp_path)!r})\n{blocks[1][1]}"
    run_python(code, HF_HOME=str(tmp_path / "home"), HF_MODULES_CACHE=str(tmp_path / "modules"))
    with Image.open(tmp_path / "large.png") as picture:
        assert picture.size == (32, 32)
    with pytest.raises(ValueError, match="nothing from text alone: leave `gallery` out"):
        hub.export_folder(out, tmp_path / "other", hub.CardFacts(), gallery=1)


@pytest.mark.integration
def test_weights_that_the_code_of_a_folder_does_not_know_are_refused(tmp_path: Path, exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["mars_format"] == MARS_FORMAT
    (exported / "config.json").write_text(json.dumps({**config, "mars_format": MARS_FORMAT + 1}))
    code = """
import sys
sys.modules["mars_hf"] = None
from transformers import AutoConfig, AutoModel, pipeline

for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, lambda *a, **k: pipeline("any-to-any", *a, **k)):
    try:
        load(sys.argv[1], trust_remote_code=True)
    except ValueError as error:
        assert "code and weights do not match" in str(error), error
    else:
        raise AssertionError("It was loaded.")
"""
    run_python(code, str(exported), HF_MODULES_CACHE=str(tmp_path / "modules"))


@pytest.mark.integration
def test_the_registered_package_loads_a_plain_checkpoint_and_wins_over_its_code(
    tmp_path: Path, exported: Path, tiny_model, tiny_processor
) -> None:
    plain = tmp_path / "plain"
    tiny_model.save_pretrained(plain)
    tiny_processor.save_pretrained(plain)
    code = """
import sys, mars_hf
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

mars_hf.register()
mars_hf.register()
plain, exported = sys.argv[1:]
for auto in (AutoModel, AutoModelForCausalLM):
    assert type(auto.from_pretrained(plain)) is mars_hf.MarsForConditionalGeneration
    assert type(auto.from_pretrained(exported, trust_remote_code=True)) is mars_hf.MarsForConditionalGeneration
assert type(AutoProcessor.from_pretrained(plain)) is mars_hf.MarsProcessor
AutoTokenizer.from_pretrained(plain)
assert type(pipeline("text-to-image", model=plain)) is mars_hf.MarsPipeline
"""
    run_python(code, str(plain), str(exported))


@pytest.mark.integration
def test_the_command_line_draws_captioned_pictures_and_exports(tmp_path: Path, exported: Path) -> None:
    drawing, copy = tmp_path / "drawing.png", tmp_path / "copy"
    command = [sys.executable, "-m", "mars_hf.cli"]
    draw = [*command, "generate", "a red apple", "红苹果", "--grid", "--model", str(exported), "--out", str(drawing)]
    drawn = subprocess.run(draw, capture_output=True, text=True, env=SITE)
    assert drawn.returncode == 0, drawn.stderr
    assert re.fullmatch(rf"{re.escape(str(drawing))} \(drawn in \d+\.\d s\)\n", drawn.stdout)
    with Image.open(drawing) as sheet:
        assert sheet.width > sheet.height
    refused = subprocess.run([*draw, "--size", "17x16"], capture_output=True, text=True, env=SITE)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("mars-hf: ")

    export = [*command, "export", str(copy), "--model", str(exported)]
    assert subprocess.run(export, capture_output=True, env=SITE).returncode == 0
    assert (copy / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert subprocess.run(export, capture_output=True, env=SITE).returncode == 2


@pytest.mark.integration
def test_the_wheel_holds_all_that_it_needs_and_works_unpacked(tmp_path: Path) -> None:
    source, root = tmp_path / "source", PACKAGE.parents[1]
    shutil.copytree(PACKAGE, source / "src" / "mars_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")

    def files(package: Path) -> set[str]:
        kept = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(package)) for path in kept if path.name != ".gitkeep"}

    assert files(tmp_path / "unpacked" / "mars_hf") == files(PACKAGE)
    code = "import mars_hf, mars_hf.contact_sheet as s; assert s.FONT.is_file(); print(mars_hf.__file__)"
    where = run_python(code, PYTHONPATH=str(tmp_path / "unpacked"))
    assert where.startswith(str(tmp_path / "unpacked"))


def test_weights_stored_in_half_the_size_compute_as_before(tmp_path: Path, tiny_model, tiny_processor) -> None:
    from mars_hf import MarsForConditionalGeneration

    tiny_model.save_pretrained(tmp_path / "source")
    tiny_processor.save_pretrained(tmp_path / "source")
    hub.export_folder(tmp_path / "source", tmp_path / "out", weights_dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    loaded = MarsForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, tiny_model.get_parameter(name).bfloat16().float()), name
    with pytest.raises(ValueError, match="bfloat16', got 'int8'"):
        hub.export_folder(tmp_path / "source", tmp_path / "other", weights_dtype="int8")


def test_the_frozen_part_is_one_file_for_all_that_is_trained_on_it(tmp_path: Path, tiny_model, tiny_processor) -> None:
    from mars_hf import MarsForConditionalGeneration

    for name in ("before", "after"):
        tiny_model.save_pretrained(tmp_path / name)
        tiny_processor.save_pretrained(tmp_path / name)
        hub.export_folder(tmp_path / name, tmp_path / f"{name}-out", separate_frozen=True)
        loaded = MarsForConditionalGeneration.from_pretrained(tmp_path / f"{name}-out")
        for key, parameter in loaded.named_parameters():
            assert torch.equal(parameter, tiny_model.get_parameter(key)), key
        for parameter in tiny_model.parameters():
            parameter.data += 1.0 * parameter.requires_grad  # training moves the visual part
    frozen, visual = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    before, after = tmp_path / "before-out", tmp_path / "after-out"
    assert (before / frozen).read_bytes() == (after / frozen).read_bytes()
    assert (before / visual).read_bytes() != (after / visual).read_bytes()
