"""
Stage I of mars-emoji: text-to-image and captioning on emoji of 64 pixels, in English and Chinese.

    python examples/train_alignment.py --text runs/text --vqgan runs/vqgan --data data/emoji-64 --out runs/stage1

Run the line again after an interruption: it continues from the last checkpoint. The final model and its processor are
in `OUT/final`; `mars-hf export DIR --model OUT/final --weights-dtype bfloat16` makes a Hub folder of them.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2ForCausalLM

from mars_hf import MarsForConditionalGeneration, MarsProcessor
from mars_hf.training.alignment import (
    AlignmentCollator,
    AlignmentDataset,
    AlignmentTrainer,
    alignment_arguments,
    encode_pictures,
    subject_weights,
)
from mars_hf.training.muon import muon_with_adamw
from mars_hf.training.text import last_checkpoint

SIZE = 64
LABEL_SPREAD = 0.1  # the codebook's rows are of length 1, nearest neighbours 0.15 apart
IMAGE_DEFAULTS = {"guidance_scale": 3.0, "do_sample": True, "temperature": 0.1, "top_k": 100}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", required=True, help="the language model and its tokenizer")
parser.add_argument("--vqgan", required=True, help="the image tokenizer")
parser.add_argument("--data", required=True, help="emoji data at 64 pixels")
parser.add_argument("--out", required=True, type=Path)
parser.add_argument("--max-steps", type=int, default=6500)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--decay-steps", type=int, help="constant rate, then a decay of so many steps; default: a cosine")
parser.add_argument("--balance", type=float, default=0.0, help="0 weighs pictures alike, 1 subjects")
parser.add_argument("--captioning-share", type=float, default=0.06)
parser.add_argument("--compile", action="store_true", help="compile the picture's stretch (takes a C++ compiler)")
options = parser.parse_args()

torch.set_flush_denormal(True)
torch.manual_seed(0)
text_model = Qwen2ForCausalLM.from_pretrained(options.text, dtype=torch.float32, attn_implementation="eager")
vqgan = VQModel.from_pretrained(options.vqgan)
for frozen in (text_model, vqgan):  # rounded now as they will be stored, so that what trains sees what is shipped
    frozen.to(torch.bfloat16).to(torch.float32)
model = MarsForConditionalGeneration.from_text_and_vq(
    text_model, vqgan, default_image_size=SIZE, expert_output_projection=True
)
model.generation_config.image_defaults = IMAGE_DEFAULTS
processor = MarsProcessor.from_text_tokenizer(AutoTokenizer.from_pretrained(options.text), model.config)

options.out.mkdir(parents=True, exist_ok=True)
data = load_dataset(options.data, split="train")
codes_file = options.out / "codes.safetensors"
if not codes_file.exists():
    save_file({"codes": encode_pictures(model, processor, data)}, codes_file.with_suffix(".part"))
    codes_file.with_suffix(".part").rename(codes_file)
records = data.remove_columns("image").to_list()
dataset = AlignmentDataset(
    processor,
    records,
    load_file(codes_file)["codes"],
    image_size=(SIZE, SIZE),
    batch_size=options.batch_size,
    num_batches=options.max_steps,
    captioning_share=options.captioning_share,
    weights=subject_weights([record["hexcode"] for record in records], options.balance) if options.balance else None,
)
config = model.config
collator = AlignmentCollator(config.image_start_token_id, config.image_end_token_id, processor.tokenizer.pad_token_id)
bf16 = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
schedule = {}
if options.decay_steps:
    kwargs = {"num_decay_steps": options.decay_steps, "decay_type": "linear"}
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}
trainer = AlignmentTrainer(
    model=model,
    args=alignment_arguments(str(options.out), options.max_steps, options.batch_size, bf16, **schedule),
    train_dataset=dataset,
    data_collator=collator,
    compile_drawing=options.compile,
    loss_scope="grammar",
    label_spread=LABEL_SPREAD,
    optimizer_cls_and_kwargs=(lambda: muon_with_adamw, {"muon_learning_rate": 6e-3, "learning_rate": 3e-3}),
)
trainer.train(resume_from_checkpoint=last_checkpoint(options.out))
model.config.use_cache = model.config.text_config.use_cache = True  # Trainer turned it off
model.save_pretrained(options.out / "final")
processor.save_pretrained(options.out / "final")
