"""
Train a small MARS from emoji to pictures, in two minutes on a CPU.

    mars-hf data emoji --size 64 --out data/emoji-64
    python examples/train_tiny.py --data data/emoji-64 --out runs/tiny

A frozen language model and a frozen VQ-GAN, here those of mars-emoji, become a MARS whose visual part knows nothing
yet. It learns a few subjects from English and Chinese captions; in so short a time it still mixes their styles up.
`OUT/drawn.png` shows what it draws beside the true pictures, `OUT/final` is the model, for example for
`mars-hf generate "red apple" --model OUT/final --out apple.png`.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import Qwen2ForCausalLM, TrainingArguments

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsPipeline, MarsProcessor
from mars_hf.contact_sheet import contact_sheet
from mars_hf.data.emoji_captions import emoji_caption
from mars_hf.data.text import with_style
from mars_hf.training.collation import AlignedCollator
from mars_hf.training.mixture import MixtureDataset, Source
from mars_hf.training.muon import muon_with_adamw
from mars_hf.training.run import is_bfloat16_fast
from mars_hf.training.trainer import MarsTrainer

SUBJECTS = ("red apple", "red heart", "sun", "evergreen tree", "star", "mushroom")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="emoji data at 64 pixels")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--subjects", nargs="+", default=SUBJECTS, help="English captions of what is learnt")
parser.add_argument("--max-steps", type=int, default=200)
parser.add_argument("--batch-size", type=int, default=16)
options = parser.parse_args()

# The parts: a language model and an image tokenizer that are done learning.
torch.set_flush_denormal(True)
torch.manual_seed(0)
mars_emoji = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT, attn_implementation="eager")
text_model = Qwen2ForCausalLM(mars_emoji.config.text_config)
weights = mars_emoji.model.state_dict()
text_model.model.load_state_dict({name: weights[name] for name in text_model.model.state_dict()})

# The model: visual experts start as copies of the text experts.
size = mars_emoji.config.default_image_size
model = MarsForConditionalGeneration.from_text_and_vq(
    text_model, mars_emoji.vqgan, default_image_size=size, expert_output_projection=True
)
model.generation_config.image_defaults = {"guidance_scale": 3.0}
processor = MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT)

# The data: pictures as codes.
data = load_dataset(options.data, split="train")
if missing := set(options.subjects) - set(data["caption_en"]):
    parser.error(f"{options.data} has no pictures of {', '.join(sorted(missing))}")
data = data.filter(lambda caption: caption in options.subjects, input_columns="caption_en")
pixels = processor.image_processor(list(data["image"]), return_tensors="pt")["pixel_values"]
records = [
    {**record, "image_codes": codes.flatten().tolist(), "height": size, "width": size}
    for record, codes in zip(data.remove_columns("image"), model.encode_image(pixels), strict=True)
]

# Stage I: next-token prediction of the codes. Noise on the codes that are fed makes it read the prompt.
source = Source("text-to-image", 1.0, records, emoji_caption, code_noise=0.5)
trainer = MarsTrainer(
    model,
    TrainingArguments(
        options.out,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=options.max_steps // 20,
        bf16=is_bfloat16_fast(),
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    ),
    train_dataset=MixtureDataset(processor, [source], options.batch_size, options.max_steps),
    data_collator=AlignedCollator(model.config, processor.tokenizer.pad_token_id),
    optimizers=(muon_with_adamw(model, muon_learning_rate=6e-3, learning_rate=3e-3), None),
    loss_scope="grammar",
    label_spread=0.1,
)
trainer.train()
trainer.save_model(options.out / "final")
processor.save_pretrained(options.out / "final")

# The pictures, every other one from its Chinese caption.
model.eval()
prompts = [
    with_style(record[f"caption_{language}"], record["style"], language)
    for record, language in zip(records, ["en", "zh"] * len(records), strict=False)
]
drawn = MarsPipeline(model=model, processor=processor)(prompts, batch_size=16)
pairs = zip(drawn, data["image"], strict=True)
pictures = [picture for (one,), true in pairs for picture in (one["generated_image"], true)]
captions = [caption for prompt in prompts for caption in (prompt, "true")]
contact_sheet(pictures, captions, columns=8, picture_size=128).save(options.out / "drawn.png")
print(options.out / "drawn.png")
