"""
How long a code takes, side by side: ours, transformers' own loops, and a bare loop over the same dense trunk.

    python benchmarks/generation.py --json generation.json
    python benchmarks/generation.py --profile ours-1 --dtype bf16

All models have Qwen2.5-0.5B's shape and random weights, and run in one process with guidance, that is two rows a
picture. Milliseconds a code are those of the whole call, the prefill of a prompt of 16 tokens included, over the
codes of one picture; the median of interleaved repeats stands beside the fastest and the slowest. Every system draws
once before it is timed, which is when a step is compiled. Parts:

    drawing      the table of systems
    bookkeeping  the share of our steps that is not the model's forward, at the largest batch
    prefill      a prompt of 512 words, to draw and to write from, through our text experts and through the dense
                 trunk, without guidance
    memory       what drawing adds to the weights, each system in a process of its own (Linux), at the largest
                 picture and batch

The whole takes some hours on 2 cores. With `--json` and `--resume` it goes on where it was interrupted.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL
from pathlib import Path
from statistics import median

import torch
import transformers
from _measuring import MIB, Results, machine, resident, table
from _systems import PROMPT, STEPS, SYSTEMS, Floor, Ours, Shape, System, Weights
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("drawing", "bookkeeping", "prefill", "memory")
LONG_PROMPT = 512  # tokens, of the part `prefill`
PREFILL_REPEATS = 5  # times as many as elsewhere: it is short, and its bound is narrow
WARM_UP = max(STEPS)  # codes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[n for n in SYSTEMS if n != "qwen2-unbatched"])
parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
parser.add_argument("--codes", nargs="+", type=int, default=[64, 256], help="of a picture")
parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--layers", type=int, default=Shape.num_layers, help="fewer, for a look at the script itself")
parser.add_argument("--scale", type=int, default=1, help="divide all widths by this; as above")
parser.add_argument("--json", type=Path, metavar="FILE", help="where all that is measured goes, in seconds and bytes")
parser.add_argument("--resume", action="store_true", help="keep what FILE of --json holds, measure the rest")
parser.add_argument("--profile", choices=SYSTEMS, help="print the dearest operations of 16 steps instead")
parser.add_argument("--memory-of", choices=SYSTEMS, help=argparse.SUPPRESS)  # what a child process is asked
options = parser.parse_args()

if min(options.codes) < max(STEPS):
    parser.error(f"--codes must be {max(STEPS)} or more, as many as a step draws, got {min(options.codes)}")
if options.resume and not options.json:
    parser.error("--resume needs --json FILE, the file to go on with")
if Shape.hidden_size % (options.scale * Shape.num_heads * 2):
    parser.error(f"--scale {options.scale} leaves no even width to the {Shape.num_heads} heads; take 2, 4, 8 or 16")

torch.set_flush_denormal(True)
transformers.logging.set_verbosity_error()
shape = Shape().smaller(options.layers, options.scale)


@contextmanager
def call_times(module: torch.nn.Module) -> Iterator[list[tuple[float, float]]]:
    """Write down when each call of a module begins and ends."""
    begun: list[float] = []
    times: list[tuple[float, float]] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())),
        module.register_forward_hook(lambda *_: times.append((begun.pop(), time.perf_counter()))),
    ]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def timed_draw(system: System, batch: int, codes: int, seed: int) -> tuple[float, float | None]:
    """Draw; give the seconds of the call and, unless it is compiled, of its first forward, the prefill."""
    gc.collect()
    torch.manual_seed(seed)
    if system.is_compiled:  # hooks would be compiled too
        start = time.perf_counter()
        drawn = system.draw(batch, codes)
        seconds, prefill = time.perf_counter() - start, None
    else:
        with call_times(system.called) as times:
            start = time.perf_counter()
            drawn = system.draw(batch, codes)
            seconds = time.perf_counter() - start
        prefill = times[0][1] - start
    if drawn.shape != (batch, codes) or not 0 <= int(drawn.min()) <= int(drawn.max()) < shape.num_codes:
        raise RuntimeError(f"{type(system).__name__} was to draw {batch} x {codes} codes and gave {drawn}.")
    return seconds, prefill


def measure_drawing(systems: dict[str, System], batch: int, codes: int, title: str) -> dict:
    """Time all systems in turn, forwards and backwards, after a drawing of each that is not counted."""
    torch._dynamo.reset()
    cell = {name: {"first": None, "seconds": [], "prefill": []} for name in systems}
    with tqdm(total=len(systems) * (options.repeats + 1), desc=title, unit="drawing", leave=False) as bar:
        for name, system in systems.items():
            cell[name]["first"] = timed_draw(system, batch, codes if system.is_compiled else WARM_UP, 0)[0]
            bar.update()
        for repeat in range(options.repeats):
            for name in list(systems)[:: 1 if repeat % 2 == 0 else -1]:
                seconds, prefill = timed_draw(systems[name], batch, codes, 1 + repeat)
                cell[name]["seconds"].append(seconds)
                cell[name]["prefill"] += [] if prefill is None else [prefill]
                bar.update()
    return cell


def measure_bookkeeping(system: Ours, mode: str, batch: int, codes: int) -> dict:
    """Measure, from the end of the prefill on, which share of the time is not spent in the model's forward."""
    run = system.draw if mode == "image" else system.write
    run(batch, WARM_UP)
    shares, steps = [], []
    for repeat in tqdm(range(options.repeats), desc=f"{mode}, K = {system.k}", unit="drawing", leave=False):
        gc.collect()
        torch.manual_seed(repeat)
        with call_times(system.called) as times:
            rows = run(batch, codes)
            end = time.perf_counter()
        ends = (rows == system.model.config.image_end_token_id).sum(1)
        if mode == "interleaved" and ends.tolist() != [1] * batch:
            raise RuntimeError(f"Every document was to hold one picture, they hold {ends.tolist()}.")
        begin = times[0][1]
        shares.append(1 - sum(stop - start for start, stop in times[1:]) / (end - begin))
        steps.append((end - begin) / len(times[1:]))
    return {"share": shares, "step": steps}


@torch.no_grad()
def measure_prefill(floor: Floor, ours: Ours, vocabulary: str, batch: int) -> dict:
    """Time a prompt of words through both: trunk, cache, and a head for the last token, of codes or of words."""
    ids = shape.prompts(batch, LONG_PROMPT)
    mask = torch.ones_like(ids)
    positions = torch.arange(LONG_PROMPT).expand_as(ids)
    head = floor.head if vocabulary == "visual" else floor.model.embed_tokens.weight[: shape.num_text_ids]

    def dense() -> None:
        cache = DynamicCache(config=floor.model.config)
        states = floor.model(ids, mask, positions, past_key_values=cache, use_cache=True).last_hidden_state
        F.linear(states[:, -1].contiguous(), head)  # a slice leaves the fast path of torch

    def mars() -> None:
        cache = DynamicCache(config=ours.model.config)
        settings = {"modality": "text", "vocabulary": vocabulary, "logits_to_keep": 1, "codes_per_step": 1}
        ours.model(ids, mask, positions, past_key_values=cache, use_cache=True, **settings)

    runs: dict[str, Callable[[], None]] = {"dense": dense, "ours": mars}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    repeats = range(PREFILL_REPEATS * options.repeats)
    for repeat in tqdm(repeats, desc=f"prefill of {LONG_PROMPT} words, batch {batch}", unit="pair", leave=False):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def memory_of(name: str, dtype: str, batch: int, codes: int) -> dict:
    """
    Measure in this process how far drawing goes above what is resident before.

    A first drawing loads kernels and compiles, then freed memory is given back, so that what remains is the model.
    """
    system = SYSTEMS[name][1](Weights(shape, DTYPES[dtype]))
    system.draw(batch, codes if system.is_compiled else WARM_UP)
    gc.collect()
    CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest value starts again from here
    before = resident("VmRSS")
    system.draw(batch, codes)
    return {"weights": system.weight_bytes(), "before": before, "added": resident("VmHWM") - before}


def measure_memory(name: str, dtype: str, batch: int, codes: int) -> dict:
    """Ask a child process."""
    sizes = ("--layers", options.layers, "--scale", options.scale, "--batch", batch, "--codes", codes)
    arguments = [str(part) for part in ("--memory-of", name, "--dtype", dtype, *sizes)]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def profile(name: str, dtype: str, batch: int) -> str:
    """Give the table of the operations that 16 steps spend their time in, the prefill included."""
    system = SYSTEMS[name][1](Weights(shape, DTYPES[dtype]))
    codes = 16 * getattr(system, "k", 1)
    system.draw(batch, codes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        system.draw(batch, codes)
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=60)


def title_of(key: str) -> str:
    dtype, codes, batch = key.split()
    return f"{dtype}, {codes} codes, batch {batch}"


def milliseconds(cell: dict, name: str, codes: int) -> list[float]:
    return [1000 * seconds / codes for seconds in cell[name]["seconds"]]


def ratio(cell: dict, name: str, to: str) -> float:
    """Give how the medians of two systems compare."""
    return median(cell[name]["seconds"]) / median(cell[to]["seconds"])


def drawing_table(cells: dict[str, dict], dtype: str) -> str:
    """Tell milliseconds a code of every system in every cell of a dtype, and their ratio to the floor's."""
    keys = [key for key in cells if key.startswith(dtype)]
    rows = []
    for name in options.systems:
        row = [SYSTEMS[name][0]]
        for key in keys:
            per_code = milliseconds(cells[key], name, int(key.split()[1]))
            spread = f"{median(per_code):.1f} ({min(per_code):.1f} to {max(per_code):.1f})"
            row.append(spread + (f", {ratio(cells[key], name, 'floor'):.2f}x" if "floor" in cells[key] else ""))
        rows.append(row)
    header = ["ms a code: median (fastest to slowest), ratio to the floor", *map(title_of, keys)]
    return table(header, rows) + "".join(f"\n\n{title_of(key)}: {drawing_notes(cells[key])}" for key in keys)


def drawing_notes(cell: dict) -> str:
    """Tell what is in the numbers of a cell, the prefill, and what is not, the compilation."""
    prefills = [f"{n} {1000 * median(c['prefill']):.0f} ms" for n, c in cell.items() if c["prefill"]]
    compilations = [f"{n} {c['first']:.0f} s" for n, c in cell.items() if not c["prefill"]]
    notes = [f"in each call a prefill of {', '.join(prefills)}"] if prefills else []
    notes += [f"not counted a first call of {', '.join(compilations)}, which compiles"] if compilations else []
    return "; ".join(notes) + "."


def drawing_bounds(cells: dict[str, dict]) -> Iterator[list[str]]:
    """Compare with what the engine is to reach."""
    for key, cell in cells.items():
        for name, limit in (("ours-1", "at most 1.05x of the floor"), ("ours-1-compiled", "below the floor")):
            if {name, "floor"} <= cell.keys():
                value = ratio(cell, name, "floor")
                is_met = value <= 1.05 if name == "ours-1" else value < 1
                yield [f"{SYSTEMS[name][0]}, {title_of(key)}", limit, f"{value:.3f}x", "met" if is_met else "not met"]
    for kind in ("", "-compiled"):
        for k, factor in ((4, 3.3), (16, 10.0)):
            names, key = (f"ours-1{kind}", f"ours-{k}{kind}"), "bf16 256 1"
            if key in cells and set(names) <= cells[key].keys():
                cell = cells[key]
                value = ratio(cell, *names)
                spent = [median(cell[name]["seconds"]) - median(cell[name]["prefill"] or [0.0]) for name in names]
                alone = "" if kind else f" ({spent[0] / spent[1]:.1f} without the prefill)"
                what = f"{SYSTEMS[names[1]][0]}, {title_of(key)}"
                limit = f"at least {factor} times fewer ms a code than K = 1"
                yield [what, limit, f"{value:.1f}{alone}", "met" if value >= factor else "not met"]


def bookkeeping_bounds(cells: dict[str, dict]) -> Iterator[list[str]]:
    for key, cell in cells.items():
        share = 100 * median(cell["share"])
        spread = f"{share:.1f} % ({100 * min(cell['share']):.1f} to {100 * max(cell['share']):.1f})"
        measured = f"{spread} of {1000 * median(cell['step']):.0f} ms"
        limit = "under 3 % of the step is not the forward"
        yield [f"bookkeeping, {key}", limit, measured, "met" if share < 3 else "not met"]


def prefill_bounds(cells: dict[str, dict]) -> Iterator[list[str]]:
    for key, cell in cells.items():
        value = median(cell["ours"]) / median(cell["dense"])
        fastest = min(cell["ours"]) / min(cell["dense"])
        measured = f"{value:.3f}x of {1000 * median(cell['dense']):.0f} ms; fastest of both {fastest:.3f}x"
        limit = "at most 1.02x of the dense trunk"
        yield [f"prefill of {LONG_PROMPT} words {key}", limit, measured, "met" if value <= 1.02 else "not met"]


def memory_bounds(cells: dict[str, dict]) -> Iterator[list[str]]:
    for key, cell in cells.items():
        name, dtype = key.split()[0], key.split()[1]
        floor = cells.get(" ".join(["floor", *key.split()[1:]]))
        if name.startswith("ours") and floor:
            measured = f"{cell['added'] / MIB:.1f} to {floor['added'] / MIB:.1f} MiB"
            is_met = cell["added"] <= floor["added"]
            what = f"activations and cache, {SYSTEMS[name][0]}, {dtype}"
            yield [what, "at most the floor's", measured, "met" if is_met else "not met"]


def memory_table(cells: dict[str, dict]) -> str:
    rows = []
    for key, cell in cells.items():
        name, dtype, codes, batch = key.split()
        width = shape.num_key_value_heads * shape.hidden_size // shape.num_heads
        cache = 2 * int(batch) * (PROMPT + int(codes)) * shape.num_layers * 2 * width * DTYPES[dtype].itemsize
        sizes = [f"{size / MIB:.1f}" for size in (cell["weights"], cache, cell["added"])]
        rows.append([SYSTEMS[name][0], title_of(" ".join([dtype, codes, batch])), *sizes])
    return table(["MiB", "", "weights, computed", "keys and values, computed", "drawing adds, measured"], rows)


def run_in_process(results: Results, dtype: str) -> None:
    """Measure what needs all systems side by side, pictures in growing size: a static cache never shrinks again."""
    weights = Weights(shape, DTYPES[dtype])
    needed = set(options.systems) if "drawing" in options.parts else set()
    needed |= {f"ours-{k}" for k in STEPS} if "bookkeeping" in options.parts else set()
    needed |= {"floor", "ours-1"} if "prefill" in options.parts else set()
    systems = {name: make(weights) for name, (_, make) in SYSTEMS.items() if name in needed}
    if "drawing" in options.parts:
        chosen = {name: systems[name] for name in options.systems}
        for codes in sorted(options.codes):
            for batch in sorted(options.batch):
                key = f"{dtype} {codes} {batch}"
                results.measured("drawing", key, lambda c=codes, b=batch, k=key: measure_drawing(chosen, b, c, k))
    if "bookkeeping" in options.parts:
        codes, batch = min(options.codes), max(options.batch)
        for mode in ("image", "interleaved"):
            for k in STEPS:
                key = f"{mode}, K = {k}, {title_of(f'{dtype} {codes} {batch}')}"
                arguments = (systems[f"ours-{k}"], mode, batch, codes)
                results.measured("bookkeeping", key, lambda a=arguments: measure_bookkeeping(*a))
    if "prefill" in options.parts:
        for vocabulary, purpose in (("visual", "to draw"), ("text", "to write")):
            for batch in options.batch:
                arguments = (systems["floor"], systems["ours-1"], vocabulary, batch)
                key = f"{purpose}, {dtype}, batch {batch}"
                results.measured("prefill", key, lambda a=arguments: measure_prefill(*a))


def main() -> None:
    if options.memory_of:
        asked = (options.memory_of, options.dtype[0], options.batch[0], options.codes[0])
        return print(json.dumps(memory_of(*asked)))
    if options.profile:
        print(machine())
        return print(profile(options.profile, options.dtype[0], options.batch[0]))
    settings = {name: getattr(options, name) for name in ("layers", "scale", "repeats", "systems")}
    results = Results(options.json, options.resume, PARTS, settings)
    for dtype in options.dtype:
        run_in_process(results, dtype)
        gc.collect()
    if "memory" in options.parts:
        codes, batch = max(options.codes), max(options.batch)
        asked = [(name, dtype) for dtype in options.dtype for name in options.systems]
        for name, dtype in tqdm(asked, desc="memory", unit="process", leave=False):
            key = f"{name} {dtype} {codes} {batch}"
            results.measured("memory", key, lambda n=name, d=dtype: measure_memory(n, d, batch, codes))
    report(results.data)


def report(data: dict) -> None:
    """Print the tables and what was to be reached."""
    print(f"{data['machine']}\n{options.repeats} repeats, guidance, {shape}\n")
    for dtype in options.dtype:
        if any(key.startswith(dtype) for key in data["drawing"]):
            print(drawing_table(data["drawing"], dtype), end="\n\n")
    if data["memory"]:
        print(memory_table(data["memory"]), end="\n\n")
    bounds = [*drawing_bounds(data["drawing"]), *bookkeeping_bounds(data["bookkeeping"])]
    bounds += [*prefill_bounds(data["prefill"]), *memory_bounds(data["memory"])]
    print(table(["what", "bound", "measured", ""], bounds))
    if shape != Shape():
        print("\nThe bounds are for the full shape, not for this one.")


main()
