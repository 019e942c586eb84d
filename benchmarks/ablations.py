"""
The paper's ablations (its Tables 3 and 4) and our own, and next-K-token prediction in each order, on a model of half
the width of mars-emoji.

    python examples/train_text_model.py --data-cache data/packages --out runs/text-half --hidden-size 128 \
        --max-steps 1350 --compile
    encode="mars-hf data encode --model runs/vqgan"
    $encode --data data/emoji-64 --size 64 64 --out data/emoji-64-codes
    $encode --data data/emoji-64 --size 64 64 --split test --out data/emoji-64-codes
    mars-hf data canvases --data data/emoji-128 --out data/emoji-canvas
    $encode --data data/emoji-canvas --short-side 64 --out data/emoji-canvas-codes
    $encode --data data/emoji-128 --size 128 128 --lowres-factor 2 --out data/emoji-128-codes
    python benchmarks/ablations.py --data data --text runs/text-half --vqgan runs/vqgan --out runs/ablations --compile

Every arm of a seed sees the same rows in the same order and as many labelled codes: steps of the later stages are
taken from the first, and batches hold as many codes in each. Each arm writes OUT/ARM-SEED.json when it is done;
interrupted, the same command goes on; an arm that fails does not keep the others from running. Recipes are
emoji/stage1 to emoji/stage3 with what the arm changes. What has no super-resolution of its own is made larger by
bicubic enlargement; what has one draws by K = 1 and by K = 16.

The arms of next-K-token prediction go on from the model of stages I and II of the first seed. All but the first embed
the cells, and all but the first two the enlarged small picture too. Those of K = 16 take the two orders that were best
at K = 4.
"""

import argparse
import json
import random
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.nn import functional as F
from tqdm.auto import tqdm

from mars_hf import MarsForConditionalGeneration, MarsProcessor
from mars_hf.data.records import open_records
from mars_hf.data.text import with_style
from mars_hf.evaluation.metrics import frechet_distance
from mars_hf.super_resolution_mars import Enlarger
from mars_hf.training.collation import AlignedCollator
from mars_hf.training.recipe import Recipe
from mars_hf.training.run import train

BENCHMARKS = Path(__file__).parent
STAGES = {
    "stage I": {},
    "no visual expert": {"config": {"use_visual_expert": False, "expert_output_projection": False}},
    "shared output projection": {"config": {"expert_output_projection": False}},
    "joint loss": {"scope": "joint"},
    "stages I, II": {"shares": (0.6, 0.4)},
    "stages I, II, III": {"shares": (0.4, 0.2, 0.4)},
}
PLAIN = {"lowres_embedding": False}
PREDICTION = {
    "K1 raster, plain": {"codes_per_step": 1, "code_order": "raster", "cell_embedding": False, **PLAIN},
    "K1 raster, cells": {"codes_per_step": 1, "code_order": "raster", **PLAIN},
    "K1 raster": {"codes_per_step": 1, "code_order": "raster"},
    "K4 raster": {"codes_per_step": 4, "code_order": "raster"},
    "K4 region": {"codes_per_step": 4, "code_order": "region"},
    "K4 block2x2": {"codes_per_step": 4, "code_order": "block2x2"},
    "K16 best order": {},
    "K16 second order": {},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, type=Path, help="folder of the data sets named above")
parser.add_argument("--text", required=True, help="language model")
parser.add_argument("--vqgan", required=True, help="image tokenizer")
parser.add_argument("--out", required=True, type=Path, help="of one setting of the options below and of the data")
parser.add_argument("--arms", nargs="+", choices=[*STAGES, *PREDICTION], default=[*STAGES, *PREDICTION])
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
parser.add_argument("--steps", type=int, default=1000, help="of Stage I alone, 3,600 labelled codes each")
parser.add_argument("--pictures", type=int, default=200, help="to judge by; the Fréchet distance takes more than 32")
parser.add_argument("--compile", action="store_true", help="takes a C++ compiler")
options = parser.parse_args()


def recipe(stage: int, steps: int, seed: int, base: Path | None = None, **changes) -> Recipe:
    """Give the package's recipe of a stage with another length, models and data of this machine, and `changes`."""
    found = Recipe.load(f"emoji/stage{stage}")
    # As many labelled codes a batch: 0.88 * 64 rows of 64; 49 of which 0.4 have 64 and 0.5 have 96; 14 of 256.
    rows = {1: 64, 2: 49, 3: 14}[stage]
    # Without the drawings of another base.
    parts = [part for part in found.data if not part.source.endswith("-drawn")]
    data = [replace(part, source=str(options.data / Path(part.source).name)) for part in parts]
    config = {**found.model.config, **changes.pop("config", {})}
    origin = {"text": options.text, "vqgan": options.vqgan} if base is None else {"base": str(base)}
    decay = {"num_decay_steps": max(steps // 3, 1), "decay_type": "linear"}
    training = {**found.training, "max_steps": steps, "per_device_train_batch_size": rows}
    training |= {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
    training |= {"warmup_steps": steps // 20, "save_steps": 200}
    return replace(
        found,
        model=replace(found.model, **{"text": None, "vqgan": None, "base": None, "config": config, **origin}),
        data=data,
        training=training,
        seed=seed,
        loss=replace(found.loss, scope=changes.pop("scope", found.loss.scope)),
        **changes,
    )


def run(name: str, what: Recipe) -> tuple[Path, float]:
    """Train, or go on; give the finished model and the minutes that it took in all."""
    out = options.out / "runs" / name
    clock, stated = out / "minutes.json", out / "run.json"
    before = json.loads(clock.read_text()) if clock.exists() else 0.0
    if (out / "final" / "processor_config.json").exists():  # the last file of a finished run
        trained = Recipe.from_dict(json.loads(stated.read_text())["recipe"])
        if replace(trained, about=what.about, assume=what.assume) != what:  # which no run reads
            sys.exit(f"{out} was trained by another recipe than this one. Take another --out.")
        return out / "final", before
    torch.compiler.reset()  # what earlier runs compiled counts against a limit of variants
    begin = time.monotonic()
    try:
        made = train(what, out, options.compile)
    finally:
        before += (time.monotonic() - begin) / 60
        write(clock, before)
    if made != out / "final":
        sys.exit(f"{out} was stopped; the same command goes on.")
    return made, before


def write(file: Path, found: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1))
    scratch.replace(file)


def identity(model: Path, *asked: str) -> dict[str, float]:
    """Top-1 of 100 on train and test prompts, by emoji_identity.py."""
    file = model.parent / "identity.json"
    asked = (
        "--data",
        str(options.data / "emoji-64"),
        "--model",
        str(model),
        "--prompts",
        str(options.pictures),
        *asked,
    )
    subprocess.run([sys.executable, BENCHMARKS / "emoji_identity.py", *asked, "--json", file], check=True)
    return json.loads(file.read_text())["scores"]


@torch.no_grad()
def code_loss(base: Path) -> float:
    """Mean negative log-likelihood of the codes of test pictures after their captions, in nats; only codes compete."""
    model = MarsForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    processor, config = MarsProcessor.from_pretrained(base), model.config
    collate = AlignedCollator(config, processor.tokenizer.pad_token_id)
    records = open_records(str(options.data / "emoji-64-codes"), "test", vqgan=model.vqgan).to_list()
    records = random.Random(0).sample(records, min(options.pictures, len(records)))
    losses = []
    for start in range(0, len(records), 20):
        batch = collate(
            [
                processor.training_example(
                    "text-to-image",
                    with_style(record["caption_en"], record["style"], "en"),
                    *(record[name] for name in ("image_codes", "height", "width")),
                )
                for record in records[start : start + 20]
            ]
        )
        fed = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        codes = batch["shift_labels"] - config.image_token_offset
        logits = model(**fed, vocabulary="visual").logits[codes >= 0][:, : config.codebook_size]
        losses.append(F.cross_entropy(logits, codes[codes >= 0], reduction="none"))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def text_loss(base: Path) -> float:
    """
    Mean negative log-likelihood of the tokens of test captions as plain text, in nats: with visual experts it is the
    language model's own, whatever was trained.
    """
    model = MarsForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = MarsProcessor.from_pretrained(base).tokenizer
    records = load_dataset(str(options.data / "emoji-64"), split="test").remove_columns("image").to_list()
    losses = []
    for record in random.Random(0).sample(records, min(options.pictures, len(records))):
        for language in ("en", "zh"):
            text = with_style(record[f"caption_{language}"], record["style"], language)
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logits = model(ids, vocabulary="text").logits[0, :-1]
            losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def distance_at_128(base: Path, enlarger: Enlarger | None, k: int = 1) -> float:
    """Fréchet distance on VQ-GAN features between pictures of test prompts at 128 pixels and the true ones."""
    model = MarsForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    processor = MarsProcessor.from_pretrained(base)
    rows = load_dataset(str(options.data / "emoji-128"), split="test").shuffle(seed=0)
    rows = rows.select(range(min(options.pictures, len(rows))))
    captions = [with_style(row["caption_en"], row["style"], "en") for row in rows.remove_columns("image")]
    truth = processor.image_processor(list(rows["image"]), do_resize=False, return_tensors="pt")["pixel_values"]
    generator, drawn = torch.Generator().manual_seed(0), []
    for start in tqdm(range(0, len(captions), 20), desc="Drawing", unit="batch", leave=False):
        texts = captions[start : start + 20]
        inputs = processor(texts, height=64, width=64, return_tensors="pt")
        ids = model.generate(**inputs, generation_mode="image", generator=generator)
        if enlarger is None:
            small = torch.stack(model.decode_image_tokens(ids, inputs["image_sizes"]))
            drawn.append(F.interpolate(small, truth.shape[-2:], mode="bicubic", antialias=True))  # Pillow's kernel
        else:
            grids = [codes for row in model.collect_image_codes(ids, inputs["image_sizes"]) for codes in row]
            drawn.append(torch.stack(enlarger(texts, grids, generator=generator, codes_per_step=k)))

    def features(pixels: torch.Tensor) -> torch.Tensor:
        states = torch.cat([model.vqgan.encoder(batch.clamp(-1, 1)) for batch in pixels.split(20)])
        return F.adaptive_avg_pool2d(states, 2).flatten(1)

    return frechet_distance(features(torch.cat(drawn)), features(truth))


def stages_arm(arm: str, seed: int) -> dict:
    settings = dict(STAGES[arm])
    shares = settings.pop("shares", (1.0,))
    model, minutes, enlarger = None, 0.0, None
    for stage, share in enumerate(shares, start=1):
        steps = max(round(share * options.steps), 1)
        name = f"{arm.replace(', ', '-').replace(' ', '-')}-{stage}-{seed}"
        made, took = run(name, recipe(stage, steps, seed, model, **(settings if stage == 1 else {})))
        minutes += took
        if stage == 3:
            enlarger = Enlarger.of(made, dtype=torch.float32)
        else:
            model = made
    assert model is not None
    return {
        "minutes": minutes,
        "code_loss": code_loss(model),
        "text_loss": text_loss(model),
        "top_1": identity(model),
        "top_1_64x96": identity(model, "--size", "64", "96", "--splits", "test", "--languages", "en"),
        "frechet_128": {k: distance_at_128(model, enlarger, k) for k in ((1, 16) if enlarger else (1,))},
    }


def prediction_arm(arm: str, seed: int) -> dict:
    settings = dict(PREDICTION[arm])
    if not settings:
        settings = {"codes_per_step": 16, "code_order": best_orders(seed)[arm == "K16 second order"]}
    first, second = (round(share * options.steps) for share in STAGES["stages I, II"]["shares"])
    base, _ = run(f"stages-I-II-1-{seed}", recipe(1, first, seed))
    base, _ = run(f"stages-I-II-2-{seed}", recipe(2, second, seed, base))
    name = arm.replace(", ", "-").replace(" ", "-")
    what = recipe(3, options.steps, seed, base, config=settings, codes_per_step=[settings["codes_per_step"]])
    model, minutes = run(f"{name}-{seed}", what)
    file = model.parent / "super_resolution.json"
    asked = ["--data", options.data / "emoji-128", "--model", model, "--pictures", str(options.pictures)]
    subprocess.run([sys.executable, BENCHMARKS / "super_resolution.py", *asked, "--json", file], check=True)
    return {"minutes": minutes, **settings, "scores": json.loads(file.read_text())["scores"]}


def best_orders(seed: int) -> list[str]:
    """The orders of K = 4, the nearest in Fréchet distance first."""
    found = {}
    for arm in ("K4 raster", "K4 region", "K4 block2x2"):
        result = json.loads(file_of(arm, seed).read_text())
        found[result["code_order"]] = result["scores"]["drawn, K = 4"]["frechet"]
    return sorted(found, key=found.__getitem__)


def file_of(arm: str, seed: int) -> Path:
    return options.out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def results(arms: dict, seeds: list[int]) -> dict[str, list[dict]]:
    """Read what is done, by arm."""
    files = {arm: [file_of(arm, seed) for seed in seeds] for arm in arms}
    return {arm: [json.loads(file.read_text()) for file in of_arm if file.exists()] for arm, of_arm in files.items()}


def print_stages() -> None:
    """Print the first table, seeds side by side."""
    names = [f"{split}, {language}" for split in ("train", "test") for language in ("en", "zh")]
    head = ["arm", "minutes", "nats a code", "nats a token of text", *names, "test, en, 64 x 96", "Fréchet, 128 px"]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for arm, done in results(STAGES, options.seeds).items():
        columns = [[f"{one['minutes']:.0f}" for one in done]]
        columns += [[f"{one[name]:.3f}" for one in done] for name in ("code_loss", "text_loss")]
        columns += [[f"{one['top_1'][name]:.1f}" for one in done] for name in names]
        columns += [[f"{one['top_1_64x96']['test, en']:.1f}" for one in done]]
        columns += [[" / ".join(f"{score:.3f}" for score in one["frechet_128"].values()) for one in done]]
        if done:
            print(f"| {arm} | {' | '.join(', '.join(cells) for cells in columns)} |")


def print_prediction() -> None:
    """Print the second table: each arm, then what they stand beside."""
    print("\n| arm | order | minutes | PSNR, dB | Fréchet |\n|---|---|---|---|---|")
    beside: dict[str, dict] = {}
    for arm, done in results(PREDICTION, options.seeds[:1]).items():
        for one in done:
            beside = {name: score for name, score in one["scores"].items() if not name.startswith("drawn")}
            score = one["scores"][f"drawn, K = {one['codes_per_step']}"]
            row = f"{one['code_order']} | {one['minutes']:.0f}"
            print(f"| {arm} | {row} | {score['psnr']:.2f} | {score['frechet']:.4f} |")
    for name, score in beside.items():
        print(f"| {name} | | | {score['psnr']:.2f} | {score['frechet']:.4f} |")
    files = {arm: file_of(arm, options.seeds[0]) for arm in ("K1 raster", "K16 best order")}
    if all(file.exists() for file in files.values()):
        one, many = (json.loads(file.read_text())["scores"] for file in files.values())
        ratio = many["drawn, K = 16"]["frechet"] / one["drawn, K = 1"]["frechet"]
        print(f"\nFréchet distance of the best order at K = 16 to K = 1: {ratio:.2f}x")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    options.out.mkdir(parents=True, exist_ok=True)
    settings, failed = {"steps": options.steps, "pictures": options.pictures}, []
    for arm in options.arms:
        for seed in options.seeds if arm in STAGES else options.seeds[:1]:
            file = file_of(arm, seed)
            if file.exists():
                found = json.loads(file.read_text())
                if other := {name for name in settings if found[name] != settings[name]}:
                    sys.exit(f"{file} was measured with other --{min(other)}. Take another --out.")
                continue
            print(f"== {arm}, seed {seed}", flush=True)
            try:
                result = stages_arm(arm, seed) if arm in STAGES else prediction_arm(arm, seed)
            except Exception:  # a loss that is no number comes again: the other arms go on
                traceback.print_exc()
                failed.append(f"{arm}, seed {seed}")
                continue
            write(file, {"arm": arm, "seed": seed, **settings, **result})
    print_stages()
    print_prediction()
    if failed:
        sys.exit(f"Failed: {'; '.join(failed)}.")
