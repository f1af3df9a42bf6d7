"""The HTML page of viz_slots.py; most tests need a browser and are skipped without selenium and chromium."""

import argparse
import base64
import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.datasets import build_dataset
from transfer.figures.extractor import CenterCrops, FeatureExtractor, SlotExtractor
from transfer.figures.image_page import build_image_page
from transfer.figures.nearest_patches import sample_position
from transfer.figures.principal_components import PrincipalComponents
from transfer.figures.prototype_page import build_page
from transfer.figures.prototype_stats import PrototypeStats
from transfer.figures.regions import resample
from transfer.figures.tiles import enlarge, mark_patch, weight_colors
from transfer.figures.vit_attention import EncodedImages
from utils.visualization import normalize, palette

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
HAS_BROWSER = bool(find_spec("selenium") and BROWSER and DRIVER)
if HAS_BROWSER:
    from selenium import webdriver
    from selenium.common import WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

K = 40
USED = [number for number in range(K) if number % 5]


@pytest.fixture(scope="module")
def page(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 40 prototypes: every fifth is unused, and images k // 3 to 15 use prototype k."""

    def model(inputs: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.zeros(len(inputs), K, 7, 7)
        scores[:, 1] = 0.1
        for number in USED:
            scores[number // 3 :, number, number // 7, number % 7] = 0.9
        return torch.randn(len(inputs), 6, 7, 7, generator=torch.Generator().manual_seed(0)), scores

    dataset = build_dataset(argparse.Namespace(dataset="folder", data_dir=str(images), seed=0), recipes=())
    extractor = SlotExtractor(model, CenterCrops(dataset, 64), torch.device("cpu"), 16, 0)
    stats = PrototypeStats(torch.randn(K, 6, generator=torch.Generator().manual_seed(1)), 0.07, 4)
    for batch in extractor.extract(range(16), "extracting"):
        stats.update(batch)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_bytes(build_page(extractor, stats, 0.5, "details"))
    return path


def encode_colors(inputs: Tensor) -> EncodedImages:
    """Return maps of 4 x 4 colors as features, and three heads that attend to a color each."""
    small = F.interpolate(inputs, (4, 4))
    return EncodedImages(small, small.softmax(dim=1))


@pytest.fixture(scope="module")
def image_page(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 8 of 16 images in a folder whose name is long."""
    folder = tmp_path_factory.mktemp("image_page")
    (folder / "images" / "validation_2017").mkdir(parents=True)
    for number, path in enumerate(sorted(images.iterdir())):
        shutil.copy(path, folder / "images" / "validation_2017" / f"ADE_val_{number:08}-0123456789abcdef0123456789.jpg")
    dataset = build_dataset(argparse.Namespace(dataset="folder", data_dir=str(folder / "images"), seed=0), recipes=())
    extractor = FeatureExtractor(encode_colors, CenterCrops(dataset, 64), torch.device("cpu"), 16, 0)
    path = folder / "page.html"
    path.write_bytes(build_image_page(extractor, range(0, 16, 2), range(16), 3, 0, "details"))
    return path


def read_data(page: Path) -> Any:
    """Return the data inside a page."""
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    if not HAS_BROWSER:
        pytest.skip("needs selenium, chromium and chromedriver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    except WebDriverException as error:
        pytest.skip(f"chromium does not start: {error.msg}")
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Any, page: Path) -> Any:
    """The browser with the page newly opened and its logs cleared."""
    driver.get("about:blank")
    for log in ("performance", "browser"):
        driver.get_log(log)
    open_page(driver, page)
    return driver


def open_page(driver: Any, page: Path) -> None:
    """Open a page with fonts whose letters are 0.6 times as wide as the font size; others depend on the machine."""
    driver.get(page.as_uri())
    driver.execute_script("document.body.style.fontFamily = 'monospace'")


def card_numbers(browser: Any) -> list[int]:
    script = "return [...document.querySelectorAll('article')].map(card => card.id)"
    return [int(number) for number in browser.execute_script(script)]


def set_control(browser: Any, identifier: str, value: str) -> None:
    script = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, identifier, value)


def press(browser: Any, keys: str) -> str:
    """Press keys and return the id of the focused element."""
    webdriver.ActionChains(browser).send_keys(keys).perform()
    return str(browser.execute_script("return document.activeElement.id"))


def test_color_of_a_prototype_is_that_of_its_number_in_the_palette(page: Path) -> None:
    colors = [bytes.fromhex(prototype["color"].removeprefix("#")) for prototype in read_data(page)["prototypes"]]
    assert [list(color) for color in colors] == (255 * palette(K)).round().int().tolist()


def test_page_opens_without_errors_and_loads_no_other_files(browser: Any, page: Path) -> None:
    assert card_numbers(browser) == list(range(K))
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert all(url == page.as_uri() or url.startswith(("data:", "blob:")) for url in urls)
    assert browser.get_log("browser") == []


def test_images_are_decoded_near_the_viewport_and_released_elsewhere(browser: Any) -> None:
    script = "return document.querySelector(`[id='${arguments[0]}'] figure div`).style.backgroundImage"
    wait = WebDriverWait(browser, 20)
    wait.until(lambda _: "blob:" in browser.execute_script(script, "1"))
    assert browser.execute_script(script, "39") == ""
    browser.execute_script("document.getElementById('39').scrollIntoView()")
    wait.until(lambda _: "blob:" in browser.execute_script(script, "39"))
    wait.until(lambda _: browser.execute_script(script, "1") == "")


def test_sort_keys(browser: Any, page: Path) -> None:
    prototypes = read_data(page)["prototypes"]
    keys = {
        "usage": lambda prototype: prototype["images"],
        "area": lambda prototype: prototype["area"],
        "size": lambda prototype: prototype["area"] / prototype["images"] if prototype["images"] else 0,
        "score": lambda prototype: prototype["nearest"][0][1] if prototype["nearest"] else -2,
    }
    for name, key in keys.items():
        set_control(browser, "sort", name)
        numbers = card_numbers(browser)
        assert numbers == sorted(range(K), key=lambda number: -key(prototypes[number]))
        assert set(numbers[-8:]).isdisjoint(USED)
    browser.find_element("id", "reverse").click()
    assert card_numbers(browser) == numbers[::-1]


def test_search_by_number_range_and_file_name(browser: Any, page: Path) -> None:
    for query, expected in (("17", [17]), ("3 17, #30", [3, 17, 30]), ("8-10", [8, 9, 10]), ("38-", [38, 39])):
        set_control(browser, "search", query)
        assert card_numbers(browser) == expected
    data = read_data(page)
    image = data["names"].index("15.jpg")
    set_control(browser, "search", "15.JPG")
    nearest = [[index for index, _ in prototype["nearest"]] for prototype in data["prototypes"]]
    assert card_numbers(browser) == [number for number in range(K) if image in nearest[number]] != []
    set_control(browser, "search", "no such file")
    assert "No prototype matches" in browser.find_element("id", "none").text
    set_control(browser, "search", "")
    browser.find_element("id", "unused").click()
    assert card_numbers(browser) == USED


def test_keyboard_and_links(browser: Any) -> None:
    keys = webdriver.Keys
    assert press(browser, "jj") == "1"
    assert press(browser, "k" + keys.ENTER) == "0"
    assert press(browser, "j" + keys.ENTER) == "1"
    assert "large" in browser.find_element("id", "1").get_attribute("class")
    assert press(browser, "/") == "search"
    assert press(browser, "33" + keys.ENTER) == "33"
    browser.execute_script("location.hash = '#36'")  # which the search hides
    WebDriverWait(browser, 20).until(lambda _: len(card_numbers(browser)) == K)
    assert browser.execute_script("return document.activeElement.id") == "36"
    press(browser, "s")
    assert browser.find_element("id", "sort").get_attribute("value") == "usage"


def test_swatch_has_the_color_of_the_prototype(browser: Any, page: Path) -> None:
    script = "return [...document.querySelectorAll('.swatch')].map(swatch => getComputedStyle(swatch).backgroundColor)"
    shown = [[int(level) for level in color[4:-1].split(",")] for color in browser.execute_script(script)]
    assert shown == [list(bytes.fromhex(prototype["color"][1:])) for prototype in read_data(page)["prototypes"]]


def test_size_and_area_are_explained_on_the_cards_and_by_the_order(browser: Any, page: Path) -> None:
    text = browser.find_element("id", "31").text.replace("\n", " ")
    images, area = (read_data(page)["prototypes"][31][name] for name in ("images", "area"))
    assert f"usage {100 * images / 16:.0f}% ({images} of 16 images)" in text
    assert f"size {1600 * area / images:#.2g}% of their area" in text
    assert f"area {100 * area:#.2g}% of the total area" in text
    for name, explanation in (
        ("usage", "share of the images that use the prototype"),
        ("size", "share of the area of the images that use the prototype"),
        ("area", "share of the area of all images"),
    ):
        set_control(browser, "sort", name)
        assert browser.find_element("id", "count").text == f"40 prototypes, sorted by {name}: {explanation}"
    set_control(browser, "sort", "number")
    assert browser.find_element("id", "count").text == "40 prototypes"


def test_definitions_open_by_keyboard_and_by_click(browser: Any) -> None:
    definitions, summary = (browser.find_element("css selector", f"details {name}") for name in ("dl", "summary"))
    assert not definitions.is_displayed()
    summary.send_keys(webdriver.Keys.ENTER)
    assert definitions.is_displayed()
    assert [term.text for term in definitions.find_elements("css selector", "dt")] == ["usage", "size", "area"]
    summary.click()
    assert not definitions.is_displayed()


@pytest.fixture
def phone(browser: Any) -> Iterator[Any]:
    """The browser with the page on a screen of 390 x 844 pixels."""
    set_size(browser, 390, 844)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def set_size(browser: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_phone_shows_large_images_below_a_low_bar(phone: Any) -> None:
    script = "return [...document.querySelectorAll('.row figure div')].map(image => image.offsetWidth)"
    assert min(phone.execute_script(script)) > 100
    assert phone.execute_script("return document.querySelector('nav').offsetHeight") < 844 / 12


def test_file_names_break_only_after_separators(phone: Any, page: Path, tmp_path: Path) -> None:
    """Parts that are too long lose their middle, and the end of the name is shown."""
    names = [f"validation_images/ADE_val_{n:08}-0123456789abcdef0123456789abcdef.jpg" for n in range(16)]
    data = read_data(page)
    (tmp_path / "page.html").write_text(
        page.read_text().replace(json.dumps(data["names"], separators=(",", ":")), json.dumps(names))
    )
    open_page(phone, tmp_path / "page.html")
    for width in (320, 390, 1200):
        set_size(phone, width, 844)
        enlarged = phone.find_element("id", "1")
        if "large" not in enlarged.get_attribute("class"):
            enlarged.find_element("css selector", "h2 button").click()
        # Every part of a name between two possible breaks is on one line, and inside of its column.
        script = """return [...document.querySelectorAll("[id='1'] .name")].map(name => {
          const range = document.createRange(), {left, right} = name.closest("figure").getBoundingClientRect();
          return [...name.children].filter(part => part.textContent).map(part => {
            range.selectNodeContents(part.firstChild);
            const lines = [...range.getClientRects()];
            return [part.textContent, lines.length, lines[0].left >= left - 1 && lines[0].right <= right + 1];
          });
        });"""
        (*parts, last), *_ = phone.execute_script(script)
        assert all(number == 1 and fits for _, number, fits in (*parts, last))
        assert [text for text, _, _ in parts[:3]] == ["validation_", "images/", "ADE_"]
        assert last[0] == "012345678…bcdef.jpg"


@pytest.mark.parametrize("width", [320, 390, 1200, 2500])
def test_page_fits_the_width_in_light_and_dark(width: int, browser: Any) -> None:
    set_size(browser, width, 800)
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(level) for level in background[4:-1].split(",")) / 765
        assert brightness > 0.9 if scheme == "light" else brightness < 0.1
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# The page of images


def decode_tiles(strip: str, count: int) -> Tensor:
    """Return the images (count, 3, side, side) in [0, 1] of a strip."""
    with Image.open(BytesIO(base64.b64decode(strip))) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return torch.stack(pixels.chunk(count, dim=2))


def shrink(image: Tensor, position: int | None = None) -> Tensor:
    """Return an image (3, side, side) with the box of a patch, at a size at which JPEG changes little."""
    marked = image if position is None else mark_patch(image, position, 4)
    return F.interpolate(marked[None], (16, 16), mode="area")[0]


def test_strips_of_images_show_views_and_nearest_patches_in_order(image_page: Path) -> None:
    data = read_data(image_page)
    folder = image_page.parent / "images"
    dataset = build_dataset(argparse.Namespace(dataset="folder", data_dir=str(folder), seed=0), recipes=())
    crops = CenterCrops(dataset, 64)
    numbers = [int(name[24:32]) for name in data["names"]]
    pixels = torch.stack([crops[number].pixels for number in range(16)])
    features, attention = encode_colors(normalize(pixels / 255))
    rows = F.normalize(features.flatten(2), dim=1)
    shown = [numbers[card["image"]] for card in data["cards"]]
    assert shown == list(range(0, 16, 2))
    components = PrincipalComponents()
    components.update(features[shown])
    colors = components.fit().colors(features)
    heat = weight_colors(attention.mean(dim=1))
    for card, image in zip(data["cards"], shown):
        query = sample_position(image, 4, 0)
        views = decode_tiles(card["strips"][0], 3)
        expected = [shrink(resample(pixels[image : image + 1], 196)[0], query)]
        expected += [shrink(enlarge(maps[image], 196)) for maps in (colors, heat)]
        nearest = [numbers[index] for index, _ in card["nearest"]]
        for neighbor in nearest:
            position = int((rows[neighbor].T @ rows[image, :, query]).argmax())
            expected.append(shrink(resample(pixels[neighbor : neighbor + 1], 128)[0], position))
        drawn = [shrink(tile) for tile in (*views, *decode_tiles(card["strips"][1], 3))]
        torch.testing.assert_close(torch.stack(drawn), torch.stack(expected), atol=0.15, rtol=0)


@pytest.fixture
def image_browser(driver: Any, image_page: Path) -> Iterator[Any]:
    """The browser with the page of images newly opened and its logs cleared."""
    driver.get("about:blank")
    for log in ("performance", "browser"):
        driver.get_log(log)
    open_page(driver, image_page)
    yield driver
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_page_of_images_shows_their_views_and_nearest_patches(image_browser: Any, image_page: Path) -> None:
    data = read_data(image_page)
    assert len(data["cards"]) == 8
    script = """return [...document.querySelectorAll("article")].map(
      card => [...card.querySelectorAll("h2, figcaption")].map(text => text.firstChild.textContent)
    )"""
    for card, (name, *captions) in zip(data["cards"], image_browser.execute_script(script), strict=True):
        assert name == f"{data['names'][card['image']][:33]}012345678…56789.jpg"
        assert captions == ["image", "PCA", "attention", *(f"{score:.3f}" for _, score in card["nearest"])]
    messages = [json.loads(entry["message"])["message"] for entry in image_browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"]
    assert all(url == image_page.as_uri() or url.startswith(("data:", "blob:")) for url in urls)
    assert image_browser.get_log("browser") == []


def test_images_are_found_by_file_name_and_sorted_by_similarity(image_browser: Any, image_page: Path) -> None:
    data = read_data(image_page)
    set_control(image_browser, "search", "VAL_00000005")
    image = [name[24:32] for name in data["names"]].index("00000005")
    shown = [[card["image"], *(index for index, _ in card["nearest"])] for card in data["cards"]]
    assert card_numbers(image_browser) == [number for number in range(8) if image in shown[number]]
    set_control(image_browser, "search", "no such file")
    assert "No image matches" in image_browser.find_element("id", "none").text
    set_control(image_browser, "search", "")
    set_control(image_browser, "sort", "score")
    best = [-card["nearest"][0][1] for card in data["cards"]]
    assert card_numbers(image_browser) == sorted(range(8), key=best.__getitem__)
    assert image_browser.find_element("id", "count").text == (
        "8 images, sorted by similarity: cosine similarity of the nearest patch"
    )
    assert not image_browser.find_element("id", "unused").is_displayed()


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_page_of_images_fits_the_width(width: int, image_browser: Any) -> None:
    set_size(image_browser, width, 844)
    for element in ("h2 button", "details summary"):
        image_browser.find_element("css selector", element).click()
    assert image_browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    terms = [term.text for term in image_browser.find_elements("css selector", "dt")]
    assert terms == ["image", "PCA", "attention", "nearest patches"]
