"""The demo's plain TCP relay, in its shortest form: the far side sees the relay.

relay.py PORT HOST HOST_PORT
"""

from __future__ import annotations

import asyncio
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def main(port: int, host: str, host_port: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(host, host_port)
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
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
