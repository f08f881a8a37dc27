"""The page in a browser: one text typed, streamed, stopped, and told what is wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .conftest import wait_until

pytestmark = [pytest.mark.xdist_group("chromium"), pytest.mark.usefixtures("quiet_console")]
LivePage = Any
Browser = Any


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
    wait_until(lambda: page.source.closed == ["wonderful"])


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
    wait_until(lambda: page.source.running == 1)
    browser.driver.close()
    browser.driver.switch_to.window(first)
    wait_until(lambda: page.source.running == 0)
    assert page.source.closed == ["wonderful"]


def test_another_text_replaces_the_answer_that_is_being_made(
    live_page: LivePage, browser: Browser
) -> None:
    page = live_page()
    page.source.hold = page.call(asyncio.Event)
    browser.open(page.url)
    browser.type("wonderful")
    browser.click("#classify")
    wait_until(lambda: page.source.running == 1)
    browser.type("awful")
    browser.click("#classify")
    wait_until(lambda: page.source.closed == ["wonderful"])
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
