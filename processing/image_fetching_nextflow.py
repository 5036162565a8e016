"""The bytes of an image at an http(s) address, which a stranger may have written.

The name of a host is resolved once, its addresses are checked, and the connection goes to a checked address: a name
that resolves differently the next time changes nothing. The same holds for every redirect. For that reason the
environment's proxies are not used: they would resolve the name again. Knows nothing of images.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import quote, urljoin, urlsplit


MAX_REDIRECTS = 5
MAX_SILENCE = 10.0  # seconds to wait for a connection, or for the next bytes
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 networks whose addresses stand for IPv4 ones, which may be private.
_TRANSLATED = [ipaddress.ip_network(network) for network in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")]


def fetch(url: str, *, max_bytes: int, timeout: float, allow_private_addresses: bool = False) -> bytes:
    """
    The bytes at `url`, following up to five redirects.

    Args:
        url (`str`): An `http://` or `https://` address.
        max_bytes (`int`): Refuse more, before they are read where the header announces them.
        timeout (`float`): Seconds for everything together. Ten seconds without a byte are too many in any case.
        allow_private_addresses (`bool`, *optional*, defaults to `False`):
            Whether a host may have an address that is not public: this machine, its network, the metadata service of
            its cloud.

    Raises:
        `ValueError` with the address and the cause.
    """
    deadline, target = time.monotonic() + timeout, url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with _get(target, deadline, allow_private_addresses) as response:
                if response.status not in _REDIRECTS:
                    return _read(response, max_bytes, deadline)
                target = urljoin(target, response.getheader("Location", ""))
        raise ValueError(f"it redirects more than {MAX_REDIRECTS} times")
    except (OSError, HTTPException, ValueError) as error:
        # A connection that is shut down at the deadline fails in many ways.
        cause = f"it takes more than {timeout:g} seconds" if time.monotonic() >= deadline else error
        raise ValueError(f"the image {url} cannot be fetched: {cause}") from error


@contextmanager
def _get(url: str, deadline: float, allow_private_addresses: bool) -> Iterator[HTTPResponse]:
    """The response to a GET request, on a connection that is shut down at the deadline."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(f"{url} is no http or https address")
    if parts.username is not None:
        raise ValueError("the address contains a user name, expected none")
    host, port = parts.hostname, parts.port or _PORTS[parts.scheme]
    sock = _connect(host, port, deadline, allow_private_addresses)
    if parts.scheme == "https":
        # The handshake waits for the server as well, so it comes later, under the timer.
        sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    # The timeout of a socket counts from each byte, of which a slow server may send many.
    timer = threading.Timer(deadline - time.monotonic(), _shut_down, [sock])
    timer.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = HTTPConnection(host, port)
        connection.sock = sock  # so it does not connect by name
        # What is not ASCII is escaped; what is escaped already stays as it is.
        path, query = (quote(part, safe="/?%:@!$&'()*+,;=~[]") for part in (parts.path or "/", parts.query))
        default = parts.port in (None, _PORTS[parts.scheme])
        name = f"[{host}]" if ":" in host else host.encode("idna").decode()
        headers = {
            "Host": name if default else f"{name}:{port}",
            "User-Agent": "nextflow-hf",
            "Accept": "image/*",
            "Connection": "close",
        }
        connection.request("GET", f"{path}?{query}" if query else path, headers=headers)
        with connection.getresponse() as response:
            yield response
    finally:
        timer.cancel()
        sock.close()


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):  # closed meanwhile
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the connection below TLS, too


def _connect(host: str, port: int, deadline: float, allow_private_addresses: bool) -> socket.socket:
    """A connection to the first address of `host` that accepts one, once all of them are known to be public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    if not allow_private_addresses and (private := [address for address in addresses if not _is_public(address)]):
        raise ValueError(
            f"{host} has the address {private[0]}, which is not public; pass allow_private_addresses=True if you "
            "trust whoever named it"
        )
    for index, address in enumerate(addresses):
        try:
            timeout = max(min(MAX_SILENCE, deadline - time.monotonic()), 1e-3)
            # To the address that was checked: looked up again, the name could lead elsewhere.
            return socket.create_connection((address, port), timeout=timeout)
        except OSError:
            if index == len(addresses) - 1:
                raise
    raise OSError(f"{host} has no address")


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text)
    # ::ffff:10.0.0.1 leads to 10.0.0.1.
    address = getattr(address, "ipv4_mapped", None) or address
    translated = address.version == 6 and any(address in network for network in _TRANSLATED)
    site_local = address.version == 6 and address.is_site_local
    return address.is_global and not (address.is_multicast or site_local or translated)


def _read(response: HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    if response.status != 200:
        raise ValueError(f"the server answers {response.status} {response.reason}")
    announced = response.length
    if announced is not None and announced > max_bytes:
        raise ValueError(f"it has {announced} bytes, expected at most {max_bytes}")
    data = bytearray()
    while announced is None or len(data) < announced:
        chunk = response.read1(2**16)
        data += chunk
        if time.monotonic() >= deadline:  # before an end is believed: the shutdown looks like one
            raise TimeoutError
        if len(data) > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes, expected at most that")
        if not chunk:
            break
    if announced is not None and len(data) < announced:
        raise ValueError(f"it ends after {len(data)} of {announced} bytes")
    return bytes(data)
