"""
Make the other part of Stage III's data: small pictures that the base model drew itself, since those are what
super-resolution meets in use.

    python examples/draw_lowres.py --data data/emoji-128-codes --records 2000 --out data/emoji-128-drawn

`--data` is what `mars-hf data encode --lowres-factor 2` wrote. Records keep all but their `lowres_codes`, which are
drawn from a caption (of emoji in the forms that their language model knows), and their `enlarged_codes`, which follow
them; drawings that are far from the true small picture are left out, for its large one would teach to ignore them.
Interrupted, it goes on with the next file of 1,000 records. `codes.json` says whose codes they are.
"""

import argparse
import os
import random
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsProcessor
from mars_hf.data.emoji_captions import CaptionStyle, emoji_caption
from mars_hf.data.encode import LOWRES_COLUMNS, open_manifest, read_manifest, write_manifest
from mars_hf.data.records import CaptionMix, captions_of, open_records
from mars_hf.image_processing_mars import decode_codes, enlarge_codes
from mars_hf.weights_mars import weight_files, weights_digest

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT), help="folder of the base model; default: mars-emoji")
parser.add_argument("--data", required=True, help="records with `image_codes` and `lowres_codes`")
parser.add_argument("--out", required=True, type=Path)
parser.add_argument("--records", type=int, default=4000, help="how many to draw")
parser.add_argument("--batch-size", type=int, default=50)
parser.add_argument("--max-distance", type=float, default=0.05, help="mean squared, pixels in [0, 1]")
parser.add_argument("--seed", type=int, default=0)
SHARD = 1000


def caption(record: dict, rng: random.Random) -> str:
    if all(record.get(name) for name in ("caption_en", "caption_zh", "style")):
        return emoji_caption(record, rng, replace(CaptionStyle(), chinese=float(rng.random() < 0.5), named_style=1.0))
    return CaptionMix().choose(captions_of(record), rng.getrandbits(32), 0)


def small_size(record: dict, factor: int) -> tuple[int, int]:
    return record["height"] // factor, record["width"] // factor


@torch.no_grad()
def draw(model, processor, records: list[dict], captions: list[str], size: tuple[int, int], generator) -> list[dict]:
    """Draw small pictures of one size; give the records whose drawing is near enough to the true one."""
    prompts = processor(captions, height=size[0], width=size[1]).to(model.device)
    sequences = model.generate(**prompts, generation_mode="image", generator=generator)
    drawn = [row[0].cpu() for row in model.collect_image_codes(sequences, prompts["image_sizes"])]
    truths = [
        torch.tensor(record["lowres_codes"]).view_as(codes) for record, codes in zip(records, drawn, strict=True)
    ]
    ours, theirs = (torch.stack(decode_codes(model.vqgan, codes)) for codes in (drawn, truths))
    distances = ((ours - theirs) / 2).square().mean((1, 2, 3)).tolist()
    large = enlarge_codes(model.vqgan, drawn, records[0]["height"] // size[0])
    return [
        {
            **record,
            **{name: grid.flatten().tolist() for name, grid in zip(LOWRES_COLUMNS, grids, strict=True)},
            "distance": distance,
        }
        for record, distance, *grids in zip(records, distances, drawn, large, strict=True)
    ]


def main() -> None:
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = MarsForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval().to(device)
    processor = MarsProcessor.from_pretrained(options.model)
    rows = open_records(options.data, vqgan=model.vqgan)
    order = random.Random(options.seed).sample(range(len(rows)), min(options.records, len(rows)))
    made_by = read_manifest(options.data)
    recipe = {"drawn_for": made_by["recipe"], "seed": options.seed, "max_distance": options.max_distance}
    recipe["base"] = weights_digest(weight_files(Path(options.model)))  # another base draws others
    manifest, done = open_manifest(options.out, made_by["tokenizer"], recipe, "train", len(order))
    for start in tqdm(range(done["seen"], len(order), SHARD), desc="Drawing", unit="file"):
        shard, chosen = done["shards"], rows.select(order[start : start + SHARD])
        kept = draw_shard(model, processor, chosen.to_list(), options, shard)
        if kept:
            path = options.out / "data" / f"train-{shard:05d}.parquet"
            scratch = path.with_suffix(".part")
            Dataset.from_list(kept).to_parquet(scratch)
            os.replace(scratch, path)
        done |= {"shards": shard + 1, "seen": start + len(chosen), "records": done["records"] + len(kept)}
        done["left_out"]["too far from the true one"] = done["seen"] - done["records"]
        write_manifest(options.out, manifest)
    if not done["records"]:
        raise SystemExit(
            f"None of {len(order)} drawings is near enough: raise --max-distance, or train the base longer."
        )
    done["complete"] = True
    write_manifest(options.out, manifest)


def draw_shard(model, processor, rows: list[dict], options: argparse.Namespace, shard: int) -> list[dict]:
    factor = round((len(rows[0]["image_codes"]) / len(rows[0]["lowres_codes"])) ** 0.5)
    generator = torch.Generator(model.device).manual_seed(options.seed * 1009 + shard)
    rng = random.Random(f"{options.seed}/{shard}")
    kept: list[dict] = []
    for size in sorted({small_size(row, factor) for row in rows}):
        alike = [row for row in rows if small_size(row, factor) == size]
        for start in tqdm(range(0, len(alike), options.batch_size), unit="batch", leave=False):
            records = alike[start : start + options.batch_size]
            drawn = draw(model, processor, records, [caption(record, rng) for record in records], size, generator)
            kept += [row for row in drawn if row.pop("distance") <= options.max_distance]
    print(f"file {shard}: {len(kept)} of {len(rows)} drawings are near enough")
    return kept


if __name__ == "__main__":
    main()
