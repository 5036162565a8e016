"""Artwork in the layout of the emoji's npm packages, drawn here: simple shapes, two of them with skin tones."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from nextflow_hf.worlds import artwork, emoji


NAMES = (
    *("red ball", "blue box", "green hill", "tall tower", "wide river", "octopus", "man shrugging", "woman shrugging"),
    *("fox", "chopsticks", "twelve o’clock", "one o’clock", "waving hand", "rare thing"),
)
WITH_TONES = ("waving hand", "man shrugging")
_SHAPES = (
    '<circle cx="{x}" cy="50" r="34" fill="{a}"/>',
    '<rect x="{x}" y="20" width="52" height="60" fill="{a}"/>',
    '<polygon points="{x},8 92,90 8,90" fill="{a}"/>',
    '<rect x="14" y="{x}" width="72" height="22" fill="{a}"/><circle cx="50" cy="70" r="18" fill="{b}"/>',
    '<ellipse cx="50" cy="{x}" rx="42" ry="24" fill="{a}"/><rect x="44" y="10" width="12" height="80" fill="{b}"/>',
)


def _svg(name: str, style: str) -> str:
    value = hashlib.sha256(name.encode()).digest()
    light = {"noto": 0, "glossy": 40, "flat": 80, "blob": 120, "firefox": 160}[style]
    a, b = (f"#{value[i] % 200:02x}{(value[i + 1] + light) % 256:02x}{value[i + 2] % 200:02x}" for i in (0, 3))
    frame = f'<path d="M2 2h96v96h-96z" fill="none" stroke="{b}" stroke-width="{2 + light / 16}"/>'
    return frame + _SHAPES[value[7] % len(_SHAPES)].format(x=24 + value[8] % 40, a=a, b=b)


def _archive(path: Path, files: dict[str, object]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _codes() -> dict[str, str]:
    return {name: f"1F{600 + index}" for index, name in enumerate(NAMES)}


def write_archives(folder: Path) -> dict[str, Path]:
    """Style (or "words") -> archive, under the names of the real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for style, (package, version, _) in artwork.PACKAGES.items():
        paths[style] = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
        if style == "words":
            continue
        names = [name for name in NAMES if style in ("noto", "glossy") or name != "rare thing"]
        names = [name for name in names if style != "firefox" or name in NAMES[:6]]
        slugs = {artwork._slug(name): name for name in names}
        icons = {slug: {"body": _svg(name, style)} for slug, name in slugs.items()}
        for name in WITH_TONES if style in ("noto", "flat") else ():
            slug = artwork._slug(name)
            icons |= {f"{slug}-{t}": {"body": _svg(f"{name} {t}", style)} for t in artwork.TONES}
        icons["old-box"] = {"body": "", "hidden": True}
        aliases = {"red-ball": {"parent": "octopus", "hFlip": True}} if style == "firefox" else {}
        for alias in aliases:
            del icons[alias]
        _archive(paths[style], {"icons.json": {"icons": icons, "aliases": aliases, "width": 100, "height": 100}})
    codes = _codes()
    data = [{"label": name, "hexcode": code, "group": 3, "tags": ["toy", name[:3]]} for name, code in codes.items()]
    for item in data:
        if item["label"] in WITH_TONES:
            item["skins"] = [{"tone": i + 1, "hexcode": f"{item['hexcode']}-{i}"} for i in range(5)]
    data.append({"label": "a flag", "hexcode": "1F1E6", "group": 9})
    _archive(
        paths["words"],
        {
            "en/data.json": data,
            "meta/groups.json": {"groups": {"3": "animals-nature", "9": "flags"}},
            "meta/unicode-names.json": {codes["octopus"]: "EIGHT ARMS"},
            **{f"en/shortcodes/{name}.json": {codes["fox"]: "red_fox"} for name in artwork._SHORTCODES},
        },
    )
    return paths


def toy_sprites(folder: Path):
    """The toy world's sprites, rendered below `folder`."""
    concepts, drawings = artwork.read_artwork(write_archives(folder / "artwork"))
    return emoji.make_sprites(concepts, artwork.Rasters(folder / "sprites", drawings))
