"""The models of a data build: scores, captions and codes equal what the libraries compute by themselves."""

import io
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_data_build import encoded, folder_source, put, recipe_of, records_of, smooth_picture
from tokenizers import pre_tokenizers
from transformers import AutoModel, AutoProcessor, LlavaForConditionalGeneration

from mars_hf import MarsForConditionalGeneration
from mars_hf.data import encode
from mars_hf.data.build import models
from mars_hf.data.build.engine import connected, run
from mars_hf.data.build.models import CodeEncoder, load_head
from mars_hf.data.build.pipeline import build_dataset
from mars_hf.data.build.recipe import Engine, load_recipe
from mars_hf.data.encode import load_image_tokenizer
from mars_hf.data.records import RecordRules, open_records, validate_records
from mars_hf.training.collation import AlignedCollator
from mars_hf.training.mixture import MixtureDataset, Source
from mars_hf.training.recipe import Recipe as TrainingRecipe
from mars_hf.training.run import build_source

NUM = 7
BATCH = {"batch_size": 3}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Seven pictures of several sizes."""
    for seed in range(NUM):
        picture = smooth_picture(seed, (48 + 8 * (seed % 3), 40))
        put(tmp_path / "raw", f"{seed}.png", encoded(picture), f"{'a' * (1 + seed)} picture")
    return tmp_path / "raw"


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A random CLIP that looks at 16 x 16 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{token}</w>" for token in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = {**sizes, **ends, "vocab_size": len(tokens), "max_position_embeddings": 24}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = CLIPProcessor(CLIPImageProcessor(**square), tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def head_file(tmp_path: Path) -> Path:
    """An aesthetic head, its layers named and numbered as in the released ones."""
    sizes = {0: (12, 8), 2: (8, 4), 10: (4, 1)}  # as text, 10 comes before 2
    tensors = {}
    for number, (inputs, outputs) in sizes.items():
        # Unscaled, the three would make an embedding's rounding 20 times as large.
        tensors[f"layers.{number}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        tensors[f"layers.{number}.bias"] = torch.randn(outputs)
    save_file(tensors, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


@pytest.fixture
def mars_folder(tmp_path: Path, tiny_model, tiny_processor) -> Path:
    """A random MARS with its processor."""
    for part in (tiny_model, tiny_processor):
        part.save_pretrained(tmp_path / "mars")
    return tmp_path / "mars"


def source_pictures(raw: Path) -> list[Image.Image]:
    return [Image.open(raw / f"{seed}.png") for seed in range(NUM)]


# Scores


@pytest.fixture
def true_scores(raw: Path, clip_folder: Path, head_file: Path) -> dict[str, np.ndarray]:
    """By CLIP's own forward pass, one picture at a time, and by matrix products in float64."""
    from safetensors.torch import load_file

    model, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    cosines, ratings, tensors = [], [], load_file(head_file)
    for seed, picture in enumerate(source_pictures(raw)):
        inputs = processor(text=[f"{'a' * (1 + seed)} picture"], images=picture, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs)
        cosines.append(float(found.logits_per_image / model.logit_scale.detach().exp()))
        value = found.image_embeds[0].double()  # of length 1
        for number in (0, 2, 10):
            value = tensors[f"layers.{number}.weight"].double() @ value + tensors[f"layers.{number}.bias"].double()
        ratings.append(float(value))
    return {"score_clip": np.array(cosines), "score_aesthetic": np.array(ratings)}


def scoring(clip_folder: Path, head_file: Path) -> dict[str, Any]:
    return {"clip": {"model": str(clip_folder), **BATCH}, "aesthetic": {"head": str(head_file)}}


def test_scores_are_those_of_clip_itself_and_of_the_head(
    tmp_path: Path, raw: Path, clip_folder: Path, head_file: Path, true_scores: dict[str, np.ndarray]
) -> None:
    recipe = recipe_of(tmp_path / "out", folder_source(raw, records_per_shard=4), **scoring(clip_folder, head_file))
    summary = build_dataset(recipe, progress=False)
    records = records_of(tmp_path / "out")
    for name, expected in true_scores.items():
        assert np.ptp(expected) > 0.05
        np.testing.assert_allclose([record[name] for record in records], expected, atol=2e-6)
        assert sum(summary["histograms"][name]["kept"]) == NUM


def test_selection_keeps_what_reaches_the_threshold_and_the_best_share(
    tmp_path: Path, raw: Path, clip_folder: Path, head_file: Path, true_scores: dict[str, np.ndarray]
) -> None:
    cosines, ratings = true_scores["score_clip"], true_scores["score_aesthetic"]
    minimum = float(np.sort(cosines)[2] - 1e-4)  # five of seven reach it
    best = set(np.argsort(-ratings)[:4])  # 0.5 of seven: the best four
    expected = [seed for seed in range(NUM) if cosines[seed] >= minimum and seed in best]
    recipe = recipe_of(
        tmp_path / "out", folder_source(raw), **scoring(clip_folder, head_file),
        select={"clip_minimum": minimum, "aesthetic_top": 0.5},
    )  # fmt: skip
    summary = build_dataset(recipe, progress=False)
    assert [record["key"] for record in records_of(tmp_path / "out")] == [f"raw/{seed}.png" for seed in expected]
    assert summary["dropped"]["low_clip"] == 2
    report = (tmp_path / "out" / "report.html").read_text()
    assert "select.clip_minimum" in report and "select.aesthetic_top" in report
    assert "select.aesthetic_minimum" not in report
    assert sum(summary["dropped"].values()) == NUM - len(expected)


def test_a_head_that_does_not_fit_its_model_is_refused_before_any_work(
    tmp_path: Path, raw: Path, clip_folder: Path
) -> None:
    save_file({"weight": torch.randn(1, 768), "bias": torch.randn(1)}, tmp_path / "head.safetensors")
    recipe = recipe_of(tmp_path / "out", folder_source(raw), **scoring(clip_folder, tmp_path / "head.safetensors"))
    with pytest.raises(ValueError, match="lead from 12 numbers to one"):
        build_dataset(recipe, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_head_in_the_format_of_pytorch_is_read_as_tensors_alone(tmp_path: Path, head_file: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(head_file), tmp_path / "head.pth")
    features = torch.randn(3, 12)
    assert torch.equal(load_head(tmp_path / "head.pth", 12)(features), load_head(head_file, 12)(features))

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weight": torch.randn(1, 12), "bias": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(ValueError, match="run code"):
        load_head(tmp_path / "attack.pth", 12)
    assert not (tmp_path / "executed").exists()


# Codes and sizes


@pytest.mark.parametrize("kind", ["mars", "vqgan"])
def test_codes_are_those_of_the_model_for_pictures_fitted_to_whole_codes(
    tmp_path: Path, raw: Path, mars_folder: Path, kind: str
) -> None:
    model = MarsForConditionalGeneration.from_pretrained(mars_folder)
    if kind == "vqgan":
        model.vqgan.save_pretrained(tmp_path / "vqgan")
    recipe = recipe_of(
        tmp_path / "out", folder_source(raw), resize={"shortest_edge": 24, "multiple_of": 4},
        codes={"model": str(tmp_path / kind), **BATCH}, resolution_text=True,
    )  # fmt: skip
    build_dataset(recipe, progress=False)

    for record, picture in zip(records_of(tmp_path / "out"), source_pictures(raw), strict=True):
        scale = 24 / picture.height
        scaled = picture.resize((round(picture.width * scale), 24), Image.Resampling.BICUBIC)
        width = scaled.width // 4 * 4
        left = (scaled.width - width) // 2
        expected = np.asarray(scaled.crop((left, 0, left + width, 24)))
        stored = np.asarray(Image.open(io.BytesIO(record["image"])))
        assert np.abs(stored.astype(int) - expected).max() <= 1
        pixels = torch.from_numpy(stored / 127.5 - 1).permute(2, 0, 1).float()
        codes = model.encode_image([pixels])[0]
        assert record["image_codes"] == codes.flatten().tolist()
        assert (record["codes_height"], record["codes_width"]) == codes.shape
        assert (record["height"], record["width"]) == (24, width)
        assert record["prompt_en"] == f"{record['caption_en']} 24x{width}" and record["prompt_zh"] is None
    assert len({len(record["image_codes"]) for record in records_of(tmp_path / "out")}) == 3


def test_the_prompt_is_the_one_that_the_processor_writes(tmp_path: Path, raw: Path, tiny_processor) -> None:
    from mars_hf.prompts_mars import prompt_ids, text_ids

    build_dataset(recipe_of(tmp_path / "out", folder_source(raw), resolution_text=True), progress=False)
    for record in records_of(tmp_path / "out"):
        ids = prompt_ids(tiny_processor.tokenizer, record["caption_en"], record["height"], record["width"])
        assert text_ids(tiny_processor.tokenizer, record["prompt_en"]) == ids


def test_codes_are_made_of_pixels_in_the_models_own_range(tmp_path, raw: Path, tiny_model, tiny_processor) -> None:
    tiny_processor.image_processor.image_mean, tiny_processor.image_processor.image_std = [0.0] * 3, [1.0] * 3
    tiny_model.save_pretrained(tmp_path / "mars")
    tiny_processor.save_pretrained(tmp_path / "mars")
    codes = {"model": str(tmp_path / "mars"), **BATCH}
    recipe = recipe_of(
        tmp_path / "out", folder_source(raw), codes=codes, resize={"multiple_of": 4, "shortest_edge": 16}
    )
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    (found,) = CodeEncoder(recipe)([picture])
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    assert found["image_codes"] == tiny_model.encode_image(pixels)[0].flatten().tolist()


def test_without_gpus_for_workers_models_stay_off_them(tmp_path: Path, raw: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for asked, expected in ((None, "cuda"), (1, "cuda"), (0, "cpu")):
        engine = {} if asked is None else {"engine": {"gpus_per_worker": asked}}
        assert models._device(recipe_of(tmp_path / "out", folder_source(raw), **engine)).type == expected


def test_only_the_vqgan_of_a_mars_is_loaded(mars_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    checkpoint = encode.Checkpoint
    look_up = checkpoint.__getitem__
    monkeypatch.setattr(checkpoint, "__getitem__", lambda self, name: (read.append(name), look_up(self, name))[1])
    vqgan, _ = load_image_tokenizer(mars_folder)
    whole = MarsForConditionalGeneration.from_pretrained(mars_folder).vqgan
    assert all(name.startswith("vqgan.") for name in read)
    assert vqgan.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in vqgan.state_dict().items())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("keep_images", [True, False])
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_what_was_built_becomes_a_batch_of_training(
    tmp_path: Path, raw: Path, mars_folder: Path, tiny_model, tiny_processor, cache, form: str, keep_images: bool
) -> None:
    put(raw, "8.jpg", encoded(smooth_picture(8, (24, 24)), "JPEG"), "a JPEG that has its size already")
    stages = {"resize": {"shortest_edge": 24, "multiple_of": 4}, "write": {"format": form, "records_per_shard": 5}}
    codes = {"model": str(mars_folder), "keep_images": keep_images, **BATCH}
    build_dataset(recipe_of(tmp_path / "out", folder_source(raw), codes=codes, **stages), progress=False)
    rules = RecordRules(codebook_size=tiny_model.config.codebook_size, downsample_factor=4)
    records, bad = validate_records(open_records(tmp_path / "out", vqgan=tiny_model.vqgan), rules, progress=False)
    assert len(records) == NUM + 1 and not bad.reasons
    assert set(records["key"]) == {*(f"raw/{seed}.png" for seed in range(NUM)), "raw/8.jpg"}
    assert ("image" in records.column_names) is keep_images

    source = Source("text-to-image", 1.0, records, lambda record, rng: record["caption_en"], drop_caption=0.0)
    data = MixtureDataset(tiny_processor, [source], batch_size=4, num_batches=2)
    for start in (0, 4):
        batch = AlignedCollator(tiny_model.config, 256)([data[start + place] for place in range(4)])
        labels = batch["shift_labels"]
        for place in range(4):
            expected = data.record_of(start + place)["image_codes"]
            assert (labels[place][labels[place] != -100] - tiny_model.config.image_token_offset).tolist() == expected


def test_codes_of_another_tokenizer_are_refused_and_so_is_one_that_changed_meanwhile(
    tmp_path: Path, raw: Path, mars_folder: Path, tiny_model, make_vqgan, cache
) -> None:
    stages = {"resize": {"shortest_edge": 24, "multiple_of": 4}, "codes": {"model": str(mars_folder), **BATCH}}
    recipe = recipe_of(tmp_path / "out", folder_source(raw), **stages)
    build_dataset(recipe, progress=False)
    with pytest.raises(ValueError, match="made by the image tokenizer"):
        open_records(tmp_path / "out", vqgan=make_vqgan())
    codes_file = tmp_path / "out" / "codes.json"
    whole = codes_file.read_text()
    codes_file.write_text(whole.replace('"complete": true', '"complete": false'))
    with pytest.raises(ValueError, match="not complete.*mars-hf data build"):
        open_records(tmp_path / "out")
    build_dataset(recipe, progress=False)
    assert codes_file.read_text() == whole

    tiny_model.vqgan = make_vqgan()
    tiny_model.save_pretrained(mars_folder)
    with pytest.raises(ValueError, match="one of its models has changed since"):
        build_dataset(recipe, progress=False)


def test_what_the_papers_recipe_builds_is_what_its_second_stage_reads(
    tmp_path: Path, raw: Path, clip_folder: Path, head_file: Path, true_scores: dict[str, np.ndarray],
    mars_folder: Path, tiny_model, cache, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from safetensors.torch import load_file

    paper, (part,) = load_recipe("paper", "out"), TrainingRecipe.load("paper/stage2").data
    assert part.min_score == paper.select.aesthetic_minimum
    head = load_file(head_file)
    head["layers.10.bias"] += part.min_score - float(np.median(true_scores["score_aesthetic"]))  # half of them pass
    save_file(head, head_file)

    def answer(self, pictures, prompt):
        """What a random model says is not known beforehand; that one is asked is tested above."""
        return [f"{prompt[:9]} {i}" for i in range(len(pictures))]

    monkeypatch.setattr(models.Captioner, "__call__", answer)
    recipe = recipe_of(
        tmp_path / "out", folder_source(raw), **scoring(clip_folder, head_file),
        recaption={"model": str(mars_folder), "prompts": paper.recaption.prompts}, resolution_text=True,
        resize={"shortest_edge": 24, "multiple_of": 4},
        codes={"model": str(mars_folder), **BATCH},
    )  # fmt: skip
    build_dataset(recipe, progress=False)
    built = records_of(tmp_path / "out")
    good = {record["key"]: record for record in built if record["score_aesthetic"] >= 5}
    assert 0 < len(good) < NUM

    part.source = str(tmp_path / "out")
    source = build_source(part, tiny_model)
    assert {record["key"] for record in source.records} == good.keys()
    captions: list[list[str]] = [[], []]
    for record, seed in itertools.product(source.records, range(40)):
        caption, expected = source.write_caption(record, random.Random(seed)), good[record["key"]]
        fine = {expected["fine_caption_en"], expected["fine_caption_zh"]}
        assert caption in fine | {expected["caption_en"]}
        captions[caption in fine].append(caption)
    assert len(captions[1]) > 4 * len(captions[0]) > 0  # nine of ten


def test_codes_that_do_not_fit_the_size_of_pictures_are_refused_before_any_work(
    tmp_path: Path, raw: Path, mars_folder: Path
) -> None:
    stages = {"resize": {"shortest_edge": 26, "multiple_of": 2}, "codes": {"model": str(mars_folder)}}
    with pytest.raises(ValueError, match="stands for 4 x 4 px.*multiple of 4, got 2"):
        build_dataset(recipe_of(tmp_path / "out", folder_source(raw), **stages), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_model_that_describes_no_pictures_is_refused_before_any_work(
    tmp_path: Path, raw: Path, make_text_model
) -> None:
    make_text_model().save_pretrained(tmp_path / "text")
    recaption = {"model": str(tmp_path / "text"), "prompts": {"en": "What?"}}
    with pytest.raises(ValueError, match="is a qwen2, which describes no pictures"):
        build_dataset(recipe_of(tmp_path / "out", folder_source(raw), recaption=recaption), progress=False)
    assert not (tmp_path / "out").exists()


# Captions


@pytest.fixture
def llava_folder(tmp_path: Path) -> Path:
    """A random LLaVA, a stock image-text-to-text model of transformers, whose vocabulary is bytes."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaProcessor,
        Qwen2Config,
        Qwen2Tokenizer,
    )

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<image>"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), eos_token_id=256, pad_token_id=256)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    square = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}: "
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(**square), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    )  # fmt: skip
    for part in (model, processor):
        part.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.mark.parametrize("kind", ["llava", "mars"])
def test_new_captions_are_what_the_stock_pipeline_says_of_each_picture_alone(
    tmp_path: Path, raw: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    from transformers import pipeline

    folder = request.getfixturevalue(f"{kind}_folder")
    prompts = {"en": "What is to be seen?", "zh": "画里有什么？"}
    settings = {"model": str(folder), "prompts": prompts, "max_new_tokens": 12, **BATCH}
    build_dataset(recipe_of(tmp_path / "out", folder_source(raw), recaption=settings), progress=False)
    records = records_of(tmp_path / "out")

    stock, answers = pipeline("image-text-to-text", model=str(folder)), set()
    for record, picture in itertools.islice(zip(records, source_pictures(raw), strict=True), 3):
        for language, prompt in prompts.items():
            content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
            said = stock(
                text=[{"role": "user", "content": content}], return_full_text=False,
                generate_kwargs={"max_new_tokens": 12, "do_sample": False},
            )[0]["generated_text"]  # fmt: skip
            assert record[f"fine_caption_{language}"] == (models.clean_text(said)[0] or None)
            answers.add(said)
        assert record["caption_en"].endswith("a picture") and record["caption_zh"] is None
    assert len(answers) > 1


def test_a_record_about_which_the_captioner_says_nothing_keeps_its_caption_or_is_counted(
    tmp_path: Path, raw: Path, llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (raw / "0.txt").unlink()
    monkeypatch.setattr(models.Captioner, "__call__", lambda self, pictures, prompt: [""] * len(pictures))
    settings = {"model": str(llava_folder), "prompts": {"en": "?"}}
    recipe = recipe_of(tmp_path / "out", folder_source(raw), recaption=settings, captions={"required": False})
    summary = build_dataset(recipe, progress=False)
    assert summary["dropped"] == {"no_caption": 1} and summary["kept"] == NUM - 1
    assert all(r["caption_en"] and r["fine_caption_en"] is None for r in records_of(tmp_path / "out"))


def test_a_model_without_chat_template_is_given_the_prompt_as_it_is(
    tmp_path: Path, raw: Path, llava_folder: Path
) -> None:
    (llava_folder / "chat_template.jinja").unlink()
    prompt = "<image>What is to be seen? Answer:"
    settings = {"model": str(llava_folder), "prompts": {"en": prompt}, "max_new_tokens": 12, **BATCH}
    build_dataset(recipe_of(tmp_path / "out", folder_source(raw), recaption=settings), progress=False)
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(llava_folder),
        AutoProcessor.from_pretrained(llava_folder),
    )
    answers = set()
    for record, picture in itertools.islice(zip(records_of(tmp_path / "out"), source_pictures(raw), strict=True), 3):
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = processor.decode(ids, skip_special_tokens=True)
        assert record["fine_caption_en"] == (models.clean_text(said)[0] or None)
        answers.add(said)
    assert len(answers) > 1


# On Ray


@pytest.fixture(scope="session")
def ray_cluster():
    """Two processors and, for the scheduler, one GPU."""
    import os

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local", num_cpus=2, num_gpus=1, object_store_memory=200_000_000, include_dashboard=False,
        log_to_driver=False,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.integration
def test_one_worker_two_workers_and_actors_on_ray_give_the_bytes_of_this_process(
    tmp_path: Path, raw: Path, clip_folder: Path, head_file: Path, mars_folder: Path, ray_cluster
) -> None:
    put(raw, "9-copy.png", (raw / "0.png").read_bytes())
    put(raw, "9-cut.png", (raw / "0.png").read_bytes()[:200])
    stages = {
        **scoring(clip_folder, head_file),
        "duplicates": {},
        "select": {"aesthetic_top": 0.9},
        "recaption": {"model": str(mars_folder), "prompts": {"en": "What?"}, "max_new_tokens": 6, **BATCH},
        "resize": {"shortest_edge": 24, "multiple_of": 4},
        "codes": {"model": str(mars_folder), **BATCH},
        "resolution_text": True,
        "write": {"records_per_shard": 2},
    }
    engines = {
        "here": {"workers": 0},
        "one": {"workers": 1, "gpus_per_worker": 0},
        "two": {"workers": 2, "gpus_per_worker": 0},
        "actors": {"workers": 2, "gpus_per_worker": 1},
    }
    written = {}
    for name, engine in engines.items():
        recipe = recipe_of(tmp_path / name, folder_source(raw, records_per_shard=3), **stages)
        recipe.engine = type(recipe.engine)(**engine)
        summary = build_dataset(recipe, progress=False)
        assert summary["dropped"] == {"damaged": 1, "exact_duplicate": 1}, summary["dropped"]
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        written[name] = {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}
    for name in engines:
        assert written[name].keys() == written["here"].keys()
        assert [file for file in written[name] if written[name][file] != written["here"][file]] == []


@pytest.mark.integration
def test_a_failing_worker_ends_the_build_with_its_reason(
    tmp_path: Path, raw: Path, mars_folder: Path, ray_cluster
) -> None:
    recaption = {"model": str(mars_folder), "prompts": {"en": "What?"}}
    recipe = recipe_of(tmp_path / "out", folder_source(raw), recaption=recaption)
    recipe.engine.workers = 2
    (mars_folder / "model.safetensors").write_bytes(b"no weights")  # its configuration is fine: a worker finds out
    with pytest.raises(RuntimeError, match="A worker failed: "):
        build_dataset(recipe, progress=False)


@pytest.mark.integration
def test_rows_that_share_a_task_all_go_through_all_steps(ray_cluster) -> None:
    def twice(row: dict[str, Any]):
        yield from ({"n": 2 * row["n"]}, {"n": 2 * row["n"] + 1})

    def odd(row: dict[str, Any]):
        yield from [row] if row["n"] % 2 else []

    found = run([{"n": n} for n in range(40)], [twice, odd, twice], Engine(workers=2), rows_per_task=16)
    assert sorted(row["n"] for row in found) == [n for n in range(160) if n % 4 > 1]


@pytest.mark.integration
def test_more_gpus_than_there_are_are_refused_instead_of_waited_for(ray_cluster) -> None:
    with pytest.raises(ValueError, match="`engine.gpus_per_worker` is 2, but Ray has 1 GPUs here"):
        with connected(Engine(workers=2, gpus_per_worker=2)):
            pass
