"""The page of viz_slots.py in a browser: it opens, finds, orders, shows pictures, by keys alone, and loads nothing."""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.datasets import build_dataset
from transfer.figures.looking import Observer, Squares
from transfer.figures.page import build_page
from transfer.figures.survey import Survey

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver (apt packages) here")
UNUSED = 5


@pytest.fixture(scope="module")
def page(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 40 prototypes, of which every fifth is unused; prototype k by the images from number k // 3 on."""

    def see(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.zeros(len(pictures), 40, 7, 7)
        scores[:, 1] = 0.1
        for place in range(40):
            if place % UNUSED:
                scores[place // 3 :, place, place // 7, place % 7] = 0.9
        return torch.randn(len(pictures), 6, 7, 7, generator=torch.Generator().manual_seed(0)), scores

    where = argparse.Namespace(dataset="folder", data_dir=str(images), seed=0, image_size=64, min_scale=0.08)
    observer = Observer(see, Squares(build_dataset(where), 64), torch.device("cpu"), 16, 0)
    survey = Survey(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), 0.07, 4)
    for seen in observer.look(range(16), "images"):
        survey.add(seen)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_bytes(build_page(observer, survey, 0.5, "a page"))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,800",
    ):
        options.add_argument(flag)
    options.add_argument("--window-size=1200,800")
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def numbers(browser: Any) -> list[int]:
    return [int(n) for n in browser.execute_script("return [...document.querySelectorAll('article')].map(a => a.id)")]


def choose(browser: Any, identity: str, value: str) -> None:
    script = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, identity, value)


def keys(browser: Any, words: str) -> None:
    webdriver.ActionChains(browser).send_keys(words).perform()


def facts(page: Path) -> list[dict[str, Any]]:
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])["prototypes"]


def test_it_opens_without_an_error_or_a_request(opened: Any, page: Path) -> None:
    assert numbers(opened) == list(range(40))
    assert "40 prototypes" in opened.find_element("id", "shown").text
    sent = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert all(url == page.as_uri() or url.startswith(("data:", "blob:")) for url in urls)
    assert opened.get_log("browser") == []


def test_pictures_are_there_when_they_are_near_and_let_go_when_far(opened: Any) -> None:
    decoded = """
        const done = arguments[arguments.length - 1];
        const box = document.getElementById(arguments[0]).querySelector("figure div");
        const url = box.style.backgroundImage.slice(5, -2), image = new Image();
        if (!url) done(null); else { image.onload = () => done([image.naturalWidth, image.naturalHeight]);
          image.onerror = () => done("broken"); image.src = url; }"""
    wait = WebDriverWait(opened, 10)
    width, height = wait.until(lambda _: opened.execute_async_script(decoded, "1"))
    assert width == 4 * height > 200
    assert opened.execute_async_script(decoded, "39") is None
    opened.execute_script("document.getElementById('39').scrollIntoView()")
    assert wait.until(lambda _: opened.execute_async_script(decoded, "39"))
    assert wait.until(lambda _: opened.execute_async_script(decoded, "1") is None)


@pytest.mark.parametrize("order", ["usage", "area", "size", "score"])
def test_it_orders(order: str, opened: Any, page: Path) -> None:
    def key(number: int) -> float:
        one = facts(page)[number]
        size = one["area"] / one["images"] if one["images"] else 0.0
        score = one["nearest"][0][1] if one["nearest"] else -2
        return {"usage": one["images"], "area": one["area"], "size": size, "score": score}[order]

    choose(opened, "order", order)
    shown = numbers(opened)
    assert sorted(shown) == list(range(40))
    values = [key(number) for number in shown]
    assert values == pytest.approx(sorted(values, reverse=True))
    assert {number % UNUSED for number in shown[-8:]} == {0}
    opened.find_element("id", "reverse").click()
    assert numbers(opened) == shown[::-1]


def test_it_finds(opened: Any, page: Path) -> None:
    for words, found in (("17", [17]), ("3 17, #30", [3, 17, 30]), ("8-10", [8, 9, 10]), ("38-", [38, 39])):
        choose(opened, "find", words)
        assert numbers(opened) == found
    choose(opened, "find", "15.JPG")
    names = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])["names"]
    with_it = [n for n, one in enumerate(facts(page)) if any(names[i] == "15.jpg" for i, _ in one["nearest"])]
    assert numbers(opened) == with_it != []
    choose(opened, "find", "no such file")
    assert numbers(opened) == []
    assert "No prototype matches" in opened.find_element("id", "none").text
    choose(opened, "find", "")
    opened.find_element("id", "unused").click()
    assert numbers(opened) == [number for number in range(40) if number % UNUSED]


def test_a_prototype_that_nothing_uses_says_so(opened: Any) -> None:
    card = opened.find_element("css selector", "article.unused")
    assert card.get_attribute("id") == "0"
    assert "no image uses it" in card.text
    assert not card.find_elements("css selector", "figure")


def test_keys_suffice(opened: Any) -> None:
    def focused() -> str:
        return str(opened.execute_script("return document.activeElement.id"))

    keys(opened, "jj")
    assert focused() == "1"
    keys(opened, "k")
    assert focused() == "0"
    keys(opened, "j" + Keys.ENTER)
    assert "large" in str(opened.find_element("id", "1").get_attribute("class"))
    keys(opened, "/")
    assert focused() == "find"
    keys(opened, "33" + Keys.ENTER)
    assert focused() == "33"
    keys(opened, Keys.ESCAPE)
    assert len(numbers(opened)) == 40
    keys(opened, "s")
    assert opened.find_element("id", "order").get_attribute("value") == "usage"
    before = numbers(opened)
    keys(opened, "r")
    assert numbers(opened) == before[::-1]


def test_a_link_leads_to_its_prototype_even_if_it_was_filtered_out(opened: Any) -> None:
    choose(opened, "find", "3")
    opened.execute_script("location.hash = '#36'")
    WebDriverWait(opened, 5).until(lambda _: 36 in numbers(opened))
    assert opened.execute_script("return document.activeElement.id") == "36"


@pytest.mark.parametrize("width", [320, 390, 1200, 2500])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_both_color_schemes(width: int, scheme: str, opened: Any) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    paper, ink = opened.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    bright = [sum(int(level) for level in color[4:-1].split(",")) / 765 for color in (paper, ink)]
    assert (bright[0] > 0.9 and bright[1] < 0.2) if scheme == "light" else (bright[0] < 0.1 and bright[1] > 0.85)
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
