"""Images from https addresses, where a server allows them: public hosts only, on every redirect, bounded in size and time.

A name is resolved once, its addresses are checked, and the connection goes to a checked address: a name that resolves
to another address the second time (DNS rebinding) gains nothing.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 3
CHUNK_BYTES = 64 * 1024
REDIRECTS = (301, 302, 303, 307, 308)


def resolve_host(host: str, port: int) -> list[str]:
    """The addresses of a host."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect_tls(address: str, port: int, host: str, timeout: float) -> socket.socket:
    """A TLS connection to an address, its certificate checked for the host."""
    plain = socket.create_connection((address, port), timeout)
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def is_public(address: str) -> bool:
    """Whether an address is on the internet: not private, loopback, link-local, reserved, or one of these inside
    IPv6."""
    ip = ipaddress.ip_address(address.split("%", maxsplit=1)[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        nat64 = ip in ipaddress.ip_network("64:ff9b::/96") or ip in ipaddress.ip_network("64:ff9b:1::/48")
        if inner is not None or nat64:
            return False
    return ip.is_global and not ip.is_multicast


@dataclass(frozen=True, kw_only=True)
class RemoteImages:
    """Fetches images. resolve and connect are the machine's own, but for tests."""

    max_bytes: int = 16 * 2**20
    timeout_s: float = 10.0
    resolve: Callable[[str, int], list[str]] = field(default=resolve_host)
    connect: Callable[[str, int, str, float], socket.socket] = field(default=connect_tls)

    def fetch(self, url: str) -> bytes:
        """The bytes at an address. Raises ValueError for one that is not allowed, and for what cannot be fetched."""
        end = time.monotonic() + self.timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            host, port, target = self._parse(url)
            address = self._public_address(host, port)
            try:
                status, location, body = self._get(address, port, host, target, end)
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(f"cannot fetch {url!r:.80}: {error}") from error
            if status in REDIRECTS and location:
                url = urljoin(url, location)
                continue
            if status != http.client.OK:
                raise ValueError(f"cannot fetch {url!r:.80}: got status {status}, expected 200")
            return body
        raise ValueError(f"cannot fetch {url!r:.80}: got more than {MAX_REDIRECTS} redirects")

    @staticmethod
    def _parse(url: str) -> tuple[str, int, str]:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username is not None:
            raise ValueError(f"got the address {url!r:.80}: expected https://host/..., without a user name")
        if parts.port not in (None, 443):
            raise ValueError(f"got the address {url!r:.80}: expected port 443")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return parts.hostname, 443, target

    def _public_address(self, host: str, port: int) -> str:
        try:
            addresses = self.resolve(host, port)
        except OSError as error:
            raise ValueError(f"cannot resolve {host!r:.80}: {error}") from error
        if not addresses or not all(is_public(one) for one in addresses):
            raise ValueError(f"got the host {host!r:.80}: expected one with public addresses only")
        return addresses[0]

    def _get(self, address: str, port: int, host: str, target: str, end: float) -> tuple[int, str | None, bytes]:
        sock = self.connect(address, port, host, max(0.1, end - time.monotonic()))
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        try:
            connection.request("GET", target, headers={"Host": host, "Accept": "image/*", "Connection": "close"})
            sock.settimeout(max(0.1, end - time.monotonic()))
            with closing(connection.getresponse()) as response:
                location = response.getheader("Location")
                body = b"" if response.status in REDIRECTS else self._read(response, sock, end)
                return response.status, location, body
        finally:
            connection.close()
            sock.close()

    def _read(self, response: http.client.HTTPResponse, sock: socket.socket, end: float) -> bytes:
        chunks: list[bytes] = []
        n = 0
        while chunk := response.read1(CHUNK_BYTES):
            chunks.append(chunk)
            n += len(chunk)
            if n > self.max_bytes:
                raise ValueError(f"got an image of more than {self.max_bytes:,} bytes: expected a smaller one")
            if time.monotonic() > end:
                raise ValueError(f"the image did not come in {self.timeout_s:g} seconds")
            if not response.isclosed():
                sock.settimeout(max(0.1, end - time.monotonic()))
        return b"".join(chunks)
