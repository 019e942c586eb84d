"""
Watch a picture being drawn: previews of the embedded checkpoint as an animated GIF.

    python examples/animate_drawing.py "a red apple" "red heart" --out drawing.gif

Each frame is a preview (missing codes are copied from the row above); the last one is the picture itself.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from mars_hf import DEFAULT_CHECKPOINT, ImageStreamer, MarsForConditionalGeneration, MarsProcessor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="+")
parser.add_argument("--out", type=Path, default=Path("drawing.gif"))
parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder of another checkpoint")
parser.add_argument("--codes-per-step", type=int, default=1)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--zoom", type=int, default=2)
options = parser.parse_args()

model = MarsForConditionalGeneration.from_pretrained(options.model)
processor = MarsProcessor.from_pretrained(options.model)
side = model.config.default_image_size
frames: list[list[torch.Tensor]] = []
inputs = processor(options.prompts, height=side, width=side, return_tensors="pt")
drawn = model.generate(
    **inputs,
    generation_mode="image",
    codes_per_step=options.codes_per_step,
    generator=torch.manual_seed(options.seed),
    streamer=ImageStreamer(model.vqgan, lambda preview: frames.append(preview.pixels), progress=True),
)
frames.append(model.decode_image_tokens(drawn, inputs["image_sizes"]))


def side_by_side(pixels: list[torch.Tensor]) -> Image.Image:
    """Lay the pictures of one frame in a row."""
    pictures = processor.post_process_multimodal_output(pixels, generation_mode="image")
    row = Image.new("RGB", (side * len(pictures), side), "white")
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * side, 0))
    return row.resize((row.width * options.zoom, row.height * options.zoom), Image.Resampling.NEAREST)


first, *rest = [side_by_side(pixels) for pixels in frames]
durations = [150] * (len(frames) - 1) + [1500]  # in milliseconds
first.save(options.out, save_all=True, append_images=rest, duration=durations, loop=0)
print(f"{options.out}: {len(frames)} frames, the last one is the picture itself")
