"""
How well the image tokenizer of a checkpoint, as stored, gives held-out pictures back.

    mars-hf data emoji --size 64 --out data/emoji-64
    mars-hf data emoji --size 128 --out data/emoji-128
    python benchmarks/vqgan.py --data data/emoji-64 data/emoji-128
"""

import argparse

import numpy as np
import torch
from datasets import load_dataset

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration
from mars_hf.training.vqgan import evaluate_vqgan

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", nargs="+", required=True, help="emoji data of one size each")
parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT))
parser.add_argument("--split", default="test")
options = parser.parse_args()

torch.set_flush_denormal(True)
vqgan = MarsForConditionalGeneration.from_pretrained(options.model).vqgan
print(f"{options.model}, {options.split} split, {sum(p.numel() for p in vqgan.parameters()):,} parameters")
for source in options.data:
    images = np.stack([np.asarray(image) for image in load_dataset(source, split=options.split)["image"]])
    scores = evaluate_vqgan(vqgan, images)
    used = f"{100 * scores['codes_used']:.1f} % of {vqgan.config.num_vq_embeddings} codes used"
    size = f"{images.shape[1]} px, {len(images)} pictures"
    print(f"{size}: PSNR {scores['psnr']:.2f} dB, {used}, perplexity {scores['perplexity']:.0f}")
