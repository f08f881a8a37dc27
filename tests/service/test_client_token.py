"""The client's bearer token: sent with every call, and never where others could read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gptjet.service.client import AsyncClient, Client, PlaintextTokenError, TlsOptions, check_token
from gptjet.service.client_admin import AdminClient
from gptjet.service.client_channel import is_local
from gptjet.service.rpc.access.tokens import new_token
from gptjet.service.rpc.access.tokens_file import editing

Make = Callable[..., Any]


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "localhost",
        "127.0.0.1:50051",
        "127.9.9.9:1",
        "[::1]:50051",
        "dns:localhost:50051",
        "dns:///localhost:50051",
        "ipv4:127.0.0.1:50051",
        "ipv6:[::1]:50051",
        "unix:/run/gptjet.sock",
        "unix:///run/gptjet.sock",
        "unix-abstract:gptjet",
    ],
)
def test_what_stays_on_this_machine_may_be_plain_text(target: str) -> None:
    assert is_local(target)
    check_token("secret", target, None, False)


@pytest.mark.parametrize(
    "target",
    [
        "gpu-box:50051",
        "10.0.0.1:50051",
        "0.0.0.0:50051",
        "[::]:50051",
        "[2001:db8::1]:50051",
        "localhost.example.com:50051",
        "127.0.0.1.example.com:50051",
        "example.com:127",
        "dns:///gpu-box:50051",
        "dns://127.0.0.1/gpu-box:50051",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "xds:///localhost",
        "user@localhost:1",
        "",
        ":50051",
        "unix",
    ],
)
@pytest.mark.parametrize("make", [Client, AdminClient])
def test_a_token_is_not_sent_in_plain_text_to_another_machine(make: Make, target: str) -> None:
    assert not is_local(target)
    with pytest.raises(PlaintextTokenError, match="use TLS, or allow_plaintext_token=True") as e:
        make(target, token="secret-text")
    assert "secret-text" not in str(e.value)
    make(target or "x", token="secret-text", allow_plaintext_token=True).close()
    make(target or "x", token="secret-text", tls=TlsOptions()).close()
    make(target or "x").close()


async def test_the_client_for_asyncio_refuses_likewise() -> None:
    with pytest.raises(PlaintextTokenError):
        AsyncClient("gpu-box:50051", token="secret-text")


@pytest.mark.parametrize("token", ["", "a b", "a\n", "a\r\nx: y", "ä", "a" * 4097, "\x00"])
def test_a_token_that_no_metadata_can_hold_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 4096 visible ASCII") as caught:
        Client("localhost:1", token=token)
    assert len(token) < 3 or token not in str(caught.value)


async def test_the_token_goes_with_every_call_beside_the_callers_metadata(
    start_server: Any, tmp_path: Any
) -> None:
    text, kept = new_token("web")
    with editing(tmp_path / "t", create=True) as tokens:
        tokens.append(kept)
    running = await start_server(tokens_file=tmp_path / "t")
    client = running.new_client(token=text, metadata=(("x-mine", "1"),), retry=None)
    await client.wait_until_serving(20)
    assert (await client.generate("abc", max_new_tokens=2)).text == "de"
    stream = client.generate_stream("abc", max_new_tokens=2)
    assert "".join([chunk.text async for chunk in stream]) == "de"
    assert (await client.tokenize("a")).ids == (97,)
    assert await client.detokenize([97]) == "a"
    await client.score("a", ["b"])
    await client.get_model()
    line = await running.request_line(method="Score")
    assert line["caller"] == "web"


async def test_a_proxy_of_the_environment_never_sees_a_plain_text_token(
    start_server: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC would take loopback through it as well."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    running = await start_server()
    target = f"localhost:{running.server.port}"
    client = AsyncClient(target, token="any", retry=None, timeout_s=20.0)
    assert (await client.generate("abc", max_new_tokens=2)).text == "de"
    await client.close()
