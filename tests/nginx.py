"""Run the real nginx in front of a relay, with the site that ships: config/nginx/relay.conf."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import trustme

from tests.processes import ROOT, free_port
from tests.relays import HANG_GUARD_S
from tests.tools import need

MAIN_CONFIG = """
{user}
worker_processes 1; daemon off; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  types {{ text/html html; text/javascript js; text/css css; }}
{site}
}}
"""


def _user() -> str:
    """Run the workers of nginx as root if the tests do: another user cannot read their files."""
    return "user root;" if os.geteuid() == 0 else ""


class Nginx:
    """One nginx: plain HTTP at `url`, TLS at `tls_url` with a certificate that `authority` issues.

    It serves the files of `root` as a static site.
    """

    def __init__(self, folder: Path, authority: trustme.CA | None = None) -> None:
        need("nginx")
        self.folder = folder / "nginx"
        self.root = self.folder / "root"
        self.root.mkdir(parents=True)
        self.authority = authority or trustme.CA()
        self.port, self.tls_port = free_port(), free_port()
        self.read_timeout = "1h"
        """`proxy_read_timeout` of calls; a test may set it before `start`."""
        self.url, self.tls_url = f"http://127.0.0.1:{self.port}", f"https://127.0.0.1:{self.tls_port}"
        self.process: asyncio.subprocess.Process | None = None

    @property
    def logged(self) -> str:
        """The access log and the error log so far."""
        return (self.folder / "access.log").read_text() + (self.folder / "error.log").read_text()

    async def start(self, *relay_ports: int) -> str:
        """Start nginx in front of one or more relays. Returns its plain URL."""
        certificate = self.authority.issue_cert("localhost", "127.0.0.1")
        certificate.private_key_pem.write_to_path(self.folder / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(self.folder / "cert.pem")
        (self.folder / "nginx.conf").write_text(MAIN_CONFIG.format(user=_user(), site=self._site(relay_ports)))
        nginx = shutil.which("nginx")
        assert nginx
        with (self.folder / "stderr").open("wb") as stderr:
            self.process = await asyncio.create_subprocess_exec(nginx, "-p", str(self.folder), "-c", "nginx.conf", stderr=stderr)
        async with asyncio.timeout(HANG_GUARD_S):
            while True:
                with socket.socket() as sock:
                    if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                        return self.url
                assert self.process.returncode is None, (self.folder / "stderr").read_text()
                await asyncio.sleep(0.05)

    def _site(self, relay_ports: tuple[int, ...]) -> str:
        """The site that ships, with the ports and paths of this test in place of its own.

        Raises AssertionError if the site lacks a line that is to be replaced.
        """
        site = (ROOT / "config/nginx/relay.conf").read_text()
        servers = "\n".join(f"    server 127.0.0.1:{port} max_fails=0;" for port in relay_ports)
        for line, replacement in {
            r"    server 127\.0\.0\.1:8787 max_fails=0;": servers,
            r"listen 80;": f"listen 127.0.0.1:{self.port};",
            r"listen 443 ssl http2;": f"listen 127.0.0.1:{self.tls_port} ssl http2;",
            r"/etc/ssl/ai\.example\.com/fullchain\.pem": "cert.pem",
            r"/etc/ssl/ai\.example\.com/privkey\.pem": "key.pem",
            r"/var/log/nginx/relay\.log": str(self.folder / "access.log"),
            r"/var/log/nginx/relay-error\.log": str(self.folder / "error.log"),
            r"/var/www/ai-gateway": str(self.root),
            r"proxy_read_timeout 1h;": f"proxy_read_timeout {self.read_timeout};",
        }.items():
            site, count = re.subn(line, replacement, site)
            assert count == 1, line
        return site

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await self.process.wait()
