"""The review queue: what is flagged waits for a person, and every decision is kept."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from gptjet.service.governance.review import Flagged, ReviewError, ReviewQueue


def flagged(digest: str = "d1", rule: str = "watch") -> Flagged:
    return Flagged(
        rule=rule,
        digest=digest,
        request_id="r-1",
        method="Generate",
        direction="output",
        field="sequences[0]",
        start=3,
        end=7,
        excerpt="a text",
    )


def test_a_text_that_is_flagged_again_is_counted_and_not_queued_again(tmp_path: Path) -> None:
    queue = ReviewQueue(tmp_path / "review.sqlite")
    queue.add([flagged(), flagged("d2"), flagged()])
    queue.add([flagged(rule="other")])
    assert [(item.rule, item.digest, item.seen) for item in queue.items()] == [
        ("watch", "d1", 2),
        ("watch", "d2", 1),
        ("other", "d1", 1),
    ]
    assert (queue.item(1).excerpt, queue.item(1).start) == ("a text", 3)


def test_every_decision_is_kept_and_the_last_one_holds(tmp_path: Path) -> None:
    queue = ReviewQueue(tmp_path / "review.sqlite")
    queue.add([flagged()])
    queue.decide(1, "rejected", "ada", "no")
    assert queue.rejected() == {("watch", "d1")}
    item = queue.decide(1, "approved", "bob")
    assert queue.rejected() == frozenset()
    assert item.status == "approved"
    assert [(d.status, d.reviewer, d.note) for d in item.decisions] == [
        ("rejected", "ada", "no"),
        ("approved", "bob", ""),
    ]
    assert item.decisions[0].decided_at <= item.decisions[1].decided_at
    queue.add([flagged()])
    assert queue.item(1).status == "approved"
    assert queue.items("pending") == []


def test_what_is_not_there_and_what_is_no_decision_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "review.sqlite"
    with pytest.raises(ReviewError, match="no review queue"):
        ReviewQueue(path, must_exist=True)
    queue = ReviewQueue(path)
    with pytest.raises(ReviewError, match="no item 7"):
        queue.item(7)
    with pytest.raises(ReviewError, match="no item 7"):
        queue.decide(7, "approved", "ada")
    queue.add([flagged()])
    with pytest.raises(ReviewError, match="name of its reviewer"):
        queue.decide(1, "approved", " ")
    with pytest.raises(ValueError, match="approved or rejected"):
        queue.decide(1, "pending", "ada")
    assert queue.item(1).decisions == ()


def test_another_process_sees_a_decision_at_once(tmp_path: Path) -> None:
    server, reviewer = (ReviewQueue(tmp_path / "review.sqlite") for _ in range(2))
    server.add([flagged()])
    before = server.data_version()
    assert server.data_version() == before
    reviewer.decide(1, "rejected", "ada")
    assert server.data_version() != before
    assert server.rejected() == {("watch", "d1")}
    mode = sqlite3.connect(tmp_path / "review.sqlite").execute("PRAGMA journal_mode").fetchone()
    assert mode == ("wal",)


def test_a_file_that_is_no_queue_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "review.sqlite"
    path.write_text("not a database" * 100)
    with pytest.raises(ReviewError, match="not a database"):
        ReviewQueue(path)
    assert path.read_text().startswith("not a database")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(ReviewError, match="version 9"):
        ReviewQueue(other)


def test_a_failed_write_leaves_no_open_transaction(tmp_path: Path) -> None:
    queue = ReviewQueue(tmp_path / "review.sqlite")
    bad = flagged()
    object.__setattr__(bad, "rule", None)
    with pytest.raises(ReviewError, match="NOT NULL"):
        queue.add([flagged("d1"), bad])
    assert queue.items() == []
    queue.add([flagged()])
    assert len(queue.items()) == 1
