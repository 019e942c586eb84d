"""Commands that use a checkpoint: draw, caption, tell a story, say what it is, show a demo."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mars_hf import DEFAULT_CHECKPOINT

from .app import Debug, app, examples, one_line_errors

if TYPE_CHECKING:
    from PIL.Image import Image

    from mars_hf.evaluation.drawing import Drawer

SHEET_COLUMNS = 6

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Folder or Hub name of the checkpoint.",
        show_default=f"{DEFAULT_CHECKPOINT.name}, the embedded one",
    ),
]
Size = Annotated[
    str | None, typer.Option(metavar="HxW", help="Height and width in pixels, e.g. 64x96. [default: the model's]")
]
GuidanceScale = Annotated[float | None, typer.Option(help="1 is no guidance. [default: the model's]")]


@app.command(
    epilog=examples(
        'mars-hf generate "a red apple" --out apple.png',
        'mars-hf generate "a red apple" "红苹果" --seed 1 --seed 2 --grid --out sheet.png',
        'mars-hf generate "a red heart" --size 64x64 --size 64x96 --guidance-scale 4 --out heart.png --json',
    )
)
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw, English or Chinese.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE.png", help="PNG to write; several are numbered: FILE-1.png, FILE-2.png, ...")
    ],
    model: Model = str(DEFAULT_CHECKPOINT),
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HxW",
            help="Height and width in pixels, e.g. 64x96; may be given several times. [default: the model's]",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help="The same seed draws the same picture; may be given several times. [default: 0]", show_default=False
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="One file: all pictures, each above its prompt.")] = False,
    guidance_scale: GuidanceScale = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Less is safer. [default: the model's]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Likeliest codes to choose from. [default: the model's]")] = None,
    codes_per_step: Annotated[
        int | None,
        typer.Option(help="One that the model was trained for; of the small pictures. [default: its first]"),
    ] = None,
    super_resolution: Annotated[
        bool, typer.Option("--super-resolution", help="Draw them larger with the model that the checkpoint carries.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each picture.")] = False,
    debug: Debug = False,
) -> None:
    """
    Draw each prompt in each size from each seed.

    A PNG says in its text chunks what decided it: `prompt`, `seed`, `settings` and the hash of the `checkpoint`.
    """
    with one_line_errors(debug):
        _require_png(out)
        sizes, seeds = [_parse_size(text) for text in size or [None]], seed or [0]
        from mars_hf.studio import Studio, check_prompt, check_seed

        for text in [*prompts, *([] if negative_prompt is None else [negative_prompt])]:
            check_prompt(text)
        for number in seeds:
            check_seed(number)
        studio = Studio.open(model)
        sampling = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k}
        sampling |= {"negative_prompt": negative_prompt, "codes_per_step": codes_per_step}
        drawers = [studio.drawer(*pair, super_resolution, **sampling) for pair in sizes]
        for drawer in drawers:
            drawer.prepare(prompts)  # refuses what does not fit before anything is drawn
        jobs = [(drawer, prompt, number) for drawer in drawers for prompt in prompts for number in seeds]
        _save(_draw(jobs, batch_size), out, len(jobs), grid, _fingerprint(model), as_json)


def _draw(jobs: list[tuple["Drawer", str, int]], batch_size: int) -> Iterator[tuple["Image", dict[str, Any]]]:
    """Draw batch by batch, each of one size; give every picture with what decided it."""
    from mars_hf import ImageStreamer

    done = 0
    while done < len(jobs):
        drawer = jobs[done][0]
        batch = [job[1:] for job in jobs[done : done + batch_size] if job[0] is drawer]
        prompts, seeds = [prompt for prompt, _ in batch], [number for _, number in batch]
        drawn = drawer.draw(prompts, seeds, ImageStreamer(drawer.model.vqgan, None, progress=True))
        for picture, (prompt, number) in zip(drawn, batch, strict=True):
            yield picture, {"prompt": prompt, "seed": number, "settings": drawer.settings()}
        done += len(batch)


def _save(
    drawn: Iterator[tuple["Image", dict[str, Any]]], out: Path, count: int, grid: bool, checkpoint: str, as_json: bool
) -> None:
    """Save pictures as they come, or all in one file, and say so."""
    from mars_hf.contact_sheet import contact_sheet
    from mars_hf.picture_files import png_bytes, replace_file

    started, pictures, facts = time.perf_counter(), [], []
    single = grid or count == 1
    for number, (picture, own) in enumerate(drawn, 1):
        file = out if single else out.with_name(f"{out.stem}-{number}.png")
        if grid:
            pictures.append(picture)
            facts.append(own)
        else:
            replace_file(file, png_bytes(picture, **own, checkpoint=checkpoint))
        if as_json:
            _print_json({"file": str(file), **own, "checkpoint": checkpoint})
    if grid:
        sheet = contact_sheet(pictures, [own["prompt"] for own in facts], min(count, SHEET_COLUMNS))
        replace_file(out, png_bytes(sheet, pictures=facts, checkpoint=checkpoint))
    if not as_json:
        files = out if single else f"{out.stem}-1.png to {file}"
        typer.echo(f"{files} (drawn in {time.perf_counter() - started:.1f} s)")


def _fingerprint(model: str) -> str:
    from mars_hf.evaluation.provenance import checkpoint_folder, fingerprint

    return fingerprint(checkpoint_folder(model))


@app.command(epilog=examples('mars-hf upscale small.png --caption "a red apple" --out large.png'))
def upscale(
    picture: Annotated[Path, typer.Argument(help="Picture file.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="PNG to write.")],
    caption: Annotated[str, typer.Option(help="What the picture shows.")],
    model: Model = str(DEFAULT_CHECKPOINT),
    codes_per_step: Annotated[
        int | None, typer.Option(help="One that the model was trained for. [default: its first]")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same picture.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Draw a picture larger, with a model of super-resolution or one that carries such a model."""
    with one_line_errors(debug):
        _require_png(out)
        if not picture.is_file():
            raise ValueError(f"There is no picture file {picture}.")
        import torch

        from mars_hf.evaluation.provenance import checkpoint_folder
        from mars_hf.image_processing_mars import open_picture
        from mars_hf.picture_files import png_bytes, replace_file
        from mars_hf.studio import check_prompt, check_seed
        from mars_hf.super_resolution_mars import Enlarger

        check_prompt(caption), check_seed(seed)
        small = open_picture(picture)
        enlarger = Enlarger.of(checkpoint_folder(model))
        # Without the question a CUDA build of torch names a GPU where there is none.
        enlarger.model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        k = enlarger.model.config.trained_codes_per_step[0] if codes_per_step is None else codes_per_step
        chance = torch.Generator(enlarger.model.device).manual_seed(seed)
        large = enlarger.upscale(small, caption, codes_per_step=k, generator=chance)
        facts = {"prompt": caption, "seed": seed, "settings": {"codes_per_step": k, "factor": enlarger.factor}}
        replace_file(out, png_bytes(large, **facts))
        size = f"{large.height}x{large.width}"
        _print_json({"file": str(out), "size": size, **facts}) if as_json else typer.echo(f"{out} ({size})")


@app.command(
    epilog=examples("mars-hf caption apple.png", "mars-hf caption photos/*.jpg --json > captions.jsonl"),
)
def caption(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Picture files.")],
    model: Model = str(DEFAULT_CHECKPOINT),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in tokens.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each picture.")] = False,
    debug: Debug = False,
) -> None:
    """Say what is in pictures. The language is the model's choice."""
    with one_line_errors(debug):
        if missing := [path for path in pictures if not path.is_file()]:
            raise ValueError(f"There is no picture file {missing[0]}.")
        from tqdm.auto import tqdm

        from mars_hf.image_processing_mars import open_picture
        from mars_hf.studio import Studio

        for path in pictures:
            open_picture(path).close()  # reads the header
        studio = Studio.open(model)
        for path in tqdm(pictures, desc="Captioning", unit="picture", disable=len(pictures) == 1):
            try:
                text = studio.caption(path, max_new_tokens)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            _print_json({"picture": str(path), "caption": text}) if as_json else typer.echo(f"{path}: {text}")


@app.command(
    epilog=examples(
        'mars-hf story "Pictures of a red apple in two styles: noto and twemoji." --out story.html',
        'mars-hf story "红苹果的图片，两种风格：noto 和 twemoji。" --out story.md --json',
    )
)
def story(
    title: Annotated[str, typer.Argument(help="The first line of the document.")],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="FILE.html, with the pictures inside, or FILE.md, with FILE-1.png, ..."),
    ],
    model: Model = str(DEFAULT_CHECKPOINT),
    size: Size = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="The same seed tells the same story.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest story, in tokens and codes. [default: room for 4 pictures]")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="PEFT adapter to tell it with. [default: the checkpoint's own, if any]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print files and texts as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Write a document in which the model draws where it likes. The model must have learned documents."""
    with one_line_errors(debug):
        from mars_hf.documents import check_suffix, write_document

        check_suffix(out)
        _require_folder(out)
        height, width = _parse_size(size)
        from mars_hf import ImageStreamer
        from mars_hf.studio import Studio, check_prompt, check_seed

        check_prompt(title), check_seed(seed)
        studio = Studio.open(model, adapter)
        options: dict[str, Any] = {"guidance_scale": guidance_scale, "max_new_tokens": max_new_tokens}
        streamer = ImageStreamer(studio.model.vqgan, None, progress=True)
        segments = studio.tell(title, height, width, seed, **options, streamer=streamer)
        files = [str(file) for file in write_document(segments, out)]
        texts = [segment if isinstance(segment, str) else None for segment in segments]  # None is a picture
        _print_json({"files": files, "segments": texts}) if as_json else typer.echo("\n".join(files))


@app.command(epilog=examples("mars-hf info", "mars-hf info runs/stage1/final --json"))
def info(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub name of the checkpoint.", show_default="the embedded one")
    ] = str(DEFAULT_CHECKPOINT),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is: its parts, vocabulary, types and memory. Weights are not loaded."""
    with one_line_errors(debug):
        from mars_hf.inspection import describe, inspect_checkpoint

        found = inspect_checkpoint(model)
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2) if as_json else describe(found))


@app.command(epilog=examples("mars-hf demo", "mars-hf demo --model runs/stage1/final --port 8000"))
def demo(
    model: Model = str(DEFAULT_CHECKPOINT),
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    queue_size: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are turned away.")] = 16,
    debug: Debug = False,
) -> None:
    """Show the checkpoint in the browser: draw, caption, tell stories. Needs the extra `demo`."""
    with one_line_errors(debug, extra="demo"):
        from mars_hf.demo import serve
        from mars_hf.studio import Studio

        serve(Studio.open(model), host, port, queue_size)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, ensure_ascii=False))


def _parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Read a size such as 64x96; None is the model's."""
    if text is None:
        return None, None
    found = re.fullmatch(r"([0-9]{1,6})[x×]([0-9]{1,6})", text)
    if found is None:
        raise ValueError(f"A size is height and width in pixels, such as 64x96, got {text!r}.")
    return int(found[1]), int(found[2])


def _require_png(out: Path) -> None:
    """Refuse before drawing what could not be saved after it."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"`--out` must name a PNG such as drawing.png, got {out}.")
    _require_folder(out)


def _require_folder(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise ValueError(f"The folder of {out} does not exist.")
