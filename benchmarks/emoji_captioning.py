"""
Does the model know what a picture shows? The caption of each picture competes with 99 other labels of the same
language: which one is the likeliest after the picture? Chance is 1 %. Beside it, how often the greedy caption, in the
language that the model chooses, is the label to the letter.

    mars-hf data emoji --size 64 --out data/emoji-64
    mars-hf data encode --data data/emoji-64 --out data/emoji-64-codes
    mars-hf data encode --data data/emoji-64 --split test --out data/emoji-64-codes
    python benchmarks/emoji_captioning.py --data data/emoji-64-codes

Captions name the drawing style, which all candidates share: "red apple, noto style".
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsProcessor
from mars_hf.data.records import open_records
from mars_hf.data.text import with_style

NUM_CANDIDATES = 100

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="emoji data as `mars-hf data encode` wrote them")
parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT))
parser.add_argument("--splits", nargs="+", default=["train", "test"])
parser.add_argument("--languages", nargs="+", choices=("en", "zh"), default=["en", "zh"])
parser.add_argument("--pictures", type=int, default=400)
parser.add_argument("--json", type=Path, help="write the scores to this file too, after each row")
options = parser.parse_args()
if options.json:
    options.json.parent.mkdir(parents=True, exist_ok=True)

torch.set_flush_denormal(True)
model = MarsForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
processor = MarsProcessor.from_pretrained(options.model)


@torch.no_grad()
def log_likelihoods(record: dict, captions: list[str]) -> torch.Tensor:
    """Log-likelihoods `(captions,)` of whole captions, their end included, after the picture of a record."""
    size = (record["height"], record["width"])
    rows = [processor.training_example("captioning", text, record["image_codes"], *size) for text in captions]
    begin, width = rows[0]["labels"].count(-100), max(len(row["labels"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])[:, begin:]
    cache = DynamicCache(config=model.config)  # the picture is read once for all captions
    first = model(ids[:1, :begin], past_key_values=cache, use_cache=True, logits_to_keep=1, vocabulary="text").logits
    cache.batch_repeat_interleave(len(rows))
    places = torch.arange(begin, width - 1).expand(len(rows), -1)
    rest = {"position_ids": places, "past_key_values": cache, "use_cache": True, "modality": "text"}
    logits = model(ids[:, begin:-1], vocabulary="text", **rest).logits
    logits = torch.cat([first.expand(len(rows), -1, -1), logits], dim=1)
    chosen = logits.log_softmax(-1).gather(2, labels.clamp_min(0)[..., None]).squeeze(-1)
    return chosen.masked_fill(labels < 0, 0).sum(1)


@torch.no_grad()
def caption(records: list[dict]) -> list[str]:
    """Greedy captions of pictures of one size."""
    config = model.config
    codes = torch.tensor([record["image_codes"] for record in records]) + config.image_token_offset
    start, end = (torch.full((len(codes), 1), t) for t in (config.image_start_token_id, config.image_end_token_id))
    line = torch.tensor(processor.tokenizer("\n")["input_ids"]).expand(len(codes), -1)
    prompts = torch.cat([start, codes, end, line], dim=1)
    options = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "max_new_tokens": 40}
    written = model.generate(prompts, generation_mode="text", **options)
    return [text.strip() for text in processor.post_process_image_text_to_text(written[:, prompts.shape[1] :])]


def is_label(text: str, row: dict) -> bool:
    """Tell whether a caption is a picture's label in either language, with its style or without."""
    names = {language: row[f"caption_{language}"] for language in ("en", "zh")}
    return text in names.values() or any(text == with_style(name, row["style"], lang) for lang, name in names.items())


print(f"{options.model}: {options.pictures} pictures a row")
labels = [row for split in ("train", "test") for row in open_records(options.data, split).to_list()]
scores: dict[str, float] = {}


def report(name: str, share: float) -> None:
    scores[name] = share
    print(f"{name:44} {share:5.1f} %", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "scores": scores}, indent=1))


for split in options.splits:
    rng = random.Random(f"emoji captioning {split}")
    rows = open_records(options.data, split, vqgan=model.vqgan).to_list()
    rows = rng.sample(rows, min(options.pictures, len(rows)))
    for language in options.languages:
        name, first = f"caption_{language}", 0
        names = sorted({label[name] for label in labels})
        for row in tqdm(rows, desc=f"{split}, {language}", unit="picture", leave=False):
            rivals = rng.sample([one for one in names if one != row[name]], NUM_CANDIDATES - 1)
            texts = [with_style(label, row["style"], language) for label in (row[name], *rivals)]
            first += int(log_likelihoods(row, texts).argmax() == 0)
        report(f"{split}, {language}: the label is likeliest of {NUM_CANDIDATES}", 100 * first / len(rows))
    written = [text for start in range(0, len(rows), 50) for text in caption(rows[start : start + 50])]
    exact = sum(is_label(text, row) for text, row in zip(written, rows, strict=True))
    report(f"{split}: the greedy caption is the label", 100 * exact / len(rows))
