"""
How much memory does a conversion take? A random Qwen v1 of Qwen-7B's full shape (15 GB) is streamed to disk and made
into a MARS (27 GB) by `mars-hf convert`; printed are the time and the peak resident memory of that command.

    python benchmarks/conversion_memory.py --folder data/conversion

The folder needs 45 GB of free disk for the full shape and is emptied again. `--scale 8` divides every size by 8, for a
look at the script itself: so small, both models fit into memory and are compared there too, which the peak then shows.
"""

import argparse
import base64
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import VQModel

from mars_hf.conversion.checkpoints import write_safetensors

QWEN_7B = {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32}
QWEN_7B |= {"vocab_size": 151936}
OTHER_IDS = 293  # of its vocabulary: special tokens and rows that no token uses
SHARD = 2e9  # bytes, as the released checkpoint
GB = 1e9

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", type=Path, required=True, help="where to work; created, and removed afterwards")
parser.add_argument("--scale", type=int, default=1, help="divide the sizes of the language model by this")
parser.add_argument("--codes", type=int, default=8192, help="size of the codebook")
options = parser.parse_args()


def qwen1_headers(hidden: int, inner: int, layers: int, vocab: int) -> dict[str, torch.Tensor]:
    """Names and shapes of Qwen v1's tensors; `inner` is what its configuration doubles."""
    shapes = {"transformer.wte.weight": (vocab, hidden)}
    for layer in (f"transformer.h.{number}" for number in range(layers)):
        shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("ln_1", "ln_2")}
        shapes |= {f"{layer}.attn.c_attn.weight": (3 * hidden, hidden), f"{layer}.attn.c_attn.bias": (3 * hidden,)}
        shapes |= {f"{layer}.attn.c_proj.weight": (hidden, hidden), f"{layer}.mlp.c_proj.weight": (hidden, inner)}
        shapes |= {f"{layer}.mlp.{name}.weight": (inner, hidden) for name in ("w1", "w2")}
    shapes |= {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}


def write_text_model(folder: Path) -> int:
    """Stream the random checkpoint in shards, with a vocabulary of the true size; give its size in bytes."""
    sizes = {name: value // options.scale for name, value in QWEN_7B.items()}
    settings = {"model_type": "qwen", "kv_channels": 128, "seq_length": 8192, "layer_norm_epsilon": 1e-6}
    num_ranks = sizes["vocab_size"] - OTHER_IDS
    settings |= {"rotary_emb_base": 10000, "no_bias": True, "eos_token_id": num_ranks}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**settings, **sizes}))
    tokens = [bytes([number]) for number in range(256)]
    tokens += [bytes([a, b]) for a in range(256) for b in range(256)]
    tokens += [bytes([97, 97, a, b]) for a in range(256) for b in range(256)]
    tokens += [bytes([98, 98, a, b]) for a in range(256) for b in range(256)]
    lines = [b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens[:num_ranks])]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))

    shape = (sizes["hidden_size"], sizes["intermediate_size"] // 2, sizes["num_hidden_layers"], sizes["vocab_size"])
    headers, weight_map, shards, filled = qwen1_headers(*shape), {}, [{}], 0
    for name, header in headers.items():
        if filled + header.nbytes > SHARD and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = header
        filled += header.nbytes
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, lambda name: torch.randn(headers[name].shape).to(torch.bfloat16) / 50)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(header.nbytes for header in headers.values())


def write_vqgan(folder: Path) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    channels = {"block_out_channels": (128, 128, 256, 256, 512), "latent_channels": 256, "vq_embed_dim": 256}
    VQModel(**blocks, **channels, layers_per_block=2, num_vq_embeddings=options.codes).save_pretrained(folder)


needed = 45 * GB / options.scale**2 + GB
folder = options.folder.absolute()
folder.mkdir(parents=True)  # a folder of one's own: it is removed
free = shutil.disk_usage(folder).free
if free < needed:
    folder.rmdir()
    sys.exit(f"{folder} has {free / GB:.1f} GB of free disk, but {needed / GB:.1f} GB are needed.")
try:
    size = write_text_model(folder / "text")
    write_vqgan(folder / "vqgan")
    paths = {"--text": folder / "text", "--vqgan": folder / "vqgan", "--out": folder / "mars"}
    arguments = [str(part) for pair in paths.items() for part in pair]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mars_hf.cli", "convert", *arguments], stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(done.stdout, end="")
    if done.returncode == 0:
        made = sum(file.stat().st_size for file in (folder / "mars").glob("*.safetensors"))
        print(f"{size / GB:.2f} GB became {made / GB:.2f} GB in {seconds:.0f} s; peak resident {peak / 2**30:.2f} GiB")
    sys.exit(done.returncode)
finally:
    shutil.rmtree(folder)
