"""
Draw docs/demo_page.png: the demo in headless Chromium, and how long its first preview takes after the click.

    python docs/photograph_demo.py --out docs/demo_page.png

Needs the extra `test` and Chromium.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from mars_hf import DEFAULT_CHECKPOINT
from mars_hf.demo import serve
from mars_hf.studio import Studio

FIRST_PREVIEW = """
window.clicked = performance.now();
new MutationObserver((_, observer) => {
    if (!document.querySelector("#drawn img")) return;
    window.waited = performance.now() - window.clicked;
    observer.disconnect();
}).observe(document.body, {childList: true, subtree: true});
"""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("demo_page.png"))
parser.add_argument("--prompt", default="red heart")
parser.add_argument("--port", type=int, default=7861)
options = parser.parse_args()

address = serve(Studio.open(DEFAULT_CHECKPOINT), port=options.port, wait=False)
with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = chromium.new_page(viewport={"width": 1000, "height": 640})
    page.goto(address)
    for _ in range(3):
        page.get_by_label("Prompt").fill(options.prompt)
        page.evaluate("document.querySelectorAll('#drawn figure').forEach(figure => figure.remove())")
        page.evaluate(FIRST_PREVIEW)
        page.get_by_role("button", name="Draw", exact=True).click()
        page.wait_for_function(
            "document.querySelector('#draw-status textarea, #draw-status input')?.value === '1 picture.'"
        )
        print(f"first preview after {page.evaluate('window.waited'):.0f} ms")
    page.screenshot(path=options.out)
print(options.out)
