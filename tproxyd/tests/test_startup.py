"""What `tproxyd run` keeps out of its processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def python(code: str) -> str:
    """What `code` prints in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_that_a_daemon_imports_brings_openssl() -> None:
    """With a scrape, a hash and a loop, that is: what is left out is not missed."""
    said = python(
        """
        import re
        from tproxyd.proc import startup
        startup.do_without_openssl()

        import asyncio, hashlib
        import uvloop
        from prometheus_client import CollectorRegistry, generate_latest
        from tproxyd.flow import listen
        from tproxyd.proc import supervisor, worker

        async def main():
            server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
            reader, _ = await asyncio.open_connection(*server.sockets[0].getsockname())
            return await reader.read()

        print(asyncio.run(main()), uvloop.new_event_loop().run_until_complete(main()))
        print(hashlib.sha256(b"").hexdigest()[:8], generate_latest(CollectorRegistry()))
        print(re.findall("libcrypto|libssl", open("/proc/self/maps").read()))
        """
    )
    assert said.splitlines() == ["b'' b''", "e3b0c442 b''", "[]"]


def test_a_loaded_ssl_stays() -> None:
    said = python(
        """
        import ssl, sys
        from tproxyd.proc import startup
        startup.do_without_openssl()
        print(sys.modules["ssl"] is ssl, "_hashlib" in sys.modules)
        """
    )
    assert said == "True False\n"


def test_run_does_without_it() -> None:
    """Before it imports the supervisor, and asyncio with that."""
    said = python(
        """
        import sys
        from tproxyd import cli
        from tproxyd.config import Config

        class Watch:
            def find_spec(self, name, *_):
                if name == "asyncio":
                    print(type(sys.modules.get("ssl")).__name__)
                    sys.exit()

        cli.read_config = lambda path: Config()
        sys.meta_path.insert(0, Watch())
        cli.main(["run"])
        """
    )
    assert said == "_NoTls\n"
