"""
The command line `mars-hf`: words to calls.

Every command imports what it needs when it runs, so that help is instant.
"""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mars_hf import DEFAULT_CHECKPOINT

app = typer.Typer(
    help="MARS: a language model that also draws.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make data sets.", no_args_is_help=True)
app.add_typer(data, name="data")

Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Tell what a user can mend in one line, and exit with 2 for a wrong argument, 1 for a failing machine."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        if debug:
            raise
        hint = ". The extras bring it: pip install 'mars_hf[data]'" if isinstance(error, ModuleNotFoundError) else ""
        typer.echo(f"mars-hf: {error}{hint}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


@data.command("emoji")
def data_emoji(
    out: Annotated[Path, typer.Option(help="Folder to write to; an interrupted run there is continued.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    cache: Annotated[Path | None, typer.Option(help="Where npm packages are kept. [default: OUT/.packages]")] = None,
    debug: Debug = False,
) -> None:
    """Make the emoji data: pictures in four styles with English and Chinese names. Needs npm and the extra `data`."""
    with _one_line_errors(debug):
        from mars_hf.data.emoji import build_emoji_dataset

        counts = build_emoji_dataset(out, size, cache)
        numbers = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        typer.echo(f"{out}: {numbers}")


@data.command("build")
def data_build(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with the package: paper.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to. [default: `out` in CONFIG]")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Tasks at a time; 0 works without Ray. [default: `engine.workers` in CONFIG]")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print CONFIG and do nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Build training data as in the paper: filter, find duplicates, score, caption, encode. Needs the extra `data`."""
    with _one_line_errors(debug):
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


@app.command()
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
    debug: Debug = False,
) -> None:
    """Write a checkpoint as a complete Hub folder, which loads with `trust_remote_code=True` and without mars_hf."""
    with _one_line_errors(debug):
        from mars_hf.hub import export_folder

        storage = {"weights_dtype": weights_dtype, "separate_frozen": separate_frozen}
        export_folder(model, out, overwrite=overwrite, **storage)
        typer.echo(str(out))


@app.command()
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
    with _one_line_errors(debug), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: typer.echo(f"mars-hf: {message}", err=True)
        from mars_hf.conversion.convert import convert_to_mars

        sources = {"vqgan_config": vqgan_config, "vqgan_source": vqgan_source, "tokenizer": tokenizer}
        made = {"codebook_size": codebook_size, "unit_pixels": unit_pixels, "max_shard_size": max_shard_size}
        conversion = convert_to_mars(text, vqgan, out, **sources, **made, seed=seed, overwrite=overwrite)
        typer.echo("\n".join([str(conversion.folder), *(f"checked: {check}" for check in conversion.checks)]))


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw, English or Chinese.")],
    out: Annotated[Path, typer.Option(help="Picture file to write: all drawings side by side, captioned.")],
    model: Annotated[
        str, typer.Option(help="Folder or Hub name of the checkpoint.", show_default="the embedded one")
    ] = str(DEFAULT_CHECKPOINT),
    height: Annotated[int | None, typer.Option(help="In pixels. [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels. [default: the model's]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance. [default: the model's]")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pictures.")] = 0,
    debug: Debug = False,
) -> None:
    """Draw prompts into one picture file."""
    with _one_line_errors(debug):
        _require_writable(out)
        from mars_hf import MarsForConditionalGeneration, MarsPipeline, MarsProcessor, register
        from mars_hf.contact_sheet import contact_sheet

        register()
        pipe = MarsPipeline(
            model=MarsForConditionalGeneration.from_pretrained(model), processor=MarsProcessor.from_pretrained(model)
        )
        started = time.perf_counter()
        size = {"height": height, "width": width}
        guidance = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
        drawn = pipe(prompts, **size, **guidance, seed=seed, batch_size=min(len(prompts), 8))
        seconds = time.perf_counter() - started
        contact_sheet([pictures[0]["generated_image"] for pictures in drawn], prompts).save(out)
        typer.echo(f"{out} (drawn in {seconds:.1f} s)")


def _require_writable(out: Path) -> None:
    """Refuse before drawing what could not be saved after it."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    if out.suffix.lower() not in suffixes or suffixes[out.suffix.lower()] not in Image.SAVE:
        raise ValueError(f"`--out` must name a picture file such as drawing.png, got {out}.")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"The folder of {out} does not exist.")


def main() -> None:
    """Run the command line."""
    sys.exit(app(prog_name="mars-hf"))


if __name__ == "__main__":
    main()
