"""The demo's two intermediaries, in their shortest form: what tproxyd is not, and what it trusts.

relay.py PORT HOST HOST_PORT               a plain TCP relay: the far side sees the relay
relay.py --proxy-v1 PORT HOST HOST_PORT    a load balancer: says whom it speaks for, by a
                                           PROXY v1 header, as real ones can be told to
"""

from __future__ import annotations

import asyncio
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def header(writer: asyncio.StreamWriter) -> bytes:
    """PROXY v1 of the connection whose downstream side `writer` is."""
    source, source_port = writer.get_extra_info("peername")[:2]
    destination, port = writer.get_extra_info("sockname")[:2]
    family = "TCP6" if ":" in source else "TCP4"
    return f"PROXY {family} {source} {destination} {source_port} {port}\r\n".encode()


async def main(port: int, host: str, host_port: int, proxy_v1: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(host, host_port)
            if proxy_v1:
                up_writer.write(header(writer))
            await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))
            up_writer.close()
        except OSError:
            pass
        finally:
            writer.close()

    listen_on = "::" if ":" in host else "0.0.0.0"
    server = await asyncio.start_server(serve, listen_on, port)
    await server.serve_forever()


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "--proxy-v1"]
    asyncio.run(main(int(arguments[0]), arguments[1], int(arguments[2]), "--proxy-v1" in sys.argv))
