"""What a console line may hold of a caller's words."""

from __future__ import annotations

import logging

import pytest

from gptjet.service.log import configure_logging, get_logger


def test_a_callers_control_characters_reach_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        configure_logging("info", "console")
        get_logger("gptjet.test").info("request", request_id="a\x1b[31mb")
        get_logger("gptjet.test").error("two\nlines")
    finally:
        root.handlers, _ = handlers, root.setLevel(level)
    err = capsys.readouterr().err
    assert "\x1b[31m" not in err
    assert repr("a\x1b[31mb") in err
    assert "two\nlines" in err
