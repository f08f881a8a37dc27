"""A prompt as one types it: text, or - for what comes in on stdin."""

from __future__ import annotations

import re
import sys

from gptjet.service.commands.terminal import ExitCode, fail


def read_text(text: str) -> str:
    """The argument itself, or all of stdin for "-"; ends the command where it is not UTF-8."""
    try:
        if text == "-":
            # What echo and editors end a file with is rarely meant as part of the prompt.
            return re.sub(r"\r?\n\Z", "", sys.stdin.buffer.read().decode())
        text.encode()  # an argument that is not UTF-8 has surrogates
    except UnicodeError:
        fail("the prompt is not valid UTF-8", ExitCode.USAGE)
    return text
