"""Recipes: what is refused before anything is loaded, and a run from a file to a finished model."""

import copy
import json
from collections import Counter
from itertools import islice

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image

from mars_hf import MarsForConditionalGeneration, MarsProcessor
from mars_hf.modeling_mars import is_visual_parameter
from mars_hf.training.recipe import RECIPES, STAGES, Recipe
from mars_hf.training.run import make_trainer, train

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


def test_the_papers_numbers_stand_in_its_recipes():
    for name in ("stage1", "stage2", "stage3"):
        optimizer = Recipe.load(f"paper/{name}").optimizer
        assert (optimizer.name, optimizer.adam_beta2, optimizer.weight_decay) == ("adamw", 0.95, 0.1)
        assert optimizer.learning_rate == 1e-4
    assert [Recipe.load(f"paper/stage{n}").training["num_train_epochs"] for n in (1, 2, 3)] == [1, 2, 1]
    assert {"alignment", "refinement", "super-resolution", "documents"} == set(STAGES)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["stages"], 1, "`stages` is no key.*Did you mean `stage`"),
        (["stage"], "alinement", "`stage` must be one of alignment.*'alinement'"),
        (["training", "learning_rte"], 1, r"training\.learning_rte.*no key"),
        (["training", "num_train_epochs"], 1, "`max_steps` or `num_train_epochs`, and not both"),
        (["training", "seed"], 1, "`training.seed` is set elsewhere"),
        (["model", "text"], "text", "either `base`.*or both `text` and `vqgan`"),
        (["loss"], {"scope": "codes"}, "`loss.scope` must be one of joint, grammar, got 'codes'"),
        (["optimizer"], {"name": "muon"}, "muon_learning_rate` goes with"),
        (["optimizer"], {"learning_rate": "fast"}, "`optimizer.learning_rate`"),
        (["data"], [], "at least one source"),
        (["data", 0, "task"], "drawing", "`data.task` must be one of.*'drawing'"),
        (["data", 0, "shares"], 0.5, r"`data\[0\].shares` is no key.*`share`"),
        (["codes_per_step"], "4", "`codes_per_step`"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_the_place(tmp_path, path, value, message):
    with pytest.raises(ValueError, match=message):
        Recipe.load(written(tmp_path, changed(path, value)))


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
    pairs["lowres_codes"] = [row[:4] for row in codes]
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
    "super-resolution": {"model": {"config": {**ENLARGE, "codes_per_step": [4, 1]}}, "codes_per_step": [4, 1]},
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
    assert moved and all(is_visual_parameter(name) for name in moved)
    assert processor.code_order == model.config.code_order
    assert processor.super_resolution_factor == model.config.super_resolution_factor
    assert model.config.trained_codes_per_step == ([4, 1] if stage == "super-resolution" else [1])
    log = json.loads((folder / "run" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]


def test_other_weights_than_the_base_has_are_refused(folder):
    recipe = recipe_in(folder, model={"base": str(folder / "base"), "config": {"expert_output_projection": True}})
    with pytest.raises(ValueError, match="asks for other weights than `model.base` has: .*visual_o_proj"):
        train(recipe, folder / "run")


def test_a_run_that_is_looked_at_is_the_same_run_with_losses_and_pictures(folder):
    plain = train(recipe_in(folder), folder / "plain")
    training = {**GOOD["training"], "eval_strategy": "steps", "eval_steps": 2}
    looks = {"split": "test", "num_batches": 2, "prompts": ["a", "b"], "width": 32, "height": 16}
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


def test_a_run_is_not_continued_by_another_recipe_unless_allowed(folder):
    train(recipe_in(folder), folder / "run")
    with pytest.raises(ValueError, match=r"another `recipe.seed`: 0 before, now 1"):
        train(recipe_in(folder, seed=1), folder / "run")
    train(recipe_in(folder, seed=1), folder / "run", allow_changes=True)


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


def test_records_can_be_read_on_the_way(folder):
    source = {"source": str(folder / "pairs.parquet"), "task": "text-to-image", "streaming": True}
    final = train(recipe_in(folder, data=[source], packing=64), folder / "run")
    MarsForConditionalGeneration.from_pretrained(final)
    with pytest.raises(ValueError, match="set `training.max_steps`"):
        training = {"num_train_epochs": 1, "per_device_train_batch_size": 2}
        make_trainer(recipe_in(folder, data=[source], training=training), folder / "epochs")
    with pytest.raises(ValueError, match="as a stream, whose records cannot be balanced"):
        recipe_in(folder, data=[{**source, "balance": 0.5}])


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
