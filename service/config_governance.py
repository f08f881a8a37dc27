"""The settings of governance: the policy on prompts and outputs, its audit log and review queue."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MIB = 1024 * 1024


class GovernanceConfig(BaseModel):
    """Inherited by ServerConfig; all of it is without effect unless governance_policy is set."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    governance_policy: Path | None = Field(
        default=None,
        description="TOML file of rules that block, redact or flag prompts and outputs "
        "(unset: none are; try one with `gptjet policy check`)",
    )
    governance_dir: Path | None = Field(
        default=None,
        description="folder for the audit log and the review queue of governance_policy",
    )
    governance_fail_open: bool = Field(
        default=False,
        description="let requests pass whose decision cannot be written down, as on a full disk "
        "(off: they get UNAVAILABLE; requests that no rule concerns pass anyway)",
    )
    governance_timeout_s: float = Field(
        default=2.0,
        ge=0.05,
        le=60.0,
        description="how long a request waits for its decision to be written, unless failing open "
        "(a disk that takes longer hangs)",
    )
    governance_excerpts: bool = Field(
        default=False,
        description="keep what a rule found, and 80 characters before it, in the audit log and the "
        "review queue (off: digest and place only, as texts are the callers' business)",
    )
    governance_audit_max_bytes: int = Field(
        default=64 * _MIB,
        ge=64 * 1024,
        le=16 * 1024 * _MIB,
        description="size at which the audit log is rotated",
    )
    governance_audit_files: int = Field(
        default=8,
        ge=1,
        le=10_000,
        description="audit log files kept, the current one included; older ones are removed",
    )
    governance_audit_fsync: Literal["always", "second", "never"] = Field(
        default="second",
        description="when decisions reach the disk for certain: always (before the request goes "
        "on), second (a power cut loses one), never (as the system writes)",
    )

    @model_validator(mode="after")
    def _governance_has_its_folder(self) -> Self:
        if self.governance_policy is not None and self.governance_dir is None:
            raise ValueError(
                "governance_dir must be given with governance_policy: its audit log and review "
                "queue go there"
            )
        return self
