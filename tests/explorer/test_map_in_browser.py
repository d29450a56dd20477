"""The map in a browser: every point is drawn, moved with the view, found under the pointer, marked and opened."""

from typing import Any

import pytest
from browsing import Faults, Open
from hanging import wait_until

pytestmark = pytest.mark.browser

PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
# The pixels of a canvas, from a copy: reading the canvas itself time and again is warned of.
READ = """const read = (id) => {
  const canvas = document.getElementById(id), copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
  copy.drawImage(canvas, 0, 0);
  return copy.getImageData(0, 0, canvas.width, canvas.height);
}"""
# The middle of the marks that a search has left, in CSS pixels of the window; null where there are none.
MARK = (
    f"() => {{ {READ}"
    """
  const canvas = document.getElementById("over"), box = canvas.getBoundingClientRect(), { data, width } = read("over");
  const shade = getComputedStyle(document.documentElement).getPropertyValue("--shade-rgb").split(" ").map(Number);
  let n = 0, x = 0, y = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] < 255 || shade.some((value, channel) => Math.abs(value - data[i + channel]) > 2)) continue;
    n++; x += (i / 4) % width; y += Math.floor(i / 4 / width);
  }
  return n ? [box.left + (x / n) * (box.width / canvas.width), box.top + (y / n) * (box.height / canvas.height)] : null;
}"""
)
# How many pixels of the map are not paper.
INKED = (
    f"() => {{ {READ}"
    """
  const { data } = read("points");
  let n = 0;
  for (let i = 0; i < data.length; i += 4) n += [0, 1, 2].some((channel) => data[i + channel] !== data[channel]);
  return n;
}"""
)
PAPER = f"() => {{ {READ}; return [...read('points').data.slice(0, 3)]; }}"
LATENT = "<!doctype html><html lang=en><title>latent</title><link rel=icon href=data:,>"
# Two frames: what was asked for before is drawn.
FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture
def page(visit: Open) -> Any:
    return opened(visit)


def opened(visit: Open, path: str = "/map", **settings: Any) -> Any:
    page = visit(path, **settings)
    # Where the map leads is another view's: here it counts that it leads there.
    page.route("**/latent/*", lambda route: route.fulfill(body=LATENT, content_type="text/html"))
    page.wait_for_selector("#map[data-ready]")
    page.evaluate(FRAMES)
    return page


def until(page: Any, condition: str) -> None:
    """Waits for a condition on the page. page.wait_for_function would evaluate a string in it, which it forbids."""
    wait_until(lambda: page.evaluate(condition), condition)
    page.evaluate(FRAMES)


def drawn(page: Any) -> int:
    page.evaluate(FRAMES)
    return int(page.get_attribute("#points", "data-drawn"))


def marked(page: Any, latent: int) -> list[float]:
    """Searches a latent by its number: where its mark is."""
    page.fill("#word", str(latent))
    until(page, "document.querySelectorAll('#hits a').length === 1")
    assert page.inner_text("#hits i") == str(latent)
    page.evaluate(FRAMES)
    place: list[float] = page.evaluate(MARK)
    return place


def test_all_latents_are_drawn_and_the_dead_can_be_hidden(page: Any) -> None:
    assert drawn(page) == 130
    everything = page.evaluate(INKED)
    assert everything > 130
    assert page.inner_text("#dead-count") == "1"
    page.uncheck("#dead")
    assert drawn(page) == 129
    assert page.evaluate(INKED) < everything


@pytest.mark.parametrize("latent", [1, 64, 129])
def test_what_lies_under_the_pointer_is_shown_and_opened(page: Any, latent: int) -> None:
    x, y = marked(page, latent)
    page.mouse.move(x, y)
    page.wait_for_selector("#tip:not([hidden])")
    assert f"latent {latent} ·" in page.inner_text("#tip")
    title = page.inner_text("#hits span")
    assert page.inner_text("#tip strong") == title
    page.mouse.move(2, 400)
    page.wait_for_selector("#tip", state="hidden")
    page.mouse.click(x, y)
    page.wait_for_url(f"**/latent/{latent}")


def test_dragging_moves_the_map_and_opens_nothing(page: Any) -> None:
    x, y = marked(page, 64)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y - 20, steps=4)
    page.mouse.move(x + 60, y - 40, steps=4)
    page.mouse.up()
    page.evaluate(FRAMES)
    assert page.evaluate(MARK) == pytest.approx([x + 60, y - 40], abs=1)
    assert page.url.endswith("/map")


def test_the_wheel_zooms_to_where_the_pointer_is(page: Any) -> None:
    x, y = marked(page, 64)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    until(page, "Number(document.getElementById('points').dataset.drawn) < 130")
    assert page.evaluate(MARK) == pytest.approx([x, y], abs=1.5)
    page.click("#whole")
    assert drawn(page) == 130
    assert page.evaluate(MARK) == pytest.approx([x, y], abs=1)


def test_keys_move_zoom_and_open(page: Any) -> None:
    x, y = marked(page, 64)
    page.focus("#over")
    page.keyboard.press("ArrowRight")
    page.evaluate(FRAMES)
    assert page.evaluate(MARK) == pytest.approx([x - 80, y], abs=1)
    page.keyboard.press("0")
    for _ in range(3):
        page.keyboard.press("+")
    assert drawn(page) < 130
    page.keyboard.press("-")
    page.wait_for_selector("#tip:not([hidden])")
    latent = page.inner_text("#tip span >> nth=0").removeprefix("latent ").partition(" ")[0]
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/latent/{latent}")


def test_a_list_of_what_is_marked_leads_there(page: Any) -> None:
    page.fill("#word", "bridge")
    page.wait_for_selector("#hits a >> nth=1")
    assert page.evaluate(MARK) is not None
    page.keyboard.press("Escape")
    page.focus("#hits a >> nth=1")
    number = page.inner_text("#hits i >> nth=1")
    until(page, f"document.getElementById('tip').textContent.includes('latent {number} ')")
    page.fill("#word", "")
    page.wait_for_selector("#found", state="hidden")
    page.evaluate(FRAMES)
    assert page.evaluate(MARK) is None


def test_colours_are_by_density_or_cluster_and_a_cluster_stands_alone(page: Any) -> None:
    assert page.inner_text("#clusters span >> nth=0") == "bridge"
    assert page.is_hidden("#scale")
    before = page.evaluate("document.getElementById('points').toDataURL()")
    page.click("#clusters button >> nth=0")
    assert page.get_attribute("#clusters button >> nth=0", "aria-pressed") == "true"
    page.evaluate(FRAMES)
    alone = page.evaluate("document.getElementById('points').toDataURL()")
    page.click("#clusters button >> nth=0")
    page.evaluate(FRAMES)
    assert page.evaluate("document.getElementById('points').toDataURL()") == before != alone
    page.check("[value=density]")
    assert page.is_hidden("#clusters")
    assert page.inner_text("#low").endswith("%")
    assert drawn(page) == 130


def test_the_address_can_name_a_latent_or_a_word(visit: Open) -> None:
    page = opened(visit, "/map?latent=64")
    page.wait_for_selector("#tip:not([hidden])")
    assert "latent 64 ·" in page.inner_text("#tip")
    page = opened(visit, "/map?q=bridge")
    page.wait_for_selector("#hits a >> nth=1")
    for odd in ("latent=130", "latent=-1", "latent=x", "q=%00"):
        assert drawn(opened(visit, f"/map?{odd}")) == 130


def test_a_finger_shows_a_latent_before_it_opens_it(visit: Open) -> None:
    page = opened(visit, **PHONE)
    x, y = marked(page, 64)
    page.touchscreen.tap(x, y)
    page.wait_for_selector("#tip a")
    assert page.url.endswith("/map")
    assert page.get_attribute("#tip a", "href") == "/latent/64"


def test_it_is_drawn_on_dark_paper_too(visit: Open) -> None:
    page = opened(visit, color_scheme="dark")
    assert max(page.evaluate(PAPER)) < 60
    page.emulate_media(color_scheme="light")
    until(page, f"({PAPER})()[0] > 200")


def test_points_that_cannot_be_read_are_said(visit: Open, faults: Faults, shown: tuple[Any, str]) -> None:
    page = visit("/nowhere")
    faults.expect("404")
    page.route("**/map/points?*", lambda route: route.fulfill(status=500))
    page.goto(shown[1] + "/map")
    until(page, "document.getElementById('wait').textContent.includes('could not be drawn')")
    faults.expect("500")
