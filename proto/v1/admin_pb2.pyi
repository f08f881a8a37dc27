import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOG_LEVEL_UNSPECIFIED: _ClassVar[LogLevel]
    LOG_LEVEL_DEBUG: _ClassVar[LogLevel]
    LOG_LEVEL_INFO: _ClassVar[LogLevel]
    LOG_LEVEL_WARNING: _ClassVar[LogLevel]
    LOG_LEVEL_ERROR: _ClassVar[LogLevel]

class ServerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_STATE_UNSPECIFIED: _ClassVar[ServerState]
    SERVER_STATE_LOADING: _ClassVar[ServerState]
    SERVER_STATE_SERVING: _ClassVar[ServerState]
    SERVER_STATE_DRAINING: _ClassVar[ServerState]
    SERVER_STATE_FAILED: _ClassVar[ServerState]
LOG_LEVEL_UNSPECIFIED: LogLevel
LOG_LEVEL_DEBUG: LogLevel
LOG_LEVEL_INFO: LogLevel
LOG_LEVEL_WARNING: LogLevel
LOG_LEVEL_ERROR: LogLevel
SERVER_STATE_UNSPECIFIED: ServerState
SERVER_STATE_LOADING: ServerState
SERVER_STATE_SERVING: ServerState
SERVER_STATE_DRAINING: ServerState
SERVER_STATE_FAILED: ServerState

class DrainRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("running", "waiting", "grace_s")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    grace_s: float
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., grace_s: _Optional[float] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadedFiles(_message.Message):
    __slots__ = ("kind", "outcome", "reason")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[ReloadedFiles.Outcome]
        OUTCOME_UNCHANGED: _ClassVar[ReloadedFiles.Outcome]
        OUTCOME_RELOADED: _ClassVar[ReloadedFiles.Outcome]
        OUTCOME_REFUSED: _ClassVar[ReloadedFiles.Outcome]
    OUTCOME_UNSPECIFIED: ReloadedFiles.Outcome
    OUTCOME_UNCHANGED: ReloadedFiles.Outcome
    OUTCOME_RELOADED: ReloadedFiles.Outcome
    OUTCOME_REFUSED: ReloadedFiles.Outcome
    KIND_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    outcome: ReloadedFiles.Outcome
    reason: str
    def __init__(self, kind: _Optional[str] = ..., outcome: _Optional[_Union[ReloadedFiles.Outcome, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[ReloadedFiles]
    def __init__(self, files: _Optional[_Iterable[_Union[ReloadedFiles, _Mapping]]] = ...) -> None: ...

class GetLogLevelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLogLevelResponse(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: LogLevel
    def __init__(self, level: _Optional[_Union[LogLevel, str]] = ...) -> None: ...

class SetLogLevelRequest(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: LogLevel
    def __init__(self, level: _Optional[_Union[LogLevel, str]] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: LogLevel
    def __init__(self, previous: _Optional[_Union[LogLevel, str]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CertificateStatus(_message.Message):
    __slots__ = ("names", "not_after", "client_certificates_required", "refused")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    CLIENT_CERTIFICATES_REQUIRED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    not_after: _timestamp_pb2.Timestamp
    client_certificates_required: bool
    refused: str
    def __init__(self, names: _Optional[_Iterable[str]] = ..., not_after: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., client_certificates_required: bool = ..., refused: _Optional[str] = ...) -> None: ...

class TokenStatus(_message.Message):
    __slots__ = ("id", "name", "scopes", "expires", "usable", "concurrent_streams", "max_concurrent_streams", "requests_per_minute", "requests_left", "tokens_per_minute", "tokens_left")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    USABLE_FIELD_NUMBER: _ClassVar[int]
    CONCURRENT_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_STREAMS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_LEFT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_LEFT_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    expires: _timestamp_pb2.Timestamp
    usable: bool
    concurrent_streams: int
    max_concurrent_streams: int
    requests_per_minute: int
    requests_left: int
    tokens_per_minute: int
    tokens_left: int
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., usable: bool = ..., concurrent_streams: _Optional[int] = ..., max_concurrent_streams: _Optional[int] = ..., requests_per_minute: _Optional[int] = ..., requests_left: _Optional[int] = ..., tokens_per_minute: _Optional[int] = ..., tokens_left: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("state", "server_version", "uptime_s", "model", "backend", "address", "running", "waiting", "certificate", "tokens", "tokens_refused")
    STATE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    state: ServerState
    server_version: str
    uptime_s: float
    model: str
    backend: str
    address: str
    running: int
    waiting: int
    certificate: CertificateStatus
    tokens: _containers.RepeatedCompositeFieldContainer[TokenStatus]
    tokens_refused: str
    def __init__(self, state: _Optional[_Union[ServerState, str]] = ..., server_version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., model: _Optional[str] = ..., backend: _Optional[str] = ..., address: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., certificate: _Optional[_Union[CertificateStatus, _Mapping]] = ..., tokens: _Optional[_Iterable[_Union[TokenStatus, _Mapping]]] = ..., tokens_refused: _Optional[str] = ...) -> None: ...
