"""Where gptjet.v1.Admin listens: a port of its own, a Unix socket, or nowhere (the default)."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

import grpc

from gptjet.proto.v1 import admin_pb2_grpc as pb_grpc
from gptjet.service.config import ServerConfig
from gptjet.service.log import get_logger
from gptjet.service.observability.setup import Observability
from gptjet.service.rpc import listen
from gptjet.service.rpc.admin import ADMIN_SERVICE_NAME, Administered, AdminServicer
from gptjet.service.rpc.interceptors import RequestInterceptor
from gptjet.service.rpc.listen import ListenError

logger = get_logger(__name__)

# An address of a Unix socket holds 107 bytes, and a name of its own is bound first.
_MAX_SOCKET_PATH = 90
_FLUSH_S = 1.0


class AdminServer:
    """The administration of one server; `start` and `stop` it with that.

    Two gRPC servers where both are asked for, as they let callers in by different means: the port
    takes a token with the scope admin, the socket whoever the file system lets open it.
    """

    def __init__(self, config: ServerConfig, server: Administered) -> None:
        self._config = config
        self._server = server
        self.port = 0
        self._started: list[grpc.aio.Server] = []
        self._bound: os.stat_result | None = None

    async def start(self) -> None:
        """Raises ListenError with one line."""
        config = self._config
        access = self._server.access
        if config.admin_port is not None:
            guarded = self._new_server(access.interceptors({ADMIN_SERVICE_NAME: "admin"}))
            self.port = listen.bind_to(
                guarded, config.admin_host, config.admin_port, access.credentials(), "--admin-port"
            )
            await self._start(guarded)
            logger.info(
                "administration listening",
                address=listen.address(config.admin_host, self.port),
                tls=access.certificates is not None,
            )
        if config.admin_socket is not None:
            local = self._new_server([])
            self._bound = await self._start_on(config.admin_socket, local)
            logger.info("administration listening", socket=str(config.admin_socket))

    async def stop(self) -> None:
        """Answer what has been asked, and go."""
        path = self._config.admin_socket
        if path is not None and self._bound is not None:
            # Unless another server has put its own in the place.
            with contextlib.suppress(OSError):
                if os.path.samestat(path.lstat(), self._bound):
                    path.unlink()
        started, self._started = self._started, []
        for server in started:
            await server.stop(_FLUSH_S)

    def _new_server(self, access: list[grpc.aio.ServerInterceptor]) -> grpc.aio.Server:
        rpcs = RequestInterceptor(ADMIN_SERVICE_NAME, Observability())
        server = grpc.aio.server(
            interceptors=[rpcs, *access], options=listen.channel_options(self._config)
        )
        pb_grpc.add_AdminServicer_to_server(AdminServicer(self._server), server)
        return server

    async def _start(self, server: grpc.aio.Server) -> None:
        await server.start()
        self._started.append(server)

    async def _start_on(self, path: Path, server: grpc.aio.Server) -> os.stat_result:
        """Bind in a folder that nobody else may enter, and move the socket into its place.

        So it is never open to others, not even for a moment, it takes over from a server that is
        there, and gRPC, which removes its socket by name, does not remove a later server's.
        """
        if len(os.fsencode(path.absolute())) > _MAX_SOCKET_PATH:
            raise ListenError(f"--admin-socket: {path}: must be at most {_MAX_SOCKET_PATH} bytes")
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ListenError(f"--admin-socket: {path} is there, and is no socket")
        folder = path.absolute().parent / f".admin-{os.getpid()}"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise ListenError(f"--admin-socket: {folder}: {error.strerror or error}") from error
        try:
            made = folder / "s"
            try:
                server.add_insecure_port(f"unix:{made}")
            except RuntimeError as error:
                raise ListenError(f"--admin-socket: cannot listen on {path}: {error}") from error
            await self._start(server)
            made.chmod(0o600)
            bound = made.lstat()
            made.rename(path)
        except OSError as error:
            raise ListenError(f"--admin-socket: {path}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return bound
