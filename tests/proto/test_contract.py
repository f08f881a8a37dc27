"""The wire contract: its stubs are current, and it keeps the rules that callers rely on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, ServiceDescriptor
from packaging.requirements import Requirement
from packaging.version import Version

from gptjet.proto.v1 import admin_pb2, admin_pb2_grpc, text_generation_pb2_grpc
from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.engine.request import FinishReason, SamplingParams

ROOT = Path(__file__).resolve().parent.parent.parent
V1 = ROOT / "proto" / "v1"
# The modules of each contract, and the service in it.
CONTRACTS: dict[str, tuple[Any, Any, str]] = {
    "text_generation": (pb, text_generation_pb2_grpc, "TextGeneration"),
    "admin": (admin_pb2, admin_pb2_grpc, "Admin"),
}


def walk(descriptor: Descriptor) -> Iterator[Descriptor]:
    """Yield the message and those declared in it, generated map entries left out."""
    yield descriptor
    for nested in descriptor.nested_types:
        if not nested.GetOptions().map_entry:
            yield from walk(nested)


def service_of(name: str) -> ServiceDescriptor:
    """Return the service of a contract."""
    messages, _, service = CONTRACTS[name]
    return messages.DESCRIPTOR.services_by_name[service]


def messages_of(name: str) -> list[Descriptor]:
    """Return every message of a contract."""
    tops = CONTRACTS[name][0].DESCRIPTOR.message_types_by_name.values()
    return [message for top in tops for message in walk(top)]


MESSAGES = [message for name in CONTRACTS for message in messages_of(name)]
ENUMS: list[EnumDescriptor] = [
    *(e for m, _, _ in CONTRACTS.values() for e in m.DESCRIPTOR.enum_types_by_name.values()),
    *(enum for message in MESSAGES for enum in message.enum_types),
]


def test_every_proto_file_is_a_contract_that_is_tested_here() -> None:
    assert {path.stem for path in V1.glob("*.proto")} == CONTRACTS.keys()


def compiled(folder: Path, name: str) -> descriptor_pb2.FileDescriptorProto:
    """Return the .proto files as the installed protoc reads them."""
    output = folder / "descriptors.bin"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Igptjet/proto={ROOT / 'proto'}"]
    command += [f"--descriptor_set_out={output}", f"gptjet/proto/v1/{name}.proto"]
    subprocess.run(command, check=True, cwd=folder)
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    return file


def without_json_names(
    file: descriptor_pb2.FileDescriptorProto,
) -> descriptor_pb2.FileDescriptorProto:
    """Drop the one thing that protoc derives and the stubs leave out."""

    def clear(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            clear(nested)

    for message in file.message_type:
        clear(message)
    return file


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_stubs_are_generated_from_this_proto(tmp_path: Path, name: str) -> None:
    """Run `make proto` where this fails. Compared as descriptors: any protoc version gives them."""
    committed = descriptor_pb2.FileDescriptorProto()
    CONTRACTS[name][0].DESCRIPTOR.CopyToProto(committed)
    assert without_json_names(committed) == without_json_names(compiled(tmp_path, name))


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_service_stub_has_every_rpc_with_its_types(name: str) -> None:
    class Recorder:
        """A channel that notes what the stub asks it for."""

        def __init__(self) -> None:
            self.calls: dict[str, tuple[str, object]] = {}

        def __getattr__(self, kind: str) -> object:
            def record(path: str, **serializers: object) -> None:
                self.calls[path] = (kind, serializers["response_deserializer"])

            return record

    channel = Recorder()
    messages, stubs, service = CONTRACTS[name]
    getattr(stubs, f"{service}Stub")(channel)
    expected = {
        f"/gptjet.v1.{service}/{method.name}": (
            f"{'stream' if method.client_streaming else 'unary'}"
            f"_{'stream' if method.server_streaming else 'unary'}",
            getattr(messages, method.output_type.name).FromString,
        )
        for method in service_of(name).methods
    }
    assert channel.calls == expected
    for method in service_of(name).methods:
        assert callable(getattr(getattr(stubs, f"{service}Servicer"), method.name))


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_type_stubs_name_every_message_field_and_rpc(name: str) -> None:
    def classes(path: Path) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}

        def visit(node: ast.ClassDef) -> None:
            names = {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
            found.setdefault(node.name, set()).update(names)
            for item in node.body:
                if isinstance(item, ast.ClassDef):
                    visit(item)

        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                visit(node)
        return found

    typed = classes(V1 / f"{name}_pb2.pyi")
    for message in messages_of(name):
        assert {field.name for field in message.fields} <= typed[message.name], message.name
    service = service_of(name)
    stub = classes(V1 / f"{name}_pb2_grpc.pyi")[f"{service.name}Stub"]
    assert {method.name for method in service.methods} == stub


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize(
    ("distribution", "module", "pattern"),
    [
        ("grpcio", "pb2_grpc.py", r"GRPC_GENERATED_VERSION = '([\d.]+)'"),
        ("protobuf", "pb2.py", r"# Protobuf Python Version: ([\d.]+)"),
    ],
)
def test_the_stubs_run_on_the_oldest_runtime_that_may_be_installed(
    name: str, distribution: str, module: str, pattern: str
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (allowed,) = (
        requirement.specifier
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == distribution
    )
    (lowest,) = (Version(item.version) for item in allowed if item.operator == ">=")
    match = re.search(pattern, (V1 / f"{name}_{module}").read_text(encoding="utf-8"))
    assert match is not None
    assert Version(match[1]) <= lowest


@pytest.mark.parametrize("name", CONTRACTS)
def test_no_rpc_shares_its_request_or_response(name: str) -> None:
    """So each can gain fields without touching another."""
    for method in service_of(name).methods:
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.full_name)
def test_zero_means_unspecified_in_every_enum(enum: EnumDescriptor) -> None:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper()
    assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
    assert all(value.name.startswith(f"{prefix}_") for value in enum.values)
    assert len({value.number for value in enum.values}) == len(enum.values), "no aliases"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.full_name)
def test_a_removed_field_stays_reserved(message: Descriptor) -> None:
    """Every number up to the highest is in use or reserved: none is free to be taken again."""
    proto = descriptor_pb2.DescriptorProto()
    message.CopyToProto(proto)
    used = {field.number for field in proto.field}
    reserved = {n for item in proto.reserved_range for n in range(item.start, item.end)}
    assert not used & reserved
    assert used | reserved == set(range(1, max(used | reserved, default=0) + 1))
    if reserved:
        assert proto.reserved_name, "reserve the name beside the number"


def test_an_absent_sampling_parameter_differs_from_zero() -> None:
    """Greedy (temperature 0) and "not said" are two things, so each scalar has presence."""
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        assert field.has_presence or field.is_repeated, field.name
    for field in (
        pb.TokenLogprob.DESCRIPTOR.fields_by_name["logprob"],
        pb.GetModelResponse.DESCRIPTOR.fields_by_name["eos_token_id"],
    ):
        assert field.has_presence, field.full_name


def test_the_wire_and_the_engine_have_the_same_sampling_parameters() -> None:
    wire = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert wire == {field.name for field in fields(SamplingParams)}


def test_the_wire_and_the_engine_have_the_same_finish_reasons() -> None:
    wire = set(pb.FinishReason.keys()) - {"FINISH_REASON_UNSPECIFIED"}
    assert wire == {f"FINISH_REASON_{reason.value.upper()}" for reason in FinishReason}


def test_both_ways_to_generate_take_the_same_request() -> None:
    """Generate is GenerateStream collected, so a field in one belongs in the other."""

    def shape(message: Descriptor) -> list[tuple[str, int, str]]:
        return [
            (field.name, field.number, getattr(field.message_type, "full_name", str(field.type)))
            for field in message.fields
        ]

    assert shape(pb.GenerateRequest.DESCRIPTOR) == shape(pb.GenerateStreamRequest.DESCRIPTOR)


def test_an_unknown_field_of_a_newer_caller_is_kept_out_of_the_way() -> None:
    newer = pb.TokenizeRequest(text="hello").SerializeToString() + b"\xf8\x07\x01"  # field 127
    assert pb.TokenizeRequest.FromString(newer).text == "hello"


def test_the_package_on_the_wire_is_versioned() -> None:
    assert {messages.DESCRIPTOR.package for messages, _, _ in CONTRACTS.values()} == {"gptjet.v1"}
    assert service_of("text_generation").full_name == "gptjet.v1.TextGeneration"
    assert service_of("admin").full_name == "gptjet.v1.Admin"
