"""A request that cannot be served: its HTTP status, a code for the page, and words for a person."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse


class PageError(Exception):
    """What is wrong with a request, in a sentence that names the field and the limit.

    `retry_after_s` is set where waiting helps.
    """

    def __init__(
        self, status: int, code: str, message: str, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def fields(self) -> dict[str, Any]:
        """As the page reads it."""
        return {"code": self.code, "message": self.message, "retry_after_s": self.retry_after_s}

    def response(self) -> JSONResponse:
        """As an answer of its own; Retry-After in whole seconds, at least one."""
        headers = {"cache-control": "no-store"}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse({"error": self.fields()}, self.status, headers)
