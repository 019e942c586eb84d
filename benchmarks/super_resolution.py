"""
Is drawing a picture twice as large better than bicubic enlargement, and what does it cost to draw K codes a step?

    mars-hf data emoji --size 128 --out data/emoji-128
    python benchmarks/super_resolution.py --data data/emoji-128 --model FOLDER

Each test picture is made smaller, encoded, and drawn large again from its codes and its caption. Printed are the PSNR
against the true picture and the Fréchet distance of VQ-GAN features (the mean of its last encoder states over each
quarter) with its 95 % interval, for each K that the model was trained for; beside them bicubic enlargement (Pillow's
kernel), of the small picture as it was and as its codes give it back, and the ceiling: the large picture's own codes.
All pixels are cut to the range of pictures first. Last, what is gained over bicubic and what the largest K costs.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import load_dataset
from torch.nn import functional as F
from tqdm.auto import tqdm

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsProcessor
from mars_hf.data.encode import scale_down
from mars_hf.data.text import with_style
from mars_hf.evaluation.metrics import frechet_distance, frechet_interval
from mars_hf.image_processing_mars import decode_codes, encode_pixels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="emoji data at the size that is drawn")
parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT / "super_resolution"))
parser.add_argument("--split", default="test")
parser.add_argument("--pictures", type=int, default=712, help="of the split, at most")
parser.add_argument("--codes-per-step", nargs="+", type=int, help="default: all that the model was trained for")
parser.add_argument("--batch-size", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--json", type=Path, help="write the scores to this file too")
options = parser.parse_args()
if options.json:
    options.json.parent.mkdir(parents=True, exist_ok=True)

torch.set_flush_denormal(True)
model = MarsForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
processor = MarsProcessor.from_pretrained(options.model)
factor = model.config.super_resolution_factor
if factor is None:
    parser.error(f"{options.model} draws from text alone: give a model of super-resolution")
records = load_dataset(options.data, split=options.split).shuffle(seed=0)
records = records.select(range(min(options.pictures, len(records))))
captions = [with_style(row["caption_en"], row["style"], "en") for row in records.remove_columns("image")]
truth = processor.image_processor(list(records["image"]), do_resize=False, return_tensors="pt")["pixel_values"]
small = scale_down(truth, factor)


def enlarge(pixels: torch.Tensor) -> torch.Tensor:
    return F.interpolate(pixels, truth.shape[-2:], mode="bicubic", antialias=True)  # Pillow's kernel


def psnr(pixels: torch.Tensor) -> float:
    errors = ((pixels - truth) / 2).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


@torch.no_grad()
def features(pixels: torch.Tensor) -> torch.Tensor:
    states = [model.vqgan.encoder(batch) for batch in pixels.split(options.batch_size)]
    return F.adaptive_avg_pool2d(torch.cat(states), 2).flatten(1)


def draw(grids: list[torch.Tensor], k: int) -> torch.Tensor:
    pictures, generator = [], torch.Generator().manual_seed(options.seed)
    for start in tqdm(range(0, len(grids), options.batch_size), desc=f"K = {k}", unit="batch", leave=False):
        rows = slice(start, start + options.batch_size)
        inputs = processor(captions[rows], lowres_codes=grids[rows])
        drawn = model.generate(**inputs, generation_mode="image", codes_per_step=k, generator=generator)
        pictures += model.decode_image_tokens(drawn, inputs["image_sizes"])
    return torch.stack(pictures)


def report(name: str, pixels: torch.Tensor, seconds: float | None = None) -> None:
    pixels = pixels.clamp(-1, 1)
    found, speed = features(pixels), "" if seconds is None else f"{1000 * seconds / len(truth):10.0f}"
    interval = frechet_interval(found, true_features)
    scores[name] = {"psnr": psnr(pixels), "frechet": frechet_distance(found, true_features), "interval": interval}
    low, high = interval
    row = f"{scores[name]['psnr']:8.2f} {scores[name]['frechet']:9.4f} [{low:.4f}, {high:.4f}]"
    print(f"{name:34} {row} {speed}", flush=True)


with torch.no_grad():
    grids = encode_pixels(model.vqgan, small)
    large = torch.stack(decode_codes(model.vqgan, encode_pixels(model.vqgan, truth)))
    small_again = torch.stack(decode_codes(model.vqgan, grids))
true_features = features(truth)
scores: dict[str, dict] = {}
print(f"{options.model}: {len(truth)} pictures of {options.split}, x{factor}, {model.config.code_order} order")
print(f"{'':34} {'PSNR, dB':>8} {'Fréchet, 95 % interval':>26} {'ms each':>10}")
report("bicubic, of the small picture", enlarge(small))
report("bicubic, of the small codes", enlarge(small_again))
for k in options.codes_per_step or sorted(model.config.trained_codes_per_step):
    begin = time.perf_counter()
    drawn = draw(grids, k)
    report(f"drawn, K = {k}", drawn, time.perf_counter() - begin)
report("the large picture's own codes", large)
by_k = {k: scores[name] for k in model.config.trained_codes_per_step if (name := f"drawn, K = {k}") in scores}
gains = {k: score["psnr"] - scores["bicubic, of the small codes"]["psnr"] for k, score in by_k.items()}
print("over bicubic of the small codes: " + ", ".join(f"K = {k} {gain:+.2f} dB" for k, gain in gains.items()))
if 1 in by_k and len(by_k) > 1:
    ratio = by_k[max(by_k)]["frechet"] / by_k[1]["frechet"]
    print(f"Fréchet distance at K = {max(by_k)} to that at K = 1: {ratio:.2f}x")
if options.json:
    options.json.write_text(json.dumps({"model": options.model, "scores": scores}, indent=1))
