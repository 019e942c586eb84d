"""
What does it cost to send each token to the expert of its modality? One SemVIE layer, and a whole trunk, run over mixed
sequences beside the dense Qwen2 of the same shape (Qwen2.5-0.5B's), with several ways of routing.

    python benchmarks/routing.py
    python benchmarks/routing.py --layers 1 --passes forward --json routing.json

`masks` indexes by boolean masks and writes the answers into an empty tensor, as CogVLM does (rebuilt here); `where`
runs both experts on every token and chooses; `gather` sorts the tokens by modality; `spans` cuts the sequence where
the modality changes and joins the pieces (rebuilt here). Before a cell is measured, all of them give the same outputs
and gradients on its very sequences, in float64 and at a small width. `no routing` is a floor, not a candidate: two
experts on as many rows as each has, taken as they come. What it takes above dense is the price of smaller matrix
products.

Measured are the forward, and the forward with its backward: with the visual part training, as in all stages of MARS,
and with everything training. Dense always trains everything. Embeddings and the final norm belong to the trunk, the
two heads do not: they are not routed. Building the router is part of every time, also where a single layer bears it
alone.

All systems take turns in one process, with a dense call between any two others: a call is compared with the dense ones
just before and just after it. A repeat has as many turns as dense calls fit into a quarter of a second; printed are
the median of the repeats, of times and of ratios, and the lowest and highest ratio of a repeat. With glibc, freed
memory is kept: otherwise every large activation is paged in anew, which costs more than the routing, and falls on
dense alone where its activations lie just above glibc's limit and those of the experts below. The title of a cell says
how many cores the process had: well below its threads, others were at work, and the cell has to be measured again.
"""

import argparse
import ctypes
import json
import os
import platform
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple, cast
from unittest.mock import patch

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from mars_hf import MarsConfig, modeling_mars
from mars_hf.modeling_mars import MarsDecoderLayer, MarsModel, ModalityRouter, is_visual_parameter

QWEN_05B = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN_05B |= {"vocab_size": 151936}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 96}
NUM_CODES = 8192
NUM_PICTURES = 4  # of a row of an interleaved document
BOUND = 1.05  # of dense, for the forward of the default
SECONDS = 0.25  # of dense calls give the turns of a repeat
LAYOUTS = ("text-to-image", "interleaved", "random")
PASSES = {"forward": "forward", "visual": "+ backward, visual trains", "all": "+ backward, all trains"}


class MaskRouter(ModalityRouter):
    """Boolean masks for reading and writing, as CogVLM routes; the masks themselves are made once."""

    modality = None  # of no single one

    def __init__(self, visual_mask: torch.Tensor):
        super().__init__(visual_mask, modality=None, impl="where")  # which prepares nothing
        self.text_mask = ~visual_mask

    def split(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states[self.text_mask], hidden_states[self.visual_mask]

    def merge(self, parts: tuple[torch.Tensor, torch.Tensor], text: Callable, visual: Callable) -> torch.Tensor:
        text_output, visual_output = text(parts[0]), visual(parts[1])
        merged = text_output.new_empty(*self.visual_mask.shape, text_output.shape[-1])
        merged[self.text_mask] = text_output
        merged[self.visual_mask] = visual_output
        return merged


def join(pieces: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class SpanRouter(ModalityRouter):
    """
    Slices of the flattened batch, cut where the modality changes.

    Spans alternate and begin with text and end with a picture, either of which may be empty. One span needs no copy.
    """

    modality = None  # of no single one

    def __init__(self, visual_mask: torch.Tensor):
        super().__init__(visual_mask, modality=None, impl="where")
        kinds, lengths = torch.unique_consecutive(visual_mask.flatten(), return_counts=True)
        begins_visual, ends_visual = kinds[[0, -1]].tolist()
        self.lengths = [0] * begins_visual + lengths.tolist() + [0] * (not ends_visual)

    def split(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = hidden_states.flatten(0, 1).split(self.lengths)
        return join(pieces[0::2]), join(pieces[1::2])

    def merge(self, parts: tuple[torch.Tensor, torch.Tensor], text: Callable, visual: Callable) -> torch.Tensor:
        text_pieces = text(parts[0]).split(self.lengths[0::2])
        visual_pieces = visual(parts[1]).split(self.lengths[1::2])
        merged = join([piece for pair in zip(text_pieces, visual_pieces, strict=True) for piece in pair])
        return merged.view(*self.visual_mask.shape, -1)


class NoRouting(ModalityRouter):
    """The first rows for the text expert, the others for the visual one: right only if the batch is so sorted."""

    modality = None  # of no single one

    def __init__(self, visual_mask: torch.Tensor):
        super().__init__(visual_mask, modality=None, impl="where")
        num_visual = int(visual_mask.sum())
        self.counts = (visual_mask.numel() - num_visual, num_visual)

    def split(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states.flatten(0, 1).split(self.counts)

    def merge(self, parts: tuple[torch.Tensor, torch.Tensor], text: Callable, visual: Callable) -> torch.Tensor:
        return torch.cat([text(parts[0]), visual(parts[1])]).view(*self.visual_mask.shape, -1)


CANDIDATES: dict[str, Callable] = {
    "masks": MaskRouter,
    "where": partial(ModalityRouter, modality=None, impl="where"),
    "gather": partial(ModalityRouter, modality=None, impl="gather"),
    "spans": SpanRouter,
}
ROUTERS = {**CANDIDATES, "no routing": NoRouting}
SYSTEMS = ("dense", *ROUTERS)


class Cell(NamedTuple):
    """What a part of the table is about. One layer is measured alone, more are the trunk of a model."""

    layers: int
    rows: int
    tokens: int
    layout: str
    share: int  # of visual tokens, %

    def __str__(self) -> str:
        depth = "one layer" if self.layers == 1 else f"trunk of {self.layers} layers"
        return f"{depth}, {self.rows} x {self.tokens} tokens, {self.layout}, {self.share} % visual"

    def visual_mask(self) -> torch.Tensor:
        """Lay out the tokens `(rows, tokens)`; every row has the same number of visual ones."""
        num_visual = round(self.tokens * self.share / 100)
        pictures = NUM_PICTURES if self.layout == "interleaved" else 1
        if not pictures <= num_visual <= self.tokens - pictures - 1:
            raise ValueError(
                f"{self.share} % of {self.tokens} tokens are {num_visual} visual tokens, which leaves no room for "
                f"{pictures} pictures between texts. Take more tokens or another share."
            )
        if self.layout == "random":
            shuffled = torch.stack([torch.randperm(self.tokens) for _ in range(self.rows)])
            return shuffled < num_visual
        mask = torch.zeros(self.rows, self.tokens, dtype=torch.bool)
        if self.layout == "text-to-image":
            mask[:, self.tokens - num_visual :] = True
            return mask
        # Text and pictures alternate and text has both ends, lengths as equal as they can be.
        texts = torch.arange(self.tokens - num_visual).tensor_split(pictures + 1)
        codes = torch.arange(num_visual).tensor_split(pictures)
        start = 0
        for text, picture in zip(texts, codes, strict=False):
            start += len(text)
            mask[:, start : start + len(picture)] = True
            start += len(picture)
        return mask


class Pair:
    """The dense model and the MARS of one shape and depth, and how both are called."""

    def __init__(self, shape: dict[str, int], layers: int, dtype: torch.dtype):
        text = Qwen2Config(**shape, num_hidden_layers=layers)
        self.config = MarsConfig(text_config=text, codebook_size=NUM_CODES, downsample_factor=16)
        self.config._attn_implementation = "sdpa"  # `text` follows; models would choose it, layers alone do not
        self.is_layer, self.dtype = layers == 1, dtype
        self.dense: nn.Module = Qwen2DecoderLayer(text, 0) if self.is_layer else Qwen2Model(text)
        self.mars: nn.Module = MarsDecoderLayer(self.config, 0) if self.is_layer else MarsModel(self.config)
        self.dense.to(dtype)
        self.mars.to(dtype)

    def inputs(self, mask: torch.Tensor) -> dict[str, dict]:
        """Draw inputs of the form of `mask` for dense and for MARS."""
        text = self.config.text_config
        if not self.is_layer:
            text_ids = torch.randint(text.vocab_size, mask.shape)
            codes = torch.randint(NUM_CODES, mask.shape) + self.config.image_token_offset
            ids = {"dense": text_ids, "mars": torch.where(mask, codes, text_ids)}
            return {name: {"input_ids": value, "use_cache": False} for name, value in ids.items()}
        hidden_states = torch.randn(*mask.shape, text.hidden_size, dtype=self.dtype, requires_grad=True)
        positions = torch.arange(mask.shape[1])[None]
        embeddings = Qwen2RotaryEmbedding(text)(hidden_states, positions)
        given = {"hidden_states": hidden_states, "position_embeddings": embeddings, "position_ids": positions}
        return dict.fromkeys(("dense", "mars"), {**given, "attention_mask": None})

    def forward(self, name: str, mask: torch.Tensor, inputs: dict[str, dict]) -> torch.Tensor:
        """Run `"dense"`, or MARS with the router of that name."""
        if self.is_layer:
            if name == "dense":
                return self.dense(**inputs["dense"])
            return self.mars(**inputs["mars"], router=ROUTERS[name](mask))
        if name == "dense":
            return self.dense(**inputs["dense"]).last_hidden_state
        # The trunk builds its router by this name, from the mask that it reads off the ids.
        with patch.object(modeling_mars, "ModalityRouter", lambda mask, modality, impl: ROUTERS[name](mask)):
            return self.mars(**inputs["mars"]).last_hidden_state

    def backward(self, name: str, mask: torch.Tensor, inputs: dict[str, dict], gradient: torch.Tensor) -> None:
        """Run forward and backward, from a layer down to its input; gradients replace those of the last call."""
        (self.dense if name == "dense" else self.mars).zero_grad(set_to_none=True)
        if self.is_layer:
            inputs["mars"]["hidden_states"].grad = None
        self.forward(name, mask, inputs).backward(gradient)

    def train(self, what: str) -> None:
        for name, parameter in self.mars.named_parameters():
            parameter.requires_grad_(what == "all" or is_visual_parameter(name))


def check_agreement(mask: torch.Tensor, layers: int) -> None:
    """Compare outputs and gradients of all routers with those of `where`, which moves no token."""
    pair = Pair(SMALL, min(layers, 2), torch.float64)
    inputs = pair.inputs(mask)
    gradient = torch.randn(*mask.shape, SMALL["hidden_size"], dtype=torch.float64)
    expected: list[torch.Tensor] = []
    for name in ("where", *CANDIDATES):
        with torch.no_grad():
            found = [pair.forward(name, mask, inputs)]
        pair.backward(name, mask, inputs, gradient)
        found += [cast(torch.Tensor, parameter.grad) for parameter in pair.mars.parameters()]
        found += [inputs["mars"]["hidden_states"].grad] if pair.is_layer else []
        expected = expected or found
        message = f"Routing by `{name}` differs from `where`: {{}}".format
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=message)


def milliseconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return 1000 * (perf_counter() - start)


def take_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Give, for each call and repeat, the median of its milliseconds and of its ratios to dense before and after."""
    for call in calls.values():
        call()
    dense = calls["dense"]
    turns = max(1, round(1000 * SECONDS / milliseconds(dense)))
    names = [name for name in calls if name != "dense"]
    order = random.Random(0)  # in a fixed one, nobody could be told from a rhythm of the machine
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(turns):
            before = milliseconds(dense)
            for name in order.sample(names, len(names)):
                own, after = milliseconds(calls[name]), milliseconds(dense)
                times[name].append((own, 2 * own / (before + after)))
                times["dense"].append((after, 1.0))
                before = after
        for name, pairs in times.items():
            results[name].append((median(own for own, _ in pairs), median(ratio for _, ratio in pairs)))
    return results


def measure(mask: torch.Tensor, pair: Pair, which: str, repeats: int) -> dict[str, dict]:
    """Time one pass of dense and of MARS with every router."""
    inputs = pair.inputs(mask)
    if which == "forward":
        with torch.no_grad():
            times = take_turns({name: partial(pair.forward, name, mask, inputs) for name in SYSTEMS}, repeats)
    else:
        pair.train(which)
        gradient = torch.randn(*mask.shape, pair.config.text_config.hidden_size, dtype=pair.dtype)
        times = take_turns({name: partial(pair.backward, name, mask, inputs, gradient) for name in SYSTEMS}, repeats)
    results = {}
    for name, of_repeats in times.items():
        own, ratios = zip(*of_repeats, strict=True)
        spread = {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
        results[name] = {"ms": median(own), "ratio": median(ratios), **spread, "repeats_ms": own}
    return results


def table(results: dict[str, dict[str, dict]]) -> str:
    """Write what `measure` gave for the passes of one cell, and whether the default keeps the bound."""
    default = MarsConfig().expert_impl
    lines = [f"{'':15}" + "".join(f"{PASSES[which]:>32}" for which in results)]
    for name in SYSTEMS:
        line = f"{name + ' (ours)' if name == default else name:15}"
        for times in (results[which][name] for which in results):
            spread = f"{times['ratio']:.3f} ({times['lowest_ratio']:.2f}-{times['highest_ratio']:.2f})"
            line += f"{times['ms']:10.2f} ms {spread if name != 'dense' else '':>18}"
        lines.append(line.rstrip())
    if "forward" in results:
        lines.append(verdict(results["forward"][default]["ratio"]))
    return "\n".join(lines)


def verdict(ratio: float) -> str:
    met = "met" if ratio <= BOUND else "not met"
    return f"{MarsConfig().expert_impl} at most {BOUND} of dense forward: {met} ({ratio:.3f})"


def keep_memory() -> None:
    """Have glibc give nothing back to the system and take nothing from it by `mmap`."""
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    library = ctypes.CDLL(None)
    for parameter, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_max, 0)):
        if library.mallopt(parameter, value) != 1:
            raise RuntimeError(f"glibc refused mallopt({parameter}, {value}), without which the times are not fair.")


def cpu() -> str:
    """Name what decides how fast bfloat16 is."""
    able = torch.cpu.get_capabilities()
    return " ".join([able["architecture"], *(name for name in ("avx2", "avx512_bf16", "amx_bf16") if able.get(name))])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048], help="of a row")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--share", nargs="+", type=int, default=[8, 50, 92], help="of visual tokens, %%")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 24], help="1 is a layer, more are a whole trunk")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    for name in ("layers", "rows", "repeats"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} must be at least 1, got {value}.")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        parser.error(f"--json must name a file in a folder that exists, got {options.json}.")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    cells = [
        Cell(layers, options.rows, tokens, layout, share)
        for layers in options.layers
        for tokens in options.tokens
        for layout in options.layout
        for share in options.share
    ]
    masks = [cell.visual_mask() for cell in cells]  # refuses before anything is measured
    machine = f"{torch.get_num_threads()} threads of {cpu()}, torch {torch.__version__}"
    print(f"{options.dtype}, {machine}, {options.repeats} repeats")
    records: list[dict] = []
    pair: Pair | None = None
    for cell, mask in zip(tqdm(cells, desc="Measuring", unit="cell", leave=False), masks, strict=True):
        check_agreement(mask, cell.layers)
        if pair is None or pair.config.text_config.num_hidden_layers != cell.layers:
            pair = Pair(QWEN_05B, cell.layers, getattr(torch, options.dtype))
        busy, start = process_time(), perf_counter()
        results = {which: measure(mask, pair, which, options.repeats) for which in options.passes}
        cores = (process_time() - busy) / (perf_counter() - start)
        tqdm.write(f"\n{cell} ({cores:.1f} cores)\n{table(results)}")
        records += [
            {**cell._asdict(), "cores": cores, "pass": which, "system": name, **times}
            for which, systems in results.items()
            for name, times in systems.items()
        ]
        if options.json is not None:  # after every cell: a whole run takes hours
            scratch = options.json.with_name(options.json.name + ".partial")
            scratch.write_text(json.dumps({"dtype": options.dtype, "machine": machine, "records": records}, indent=1))
            os.replace(scratch, options.json)
    default = MarsConfig().expert_impl
    ratios = [record["ratio"] for record in records if record["pass"] == "forward" and record["system"] == default]
    if ratios:
        print(f"\nWorst cell: {verdict(max(ratios))}; met in {sum(r <= BOUND for r in ratios)} of {len(ratios)}")


if __name__ == "__main__":
    keep_memory()
    main()
