"""The one loader: the same bytes give the same pixels however they come; no address leads into a private network."""

import base64
import http.server
import io
import ipaddress
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from nextflow_hf import load_image
from nextflow_hf.processing import NextFlowImageProcessorPil, image_fetching_nextflow


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def transparent() -> Image.Image:
    image = Image.new("RGBA", (20, 12))
    image.paste((255, 0, 0, 128), (4, 4, 12, 10))
    return image


def gradient(dtype: type = np.uint16) -> np.ndarray:
    return np.linspace(0, np.iinfo(dtype).max, 256).round().astype(dtype).reshape(16, 16)


def swapped_profile() -> bytes:
    """The profile of a display that shows red for green: sRGB's, with two of its primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = (profile.index(tag) + 4 for tag in (b"rXYZ", b"gXYZ"))
    red, green = (int.from_bytes(profile[place : place + 4], "big") for place in places)
    profile[red : red + 20], profile[green : green + 20] = profile[green : green + 20], profile[red : red + 20]
    return bytes(profile)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.radial_gradient("L").resize((30, 20)), "JPEG", exif=exif)


def psd(layers: int = 2, side: int = 8) -> bytes:
    """A composite of 200, and layers."""
    plane = bytes([200]) * (side * side)
    channels = b"".join(struct.pack(">hI", channel, len(plane) + 2) for channel in range(3))
    extra = struct.pack(">II", 0, 0) + b"\1L\0\0"
    record = struct.pack(">iiiiH", 0, 0, side, side, 3) + channels + b"8BIMnorm" + bytes([255, 0, 0, 0])
    record += struct.pack(">I", len(extra)) + extra
    body = struct.pack(">h", layers) + record * layers + (b"\0\0" + bytes(side * side)) * 3 * layers
    body += b"\0" * (len(body) % 2)
    info = struct.pack(">I", len(body)) + body
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, side, side, 8, 3) + bytes(8)
    return header + struct.pack(">I", len(info)) + info + b"\0\0" + plane * 3


FILES = {
    "transparent.png": encoded(transparent()),
    "deep.png": encoded(Image.fromarray(gradient())),
    "turned.jpg": turned(),
    "wide.png": encoded(Image.new("RGB", (9, 9), (200, 100, 50)), icc_profile=swapped_profile()),
    "layers.psd": psd(),
    "big.png": encoded(Image.new("1", (3000, 3000))),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        name = self.path[1:]
        if name.startswith("to="):
            self.send_response(302)
            self.send_header("Location", name.removeprefix("to="))
            self.end_headers()
            return
        if name not in FILES and name not in ("endless", "drip", "short"):
            self.send_error(404)
            return
        self.send_response(200)
        if name in FILES:
            self.send_header("Content-Length", str(len(FILES[name])))
        if name == "short":
            self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            self.wfile.write(FILES.get(name, b""))
            while name in ("endless", "drip"):
                self.wfile.write(bytes(100_000 if name == "endless" else 1))
                time.sleep(0.05 if name == "drip" else 0)
        except OSError:  # the client has gone
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", [name for name in FILES if name != "big.png"])
def test_the_same_bytes_give_the_same_pixels(server, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    expected = np.asarray(load_image(path))
    uri = "data:image/any;base64," + base64.b64encode(FILES[name]).decode()
    row = {"bytes": FILES[name], "path": "elsewhere"}
    sources = [str(path), FILES[name], uri, f"{server.url}/{name}", f"{server.url}/to=/{name}", row, Image.open(path)]
    for source in sources:
        image = load_image(source, allow_private_addresses=True)
        assert np.array_equal(np.asarray(image), expected)
        assert np.array_equal(np.asarray(load_image(image)), expected)  # nothing is applied twice


# ---- addresses


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"],
)
def test_private_addresses_are_refused(server, host):
    url = f"http://{host}:{server.server_port}/transparent.png"
    with pytest.raises(ValueError, match="which is not public; pass allow_private_addresses=True"):
        load_image(url)
    with pytest.raises(ValueError, match="which is not public"):
        NextFlowImageProcessorPil()(url)
    assert not server.seen


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("8.8.8.8", True), ("2606:4700::1", True), ("::ffff:8.8.8.8", True), ("10.0.0.1", False),
        ("100.64.0.1", False), ("172.16.0.1", False), ("192.168.0.1", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("fe80::1", False), ("fc00::1", False), ("fec0::1", False), ("ff02::1", False),
        ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("::a00:1", False), ("2002:7f00:1::", False),
        ("::", False),
    ],
)  # fmt: skip
def test_public_addresses(address, is_public):
    assert image_fetching_nextflow._is_public(address) == is_public


@pytest.fixture
def as_public(monkeypatch):
    """127.0.0.1 stands for a public address, the others of this machine stay private."""
    check = image_fetching_nextflow._is_public
    monkeypatch.setattr(
        image_fetching_nextflow, "_is_public", lambda address: address == "127.0.0.1" or check(address)
    )


def test_redirects_to_private_addresses_are_refused(server, as_public):
    assert load_image(f"{server.url}/to={server.url}/transparent.png").size == (20, 12)
    for target in (f"http://127.0.0.2:{server.server_port}/transparent.png", "http://[::1]/", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="is not public|is no http or https address"):
            load_image(f"{server.url}/to={target}")
    with pytest.raises(ValueError, match="redirects more than 5 times"):
        load_image(f"{server.url}/to=")
    assert {path for path, _ in server.seen[2:] if not path.startswith("/to=")} == set()


def test_a_name_is_resolved_once_and_its_checked_address_is_used(server, as_public, monkeypatch):
    resolve, asked = socket.getaddrinfo, []

    def rebinding(host, port, *args, **options):
        if host != "rebinding.test":
            ipaddress.ip_address(host)  # an address: nothing is left to resolve
            return resolve(host, port, *args, **options)
        asked.append(host)
        return resolve("127.0.0.1" if len(asked) == 1 else "127.0.0.2", port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    load_image(f"http://rebinding.test:{server.server_port}/transparent.png")
    assert asked == ["rebinding.test"] and server.seen == [
        ("/transparent.png", f"rebinding.test:{server.server_port}")
    ]
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, **_: [r for a in ("127.0.0.1", "127.0.0.2") for r in resolve(a, port)],
    )
    with pytest.raises(ValueError, match="has the address 127.0.0.2"):  # one private address among several is enough
        load_image(f"http://both.test:{server.server_port}/transparent.png")


def test_limits_of_bytes_and_time(server, monkeypatch):
    options = {"allow_private_addresses": True}
    size = len(FILES["big.png"])
    with pytest.raises(ValueError, match=f"big.png cannot be fetched: it has {size} bytes, expected at most 1000"):
        load_image(f"{server.url}/big.png", max_bytes=1000, **options)
    with pytest.raises(ValueError, match="endless cannot be fetched: it has more than 1000000 bytes"):
        load_image(f"{server.url}/endless", max_bytes=10**6, **options)
    with pytest.raises(ValueError, match="short cannot be fetched: it ends after 0 of 1000 bytes"):
        load_image(f"{server.url}/short", **options)
    with pytest.raises(ValueError, match="gone cannot be fetched: the server answers 404"):
        load_image(f"{server.url}/gone", **options)
    start = time.monotonic()
    with pytest.raises(ValueError, match="drip cannot be fetched: it takes more than 0.5 seconds"):
        load_image(f"{server.url}/drip", timeout=0.5, **options)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        url = f"127.0.0.1:{silent.getsockname()[1]}/a.png"
        for scheme in ("http", "https"):
            with pytest.raises(ValueError, match="it takes more than 0.3 seconds"):
                load_image(f"{scheme}://{url}", timeout=0.3, **options)
        monkeypatch.setattr(image_fetching_nextflow, "MAX_SILENCE", 0.3)
        with pytest.raises(ValueError, match="cannot be fetched: timed out"):
            load_image(f"http://{url}", **options)
    assert time.monotonic() - start < 5


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https_checks_the_certificate_of_the_name(server, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://localhost:{server.server_port}/transparent.png"
    with pytest.raises(ValueError, match="certificate verify failed"):
        load_image(url, allow_private_addresses=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert load_image(url, allow_private_addresses=True).size == (20, 12)
    with pytest.raises(ValueError, match="certificate verify failed"):
        load_image(url.replace("localhost", "127.0.0.1"), allow_private_addresses=True)


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://", "is no http or https address"),
        ("http://user:secret@127.0.0.1/", "contains a user name"),
        ("http://127.0.0.1:99999/", "out of range"),
        ("http://a..b/", "cannot be fetched"),
        ("http://no-such-host.invalid/a.png", "cannot be fetched"),
    ],
)
def test_addresses_that_are_none(url, cause):
    with pytest.raises(ValueError, match=cause):
        load_image(url, allow_private_addresses=True)


# ---- files


def test_the_header_is_checked_before_decoding(server, tmp_path, monkeypatch):
    def decode(*args):
        raise AssertionError("decoded")

    path = tmp_path / "big.png"
    path.write_bytes(FILES["big.png"])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for source in (path, FILES["big.png"], f"{server.url}/big.png"):
        with pytest.raises(ValueError, match="has 9000000 pixels"):
            load_image(source, 10**6, allow_private_addresses=True)
    with pytest.raises(ValueError, match=r"big.png' has \d+ bytes, expected at most 100"):
        load_image(path, max_bytes=100)


def test_formats_that_run_programs_are_refused(tmp_path):
    path = tmp_path / "image.png"  # whatever it is called
    path.write_bytes(encoded(Image.new("RGB", (9, 9)), "EPS"))
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match="not an image of the formats PNG, JPEG"):
            load_image(source)
    with Image.open(path) as image, pytest.raises(ValueError, match="has the format EPS, expected one of PNG"):
        load_image(image)


def test_a_pipe_is_no_image(tmp_path):
    subprocess.run(["mkfifo", tmp_path / "pipe.png"], check=True)
    with pytest.raises(ValueError, match="it is no regular file"):
        load_image(tmp_path / "pipe.png")


def test_errors_of_pillow_name_the_image(tmp_path):
    # An 8-bit BMP that claims a palette of 300 colours.
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 0, 64, 2835, 2835, 300, 0)
    bmp = b"BM" + struct.pack("<IHHI", 1318, 0, 0, 1254) + header + bytes(1264)
    path = tmp_path / "b.bmp"
    path.write_bytes(bmp)
    with pytest.raises(ValueError, match="b.bmp' is truncated, corrupt or not an image: invalid palette size"):
        load_image(path)
    with pytest.raises(ValueError, match=r"images\[1\] is truncated, corrupt"):
        NextFlowImageProcessorPil()([Image.new("RGB", (64, 64)), bmp])
    with pytest.raises(TypeError, match=r"images\[0\] is a int"):
        NextFlowImageProcessorPil()([3, bmp])


def test_layers_of_photoshop_are_their_composite():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(psd()).getcolors() == [(64, (200, 200, 200))]


# ---- colours


def test_embedded_profiles_are_converted():
    expected = Image.new("RGB", (9, 9), (200, 100, 50))
    profile = io.BytesIO(swapped_profile())
    expected = ImageCms.profileToProfile(expected, profile, ImageCms.createProfile("sRGB")).getpixel((0, 0))
    assert np.abs(np.subtract(expected, (200, 100, 50))).max() > 20
    assert load_image(FILES["wide.png"]).getpixel((0, 0)) == expected
    palette = Image.new("RGB", (9, 9), (200, 100, 50)).quantize()
    assert load_image(encoded(palette, icc_profile=swapped_profile())).getpixel((0, 0)) == expected
    clear = Image.new("RGBA", (9, 9), (200, 100, 50, 0))
    assert load_image(encoded(clear, icc_profile=swapped_profile())).getpixel((0, 0)) == (255, 255, 255)
    gray = Image.new("L", (9, 9), 100)
    assert len(set(load_image(encoded(gray, icc_profile=swapped_profile())).getpixel((0, 0)))) == 1


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_broken_and_foreign_profiles_are_ignored_with_a_warning(mode):
    profile = b"broken" * 40 if mode == "RGB" else swapped_profile()
    image = Image.new(mode, (9, 9), "red")
    plain = load_image(encoded(image, "TIFF")).getpixel((0, 0))
    with pytest.warns(UserWarning, match="the colour profile of the image file of .* is ignored"):
        assert load_image(encoded(image, "TIFF", icc_profile=profile)).getpixel((0, 0)) == plain


# ---- 16 bits


def test_depth_is_that_of_the_header(tmp_path):
    dark = np.full((9, 9), 200, np.uint16)
    assert load_image(encoded(Image.fromarray(dark))).getpixel((0, 0)) == (1, 1, 1)  # 200 of 65535
    pgm = b"P5 9 9 1000 " + np.full((9, 9), 500, ">u2").tobytes()
    assert load_image(pgm).getpixel((0, 0)) == (128, 128, 128)  # Pillow: mode I
    deep = Image.fromarray(gradient())
    for format in ("PNG", "TIFF", "PPM", "JPEG2000"):
        assert (np.asarray(load_image(encoded(deep, format)))[..., 0] == np.arange(256).reshape(16, 16)).all()


@pytest.mark.parametrize("value", [0, 1, 200, 255, 256, 51 * 257, 65535])
def test_integers_of_no_known_depth_are_not_black(tmp_path, value):
    expected = value if value <= 255 else round(value / 257)
    signed = Image.fromarray(np.full((9, 9), value, np.int32))
    sources = [
        signed,
        encoded(signed, "TIFF"),
        np.full((9, 9), value, np.uint16),
        np.full((9, 9, 3), value, np.uint16),
    ]
    sources.append(Image.fromarray(np.full((9, 9), value, np.uint16)))
    for source in sources:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_image(source).getpixel((0, 0)) == (expected,) * 3
        is_wide = not isinstance(source, bytes) and source is not signed
        assert bool(caught) == (is_wide and 0 < value <= 255)
    with pytest.raises(ValueError, match=r"integers in \[70000, 70000\], expected \[0, 65535\]"):
        load_image(encoded(Image.fromarray(np.full((9, 9), 70000, np.int32)), "TIFF"))


def test_transparency_of_16_bits():
    values = gradient()
    image = load_image(encoded(Image.fromarray(values), transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 0)) == (1, 1, 1)


def test_one_file_and_a_dictionary_are_named():
    for source, name in (({"bytes": b"no", "path": "a.png"}, "a.png"), ({"bytes": None, "path": "b.png"}, "b.png")):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            load_image(source)
    with pytest.raises(TypeError, match="is a dict"):
        load_image({"bytes": None, "path": None})
