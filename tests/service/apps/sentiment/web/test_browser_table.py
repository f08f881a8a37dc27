"""The page in a browser: a CSV file chosen, dropped, classified, cancelled and downloaded."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from .conftest import wait_until

pytestmark = [pytest.mark.xdist_group("chromium"), pytest.mark.usefixtures("quiet_console")]

LivePage = Any
Browser = Any
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
HTML = "<img src=x onerror=\"document.title='owned'\">"
DONE = "document.querySelector('#table-note').textContent.includes('done')"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(rows: list[list[str]], name: str = "reviews.csv") -> Path:
        path = tmp_path / name
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        return path

    return write


def rows_shown(browser: Browser) -> list[list[str]]:
    return browser.js(  # type: ignore[no-any-return]
        "[...document.querySelectorAll('#rows tbody tr')].map((row) => [...row.cells].map("
        "(cell) => [...cell.childNodes].map((node) => node.textContent).join('|')))"
    )


def downloaded(browser: Browser, name: str) -> list[list[str]]:
    path = browser.driver.downloads / name
    wait_until(path.exists)
    content = path.read_bytes()
    path.unlink()
    return list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def test_a_chosen_file_is_classified_charted_listed_and_downloaded(
    live_page: LivePage, browser: Browser, write: Any
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.choose(
        write([["id", "review"], ["a", "wonderful"], ["b", "awful"], ["c", ""], ["d", "so"]])
    )
    assert browser.text("#file-name") == "reviews.csv"
    assert browser.text("#file-facts") == "4 rows · 2 columns · UTF-8, separated by commas"
    assert browser.js("document.querySelector('#column').selectedOptions[0].text") == "review"
    assert browser.text("#table-start") == "Classify 4 rows"
    assert browser.focused == "table-start"
    browser.click("#table-start")
    browser.until(DONE)
    assert browser.text("#table-note") == "4 rows done; 1 row could not be classified."
    assert browser.text("#progress-words") == "4 of 4 rows · 1 error"
    assert browser.js("document.querySelector('#progress').value") == 4
    assert rows_shown(browser) == [
        ["2", 'wonderful|The words "wonderful" sound positive', "Positive|94.0%"],
        ["3", 'awful|The words "awful" sound negative', "Negative|90.0%"],
        ["4", "|The text is empty", "Error"],
        ["5", "so|No word carries a tone", "Neutral|80.0%"],
    ]
    assert browser.find("#chart svg").get_attribute("aria-label") == (
        "Bar chart of 4 rows by label: negative 1 (25.0%), neutral 1 (25.0%), "
        "positive 1 (25.0%), uncertain 0 (0.0%), error 1 (25.0%)"
    )
    browser.click("#table-result details summary")
    counts = browser.js(
        "[...document.querySelectorAll('#counts tbody tr')].map((row) => row.innerText)"
    )
    assert [line.split() for line in counts][2] == ["Positive", "1", "25.0%"]

    browser.click("#download")
    head, *lines = downloaded(browser, "reviews-sentiment.csv")
    assert head == [
        *("line", "id", "review", "sentiment_label", "sentiment_scored_label"),
        *("probability_negative", "probability_neutral", "probability_positive"),
        *("sentiment_explanation", "sentiment_uncertain_reason", "sentiment_error"),
    ]
    assert lines[0][:5] == ["2", "a", "wonderful", "positive", "positive"]
    assert lines[0][5:8] == ["0.020000", "0.040000", "0.940000"]
    assert lines[2] == ["4", "c", "", "", "", "", "", "", "", "", "the text is empty"]
    assert len(lines) == 4


def test_a_dropped_file_is_taken_wherever_it_falls(live_page: LivePage, browser: Browser) -> None:
    page = live_page()
    browser.open(page.url)
    browser.driver.execute_script(
        "const data = new DataTransfer();"
        "data.items.add(new File(['text\\nwonderful\\n'], 'dropped.csv', {type: 'text/csv'}));"
        "const at = document.querySelector('h1');"
        "for (const kind of ['dragover', 'drop']) at.dispatchEvent("
        "  new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));"
    )
    browser.until("!document.querySelector('#table-form').hidden")
    assert browser.text("#file-name") == "dropped.csv"
    assert not browser.is_shown("#drop-veil")


def test_the_column_and_the_header_can_be_chosen(
    live_page: LivePage, browser: Browser, write: Any
) -> None:
    page = live_page()
    browser.open(page.url)
    browser.choose(write([["wonderful", "a longer text that is awful."], ["fine", "fine"]]))
    assert browser.text("#table-start") == "Classify 2 rows"
    assert not browser.find("#header").is_selected()
    browser.click("#header")
    browser.until("document.querySelector('#table-start').textContent === 'Classify 1 row'")
    browser.click("#header")
    browser.until("document.querySelector('#table-start').textContent === 'Classify 2 rows'")
    browser.find("#column option[value='0']").click()
    browser.click("#explain")
    browser.click("#table-start")
    browser.until(DONE)
    assert [row[2] for row in rows_shown(browser)] == ["Positive|94.0%", "Neutral|80.0%"]
    assert [(text, explain) for text, _, _, explain in page.source.asked] == [
        ("wonderful", False),
        ("fine", False),
    ]


def test_progress_is_shown_and_cancel_stops_the_rows_and_continue_goes_on(
    live_page: LivePage, browser: Browser, write: Any
) -> None:
    page = live_page(rows_in_flight=2)
    page.source.token_s = 0.02
    browser.open(page.url)
    browser.choose(write([["text"], *[[f"wonderful {n}"] for n in range(60)]]))
    browser.click("#table-start")
    browser.until("document.querySelector('#progress').value >= 4")
    assert browser.is_shown("#table-cancel")
    browser.click("#table-cancel")
    browser.until("!document.querySelector('#table-continue').hidden")
    wait_until(lambda: page.source.running == 0)
    kept = browser.js("document.querySelector('#progress').value")
    assert 4 <= kept < 60
    assert browser.text("#table-note") == f"Cancelled. {kept} of 60 rows are done and kept."
    assert browser.focused == "table-continue"
    page.source.token_s = 0.0
    browser.click("#table-continue")
    browser.until(DONE + " && document.querySelector('#table-continue').hidden")
    browser.until("document.querySelector('#progress').value === 60")
    browser.click("#more")
    texts = [row[1].split("|")[0] for row in rows_shown(browser)]
    assert texts == [f"wonderful {n}" for n in range(60)]  # each exactly once, in order


def test_a_server_that_goes_away_keeps_the_rows_and_they_go_on_when_it_is_back(
    live_page: LivePage, browser: Browser, write: Any
) -> None:
    page = live_page(rows_in_flight=1)
    page.source.token_s = 0.02
    browser.open(page.url)
    browser.choose(write([["text"], *[[f"awful {n}"] for n in range(30)]]))
    browser.click("#table-start")
    browser.until("document.querySelector('#progress').value >= 2")
    page.source.state_now = "gone"
    browser.until("document.querySelector('#table-note').textContent.includes('kept')")
    kept = browser.js("document.querySelector('#progress').value")
    assert browser.text("#table-note") == (
        f"The model server does not answer. {kept} of 30 rows are done and kept."
    )
    browser.until("document.querySelector('#server').dataset.state === 'gone'")
    page.source.state_now = "ready"
    page.source.token_s = 0.0
    browser.until("document.querySelector('#server').dataset.state === 'ready'")
    browser.click("#table-continue")
    browser.until("document.querySelector('#progress').value === 30")
    assert [row[0] for row in rows_shown(browser)] == [str(line) for line in range(2, 32)]


def test_a_file_that_cannot_be_used_is_told_with_the_reason(
    live_page: LivePage, browser: Browser, tmp_path: Path, write: Any
) -> None:
    page = live_page(max_csv_rows=3, max_csv_bytes=1024 * 1024)
    browser.open(page.url)
    cases = {
        "picture.csv": (b"\x89PNG\x00\x00", "the file is not text; save the table as CSV in UTF-8"),
        "long.csv": (b"text\n" + b"x\n" * 9, "the file has more than 3 rows, the limit"),
        "empty.csv": (b"", "the file has no rows"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        browser.choose(tmp_path / name)
        browser.until(
            "document.querySelector('#file-problem').textContent.includes(arguments[0])", name
        )
        assert browser.text("#file-problem") == f"“{name}” cannot be used: {reason}."
        assert not browser.is_shown("#table-form")
    (tmp_path / "big.csv").write_bytes(b"x" * (1024 * 1024 + 1))
    browser.choose(tmp_path / "big.csv")
    browser.until("document.querySelector('#file-problem').textContent.includes('big')")
    assert browser.text("#file-problem") == "“big.csv” is larger than 1 MiB, which is the limit."


def test_html_in_cells_headers_and_file_names_stays_text(
    live_page: LivePage, browser: Browser, write: Any
) -> None:
    page = live_page()
    browser.open(page.url)
    name = HTML.replace("/", "") + ".csv"
    browser.choose(write([["text", HTML], [f"wonderful {HTML}", HTML], [HTML, HTML]], name))
    assert browser.text("#file-name") == name
    browser.find("#column option[value='0']").click()
    browser.click("#table-start")
    browser.until(DONE)
    assert rows_shown(browser)[0][1].startswith(f"wonderful {HTML}")
    assert HTML in browser.text("#preview")
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.driver.title == "GPTJet Sentiment"


def test_the_download_runs_nothing_in_a_spreadsheet(
    live_page: LivePage, browser: Browser, write: Any
) -> None:
    page = live_page()
    browser.open(page.url)
    cells = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", " =1", "\uff1d1", "-5", "+3.5", 'a "b", c']
    cells += ["a;=1", "a ;-)"]
    rows = [["text", "=head()"], *[[f"wonderful {n}", cell] for n, cell in enumerate(cells)]]
    browser.choose(write(rows))
    browser.click("#table-start")
    browser.until(DONE)
    browser.click("#download")
    head, *lines = downloaded(browser, "reviews-sentiment.csv")
    assert head[2] == "'=head()"
    assert [line[2] for line in lines] == [
        *("'=1+1", "'+1+1", "'-1+1", "'@SUM(A1)", "'\t=1", "' =1", "'\uff1d1"),
        *("-5", "+3.5", 'a "b", c', "a;'=1", "a ;-)"),
    ]


def test_rows_are_filtered_by_label(live_page: LivePage, browser: Browser, write: Any) -> None:
    page = live_page()
    browser.open(page.url)
    browser.choose(write([["text"], ["wonderful"], ["awful"], ["wonderful awful"], ["[refuse]"]]))
    browser.click("#table-start")
    browser.until(DONE)
    shown = {}
    for kind in ("", "positive", "uncertain", "error"):
        browser.find(f"#filter option[value='{kind}']").click()
        shown[kind] = [row[0] for row in rows_shown(browser)]
    assert shown == {
        "": ["2", "3", "4", "5"],
        "positive": ["2"],
        "uncertain": ["4"],
        "error": ["5"],
    }
    assert rows_shown(browser)[0][1] == "[refuse]|Text: is refused for the test"


def test_a_file_is_chosen_and_classified_by_keyboard(
    live_page: LivePage, browser: Browser, write: Any
) -> None:
    """The native dialog is the browser's; what is before and after it is the page's."""
    page = live_page()
    browser.open(page.url)
    browser.driver.execute_script("document.querySelector('#file').focus()")
    assert browser.focused == "file"
    browser.choose(write([["text"], ["wonderful"]]))
    assert browser.focused == "table-start"
    browser.press("\ue007")
    browser.until(DONE)
    order = []
    for _ in range(3):
        browser.press("\ue004")
        order.append(browser.focused)
    assert order == ["The chart as a table", "filter", "download"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious_in_a_file_and_nothing_scrolls_sideways(
    live_page: LivePage, browser: Browser, write: Any, width: int, dark: bool
) -> None:
    page = live_page()
    browser.open(page.url, width=width, dark=dark)
    texts = ["wonderful", "awful", "wonderful awful", "fine", "", "x" * 400]
    browser.choose(
        write(
            [
                ["number", "a long name of a column " * 3, "text"],
                *[[str(n), "y" * 300, text] for n, text in enumerate(texts)],
            ]
        )
    )
    assert browser.audit() == []
    assert browser.js(FITS)
    browser.click("#table-start")
    browser.until(DONE)
    browser.click("#table-result details summary")
    assert browser.audit() == []
    assert browser.js(FITS)
