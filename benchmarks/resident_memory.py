"""
What of a MARS has to be in memory while a prompt is read and while a picture is drawn.

    python benchmarks/resident_memory.py

For Qwen-7B's shape it is computed, from the parameters of a model without storage. For the embedded checkpoint it is
computed and measured: the weights of the modules that are really called in each phase, the cache's own bytes, and the
growth of the process's peak memory.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import DynamicCache, Qwen2Config

from mars_hf import DEFAULT_CHECKPOINT, MarsConfig, MarsForConditionalGeneration, MarsProcessor

MIB = 2**20
QWEN_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 151_936,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def part_of(name: str, has_output_experts: bool) -> str:
    """Say to which part a parameter belongs."""
    if name.startswith("vqgan"):
        return (
            "VQ-GAN decoder" if "decoder" in name or "post_quant" in name or "quantize" in name else "VQ-GAN encoder"
        )
    if name.startswith(("text_head", "vision_head")):
        return name.split(".")[0].replace("_", " ")
    if "embed" in name:
        return "visual embeddings" if "visual" in name else "text embeddings"
    if "visual_" in name:
        return "visual experts"
    is_expert = ".mlp." in name or ("_proj" in name and ("o_proj" not in name or has_output_experts))
    return "text experts" if is_expert else "shared"


# Whether a part is read while a prompt of words is read, while codes are drawn, and when codes become pixels.
READ = {
    "text embeddings": (True, False, False),  # a row for each token
    "visual embeddings": (False, True, False),
    "text experts": (True, False, False),
    "visual experts": (False, True, False),
    "shared": (True, True, False),
    "text head": (False, False, False),  # for words only
    "vision head": (False, True, False),
    "VQ-GAN encoder": (False, False, False),  # for pictures as input
    "VQ-GAN decoder": (False, False, True),
}


def weights_by_part(model: torch.nn.Module) -> dict[str, int]:
    """Count the bytes of each part; tied weights count once."""
    bytes_of = dict.fromkeys(READ, 0)
    for name, parameter in model.named_parameters():
        bytes_of[part_of(name, model.config.expert_output_projection)] += parameter.numel() * parameter.element_size()
    return bytes_of


def cache_bytes(config: MarsConfig, rows: int, tokens: int, size: int) -> int:
    """Count the bytes of keys and values."""
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * rows * tokens * size


def table(title: str, weights: dict[str, int], lines: list[tuple[str, int, int, int]]) -> None:
    """Print weights and further lines in MiB, phase by phase."""
    print(f"\n{title}\n\n| MiB | in all | a prompt is read | a picture is drawn | codes become pixels |")
    print("|---|---|---|---|---|")
    for part, count in weights.items():
        cells = [f"{count / MIB:,.1f}" if read else "" for read in READ[part]]
        print(f"| {part} | {count / MIB:,.1f} | {' | '.join(cells)} |")
    sums = [sum(count for part, count in weights.items() if READ[part][phase]) for phase in range(3)]
    lines = [("weights, sum", *sums), *lines]
    for name, *cells in lines:
        total = f"{sum(weights.values()) / MIB:,.1f}" if name == "weights, sum" else ""
        print(f"| {name} | {total} | {' | '.join(f'{cell / MIB:,.1f}' if cell else '' for cell in cells)} |")


def computed() -> None:
    """The table of Qwen-7B's shape."""
    with torch.device("meta"):
        config = MarsConfig(
            text_config=Qwen2Config(**QWEN_7B), codebook_size=8192, downsample_factor=8, default_image_size=256
        )
        model = MarsForConditionalGeneration(config).to(torch.bfloat16)
    prompt, codes = 64, 1024
    caches = [cache_bytes(config, 2, tokens, 2) for tokens in (prompt, prompt + codes + 1)]
    lines = [(f"cache, 2 rows, {prompt} words, {codes:,} codes", caches[0], caches[1], 0)]
    table("Qwen-7B's shape, bfloat16, no VQ-GAN (computed)", weights_by_part(model), lines)


def measured() -> None:
    """The table of the embedded checkpoint, each phase in a process of its own."""
    model = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT)
    growths, called, caches = [], [], []
    for phase in range(3):
        line = subprocess.run(
            [sys.executable, __file__, "--phase", str(phase)], check=True, capture_output=True, text=True
        ).stdout
        growth, weights, cache = map(int, line.split())
        growths.append(growth), called.append(weights), caches.append(cache)
    lines = [
        ("weights of the modules called (measured)", *called),
        ("cache, 2 rows, 64 codes (measured)", *caches),
        ("growth of peak memory over the loaded model (measured)", *growths),
    ]
    table("mars-emoji, float32, 2 rows (guidance)", weights_by_part(model), lines)  # type: ignore[arg-type]


def peak_memory() -> int:
    """Highest resident memory of this process in bytes, since the mark was reset (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_phase(phase: int) -> None:
    """Print the growth of peak memory, the bytes of the weights called, and the cache's, of one phase."""
    model = MarsForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT)
    processor = MarsProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    seen: dict[str, int] = {}
    for name, module in model.named_modules():
        own = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        if own:
            module.register_forward_hook(lambda *_, name=name, own=own: seen.update({name: own}))
    inputs = processor("a red apple", height=64, width=64, return_tensors="pt")["input_ids"].repeat(2, 1)
    codes = torch.zeros(2, 65, dtype=torch.long) + model.config.image_token_offset
    cache = DynamicCache(config=model.config)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of loading is forgotten
    base = peak_memory()
    with torch.inference_mode():
        if phase < 2:
            model.model(inputs, past_key_values=cache, modality="text", use_cache=True)
        if phase == 1:
            seen.clear()
            for column in codes.split(1, dim=1):
                model(column, past_key_values=cache, modality="image", vocabulary="visual", use_cache=True)
        if phase == 2:
            model.decode_image_tokens(_whole_pictures(model, codes))
    growth = peak_memory() - base
    keys = (
        sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        if phase < 2
        else 0
    )
    print(growth, sum(seen.values()), keys)


def _whole_pictures(model: MarsForConditionalGeneration, codes: torch.Tensor) -> torch.Tensor:
    start, end = (torch.full((2, 1), i) for i in (model.config.image_start_token_id, model.config.image_end_token_id))
    return torch.cat([start, codes[:, :64], end], dim=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase is None:
        computed()
        measured()
    else:
        run_phase(options.phase)
