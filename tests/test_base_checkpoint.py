"""Checkpoints that are stored against a base."""

import json
import os
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, pipeline
from transformers.generation import BaseStreamer
from typer.testing import CliRunner

from mars_hf import MarsConfig, MarsForConditionalGeneration, MarsPipeline, MarsProcessor, hub
from mars_hf.cli import app
from mars_hf.data.encode import load_image_tokenizer
from mars_hf.data.records import tokenizer_fingerprint
from mars_hf.modeling_mars import is_visual_parameter
from mars_hf.studio import Studio
from mars_hf.super_resolution_mars import Enlarger
from mars_hf.training.run import with_other_config


@pytest.fixture
def pair(tmp_path, tiny_model, tiny_processor):
    """A base, and inside its folder a model of super-resolution that was trained from it; its weights beside it."""
    base = hub.export_checkpoint(tiny_model, tiny_processor, tmp_path / "base")
    changes = {"super_resolution_factor": 2, "cell_embedding": True, "max_grid_size": 8, "codes_per_step": [4, 1]}
    larger, processor = with_other_config(tiny_model, tiny_processor, changes)
    for name, parameter in larger.named_parameters():
        if is_visual_parameter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    larger.generation_config.image_defaults = {"temperature": 0.5}
    folder = hub.export_checkpoint(larger, processor, base / "super_resolution")
    whole = hub.export_checkpoint(larger, processor, tmp_path / "whole")
    hub.store_against_base(folder, base)
    return base, folder, whole


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_only_what_differs_is_stored_and_all_of_it_is_loaded(pair):
    base, folder, whole = pair
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == {name for name in load_file(whole / "model.safetensors") if is_visual_parameter(name)}
    expected = MarsForConditionalGeneration.from_pretrained(whole)
    for loaded in (
        MarsForConditionalGeneration.from_pretrained(folder),
        MarsForConditionalGeneration.from_pretrained(base, subfolder="super_resolution"),
        AutoModel.from_pretrained(folder, trust_remote_code=True),
    ):
        theirs = expected.state_dict()
        assert loaded.state_dict().keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
        assert loaded.generation_config.image_defaults == {"temperature": 0.5}
        assert loaded.config.super_resolution_factor == 2 and loaded.config.base_checkpoint is None
        assert not loaded.text_head.weight.requires_grad and loaded.vision_head.weight.requires_grad


def test_an_export_carries_the_model_of_super_resolution_along(pair, tmp_path):
    base, _, whole = pair
    for name, source, options in (
        ("as it is", base, {}),
        ("rounded", base, {"weights_dtype": "bfloat16", "separate_frozen": True}),
        ("put together", base, {"super_resolution": whole, "weights_dtype": "bfloat16"}),
    ):
        out = hub.export_folder(source, tmp_path / name, **options)
        stored = load_file(out / "super_resolution" / "model.safetensors")
        assert all(is_visual_parameter(key) for key in stored)
        ours = Enlarger.of(out, dtype=torch.float32).model.state_dict()
        for key, value in MarsForConditionalGeneration.from_pretrained(whole).state_dict().items():
            assert torch.equal(ours[key], value.bfloat16().float() if options else value)
        assert not list((out / "super_resolution").glob("*.py")) and (out / "handler.py").is_file()


def test_a_folder_that_enlarges_nothing_or_belongs_to_others_is_not_carried_along(pair, tmp_path):
    base, folder, whole = pair
    with pytest.raises(ValueError, match="draws from text alone"):
        hub.export_folder(base, tmp_path / "out", super_resolution=base)
    with pytest.raises(ValueError, match="stored against other weights"):
        hub.export_folder(whole, tmp_path / "out", super_resolution=folder)
    assert not (tmp_path / "out").exists()


def test_what_holds_only_a_difference_is_not_exported_alone(pair, tmp_path):
    _, folder, _ = pair
    with pytest.raises(ValueError, match="holds only what differs from its base. Export the base"):
        hub.export_folder(folder, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_what_else_a_repository_holds_comes_of_the_same_revision(pair, monkeypatch):
    base, _, _ = pair
    asked = {}
    model = MarsForConditionalGeneration.from_pretrained(base, revision="v1", local_files_only=True)
    pipe = MarsPipeline(model=model, processor=MarsProcessor.from_pretrained(base))
    found = Enlarger.of(base)
    monkeypatch.setattr(Enlarger, "of", lambda name, **options: asked.update(options) or found)
    pipe("a pear", super_resolution=True, height=16, width=16)
    assert asked == {"dtype": torch.float32, "revision": "v1", "local_files_only": True}


def test_a_picture_that_a_camera_turned_is_enlarged_upright(pair):
    _, folder, _ = pair
    enlarger = Enlarger.of(folder)
    upright = Image.effect_noise((8, 16), 90).convert("RGB")
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    file = BytesIO()
    turned.save(file, "PNG", exif=exif)
    large = enlarger.upscale(Image.open(file), "a pear", do_sample=False)
    assert large.size == (16, 32)
    assert large.tobytes() == enlarger.upscale(upright, "a pear", do_sample=False).tobytes()


def test_an_enlargement_stops_with_the_drawing_that_it_follows(pair):
    base, _, _ = pair
    studio = Studio.open(base)
    drawer = studio.drawer(super_resolution=True)
    steps = []

    class Stops(BaseStreamer):
        """Is cancelled in the middle of the enlargement."""

        cancelled = False

        def put(self, value):
            steps.append(value)

        def end(self):
            drawer.enlarger.model.register_forward_pre_hook(self.hear)

        def hear(self, module, inputs):
            steps.append("large")
            self.cancelled = steps.count("large") > 2

    assert drawer.draw(["a pear"], [3], streamer=Stops()) == [] and steps.count("large") == 3


def test_what_was_loaded_is_saved_complete(pair, tmp_path):
    model = MarsForConditionalGeneration.from_pretrained(pair[1], dtype=torch.float64)
    assert model.dtype == torch.float64
    model.save_pretrained(tmp_path / "saved")
    again = MarsForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert MarsConfig.from_pretrained(tmp_path / "saved").base_checkpoint is None


@pytest.mark.parametrize("moment", range(6))
def test_storing_against_a_base_can_be_killed_at_any_moment(pair, monkeypatch, moment):
    base, _, whole = pair
    folder = shutil.copytree(whole, base / "again")
    hub._separate_frozen(folder)
    moments, original = iter(range(9)), (os.replace, type(folder).unlink)

    def killed(number):
        def step(*args, **kwargs):
            if next(moments) == moment:
                raise KeyboardInterrupt
            return original[number](*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed(0)), patch.setattr(type(folder), "unlink", killed(1))
        try:
            hub.store_against_base(folder, base)
        except KeyboardInterrupt:
            assert moment < 5  # the configuration, the weights, the index and two shards
        else:
            assert moment == 5
    expected = MarsForConditionalGeneration.from_pretrained(whole).state_dict()
    loaded = MarsForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_the_image_tokenizer_of_a_difference_is_that_of_its_base(pair):
    base, folder, _ = pair
    assert len({tokenizer_fingerprint(load_image_tokenizer(one)[0]) for one in (base, folder)}) == 1


def test_another_base_is_refused(pair, tiny_model):
    base, folder, _ = pair
    tiny_model.save_pretrained(base)  # trained on, since
    with torch.no_grad():
        tiny_model.vision_head.weight.add_(1)
    tiny_model.save_pretrained(base)
    with pytest.raises(ValueError, match="stored against other weights.*expected the sha256"):
        MarsForConditionalGeneration.from_pretrained(folder)


def test_a_folder_outside_its_base_or_without_common_weights_is_refused(pair, tmp_path, make_model, tiny_processor):
    base, _, whole = pair
    with pytest.raises(ValueError, match="must lie inside"):
        hub.store_against_base(whole, base)
    with torch.no_grad():
        other = make_model(text={"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 256})
        for tensor in other.state_dict().values():
            tensor.copy_(torch.randn_like(tensor.float()))
    folder = hub.export_checkpoint(other, tiny_processor, base / "other")
    with pytest.raises(ValueError, match="no tensor in common"):
        hub.store_against_base(folder, base)


def test_a_base_outside_the_repository_is_refused(pair, monkeypatch, tmp_path):
    from mars_hf import weights_mars

    config = json.loads((pair[1] / "config.json").read_text())
    with pytest.raises(ValueError, match="outside its repository"):
        weights_mars.complete_weights(
            "someone/mars", {**config["base_checkpoint"], "path": "../.."}, "super_resolution"
        )


def test_a_pipeline_draws_larger_with_what_the_folder_carries(pair, tiny_processor):
    base, folder, _ = pair
    pipe = pipeline("text-to-image", model=str(base), trust_remote_code=True)
    call = {"height": 16, "width": 16, "guidance_scale": 2.0, "do_sample": True, "num_images_per_prompt": 2, "seed": 5}
    drawn = pipe(["a pear", "an apple"], super_resolution=True, **call)
    assert [[one["generated_image"].size for one in row] for row in drawn] == [[(32, 32)] * 2] * 2

    model = MarsForConditionalGeneration.from_pretrained(base)
    enlarger = Enlarger.of(base)
    assert enlarger.factor == 2 and Enlarger.of(folder).factor == 2
    inputs = MarsProcessor.from_pretrained(base)("an apple", height=16, width=16)
    chance = torch.Generator().manual_seed(5)
    options = {"guidance_scale": 2.0, "do_sample": True, "num_return_sequences": 2, "generator": chance}
    small = model.generate(**inputs, generation_mode="image", **options)
    grids = [row[0] for row in model.collect_image_codes(small, inputs["image_sizes"])]
    pixels = enlarger(["an apple"], grids, generator=chance)
    expected = enlarger.processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert [np.asarray(one["generated_image"]).tolist() for one in drawn[1]] == [
        np.asarray(p).tolist() for p in expected
    ]
    with pytest.raises(ValueError, match="3 pictures cannot be shared out among 2 captions"):
        enlarger(["a", "b"], [*grids, grids[0]])


def test_a_folder_without_a_model_of_super_resolution_is_refused(tmp_path, tiny_model, tiny_processor):
    base = hub.export_checkpoint(tiny_model, tiny_processor, tmp_path / "base")
    pipe = pipeline("text-to-image", model=str(base), trust_remote_code=True)
    with pytest.raises(ValueError, match="no folder `super_resolution`"):
        pipe("a pear", super_resolution=True)
    in_memory = MarsPipeline(model=tiny_model, processor=tiny_processor)
    with pytest.raises(ValueError, match="loaded from a folder"):
        in_memory("a pear", super_resolution=True)


def test_the_command_line_and_the_studio_draw_larger(pair, tmp_path):
    base, folder, _ = pair
    large = tmp_path / "large.png"
    done = run("generate", "a pear", "--model", base, "--out", large, "--seed", 3, "--super-resolution", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["super_resolution"] == 2
    studio = Studio.open(base)
    (again,) = studio.drawer(super_resolution=True).draw(["a pear"], [3])
    with Image.open(large) as picture:
        assert picture.size == (32, 32) and picture.tobytes() == again.tobytes()
        picture.resize((15, 17)).save(tmp_path / "small.png")
    for model in (base, folder):
        done = run(
            "upscale", tmp_path / "small.png", "--caption", "a pear", "--model", model, "--out", large, "--json"
        )
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["size"] == "32x32"
    shutil.rmtree(folder)
    for command in (["generate", "a pear", "--super-resolution"], ["upscale", large, "--caption", "a pear"]):
        done = run(*command, "--model", base, "--out", tmp_path / "none.png")
        assert done.exit_code == 2 and "carries no model of super-resolution" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("mars-hf: ")
