"""Says what is wrong with bytes that do not parse as a message, by walking protobuf's wire format.

protobuf only says "bad UTF-8"; a caller needs the field. Format:
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections import Counter

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from gptjet.service.engine.errors import FieldViolation

# The walk is Python in the event loop: a hostile message must not hold it for long.
_MAX_FIELDS = 20_000
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class _MalformedError(Exception):
    """The bytes break off or say something the format does not have."""


class _GivenUpError(Exception):
    """Too many fields to look through."""


def explain_undecodable(data: bytes, message_type: Descriptor) -> FieldViolation:
    """Name the first string field of `data` that is not UTF-8, or say that it is no such message.

    The field is a path as in google.rpc.BadRequest: "text", "sampling_params.stop[1]".
    """
    whole = FieldViolation("", f"the bytes sent are not a valid {message_type.full_name}")
    try:
        found = _Walk().find(memoryview(data), message_type, "")
    except (_MalformedError, _GivenUpError):
        return whole
    return whole if found is None else FieldViolation(found, "must be valid UTF-8")


class _Walk:
    """One pass over a message; remembers how many fields it has seen, at every depth together."""

    def __init__(self) -> None:
        self._seen = 0

    def find(self, data: memoryview, message_type: Descriptor, prefix: str) -> str | None:
        """Path of the first string that is not UTF-8 in a message of this type."""
        occurrences: Counter[int] = Counter()
        position = 0
        while position < len(data):
            self._seen += 1
            if self._seen > _MAX_FIELDS:
                raise _GivenUpError
            tag, position = _varint(data, position)
            number, wire_type = tag >> 3, tag & 7
            start, position = _value(data, position, wire_type)
            field = message_type.fields_by_number.get(number)
            if field is None or wire_type != _LENGTH_DELIMITED:
                continue
            path = prefix + field.name
            if field.is_repeated:
                path += f"[{occurrences[number]}]"
                occurrences[number] += 1
            found = self._look_into(data[start:position], field, path)
            if found is not None:
                return found
        return None

    def _look_into(self, value: memoryview, field: FieldDescriptor, path: str) -> str | None:
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                str(value, "utf-8")
            except UnicodeDecodeError:
                return path
        elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            return self.find(value, field.message_type, path + ".")
        return None


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The varint at `position` and where it ends."""
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise _MalformedError
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise _MalformedError


def _value(data: memoryview, position: int, wire_type: int) -> tuple[int, int]:
    """Where the value at `position` begins and ends, its length prefix left out."""
    start = position
    if wire_type == _VARINT:
        _, end = _varint(data, position)
    elif wire_type == _FIXED64:
        end = position + 8
    elif wire_type == _FIXED32:
        end = position + 4
    elif wire_type == _LENGTH_DELIMITED:
        length, start = _varint(data, position)
        end = start + length
    else:  # groups, which proto3 does not have
        raise _MalformedError
    if end > len(data):
        raise _MalformedError
    return start, end
