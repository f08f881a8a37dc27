"""The page in a browser: links to it, HTML in texts, the keyboard, and who sees or moves less."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

pytestmark = [pytest.mark.xdist_group("chromium"), pytest.mark.usefixtures("quiet_console")]
LivePage = Any
Browser = Any
KEYS = {"tab": "\ue004", "enter": "\ue007", "space": " ", "shift": "\ue008", "ctrl": "\ue009"}
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
HTML = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def test_a_link_reproduces_text_template_and_seed(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    browser.open(page.url)
    words = "wonderful & odd: #1 + <b>ünïcode</b>\nsecond line"
    browser.paste(words)
    browser.click(".actions .options summary")
    browser.find("#template option[value='gpt-j']").click()
    seed = str(2**63 - 1)  # more digits than JavaScript's numbers are exact for
    browser.find("#seed").clear()
    browser.find("#seed").send_keys(seed)
    browser.click("#classify")
    browser.phase("done")
    # Without a clipboard the link is shown to be copied by hand.
    browser.driver.execute_script("navigator.clipboard.writeText = () => Promise.reject()")
    browser.click("#copy-link")
    browser.until("!document.querySelector('#link-field').hidden")
    link = browser.find("#link").get_attribute("value")
    assert browser.focused == "link"
    parts = urlsplit(link)
    assert (parts.query, parse_qs(parts.fragment)["text"]) == ("", [words])
    first = (browser.text("#explanation"), browser.text("#bars"))

    browser.open(link)
    browser.phase("done")
    assert browser.find("#text").get_attribute("value") == words
    assert page.source.asked[-1] == (words, "gpt-j", int(seed), True)
    assert (browser.text("#explanation"), browser.text("#bars")) == first
    assert not browser.is_shown("#result-note")


def test_the_link_goes_to_the_clipboard_where_the_browser_lets_it(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.type("wonderful")
    browser.click("#classify")
    browser.phase("done")
    browser.driver.execute_script(
        "navigator.clipboard.writeText = async (text) => { window.copied = text; }"
    )
    browser.click("#copy-link")
    browser.until("document.querySelector('#copied').textContent === 'Copied.'")
    assert browser.js("window.copied") == (
        f"{page.url}/#text=wonderful&template=embedded&seed=0&version=1&model=fake-gptj"
    )
    assert not browser.is_shown("#link-field")


def test_a_link_made_with_another_model_says_so(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    browser.open(f"{page.url}/#text=wonderful&template=embedded&version=0&seed=0&model=older")
    browser.phase("done")
    note = browser.text("#result-note")
    assert "the model “older”, and this is “fake-gptj”" in note
    assert "version 0 of the template, and this is version 1" in note


def test_html_in_a_text_stays_text(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    browser.open(page.url)
    browser.paste(f"wonderful {HTML}")
    browser.click("#classify")
    browser.phase("done")
    assert browser.text("#marked") == f"wonderful {HTML}"
    assert browser.js("document.querySelectorAll('img, main script').length") == 0
    assert browser.driver.title == "GPTJet Sentiment"


def test_html_in_a_link_stays_text(live_page: LivePage, browser: Browser) -> None:
    from urllib.parse import urlencode

    page = live_page()
    fields = {"text": f"wonderful {HTML}", "model": HTML, "template": HTML, "seed": "0"}
    browser.open(f"{page.url}/#{urlencode(fields)}")
    browser.phase("done")
    assert HTML in browser.text("#result-note")
    assert browser.js("document.querySelectorAll('img, main script').length") == 0
    assert browser.driver.title == "GPTJet Sentiment"


def test_the_browser_itself_refuses_inline_scripts_and_html_from_strings(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    browser.open(page.url)
    refused = browser.driver.execute_script(
        "try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (e) { return e.name; }"
    )
    assert refused == "TypeError"
    assert any("TrustedHTML" in complaint for complaint in browser.complaints())


def test_everything_can_be_done_by_keyboard(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    browser.open(page.url)
    browser.press(KEYS["tab"])
    assert browser.focused == "Skip to the text box"
    browser.press(KEYS["enter"])
    browser.press("wonderful")
    assert browser.find("#text").get_attribute("value") == "wonderful"
    for _ in range(4):
        browser.press(KEYS["tab"])
        assert browser.js("document.activeElement.closest('#examples') !== null")
    browser.press(KEYS["tab"])
    assert browser.focused == "classify"
    outline = browser.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.press(KEYS["enter"])
    browser.phase("done")
    browser.press(KEYS["tab"])
    assert browser.focused == "Options"
    browser.press(KEYS["tab"])
    assert browser.focused == "marked"
    browser.press(KEYS["tab"])
    assert browser.focused == "copy-link"
    browser.press(KEYS["tab"])
    assert browser.focused == "file"
    ring = browser.js("getComputedStyle(document.querySelector('label[for=file]')).outlineStyle")
    assert ring == "solid"  # the input is unseen; its label shows where one is


def test_control_and_enter_classify_from_the_text_box(
    live_page: LivePage, browser: Browser
) -> None:
    from selenium.webdriver import ActionChains

    page = live_page()
    browser.open(page.url)
    browser.type("awful")
    keys = ActionChains(browser.driver)
    keys.key_down(KEYS["ctrl"]).send_keys(KEYS["enter"]).key_up(KEYS["ctrl"]).perform()
    browser.phase("done")
    assert browser.find("#text").get_attribute("value") == "awful"
    assert browser.focused == "text"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious_and_nothing_scrolls_sideways(
    live_page: LivePage, browser: Browser, width: int, dark: bool
) -> None:
    page = live_page()
    browser.open(page.url, width=width, dark=dark)
    assert browser.audit() == []
    for words in ("wonderful [parts] [missing]", "wonderful and awful", "[die] wonderful"):
        browser.type(words)
        browser.click("#classify")
        browser.phase("done", "failed")
        assert browser.audit() == []
        assert browser.js(FITS)
    browser.click(".actions .options summary")
    browser.paste("wonderful " + "Donaudampfschifffahrtsgesellschaft" * 20)
    browser.click("#classify")
    browser.phase("done")
    assert browser.audit() == []
    assert browser.js(FITS)


def test_nothing_moves_where_less_motion_is_wanted(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    browser.open(page.url)
    reduced = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": reduced})
    browser.type("wonderful")
    browser.click("#classify")
    browser.phase("done")
    style = "getComputedStyle(document.querySelector('.fill')).transitionDuration"
    assert browser.js(style) == "0s"
