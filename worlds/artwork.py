"""Emoji artwork: npm packages of pinned version and checksum, joined by name, rendered once to a cache of rasters.

Nothing of it is part of this repository. Five packages have the drawings (Apache-2.0 and MIT, in Iconify's JSON
layout), `emojibase-data` (MIT) has the words: labels, tags, groups and skin tones. Rendering needs `resvg-py`.
"""

import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..atomic import write_file
from .sprites import MIPMAPS, RASTER, Concept, Sprite, scaled


# Style (in the order of preference where none is named) -> npm package, version, SHA-256 of its archive.
PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "glossy": (
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "flat": (
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "blob": ("@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "firefox": ("@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "words": ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
}
STYLES = tuple(PACKAGES)[:-1]
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_SHORTCODES = ("cldr", "emojibase", "github")
_GROUPS = ("smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities")
_GROUPS += ("objects", "symbols")  # not: components, flags
MIN_STYLES = 3
_CHUNK = 256  # sprites in a file of rasters

# What some names mean, which is something else than elsewhere ("": nothing that emojibase has). Firefox names a whole
# animal after its side; its plain names are the faces.
_ANIMALS = ("dog", "cat", "pig", "mouse", "tiger")
_MEANT = {("blob", "cricket"): "", ("blob", "keycap"): ""}
_MEANT |= {("firefox", name): "" for name in ("pout", "down", "couple", "window", "keyboard")}
_MEANT |= {("firefox", "wave"): "water-wave", ("firefox", "sunglasses"): "smiling-face-with-sunglasses"}
_MEANT |= {("firefox", name): f"{name}-face" for name in _ANIMALS}
_MEANT |= {("firefox", f"{name}side"): name for name in _ANIMALS}

# Emoji that a person confuses, and that at least two styles draw almost alike, are one concept, drawn as the first of
# them that has the most styles.
_ROLES = "astronaut|firefighter|guard|superhero|supervillain"
_ACTIVITIES = (
    "biking|cartwheeling|climbing|golfing|kneeling|mountain biking|rowing boat|running|standing|surfing|swimming|"
    "walking|wearing turban|in manual wheelchair|in motorized wheelchair|with bunny ears|with white cane"
)
_NEUTRAL = ("child", "older person", "pregnant person", "with crown", "Mx Claus")
MERGED = {
    **{role: rf"(man|woman) {role}" for role in _ROLES.split("|")},
    **{f"person {name}": rf"(man|woman|men|women) {name}" for name in _ACTIVITIES.split("|")},
    "astonished face": r"(hushed|astonished) face",
    "calendar": r"(tear-off )?calendar",
    "cat face": r"cat face|grinning cat( with smiling eyes)?",
    "brightness button": r"(dim|bright) button",
    "face with horns": r"(smiling|angry) face with horns",
    "kissing face with closed eyes": r"kissing face with (closed|smiling) eyes",
    "six-pointed star": r"star of David|dotted six-pointed star",
    "snowman": r"snowman( without snow)?",
    "clock face": r"\w+( o’clock|-thirty)",
    "crescent moon": r"((waxing|waning) )?crescent moon",
    "gibbous moon": r"(waxing|waning) gibbous moon",
    "quarter moon": r"(first|last) quarter moon",
    "quarter moon face": r"(first|last) quarter moon face",
    "hourglass": r"hourglass (not )?done",
    "globe": r"globe showing .*",
    "closed mailbox": r"closed mailbox with .*",
    "open mailbox": r"open mailbox with .*",
    "sun behind cloud": r"sun behind (small |large )?cloud",
    "black square": r"black (large|medium|medium-small|small) square",
    "white square": r"white (large|medium|medium-small|small) square",
    "orange diamond": r"(large|small) orange diamond",
    "blue diamond": r"(large|small) blue diamond",
    "family": r"family.*",
    "kiss": r"kiss(: .*)?",
    "couple with heart": r"couple with heart(: .*)?",
}
_FACING = ": facing right"  # a mirrored drawing: one concept with the one that it mirrors


def fetch_archives(folder: Path) -> dict[str, Path]:
    """Return the archive in `folder` of every style and of "words"; fetch missing ones by `npm pack` and check all."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = {}
    for key, (package, version, checksum) in PACKAGES.items():
        path = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            if shutil.which("npm") is None:
                raise FileNotFoundError(f"{path} is not there, and npm, which fetches it, is not installed")
            command = ["npm", "pack", "--silent", f"{package}@{version}", "--pack-destination", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"{path} was not fetched: `{shlex.join(command)}` failed: {done.stderr.strip()[-300:]}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != checksum:
            raise ValueError(f"{path} has the SHA-256 {found}, expected {checksum}: delete it to fetch it again")
        archives[key] = path
    return archives


@dataclass(frozen=True)
class Drawing:
    """A sprite and its SVG."""

    sprite: Sprite
    svg: str
    mirrored: bool = False


def read_artwork(archives: dict[str, Path]) -> tuple[dict[str, Concept], list[Drawing]]:
    """Read the concepts that at least `MIN_STYLES` styles draw, by name, and their drawings in all skin tones."""
    words = _Archive(archives["words"])
    icons = {style: _Icons(_Archive(archives[style]), style) for style in archives if style != "words"}
    entries = _merge(_entries(words), icons)
    shared = Counter(synonym for entry in entries for synonym in {entry.name, *entry.synonyms})
    concepts, drawings = {}, []
    for entry in entries:
        synonyms = tuple(word for word in dict.fromkeys(entry.synonyms) if shared[word] == 1 and word != entry.name)
        concepts[entry.name] = Concept(entry.name, synonyms, entry.group, entry.code)
        for style, of_style in icons.items():
            if name := of_style.find(entry):
                drawings.append(Drawing(Sprite(entry.name, style), *of_style.svg(name)))
                tones = of_style.tones(entry)
                drawings += [Drawing(Sprite(entry.name, style, t), *of_style.svg(n)) for t, n in tones.items()]
    return concepts, drawings


class Rasters:
    """
    The sprites as images, mapped from `folder`. What is not rendered yet is, in files that are complete or not there;
    an interrupted rendering goes on.
    """

    def __init__(self, folder: Path, drawings: list[Drawing]):
        self.numbers = {drawing.sprite: number for number, drawing in enumerate(drawings)}
        folder.mkdir(parents=True, exist_ok=True)
        self._chunks = []
        for start in tqdm(range(0, len(drawings), _CHUNK), desc="artwork", unit=f"{_CHUNK} sprites"):
            chunk = drawings[start : start + _CHUNK]
            signature = hashlib.sha256("".join(d.svg for d in chunk).encode()).hexdigest()[:12]
            path = folder / f"{start:06d}-{RASTER}-{signature}.npy"
            if not path.exists():
                rasters = np.stack([np.asarray(render_svg(drawing)) for drawing in chunk])
                write_file(path, partial(np.save, arr=rasters))
            self._chunks.append(np.load(path, mmap_mode="r"))
        self.levels = lru_cache(maxsize=2048)(self._levels)

    def draw(self, sprite: Sprite, size: int) -> Image.Image:
        """Return the sprite at a size in pixels, as premultiplied "RGBa"."""
        return scaled(self.levels(sprite), size)

    def _levels(self, sprite: Sprite) -> list[Image.Image]:
        chunk, place = divmod(self.numbers[sprite], _CHUNK)
        image = Image.fromarray(np.array(self._chunks[chunk][place]), "RGBA").convert("RGBa")  # premultiplied
        return [image.reduce(RASTER // size) if size < RASTER else image for size in MIPMAPS]


def render_svg(drawing: Drawing) -> Image.Image:
    """Render a drawing as RGBA, `RASTER` pixels square."""
    import resvg_py

    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=drawing.svg)))).convert("RGBA")
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawing.mirrored else image


@dataclass
class _Entry:
    """An emoji of emojibase: its words and, in order of preference, lists of names that a drawing of it may have."""

    name: str
    label: str
    code: str
    group: str
    synonyms: list[str]
    names: list[list[str]]
    tones: dict[str, str]  # tone -> hexcode


class _Archive:
    def __init__(self, path: Path):
        self._files, wanted = {}, ("icons.json", "chars.json", "en/data.json", "meta/groups.json")
        wanted += ("meta/unicode-names.json", *(f"en/shortcodes/{name}.json" for name in _SHORTCODES))
        with tarfile.open(path) as tar:
            for member in tar:
                if (name := member.name.removeprefix("package/")) in wanted:
                    self._files[name] = json.load(tar.extractfile(member))

    def __getitem__(self, name: str) -> dict:
        return self._files.get(name, {})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[’'“”.]", "", text.lower())).strip("-")


def _plain(code: str) -> str:
    return code.upper().replace("-FE0F", "")


def readable(label: str) -> str:
    """Word a label as people would write it: `person: blond hair` is a person with blond hair."""
    label = re.sub("[“”]", "", label).replace("’", "'")
    label = re.sub(r"^(.*): bald$", r"bald \1", label)
    label = re.sub(r"^keycap: ", "keycap ", label)
    return re.sub(r"\s*\(blood type\)|\s*\(clockwise\)", "", label).replace(": ", " with ")


def _entries(words: _Archive) -> list[_Entry]:
    groups = words["meta/groups.json"]["groups"]
    unicode_names = {_plain(code): name.lower() for code, name in words["meta/unicode-names.json"].items()}
    shortcodes: dict[str, list[str]] = {}
    for name in _SHORTCODES:
        for code, found in words[f"en/shortcodes/{name}.json"].items():
            shortcodes.setdefault(_plain(code), []).extend([found] if isinstance(found, str) else found)
    entries = []
    for item in words["en/data.json"]:
        if groups.get(str(item.get("group"))) not in _GROUPS:
            continue
        code = _plain(item["hexcode"])
        formal = [unicode_names[code]] if "," not in unicode_names.get(code, ",") else []
        short = [found for found in shortcodes.get(code, []) if re.fullmatch(r"[a-z_]{3,}", found)]
        is_thing = groups[str(item["group"])] in _GROUPS[2:-1]  # tags of faces and signs are not names of them
        tags = [tag for tag in item.get("tags", []) if is_thing and re.fullmatch(r"[a-z ]{2,}[a-rt-z]", tag)]
        entries.append(
            _Entry(
                name=readable(item["label"]),
                label=item["label"],
                code=code,
                group=groups[str(item["group"])],
                synonyms=[*formal, *(found.replace("_", " ") for found in short), *tags],
                names=[[_slug(item["label"])], [_slug(name) for name in formal], [_slug(name) for name in short]],
                tones={
                    TONES[skin["tone"] - 1]: _plain(skin["hexcode"])
                    for skin in item.get("skins", [])
                    if isinstance(skin["tone"], int)
                },
            )
        )
    return entries


def _merge(entries: list[_Entry], icons: dict[str, "_Icons"]) -> list[_Entry]:
    """
    Those with enough styles, with confusable ones as one. Where a man and a woman are told apart, the person that is
    neither is left out: most styles draw it as one of them.
    """
    for of_style in icons.values():
        of_style.claim(entries)
    labels = {entry.label for entry in entries} | {f"{pair} {name}" for name in _NEUTRAL for pair in ("man", "woman")}
    merged: dict[str, list[_Entry]] = {}
    for entry in entries:
        gendered, is_person = re.subn(r"^(person|people)\b", "{}", entry.label)
        gendered = gendered if is_person else f"{{}} {entry.label}"
        if any({gendered.format(word) for word in pair} <= labels for pair in (("man", "woman"), ("men", "women"))):
            continue
        label = entry.label.removesuffix(_FACING)
        names = [name for name, pattern in MERGED.items() if re.fullmatch(pattern, label)]
        merged.setdefault(names[0] if names else readable(label), []).append(entry)
    kept = []
    for name, members in merged.items():
        counts = [sum(of_style.find(entry) is not None for of_style in icons.values()) for entry in members]
        if max(counts) >= MIN_STYLES:
            best = members[counts.index(max(counts))]
            kept.append(_Entry(**{**vars(best), "name": name, "synonyms": best.synonyms if len(members) == 1 else []}))
    return kept


class _Icons:
    """The drawings of a style, by name, without deprecated ones."""

    def __init__(self, archive: _Archive, style: str):
        self._data, self._style = archive["icons.json"], style
        self._aliases = self._data.get("aliases", {})
        shown = {name for name, icon in self._data["icons"].items() if not icon.get("hidden")}
        self._names = shown | {name for name, alias in self._aliases.items() if alias["parent"] in shown}
        self._codes = {_plain(code): name for code, name in archive["chars.json"].items()}
        # Firefox writes names without "-".
        self._spelled = {_MEANT.get((style, name), name).replace("-", ""): name for name in sorted(self._names)}
        self._claimed: dict[str, str] = {}  # hexcode of an emoji -> name

    def claim(self, entries: list[_Entry]) -> None:
        """Assign a drawing to every emoji by hexcode, label, formal or short name; no drawing is assigned twice."""
        taken = set()
        for entry in entries:
            if self._codes.get(entry.code) in self._names:
                self._claimed[entry.code] = self._codes[entry.code]
                taken.add(self._codes[entry.code])
        for level in range(3):
            claims = {}
            for entry in entries:
                for name in entry.names[level] if entry.code not in self._claimed else ():
                    found = self._spelled.get(name.replace("-", ""))
                    if found and found not in taken:
                        claims.setdefault(found, entry.code)
            self._claimed |= {code: name for name, code in claims.items()}
            taken |= set(claims)

    def find(self, entry: _Entry) -> str | None:
        return self._claimed.get(entry.code)

    def tones(self, entry: _Entry) -> dict[str, str]:
        """Return the drawings of all five tones of an emoji, or nothing."""
        name, found = self.find(entry), {}
        for tone, code in entry.tones.items():
            names = (self._codes.get(code), f"{name}-{tone}-skin-tone", f"{name}-{tone}")
            if existing := [option for option in names if option in self._names]:
                found[tone] = existing[0]
        return found if len(found) == len(TONES) else {}

    def svg(self, name: str) -> tuple[str, bool]:
        """Return the SVG of a drawing, and whether it has to be mirrored."""
        alias = {} if name in self._data["icons"] else self._aliases[name]
        icon = self._data["icons"][alias.get("parent", name)]
        width, height = (icon.get(side, self._data.get(side, 16)) for side in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{RASTER}" height="{RASTER}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        return svg, bool(alias.get("hFlip"))
