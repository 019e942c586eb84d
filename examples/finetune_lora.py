"""
Teach a MARS pictures of your own: LoRA on its visual experts, with nothing but transformers' Trainer and PEFT.

    python examples/finetune_lora.py my-pictures --prompt "my cat on a sofa" --out runs/lora

The folder holds pictures whose names are their captions ("my cat on a sofa.png"), or pictures and a `metadata.jsonl`
of lines like {"file_name": "1.png", "caption": "my cat on a sofa"}. `OUT/before-after.png` shows the prompt before and
after, `OUT/adapter` is what was learnt: `PeftModel.from_pretrained(model, "OUT/adapter")` puts it on.
"""

import argparse
from pathlib import Path

from datasets import Image, load_dataset
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from mars_hf import DEFAULT_CHECKPOINT, MarsForConditionalGeneration, MarsPipeline, MarsProcessor
from mars_hf.contact_sheet import contact_sheet

VISUAL_EXPERTS = r".*\.visual_([qkvo]_proj|mlp\.(gate|up|down)_proj)"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pictures", help="folder of pictures")
parser.add_argument("--prompt", help="what to draw; the first caption if not given")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder of another checkpoint")
parser.add_argument("--column", help="of metadata.jsonl, with the captions; `caption` or `text` if not given")
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--rank", type=int, default=16)
options = parser.parse_args()

set_seed(0)
model = MarsForConditionalGeneration.from_pretrained(options.model)
processor = MarsProcessor.from_pretrained(options.model)
processor.image_tokenizer = model.vqgan  # pictures come out of it as codes

# All files are for training, whatever their names; the processor opens them.
data = load_dataset("imagefolder", data_dir=options.pictures, data_files={"train": "**"}, split="train")
paths = [Path(picture["path"]) for picture in data.cast_column("image", Image(decode=False))["image"]]
is_named = set(data.column_names) <= {"image", "label"}  # there is no metadata
columns = [name for name in (options.column, "caption", "text") if name in data.column_names]
if not is_named and not columns or options.column not in (None, *columns):
    parser.error(f"metadata.jsonl has the columns {', '.join(data.column_names)}: which holds captions? See --column.")
captions = [path.stem for path in paths] if is_named else list(data[columns[0]])

rows = []
for path, caption in zip(tqdm(paths, desc="Encoding pictures"), captions, strict=True):
    row = processor(text=caption, images=path, task="text-to-image", return_labels=True)
    rows.append({name: values[0].tolist() for name, values in row.items()})

prompt = options.prompt or captions[0]
pipe = MarsPipeline(model=model, processor=processor)
before = pipe(prompt, seed=0)[0]["generated_image"]

adapted = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=VISUAL_EXPERTS))
args = TrainingArguments(
    options.out,
    max_steps=options.max_steps,
    per_device_train_batch_size=options.batch_size,
    learning_rate=options.learning_rate,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
Trainer(adapted, args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(processor.tokenizer)).train()
adapted.save_pretrained(options.out / "adapter")

adapted.eval()
after = pipe(prompt, seed=0)[0]["generated_image"]
sheet = contact_sheet([before, after], [f"before: {prompt}", f"after: {prompt}"])
sheet.save(options.out / "before-after.png")
print(options.out / "before-after.png")
