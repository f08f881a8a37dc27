"""What is said of bytes that are no message."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.rpc import wire
from gptjet.service.rpc.wire import explain_undecodable

# protobuf's stubs give messages another class of descriptor than its functions take.
REQUEST: Any = pb.GenerateRequest.DESCRIPTOR
TOKENIZE: Any = pb.TokenizeRequest.DESCRIPTOR
MARK = "\x01MARK\x02"


@given(st.binary(max_size=200))
def test_any_bytes_are_explained(data: bytes) -> None:
    violation = explain_undecodable(data, REQUEST)
    assert violation.description
    try:
        pb.GenerateRequest.FromString(data)
    except DecodeError:
        return
    assert violation.field == ""  # nothing is blamed in a message that is fine


@settings(max_examples=25)
@given(
    before=st.lists(st.text(max_size=5), max_size=4),
    after=st.lists(st.text(max_size=5), max_size=4),
    text=st.text(max_size=20),
)
def test_first_bad_string_is_found_among_good_ones(
    before: list[str], after: list[str], text: str
) -> None:
    message = pb.GenerateRequest(text=text, request_id="r")
    message.sampling_params.stop.extend([*before, MARK, *after])
    message.sampling_params.logit_bias[7] = 0.5
    message.sampling_params.seed = 2**64 - 1
    data = message.SerializeToString().replace(MARK.encode(), b"\xff" * len(MARK))
    violation = explain_undecodable(data, REQUEST)
    assert violation.field == f"sampling_params.stop[{len(before)}]"


def test_surrogates_are_not_utf8() -> None:
    data = pb.TokenizeRequest(text="abc").SerializeToString().replace(b"abc", b"\xed\xa0\x80")
    assert explain_undecodable(data, TOKENIZE).field == "text"


def test_walk_gives_up_on_a_message_of_very_many_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_MAX_FIELDS", 3)
    good, bad = b"\x1a\x01a", b"\x1a\x01\xff"
    assert explain_undecodable(good * 2 + bad, REQUEST).field == "request_id"
    assert explain_undecodable(good * 3 + bad, REQUEST).field == ""
