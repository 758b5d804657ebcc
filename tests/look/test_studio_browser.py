"""The studio in a real Chromium: it opens, draws, edits, trains, two visitors do not mix, and nothing is logged as an error."""

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from look.studios import ask, serving

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium on the path (Debian: chromium)")


@pytest.fixture(scope="module")
def home(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for name in ("first", "second"):
        shutil.copytree(run, folder / name)
        samples = folder / name / "samples"
        shutil.copy(samples / "step_00000004.png", samples / "step_00000002.png")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def address(launcher, home, pictures, tmp_path_factory):
    with serving(launcher, tmp_path_factory.mktemp("studio") / "said", "studio", home, "--data", pictures) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as another visitor; what a page logs as an error fails the test."""
    faults, contexts = [], []

    def opened(at: str = "", **how):
        context = browser.new_context(**how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        refused = re.compile("status of 4")  # what the server refuses is told on the page
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" and not refused.search(m.text) else None)
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(f"{address}/{at}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults


def field(page, name: str):
    """A part of the playground's form."""
    return page.locator(f"#wish [name={name}]")


def draw(page, **asked: str) -> None:
    """Fill in the form, once it knows the model, and draw."""
    field(page, "solver").locator("option").nth(3).wait_for(state="attached")
    for name, value in asked.items():
        one = field(page, name)
        one.select_option(value) if one.evaluate("e => e.tagName") == "SELECT" else one.fill(value)
    page.get_by_role("button", name="Draw", exact=True).click()


def pixels(image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.get_attribute("src").partition(",")[2]))))


def png(array: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return dict(name="picture.png", mimeType="image/png", buffer=file.getvalue())


def test_a_run_is_looked_at_and_compared(visit):
    page = visit()
    page.get_by_role("button", name="first").click()
    page.get_by_role("heading", name="first", exact=True).wait_for()
    page.locator(".plot canvas").first.wait_for()
    assert page.locator("tr", has_text="broken").locator("td.fault").inner_text()
    page.get_by_label("compare second").check()
    page.get_by_role("heading", name="2 runs compared").wait_for()


def test_the_slider_moves_through_the_samples(visit):
    page = visit()
    page.get_by_role("button", name="first").click()
    slider = page.get_by_label("step of the samples")
    assert page.locator(".slide output").inner_text() == "step 4"
    slider.press("ArrowLeft")
    assert page.locator(".slide output").inner_text() == "step 2"
    assert page.locator(".samples .frame:visible").get_attribute("data-step") == "2"


def test_images_form_before_the_eyes_by_one_solver_or_several(visit):
    page = visit("#play")
    field(page, "model").select_option("first")
    draw(page, solver="heun", sampling_steps="4", seeds="0-3")
    page.locator(".cells img").nth(3).wait_for()
    told = page.locator(".drawing figcaption", has_text="from noise: heun").locator("small").first
    assert told.inner_text().startswith("4 steps, ")
    field(page, "beside").check()
    draw(page)
    page.locator(".group .cells").nth(3).wait_for()
    page.get_by_role("button", name="between two seeds").click()
    draw(page, frames="3")
    page.locator(".cells.strip img").nth(2).wait_for()


def test_a_late_answer_on_one_model_does_not_undo_the_choice_of_another(visit):
    page, held = visit("#runs"), []
    page.route("**/api/model?run=first", lambda route: held.append(route))  # playwright marks what it calls
    page.get_by_role("tab", name="Playground").click()
    field(page, "model").select_option("first")
    field(page, "model").select_option("second")
    draw_button = page.get_by_role("button", name="Draw", exact=True)
    draw_button.and_(page.locator(":enabled")).wait_for()
    field(page, "solver").select_option("heun")
    with page.expect_response("**/api/model?run=first"):
        for route in held:
            route.continue_()
    page.wait_for_timeout(200)  # for what the answer does, if it does anything
    assert held and field(page, "solver").input_value() == "heun" and field(page, "model").input_value() == "second"


def test_a_drawing_is_cancelled_and_another_asked_for(visit):
    page = visit("#play")
    draw(page, solver="ancestral", sampling_steps="20", seeds="0-15")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Draw", exact=True).and_(page.locator(":enabled")).wait_for()
    draw(page, seeds="0")
    page.locator(".cells").first.wait_for()


def test_a_mask_is_painted_and_a_broken_file_named(visit):
    page = visit("#play")
    page.get_by_role("button", name="edit a picture").click()
    field(page, "file").set_input_files(dict(name="x.png", mimeType="image/png", buffer=b"no picture"))
    page.get_by_role("alert").filter(has_text="of no known format").wait_for()
    field(page, "file").set_input_files(png(np.full((16, 24), 200, np.uint8)))
    page.get_by_role("status").filter(has_text="24x16 pixels, scaled and cropped to 8x8").wait_for()
    field(page, "brush").fill("40")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    x, y = box["x"] + box["width"] * 0.82, box["y"]
    page.mouse.move(x, y + 5)
    page.mouse.down()
    page.mouse.move(x, y + box["height"] - 5, steps=5)
    page.mouse.up()
    draw(page, strength="1", seeds="0", sampling_steps="3")
    page.locator(".cells img").wait_for()
    drawn = pixels(page.locator(".cells img")).astype(int)
    assert abs(drawn[:, :5] - 200).max() <= 1 < abs(drawn[:, 6] - 200).max()
    page.get_by_role("button", name="wipe the mask").click()
    field(page, "brush").fill("64")
    page.locator("#mask").press(" ")  # by the keyboard, in the middle
    draw(page)
    page.locator(".cells img").nth(1).wait_for()
    again = pixels(page.locator(".cells img").first).astype(int)
    assert abs(again[:, 6:] - 200).max() <= 1 < abs(again[3:5, 3:5] - 200).max()
    field(page, "file").set_input_files(png(np.full((8, 8), 100, np.uint8)))  # on which nothing is painted
    page.wait_for_timeout(500)
    draw(page, seeds="1")
    page.get_by_role("img", name="image of seed 1").wait_for()
    assert not page.locator("#fault").is_visible()


def test_two_visitors_do_not_mix(visit):
    pages = [visit("#play"), visit("#play")]
    for page, seed in zip(pages, ("5", "6")):
        draw(page, model="first", sampling_steps="5", seeds=seed)
    first, second = (pixels(page.locator(".cells img")) for page in pages)
    assert (first != second).any()
    assert [page.locator(".drawing").count() for page in pages] == [1, 1]
    assert pages[1].locator(".cells figcaption").inner_text() == "seed 6"


def test_a_training_is_started_and_stopped_and_its_curve_goes_on(visit):
    page = visit("#train")
    part = page.locator("#begin")
    part.locator("[name=run]").fill("from-the-page")
    part.locator("[name=steps]").fill("100000")
    part.get_by_text("more", exact=True).click()
    for name, value in dict(image_size="8", num_channels="16", batch_size="4").items():
        part.locator(f"[name={name}]").fill(value)
    page.get_by_role("button", name="Start").click()
    page.locator(".training", has_text="from-the-page").get_by_text("running").wait_for()
    page.get_by_role("button", name="look at it").click()
    page.get_by_role("heading", name="from-the-page", exact=True).wait_for()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="stop").click()
    page.locator(".training .state", has_text="stopped").wait_for()


def test_it_is_worked_by_keys_and_read_on_a_phone_and_in_the_dark(visit):
    page = visit(viewport=dict(width=390, height=800), color_scheme="dark")
    page.get_by_role("heading", name="Runs").wait_for()
    page.get_by_role("tab", name="Runs").focus()
    page.keyboard.press("ArrowRight")
    field(page, "solver").locator("option").nth(3).wait_for(state="attached")
    assert page.get_by_role("tab", name="Playground").get_attribute("aria-selected") == "true"
    for control in page.locator("#play").locator("input:visible, select:visible, button:visible").all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, control


def contrast(page, what: str) -> float:
    """Of a text against what lies behind it (WCAG 2.1)."""
    ink, paper = page.locator(what).first.evaluate("""e => {
        let behind = e;
        while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [getComputedStyle(e).color, getComputedStyle(behind || document.body).backgroundColor];
    }""")

    def light(colour: str) -> float:
        parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
        r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    a, b = sorted((light(ink), light(paper)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_its_texts_stand_out(visit, scheme):
    page = visit("#play", color_scheme=scheme)
    field(page, "solver").locator("option").nth(3).wait_for(state="attached")
    texts = ("[role=tab]", "[aria-selected=true]", "#about", "#wish label", "button.main", "#wish select", "#kinds button")
    assert {what: found for what in texts if (found := contrast(page, what)) < 4.5} == {}


@pytest.mark.slow
def test_three_visitors_draw_for_two_minutes_while_a_training_runs(visit, address):
    """No error, and the page still answers at once."""
    pages = [visit("#play") for _ in range(3)]
    for page in pages:
        field(page, "solver").locator("option").nth(3).wait_for(state="attached")
        field(page, "model").select_option("first")
    data = json.loads(ask(address, "/api/offered")[1])["data"][0]
    how = dict(action="begin", run="beside", data=data, preset="auto", image_size="8", steps=100_000, num_channels=16)
    code, said = ask(address, "/api/train", how)
    assert code == 200, said
    end, drawn = time.monotonic() + 120, 0
    while time.monotonic() < end:
        for k, page in enumerate(pages):
            draw(page, seeds=f"{drawn + k}", sampling_steps="10")
        for page in pages:
            page.get_by_role("button", name="Draw", exact=True).and_(page.locator(":enabled")).wait_for()
            assert not page.locator("#fault").is_visible()
            drawn += 1
    began = time.monotonic()
    fresh = visit()
    fresh.get_by_role("heading", name="Runs").wait_for()
    assert time.monotonic() - began < 1.5 and drawn > 30
    ask(address, "/api/train", dict(action="stop", run="beside"))
