"""
Train the image tokenizer of mars-emoji: a VQ-GAN with downsampling 8 and 2,048 codes.

    mars-hf data emoji --size 64 --out data/emoji-64
    mars-hf data emoji --size 128 --out data/emoji-128
    python examples/train_vqgan.py --data data/emoji-64 data/emoji-128 --out runs/vqgan

Run the last line again after an interruption: it continues from the last checkpoint.
"""

import argparse

import numpy as np
import torch
from datasets import load_dataset
from diffusers import VQModel

from mars_hf.training.run import is_bfloat16_fast
from mars_hf.training.vqgan import VqganTrainer, VqganTrainingArguments, evaluate_vqgan

VQ_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 128, 160),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 8,
    "vq_embed_dim": 8,
    "num_vq_embeddings": 2048,
    # Attention looks at the whole picture: without it, training on crops carries over to any size.
    "mid_block_add_attention": False,
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", nargs=2, required=True, help="emoji data at 64 and at 128 pixels")
parser.add_argument("--out", required=True)
parser.add_argument("--max-steps", type=int, default=VqganTrainingArguments.max_steps)
parser.add_argument("--batch-size", type=int, default=VqganTrainingArguments.batch_size)
options = parser.parse_args()

torch.set_flush_denormal(True)
args = VqganTrainingArguments(max_steps=options.max_steps, batch_size=options.batch_size)
torch.manual_seed(args.seed)


def pictures(split: str) -> dict[int, np.ndarray]:
    sources = {side: load_dataset(path, split=split) for side, path in zip((64, 128), options.data, strict=True)}
    return {side: np.stack([np.asarray(row["image"]) for row in data]) for side, data in sources.items()}


device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
vqgan = VQModel(**VQ_CONFIG).to(device)
trainer = VqganTrainer(vqgan, pictures("train"), args, options.out, eval_images=pictures("validation"))
vqgan = trainer.train(bf16=is_bfloat16_fast())
for side, images in pictures("test").items():
    print(f"test, {side} px:", evaluate_vqgan(vqgan, images))
