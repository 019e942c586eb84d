"""Evaluations from their configuration to their tables: what is drawn, kept, continued, refused and reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from evaluators import COLOURS, ColourClip, save_blip, save_clip, save_detector, save_segmenter
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from mars_hf import DEFAULT_CHECKPOINT
from mars_hf.cli import app
from mars_hf.evaluation.config import RunConfig, load_config
from mars_hf.evaluation.drawing import Drawer, References
from mars_hf.evaluation.evaluate import Evaluation, evaluate
from mars_hf.evaluation.pictures import PictureFolder, Task, picture_seed
from mars_hf.evaluation.prompts import CocoPrompts, EmojiPrompts, JsonlPrompts, Prompt, PromptSet
from mars_hf.evaluation.provenance import fingerprint
from mars_hf.evaluation.results import paper_table

KNOBS = {"guidance_scale", "guidance_schedule", "guidance_interval", "do_sample", "temperature", "top_k", "top_p"}
KNOBS |= {"min_p", "codes_per_step", "code_order", "negative_prompt", "height", "width", "dtype", "seed", "versions"}


def process(index: int = 0, count: int = 1) -> SimpleNamespace:
    state = {"process_index": index, "num_processes": count, "is_main_process": index == 0}
    return SimpleNamespace(**state, device=torch.device("cpu"), wait_for_everyone=lambda: None)


def prompt_set(count: int) -> PromptSet:
    return PromptSet("test", [Prompt(f"p{i}", f"{list(COLOURS)[i % 7]} apple {i}") for i in range(count)])


def read_pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: np.asarray(Image.open(file)).tobytes() for file in sorted(folder.rglob("*.png"))}


@pytest.fixture
def drawer(tiny_model, tiny_processor) -> Drawer:
    run = RunConfig(guidance_scale=2.0, do_sample=True, top_k=5, temperature=2.0)
    return Drawer(tiny_model, tiny_processor, run, 16, 16)


def test_pictures_do_not_depend_on_shards_batches_or_processes(tmp_path: Path, drawer: Drawer) -> None:
    prompts = prompt_set(7)
    alone = PictureFolder(tmp_path / "alone", prompts, 2, seed=5, shard_size=7)
    alone.settle({}, {})
    alone.draw(drawer, process(), batch_size=14, progress=False)
    shared = PictureFolder(tmp_path / "shared", prompts, 2, seed=5, shard_size=2)
    shared.settle({}, {})
    for index in (1, 0):
        shared.draw(drawer, process(index, 2), batch_size=3, progress=False)
    pictures = read_pictures(tmp_path / "alone")
    assert len(set(pictures.values())) == 14 and pictures == read_pictures(tmp_path / "shared")
    metadata = (shared.shard(1) / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in metadata] == [f"{n:06d}-{s}.png" for n in (2, 3) for s in (0, 1)]


def test_the_manifest_holds_what_draws_a_picture_again(tmp_path: Path, drawer: Drawer) -> None:
    folder = PictureFolder(tmp_path / "run", prompt_set(3), 2, seed=5, shard_size=2)
    folder.settle(drawer.settings(), {})
    folder.draw(drawer, process(), batch_size=4, progress=False)
    settings = json.loads((folder.path / "settings.json").read_text())["decided_by"]
    row = json.loads((folder.shard(1) / "metadata.jsonl").read_text().splitlines()[1])
    assert row["prompt"] == "blue apple 2" and row["seed"] == picture_seed(5, "p2", 1)
    assert KNOBS - {"versions"} <= settings.keys() and settings["top_p"] == 1.0  # also what nobody asked for
    inputs = drawer.processor(row["prompt"], height=settings["height"], width=settings["width"], return_tensors="pt")
    knobs = {name: settings[name] for name in KNOBS - {"height", "width", "dtype", "seed", "versions"}}
    knobs = {name: value for name, value in knobs.items() if value is not None}
    generator = torch.Generator().manual_seed(row["seed"])
    codes = drawer.model.generate(**inputs, generation_mode="image", generator=generator, **knobs)
    pixels = drawer.model.decode_image_tokens(codes, inputs["image_sizes"])
    (again,) = drawer.processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert np.array_equal(again, Image.open(folder.shard(1) / row["file_name"]))


def test_knobs_come_from_the_run_then_the_checkpoint_then_the_library(tiny_model, tiny_processor) -> None:
    tiny_model.generation_config.image_defaults = {"do_sample": True, "temperature": 0.5, "guidance_scale": 3.0}
    sampling = Drawer(tiny_model, tiny_processor, RunConfig(temperature=0.9), 16, 16).sampling
    assert (sampling["temperature"], sampling["guidance_scale"], sampling["top_k"]) == (0.9, 3.0, 50)
    greedy = Drawer(tiny_model, tiny_processor, RunConfig(do_sample=False), 16, 16).sampling
    assert greedy["do_sample"] is False and greedy["temperature"] is None and greedy["top_k"] is None
    tiny_model.generation_config.image_defaults = {}
    asked = [Drawer(tiny_model, tiny_processor, run, 16, 16).sampling for run in (RunConfig(top_k=9), RunConfig())]
    assert [one["do_sample"] for one in asked] == [True, False] and asked[0]["top_k"] == 9
    every = Drawer(tiny_model, tiny_processor, RunConfig(top_k=0), 16, 16).sampling
    assert every["do_sample"] is True and every["top_k"] == 0


def test_an_interrupted_run_draws_only_what_is_missing(tmp_path: Path) -> None:
    folder, drawn = PictureFolder(tmp_path, prompt_set(6), 1, seed=0, shard_size=2), []

    def make(tasks):
        drawn.extend(task.number for task in tasks)
        if drawn == [0, 1, 2]:
            raise KeyboardInterrupt
        return [Image.new("RGB", (4, 4)) for _ in tasks]

    folder.settle({}, {})
    with pytest.raises(KeyboardInterrupt):
        folder.draw(make, process(), batch_size=1, progress=False)
    assert [path.name for path in tmp_path.glob("0*")] == ["00000-of-00003"]  # no half shard
    folder.settle({}, {"batch_size": 5})
    folder.draw(make, process(), batch_size=1, progress=False)
    assert drawn == [0, 1, 2, 2, 3, 4, 5]
    calls = []
    for _ in range(2):
        folder.measure(
            "name", lambda p, t: torch.tensor([calls.append(x.number) or x.number for x in t]), process(), 4
        )
    assert calls == list(range(6)) and folder.measured("name").flatten().tolist() == list(range(6))


def test_a_folder_with_other_pictures_is_refused_and_a_damaged_picture_is_named(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "run", prompt_set(2), 1, seed=0, shard_size=2)
    folder.settle({"top_k": 4}, {})
    folder.settle({"top_k": 5}, {})  # corrected before there is a picture
    folder.shard(0).mkdir()
    with pytest.raises(ValueError, match="drawn with top_k = 5, but now it is 6"):
        folder.settle({"top_k": 6}, {})
    with pytest.raises(ValueError, match="drawn with num_prompts = 2, but now it is 3"):
        PictureFolder(tmp_path / "run", prompt_set(3), 1, seed=0, shard_size=2).settle({"top_k": 5}, {})
    folder.shard(0).rmdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").touch()
    with pytest.raises(ValueError, match="holds no pictures of an evaluation"):
        PictureFolder(tmp_path / "own", prompt_set(2), 1, seed=0, shard_size=2).settle({}, {})
    folder.draw(lambda tasks: [Image.new("RGB", (4, 4)) for _ in tasks], process(), 2, progress=False)
    (folder.shard(0) / "000001-0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="000001-0.png cannot be read.*Remove the folder"):
        folder.measure("name", lambda p, t: torch.zeros(len(t)), process(), 2, progress=False)


def test_other_versions_are_refused_only_where_pictures_are_missing(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path, prompt_set(4), 1, seed=0, shard_size=2)
    folder.settle({"versions": {"torch": "1"}}, {})
    folder.draw(lambda tasks: [Image.new("RGB", (4, 4)) for _ in tasks], process(0, 2), 2, progress=False)
    with pytest.raises(ValueError, match="drawn with versions"):
        folder.settle({"versions": {"torch": "2"}}, {})
    folder.draw(lambda tasks: [Image.new("RGB", (4, 4)) for _ in tasks], process(1, 2), 2, progress=False)
    folder.settle({"versions": {"torch": "2"}}, {})
    assert json.loads((tmp_path / "settings.json").read_text())["decided_by"]["versions"] == {"torch": "1"}
    with pytest.raises(ValueError, match="drawn with top_k = None, but now it is 6"):
        folder.settle({"versions": {"torch": "2"}, "top_k": 6}, {})


@pytest.mark.parametrize(
    "run, size, message",
    [
        (RunConfig(codes_per_step=4), (16, 16), "not trained to draw 4 codes a step, only 1"),
        (RunConfig(guidance_schedule="steep"), (16, 16), "must be one of constant, linear, cosine, got 'steep'"),
        (RunConfig(), (16, 18), "must be multiples of 4, got 16 and 18"),
    ],
)
def test_what_the_checkpoint_cannot_draw_is_refused_first(tiny_model, tiny_processor, run, size, message) -> None:
    with pytest.raises(ValueError, match=message):
        Drawer(tiny_model, tiny_processor, run, *size)


def test_true_pictures_are_cut_around_their_middle() -> None:
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste((255, 0, 0), (15, 0, 45, 20))  # what is kept, and a rim for the resampling
    references = References(PromptSet("test", [Prompt("0", "red")], lambda number: wide), 8, 8)
    (cut,) = references([Task(Prompt("0", "red"), 0, 0, 0)])
    assert cut.size == (8, 8) and np.asarray(cut).reshape(-1, 3).min(0).tolist()[0] == 255
    assert np.asarray(cut)[..., 1:].max() == 0


def test_a_checkpoints_hash_follows_its_contents(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "training.log").write_bytes(b"one")
    before = fingerprint(tmp_path)
    (tmp_path / "training.log").write_bytes(b"two")
    (tmp_path / "training_args.bin").write_bytes(b"another run, the same weights")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert fingerprint(tmp_path) != before
    for name in ("pytorch_model.bin", "weights.pt", "weights.pth"):
        before = fingerprint(tmp_path)
        (tmp_path / name).write_bytes(b"weights in the format of PyTorch")
        assert fingerprint(tmp_path) != before


# Prompts


def test_emoji_prompts_name_the_style_in_both_languages(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    names = [("red apple", "红苹果"), ("cup", "杯子"), ("cat", "猫")]
    rows = [
        {
            "image": Image.new("RGB", (8, 8), (i, 0, 0)),
            "caption_en": en,
            "caption_zh": zh,
            "style": "noto",
            "hexcode": f"{i}",
        }
        for i, (en, zh) in enumerate(names)
    ]
    text = {name: Value("string") for name in ("caption_en", "caption_zh", "style", "hexcode")}
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows, Features({"image": ImageFeature(), **text})).to_parquet(tmp_path / "data/test-0.parquet")
    prompts = EmojiPrompts(str(tmp_path)).load()
    assert prompts.groups() == {"en": [0, 1, 2], "zh": [3, 4, 5]}
    assert prompts.prompts[0].text == "red apple, noto style" and prompts.prompts[5].text == "猫，noto 风格"
    assert prompts.reference(5).getpixel((0, 0)) == (2, 0, 0)
    few = EmojiPrompts(str(tmp_path), languages=["zh"], limit=2, seed=1).load()
    assert len(few) == 2 and [p.id for p in few.prompts] == [
        p.id for p in EmojiPrompts(str(tmp_path), "test", ["zh"], 2, 1).load().prompts
    ]
    for bad, message in (
        (EmojiPrompts(str(tmp_path), languages=["de"]), "got 'de'"),
        (EmojiPrompts("no"), "mars-hf data"),
    ):
        with pytest.raises(ValueError, match=message):
            bad.load()


def test_coco_prompts_take_one_caption_of_each_picture(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in (3, 1, 2)]
    captions = [{"image_id": i, "caption": f" caption {j}\n of {i} "} for i in (1, 2, 3) for j in range(5)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for i in (1, 2, 3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    prompts = CocoPrompts(str(tmp_path / "captions.json"), str(tmp_path)).load()
    assert [p.id for p in prompts.prompts] == ["1", "2", "3"]
    assert all(p.text.startswith("caption ") and p.text.endswith(f" of {p.id}") for p in prompts.prompts)
    assert [prompts.reference(i).getpixel((0, 0))[0] for i in range(3)] == [1, 2, 3]
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2.png cannot be read"):
        prompts.reference(1)
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(ValueError, match="not a file of COCO captions"):
        CocoPrompts(str(tmp_path / "captions.json"), str(tmp_path)).load()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "there are no prompts"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2: expected an object with a `prompt`"),
        ("{prompt: a}", "line 1: no valid JSON"),
        ('{"prompt": "a", "promt": "b"}', "unknown key `promt`"),
        ('{"prompt": "  "}', "prompt '1' has no text"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "two prompts have the id '1'"),
        ('{"prompt": "a", "picture": "a.png"}\n{"prompt": "b"}', "some prompts have a `picture`"),
        ('{"prompt": "a", "parts": {"nouns": []}}', "`parts` is an object of noun_phrases"),
        ('{"prompt": "a", "parts": {"noun_phrases": "a red apple"}}', "`parts.noun_phrases` must be a list of texts"),
        ('{"prompt": "a", "parts": {"objects": ["cat"]}}', "`parts.objects` are the two whose places"),
        (
            '{"prompt": "a", "group": "spatial", "parts": {"objects": ["cat", "dog"]}}',
            "the group spatial has them and",
        ),
        ('{"prompt": "a", "parts": {"place": "left of"}}', "`parts.place` must be one of .*on the left of"),
        ('{"prompt": "a", "parts": {"aspects": ["action"]}}', "`parts.aspects` are attribute, spatial, non_spatial"),
    ],
)
def test_bad_files_of_prompts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        JsonlPrompts(str(tmp_path / "prompts.jsonl")).load()


def test_true_pictures_are_upright_with_white_behind_them(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter
    Image.new("RGB", (8, 4), "red").save(tmp_path / "turned.jpg", exif=turned)
    lines = [{"prompt": name, "picture": name} for name in ("clear.png", "turned.jpg")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = JsonlPrompts(str(tmp_path / "prompts.jsonl")).load()
    assert prompts.reference(0).getpixel((0, 0)) == (255, 255, 255) and prompts.reference(1).size == (4, 8)
    assert References(prompts, 4, 4)([Task(prompts.prompts[0], 0, 0, 0)])[0].getpixel((0, 0)) == (255, 255, 255)


def test_a_value_of_a_run_without_any_is_set(tmp_path: Path) -> None:
    written = {"prompts": {"kind": "jsonl", "file": "x"}, "drawing": {"height": 8, "width": 8}, "out": "out"}
    written["metrics"] = {"clip_score": {"clip": "x"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**written, "runs": {"plain": None}}))
    assert load_config(str(tmp_path / "mine.yaml"), ["runs.plain.top_k=5"]).runs["plain"].top_k == 5


# Configurations


@pytest.mark.parametrize(
    "name, kind", [("emoji", EmojiPrompts), ("coco", CocoPrompts), ("compbench", None), ("geneval", None)]
)
def test_the_packages_configurations_load(name: str, kind: type | None) -> None:
    config = load_config(name)
    assert kind is None or isinstance(config.prompts, kind)
    assert load_config(name, ["prompts.limit=7", "drawing.seed=3"]).drawing.seed == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ("metrcs.clip=x", "unknown key `metrcs`.*Did you mean `metrics`"),
        ("runs.guidance-1.guidance_scal=1", "unknown key `guidance_scal`.*Did you mean `guidance_scale`"),
        ("prompts.kind=emojis", "`prompts.kind` must be one of emoji, coco"),
        ("prompts.limit=many", "limit"),
        ("runs.guidance-1.top_k=high", "top_k"),
        ("drawing.height=0", "`height` must be 1 or more, got 0"),
        ("runs.references={}", "cannot be named 'references'"),
        ("runs.guidance-1.temperature=0", "`temperature` must be above 0"),
        ("runs.guidance-1.top_p=0", "`top_p` must be above 0 and at most 1, got 0"),
        ("runs.guidance-1.min_p=2", "`min_p` must be 0 to 1, got 2"),
        ("runs.guidance-1.top_k=-1", "`top_k` must be 1 or more, or 0 for all codes, got -1"),
        ("runs.guidance-1.guidance_interval=[0.5, 0.2]", r"two shares of a picture.*got \[0.5, 0.2\]"),
        ("runs.guidance-1.guidance_interval=[0.5]", r"two shares of a picture.*got \[0.5\]"),
        ("metrics.frechet.vision=x", "needs one of `clip`, `vision` and `inception`"),
        ("metrics=3", "expected a mapping of clip_score"),
        ("interval.confidence=95", "between 0 and 1, got 95"),
        ("paper_tables=[3]", "knows tables 1 and 2, got 3"),
        ("prompts", "written like prompts.limit=100"),
        ("out=[", "no valid YAML"),
    ],
)
def test_mistakes_in_a_configuration_are_named(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("emoji", [change])


def test_a_missing_configuration_is_named() -> None:
    with pytest.raises(
        ValueError, match="neither a file nor one of the package's evaluations: coco, compbench, emoji"
    ):
        load_config("nothing.yaml")


# Whole evaluations


@pytest.fixture
def setting(tmp_path: Path, tiny_model, tiny_processor, monkeypatch):
    """Write a checkpoint, true pictures, prompts and a configuration; give the configuration's content."""
    tiny_model.save_pretrained(tmp_path / "mars")
    tiny_processor.save_pretrained(tmp_path / "mars")
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
        rows.append({"prompt": f"a {name} apple", "id": name, "group": "all", "picture": f"{name}.png"})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clip = str(save_clip(tmp_path / "clip"))
    monkeypatch.chdir(tmp_path)
    return {
        "out": "out",
        "model": "mars",
        "prompts": {"kind": "jsonl", "file": "prompts.jsonl"},
        "drawing": {"height": 16, "width": 16, "batch_size": 4, "shard_size": 3},
        "runs": {"plain": {"do_sample": True}, "many": {"do_sample": True, "pictures_per_prompt": 3}},
        "metrics": {"clip_score": {"clip": clip}, "best_of": {"clip": clip}, "retrieval": {"clip": clip}},
    }


def run(content: dict, **changes) -> dict:
    Path("config.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return evaluate(load_config("config.yaml"), process(), progress=False)


def values(results: dict, metric: str) -> dict[tuple[str, str], float]:
    return {(s["run"], s["pictures"]): s["value"] for s in results["scores"] if s["metric"] == metric}


def test_an_evaluation_measures_every_run_and_the_best_of_n(setting) -> None:
    clip = setting["metrics"]["clip_score"]["clip"]
    metrics = {**setting["metrics"], "frechet": {"clip": clip, "resamples": 2}}
    results = run(setting, metrics=metrics, reconstructions=True, paper_tables=[1])
    scores = values(results, "clip_score")
    singles = {(name, "single") for name in ("plain", "many", "references", "reconstructions")}
    assert set(scores) == singles | {("many", "best of 3")}
    assert scores["many", "best of 3"] > scores["many", "single"]
    assert set(values(results, "frechet")) == set(scores) - {("references", "single")}
    assert all(s["interval"][0] <= s["value"] <= s["interval"][1] for s in results["scores"])
    assert results["checkpoint_sha256"] == fingerprint("mars") and results["runs"]["plain"]["do_sample"] is True
    assert KNOBS <= results["runs"]["many"].keys()
    card = Path("out/results.md").read_text()
    assert "| MARS* | autoregressive | 14B | 3.51 | 33.10 |" in card
    found = {(e.metric_name, e.metric_value) for e in ModelCard(card).data.eval_results}
    assert ("CLIPScore (many, best of 3)", round(scores["many", "best of 3"], 4)) in found
    assert not any("references" in name for name, _ in found)


def test_an_evaluation_that_is_called_again_draws_nothing_and_finds_the_same(setting, monkeypatch) -> None:
    first = run(setting)
    monkeypatch.setattr(Drawer, "__call__", None)
    assert run(setting)["scores"] == first["scores"]
    with pytest.raises(ValueError, match="drawn with top_k = 50, but now it is 3"):
        run(setting, runs={"plain": {"do_sample": True, "top_k": 3}, "many": setting["runs"]["many"]})


@pytest.mark.parametrize(
    ("groups", "metric", "message"),
    [
        (["four"] * 4 + ["three"] * 3, "frechet", "compares 4 features.*more than 4 prompts.*'three' has 3"),
        (["one"] + ["many"] * 6, "retrieval", "two or more different prompts in each group, but 'one' has one"),
    ],
)
def test_groups_that_are_too_small_are_refused_before_anything_is_drawn(
    setting, monkeypatch, groups, metric, message
) -> None:
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "group": group}) for row, group in zip(rows, groups, strict=True)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(Drawer, "__call__", None)
    with pytest.raises(ValueError, match=message):
        run(setting, metrics={metric: setting["metrics"]["retrieval"]})
    assert not Path("out").exists()


def test_the_first_process_writes_settings_and_others_wait_for_them(setting, monkeypatch) -> None:
    done: list[str] = []
    settle = PictureFolder.settle
    monkeypatch.setattr(PictureFolder, "settle", lambda self, *given: (done.append("settle"), settle(self, *given)))
    monkeypatch.setattr(PictureFolder, "draw", lambda *given: done.append("draw"))
    Path("config.yaml").write_text(yaml.safe_dump(setting))
    three = ["settle"] * 3  # two runs and the true pictures
    for index, before in ((0, [*three, "wait", "wait"]), (1, ["wait", *three, "wait"])):
        shared = process(index, 2)
        shared.wait_for_everyone = lambda: done.append("wait")
        Evaluation(load_config("config.yaml"), shared, progress=False).draw()
        assert done == [*before, "draw", "draw", "draw"]
        done.clear()


def test_swapped_prompts_are_seen_by_a_judge_that_sees_colours(setting, monkeypatch) -> None:
    monkeypatch.setattr("mars_hf.evaluation.evaluate.ClipEncoder", ColourClip)
    metrics = {**setting["metrics"], "frechet": {"clip": setting["metrics"]["best_of"]["clip"], "resamples": 0}}
    right = run(setting, metrics=metrics)
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    texts = [row["prompt"] for row in rows]
    for row, text in zip(rows, texts[1:] + texts[:1], strict=True):
        row["prompt"] = text
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wrong = run(setting, out="swapped", metrics=metrics)
    true = ("references", "single")
    assert values(right, "clip_score")[true] == pytest.approx(100, abs=1e-2)
    assert values(wrong, "clip_score")[true] < 60
    assert (values(right, "retrieval")[true], values(wrong, "retrieval")[true]) == (100, 0)
    best, single = (values(right, "clip_score")["many", kind] for kind in ("best of 3", "single"))
    assert best >= single


def test_t2i_compbench_is_measured_with_models_of_its_classes(setting, tmp_path: Path) -> None:
    phrases = {"noun_phrases": ["a red apple", "a cup"]}
    place = {"objects": ["cat", "dog"], "place": "on the left of"}
    rows = [
        {"prompt": "a red apple and a cup", "group": "color", "parts": phrases},
        {"prompt": "a cat on the left of a dog", "group": "spatial", "parts": place},
        {"prompt": "a dog and a cat", "group": "non_spatial"},
        {
            "prompt": "a red cat",
            "group": "complex",
            "parts": {**phrases, **place, "aspects": ["attribute", "spatial"], "plain": "a cat"},
        },
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tools = {"vqa": str(save_blip(tmp_path / "vqa")), "detector": str(save_detector(tmp_path / "detector"))}
    metrics = {"compbench": {**tools, "clip": setting["metrics"]["clip_score"]["clip"]}}
    results = run(
        setting, metrics=metrics, runs={"two": {"pictures_per_prompt": 2, "do_sample": True}}, paper_tables=[2]
    )
    scores = {s["group"]: s["value"] for s in results["scores"]}
    assert list(scores) == ["color", "spatial", "non_spatial", "complex"]
    assert 0 < scores["color"] < 100 and -100 < scores["non_spatial"] < 100
    assert "| MARS | 69.13 | 54.31 | 71.23 | 19.24 | 32.10 | 40.49 |" in Path("out/results.md").read_text()


def test_geneval_is_measured_with_models_of_its_classes(setting, tmp_path: Path, monkeypatch) -> None:
    cat, red = {"class": "cat", "count": 1}, {"color": "red"}
    rows = [
        {"tag": "single_object", "include": [cat]},
        {"tag": "colors", "include": [{**cat, **red}]},
        {"tag": "counting", "exclude": [{"class": "dog", "count": 1}]},
        {"tag": "counting", "include": [{"class": "bird", "count": 2}]},  # what the detector does not know
        {"tag": "counting", "exclude": [{"class": "bird", "count": 3}]},
    ]
    lines = [json.dumps({"prompt": f"red apple {i}", **row}) for i, row in enumerate(rows)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    detector = save_segmenter(tmp_path / "detector", cats_only=True)
    tools = {"detector": str(detector), "clip": setting["metrics"]["best_of"]["clip"]}
    changes = {
        "prompts": {"kind": "geneval", "file": "prompts.jsonl"},
        "metrics": {"geneval": {**tools, "threshold": 0.0}, "clip_score": {"clip": tools["clip"]}},
        "runs": {"two": {"pictures_per_prompt": 2, "do_sample": True}},
    }
    results = run(setting, **changes)
    scores = {s["group"]: s for s in results["scores"] if s["metric"] == "geneval"}
    assert list(scores) == ["single_object", "counting", "colors", "mean of groups"]
    assert scores["single_object"]["value"] == 100
    assert scores["counting"]["value"] == pytest.approx(200 / 3)
    assert scores["mean of groups"]["value"] == pytest.approx((500 / 3 + scores["colors"]["value"]) / 3)
    assert scores["mean of groups"]["interval"] is None and scores["mean of groups"]["prompts"] == 5
    assert set(results["evaluators"]) == {"clip_score", "geneval_detector", "geneval_clip"}
    unknown, missing = results["notes"]
    assert "no word for 1 objects of the prompts, which it never finds: bird" in unknown
    assert "without the tasks two_object, position, color_attr" in missing
    assert "| two | single | mean of groups | 5 | - |" in Path("out/results.md").read_text()
    # What was measured is kept, unless something else is asked.
    monkeypatch.setattr("mars_hf.evaluation.geneval.Segmenter.detect", None)
    assert run(setting, **changes)["scores"] == results["scores"]
    changes["metrics"]["geneval"]["threshold"] = 0.1
    with pytest.raises(TypeError, match="not callable"):
        run(setting, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "nobody/nothing"}, "neither a folder nor a repository"),
        ({"dtype": "float33"}, "must name a type of torch"),
        ({"runs": {"plain": {}}}, "needs a run with `pictures_per_prompt` of 2 or more"),
        (
            {"runs": {"four": {"codes_per_step": 4, "pictures_per_prompt": 2}}},
            "Run four: The checkpoint was not trained",
        ),
        ({"runs": {"two": {"negative_prompt": "a" * 200, "pictures_per_prompt": 2}}}, "Run two: .*only 128 fit"),
        ({"metrics": {"frechet": {"inception": "none.pth"}}}, "none.pth does not exist"),
        ({"metrics": {"compbench": {}}}, "T2I-CompBench has color"),
        ({"metrics": {"geneval": {"detector": "clip"}}}, "clip holds a CLIPModel; GenEval needs a Mask2Former"),
        ({"metrics": {"geneval": {"detector": "x", "threshold": 1.0}}}, "`threshold` must be 0 or more and below 1"),
    ],
)
def test_an_evaluation_that_cannot_be_done_is_refused_before_it_draws(setting, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(setting, **changes)
    assert not Path("out").exists()


def test_prompts_without_true_pictures_have_no_frechet_distance(setting, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cup"}\n{"prompt": "a cat"}')
    clip = setting["metrics"]["clip_score"]["clip"]
    with pytest.raises(ValueError, match="no true pictures, which `metrics.frechet` needs"):
        run(setting, metrics={"frechet": {"clip": clip}})
    with pytest.raises(ValueError, match="no true pictures, which `reconstructions` needs"):
        run(setting, reconstructions=True)


def test_the_papers_tables_stand_as_printed() -> None:
    first, second = paper_table(1), paper_table(2)
    assert "| MARS | autoregressive | 14B | 6.92 | 32.33 |" in first and "arXiv 2407.07614" in first
    assert first.count("\n| ") == 20 and second.count("\n| ") == 11


def test_the_command_line_prints_the_table_and_tells_mistakes_in_one_line(setting) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(setting))
    done = CliRunner().invoke(app, ["evaluate", "config.yaml", "--set", "interval.resamples=100"])
    assert done.exit_code == 0 and "| many | best of 3 | all | 7 |" in done.output and "out/results.md" in done.output
    wrong = CliRunner().invoke(app, ["evaluate", "config.yaml", "--set", "drawing.hight=3"])
    assert wrong.exit_code == 2 and "Did you mean `height`" in wrong.output
    assert len(wrong.output.strip().splitlines()) == 1


@pytest.mark.integration
def test_two_processes_draw_what_one_draws(setting, tmp_path: Path) -> None:
    setting["metrics"]["frechet"] = {"clip": setting["metrics"]["clip_score"]["clip"], "resamples": 2}
    Path("config.yaml").write_text(yaml.safe_dump(setting))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mars_hf.cli"]
    for out, command in (("one", [sys.executable, "-m", "mars_hf.cli"]), ("two", launch)):
        command = [*command, "evaluate", "config.yaml", "--set", f"out={out}"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    assert read_pictures(tmp_path / "one") == read_pictures(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["scores"] for name in ("one", "two"))
    assert [(s["run"], s["metric"], pytest.approx(s["value"], abs=1e-3)) for s in one] == [
        (s["run"], s["metric"], s["value"]) for s in two
    ]


def test_the_embedded_checkpoint_is_named_by_its_folder_unless_there_is_a_checkpoint_of_that_name(
    tmp_path: Path, monkeypatch
) -> None:
    from mars_hf.evaluation.provenance import checkpoint_folder

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mars-emoji").mkdir()  # of pictures, say
    assert checkpoint_folder("mars-emoji") == DEFAULT_CHECKPOINT
    (tmp_path / "mars-emoji" / "config.json").write_text("{}")
    assert checkpoint_folder("mars-emoji") == Path("mars-emoji")
