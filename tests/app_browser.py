"""A headless Chromium that drives the app. What is told to the page by key and click is what a person would."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    JavascriptException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement


MISSING = "no chromium or chromedriver on the PATH: install Debian's, `apt-get install chromium chromium-driver`"
# What a page raises that is being loaded, that moves, or that has drawn an element anew.
CHANGING = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    JavascriptException,
    StaleElementReferenceException,
)
FLAGS = (
    "--headless",
    "--no-sandbox",  # for root, as in a container
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
)


def find_chromium() -> tuple[str, str] | None:
    """(browser, driver), or `None` where one of them is missing."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextlib.contextmanager
def open_browser(width: int = 1280, height: int = 1000) -> Iterator["Page"]:
    browser, driver = find_chromium()
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.page_load_strategy = "none"  # `Page.open` knows better when the page is there
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield Page(chromium)
        finally:
            chromium.quit()


class Page:
    """The app in a browser. Elements are found by CSS selectors; whatever takes a while is waited for."""

    def __init__(self, chromium: webdriver.Chrome):
        self.chromium = chromium
        self.requests: list[str] = []

    def open(self, address: str) -> None:
        self.chromium.get_log("performance")  # what the page before it asked for
        self.requests.clear()
        self.chromium.execute_script("window.isLeft = true")
        self.chromium.get(address)
        there = "return !window.isLeft && document.querySelector('#prompt textarea') !== null"
        self.wait(lambda: self.chromium.execute_script(there))
        self.settle()

    # ---- looking

    def find(self, selector: str) -> list[WebElement]:
        return [one for one in self.chromium.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]

    def text(self, selector: str) -> str:
        """What can be read there, at one moment."""
        script = "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText).join(' ')"
        return self.chromium.execute_script(script, selector)

    def wait(self, condition: Callable, seconds: float = 120):
        """The first true value of `condition()`."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(*CHANGING):
                if value := condition():
                    return value
            if time.monotonic() > end:
                raise TimeoutError(f"still waiting after {seconds} s; the page says: {self.text('body')[:2000]}")
            time.sleep(0.05)

    def wait_for_text(self, selector: str, part: str, seconds: float = 120) -> str:
        return self.wait(lambda: part in self.text(selector) and self.text(selector), seconds)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.chromium.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )

    def outside(self, address: str) -> set[str]:
        """What the page has asked other hosts for since it was opened, be it in vain."""
        for entry in self.chromium.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                parameters = message["params"]
                self.requests.append(parameters.get("request", parameters)["url"])
        here = urlsplit(address).netloc
        asked = (urlsplit(url) for url in self.requests)
        return {one.geturl() for one in asked if one.scheme not in ("data", "blob", "chrome") and one.netloc != here}

    def settle(self) -> None:
        """Wait until the app has nothing left to do for this page."""
        busy = "return document.querySelector('[data-testid=status-tracker]:not(.hide)') !== null"
        self.wait(lambda: not self.chromium.execute_script(busy))

    # ---- doing

    def click(self, selector: str, index: int = 0) -> None:
        self.wait(lambda: self._click(self.find(selector)[index:]))

    def tab(self, name: str) -> None:
        self.wait(lambda: self._click([one for one in self.find("button[role=tab]") if one.text == name]))

    @staticmethod
    def _click(found: list[WebElement]) -> bool:
        for one in found[:1]:
            one.click()
        return bool(found)

    def type(self, selector: str, text: str) -> None:
        """In place of what is there."""

        def write() -> bool:
            found = self.find(selector)
            for one in found[:1]:
                one.send_keys(Keys.CONTROL, "a")
                one.send_keys(Keys.DELETE)
                one.send_keys(text)
            return bool(found)

        self.wait(write)

    def value(self, selector: str) -> str:
        return self.wait(lambda: self.find(selector))[0].get_attribute("value")

    def upload(self, selector: str, *paths: Path) -> None:
        """Into the file field, which is hidden, below `selector`."""
        fields = self.wait(lambda: self.chromium.find_elements(By.CSS_SELECTOR, f"{selector} input[type=file]"))
        fields[0].send_keys("\n".join(str(path) for path in paths))

    def image(self, selector: str) -> tuple[int, int] | None:
        """(width, height) in its own pixels of the image below `selector`, once it has been loaded."""
        script = (
            "const one = document.querySelector(arguments[0] + ' img');"
            "return one && one.complete && one.naturalWidth ? [one.naturalWidth, one.naturalHeight] : null"
        )
        size = self.chromium.execute_script(script, selector)
        return size and tuple(size)

    def draw(self, prompt: str) -> str:
        """Draw, wait, and say what the page then says."""
        drawn = len(self.find("#history button img"))
        self.type("#prompt textarea", prompt)
        self.click("#generate-button")
        self.wait(lambda: len(self.find("#history button img")) == drawn + 1)
        self.settle()
        return self.text("#status")

    def fit(self) -> None:
        """Make the window as high as the page."""
        script = "return [document.documentElement.scrollHeight, window.outerHeight - window.innerHeight]"
        self.chromium.set_window_size(
            self.chromium.get_window_size()["width"], sum(self.chromium.execute_script(script))
        )

    def save(self, path: Path) -> None:
        self.chromium.save_screenshot(str(path))
