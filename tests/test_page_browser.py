"""The page of a run in a real browser: its script, its keys, its widths."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.training.page.facts import Column, DataFacts, Facts, Fed, Save, write_facts
from library.training.page.gather import gather
from library.training.page.page import write_page

PROMPTS = ("a unicorn", "a fox with " + "x" * 90)
STEPS = (0, 10, 20, 30)

selenium = pytest.importorskip("selenium", reason="selenium, which leads a browser, is not installed")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not BROWSER or not DRIVER, reason="there is no chromium with its chromedriver")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the page of a run that was made up."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "sample").mkdir()
    columns = []
    for step in STEPS:
        names = tuple(f"sample/{step}_{row}.png" for row in range(len(PROMPTS)))
        for row, name in enumerate(names):
            Image.new("RGB", (64, 96), (step * 8, row * 200, 90)).save(folder / name)
        columns.append(Column(label=f"step {step}" if step else "start", step=step, pictures=names))
    lines = [
        f'{{"step": {step}, "time": {step}, "loss/current": {1 / step}, "lr/unet": 0.001, "time/step": 1, "time/data": 0}}'
        for step in range(1, 31)
    ]
    lines += [f'{{"step": {step}, "loss/validation/step_average": {1 / step}}}' for step in STEPS[1:]]
    (folder / "x-metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "x-options.toml").write_text('[a]\noutput_name = "x"\nlearning_rate = 0.001\n', encoding="utf-8")
    (folder / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    data = DataFacts(
        size=(64, 64), batch_size=1, pictures=1, regularisation=0, held_out=0, has_buckets=False, buckets=()
    )
    facts = Facts(
        state="finished",
        began=1.0,
        updated=61.0,
        step=30,
        steps=30,
        prompts=PROMPTS,
        columns=tuple(columns),
        saves=(Save(file="x.safetensors", step=30, epoch=1, norms_by_block={"down 1": 1.0}),),
        datasets=(data,),
        tags=(("a tag " + "y" * 90, 3), ("b", 1)),
        num_tags=2,
        captions=(Fed(picture="sample/0_0.png", caption="z" * 200), Fed(picture="gone.png", caption="")),
        warnings=("w" * 300,),
        versions={"torch": "2"},
    )
    write_facts(folder / "x-run.json", facts)
    write_page(gather(folder, "x"), folder / "x-report.html")
    return folder / "x-report.html"


class Browser:
    """A headless Chromium."""

    def __init__(self, profile: Path) -> None:
        from selenium.webdriver import Chrome, ChromeOptions, ChromeService

        options = ChromeOptions()
        options.binary_location = BROWSER or ""
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(word)
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = Chrome(options=options, service=ChromeService(DRIVER))

    def open(self, page: Path, width: int, scheme: str) -> None:
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.driver.get(page.as_uri())

    def command(self, name: str, **arguments: Any) -> None:
        self.driver.execute_cdp_cmd(name, arguments)

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def press(self, *keys: str) -> None:
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.command("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def wait(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + 5
        while not is_so():
            assert time.monotonic() < end, "the page did not come to it"
            time.sleep(0.02)


KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_overflows_and_nothing_fails(browser, page, width, scheme):
    browser.open(page, width, scheme)
    assert browser.ask("document.documentElement.scrollWidth") == width
    # What scrolls by itself apart.
    outside = "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, .strip, .uplot'))"
    wide = browser.ask(
        f"{outside}.filter(one => one.getBoundingClientRect().right > {width} + 1).map(one => one.outerHTML)"
    )
    assert wide == []
    assert browser.ask("document.querySelectorAll('.uplot canvas').length") == 3
    colours = browser.ask("['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
    bright = [sum(map(int, colour.strip("rgb()").split(","))) for colour in colours]
    assert (bright[0] < bright[1]) == (scheme == "light")
    assert [entry["message"] for entry in browser.driver.get_log("browser")] == []


def test_a_slider_and_keys_go_through_the_pictures(browser, page):
    browser.open(page, 1280, "light")
    shown = "[...document.querySelectorAll('.now figcaption')].map(one => one.textContent)"
    assert browser.ask(shown) == ["step 30"] * 2
    assert (
        browser.ask("[...document.querySelectorAll('.base figcaption')].map(one => one.textContent)") == ["start"] * 2
    )
    browser.driver.find_element("id", "step").send_keys("\ue012")  # arrow to the left
    assert browser.ask(shown) == ["step 20"] * 2
    browser.ask("document.querySelector('.stepper .back').click()")
    assert browser.ask(shown) == ["step 10"] * 2
    browser.ask("document.querySelectorAll('.strip')[1].children[2].click()")
    assert browser.ask(shown) == ["step 20"] * 2
    assert browser.ask("document.querySelector('.stepper output').textContent") == "step 20"
    assert browser.ask("document.querySelectorAll('.cell[aria-current=true]').length") == 2

    viewed = "document.getElementById('viewer').querySelector('img').alt"
    browser.ask("document.querySelector('.now button').click()")
    assert browser.ask("document.getElementById('viewer').open")
    assert browser.ask(viewed) == "a unicorn, step 20"
    browser.press("ArrowLeft")
    assert browser.ask(viewed) == "a unicorn, step 10"
    browser.press("ArrowDown", "ArrowDown")
    assert browser.ask(viewed) == f"{PROMPTS[1]}, step 10"
    browser.press("ArrowUp", *["ArrowRight"] * 9)
    assert browser.ask(viewed) == "a unicorn, step 30"
    assert browser.ask("document.querySelector('#viewer a').href").endswith("/sample/30_0.png")
    assert browser.ask(shown) == ["step 30"] * 2
    browser.press("Escape")
    browser.wait(lambda: not browser.ask("document.getElementById('viewer').open"))

    assert browser.ask("document.querySelectorAll('.mini button').length") == 2
    browser.ask("document.querySelectorAll('.mini button')[1].click()")
    assert browser.ask(viewed) == f"{PROMPTS[1]}, step 30"
    browser.ask("document.querySelector('#viewer form button').click()")
    browser.ask("document.querySelector('.copy').click()")
    browser.wait(lambda: browser.ask("document.querySelector('.copy').textContent") in ("Copied", "Selected"))
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait(lambda: browser.ask("document.querySelectorAll('.uplot canvas').length") == 3)
    assert [entry["message"] for entry in browser.driver.get_log("browser")] == []
