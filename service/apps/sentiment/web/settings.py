"""What the page allows: sizes, rates and names, in one place, and shown on the page itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSettings:
    """Limits of the page.

    max_chars             characters (code points) of one text, and of a row's text
    max_csv_bytes         size of a CSV file
    max_csv_rows          rows of a CSV file, the header not counted
    rows_in_flight        rows of one CSV file that are classified at a time
    requests_per_minute   refill of a client's budget: a text costs 1, a CSV file 5
    burst                 the most that a client can save up
    streams_per_client    answers that run at a time for one client
    max_streams           answers that run at a time for all
    body_timeout_s        how long a client may take to send a body
    allowed_hosts         names that a Host header may have besides localhost and IP addresses
    """

    max_chars: int = 20_000
    max_csv_bytes: int = 2 * 1024 * 1024
    max_csv_rows: int = 5_000
    rows_in_flight: int = 4
    requests_per_minute: int = 60
    burst: int = 20
    streams_per_client: int = 4
    max_streams: int = 32
    body_timeout_s: float = 30.0
    allowed_hosts: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in (
            "max_chars",
            "max_csv_bytes",
            "max_csv_rows",
            "rows_in_flight",
            "requests_per_minute",
            "burst",
            "streams_per_client",
            "max_streams",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.body_timeout_s <= 0:
            raise ValueError(f"body_timeout_s must be above 0, got {self.body_timeout_s:g}")

    @property
    def max_json_bytes(self) -> int:
        """A text of `max_chars` fits however it is escaped: at most 12 bytes a character."""
        return 12 * self.max_chars + 4096
