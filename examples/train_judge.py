"""
Train a judge for emoji: a small CLIP model on the train split, with English and Chinese captions.

    python examples/train_judge.py --data data/emoji-64 --out runs/judge

It scores drawings in `mars-hf evaluate emoji` and shares nothing with the model that draws but the tokenizer. Run the
line again after an interruption: it continues from the last checkpoint. The judge is in `OUT/final`.
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from mars_hf import DEFAULT_CHECKPOINT, MarsProcessor
from mars_hf.data.emoji_captions import CaptionStyle, emoji_caption
from mars_hf.evaluation.encoders import ClipEncoder
from mars_hf.evaluation.metrics import retrieval_hits
from mars_hf.evaluation.prompts import EmojiPrompts
from mars_hf.training.run import is_bfloat16_fast
from mars_hf.training.text import last_checkpoint

SIZE = 64
TEXT_LENGTH = 48
LAYERS = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
MEAN, STD = [0.5] * 3, [0.5] * 3
LARGEST_SHIFT = 4  # pixels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="emoji data at 64 pixels")
parser.add_argument("--out", required=True, type=Path)
parser.add_argument("--max-steps", type=int, default=2000)
parser.add_argument("--batch-size", type=int, default=192)
parser.add_argument("--limit", type=int, help="of pictures, to try it out")
options = parser.parse_args()

torch.set_flush_denormal(True)
torch.manual_seed(0)

# CLIP reads a text's feature off its end token, so the tokenizer must write one.
plain = MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT).tokenizer
end, backend = plain.eos_token, plain.backend_tokenizer
backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, plain.eos_token_id)])
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token=end,
    pad_token=end,
    model_max_length=TEXT_LENGTH,
    padding_side="right",
)
image_processor = CLIPImageProcessor(
    size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
)
model = CLIPModel(
    CLIPConfig(
        text_config={
            **LAYERS,
            "num_hidden_layers": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TEXT_LENGTH,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
        },
        vision_config={**LAYERS, "num_hidden_layers": 6, "image_size": SIZE, "patch_size": 8},
        projection_dim=128,
    )
)
model.set_attn_implementation("eager")  # on a CPU its backward pass is the faster one


class Captioned(Dataset):
    """Pictures, each with a caption in one of its forms: index and pass decide which."""

    def __init__(self, data, num_rows: int):
        pictures = [torch.tensor(list(one.convert("RGB").tobytes()), dtype=torch.uint8) for one in data["image"]]
        self.pictures = torch.stack(pictures).view(-1, SIZE, SIZE, 3)
        self.records, self.num_rows = data.remove_columns("image").to_list(), num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict:
        turn, place = divmod(index, len(self.records))
        order = torch.randperm(len(self.records), generator=torch.Generator().manual_seed(turn))
        chosen = int(order[place])
        caption = emoji_caption(self.records[chosen], random.Random(f"judge {index}"), CaptionStyle(named_style=0.9))
        return {"picture": self.pictures[chosen], "caption": caption, "index": index}


def collate(rows: list[dict]) -> dict:
    """Shift every picture a little and blur half of them, so that a drawing's small faults weigh little."""
    rng = torch.Generator().manual_seed(rows[0]["index"])
    pixels = torch.stack([row["picture"] for row in rows]).permute(0, 3, 1, 2) / 127.5 - 1
    padded = F.pad(pixels, [LARGEST_SHIFT] * 4, value=1.0)
    shifts = torch.randint(0, 2 * LARGEST_SHIFT + 1, (len(rows), 2), generator=rng).tolist()
    pixels = torch.stack([p[:, y : y + SIZE, x : x + SIZE] for p, (y, x) in zip(padded, shifts, strict=True)])
    blurred = F.interpolate(F.avg_pool2d(pixels, 2), size=(SIZE, SIZE), mode="bilinear")
    half = torch.rand(len(rows), 1, 1, 1, generator=rng) < 0.5
    texts = tokenizer([row["caption"] for row in rows], padding=True, truncation=True, return_tensors="pt")
    texts = {name: texts[name] for name in ("input_ids", "attention_mask")}
    return {**texts, "pixel_values": torch.where(half, blurred, pixels), "return_loss": True}


data = load_dataset(options.data, split="train")
if options.limit:
    data = data.select(range(options.limit))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        str(options.out),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, options.max_steps // 4),
        weight_decay=0.1,
        use_cpu=not torch.accelerator.is_available(),  # bf16 on a CPU has to be asked for
        bf16=is_bfloat16_fast(),
        remove_unused_columns=False,
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        report_to=[],
        train_sampling_strategy="sequential",
    ),
    train_dataset=Captioned(data, options.max_steps * options.batch_size),
    data_collator=collate,
)
trainer.train(resume_from_checkpoint=last_checkpoint(options.out))
model.save_pretrained(options.out / "final")
CLIPProcessor(image_processor, tokenizer).save_pretrained(options.out / "final")

judge = ClipEncoder(options.out / "final")
for language in ("en", "zh"):
    prompts = EmojiPrompts(options.data, "validation", [language], options.limit).load()
    pictures: list[Image.Image] = [prompts.reference(number) for number in range(len(prompts))]
    texts = [prompt.text for prompt in prompts.prompts]
    hits = retrieval_hits(judge.images(pictures)[:, None], judge.texts(texts)[0], texts)
    print(f"validation, {language}: of {len(texts)} prompts a picture finds its own in {100 * hits.mean():.1f} %")
