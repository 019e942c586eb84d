"""
Draw the picture grid of the README: train and held-out prompts in both languages, beside the true pictures.

    mars-hf data emoji --size 64 --out data/emoji-64
    python docs/draw_grid.py --data data/emoji-64 --out docs/grid.png
"""

import argparse
import random

import torch
from datasets import load_dataset

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsProcessor
from mars_hf.contact_sheet import contact_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="emoji data at 64 pixels")
parser.add_argument("--out", required=True)
parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT))
parser.add_argument("--prompts", type=int, default=10, help="of each split, half English and half Chinese")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

model = MarsForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
processor = MarsProcessor.from_pretrained(options.model)
pictures, captions = [], []
for split in ("train", "test"):
    data = load_dataset(options.data, split=split)
    rows = [data[i] for i in random.Random(options.seed).sample(range(len(data)), options.prompts)]
    prompts = [
        f"{row['caption_zh']}，{row['style']} 风格" if n % 2 else f"{row['caption_en']}, {row['style']} style"
        for n, row in enumerate(rows)
    ]
    inputs = processor(prompts, height=64, width=64, return_tensors="pt")
    generator = torch.Generator().manual_seed(options.seed)
    drawn = model.generate(**inputs, generation_mode="image", generator=generator)
    pixels = model.decode_image_tokens(drawn, inputs["image_sizes"])
    for prompt, row, picture in zip(
        prompts, rows, processor.post_process_multimodal_output(pixels, generation_mode="image"), strict=True
    ):
        pictures += [picture, row["image"]]
        captions += [f"{split}: {prompt}", "true"]
contact_sheet(pictures, captions, columns=8, picture_size=128).save(options.out)
print(options.out)
