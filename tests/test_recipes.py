"""Recipes: what is refused before anything is loaded, and a run from a file to a finished model."""

import copy
import json
import logging
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from mars_hf import DEFAULT_CHECKPOINT, MarsConfig, MarsForConditionalGeneration, MarsProcessor
from mars_hf.evaluation.provenance import fingerprint
from mars_hf.modeling_mars import is_visual_parameter
from mars_hf.training import run, sources
from mars_hf.training.mixture import MixtureStream, PackedStream
from mars_hf.training.recipe import RECIPES, STAGES, AssumedPart, DataPart, ModelPart, Recipe
from mars_hf.training.run import build_model, build_source, check_resumption, make_trainer, train
from mars_hf.training.trainer import WINDOW
from mars_hf.weights_mars import adapter_base, weight_files, weights_digest

ROOT = Path(__file__).parent.parent

GOOD = {
    "stage": "alignment",
    "model": {"base": "base"},
    "data": [{"source": "pairs.parquet", "task": "text-to-image"}],
    "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "disable_tqdm": True},
}


def changed(path, value):
    recipe = copy.deepcopy(GOOD)
    place = recipe
    *parents, last = path
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(key, str) else place[key]
    place[last] = value
    return recipe


def written(tmp_path, recipe):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_of_the_package_reads(path):
    recipe = Recipe.load(str(path.relative_to(RECIPES).with_suffix("")))
    assert recipe.about and recipe.loss_scope in ("joint", "grammar") and recipe.trained_codes_per_step
    recipe.check_model(MarsConfig(**recipe.model.config))


def test_the_papers_numbers_stand_in_its_recipes():
    for name in ("stage1", "stage2", "stage3"):
        optimizer = Recipe.load(f"paper/{name}").optimizer
        assert (optimizer.name, optimizer.adam_beta2, optimizer.weight_decay) == ("adamw", 0.95, 0.1)
        assert optimizer.learning_rate == 1e-4
    recipes = [Recipe.load(f"paper/stage{n}") for n in (1, 2, 3)]
    assert [recipe.training["num_train_epochs"] for recipe in recipes] == [1, 2, 1]
    # The library reads a number below 1 as a share of all steps: the paper's warm-up ratio.
    assert [recipe.training["warmup_steps"] for recipe in recipes] == [0.01] * 3
    rows = [recipe.training["per_device_train_batch_size"] for recipe in recipes]
    height, width = recipes[1].assume.image_size
    row_of_stage2 = recipes[1].assume.prompt_tokens + 1 + height * width // 16**2  # `<img>`; `</img>` is not fed
    rows[1] *= recipes[1].packing // row_of_stage2
    assert [64 * count for count in rows] == [4096, 1536, 1536]  # on 64 devices, without accumulation
    assert all(recipe.training.get("gradient_accumulation_steps", 1) == 1 for recipe in recipes)
    assert {"alignment", "refinement", "super-resolution", "documents"} == set(STAGES)


def test_tasks_are_mixed_by_the_shares_of_the_stage_where_a_recipe_states_none():
    assert all(sum(stage.tasks.values()) == pytest.approx(1) for stage in STAGES.values())
    one = {"source": "a", "task": "text-to-image"}
    parts = [one, {**one, "source": "b"}, {"source": "a", "task": "captioning"}]
    found = Recipe.from_dict({**GOOD, "stage": "refinement", "data": parts})
    assert [part.share for part in found.data] == [0.45, 0.45, 0.1]
    assert Recipe.from_dict(found.to_dict()) == found
    with pytest.raises(ValueError, match=r"not for b \(text-to-image\). State it for all of them, or for none"):
        Recipe.from_dict({**GOOD, "data": [{**one, "share": 0.5}, {**one, "source": "b"}]})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["stages"], 1, "`stages` is no key.*Did you mean `stage`"),
        (["stage"], "alinement", "`stage` must be one of alignment.*'alinement'"),
        (["training", "learning_rte"], 1, r"training\.learning_rte.*no key"),
        (["training", "num_train_epochs"], 1, "`max_steps` or `num_train_epochs`, and not both"),
        (["training", "seed"], 1, "`training.seed` is set elsewhere"),
        (["training", "use_cpu"], True, "`training.use_cpu` is set elsewhere: .*CUDA_VISIBLE_DEVICES"),
        (["training", "label_smoothing_factor"], 0.1, "is set elsewhere: see `loss.label_spread`"),
        (["training", "save_only_model"], True, "is set elsewhere: a checkpoint without the optimizer's state"),
        (["training", "train_sampling_strategy"], "random", "is set elsewhere: rows are shuffled by the recipe's own"),
        (["training", "save_strategy"], "epoch", "`training.save_strategy: epoch` would come once, at the end"),
        (["training", "adam_epsilon"], "small", "`training.adam_epsilon`"),
        (["training", "max_steps"], -1, "`training.max_steps` must be above 0, got -1"),
        (["training", "max_steps"], "many", "`training.max_steps`"),
        (["training", "per_device_train_batch_size"], 0, "`training.per_device_train_batch_size` must be above 0"),
        (["training", "gradient_accumulation_steps"], 0, "`training.gradient_accumulation_steps` must be above 0"),
        (["training", "bf16"], "sometimes", "`training.bf16`"),
        (["model"], {"base": "b", "image_defaults": {"temprature": 1}}, "temprature` is no key.*`temperature`"),
        (["data", 0, "share"], 0, "`data.share` must be above 0, got 0"),
        (["data", 0, "code_noise"], 1.5, "`data.code_noise` is a share between 0 and 1, got 1.5"),
        (["data", 0, "drop_caption"], -1, "`data.drop_caption` is a share between 0 and 1, got -1"),
        (["loss"], {"label_spread": -0.1}, "`loss.label_spread` is a distance and cannot be negative, got -0.1"),
        (["packing"], 0, "`packing` is a number of tokens, got 0"),
        (["data", 0, "encode"], {"side": 8}, "`data.encode.side` is no key"),
        (["data", 0, "encode"], {"size": [8, 8], "short_side": 8}, "`size: .height, width.` or `short_side`"),
        (["data", 0, "encode"], {"size": [8]}, "`data.encode.size` is a height and a width in pixels, got .8."),
        (["data", 0, "encode"], {"short_side": -1}, "in whole pixels, got"),
        (["data", 0], {**GOOD["data"][0], "encode": {}, "streaming": True}, "Leave `streaming` or `encode` out"),
        (["data", 0, "min_size"], 0, "`data.min_size` must be 1 or more, got 0"),
        (["data", 0, "max_aspect_ratio"], 0.5, "`data.max_aspect_ratio` must be 1 or more, got 0.5"),
        (["model", "text"], "text", "either `base`.*or both `text` and `vqgan`"),
        (["loss"], {"scope": "codes"}, "`loss.scope` must be one of joint, grammar, got 'codes'"),
        (["optimizer"], {"name": "muon"}, "muon_learning_rate` goes with"),
        (["optimizer"], {"learning_rate": "fast"}, "`optimizer.learning_rate`"),
        (["data"], [], "at least one source"),
        (["data", 0, "task"], "drawing", "`data.task` must be one of.*'drawing'"),
        (["data", 0, "shares"], 0.5, r"`data\[0\].shares` is no key.*`share`"),
        (["codes_per_step"], "4", "`codes_per_step`"),
        (["codes_per_step"], [], r"`codes_per_step` lists every K.*got \[\].*the stage's: \[1\]"),
        (["codes_per_step"], [4, 0], r"each 1 or more, got \[4, 0\]"),
        (["loss"], {"chunk_size": 0}, "`loss.chunk_size` must be 1 position or more, got 0"),
        (["model", "frozen_dtype"], "bfloat16", "`model.frozen_dtype` rounds the `text` and `vqgan`.*Leave it out"),
        (["model"], {"text": "t", "vqgan": "v", "frozen_dtype": "bf16"}, "frozen_dtype` must be one of .*'bf16'"),
        (["model", "config"], {"code_ordr": "region"}, "`model.config.code_ordr` is no key.*`code_order`"),
        (["model", "config"], {"vq_config": {}}, "`model.config.vq_config` is no key"),
        (["data", 0, "task"], "documents", "one of text-to-image, captioning in the stage alignment, got 'documents'"),
        (["data", 0, "captions"], {"form": "poem"}, "`data.captions.form` must be one of records, emoji, got 'poem'"),
        (["data", 0, "captions"], {"null": 0.2}, "`data.captions.null` is no key.*Known are chinese, fine"),
        (["data", 0, "captions"], {"form": "emoji", "name_style": 1}, "captions.name_style` is no.*`named_style`"),
        (["data", 0, "captions"], {"chinese": 2}, "`data.captions.chinese` is a share between 0 and 1, got 2"),
        (["data", 0, "captions"], {"chinese": "all"}, "`data.captions.chinese`.*float"),
        (["data", 0, "max_caption_length"], 0, "`data.max_caption_length` must be 1 or more, got 0"),
        (["data", 0, "long_captions"], "cut", "`data.long_captions` must be one of truncate, drop, got 'cut'"),
        (["model", "adapter"], {"r": -1}, "`model.adapter.r` is a rank of 1 or more, or 0 for no adapter, got -1"),
        (["model", "adapter"], {"experts": "all"}, "`model.adapter` needs a rank, `r`, of 1 or more"),
        (["model", "adapter"], {"r": 4, "lora_alpha": 0}, "`model.adapter.lora_alpha` must be above 0, got 0"),
        (["model", "adapter"], {"r": 4, "experts": "text"}, "adapter.experts` must be one of visual, all, got 'text'"),
        (
            ["model"],
            {"base": "b", "adapter": {"r": 4}, "image_defaults": {"top_k": 1}},
            "`model.image_defaults` would",
        ),
        (["model"], {"text": "t", "vqgan": "v", "adapter": {"r": 4}}, "`model.text` would be in no checkpoint"),
        (["evaluation"], {"split": "test", "num_batches": 0}, "`evaluation.num_batches` must be 1 or more, got 0"),
        (["evaluation"], {"prompts": ["a"]}, "drawn at each evaluation, which needs an `evaluation.split`"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_the_place(tmp_path, path, value, message):
    with pytest.raises(ValueError, match=message):
        Recipe.load(written(tmp_path, changed(path, value)))


def test_numbers_and_switches_are_read_as_they_are_meant(tmp_path, monkeypatch):
    file = written(tmp_path, GOOD)
    file.write_text(file.read_text() + "  adam_epsilon: 1e-7\n  save_strategy: no\n  fp16: true\n")
    recipe = Recipe.load(file)
    assert recipe.training["adam_epsilon"] == 1e-7 and recipe.training["save_strategy"] == "no"
    monkeypatch.setattr(run, "is_bfloat16_fast", lambda: True)
    monkeypatch.setattr(run, "TrainingArguments", lambda **settings: settings)
    assert run.training_arguments(recipe, tmp_path)["bf16"] is False


@pytest.mark.parametrize(("amx", "avx512", "fast"), [(True, True, True), (False, True, True), (False, False, False)])
def test_bfloat16_is_on_where_a_cpu_computes_in_it(monkeypatch, tmp_path, amx, avx512, fast):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run.torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(run.torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert run.training_arguments(Recipe.load(written(tmp_path, GOOD)), tmp_path).bf16 is fast


def test_a_stream_and_several_workers_contradict_each_other(tmp_path):
    stream = {**GOOD["data"][0], "streaming": True}
    training = {**GOOD["training"], "dataloader_num_workers": 2}
    with pytest.raises(ValueError, match="A stream is read by one worker.*got 2"):
        Recipe.load(written(tmp_path, {**GOOD, "data": [stream], "training": training}))


def test_arguments_of_an_optimizer_that_does_not_run_are_refused(tmp_path):
    muon = {**GOOD, "optimizer": {"name": "muon", "muon_learning_rate": 0.01}}
    for name, value in (("optim", "adamw_torch_fused"), ("adam_beta1", 0.8)):
        with pytest.raises(ValueError, match=f"`training.{name}` has no effect with `optimizer.name: muon`"):
            Recipe.load(written(tmp_path, {**muon, "training": {**GOOD["training"], name: value}}))
        Recipe.load(written(tmp_path, changed(["training", name], value)))


def test_a_limit_that_no_caption_meets_is_refused(tmp_path):
    emoji = {**GOOD["data"][0], "captions": {"form": "emoji"}, "max_caption_length": 9}
    with pytest.raises(ValueError, match="of pairs.parquet has nothing to limit.*`form: emoji` writes its own"):
        Recipe.load(written(tmp_path, changed(["data", 0], emoji)))
    documents = {**GOOD["data"][0], "task": "documents", "max_caption_length": 9}
    with pytest.raises(ValueError, match="nothing to limit: documents have no captions"):
        Recipe.load(written(tmp_path, {**GOOD, "stage": "documents", "data": [documents]}))


LOOKS = {
    "training": {**GOOD["training"], "eval_strategy": "steps", "eval_steps": 2},
    "evaluation": {"split": "test", "prompts": ["a"]},
}
ENLARGES = {"stage": "super-resolution", "data": [{**GOOD["data"][0], "task": "super-resolution"}]}


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        (ENLARGES, {}, "needs a model that knows .*`model.config.super_resolution_factor`"),
        (ENLARGES, {"super_resolution_factor": 2}, r"trains 4 codes a step, .*draws \[1\].*\(\[4, 16\]\)"),
        ({"codes_per_step": [1, 3]}, {"codes_per_step": [1, 2]}, r"trains 3 codes a step, .*draws \[1, 2\]"),
        ({}, {"codes_per_step": [2, 4]}, "trains 1 codes a step"),
        ({**ENLARGES, **LOOKS}, {"super_resolution_factor": 2, "codes_per_step": [4, 16]}, "from text alone"),
        (LOOKS, {}, "`evaluation.prompts` are to be drawn, but the model has no VQ-GAN"),
        ({**LOOKS, "evaluation": {"split": "test", "height": 18}}, {}, "`height` must be a multiple of 4, got 18"),
        ({**LOOKS, "evaluation": {"split": "test", "width": 0}}, {}, "`evaluation`: `width` must be a positive"),
    ],
)
def test_a_model_that_contradicts_the_recipe_is_refused(tmp_path, changes, fields, message):
    recipe = Recipe.load(written(tmp_path, {**copy.deepcopy(GOOD), **changes}))
    with pytest.raises(ValueError, match=message):
        recipe.check_model(MarsConfig(codebook_size=40, downsample_factor=4, default_image_size=16, **fields))


def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(ValueError, match="no recipe emoji/stage9.*emoji/stage1.*paper/stage1"):
        Recipe.load("emoji/stage9")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="a mapping"):
        Recipe.load(tmp_path / "list.yaml")


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path):
    tiny_model.generation_config.image_defaults = {"do_sample": True}
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_processor.save_pretrained(tmp_path / "base")
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 40, (6, 16), generator=rng).tolist()
    pairs = {"image_codes": codes, "height": [16] * 6, "width": [16] * 6, "caption_en": list("abcdef")}
    pairs |= {"lowres_codes": [row[:4] for row in codes], "enlarged_codes": codes}
    Dataset.from_dict(pairs).to_parquet(tmp_path / "pairs.parquet")
    picture = {"text": None, "image_codes": codes[0], "height": 16, "width": 16}
    text = {"text": "a\n", "image_codes": None, "height": None, "width": None}
    Dataset.from_list([{"segments": [text, picture, text]}] * 4).to_parquet(tmp_path / "stories.parquet")
    return tmp_path


def recipe_in(folder, **changes):
    recipe = copy.deepcopy(GOOD)
    recipe["model"]["base"] = str(folder / "base")
    recipe["data"][0]["source"] = str(folder / "pairs.parquet")
    return Recipe.load(written(folder, {**recipe, **changes}))


ENLARGE = {"super_resolution_factor": 2, "code_order": "block2x2", "cell_embedding": True, "max_grid_size": 8}
STAGE_CHANGES = {
    "alignment": {},
    "refinement": {"codes_per_step": [1]},
    "super-resolution": {
        "model": {"config": {**ENLARGE, "lowres_embedding": True, "codes_per_step": [4, 1]}},
        "codes_per_step": [4, 1],
    },
    "documents": {"packing": 64},
}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_the_visual_part_and_leaves_a_complete_model(folder, stage):
    changes = copy.deepcopy(STAGE_CHANGES[stage])
    task = {"super-resolution": "super-resolution", "documents": "documents"}.get(stage, "text-to-image")
    data = [{"source": str(folder / ("stories" if task == "documents" else "pairs")) + ".parquet", "task": task}]
    model = {"base": str(folder / "base"), **changes.pop("model", {})}
    training, optimizer = {**GOOD["training"], "max_steps": 6, "logging_steps": 1}, {"learning_rate": 1e-2}
    recipe = {"stage": stage, "model": model, "data": data, "training": training, "optimizer": optimizer, **changes}
    final = train(Recipe.load(written(folder, recipe)), folder / "run")
    model, before = (MarsForConditionalGeneration.from_pretrained(at) for at in (final, folder / "base"))
    processor = MarsProcessor.from_pretrained(final)
    old = dict(before.named_parameters())
    moved = {n for n, p in model.named_parameters() if n not in old or not torch.equal(p, old[n])}
    visual = {name for name, _ in model.named_parameters() if is_visual_parameter(name)}
    assert moved == visual, (visual - moved, moved - visual)
    assert processor.code_order == model.config.code_order
    assert processor.super_resolution_factor == model.config.super_resolution_factor
    assert model.config.trained_codes_per_step == ([4, 1] if stage == "super-resolution" else [1])
    log = json.loads((folder / "run" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    shutil.rmtree(folder / "run" / "checkpoint-6")  # interrupted, and gone on with from its fourth step
    train(Recipe.load(folder / "recipe.yaml"), folder / "run")
    again = load_file(final / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items() if name in again)
    assert again.keys() <= model.state_dict().keys() and len(again) > len(visual)


@pytest.mark.parametrize("experts", ["visual", "all"])
def test_an_adapter_trains_alone_and_is_taken_off_again(folder, experts):
    part = {"base": str(folder / "base"), "adapter": {"r": 2, "experts": experts}}
    data = [{"source": str(folder / "stories.parquet"), "task": "documents"}]
    settings = {"loss": {"label_spread": 0.1}, "optimizer": {"learning_rate": 1e-2}}
    recipe = recipe_in(folder, stage="documents", model=part, data=data, **settings)
    final = train(recipe, folder / "run")
    assert "adapter_model.safetensors" in {path.name for path in final.iterdir()} > {"processor_config.json"}
    assert not list(final.glob("model*.safetensors"))
    adapted, base = (MarsForConditionalGeneration.from_pretrained(at) for at in (final, folder / "base"))
    processor = MarsProcessor.from_pretrained(final)
    words = processor("a b c", return_tensors="pt")["input_ids"]
    picture = torch.tensor([processor.training_example("text-to-image", "a", list(range(16)), 16, 16)["input_ids"]])
    offset = base.config.image_token_offset
    said = base(words).logits
    assert torch.equal(adapted(words).logits[..., :offset], said[..., :offset]) == (experts == "visual")
    assert not torch.equal(adapted(picture).logits, base(picture).logits)
    adapted.disable_adapters()
    assert torch.equal(adapted(words).logits, said)
    assert torch.equal(adapted(picture).logits, base(picture).logits)


def test_an_adapter_that_was_interrupted_ends_with_the_same_weights(folder):
    recipe = recipe_in(folder, model={"base": str(folder / "base"), "adapter": {"r": 2}})
    final = train(recipe, folder / "run") / "adapter_model.safetensors"
    weights, halfway = load_file(final), folder / "run" / "checkpoint-2" / "adapter_model.safetensors"
    shutil.rmtree(folder / "run" / "checkpoint-4")
    for scale, same in ((1, True), (2, False)):  # twice: a checkpoint that is another one shows
        save_file({name: scale * value for name, value in load_file(halfway).items()}, halfway)
        shutil.rmtree(folder / "run" / "final")
        train(recipe, folder / "run")
        shutil.rmtree(folder / "run" / "checkpoint-4")
        again = load_file(final)
        assert weights.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in weights.items()) == same


def test_an_adapter_does_not_go_on_over_another_base_or_beside_what_an_earlier_run_left(folder):
    part = {"base": str(folder / "base"), "adapter": {"r": 2}}
    whole = train(recipe_in(folder), folder / "run")
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    final = train(recipe_in(folder, model=part), folder / "run")
    assert final == whole and not (final / "config.json").exists()
    assert adapter_base(final) == str(folder / "base")
    digest = weights_digest(weight_files(folder / "base"))
    assert json.loads((final / "base.json").read_text()) == {"sha256": digest}
    before = fingerprint(final)
    weights = load_file(folder / "base" / "model.safetensors")
    weights["vision_head.weight"] += 1
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another `base`: .*1 differ"):
        train(recipe_in(folder, model=part), folder / "run")
    assert fingerprint(final) != before  # scores of the adapter on its old base are not those on the new one


def test_an_adapter_is_refused_where_it_is_not_made_for(folder):
    part = {"base": str(folder / "base"), "adapter": {"r": 2}}
    with pytest.raises(ValueError, match="Muon makes every direction.*optimizer.name: adamw"):
        recipe_in(folder, model=part, optimizer={"name": "muon", "muon_learning_rate": 1e-3})
    with pytest.raises(ValueError, match="`model.adapter` is to be on the visual experts.*`experts: all`"):
        recipe_in(folder, model=part).check_model(MarsConfig(use_visual_expert=False))


def test_an_adapter_finds_its_base_from_any_folder_and_is_no_base_itself(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(folder)
    final = train(recipe_in(folder, model={"base": "base", "adapter": {"r": 2}}), folder / "run")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert MarsForConditionalGeneration.from_pretrained(final).active_adapters() == ["default"]
    for model in ({"base": str(final)}, {"base": str(final), "adapter": {"r": 2}}):
        with pytest.raises(ValueError, match="is an adapter: what is trained beyond it would be in no checkpoint"):
            train(recipe_in(folder, model=model), folder / "next")


def test_a_model_without_visual_experts_takes_another_configuration(make_model, tiny_processor, tmp_path):
    make_model(use_visual_expert=False).save_pretrained(tmp_path / "plain")
    tiny_processor.save_pretrained(tmp_path / "plain")
    model, _ = build_model(ModelPart(base=str(tmp_path / "plain"), config={"default_image_size": 32}))
    assert model.config.default_image_size == 32 and model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_other_weights_than_the_base_has_are_refused(folder):
    recipe = recipe_in(folder, model={"base": str(folder / "base"), "config": {"expert_output_projection": True}})
    with pytest.raises(ValueError, match="asks for other weights than `model.base` has: .*visual_o_proj"):
        train(recipe, folder / "run")


def test_the_embedded_checkpoint_is_known_by_its_name_unless_a_folder_has_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    embedded = ModelPart(base="mars-emoji")
    assert embedded.found_base == DEFAULT_CHECKPOINT and ModelPart(base="me/mars").found_base == "me/mars"
    (folder / "base").rename(folder / "mars-emoji")
    assert embedded.found_base == Path("mars-emoji") and ModelPart(text="a", vqgan="b").found_base is None


def test_a_run_that_is_looked_at_is_the_same_run_with_losses_and_pictures(folder):
    plain = train(recipe_in(folder), folder / "plain")
    training = {**GOOD["training"], "eval_strategy": "steps", "eval_steps": 2, "dataloader_num_workers": 2}
    looks = {"split": "train", "num_batches": 2, "prompts": ["a", "b"], "width": 32, "height": 16}
    watched = train(recipe_in(folder, training=training, evaluation=looks), folder / "watched")
    mine, theirs = (MarsForConditionalGeneration.from_pretrained(at).state_dict() for at in (plain, watched))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    sheets = sorted((folder / "watched" / "samples").iterdir())
    assert [path.name for path in sheets] == ["step-000002.png", "step-000004.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 2 * 192
    state = json.loads((folder / "watched" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 4]
    with pytest.raises(ValueError, match="`training.eval_strategy` says how often"):
        recipe_in(folder, evaluation=looks)


def test_a_run_is_not_continued_by_another_recipe_or_on_other_data_unless_allowed(folder):
    train(recipe_in(folder), folder / "run")
    with pytest.raises(ValueError, match=r"another `recipe.seed`: 0 before, now 1"):
        train(recipe_in(folder, seed=1), folder / "run")
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet"))
    pairs.select(range(5)).to_parquet(folder / "pairs.parquet")
    with pytest.raises(ValueError, match=r"another `data.0.records`: 6 before, now 5 \(2 differ\)"):
        train(recipe_in(folder), folder / "run")
    pairs.map(lambda row: {"caption_en": 9 * row["caption_en"]}).to_parquet(folder / "pairs.parquet")
    with pytest.raises(ValueError, match=r"another `data.0.sha256`: .*\(1 differ\)"):
        train(recipe_in(folder), folder / "run")
    train(recipe_in(folder, seed=1), folder / "run", allow_changes=True)


def test_a_run_is_compared_with_its_checkpoints_and_told_by_one_process(tmp_path):
    recipe, facts, out = Recipe.load(written(tmp_path, GOOD)), {"processes": 2}, tmp_path / "run"
    check_resumption(recipe, out, facts, writes=False)
    assert not out.exists()
    check_resumption(recipe, out, facts)
    check_resumption(recipe, out, {"processes": 1})  # no step was made: this is another run
    assert json.loads((out / "run.json").read_text())["processes"] == 1
    (out / "checkpoint-2").mkdir()
    (out / "checkpoint-2" / "trainer_state.json").write_text("{}")
    for writes in (True, False):
        with pytest.raises(ValueError, match=r"another `processes`: 1 before, now 2"):
            check_resumption(recipe, out, facts, writes=writes)
    check_resumption(recipe, out, facts, allow_changes=True)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "run.json"]


def test_a_run_of_before_a_key_came_to_be_goes_on_with_its_default(tmp_path):
    recipe, facts, out = Recipe.load(written(tmp_path, GOOD)), {"processes": 1}, tmp_path / "run"
    check_resumption(recipe, out, facts)
    (out / "checkpoint-2").mkdir()
    (out / "checkpoint-2" / "trainer_state.json").write_text("{}")
    older = json.loads((out / "run.json").read_text())
    for part in (older["recipe"]["model"], older["recipe"]["loss"]):
        part.pop("adapter", None)
        part.pop("label_spread", None)
    (out / "run.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"another `recipe.loss.label_spread`: 0.0 before, now 0.5 \(1 differ\)"):
        check_resumption(replace(recipe, loss=replace(recipe.loss, label_spread=0.5)), out, facts)
    check_resumption(replace(recipe, about="told in other words", assume=AssumedPart(rows=3)), out, facts)
    now = json.loads((out / "run.json").read_text())
    now["recipe"]["model"]["gone"] = 1
    (out / "run.json").write_text(json.dumps(now))
    with pytest.raises(ValueError, match=r"`recipe.model.gone`: 1 before, now None"):
        check_resumption(recipe, out, facts)


def test_a_recipe_whose_first_batch_failed_is_mended_in_the_same_folder(folder, monkeypatch):
    def fail(*args):
        raise MemoryError("a batch of this size does not fit")

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(run.PackedCollator, "__call__", fail)
        train(recipe_in(folder, packing=128), folder / "run")
    assert json.loads((folder / "run" / "run.json").read_text())["recipe"]["packing"] == 128
    train(recipe_in(folder, packing=64), folder / "run")


@pytest.mark.integration
def test_two_processes_train_by_a_recipe_and_one_does_not_go_on_for_them(folder):
    recipe = recipe_in(folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, str(ROOT / "examples" / "train.py"), str(folder / "recipe.yaml"), "--out", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    MarsForConditionalGeneration.from_pretrained(folder / "run" / "final")
    with pytest.raises(ValueError, match=r"another `processes`: 2 before, now 1"):
        train(recipe, folder / "run")


def test_codes_of_enlarged_pictures_are_missed_only_by_a_model_that_embeds_them(folder, make_model):
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet"))
    pairs.remove_columns("enlarged_codes").to_parquet(folder / "older.parquet")
    part = DataPart(source=str(folder / "older.parquet"), task="super-resolution")
    fields = {"super_resolution_factor": 2, "cell_embedding": True, "max_grid_size": 8}
    assert len(build_source(part, make_model(**fields)).records) == 6
    with pytest.raises(ValueError, match="no `enlarged_codes`.*`mars-hf data encode --lowres-factor`"):
        build_source(part, make_model(**fields, lowres_embedding=True))


@pytest.mark.parametrize(
    ("source", "part", "message"),
    [
        ("pictures", {}, "no `image_codes`, which text-to-image .*: turn .*`mars-hf data encode`"),
        ("told", {"task": "documents"}, "no `segments.image_codes`.*`mars-hf data encode`"),
        ("pairs", {"task": "documents"}, "no `segments`, which documents"),
        ("stories", {}, "no `image_codes`"),
        ("plain", {"task": "super-resolution"}, "no `lowres_codes`.*`mars-hf data encode --lowres-factor`"),
        ("pairs", {"captions": {"form": "emoji"}}, "no `caption_zh`.*: take `captions: {form: records}`"),
        ("pairs", {"min_score": 0.5}, "no `score`.*: leave `min_score` out"),
        ("pairs", {"balance": 0.5}, "no `hexcode`.*: leave `balance` out"),
    ],
)
def test_columns_that_a_task_reads_are_missed_before_the_first_step(folder, tiny_model, source, part, message):
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet"))
    pairs.remove_columns("lowres_codes").to_parquet(folder / "plain.parquet")
    picture = Image.new("RGB", (16, 16))
    Dataset.from_list([{"image": picture, "caption_en": "a"}]).to_parquet(folder / "pictures.parquet")
    Dataset.from_list([{"segments": [{"text": "a", "image": None}]}]).to_parquet(folder / "told.parquet")
    values = {"task": "text-to-image", **part, "source": str(folder / f"{source}.parquet")}
    for streaming in [False] if "balance" in part else [False, True]:
        with pytest.raises(ValueError, match=message):
            build_source(DataPart(**values, streaming=streaming), tiny_model)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [({"max_caption_length": 3}, {"a r", "红苹果"}), ({"max_caption_length": 3, "long_captions": "drop"}, {"红苹果"})],
)
def test_captions_that_are_fed_keep_the_limit(folder, tiny_model, rule, expected):
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet")).remove_columns("caption_en")
    pairs = pairs.add_column("caption_en", ["a red apple"] * 6).add_column("caption_zh", ["红苹果"] * 6)
    pairs.to_parquet(folder / "pairs.parquet")
    source = build_source(DataPart(str(folder / "pairs.parquet"), "captioning", **rule), tiny_model)
    rng = random.Random(0)
    assert {source.write_caption(record, rng) for record in source.records for _ in range(9)} == expected
    assert source.bad_records.num_long_captions == 6 and not source.bad_records.reasons


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_model_is_built_of_the_language_model_that_the_folder_holds(
    make_text_model, make_vqgan, tiny_processor, tmp_path, family
):
    ids = {"eos_token_id": 256, "pad_token_id": 256}
    text = make_text_model(family, vocab_size=264, max_position_embeddings=256, **ids)
    text.save_pretrained(tmp_path / "text")
    plain = {token: number for token, number in tiny_processor.tokenizer.get_vocab().items() if number < 256}
    Qwen2Tokenizer(vocab={**plain, "<|endoftext|>": 256}, merges=[]).save_pretrained(tmp_path / "text")
    make_vqgan().save_pretrained(tmp_path / "vqgan")
    parts = {"text": str(tmp_path / "text"), "vqgan": str(tmp_path / "vqgan")}
    model, processor = build_model(ModelPart(**parts))
    assert processor.image_processor.image_mean == processor.image_processor.image_std == (0.5, 0.5, 0.5)
    assert model.config.text_config.model_type == family and model.generation_config.eos_token_id == [256]
    text.generation_config.eos_token_id = 9  # the end of a turn, as chats have it
    text.save_pretrained(tmp_path / "chat")
    Qwen2Tokenizer(vocab={**plain, "<|endoftext|>": 256}, merges=[]).save_pretrained(tmp_path / "chat")
    chat, _ = build_model(ModelPart(text=str(tmp_path / "chat"), vqgan=parts["vqgan"]))
    assert chat.generation_config.eos_token_id == [9, 256]
    words = torch.arange(40, 50)[None]
    with torch.no_grad():
        assert torch.allclose(model(words).logits[..., :264], text(words).logits, atol=1e-5)

    looks_up = make_vqgan()
    looks_up.register_to_config(lookup_from_codebook=True)
    looks_up.save_pretrained(tmp_path / "looks-up")
    _, unit = build_model(ModelPart(**{**parts, "vqgan": str(tmp_path / "looks-up")}))
    assert (unit.image_processor.image_mean, unit.image_processor.image_std) == ((0.0,) * 3, (1.0,) * 3)
    assert unit.image_processor.size == processor.image_processor.size

    rounded, _ = build_model(ModelPart(**parts, frozen_dtype="bfloat16"))
    frozen = {name: weight for name, weight in rounded.named_parameters() if not weight.requires_grad}
    assert {weight.dtype for weight in frozen.values()} == {torch.float32}
    assert all(torch.equal(weight, model.get_parameter(name).bfloat16().float()) for name, weight in frozen.items())


def test_records_that_do_not_fit_are_refused_before_the_first_step(folder):
    bad = {"image_codes": [[99] * 16], "height": [16], "width": [16], "caption_en": ["a"]}
    Dataset.from_dict(bad).to_parquet(folder / "pairs.parquet")
    with pytest.raises(ValueError, match="broken"):
        train(recipe_in(folder), folder / "run")


def test_an_epoch_shows_every_pair_once_however_many_tasks_it_has(folder):
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 2}
    source = {"source": str(folder / "pairs.parquet")}
    data = [{**source, "task": "text-to-image"}, {**source, "task": "captioning"}]
    trainer, _ = make_trainer(recipe_in(folder, training=training, data=data), folder / "run")
    assert trainer.args.max_steps == 6 and len(trainer.train_dataset) == 12
    shown = [trainer.train_dataset.record_of(index)["caption_en"] for index in range(12)]
    assert sorted(shown[:6]) == sorted(shown[6:]) == list("abcdef")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_left_out_of_a_stream_is_told_once_by_the_process_that_reads_it(folder, workers):
    handler = logging.FileHandler(folder / "log")  # which a worker writes to, too
    sources.logger.addHandler(handler)
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet")).add_column("score", [0.1, 0.9, 0.9, 0.9, 0.9, 0.9])
    pairs.to_parquet(folder / "pairs.parquet")
    source = {"source": str(folder / "pairs.parquet"), "streaming": True, "min_score": 0.5}
    data = [{**source, "task": "text-to-image"}, {**source, "task": "captioning"}]
    training = {**GOOD["training"], "dataloader_num_workers": workers}
    try:
        train(recipe_in(folder, data=data, training=training), folder / "run")
    finally:
        sources.logger.removeHandler(handler)
        handler.close()
    told = [line for line in (folder / "log").read_text().splitlines() if "score too low" in line]
    assert len(told) == 1 and "pairs.parquet" in told[0] and "records were left out" in told[0]


def test_records_can_be_read_on_the_way_and_what_is_left_out_is_told_at_the_end(folder, monkeypatch):
    said = []
    monkeypatch.setattr(sources.logger, "warning", said.append)
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet")).add_column("score", [0.1, 0.9, 0.9, 0.9, 0.9, 0.9])
    pairs.to_parquet(folder / "pairs.parquet")
    source = {"source": str(folder / "pairs.parquet"), "task": "text-to-image", "streaming": True}
    final = train(recipe_in(folder, data=[{**source, "min_score": 0.5}], packing=64), folder / "run")
    MarsForConditionalGeneration.from_pretrained(final)
    assert [text for text in said if "score too low" in text and "pairs.parquet" in text and "left out" in text]
    with pytest.raises(ValueError, match="set `training.max_steps`"):
        training = {"num_train_epochs": 1, "per_device_train_batch_size": 2}
        make_trainer(recipe_in(folder, data=[source], training=training), folder / "epochs")
    with pytest.raises(ValueError, match="as a stream, whose records cannot be balanced"):
        recipe_in(folder, data=[{**source, "balance": 0.5}])


@pytest.mark.parametrize("changes", [{"packing": 64}, {"streaming": True}, {}])
def test_a_finished_run_is_not_trained_on_when_its_line_is_repeated(folder, changes):
    data = [{"source": str(folder / "pairs.parquet"), "task": "text-to-image", "streaming": "streaming" in changes}]
    training = {**GOOD["training"], "lr_scheduler_type": "constant"}  # the last rate is not 0
    packing = {name: value for name, value in changes.items() if name == "packing"}
    recipe = recipe_in(folder, data=data, training=training, **packing)
    final = train(recipe, folder / "run") / "model.safetensors"
    weights, kept = load_file(final), sorted(path.name for path in (folder / "run").iterdir())
    assert train(recipe, folder / "run") == final.parent
    again = load_file(final)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert sorted(path.name for path in (folder / "run").iterdir()) == kept


def test_a_packed_run_goes_on_from_the_window_where_it_stopped(folder, monkeypatch):
    class Small(PackedStream):
        def __init__(self, rows, config, max_length):
            super().__init__(rows, config, max_length, window=8)

    monkeypatch.setattr(run, "PackedStream", Small)
    training = {**GOOD["training"], "max_steps": 12, "save_steps": 6}
    recipe = recipe_in(folder, training=training, packing=64, optimizer={"learning_rate": 1e-2})
    final = train(recipe, folder / "run") / "model.safetensors"
    weights = load_file(final)
    number, before = json.loads((folder / "run" / "checkpoint-6" / WINDOW).read_text())
    assert number > 0 and 0 < before < 12  # packs: two a step
    shutil.rmtree(folder / "run" / "checkpoint-12")
    written, write_row = [], MixtureStream.write_row
    monkeypatch.setattr(
        MixtureStream, "write_row", lambda self, index, row: written.append(index) or write_row(self, index, row)
    )
    train(recipe, folder / "run")
    assert written[0] == 8 * number
    again = load_file(final)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_a_schedule_that_is_longer_than_the_run_is_refused(folder):
    decay = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}}
    with pytest.raises(ValueError, match="The run has 4 steps, fewer .*: 1 of warm-up, 0 stable, 4 of decay"):
        train(recipe_in(folder, training={**GOOD["training"], **decay, "warmup_steps": 0.25}), folder / "run")
    make_trainer(recipe_in(folder, training={**GOOD["training"], **decay}), folder / "run")


def test_training_data_are_not_taken_for_held_out_ones(folder):
    training = {**GOOD["training"], "eval_strategy": "steps"}
    recipe = recipe_in(folder, training=training, evaluation={"split": "test"})
    with pytest.raises(ValueError, match="pairs.parquet is all of it, whatever the split.*evaluation: .split: train."):
        train(recipe, folder / "run")


def test_stage_one_takes_pictures_of_one_size(folder):
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet")).to_list()
    pairs[3] |= {"image_codes": pairs[3]["image_codes"][:8], "height": 8}
    Dataset.from_list(pairs).to_parquet(folder / "pairs.parquet")
    with pytest.raises(
        ValueError, match="of one size; those of .* are 8 to 16 pixels high and 16 to 16 wide.*refinem"
    ):
        train(recipe_in(folder), folder / "run")
    train(recipe_in(folder, stage="refinement"), folder / "run")


def test_a_configuration_and_a_revision_of_hub_data_are_asked_for(folder, tiny_model, monkeypatch):
    asked, opened = [], sources.open_records

    def open_records(*arguments, **options):
        asked.append(options)
        return opened(*arguments)

    monkeypatch.setattr(sources, "open_records", open_records)
    part = {"source": str(folder / "pairs.parquet"), "task": "text-to-image"}
    build_source(DataPart(**part, name="faces", revision="v2"), tiny_model)
    build_source(DataPart(**part), tiny_model)
    assert asked == [{"name": "faces", "revision": "v2"}, {}]


def test_a_short_stream_with_too_many_faults_ends_the_run_after_its_first_pass(folder):
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet")).to_list()
    pairs[2]["image_codes"] = [99] * 16
    Dataset.from_list(pairs).to_parquet(folder / "pairs.parquet")
    data = [{"source": str(folder / "pairs.parquet"), "task": "text-to-image", "streaming": True}]
    with pytest.raises(ValueError, match="More than 1.0% of the data are broken: 1 of 6 records"):
        train(recipe_in(folder, data=data), folder / "run")


def test_what_cannot_be_compiled_is_told(folder, monkeypatch):
    said = []
    monkeypatch.setattr(run.logger, "warning", said.append)
    make_trainer(recipe_in(folder, packing=64), folder / "run", compile_pictures=True)
    assert any("`--compile` has no effect with `packing`" in text for text in said)


def test_packs_of_an_epoch_hold_every_pair_once(folder):
    training = {"num_train_epochs": 4, "per_device_train_batch_size": 2}
    trainer, _ = make_trainer(recipe_in(folder, training=training, packing=64), folder / "run")
    packs = list(islice(trainer.train_dataset, 2 * trainer.args.max_steps))
    shown = Counter(tuple(code for code in row["labels"] if code >= 0) for pack in packs for row in pack)
    # A pack has room for two of these rows, so that 24 rows are twelve packs, six steps.
    assert trainer.args.max_steps == 6 and {len(pack) for pack in packs} == {2}
    assert len(shown) == 6 and set(shown.values()) == {4}
    again = list(islice(trainer.train_dataset, 2 * trainer.args.max_steps))
    assert again == packs
