"""The app as a person sees it, in a headless Chromium: what is typed and clicked, and what then appears."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from app_browser import MISSING, Page, find_chromium, open_browser
from toy_app import Gate, bomb, picture, scripted_pipeline

from nextflow_hf.app.interface import App
from nextflow_hf.app.server import serve
from nextflow_hf.app.studio import Studio
from nextflow_hf.app.uploads import MAX_BYTES


# A browser on a busy machine takes its time.
pytestmark = [pytest.mark.skipif(find_chromium() is None, reason=MISSING), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Gate]]:
    """The address of the app, and the gate of its pipeline."""
    pipe = scripted_pipeline()
    app = App(
        Studio(pipe),
        str(tmp_path_factory.mktemp("drawn")),
        name="toy",
        prompts=("a circle",),
        conversations=("a story",),
    )
    page = app.build()
    yield serve(page), Gate(pipe)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_browser() as page:
        yield page


@pytest.fixture
def gate(served) -> Iterator[Gate]:
    yield served[1]
    served[1].open()


@pytest.fixture
def page(browser, served, gate) -> Page:
    """The app, opened anew."""
    browser.open(served[0])
    return browser


def test_an_image_grows_scale_by_scale(page, served, gate):
    gate.close()
    page.type("#prompt textarea", "a red circle")
    page.click("#generate-button")
    for scale in (1, 2, 3):
        gate.let(1)
        page.wait_for_text("#status", f"Scale {scale} of 4: {scale} × {scale} cells")
        page.wait(lambda count=scale: len(page.find("#scales figure img")) == count)
        assert page.wait(lambda: page.image("#result")) == (16, 16)
    assert not page.find("#history img")
    gate.open()
    said = page.wait_for_text("#status", "16 × 16 pixels, seed ")
    assert f"seed {page.value('#seed input')}," in said
    assert page.wait(lambda: page.image("#history")) == (16, 16)
    assert "4 × 4" in page.text("#scales")
    rendering = "return getComputedStyle(document.querySelector('#result img')).imageRendering"
    assert page.chromium.execute_script(rendering) == "pixelated"  # it is tiny
    assert page.overflow() <= 0
    assert page.outside(served[0]) == set() and len(page.requests) > 10


def test_the_browser_refuses_what_is_not_from_here(page, served):
    script = """
        const done = arguments[0];
        addEventListener('securitypolicyviolation', event => done(event.blockedURI));
        new Image().src = 'http://outside.example/image.png';
    """
    page.chromium.set_script_timeout(60)
    assert page.chromium.execute_async_script(script) == "http://outside.example/image.png"
    assert page.outside(served[0]) == {"http://outside.example/image.png"}


def test_an_upload_is_edited_and_so_is_the_result(page, tmp_path):
    page.upload("#references", Path(picture(tmp_path / "wide.png")))
    assert page.wait(lambda: page.image("#references")) == (20, 12)
    assert "20 × 12 pixels" in page.draw("make it blue")  # the shape of its reference
    page.wait(lambda: page.image("#result") == (20, 12))
    page.open(page.chromium.current_url)
    page.draw("a circle")
    page.click("#edit-button")
    assert page.wait(lambda: page.image("#references")) == (16, 16)


def test_images_that_are_too_large_are_refused(page, tmp_path):
    page.upload("#references", Path(bomb(tmp_path / "bomb.png", 100_000, 100_000)))
    page.wait_for_text("body", "bomb.png looks like a decompression bomb and was not decoded")
    page.wait(lambda: not page.find("#references img"))
    page.upload("#references", Path(bomb(tmp_path / "large.png", 10_000, 8_000)))
    page.wait_for_text("body", "large.png has 80000000 pixels (8000 x 10000), expected at most 50000000")
    heavy = tmp_path / "heavy.png"
    picture(heavy)
    with heavy.open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    page.upload("#references", heavy)
    page.wait_for_text("body", "exceed the maximum allowed size of 20")
    assert not page.find("#references img")
    assert "16 × 16 pixels" in page.draw("a circle")  # as if nothing had been


def test_the_history_gives_settings_back(page):
    page.draw("a red circle")
    seed = page.value("#seed input")
    page.draw("a blue square")
    assert page.value("#seed input") != seed
    page.click("#history button img", 1)
    page.wait(lambda: page.value("#prompt textarea") == "a red circle")
    assert page.value("#seed input") == seed and not page.find("#random input")[0].is_selected()
    before = page.find("#history button img")[1].get_attribute("src")
    assert f"seed {seed}," in page.draw("a red circle")
    after = page.find("#history button img")[0].get_attribute("src")
    assert pixels(page, after) == pixels(page, before)


def pixels(page: Page, address: str) -> list[int]:
    script = """
        const [address, done] = arguments, image = new Image();
        image.onload = () => {
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.width, image.height];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            done([...context.getImageData(0, 0, image.width, image.height).data]);
        };
        image.src = address;
    """
    return page.chromium.execute_async_script(script, address)


def test_stop_ends_a_drawing(page, gate):
    page.click("#stop-button")
    page.wait_for_text("body", "Nothing of yours is being generated")
    gate.close()
    page.type("#prompt textarea", "a red circle")
    page.click("#generate-button")
    gate.let(1)
    page.wait_for_text("#status", "Scale 1 of 4")
    page.click("#stop-button")
    gate.open()
    said = page.wait_for_text("#status", "Stopped after scale ")
    assert said in {f"Stopped after scale {scale}." for scale in (1, 2)}  # the one it was at
    assert not page.find("#history img")
    assert "pixels" in page.draw("a red circle")


def test_a_second_window_waits_for_the_first(page, served, gate):
    gate.close()
    first = page.chromium.current_window_handle
    page.type("#prompt textarea", "a red circle")
    page.click("#generate-button")
    gate.let(1)
    page.wait_for_text("#status", "Scale 1 of 4")
    page.chromium.switch_to.new_window("tab")
    try:
        page.open(served[0])
        page.type("#prompt textarea", "a blue square")
        page.click("#generate-button")
        page.wait_for_text("#status", "queue")
        page.click("#stop-button")  # stops nothing of the first
        page.wait_for_text("body", "Nothing of yours is being generated")
        gate.open()
        page.wait_for_text("#status", "pixels")
    finally:
        page.chromium.close()
        page.chromium.switch_to.window(first)
    page.wait_for_text("#status", "pixels")


def test_a_conversation_of_text_and_images(page, served, gate, tmp_path):
    gate.close()
    page.tab("Chat")
    page.upload("#chat-box", Path(picture(tmp_path / "wide.png")))
    page.wait(lambda: page.find("#chat-box img"))
    page.type("#chat-box textarea", "what is <b>it</b>?\n")
    assert "what is <b>it</b>?" in page.wait_for_text("#chat", "first, a ")  # before its image is there
    assert len(page.find("#chat img")) == 1 and page.value("#chat-box textarea") == ""
    gate.open()
    page.wait_for_text("#chat", "and no more")
    page.wait(lambda: len(page.find("#chat img")) == 2)
    page.settle()
    page.type("#chat-box textarea", "go on\n")
    page.wait(lambda: page.text("#chat").count("and no more") == 2)
    page.settle()
    assert page.overflow() <= 0 and page.outside(served[0]) == set()
    page.click("#chat-clear")
    page.wait(lambda: "no more" not in page.text("#chat"))


def test_a_new_conversation_ends_the_answer_to_the_old_one(page, gate):
    gate.close()
    page.tab("Chat")
    page.type("#chat-box textarea", "tell\n")
    page.wait_for_text("#chat", "first, a ")
    page.click("#chat-clear")
    page.wait(lambda: "first, a " not in page.text("#chat"))
    gate.open()
    page.settle()
    assert "tell" not in page.text("#chat") and "no more" not in page.text("#chat")
    page.type("#chat-box textarea", "hello\n")
    assert "tell" not in page.wait_for_text("#chat", "and no more")


def test_a_phone_shows_it_all(page):
    size = page.chromium.get_window_size()
    try:
        page.chromium.set_window_size(420, 900)
        page.draw("a red circle")
        assert page.overflow() <= 0
        page.tab("Chat")
        page.type("#chat-box textarea", "hello\n")
        page.wait_for_text("#chat", "and no more")
        assert page.overflow() <= 0
    finally:
        page.chromium.set_window_size(size["width"], size["height"])
