"""CSV files through the page's routes: what is read, what is refused, and the rows' answers."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from gptjet.service.apps.sentiment.web.batches import classify_rows
from gptjet.service.apps.sentiment.web.errors import PageError
from gptjet.service.apps.sentiment.web.tables import read_table
from gptjet.service.client import PolicyBlockedError

OpenPage = Any
Until = Any
CSV = {"content-type": "text/csv"}


def read(content: str | bytes, has_header: bool | None = None, max_rows: int = 100) -> Any:
    raw = content.encode() if isinstance(content, str) else content
    return read_table(raw, has_header=has_header, max_rows=max_rows)


def test_a_header_is_found_by_a_name_that_texts_have() -> None:
    table = read("id,Review\n1,wonderful\n2,awful\n")
    assert (table.columns, table.column, table.has_header) == (("id", "Review"), 1, True)
    assert [(row.line, row.cells) for row in table.rows] == [
        (2, ("1", "wonderful")),
        (3, ("2", "awful")),
    ]


def test_without_a_header_columns_are_numbered_and_the_longest_texts_are_chosen() -> None:
    table = read("7,a wonderful evening it was.\n8,awful.\n")
    assert (table.columns, table.column, table.has_header) == (("column 1", "column 2"), 1, False)
    assert table.rows[0].line == 1


def test_the_guess_of_a_header_can_be_overruled() -> None:
    assert read("text\nwonderful\n", has_header=False).rows[0].cells == ("text",)
    table = read("Yesterday was fine.\nwonderful\n", has_header=True)
    assert (table.columns, len(table.rows)) == (("Yesterday was fine.",), 1)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_usual_separators_are_found_beside_commas_in_texts(delimiter: str) -> None:
    lines = [["id", "text"], ["1", '"good, but slow, and dear"'], ["2", '"bad, really"']]
    table = read("\n".join(delimiter.join(cells) for cells in lines))
    assert table.delimiter == delimiter
    assert table.rows[0].cells == ("1", "good, but slow, and dear")


def test_a_column_of_sentences_with_commas_is_one_column() -> None:
    table = read("text\nGood, but slow\nBad\nLong, and dear, and late\nFine\n")
    assert (table.columns, len(table.rows), table.delimiter) == (("text",), 4, "")
    assert table.rows[2].cells == ("Long, and dear, and late",)


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("utf-8", "UTF-8"), ("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16"), ("cp1252", "Windows-1252")],
)
def test_the_usual_encodings_are_read(encoding: str, named: str) -> None:
    table = read('text\n"schöner Käse, süß"\n'.encode(encoding))
    assert table.rows[0].cells == ("schöner Käse, süß",)
    assert (table.columns, table.encoding) == (("text",), named)


def test_lines_are_counted_as_they_stand_in_the_file() -> None:
    table = read('text\n"two\nlines"\n\n\nlast\n')
    assert [(row.line, row.cells[0]) for row in table.rows] == [(2, "two\nlines"), (6, "last")]


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"", "empty", "the file has no rows"),
        (b"\n \n", "empty", "the file has no rows"),
        (b"text\n", "empty", "the file has a header and no rows"),
        (b"PK\x03\x04\x00\x00", "not_text", "the file is not text"),
        (b"text\n" + b"x\n" * 101, "too_long", "the file has more than 100 rows"),
        (b"text," * 201 + b"\nx\n", "too_long", "the file has 202 columns; the limit is 200"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(
    content: bytes, code: str, message: str
) -> None:
    with pytest.raises(PageError) as refused:
        read(content)
    assert refused.value.code == code
    assert refused.value.message.startswith(message)


def test_as_many_rows_as_the_limit_are_taken_with_a_header_and_without() -> None:
    assert len(read("text\n" + "x\n" * 100).rows) == 100
    assert len(read("x.\n" * 100).rows) == 100


async def test_a_file_is_looked_at_before_it_is_classified(open_page: OpenPage) -> None:
    page = await open_page()
    content = b"id;review\n1;wonderful\n2;awful\n3;so so\n4;never mind\n"
    response = await page.http.post("/api/table", content=content, headers=CSV)
    assert response.json() == {
        "columns": ["id", "review"],
        "column": 1,
        "has_header": True,
        "rows": 4,
        "encoding": "UTF-8",
        "delimiter": ";",
        "preview": [["1", "wonderful"], ["2", "awful"], ["3", "so so"]],
    }
    assert page.source.asked == []


async def test_rows_are_answered_in_order_each_with_its_line_and_cells(
    open_page: OpenPage,
) -> None:
    page = await open_page(rows_in_flight=3)
    lines = [f"{n},{'wonderful' if n % 2 else 'awful'} {n}" for n in range(25)]
    content = "\n".join(["id,text", *lines]).encode()
    events = await page.events("/api/table/classify?seed=5", content=content, headers=CSV)
    assert events[0] == ("start", {"columns": ["id", "text"], "rows": 25, "first": 0})
    assert events[-1] == ("end", {"rows": 25})
    rows = [fields for name, fields in events if name == "row"]
    assert [row["index"] for row in rows] == list(range(25))
    assert [row["line"] for row in rows] == list(range(2, 27))
    assert [row["cells"][0] for row in rows] == [str(n) for n in range(25)]
    assert [row["label"] for row in rows] == ["negative", "positive"] * 12 + ["negative"]
    assert page.source.most_running <= 3
    assert {seed for _, _, seed, _ in page.source.asked} == {5}


async def test_a_row_that_cannot_be_classified_has_its_own_error_and_the_rest_goes_on(
    open_page: OpenPage,
) -> None:
    page = await open_page(max_chars=50)
    long = "x" * 200_000  # more than Python's own limit of a cell
    content = f"id,text\n1,wonderful\n2,\n3\n4,{long}\n5,[refuse]\n6,awful\n".encode()
    events = await page.events("/api/table/classify?header=1", content=content, headers=CSV)
    rows = [fields for name, fields in events if name == "row"]
    assert [row["error"] for row in rows] == [
        None,
        "the text is empty",
        "the text is empty",
        "the text has 200,000 characters; the limit is 50",
        "text: is refused for the test",
        None,
    ]
    assert events[-1][0] == "end"


async def test_a_full_queue_makes_a_row_wait_and_not_fail(open_page: OpenPage) -> None:
    page = await open_page()
    page.source.queue_full = 5
    events = await page.events(
        "/api/table/classify", content=b"text\nwonderful\nawful\n", headers=CSV
    )
    assert [name for name, _ in events] == ["start", "row", "row", "end"]
    assert [fields["error"] for name, fields in events if name == "row"] == [None, None]


async def test_a_server_that_goes_away_ends_the_rows_and_they_can_be_continued(
    open_page: OpenPage,
) -> None:
    page = await open_page(rows_in_flight=1)
    content = b"text\nwonderful\nawful [die]\nfine\n"
    events = await page.events("/api/table/classify", content=content, headers=CSV)
    assert [name for name, _ in events] == ["start", "row", "error"]
    assert events[-1][1]["code"] == "gone"
    again = await page.events(
        "/api/table/classify?first=1",
        content=content.replace(b" [die]", b""),
        headers=CSV,
    )
    assert [fields["index"] for name, fields in again if name == "row"] == [1, 2]


async def test_a_server_that_fails_at_row_after_row_ends_the_file_and_keeps_the_rows_before(
    open_page: OpenPage,
) -> None:
    page = await open_page(rows_in_flight=2)
    lines = ["wonderful", "awful", *(["[fail]"] * 20), "fine"]
    content = "\n".join(["text", *lines]).encode()
    events = await page.events("/api/table/classify", content=content, headers=CSV)
    assert [name for name, _ in events] == ["start", "row", "row", "error"]
    assert events[-1][1]["code"] == "failed"
    assert events[-1][1]["message"] == (
        "the server fails: 5 rows one after the other, the last on line 8: "
        "the model server failed; its log has the reason"
    )
    assert len(page.source.asked) < 20
    again = await page.events(
        "/api/table/classify?first=2", content=content.replace(b"[fail]", b"plain"), headers=CSV
    )
    assert [fields["index"] for name, fields in again if name == "row"] == list(range(2, 23))


async def test_a_few_rows_that_the_server_fails_at_have_an_error_and_the_rest_goes_on(
    open_page: OpenPage,
) -> None:
    page = await open_page()
    # A row that is not asked about says nothing of the server: it neither counts nor makes good.
    lines = [*(["[fail]"] * 4), "awful", *(["[fail]"] * 3), " ", "[fail]"]
    content = "\n".join(["text,n", *(f"{line},1" for line in lines)]).encode()
    events = await page.events("/api/table/classify", content=content, headers=CSV)
    rows = [fields for name, fields in events if name == "row"]
    assert [row["index"] for row in rows] == list(range(10))
    assert [bool(row["error"]) for row in rows] == [True] * 4 + [False] + [True] * 5
    assert events[-1][0] == "end"


async def test_a_row_that_the_servers_policy_blocks_has_an_error_and_the_rest_goes_on(
    open_page: OpenPage,
) -> None:
    page = await open_page()
    page.source.raises["awful"] = PolicyBlockedError(
        grpc.StatusCode.PERMISSION_DENIED, "text: blocked by the input policy, rule 'slurs'"
    )
    events = await page.events(
        "/api/table/classify", content=b"text\nwonderful\nawful\nfine\n", headers=CSV
    )
    rows = [fields for name, fields in events if name == "row"]
    assert [row["error"] for row in rows] == [
        None,
        "the model server's policy does not let this pass: "
        "text: blocked by the input policy, rule 'slurs'",
        None,
    ]
    assert events[-1][0] == "end"


async def test_leaving_a_file_cancels_the_rows_that_run_and_starts_no_more(
    open_page: OpenPage, until: Until
) -> None:
    page = await open_page(rows_in_flight=3)
    page.source.hold = asyncio.Event()
    content = b"text\n" + b"wonderful\n" * 50
    async with page.http.stream(
        "POST", "/api/table/classify", content=content, headers=CSV
    ) as response:
        lines = response.aiter_lines()  # once it is gone, so is the response
        await anext(lines)
        await until(lambda: page.source.running == 3)
    await until(lambda: page.source.running == 0)
    assert len(page.source.closed) == len(page.source.asked) == 3


async def test_closing_the_rows_ends_those_that_run_before_it_returns(source: Any) -> None:
    rows = read("wonderful.\n" * 20, has_header=False).rows  # more than may wait, finished
    source.hold = asyncio.Event()
    source.hold.set()
    classifier = source.classifier(source.templates[0], explain=False)
    answers = classify_rows(classifier, rows, 0, first=0, seed=0, max_chars=100, in_flight=2)
    assert (await anext(answers)).index == 0
    source.hold.clear()
    later = asyncio.create_task(anext(answers))  # type: ignore[arg-type]
    while source.running < 1:
        await asyncio.sleep(0)
    later.cancel()
    await asyncio.gather(later, return_exceptions=True)
    await answers.aclose()
    assert source.running == 0


async def test_rows_can_be_classified_without_explanations(open_page: OpenPage) -> None:
    page = await open_page()
    events = await page.events(
        "/api/table/classify?explain=0", content=b"text\nwonderful\n", headers=CSV
    )
    assert events[1][1]["explanation"] == ""
    assert page.source.asked[0][3] is False


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("column=2", "column: must be a whole number from 0 to 0"),
        ("column=-1", "column: must be a whole number from 0 to 0"),
        ("column=x", "column: must be a whole number from 0 to 0"),
        ("first=1", "first: must be a whole number from 0 to 0"),
        ("header=yes", "header: must be 0 or 1"),
        ("explain=2", "explain: must be 0 or 1"),
        ("seed=x", "seed: must be a whole number"),
        ("template=x", "template: must be one of"),
    ],
)
async def test_a_query_out_of_its_limits_is_named(
    open_page: OpenPage, query: str, message: str
) -> None:
    page = await open_page()
    status, error = await page.refusal(
        f"/api/table/classify?{query}", content=b"text\nwonderful\n", headers=CSV
    )
    assert status == 400
    assert error["message"].startswith(message)
