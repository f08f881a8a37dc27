"""The page in a browser: one text typed, streamed, stopped, linked to, and told what is wrong."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

pytestmark = pytest.mark.xdist_group("chromium")

LivePage = Any
Browser = Any
KEYS = {"tab": "\ue004", "enter": "\ue007", "space": " ", "shift": "\ue008", "ctrl": "\ue009"}
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
HTML = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(autouse=True)
def _no_complaints(browser: Browser) -> Any:
    """Whatever a test does, the console stays empty: no script error, no breach of the policy."""
    yield
    # A refusal and a server that is away are loads that fail; the tests that make one expect it.
    loads = ("Failed to load resource", "net::ERR_")
    assert [c for c in browser.complaints() if not any(load in c for load in loads)] == []


def test_a_typed_text_is_answered_with_label_probabilities_and_explanation(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.type("The food was wonderful.")
    browser.until("document.querySelector('#size').textContent.includes('4 tokens')")
    assert browser.text("#size") == "23 of 20,000 characters · 4 tokens"
    browser.click("#classify")
    browser.phase("done")
    assert browser.text("#verdict") == "Positive"
    assert browser.text("#verdict-detail") == "with a probability of 94.0%"
    shown = [
        item.text.split("\n") for item in browser.driver.find_elements("css selector", "#bars li")
    ]
    assert shown == [["Negative", "2.0%"], ["Neutral", "4.0%"], ["Positive", "94.0%"]]
    assert browser.text("#explanation") == 'the words "wonderful" sound positive'
    assert [mark.text for mark in browser.driver.find_elements("css selector", "mark")] == [
        "wonderful"
    ]
    assert browser.text("#marked") == "The food was wonderful."
    facts = browser.find("#facts").text
    for fact in ("12 ms", "83 tokens/s", "fake-gptj", "embedded v1"):
        assert fact in facts
    browser.until("document.querySelector('#announce').textContent.startsWith('Positive, 94.0%')")


def test_the_explanation_is_seen_word_by_word_before_the_answer_ends(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    page.source.hold = page.call(asyncio.Event)
    browser.open(page.url)
    browser.type("wonderful")
    browser.click("#classify")
    browser.until("document.querySelector('#explanation').textContent.endsWith('sound positive')")
    assert browser.js("document.querySelector('#result').dataset.phase") == "writing"
    assert browser.find("#result").get_attribute("aria-busy") == "true"
    assert browser.text("#verdict") == "Positive"
    page.call(page.source.hold.set)
    browser.phase("done")
    assert browser.find("#result").get_attribute("aria-busy") == "false"


def test_an_example_is_answered_by_one_click(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    browser.open(page.url)
    browser.click("#examples button")
    browser.phase("done")
    assert browser.text("#verdict") == "Positive"
    assert "wonderful" in browser.find("#text").get_attribute("value")


def test_uncertain_is_told_in_words_with_its_reason(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    browser.open(page.url)
    browser.type("wonderful and awful")
    browser.click("#classify")
    browser.phase("done")
    assert browser.text("#verdict") == "Uncertain"
    assert browser.text("#uncertain") == (
        "Why uncertain: positive (48%) and negative (46%) are nearly as probable."
    )
    assert browser.is_shown("#uncertain")


def test_parts_and_words_that_the_text_does_not_have_are_told(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.type("wonderful [parts] [missing]")
    browser.click("#classify")
    browser.phase("done")
    assert "split into 3 parts" in browser.text("#parts")
    assert "about part 2" in browser.text("#parts")
    assert browser.text("#missing") == (
        "The explanation also names “splendid”, which the text does not have."
    )


def test_a_place_after_characters_beyond_16_bits_is_marked_where_it_is(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.paste("\U0001f600\U0001f600 a wonderful day")
    assert browser.text("#size").startswith("18 of 20,000 characters")
    browser.click("#classify")
    browser.phase("done")
    assert browser.text("mark") == "wonderful"


def test_the_first_marked_word_of_a_long_text_is_in_sight(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.paste("It goes on and on. " * 200 + "wonderful")
    browser.click("#classify")
    browser.phase("done")
    assert browser.js(
        "(() => { const box = document.querySelector('#marked').getBoundingClientRect();"
        " const word = document.querySelector('mark').getBoundingClientRect();"
        " return word.top >= box.top && word.bottom <= box.bottom; })()"
    )


def test_stop_ends_the_answer_on_the_server_and_keeps_what_came(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    page.source.hold = page.call(asyncio.Event)
    browser.open(page.url)
    browser.type("wonderful")
    browser.click("#classify")
    browser.until("document.querySelector('#explanation').textContent.endsWith('positive')")
    browser.click("#stop")
    browser.phase("stopped")
    assert browser.text("#result-note") == "Stopped. The answer is incomplete."
    assert browser.text("#explanation").endswith("positive")
    assert not browser.is_shown("#stop")
    assert browser.focused == "classify"
    _until(lambda: page.source.closed == ["wonderful"])


def test_closing_the_tab_ends_the_answer_on_the_server(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    page.source.hold = page.call(asyncio.Event)
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.open(page.url)
    browser.type("wonderful")
    browser.click("#classify")
    _until(lambda: page.source.running == 1)
    browser.driver.close()
    browser.driver.switch_to.window(first)
    _until(lambda: page.source.running == 0)
    assert page.source.closed == ["wonderful"]


def test_another_text_replaces_the_answer_that_is_being_made(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    page.source.hold = page.call(asyncio.Event)
    browser.open(page.url)
    browser.type("wonderful")
    browser.click("#classify")
    _until(lambda: page.source.running == 1)
    browser.type("awful")
    browser.click("#classify")
    _until(lambda: page.source.closed == ["wonderful"])
    page.call(page.source.hold.set)
    browser.phase("done")
    assert browser.text("#verdict") == "Negative"
    assert not browser.is_shown("#stop")


def test_a_server_that_dies_in_the_middle_is_told_and_the_words_stay(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.type("wonderful [die]")
    browser.click("#classify")
    browser.phase("failed")
    assert browser.text("#result-note") == (
        "The model server went away in the middle of the answer, which is incomplete."
    )
    assert browser.text("#explanation") == "the words"
    browser.type("wonderful")
    browser.click("#again")
    browser.phase("done")
    assert browser.focused == "classify"


def test_a_server_that_is_away_is_waited_for_and_the_text_is_answered_then(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    page.source.state_now = "gone"
    browser.open(page.url)
    assert browser.text("#server-words") == (
        "The model server does not answer. Trying again every two seconds."
    )
    browser.type("wonderful")
    browser.click("#classify")
    browser.until("document.querySelector('#result-note').textContent.includes('as soon as')")
    page.source.state_now = "loading"
    browser.until("document.querySelector('#server').dataset.state === 'loading'")
    assert "is loading its model" in browser.text("#server-words")
    page.source.state_now = "ready"
    browser.phase("done")
    assert browser.text("#verdict") == "Positive"
    assert browser.text("#server-words") == "Ready: fake-gptj, 4.2 M parameters, on cpu"


def test_waiting_for_a_server_can_be_given_up(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    page.source.state_now = "gone"
    browser.open(page.url)
    browser.type("wonderful")
    browser.click("#classify")
    browser.until("document.querySelector('#result-note').textContent.includes('as soon as')")
    browser.click("#stop")
    browser.phase("stopped")
    assert browser.text("#result-note") == "Stopped."


def test_a_text_that_is_too_long_is_told_and_not_sent(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page(max_chars=20)
    browser.open(page.url)
    browser.type("x" * 23)
    assert browser.text("#text-problem") == "Too long by 3 characters."
    assert browser.find("#text").get_attribute("aria-invalid") == "true"
    browser.click("#classify")
    assert browser.focused == "text"
    assert page.source.asked == []


def test_an_empty_text_and_a_bad_seed_are_told_beside_the_field(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.click("#classify")
    assert browser.text("#text-problem") == "Write a text first, or choose an example."
    assert browser.focused == "text"
    browser.type("wonderful")
    browser.click(".actions .options summary")
    browser.find("#seed").send_keys("x")
    browser.click("#classify")
    assert browser.text("#text-problem") == "The seed must be a whole number."
    assert browser.focused == "seed"
    assert page.source.asked == []


def test_too_many_requests_are_told_with_the_time_to_wait(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page(burst=1, requests_per_minute=6)
    browser.open(page.url)
    for _ in range(2):
        browser.type("wonderful")
        browser.click("#classify")
        browser.phase("done", "failed")
    assert browser.text("#result-note").startswith(
        "Too many requests: 6 a minute are allowed; try again in "
    )


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


def _until(condition: Any) -> None:
    import time

    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
