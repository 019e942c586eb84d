"""
Does the model know what a picture shows? The caption of each picture competes with 99 other labels of the same
language: which one is the likeliest after the picture? Chance is 1 %. Beside it, how often the greedy caption is the
label to the letter.

    mars-hf data emoji --size 64 --out data/emoji-64
    mars-hf data encode --data data/emoji-64 --out data/emoji-64-codes
    mars-hf data encode --data data/emoji-64 --split test --out data/emoji-64-codes
    python benchmarks/emoji_captioning.py --data data/emoji-64-codes

Captions name the drawing style, which all candidates share: "red apple, noto style".
"""

import argparse
import random

import torch
from tqdm.auto import tqdm

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
options = parser.parse_args()

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
    logits = model(ids, logits_to_keep=torch.arange(begin - 1, width - 1), vocabulary="text").logits
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


print(f"{options.model}: {options.pictures} pictures a row")
print(f"{'split':6} {'language':8} likeliest of {NUM_CANDIDATES}, %   greedy caption is the label, %")
labels = [row for split in ("train", "test") for row in open_records(options.data, split).to_list()]
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
        written = [text for start in range(0, len(rows), 50) for text in caption(rows[start : start + 50])]
        # A caption may name the style or not, in either language.
        truths = [{row[key] for key in ("caption_en", "caption_zh")} for row in rows]
        exact = [
            text in names_of
            or any(text == with_style(one, row["style"], lang) for one in names_of for lang in ("en", "zh"))
            for text, names_of, row in zip(written, truths, rows, strict=True)
        ]
        shares = (100 * first / len(rows), 100 * sum(exact) / len(rows))
        print(f"{split:6} {language:8} {shares[0]:19.1f}   {shares[1]:28.1f}", flush=True)
