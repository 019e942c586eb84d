"""
Does the model tell a story that its title asks for? 50 titles that no training story has, greedy words: does the
document end by itself with the right number of pictures, each begun by the model, and is each picture the subject that
is due (nearest to the true one of 100 pictures of its style, as in emoji_identity.py)?

    mars-hf data emoji --size 64 --out data/emoji-64
    python benchmarks/emoji_stories.py --data data/emoji-64 --model FOLDER

A title is held out if it has a held-out pair of subject and style; the pairs beside it may be of the training set, so
both are counted apart. Printed too: how likely `<img>` was, and its rank, where the story wants a picture and the text
before it is the true one.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets, load_dataset
from PIL import Image
from tqdm.auto import tqdm

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsProcessor
from mars_hf.data.emoji import split_of
from mars_hf.data.stories import held_out_stories
from mars_hf.evaluation.provenance import checkpoint_folder
from mars_hf.studio import Studio

SIDE, NUM_CANDIDATES, MAX_NEW_TOKENS = 32, 100, 448

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="emoji data at 64 pixels")
parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT))
parser.add_argument("--adapter", type=Path, help="PEFT adapter to tell with; the model's own if not given")
parser.add_argument("--stories", type=int, default=50)
parser.add_argument("--seed", type=int, default=0, help="of the pictures' sampler")
parser.add_argument("--json", type=Path, help="write the scores to this file too")
options = parser.parse_args()
if options.json:
    options.json.parent.mkdir(parents=True, exist_ok=True)

torch.set_flush_denormal(True)
folder = checkpoint_folder(options.model)
model = MarsForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
studio = Studio(model, MarsProcessor.from_pretrained(folder), folder, options.adapter)
model, processor = studio.storyteller, studio.processor
named = f"{options.model} with the adapter {studio.adapter}" if studio.adapter else options.model
data = concatenate_datasets([load_dataset(options.data, split=split) for split in ("train", "test")])
rows = data.remove_columns("image").to_list()
of_style: dict[str, list[int]] = {}
for place, row in enumerate(rows):
    of_style.setdefault(row["style"], []).append(place)
place_of = {(row["hexcode"], row["style"]): place for place, row in enumerate(rows)}


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255


def is_recognised(picture: Image.Image, hexcode: str, style: str) -> bool:
    """Tell whether a picture is nearer to the true one than to 99 others of its style."""
    truth = place_of[hexcode, style]
    rivals = [place for place in of_style[style] if rows[place]["hexcode"] != hexcode]
    candidates = [truth, *random.Random(f"{hexcode} {style}").sample(rivals, NUM_CANDIDATES - 1)]
    drawn = small(picture)
    distances = [float(np.square(drawn - small(data[place]["image"])).mean()) for place in candidates]
    return min(distances) == distances[0]


def tell(story: dict) -> tuple[bool, list[Image.Image], list[str]]:
    """Continue a title, in the words of its first line, to the end; give its pictures, and the lines behind it."""
    prompt = processor(story["segments"][0], height=64, width=64, generation_mode="interleaved")
    told = model.generate(
        **prompt, generation_mode="interleaved", do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
        generator=torch.Generator().manual_seed(options.seed),
    )  # fmt: skip
    ends = model.generation_config.eos_token_id
    by_itself = int(told[0, -1]) in (ends if isinstance(ends, list) else [ends])
    pixels = model.decode_image_tokens(told, prompt["image_sizes"])
    (segments,) = processor.post_process_multimodal_output(told, generation_mode="interleaved", pixel_values=pixels)
    lines = [part.strip() for part in segments if isinstance(part, str)]
    return by_itself, [part for part in segments if not isinstance(part, str)], lines[1:]


@torch.no_grad()
def starts_of_pictures(story: dict) -> list[tuple[float, int]]:
    """Probability and rank of `<img>` at each place where the true story has a picture."""
    text = [part if isinstance(part, str) else data[part["index"]]["image"] for part in story["segments"]]
    ids = processor([text], do_resize=False)["input_ids"]
    start, offset = model.config.image_start_token_id, model.config.image_token_offset
    scores = model(ids).logits[0]
    admitted = torch.cat([scores[:, :offset], scores[:, start : start + 1]], dim=1).softmax(-1)
    found = []
    for column in (ids[0] == start).nonzero().flatten().tolist():
        chances = admitted[column - 1]
        found.append((float(chances[-1]), 1 + int((chances > chances[-1]).sum())))
    return found


stories = held_out_stories(data, options.stories)
ended = right_number = 0
recognised: dict[str, list[bool]] = {"train": [], "test": []}
starts: list[tuple[float, int]] = []
same_lines: list[bool] = []
for story in tqdm(stories, unit="story", leave=False):
    starts += starts_of_pictures(story)
    by_itself, pictures, lines = tell(story)
    due = [part.strip() for part in story["segments"][1:] if isinstance(part, str)]
    same_lines += [number < len(lines) and lines[number] == line for number, line in enumerate(due)]
    ended += by_itself
    right_number += by_itself and len(pictures) == len(story["expected"])
    for number, subject in enumerate(story["expected"]):  # a picture that is missing is as bad as a wrong one
        is_right = number < len(pictures) and is_recognised(pictures[number], *subject)
        recognised["test" if split_of(*subject) == "test" else "train"].append(is_right)

chances, ranks = map(np.array, zip(*starts, strict=True))
every = [*recognised["train"], *recognised["test"]]
scores = {
    "ends by itself, %": 100 * ended / len(stories),
    "with the right number of pictures, %": 100 * right_number / len(stories),
    "lines and endings to the letter, %": 100 * float(np.mean(same_lines)),
    "pictures that show the subject that is due, %": 100 * float(np.mean(every)),
    **{f"of them of {split} pairs, %": 100 * float(np.mean(of)) for split, of in recognised.items() if of},
    "`<img>` where it is due: median chance": float(np.median(chances)),
    "its lowest chance": float(chances.min()),
    "first in, %": 100 * float(np.mean(ranks == 1)),
    "its worst rank": int(ranks.max()),
}
print(f"{named}: {len(stories)} stories, greedy words; {len(every)} pictures, {len(recognised['test'])} held out")
for name, score in scores.items():
    print(f"{name:48} {score:8.3g}")
if options.json:
    options.json.write_text(json.dumps({"model": named, "stories": len(stories), "scores": scores}, indent=1))
