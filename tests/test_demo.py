"""The demo as its users see it, in headless Chromium."""

import base64
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mars_hf import DEFAULT_CHECKPOINT
from mars_hf.studio import Studio

pytestmark = pytest.mark.integration
MAX_UPLOAD_BYTES = 10 * 2**20
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = """"><img src=x onerror="window.hacked=1">${window.hacked=2}{{7*7}}<script>window.hacked=3</script>"""
# Collects every picture that the page shows.
WATCH = """
window.seen = [];
new MutationObserver(() => document.querySelectorAll("#drawn img").forEach(
    img => window.seen.at(-1) === img.src || window.seen.push(img.src)
)).observe(document.body, {childList: true, subtree: true, attributes: true, attributeFilter: ["src"]});
"""


class SlowDown:
    """Counts the forwards of a model and makes each take `seconds` longer."""

    def __init__(self, model):
        self.seconds, self.steps = 0.0, 0
        model.register_forward_pre_hook(self)

    def __call__(self, *arguments) -> None:
        self.steps += 1
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio.open(DEFAULT_CHECKPOINT)


@pytest.fixture(scope="module")
def slow_module(studio: Studio) -> SlowDown:
    return SlowDown(studio.model)


@pytest.fixture
def slow(slow_module: SlowDown) -> Iterator[SlowDown]:
    yield slow_module
    slow_module.seconds = 0.0


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    import gradio

    from mars_hf.demo import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield serve(studio, port=port, queue_size=1, wait=False)
    gradio.close_all()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None and not os.environ.get("MARS_HF_CI"):
        pytest.skip("there is no Chromium: apt-get install chromium")
    assert CHROMIUM is not None, "continuous integration installs Chromium, but it is not there"
    with sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(browser, address: str) -> Iterator[Callable]:
    """Open the demo as a user of its own."""
    contexts = []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        page.get_by_label("Prompt").wait_for()
        page.wait_for_timeout(1000)  # fields are shown before they are listened to
        return page

    yield open_page
    for context in contexts:
        context.close()


def draw(page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.evaluate(WATCH)
    page.get_by_role("button", name="Draw", exact=True).click()


def wait_for_status(page, text: str, where: str = "draw-status") -> None:
    page.wait_for_function(
        "([id, text]) => document.querySelector(`#${id} textarea, #${id} input`)?.value === text", arg=[where, text]
    )


def wait_for_drawings(page, count: int = 1) -> None:
    """The page shows the status and the pictures one after the other; only finished ones say what they show."""
    wait_for_status(page, "1 picture." if count == 1 else f"{count} pictures.")
    page.wait_for_function(
        "count => document.querySelectorAll('#drawn img:not([alt=\"\"])').length === count", arg=count
    )


def picture_of(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


def shown(page) -> Image.Image:
    return picture_of(page.locator("#drawn img").get_attribute("src"))


def generated(studio: Studio, prompt: str, seed: int = 0) -> np.ndarray:
    """Draw without any of the demo's code."""
    inputs = studio.processor(prompt, height=64, width=64)
    generator = torch.Generator().manual_seed(seed)
    drawn = studio.model.generate(**inputs, generation_mode="image", generator=generator)
    (picture,) = studio.processor.image_processor.postprocess(studio.model.decode_image_tokens(drawn))
    return np.asarray(picture)


def is_that_of(picture: Image.Image, expected: np.ndarray) -> bool:
    difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - expected)
    print(f"{np.count_nonzero(difference)} values differ, by {difference.max()} at most")
    return not difference.any()


def test_a_picture_grows_and_is_at_last_the_one_that_generate_draws(studio: Studio, visit):
    page = visit()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.get_by_text("Settings").first.click()
    seed = page.get_by_label("Seed").first
    seed.fill("5")
    seed.press("Tab")  # a page that has just come may take a number only when its field is left
    draw(page, "a red apple")
    wait_for_drawings(page)
    *partial, last = page.evaluate("window.seen")
    assert len(set(partial) - {last}) >= 2
    text = shown(page).text
    assert (text["prompt"], json.loads(text["seed"])) == ("a red apple", 5)
    assert is_that_of(shown(page), generated(studio, "a red apple", seed=5)) and picture_of(last) == shown(page)
    assert all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in requested)  # nobody else is asked


def test_several_pictures_have_seeds_that_draw_each_of_them_alone(studio: Studio, visit):
    page = visit()
    page.get_by_text("Settings").first.click()
    pictures = page.get_by_label("number input for Pictures")
    pictures.fill("2")
    pictures.press("Tab")
    draw(page, "红心")
    wait_for_drawings(page, 2)
    sources = [image.get_attribute("src") for image in page.locator("#drawn img").all()]
    assert [is_that_of(picture_of(source), generated(studio, "红心", n)) for n, source in enumerate(sources)] == [
        True
    ] * 2


def test_cancel_stops_the_drawing_and_leaves_what_is_there(visit, slow: SlowDown):
    page = visit()
    slow.seconds = 0.1
    draw(page, "a red apple")
    page.locator("#drawn img").wait_for()
    page.get_by_role("button", name="Cancel").first.click()
    wait_for_status(page, "Stopped.")
    page.wait_for_timeout(500)
    steps = slow.steps
    page.wait_for_timeout(1000)
    assert slow.steps == steps and page.locator("#drawn img").count() == 1
    slow.seconds = 0
    draw(page, "red heart")  # and the next one is drawn
    wait_for_drawings(page)


def test_a_drawing_stops_when_its_page_is_closed(visit, slow: SlowDown):
    page = visit()
    slow.seconds = 0.1
    before = slow.steps
    draw(page, "a red apple")
    page.locator("#drawn img").wait_for()
    page.close()
    deadline, last = time.monotonic() + 30, -1
    while slow.steps != last and time.monotonic() < deadline:
        last = slow.steps
        time.sleep(1)
    assert slow.steps == last < before + 60  # of 65


def test_two_users_get_each_their_own_and_a_third_is_told_that_the_queue_is_full(
    studio: Studio, visit, slow: SlowDown
):
    first, second, third = visit(), visit(), visit()
    slow.seconds = 0.05
    draw(first, "red heart")
    first.locator("#drawn img").wait_for()
    draw(second, "blue heart")
    second.wait_for_timeout(500)
    draw(third, "green heart")
    third.get_by_text("currently busy").first.wait_for()
    slow.seconds = 0
    for page, prompt in ((first, "red heart"), (second, "blue heart")):
        wait_for_drawings(page)
        assert is_that_of(shown(page), generated(studio, prompt))


def test_what_a_user_types_is_text_and_what_is_no_prompt_is_refused(visit):
    page = visit()
    draw(page, HOSTILE)
    wait_for_drawings(page)
    assert page.locator("#drawn img").get_attribute("alt") == HOSTILE
    assert page.evaluate("window.hacked") is None
    draw(page, "  ")
    page.get_by_text("The prompt is empty").wait_for()


def upload(page, file: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(file)
    if file.stat().st_size < MAX_UPLOAD_BYTES:  # a larger one is refused while it is sent
        page.locator("#upload").get_by_text(file.stem).first.wait_for()


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def ask_for_caption(page) -> None:
    page.get_by_role("button", name="Caption", exact=True).click()


def test_an_upload_is_captioned(studio: Studio, visit, tmp_path: Path):
    drawn = Image.fromarray(generated(studio, "red heart"))
    drawn.save(tmp_path / "heart.png")
    page = visit()
    page.get_by_role("tab", name="Caption").click()
    upload(page, tmp_path / "heart.png")
    ask_for_caption(page)
    page.wait_for_function("document.querySelector('#caption textarea, #caption input').value")
    assert page.locator("#caption textarea, #caption input").input_value() == studio.caption(drawn)
    assert is_that_of(picture_of(page.locator("#seen img").get_attribute("src")), np.asarray(drawn))


def test_hostile_uploads_are_refused_and_do_no_harm(visit, tmp_path: Path):
    files = {
        "bomb.png": (png(Image.new("1", (20_000, 20_000))), "far too large"),
        "wide.png": (png(Image.new("1", (9000, 9000))), "at most 16777216 pixels"),
        "thin.png": (png(Image.new("1", (100_000, 8))), "at most 1 to 10"),
        "script.png": (b"<svg onload='window.hacked=1'><script>window.hacked=1</script></svg>", "This is no picture"),
        "cut.png": (png(Image.effect_noise((64, 64), 50))[:900], "truncated or damaged"),
        "large.png": (bytes(MAX_UPLOAD_BYTES + 1), "exceed the maximum allowed size"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        page = visit()
        page.get_by_role("tab", name="Caption").click()
        upload(page, tmp_path / name)
        if name != "large.png":
            ask_for_caption(page)
        page.get_by_text(message).first.wait_for()
        assert page.evaluate("window.hacked") is None
    ask_for_caption(page)
    page.get_by_text("There is no picture yet").wait_for()
    large = {"name": "large.png", "mimeType": "image/png", "buffer": files["large.png"][0]}  # past the page
    assert page.request.post(f"{page.url}gradio_api/upload", multipart={"files": large}).status == 413


def test_a_story_is_the_one_that_the_command_line_tells(studio: Studio, visit):
    title = "Pictures of a red apple in two styles: noto & <i>twemoji</i>."
    page = visit()
    page.get_by_role("tab", name="Story").click()
    page.get_by_label("Title, the first line").fill(title)
    page.get_by_role("button", name="Write").click()
    page.locator("#story h1").wait_for()
    told = studio.tell(title, guidance_scale=3.0)
    lines = [line.strip() for part in told if isinstance(part, str) for line in part.splitlines() if line.strip()]
    assert page.locator("#story h1").text_content() == title
    assert page.locator("#story p[dir]").all_text_contents() == lines[1:]
    assert page.locator("#story img").count() == sum(isinstance(part, Image.Image) for part in told)


def test_the_page_fits_a_phone(visit):
    page = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, device_scale_factor=2)
    page.get_by_label("Prompt").fill("a red apple")
    page.get_by_role("button", name="Draw", exact=True).tap()
    wait_for_drawings(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#drawn img").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["width"] >= 128
