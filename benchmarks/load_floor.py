"""What receiving costs at least: servers for `comigs bench coordinator` that throw away what comes.

One speaks gRPC, the way its documentation shows, and one nothing but TLS; both over the same mutual
TLS as the coordinator. Takes one JSON object on stdin and prints one with the ports.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import grpc

from benchmarks.load_devices import FLOOR
from edge_runtime import wire

RECEIVE_BYTES = 256 * 1024


async def main() -> None:
    given: dict[str, Any] = json.loads(sys.stdin.readline())
    server = await _grpc(given)
    raw = await _raw(given)
    sys.stdout.write(json.dumps({"grpc": server, "raw": raw}) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


async def _grpc(given: dict[str, Any]) -> int:
    payload = bytes(given["bytes"])

    # No (de)serializers: messages are bytes.
    async def upload(requests: AsyncIterator[bytes], _: Any) -> bytes:
        async for _request in requests:
            pass
        return b""

    async def download(_request: bytes, _: Any) -> AsyncIterator[bytes]:
        for data in wire.chunks(payload):
            yield data

    handlers = {
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
        "Download": grpc.unary_stream_rpc_method_handler(download),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(FLOOR.lstrip("/"), handlers),)
    )
    pair = (given["key"].encode(), given["chain"].encode())
    credentials = grpc.ssl_server_credentials([pair], given["ca"].encode(), True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    KEPT.append(server)
    return port


class Discard(asyncio.BufferedProtocol):
    """Counts, and answers when all has come."""

    buffer = bytearray(RECEIVE_BYTES)

    def __init__(self, expected: int) -> None:
        self._left = expected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, _sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left <= 0:
            assert isinstance(self._transport, asyncio.WriteTransport)
            self._transport.write(b".")


async def _raw(given: dict[str, Any]) -> int:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=given["ca"])
    context.verify_mode = ssl.CERT_REQUIRED
    with tempfile.NamedTemporaryFile() as file:
        file.write((given["key"] + given["chain"]).encode())
        file.flush()
        context.load_cert_chain(file.name)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Discard(given["bytes"]), "127.0.0.1", 0, ssl=context, backlog=4096
    )
    KEPT.append(server)
    return int(server.sockets[0].getsockname()[1])


KEPT: list[Any] = []
"""What must live as long as the process."""

if __name__ == "__main__":
    asyncio.run(main())
