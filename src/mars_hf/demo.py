"""
The demo in the browser: draw and watch, caption a picture, tell a story.

Reading order: [`Desk`] answers a page's requests with pieces of HTML, `build_demo` lays the page out around it,
`serve` shows it. One request is worked on at a time, the others wait in a queue of bounded length. What a user types
is checked first, is escaped wherever it is shown, and goes nowhere but into the tokenizer; an upload is read from its
header before it is decoded.

A page is closed or a button pressed in the middle: the drawing stops after its present step.
"""

import base64
import html
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import gradio as gr
from PIL import Image

from .documents import as_paragraphs
from .handler import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS, PICTURE_FORMATS, open_picture
from .picture_files import png_bytes
from .streaming_mars import ImageIteratorStreamer, Preview
from .studio import MAX_PROMPT_LENGTH, Studio, check_prompt, check_seed

MAX_PICTURES = 4
MAX_SIZE_FACTOR = 2  # of the model's own size
UPLOADS_KEPT = (600, 600)  # seconds between two looks at old uploads, and their age then
MODEL_QUEUE = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}

PROMPTS = ["a red apple", "红苹果，twemoji 风格", "red heart", "蓝心", "waving hand: medium skin tone", "an owl"]
TITLES = [
    "Pictures of a red apple in two styles: noto and twemoji.",
    "Two pictures of a red heart and a blue heart, noto style.",
    "红苹果的图片，两种风格：noto 和 twemoji。",
]
CSS = """
.mars-pictures { display: flex; flex-wrap: wrap; gap: 12px; justify-content: center; min-height: 16em }
.mars-pictures figure { margin: 0; flex: 0 1 16em; min-width: 8em }
.mars-pictures img, .mars-story img { width: 100%; max-width: 16em; image-rendering: pixelated; border-radius: 8px }
.mars-pictures figcaption { text-align: center; opacity: .7 }
.mars-story { max-width: 40em; margin: auto; font-size: 1.1em; line-height: 1.6 }
"""


class Desk:
    """
    Answers requests with the checkpoint of a studio.

    Args:
        studio ([`Studio`]): The checkpoint.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self._running: dict[str | None, ImageIteratorStreamer] = {}

    def draw(
        self,
        prompt: str,
        height: float,
        width: float,
        guidance_scale: float,
        temperature: float,
        codes_per_step: int,
        seed: int,
        count: float,
        super_resolution: bool,
        request: gr.Request,
    ) -> Iterator[tuple[str, str]]:
        """Yield the pictures as far as they are drawn, and a line that says how far; at last the pictures."""
        with told_to_the_user():
            sampling = {"guidance_scale": guidance_scale, "temperature": temperature, "codes_per_step": codes_per_step}
            drawer = self.studio.drawer(int(height), int(width), super_resolution, **sampling)
            prompts = [check_prompt(prompt)] * int(count)
            seeds = list(range(check_seed(seed), seed + int(count)))
            drawing = self._watch(request, lambda streamer: drawer.draw(prompts, seeds, streamer))
            yield _figures([], []), "Reading the prompt ..."
            drawn = yield from _updates(drawing, lambda preview: self._preview(preview, seeds))
            facts = [{"prompt": prompt, "seed": own, "settings": drawer.settings()} for own in seeds]
            yield (_figures(drawn, facts), _counted(len(drawn), "picture")) if drawn else (gr.skip(), "Stopped.")

    def caption(self, file: str | None) -> tuple[str, str]:
        """Give what is in an uploaded picture, and the picture as the model sees it."""
        with told_to_the_user():
            with open_upload(file) as picture:
                text = self.studio.caption(picture)
                seen = self.studio.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            shown = self.studio.processor.image_processor.postprocess(seen)
            return text, _figures(shown, [{}])

    def tell(self, title: str, guidance_scale: float, seed: int, request: gr.Request) -> Iterator[tuple[str, str]]:
        """Yield the latest picture of a story while it is written, and at last the story."""
        with told_to_the_user():
            check_prompt(title)
            options = {"guidance_scale": guidance_scale, "seed": check_seed(seed)}
            writing = self._watch(request, lambda streamer: self.studio.tell(title, streamer=streamer, **options))
            yield "", "Writing ..."
            told = yield from _updates(writing, lambda preview: self._preview(preview, []))
            count = sum(isinstance(segment, Image.Image) for segment in told)
            status = _counted(count, "picture") if count else "The checkpoint wrote text alone."
            yield f'<div class="mars-story">{as_paragraphs(told)}</div>', status

    def stop(self, request: gr.Request) -> str:
        """Stop what a page is waiting for."""
        if streamer := self._running.get(request.session_hash):
            streamer.cancel()
        return "Stopped."

    def leave(self, request: gr.Request) -> None:
        """Stop for a page that was closed."""
        self.stop(request)

    def _watch(
        self, request: gr.Request, work: Callable[[ImageIteratorStreamer], Any]
    ) -> Generator[Preview, None, Any]:
        """Run work in a thread, yield its previews and return its result; when this is closed, the work stops."""
        streamer = ImageIteratorStreamer(self.studio.model.vqgan)
        with ThreadPoolExecutor(1) as thread:
            self._running[request.session_hash] = streamer
            future: Future = thread.submit(work, streamer)
            future.add_done_callback(lambda _: streamer.end())  # also if the work was refused before it began
            try:
                yield from streamer
                return future.result()  # an enlargement follows the last preview, and can be stopped too
            except BaseException:
                streamer.cancel()
                raise
            finally:
                self._running.pop(request.session_hash, None)

    def _preview(self, preview: Preview, seeds: Sequence[int]) -> tuple[str, str]:
        pixels = [pixels for pixels in preview.pixels if pixels is not None]
        pictures = self.studio.processor.image_processor.postprocess(pixels)
        facts = [{"seed": seed} for seed in seeds] or [{}]
        return _figures(pictures, facts), f"{preview.num_codes[0]} of {preview.total_codes[0]} codes"


def _updates(work: Generator[Preview, None, Any], show: Callable[[Preview], Any]) -> Generator[Any, None, Any]:
    """Show every preview of some work; give its result."""
    try:
        while True:
            try:
                preview = next(work)
            except StopIteration as end:
                return end.value
            yield show(preview)
    finally:
        work.close()


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Show a user in the page what is wrong with a request; what is wrong with us goes to the log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), title="Not possible", print_exception=False) from None


def open_upload(file: str | None) -> Image.Image:
    """
    Open an upload by its header alone.

    Args:
        file (`str`, *optional*): Where the server has put it.

    Raises:
        ValueError: If there is none, it is no picture of a usual format, has too many pixels or is too thin.
    """
    if file is None:
        raise ValueError("There is no picture yet: choose one first.")
    try:
        picture = Image.open(file, formats=PICTURE_FORMATS)
    except Exception:  # decoders raise whatever they like
        raise ValueError(f"This is no picture in {', '.join(PICTURE_FORMATS)}, or it is far too large.") from None
    return open_picture("picture", picture)


def _figures(pictures: Sequence[Image.Image], facts: Sequence[dict[str, Any]]) -> str:
    """Write pictures side by side; a PNG holds its facts, so that a saved one can be drawn again."""
    figures = []
    for picture, own in zip(pictures, facts, strict=True):
        data = base64.b64encode(png_bytes(picture, **own)).decode()
        caption = f"<figcaption>seed {own['seed']}</figcaption>" if "seed" in own else ""
        alt = html.escape(own.get("prompt", ""))
        figures.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>')
    return f'<div class="mars-pictures">{"".join(figures)}</div>'


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}."


def build_demo(studio: Studio) -> gr.Blocks:
    """
    Lay the page out.

    Args:
        studio ([`Studio`]): The checkpoint.

    Returns:
        `gradio.Blocks`: To be queued and launched, see [`serve`].
    """
    desk = Desk(studio)
    with gr.Blocks(title="MARS", analytics_enabled=False, delete_cache=UPLOADS_KEPT) as page:
        gr.Markdown("# MARS\nA language model that also draws. Prompts in English or Chinese.")
        with gr.Tab("Draw"):
            _drawing_tab(desk)
        with gr.Tab("Caption"):
            _caption_tab(desk)
        with gr.Tab("Story"):
            _story_tab(desk)
        page.unload(desk.leave)
    return page


def _drawing_tab(desk: Desk) -> None:
    config, defaults = desk.studio.model.config, desk.studio.drawer().sampling
    step, side = config.downsample_factor, config.default_image_size
    with gr.Row():
        with gr.Column(min_width=300):
            prompt = gr.Textbox(label="Prompt", placeholder=PROMPTS[0], max_length=MAX_PROMPT_LENGTH, autofocus=True)
            with gr.Row():
                start = gr.Button("Draw", variant="primary", min_width=120)
                stop = gr.Button("Cancel", min_width=120)
            gr.Examples([[text] for text in PROMPTS], [prompt], label="Examples")
            with gr.Accordion("Settings", open=False):
                sizes = {"minimum": step, "maximum": MAX_SIZE_FACTOR * side, "value": side, "step": step}
                height, width = gr.Slider(label="Height", **sizes), gr.Slider(label="Width", **sizes)
                guidance = gr.Slider(1, 10, defaults["guidance_scale"], step=0.1, label="Guidance (1 is none)")
                warmth = defaults["temperature"] or 1.0
                temperature = gr.Slider(0.05, 2, warmth, step=0.05, label="Temperature (less is safer)")
                trained = config.trained_codes_per_step
                k = gr.Radio(
                    trained, value=trained[0], label="Codes per step (K)", interactive=len(trained) > 1,
                    info=f"What the checkpoint was trained for; it draws in {config.code_order} order.",
                )  # fmt: skip
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                count = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Pictures (each with a seed of its own)")
                larger = gr.Checkbox(label="Super-resolution: draw them larger", visible=desk.studio.can_enlarge)
        with gr.Column(min_width=300):
            pictures = gr.HTML(_figures([], []), elem_id="drawn")
            status = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="draw-status")
    inputs = [prompt, height, width, guidance, temperature, k, seed, count, larger]
    options = {"show_progress": "hidden", **MODEL_QUEUE}
    drawing = gr.on([start.click, prompt.submit], desk.draw, inputs, [pictures, status], **options)
    stop.click(desk.stop, outputs=status, cancels=[drawing], queue=False, api_visibility="private")


def _caption_tab(desk: Desk) -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            limits = f"at most {MAX_PICTURE_BYTES // 2**20} MB and {MAX_PICTURE_PIXELS // 2**20} megapixels"
            upload = gr.File(label=f"A picture, {limits}", file_types=["image"], elem_id="upload")
            start = gr.Button("Caption", variant="primary")
        with gr.Column(min_width=300):
            text = gr.Textbox(label="Caption", interactive=False, elem_id="caption")
            seen = gr.HTML(elem_id="seen")
    start.click(desk.caption, upload, [text, seen], **MODEL_QUEUE)


def _story_tab(desk: Desk) -> None:
    guidance_scale = desk.studio.drawer().sampling["guidance_scale"]
    title = gr.Textbox(label="Title, the first line", placeholder=TITLES[0], max_length=MAX_PROMPT_LENGTH)
    with gr.Row():
        start = gr.Button("Write", variant="primary", min_width=120)
        stop = gr.Button("Cancel", min_width=120)
    gr.Examples([[text] for text in TITLES], [title], label="Examples")
    with gr.Accordion("Settings", open=False):
        guidance = gr.Slider(1, 10, guidance_scale, step=0.1, label="Guidance of pictures (1 is none)")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
    status = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="story-status")
    story = gr.HTML(elem_id="story")
    options = {"show_progress": "hidden", **MODEL_QUEUE}
    writing = gr.on([start.click, title.submit], desk.tell, [title, guidance, seed], [story, status], **options)
    stop.click(desk.stop, outputs=status, cancels=[writing], queue=False, api_visibility="private")


def serve(studio: Studio, host: str = "127.0.0.1", port: int = 7860, queue_size: int = 16, wait: bool = True) -> str:
    """
    Show the demo.

    Args:
        studio ([`Studio`]): The checkpoint.
        host (`str`, defaults to `"127.0.0.1"`): Address to listen at.
        port (`int`, defaults to 7860): Port to listen at.
        queue_size (`int`, defaults to 16): Requests that may wait; more are turned away.
        wait (`bool`, defaults to `True`): Come back only when the server ends.

    Returns:
        `str`: Where the page is.

    Raises:
        ValueError: If the checkpoint has no VQ-GAN.
        OSError: If the port is taken.
    """
    page = build_demo(studio).queue(max_size=queue_size, default_concurrency_limit=1)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # of the machine: nothing is fetched
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        max_file_size=MAX_PICTURE_BYTES,
        footer_links=[],
        theme=gr.themes.Soft(**fonts),
        css=CSS,
        prevent_thread_lock=not wait,
    )
    return address


__all__ = ["Desk", "build_demo", "open_upload", "serve"]
