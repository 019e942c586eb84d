"""Commands of the workshop: data, checkpoints, training and evaluation."""

import json
import signal
import warnings
from pathlib import Path
from typing import Annotated

import typer

from mars_hf import DEFAULT_CHECKPOINT

from .app import MARKUP, Debug, app, examples, one_line_errors

data = typer.Typer(help="Make data sets.", no_args_is_help=True, rich_markup_mode=MARKUP)
app.add_typer(data, name="data")
study = typer.Typer(help="Ask people which of two pictures is better.", no_args_is_help=True, rich_markup_mode=MARKUP)
app.add_typer(study, name="study")


@data.command("emoji", epilog=examples("mars-hf data emoji --size 64 --out data/emoji-64"))
def data_emoji(
    out: Annotated[Path, typer.Option(help="Folder to write to; an interrupted run there is continued.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    cache: Annotated[Path | None, typer.Option(help="Where npm packages are kept. [default: OUT/.packages]")] = None,
    debug: Debug = False,
) -> None:
    """Make the emoji data: pictures in four styles with English and Chinese names. Needs npm and the extra `data`."""
    with one_line_errors(debug):
        from mars_hf.data.emoji import build_emoji_dataset

        counts = build_emoji_dataset(out, size, cache)
        numbers = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        typer.echo(f"{out}: {numbers}")


@data.command(
    "encode",
    epilog=examples(
        "mars-hf data encode --data data/emoji-64 --size 64 64 --out data/emoji-64-codes",
        "mars-hf data encode --data data/emoji-128 --size 128 128 --lowres-factor 2 --out data/emoji-128-codes",
    ),
)
def data_encode(
    source: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help="Folder, files ('shards/*.tar') or Hub name of the data.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; an interrupted run there is continued.")],
    model: Annotated[str, typer.Option(help="Folder or Hub name of the MARS, or of the VQModel, that encodes.")] = str(
        DEFAULT_CHECKPOINT
    ),
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
    name: Annotated[str | None, typer.Option(help="Configuration of Hub data that have several.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of Hub data.")] = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="H W", help="In pixels: scale to cover it, cut the middle out. [default: the model's]"),
    ] = None,
    short_side: Annotated[
        int | None,
        typer.Option(help="In pixels, instead of --size: scale the shorter side to it, keep the aspect ratio."),
    ] = None,
    min_size: Annotated[int, typer.Option(help="Leave out pictures with a shorter side.")] = 1,
    max_aspect_ratio: Annotated[float | None, typer.Option(help="Leave out longer pictures. [default: none]")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures of one size that share a call.")] = 32,
    shard_size: Annotated[int, typer.Option(help="Records of a file, the unit of resuming.")] = 1000,
    limit: Annotated[float, typer.Option(help="Share of broken records above which to stop.")] = 0.01,
    column: Annotated[
        list[str] | None, typer.Option(metavar="THEIRS=OURS", help="Rename a column, e.g. text=caption_en.")
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read the data on the way, without a copy.")] = False,
    lowres_factor: Annotated[
        int | None,
        typer.Option(help="For super-resolution: also encode pictures so many times smaller. [default: do not]"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Turn the pictures of a data set into image codes, once, for training."""
    with one_line_errors(debug):
        if size is not None and short_side is not None:
            raise ValueError("`--size` and `--short-side` exclude each other.")
        if wrong := [name for name in column or [] if name.count("=") != 1]:
            raise ValueError(f"`--column` must be THEIRS=OURS, got {wrong[0]}.")
        import torch

        from mars_hf.data.encode import encode_records, load_image_tokenizer
        from mars_hf.data.records import RecordRules, open_records, source_fingerprint

        rules = RecordRules(min_size=min_size, max_aspect_ratio=max_aspect_ratio)
        columns = dict(name.split("=") for name in column or [])
        of_hub = {key: value for key, value in (("name", name), ("revision", revision)) if value is not None}
        records = open_records(source, split, streaming, columns, **of_hub)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        wanted = (
            {"height": size[0], "width": size[1]} if size else {"shortest_edge": short_side} if short_side else None
        )
        numbers = {"batch_size": batch_size, "shard_size": shard_size, "limit": limit, "lowres_factor": lowres_factor}
        of_source = "/".join([source, *of_hub.values()]) if of_hub else None
        numbers["source"] = source_fingerprint(source, split) or of_source
        tokenizer = load_image_tokenizer(model, device)
        typer.echo(f"{out}: {encode_records(records, out, *tokenizer, wanted, split, rules=rules, **numbers)}")


@data.command("canvases", epilog=examples("mars-hf data canvases --data data/emoji-128 --out data/emoji-canvas"))
def data_canvases(
    source: Annotated[str, typer.Option("--data", help="Folder of emoji data; of 128 pixels parts stay sharper.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    records: Annotated[int, typer.Option(min=1, help="How many.")] = 20_000,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
    scale: Annotated[int, typer.Option(min=1, help="1 makes 64x96 and 96x64 pixels, 2 twice that.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed makes the same pictures.")] = 0,
    debug: Debug = False,
) -> None:
    """Make emoji pictures that are not square: whole ones with white beside, parts, pairs (for Stage II)."""
    with one_line_errors(debug):
        from datasets import load_dataset

        from mars_hf.data.derived import write_canvases

        typer.echo(write_canvases(load_dataset(source, split=split), out, records, split, seed=seed, scale=scale))


@data.command("stories", epilog=examples("mars-hf data stories --data data/emoji-64-codes --out data/emoji-stories"))
def data_stories(
    source: Annotated[Path, typer.Option("--data", help="Folder of emoji data that `mars-hf data encode` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    stories: Annotated[int, typer.Option(min=1, help="How many.")] = 20_000,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
    seed: Annotated[int, typer.Option(help="The same seed tells the same stories.")] = 0,
    debug: Debug = False,
) -> None:
    """Make stories of emoji: titles, lines and pictures, in English and Chinese (for joint generation)."""
    with one_line_errors(debug):
        from mars_hf.data.derived import write_stories

        typer.echo(write_stories(source, out, stories, split, seed))


@data.command(
    "build",
    epilog=examples(
        "mars-hf data build paper --show > my.yaml", "mars-hf data build my.yaml --out data/stage2 --workers 8"
    ),
)
def data_build(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with the package: paper.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to. [default: `out` in CONFIG]")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Tasks at a time; 0 works without Ray. [default: `engine.workers` in CONFIG]"),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print CONFIG and do nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Build training data as in the paper: filter, find duplicates, score, caption, encode. Needs the extra `data`."""
    with one_line_errors(debug):
        from mars_hf.data.build.recipe import config_path, load_recipe

        if show:
            typer.echo(config_path(config).read_text(encoding="utf-8"), nl=False)
            return
        recipe = load_recipe(config, out)
        recipe.engine.workers = recipe.engine.workers if workers is None else workers
        from mars_hf.data.build.pipeline import build_dataset

        summary = build_dataset(recipe)
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary["dropped"].items())
        typer.echo(
            f"{recipe.out}: {summary['kept']:,} of {summary['items']:,} kept" + (f"; {dropped}" if dropped else "")
        )
        typer.echo(f"{recipe.out}/report.html")


@app.command(
    epilog=examples(
        "mars-hf export mars-emoji",
        "mars-hf export mars-emoji --model runs/emoji-stage1/final --push you/mars-emoji --dry-run",
    )
)
def export(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    model: Annotated[
        Path, typer.Option(help="Folder of the checkpoint to export.", show_default="the embedded one")
    ] = DEFAULT_CHECKPOINT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    weights_dtype: Annotated[
        str | None, typer.Option(help="Store weights as, e.g., bfloat16.", show_default="as they are")
    ] = None,
    separate_frozen: Annotated[
        bool, typer.Option("--separate-frozen", help="Store the frozen part in a file of its own.")
    ] = False,
    gallery: Annotated[int, typer.Option(metavar="N", min=0, help="Draw N pictures for the model card.")] = 0,
    results: Annotated[
        Path | None, typer.Option(help="A results.json of `evaluate`, for the model card.", show_default="none")
    ] = None,
    super_resolution: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="A model that enlarges its pictures, to travel inside.", show_default="its own"
        ),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A PEFT adapter for documents, to travel inside.", show_default="its own"),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Upload to this repository of the Hub; again, to continue.", show_default="none"
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public, not private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what --push would upload, and stop.")] = False,
    debug: Debug = False,
) -> None:
    """
    Write a checkpoint as a complete Hub folder, which loads with `trust_remote_code=True` and without mars_hf.

    With --push an earlier export in DIR is uploaded as it stands, unless --overwrite is given.
    """
    with one_line_errors(debug):
        if push is None and (public or dry_run):
            raise ValueError("`--public` and `--dry-run` go with `--push REPO`.")
        from mars_hf.evaluation.provenance import local_checkpoint
        from mars_hf.hub import export_folder, is_export
        from mars_hf.upload import check_repo_id, check_upload, files_to_upload, upload_folder

        if push is not None:
            check_repo_id(push) if dry_run else check_upload(push)
        content = {"weights_dtype": weights_dtype, "gallery": gallery, "results": results}
        content |= {"super_resolution": super_resolution, "documents": documents}
        if push is None or overwrite or not is_export(out):
            export_folder(
                local_checkpoint(model) or model, out, overwrite=overwrite, separate_frozen=separate_frozen, **content
            )
            typer.echo(str(out))
        elif separate_frozen or any(content.values()) or model != DEFAULT_CHECKPOINT:
            raise ValueError(f"{out} holds an earlier export. Leave options that change it out, or add --overwrite.")
        if dry_run:
            sizes = files_to_upload(out)
            typer.echo("\n".join(f"{size:>15,} {name}" for name, size in sizes.items()))
            typer.echo(f"{sum(sizes.values()):>15,} bytes in {len(sizes)} files would go to {push}")
        elif push is not None:
            typer.echo(upload_folder(out, push, private=not public))


@app.command(epilog=examples("mars-hf convert --text Qwen-7B --vqgan amused-512/vqvae --unit-pixels --out mars-7b"))
def convert(
    text: Annotated[Path, typer.Option(help="Language model: a folder with a Qwen or a Llama, or a GGUF file.")],
    vqgan: Annotated[Path, typer.Option(help="VQ-GAN: its folder, or its file of weights.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    vqgan_config: Annotated[
        Path | None, typer.Option(help="Its JSON or YAML. [default: the one beside the weights]")
    ] = None,
    vqgan_source: Annotated[str | None, typer.Option(help="Its format, e.g. taming. [default: found out]")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, or a qwen.tiktoken. [default: the language model's]")
    ] = None,
    codebook_size: Annotated[int | None, typer.Option(help="Refuse a VQ-GAN with another number of codes.")] = None,
    unit_pixels: Annotated[
        bool | None,
        typer.Option(
            "--unit-pixels/--signed-pixels",
            help="Pixels that the VQ-GAN takes: [0, 1] or [-1, 1]. [default: as its format has it]",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    seed: Annotated[int, typer.Option(help="Of the noise that the vision head starts with.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    debug: Debug = False,
) -> None:
    """Make a MARS of a released language model and a released VQ-GAN, exactly, and check it. It is not trained yet."""
    with one_line_errors(debug), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: typer.echo(f"mars-hf: {message}", err=True)
        from mars_hf.conversion.convert import convert_to_mars

        sources = {"vqgan_config": vqgan_config, "vqgan_source": vqgan_source, "tokenizer": tokenizer}
        made = {"codebook_size": codebook_size, "unit_pixels": unit_pixels, "max_shard_size": max_shard_size}
        conversion = convert_to_mars(text, vqgan, out, **sources, **made, seed=seed, overwrite=overwrite)
        typer.echo("\n".join([str(conversion.folder), *(f"checked: {check}" for check in conversion.checks)]))


@app.command(
    epilog=examples(
        "mars-hf train emoji/stage1 --out runs/emoji-stage1 --compile",
        "mars-hf train paper/stage1 --dry-run --gpus 64",
        "mars-hf train emoji/stage1 --show > mine.yaml",
    )
)
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a recipe of the package such as emoji/stage1.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; an interrupted run there is continued.", show_default=False)
    ] = None,
    compile_pictures: Annotated[
        bool, typer.Option("--compile", help="Compile what follows the prompts; takes a C++ compiler.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Continue although recipe, data or processes differ.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Train nothing, tell what it would cost.")] = False,
    gpus: Annotated[int, typer.Option(help="Of a dry run; several share weights and states (FSDP2).")] = 1,
    utilisation: Annotated[float, typer.Option(help="Of a dry run: share of the peak that is reached.")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(help="Of a dry run: of one GPU, an A100 in bfloat16.")] = 312.0,
    as_json: Annotated[bool, typer.Option("--json", help="Of a dry run: print JSON instead of tables.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print RECIPE and do nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Train a stage by its recipe, on one device; on many, see `examples/train.py`. Or tell what it would cost."""
    with one_line_errors(debug, extra="train"):
        from mars_hf.training.recipe import Recipe, recipe_path

        if show:
            return typer.echo(recipe_path(recipe).read_text(encoding="utf-8"), nl=False)
        loaded = Recipe.load(recipe)
        if dry_run:
            from mars_hf.training.estimate import PAPER_STAGES, estimate_cost, paper_utilisation

            cost = estimate_cost(loaded, gpus, utilisation, peak_tflops)
            paper = paper_utilisation() if recipe in PAPER_STAGES else None
            if as_json:
                return typer.echo(json.dumps({**cost.to_dict(), "paper": paper and paper.to_dict()}, indent=2))
            return typer.echo("\n\n".join(map(str, filter(None, (cost, paper)))))
        if out is None:
            raise ValueError("`--out` is missing: the folder of the run. Only a `--dry-run` needs none.")
        from mars_hf.training.run import train as run

        made = run(loaded, out, compile_pictures, allow_changes)
        if made == out:
            raise typer.Exit(128 + signal.SIGTERM)  # as a process that the signal ended: no `&&` goes on
        typer.echo(str(made))


@app.command(epilog=examples("mars-hf evaluate emoji", "mars-hf evaluate my.yaml --set model=runs/emoji-stage1/final"))
def evaluate(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="YAML file, or one in the package: emoji, coco, compbench, geneval."),
    ],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value, e.g. prompts.limit=200.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw the pictures of an evaluation, measure them and write tables; called again, it continues. Extra `eval`."""
    with one_line_errors(debug, extra="eval"):
        from mars_hf.evaluation.config import load_config

        settings = load_config(config, changes or [])
        import torch

        from mars_hf.evaluation.evaluate import evaluate as run_evaluation

        torch.set_flush_denormal(True)
        if run_evaluation(settings) is not None:
            out = Path(settings.out)
            typer.echo((out / "results.md").read_text(encoding="utf-8").split("---\n", 2)[2].strip())
            typer.echo(f"\n{out / 'results.md'}, {out / 'results.json'}")


@study.command("make", epilog=examples("mars-hf study make out/pictures/a out/pictures/b --out study"))
def study_make(
    first: Annotated[Path, typer.Argument(help="Folder of pictures that `evaluate` drew, e.g. OUT/pictures/RUN.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for study.html (to give away) and key.json (to keep).")],
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to show.")] = 100,
    seed: Annotated[int, typer.Option(help="Of their choice, order and sides.")] = 0,
    debug: Debug = False,
) -> None:
    """Write a page that shows pairs of pictures blind and saves a participant's votes as a file."""
    with one_line_errors(debug, extra="eval"):
        from mars_hf.evaluation.preference import write_study

        count = write_study(first, second, out, pairs, seed)
        typer.echo(f"{out / 'study.html'}: {count} pairs")


@study.command("tally", epilog=examples("mars-hf study tally study votes-*.json"))
def study_tally(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")],
    votes: Annotated[list[Path], typer.Argument(help="Files of votes.")],
    debug: Debug = False,
) -> None:
    """Count the votes: the share of the first folder among votes with a preference, and its 95 % interval."""
    with one_line_errors(debug, extra="eval"):
        from mars_hf.evaluation.preference import tally

        for found in tally(folder / "key.json", votes):
            low, high = (100 * end for end in found.interval)
            counts = f"{found.first} first, {found.second} second, {found.equal} equal"
            typer.echo(f"{found.question}: {100 * found.share:.1f} % [{low:.1f}, {high:.1f}] for the first ({counts})")
