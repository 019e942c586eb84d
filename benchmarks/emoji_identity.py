"""
Does a prompt's picture show its subject? Each drawing meets 100 candidates: the true picture and 99 other subjects of
the same style. The nearest by mean squared distance at 32 x 32 RGB is what it is taken for; chance is 1 %.

    mars-hf data emoji --size 64 --out data/emoji-64
    python benchmarks/emoji_identity.py --data data/emoji-64

Prompts are "LABEL, STYLE style" and "LABEL，STYLE 风格". Printed beside the score: what the VQ-GAN's reconstructions
of the true pictures score (the ceiling) and, for test prompts, how far drawings are from the truth and from the
nearest train picture of the same subject in another style, which is what a model that only copies would draw.

With `--size 64 96` or `--size 96 64` the emoji is looked for in the middle of the canvas, where training has it. Then
the same prompts are drawn on square canvases too, once by a text that names this size and once by one that names the
other: how far apart the pictures are says whether the size is read, beside how far another seed takes them.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from PIL import Image
from tqdm.auto import tqdm

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsProcessor

SIDE = 32
NUM_CANDIDATES = 100

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="emoji data at 64 pixels")
parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT))
parser.add_argument("--splits", nargs="+", default=["train", "test"])
parser.add_argument("--languages", nargs="+", default=["en", "zh"])
parser.add_argument("--prompts", type=int, default=400)
parser.add_argument("--size", nargs=2, type=int, default=[64, 64], metavar=("HEIGHT", "WIDTH"), help="in pixels")
parser.add_argument("--batch-size", type=int, default=50)
parser.add_argument("--seed", type=int, default=0, help="of the sampler; prompts and candidates are always the same")
parser.add_argument("--guidance-scale", type=float, help="default: the checkpoint's")
parser.add_argument("--temperature", type=float, help="0 is greedy; default: the checkpoint's")
parser.add_argument("--top-k", type=int, help="default: the checkpoint's")
parser.add_argument("--json", type=Path, help="write the scores to this file too")
options = parser.parse_args()
if options.json:
    options.json.parent.mkdir(parents=True, exist_ok=True)

torch.set_flush_denormal(True)
model = MarsForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
processor = MarsProcessor.from_pretrained(options.model)
processor.image_tokenizer = model.vqgan


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a - b).mean())


def sampling() -> dict:
    settings = {"guidance_scale": options.guidance_scale, "top_k": options.top_k}
    if options.temperature is not None:
        settings |= {"do_sample": options.temperature > 0, "temperature": options.temperature or None}
    return {name: value for name, value in settings.items() if value is not None}


def prompt(record: dict, language: str) -> str:
    caption, style = record[f"caption_{language}"], record["style"]
    return f"{caption}, {style} style" if language == "en" else f"{caption}，{style} 风格"


def draw(prompts: list[str], written: list[int], height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    """Draw pictures of a size from prompts that name the size `written`; give the square in their middle."""
    pictures, generator = [], torch.Generator().manual_seed(options.seed + seed)
    for start in tqdm(range(0, len(prompts), options.batch_size), desc="Drawing", unit="batch", leave=False):
        batch = prompts[start : start + options.batch_size]
        inputs = processor(batch, height=written[0], width=written[1], return_tensors="pt")
        inputs["image_sizes"] = torch.tensor([height, width]).expand_as(inputs["image_sizes"])
        drawn = model.generate(**inputs, generation_mode="image", generator=generator, **sampling())
        pixels = model.decode_image_tokens(drawn, inputs["image_sizes"])
        images = processor.post_process_multimodal_output(pixels, generation_mode="image")
        pictures += [small(in_the_middle(image)) for image in images]
    return pictures


def in_the_middle(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def reconstruct(images: list[Image.Image]) -> list[np.ndarray]:
    pixels = processor.image_processor(images, do_resize=False, return_tensors="pt")["pixel_values"]
    codes = model.encode_image(pixels)
    return [small(image) for image in processor.decode_images(codes, [list(pixels.shape[2:])] * len(codes))]


data = {split: load_dataset(options.data, split=split) for split in ("train", "validation", "test")}
everything: Dataset = concatenate_datasets(list(data.values()))
keys = everything.remove_columns("image").to_list()
thumbnails = [small(image) for image in tqdm(everything["image"], desc="Reading pictures", leave=False)]
starts = dict(zip(data, np.cumsum([0, len(data["train"]), len(data["validation"])]), strict=True))
by_style: dict[str, list[int]] = {}
train_of_subject: dict[str, list[int]] = {}
for index, key in enumerate(keys):
    by_style.setdefault(key["style"], []).append(index)
    if index < len(data["train"]):
        train_of_subject.setdefault(key["hexcode"], []).append(index)


def choose(split: str) -> tuple[list[int], list[list[int]]]:
    """Pick prompts of a split and, for each, the true picture followed by 99 others of its style."""
    rng = random.Random(f"emoji identity {split}")
    chosen = rng.sample(range(len(data[split])), min(options.prompts, len(data[split])))
    truths = [int(starts[split]) + place for place in chosen]
    others = []
    for truth in truths:
        rivals = [i for i in by_style[keys[truth]["style"]] if keys[i]["hexcode"] != keys[truth]["hexcode"]]
        others.append([truth, *rng.sample(rivals, NUM_CANDIDATES - 1)])
    return truths, others


def nearest_copy(truth: int) -> np.ndarray:
    """Give the train picture of the same subject that is nearest to a held-out one."""
    same = [thumbnails[i] for i in train_of_subject[keys[truth]["hexcode"]]]
    return min(same, key=lambda picture: distance(picture, thumbnails[truth]))


def score(pictures: list[np.ndarray], candidates: list[list[int]]) -> float:
    hits = [
        min(row, key=lambda i: distance(picture, thumbnails[i])) == row[0]
        for picture, row in zip(pictures, candidates, strict=True)
    ]
    return 100 * sum(hits) / len(hits)


height, width = options.size
scores: dict[str, float] = {}
print(
    f"{options.model}: {options.prompts} prompts a row, {height}x{width} pixels, sampling "
    f"{sampling() or 'as the checkpoint says'}"
)
print(f"{'split':10} {'pictures':22} top-1 of {NUM_CANDIDATES}, %")
for split in options.splits:
    truths, candidates = choose(split)
    images = [everything[truth]["image"] for truth in truths]
    scores[f"{split}, reconstructions"] = score(reconstruct(images), candidates)
    print(f"{split:10} {'reconstructions':22} {scores[f'{split}, reconstructions']:.1f}")
    if split != "train":
        known = [(nearest_copy(row[0]), row) for row in candidates if keys[row[0]]["hexcode"] in train_of_subject]
        share = score([copy for copy, _ in known], [row for _, row in known])
        scores[f"{split}, best copy from train"] = share
        print(f"{split:10} {'best copy from train':22} {share:.1f} (of {len(known)} subjects that train holds)")
    for language in options.languages:
        prompts = [prompt(keys[truth], language) for truth in truths]
        drawn = draw(prompts, options.size, height, width)
        scores[f"{split}, {language}"] = score(drawn, candidates)
        print(f"{split:10} {'drawn, ' + language:22} {scores[f'{split}, {language}']:.1f}", flush=True)
        if height != width:
            side = [min(height, width)] * 2
            named, other, again = (
                draw(prompts, written, *side, seed=seed) for written, seed in ((side, 0), (options.size, 0), (side, 1))
            )
            pairs = ([distance(*pair) for pair in zip(named, changed, strict=True)] for changed in (other, again))
            by_size, by_seed = map(median, pairs)
            scores[f"{split}, {language}: distance by the size named"] = by_size
            scores[f"{split}, {language}: distance by the seed"] = by_seed
            print(
                f"{'':10}   on {side[0]}x{side[1]} pixels: naming {height}x{width} moves pictures by {by_size:.4f}, "
                f"another seed by {by_seed:.4f}"
            )
        to_truth = [distance(picture, thumbnails[truth]) for picture, truth in zip(drawn, truths, strict=True)]
        if split == "train":
            print(f"{'':10}   median squared distance to the truth {median(to_truth):.4f}")
            continue
        pairs = [
            (d, min(distance(picture, thumbnails[i]) for i in train_of_subject[keys[truth]["hexcode"]]))
            for d, picture, truth in zip(to_truth, drawn, truths, strict=True)
            if keys[truth]["hexcode"] in train_of_subject
        ]
        nearer = 100 * sum(copied < true for true, copied in pairs) / len(pairs)
        print(
            f"{'':10}   median squared distance to the truth {median(t for t, _ in pairs):.4f}, to the nearest train "
            f"picture of the subject {median(c for _, c in pairs):.4f}; nearer to the latter {nearer:.0f} %"
        )
    if {"en", "zh"} <= set(options.languages):
        print(f"{'':10}   Chinese less English: {scores[f'{split}, zh'] - scores[f'{split}, en']:+.1f} points")
if options.json:
    options.json.write_text(json.dumps({"model": options.model, "size": options.size, "scores": scores}, indent=1))
