"""The running app, through its named endpoints and through a browser, on tiny random weights."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page
from playwright.sync_api import TimeoutError as TookTooLong

from nested_attention.faces import frame
from nested_attention.provenance import read_provenance
from nested_attention.settings import Settings
from nested_attention.ui.app import build_app
from nested_attention.ui.studio import Studio
from tests import tiny
from tests.browser import open_browser

STEPS = "document.querySelector('#steps input[type=range]')?.value"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "tests.serve", str(port)])
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=2)
            break
        except OSError:
            assert process.poll() is None, "the app ended while starting"
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photos") / "ada.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)).save(path)
    return str(path)


def cut_off(page: Page) -> list[bool]:
    """Of each slider that is shown in a slot, whether it ends beyond its block, where nobody can reach its thumb."""
    beyond = "one => one.getBoundingClientRect().right > one.closest('.block').getBoundingClientRect().right"
    return [slider.evaluate(beyond) for slider in page.locator(".slot input[type=range]").all() if slider.is_visible()]


def pictures(page: Page) -> list[str | None]:
    return [image.get_attribute("src") for image in page.locator("#gallery img").all()]


def status_becomes(page: Page, words: str) -> None:
    try:
        page.wait_for_function(f"document.querySelector('#status').innerText.includes({words!r})", timeout=60_000)
    except TookTooLong as error:
        shown, notice, steps = page.inner_text("#status"), page.inner_text("#notice"), page.evaluate(STEPS)
        raise AssertionError(f"the status stays {shown!r}, never {words!r}; notice {notice!r}, steps {steps}") from error


def set_steps(page: Page, steps: int) -> None:
    """As somebody does who sees that the slider follows."""
    page.fill("#steps input[type=number]", str(steps))
    page.keyboard.press("Tab")
    page.wait_for_function(f"{STEPS} == {steps}")


def carried(page: Page, folder: Path) -> Settings:
    """The settings in the first picture, as it is served."""
    (file := folder / "served.png").write_bytes(urllib.request.urlopen(pictures(page)[0] or "").read())
    return read_provenance(file).settings


def generate(client: Client, prompt: str, **changes: object) -> tuple[list[str], dict]:
    values = {"negative": "", "count": 2, "steps": 3, "guidance": 3.0, "seed": 5} | changes
    return client.predict(prompt, *values.values(), api_name="/generate")


def test_a_base_without_adapters_has_a_page_too() -> None:
    pipe = tiny.pipeline("sd")
    pipe.adapters.clear()
    assert build_app(Studio(pipe)).fns


def test_endpoints_encode_generate_explain(url: str, photo: str) -> None:
    client = Client(url, verbose=False)
    encoded = client.predict("person", [handle_file(photo)], "<ada>", 1.0, api_name="/encode")
    assert encoded.pop("framed") == [frame(tiny.photo(0), "person", "whole").said]
    assert encoded == {"placeholder": "<ada>", "kind": "person", "pictures": 1, "tokens": 6}
    faced = client.predict("person", [handle_file(photo)], "<bob>", 1.0, None, 1.0, "face", api_name="/encode")
    assert faced["framed"] == [frame(tiny.photo(0), "person", "face").said]
    files, parameters = generate(client, "<ada> on the beach")
    assert len(files) == 2 and parameters["seed"] == 5 and parameters["prompt"] == "<ada> on the beach"
    made = read_provenance(files[1])
    assert made.settings.seed == 6 and made.subjects[0].placeholder == "<ada>"
    shares = client.predict("<ada>", 1, 0.5, 0.5, api_name="/explain")
    assert abs(sum(shares["words"].values()) - 1) < 1e-3 and abs(sum(shares["patches"]) - 1) < 1e-3
    for where, words in (((None, 0.5, 0.5), "picture None"), ((0, None, 0.5), "point .None"), ((7, 0.5, 0.5), "picture 7")):
        with pytest.raises(AppError, match=words):
            client.predict("<ada>", *where, api_name="/explain")
    direct = tiny.pipeline("sd")
    expected = direct("<ada> on the beach", [direct.encode("person", photo, "<ada>")], num_images=2, steps=3, guidance_scale=3.0, seed=5)
    assert np.array_equal(np.asarray(Image.open(files[0])), np.asarray(expected.images[0]))


def test_clients_may_leave_out_what_the_page_knows(url: str, photo: str) -> None:
    client = Client(url, verbose=False)
    assert client.predict("person", [handle_file(photo)], api_name="/encode")["placeholder"] == "<person>"
    files, parameters = client.predict("<person> on the beach", api_name="/generate")
    base = tiny.pipeline("sd").base
    assert len(files) == 1 and (parameters["negative_prompt"], parameters["steps"]) == (base.negative_prompt, base.steps)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps"), ({"steps": 10**9}, "steps"), ({"count": 99}, "num_images"), ({"guidance": -5}, "guidance_scale"),
        ({"seed": -1}, "seed"), ({"prompt": ""}, "prompt is empty"), ({"prompt": None}, "not text"), ({"prompt": "x" * 5000}, "5000 characters"), ({"prompt": "<ghost>"}, "<ghost>"),
    ],
)  # fmt: skip
def test_what_is_sent_past_the_page_is_checked_too(url: str, changes: dict, words: str) -> None:
    client = Client(url, verbose=False)
    prompt = changes.pop("prompt", "a cat 🐱 with zwxqv")
    with pytest.raises(AppError, match=words):
        generate(client, prompt, **changes)
    assert generate(client, "a cat 🐱 with zwxqv", count=1)[0]  # alive; emoji and unknown words are fine


def test_bad_subjects_through_the_api(url: str, photo: str, tmp_path: Path) -> None:
    client = Client(url, verbose=False)
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    for arguments, words in (
        (("dragon", [handle_file(photo)], "", 1.0), "dragon"), (("person", [], "", 1.0), "at least one"),
        (("person", [handle_file(photo)] * 9, "", 1.0), "at most 8"),
        (("person", [handle_file(photo)], "", 7.0), "strength"), (("person", [handle_file(photo)], "", 1.0, 9.0), "lam"),
        (("person", [handle_file(photo)], "", 1.0, 1.0, 0.0), "token_weight"), (("person", [handle_file(photo)], "", 1.0, 1.0, 1.0, "sideways"), "no framing"),
        (("person", [handle_file(str(text))], "", 1.0), "not a picture"),
    ):  # fmt: skip
        with pytest.raises(AppError, match=words):
            client.predict(*arguments, api_name="/encode")
    for number in range(5):
        client.predict("person", [handle_file(photo)], f"<p{number}>", 1.0, api_name="/encode")
    with pytest.raises(AppError, match="5 subjects were given; at most 4"):
        generate(client, "<p0> <p1> <p2> <p3> <p4>")
    with pytest.raises(AppError, match="press Generate first"):
        client.predict("<person>", 0, 0.5, 0.5, api_name="/explain")
    for number in range(5, 9):
        client.predict("person", [handle_file(photo)], f"<p{number}>", 1.0, api_name="/encode")
    with pytest.raises(AppError, match=r"names <p0>, but no such subject is kept; encode it again \(the last 8"):
        generate(client, "<p0> and <p8>")
    assert generate(client, "<p1> and <p8>")[0]


def test_visitors_do_not_see_each_other(url: str, photo: str) -> None:
    one, other = Client(url, verbose=False), Client(url, verbose=False)
    one.predict("person", [handle_file(photo)], "<secret>", 1.0, api_name="/encode")
    with pytest.raises(AppError, match="<secret>"):
        generate(other, "<secret> on the beach")


def test_a_visit_with_a_browser(url: str, photo: str, tmp_path: Path) -> None:
    """Draws the first example, looks inside, clicks into the map, compares, picks another, takes a ready-made prompt, empties the slots,
    uploads, crops, forgets the placeholder, is helped, asks for a new seed, cancels, drops a picture back."""
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 900})
        page.goto(url)
        page.wait_for_selector("#generate", timeout=60_000)
        page.click("#inside button >> nth=0")
        assert "Press Generate first" in page.inner_text("#inside-intro")
        page.click("#generate")
        status_becomes(page, "Done")
        assert carried(page, tmp_path).prompt == page.input_value("#prompt textarea")
        page.wait_for_selector("#outer img", timeout=30_000)
        page.click("#outer img")
        page.wait_for_selector("#patches img", timeout=30_000)
        assert "<person>" in page.inner_text("#point")
        assert "token" in page.inner_text("#regions")
        page.click("text=With and without the subject")
        page.click("text=with ordinary words")
        page.wait_for_selector("#slider img", timeout=60_000)
        page.click("#examples button >> nth=1")
        page.wait_for_function("document.querySelector('#inside-intro').innerText.includes('Press Generate first')")
        page.wait_for_selector("#point", state="hidden")
        page.wait_for_function("document.querySelector('#names').innerText.includes('<cat>')")
        page.wait_for_selector("#seen-1 img")
        page.click("#remove-1")
        page.wait_for_function("!document.querySelector('#names').innerText.includes('<cat>')")
        page.wait_for_selector("#kind-1", state="hidden")
        page.click("text=pixel art of <cat> wearing a red scarf in space")
        page.wait_for_function("document.querySelector('#names').innerText == 'Placeholders: <cat> cat, subject 1'")
        assert "one of our examples" in page.inner_text("#notice")
        for number in (1, 2, 3):
            page.click("#more")
            page.wait_for_selector(f"#kind-{number}")
        page.wait_for_selector("#more", state="hidden")
        for number in (3, 2, 1):
            page.click(f"#remove-{number}")
            page.wait_for_selector(f"#remove-{number}", state="hidden")
        page.wait_for_selector("#more")
        page.click("#remove-0")
        page.wait_for_function("document.querySelector('#insert-0').innerText.includes('Add a picture')")
        page.set_input_files("#files-0 input[type=file]", photo)
        page.wait_for_function("document.querySelector('#insert-0').innerText.includes('<cat>')")
        page.click("#framing-0 input")
        page.click("[role=option] >> text=own crop")
        page.wait_for_selector("text=Right %")
        assert cut_off(page) == [False] * 5  # the strength's and the four sides'
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.fill("#prompt textarea", "in the snow")
        page.click("#generate")
        page.wait_for_selector("#offer")
        page.click("#offer")
        page.wait_for_function("document.querySelector('#prompt textarea').value == '<cat> in the snow'")
        page.click("#generate")
        status_becomes(page, "Done")
        page.fill("#prompt textarea", "   ")
        page.click("#generate")
        page.wait_for_function("document.querySelector('#notice').innerText.includes('does not say')")
        assert page.locator("#gallery img").count() >= 4  # nothing was lost
        page.fill("#prompt textarea", "<cat>")
        page.click("text=Advanced")
        page.check("#new-seed input")
        before = page.input_value("#seed input")
        page.click("#generate")
        status_becomes(page, "Done")
        drawn, seed = pictures(page), carried(page, tmp_path).seed
        assert page.input_value("#seed input") == str(seed) != before and f"Seed {seed}–{seed + 3}" in page.inner_text("#status")
        set_steps(page, 150)
        page.click("#generate")
        status_becomes(page, "Step 5")
        page.click("#cancel")
        status_becomes(page, "Cancelled")
        page.wait_for_timeout(1000)
        assert pictures(page) == drawn and "Cancelled" in page.inner_text("#status")
        page.click("text=Settings in a picture")
        page.set_input_files("#dropped input[type=file]", str(tmp_path / "served.png"))
        page.wait_for_function(f"document.querySelector('#seed input').value == '{seed}'")
        page.wait_for_function("document.querySelector('#notice').innerText.includes('Settings restored')")
        assert page.input_value("#steps input[type=number]") != "150"


def test_who_waits_can_cancel_and_an_example_ends_a_run(url: str) -> None:
    with open_browser() as browser:
        one, waiting = browser.new_page(), browser.new_page()
        for page in (one, waiting):
            page.goto(url)
            page.wait_for_selector("#generate", timeout=60_000)
        one.click("text=Advanced")
        set_steps(one, 150)
        one.click("#generate")
        status_becomes(one, "of 150")
        other = Client(url, verbose=False)  # two draw at a time
        other.submit("a tree", "", 1, 150, 3.0, 5, api_name="/generate")
        begin = pictures(waiting)
        waiting.click("#generate")
        status_becomes(waiting, "Waiting")
        waiting.click("#cancel")
        status_becomes(waiting, "Cancelled.")
        waiting.click("#generate")  # who cancelled may ask again at once
        status_becomes(waiting, "Waiting")
        one.click("#examples button >> nth=1")
        status_becomes(one, "A finished example")
        status_becomes(waiting, "Done")
        assert pictures(waiting) != begin
        assert "A finished example" in one.inner_text("#status") and len(pictures(one)) == len(begin)
