"""The report in a browser: it hovers, it sorts, it plays, and it runs nothing but its own script."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bacinfer.report.page import write_report
from report.report_helpers import (
    BLOCKS,
    SCHEDULE,
    bac_row,
    plain_row,
    similarity,
    write_many_results,
    write_results,
    write_table,
)

pytest.importorskip("selenium", reason="selenium is not installed: pip install 'bacinfer[test]'")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900"),
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no Chromium with chromedriver on PATH (Debian: apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_results(tmp_path_factory.mktemp("results")))


def point_at(browser: Any, block: int, step: int) -> str:
    """Moves the mouse over a cell of the first map, and reads."""
    svg = browser.find_element(By.CSS_SELECTOR, ".map .grid svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    width, height = svg.rect["width"], svg.rect["height"]
    x = (step + 0.5) / SCHEDULE.num_inference_steps * width - width / 2
    y = (block + 0.5) / len(BLOCKS) * height - height / 2
    ActionChains(browser).move_to_element_with_offset(svg, round(x), round(y)).perform()
    return browser.find_element(By.CSS_SELECTOR, ".map .readout").text


def test_hovering_tells_what_happens_in_a_cell(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    assert point_at(browser, 0, 8) == f"{BLOCKS[0]}, step 8: updated"
    expected = float(f"{similarity(2)[12, 17]:.4g}")
    assert point_at(browser, 2, 17) == f"{BLOCKS[2]}, step 17: reused from step 12, cosine {expected}"
    source = browser.find_element(By.CSS_SELECTOR, ".source")
    assert (source.get_attribute("x"), source.get_attribute("y")) == ("12", "2")
    svg = browser.find_element(By.CSS_SELECTOR, ".map .grid svg")
    svg.send_keys(Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    readout = browser.find_element(By.CSS_SELECTOR, ".map .readout").text
    assert readout.startswith(f"{BLOCKS[3]}, step 15: reused from step 14, cosine ")


def test_nothing_is_loaded_and_nothing_complains(browser: Any, page: Path) -> None:
    browser.get_log("browser")
    browser.get(page.as_uri())
    names = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    assert browser.get_log("browser") == []


def test_it_fits_a_phone(browser: Any, page: Path) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_click_sorts(browser: Any, tmp_path: Path) -> None:
    rows = [replace(plain_row("a"), label="c", score=0.5), bac_row("b", label="b 10", score=None)]
    rows += [bac_row("c", label="b 9", score=0.25)]
    write_table(tmp_path, rows)
    browser.get(write_report(tmp_path, num_pictured=0).as_uri())

    def sort_by(title: str) -> list[str]:
        heading = next(h for h in browser.find_elements(By.CSS_SELECTOR, "thead th") if h.text.startswith(title))
        heading.find_element(By.TAG_NAME, "button").click()
        return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "tbody th")]

    assert sort_by("score") == ["b 9", "c", "b 10"]
    assert sort_by("score") == ["c", "b 9", "b 10"]
    assert sort_by("method") == ["b 9", "b 10", "c"]


def test_videos_play_side_by_side(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    browser.find_element(By.CSS_SELECTOR, ".play").click()
    times = "return [...document.querySelectorAll('video')].map((video) => video.currentTime)"
    WebDriverWait(browser, 30).until(lambda driver: min(driver.execute_script(times)) > 0)


def test_scripts_in_files_are_inert(browser: Any, tmp_path: Path) -> None:
    attack = "<script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"
    results = write_results(tmp_path)
    write_table(results, [bac_row(checkpoint=attack, label=attack, task=attack), plain_row()])
    browser.get(write_report(results).as_uri())
    assert browser.title != "attacked"
    assert attack in browser.find_element(By.TAG_NAME, "body").text
    assert browser.find_elements(By.TAG_NAME, "img") == []
    insert = "document.body.insertAdjacentHTML('beforeend', arguments[0])"  # not even if one got into the page
    browser.execute_script(insert, '<img src="data:x" onerror="document.title = \'attacked\'">')
    time.sleep(0.5)
    assert browser.title != "attacked"


def test_500_runs_load_in_five_seconds(browser: Any, tmp_path: Path) -> None:
    """The quickest of three, as the machine may be busy with other tests."""
    page = write_report(write_many_results(tmp_path))

    def load() -> float:
        browser.get(page.as_uri())
        return browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")

    assert min(load() for _ in range(3)) < 5
    assert len(browser.find_elements(By.CSS_SELECTOR, "tbody tr")) == 500
