"""The tokens file: TOML that a person can read, and written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptjet.service.rpc.access.errors import AccessError
from gptjet.service.rpc.access.tokens import Token, TokenSet

_HEADER = """\
# Bearer tokens of a GPTJet server, written by `gptjet tokens`. The tokens themselves are not in
# here: each was shown once, when it was made. Limits may be edited; comments are not kept.
"""
# Some ten thousand tokens; what is larger is some other file.
_MAX_BYTES = 8 * 1024 * 1024


def read_bytes(path: Path) -> bytes:
    """The file as it stands. Raises AccessError: unreadable, too large, or anyone may write it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        hint = "; make one with `gptjet tokens create`" if not path.exists() else ""
        raise AccessError(f"{path}: {error.strerror or error}{hint}") from error
    if mode & stat.S_IWOTH:
        raise AccessError(f"{path}: anyone may write it (mode {stat.S_IMODE(mode):04o}); chmod 600")
    if len(data) > _MAX_BYTES:
        raise AccessError(f"{path}: must be at most {_MAX_BYTES} bytes")
    return data


def parse(data: bytes, path: Path) -> TokenSet:
    """The tokens in `data`; raises AccessError naming every bad field, and no value of one."""
    try:
        content = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise AccessError(f"{path}: not UTF-8 at byte {error.start}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise AccessError(f"{path}: not valid TOML: {error}") from error
    try:
        return TokenSet(**content)
    except ValidationError as error:
        problems = "; ".join(_describe(problem, content) for problem in error.errors()[:8])
        raise AccessError(f"{path}: {problems}") from error
    except TypeError as error:  # a key that is no Python name
        raise AccessError(f"{path}: {error}") from error


def read(path: Path) -> TokenSet:
    """`parse` of `read_bytes`."""
    return parse(read_bytes(path), path)


def render(tokens: TokenSet) -> str:
    """The file's text: what `parse` reads back as the same tokens."""
    return "\n".join([_HEADER, *(_table(token) for token in tokens.token)])


@contextlib.contextmanager
def editing(path: Path, *, create: bool = False) -> Iterator[list[Token]]:
    """The file's tokens as a list; what the block leaves in it replaces the file when it ends.

    Two editors take turns; a server that reads meanwhile sees the old file or the new one. The file
    is readable by its owner only. Nothing is written where the block raises. `create`: a file that
    is not there is an empty one. Raises AccessError.
    """
    path = path.resolve()  # a link stays one
    with _locked(path.parent) as folder:
        tokens = [] if create and not path.exists() else list(read(path).token)
        yield tokens
        try:
            changed = TokenSet(token=tuple(tokens))
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise AccessError(f"{path}: {message}") from error
        _replace(path, render(changed))
        # Else a revoked token could be good again after the power fails.
        os.fsync(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """One editor at a time. The folder is locked, not the file, which is replaced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise AccessError(f"{folder}: {error.strerror or error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        # Readable by the owner alone from the first moment on.
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            _keep_owner(path, file.fileno())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise AccessError(f"{path}: {error.strerror or error}") from error


def _keep_owner(path: Path, descriptor: int) -> None:
    """So that an edit by root leaves a file that the server's own user can read."""
    with contextlib.suppress(OSError):
        before = path.stat()
        os.fchown(descriptor, before.st_uid, before.st_gid)


def _table(token: Token) -> str:
    lines = ["[[token]]"]
    for name in type(token).model_fields:
        value = getattr(token, name)
        if isinstance(value, datetime):
            lines.append(f"{name} = {value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}")
        elif value is not None:
            # JSON's strings, numbers and lists of strings are TOML's.
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _describe(problem: Any, content: dict[str, Any]) -> str:
    """`token[2] (web): sha256: …`: which one, which field, what it must be."""
    location = list(problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    where = ""
    if location[:1] == ["token"] and len(location) > 1 and isinstance(location[1], int):
        index = location[1]
        where = f"token[{index}]"
        entry = content["token"][index]
        name = entry.get("name") if isinstance(entry, dict) else None
        where += f" ({name[:64]!r}): " if isinstance(name, str) else ": "
        location = location[2:]
    field = ".".join(str(part) for part in location)
    return f"{where}{field + ': ' if field else ''}{message}"
