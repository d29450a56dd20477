"""docs/explorer.png: four views of the explorer on the run that `saefast demo --lm` leaves, as a browser shows them.

    python -m bench.explorer_picture [--run runs/demo-lm] [--latent N] [--text TEXT] [--out docs/explorer.png]

Needs playwright, Chromium and pillow. Where the run has no latents.db yet, `saefast explore` makes it first.
"""

import argparse
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import common
from bench.explorer import exploring

RUN, OUT = common.ROOT / "runs" / "demo-lm", common.ROOT / "docs" / "explorer.png"
TEXT = "The file is closed when the with block ends, even if an error was raised inside it."
# Of a view in CSS pixels, pixels to each of these, and what lies between views.
WIDTH, HEIGHT, SCALE, GAP = 1080, 760, 2, 24
LARGEST = 700_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def window() -> Iterator[Any]:
    """A page of a browser without a window."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit("there is no Chromium: apt-get install chromium")
    # Chromium has no sandbox for root.
    arguments = ["--disable-gpu", *([] if os.getuid() else ["--no-sandbox"])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE)
        # Milliseconds: a model is loaded meanwhile.
        page.set_default_timeout(600_000)
        yield page
        browser.close()


def views(page: Any, address: str, latent: int | None, text: str) -> list[bytes]:
    """Browse, a latent (the first of the list where none is named), text and map, as PNG files."""
    page.goto(address)
    home = page.url
    first = page.locator("main a[href^='/latent/']").first.get_attribute("href")
    shots = [shot(page)]
    page.goto(home + (f"latent/{latent}" if latent is not None else first[1:]))
    shots.append(shot(page))
    page.goto(home + "text")
    page.locator("#words").fill(text)
    page.locator("#read").click()
    page.locator("#found").wait_for()
    shots.append(shot(page))
    page.goto(home + "map")
    if not page.locator("#map").count():
        raise SystemExit("latents.db has no map: delete it, and saefast features makes it anew")
    page.locator("#map[data-ready]").wait_for()
    shots.append(shot(page))
    return shots


def shot(page: Any) -> bytes:
    page.wait_for_load_state("networkidle")
    found: bytes = page.screenshot()
    return found


def composed(shots: Sequence[bytes]) -> bytes:
    """Two by two, with as many colours as fit into LARGEST bytes."""
    from PIL import Image

    images = [Image.open(io.BytesIO(one)).convert("RGB") for one in shots]
    width, height = images[0].size
    whole = Image.new("RGB", (2 * width + 3 * GAP, 2 * height + 3 * GAP), "#c9c6bf")
    for place, image in enumerate(images):
        whole.paste(image, (GAP + place % 2 * (width + GAP), GAP + place // 2 * (height + GAP)))
    for colours in (256, 128, 64, 32):
        file = io.BytesIO()
        whole.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= LARGEST:
            return file.getvalue()
    raise SystemExit(f"the picture has {file.tell():,} bytes: make views smaller than {WIDTH} x {HEIGHT}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.explorer_picture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, default=RUN)
    parser.add_argument("--latent", type=int, help="the latent that is shown; default the first of the list")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    with exploring(options.run) as browser, window() as page:
        picture = composed(views(page, browser.address, options.latent, options.text))
    options.out.write_bytes(picture)
    print(f"written: {options.out}, {len(picture):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
