"""A Sphinx extension for Hugging Face docstrings.

Autodoc expects reStructuredText. Our docstrings are Markdown with sections `Args:`, `Attributes:`, `Returns:`,
`Raises:` and `Example:`, whose entries read ``name (`type`, *optional*, defaults to `x`): text``. This extension turns
one into the other, and adds the directive `public-api`, which documents the public names of a part of the package.
"""

import re

from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import nextflow_hf


# Section -> field of an info field list.
SECTIONS = {"Args": "param", "Attributes": "ivar", "Returns": "returns", "Yields": "returns", "Raises": "raises"}
EXAMPLES = ("Example", "Examples")
_ENTRY = re.compile(r"(?P<names>[*\w]+(?:, [*\w]+)*) ?(?:\((?P<kind>.*?)\))?:(?: (?P<text>.*))?$", re.DOTALL)
_HEADING = re.compile(r"(\w+):$")


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a Hugging Face docstring, whose own indentation is gone, as reStructuredText."""
    output: list[str] = []
    for name, block in _sections(lines):
        if name in SECTIONS:
            output += _fields(SECTIONS[name], block)
        else:
            if name:
                output += [f".. rubric:: {name}", ""]
            output += _paragraphs(block)
        output.append("")
    return output


def _sections(lines: list[str]) -> list[tuple[str | None, list[str]]]:
    """(heading or `None`, lines below it without their indentation)."""
    found: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in lines:
        heading = _HEADING.match(line)
        if heading and heading[1] in (*SECTIONS, *EXAMPLES):
            found.append((heading[1], []))
        elif found[-1][0] and line and not line.startswith(" "):  # the section ends where the indentation does
            found.append((None, [line]))
        else:
            found[-1][1].append(line)
    return [(name, _dedented(block)) for name, block in found]


def _dedented(lines: list[str]) -> list[str]:
    widths = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    return [line[min(widths, default=0) :] for line in lines]


def _fields(field: str, lines: list[str]) -> list[str]:
    entries: list[list[str]] = []
    for line in lines:
        if line and not line.startswith(" ") and (_ENTRY.match(line) or not entries or field == "returns"):
            if field == "returns" and entries:
                entries[0].append(f"    {line}")
                continue
            entries.append([line])
        elif entries:
            entries[-1].append(line)
    output = []
    for head, *rest in entries:
        output += _field(field, head, rest)
    return output


def _field(field: str, head: str, rest: list[str]) -> list[str]:
    match = _ENTRY.match(head) if field != "returns" else None
    if match is None:
        return _labelled(f":{field}:", [head, *_dedented(rest)])
    text = [match["text"] or "", *_dedented(rest)]
    if match["kind"]:
        text[0] = f"({match['kind']}) {text[0]}".strip()
    names = match["names"].replace(" ", "")  # what stands before a space is read as a type
    return _labelled(f":{field} {names}:".replace("*", r"\*"), text)


def _labelled(label: str, text: list[str]) -> list[str]:
    first, *rest = _paragraphs(text) or [""]
    return [f"{label} {first}".rstrip(), *(f"    {line}".rstrip() for line in rest)]


def _paragraphs(lines: list[str]) -> list[str]:
    """Markdown as reStructuredText: code blocks, lists, indented blocks, inline code."""
    output: list[str] = []
    fence = False
    for index, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            fence = not fence
            output += ["", ".. code-block:: python", ""] if fence else [""]
        elif fence:
            output.append(f"    {line}")
        elif line.startswith("    ") and not (output and output[-1].lstrip().startswith("- ")):
            if index == 0 or not lines[index - 1].startswith("    "):
                output += ["", ".. code-block:: text", ""]
            output.append(f"    {line}")
        else:
            if line.startswith("- ") and output and output[-1] and not output[-1].startswith(("- ", "  ")):
                output.append("")
            if output and output[-1].startswith("    ") and line:
                output.append("")
            output.append(_inline(line))
    return output


def _inline(line: str) -> str:
    """Inline code and cross references; anything else that reStructuredText would read is escaped."""
    pieces = re.split(r"(\[`[^`]+`\]|`+[^`]+`+)", line)
    for index, piece in enumerate(pieces):
        if index % 2:
            code = piece.removeprefix("[").removesuffix("]") if piece.startswith("[`") else piece
            code = code.strip("`").removeprefix("~")
            after = pieces[index + 1][:1]
            pieces[index] = f"``{code}``" + ("\\ " if after.isalnum() else "")
        else:
            piece = re.sub(r"(?<!\w)\*optional\*(?!\w)", "\0", piece)
            piece = re.sub(r"([*|\\])", r"\\\1", piece)
            pieces[index] = re.sub(r"_(?!\w)", r"\\_", piece).replace("\0", "*optional*")
    return "".join(pieces)


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def public_names(*parts: str) -> list[str]:
    """Public names whose modules lie in one of these folders, in the order of nextflow_hf/__init__.py."""
    modules = nextflow_hf._MODULE_OF_NAME
    return [name for name, module in modules.items() if module.startswith(parts)]


class PublicApi(SphinxDirective):
    """`public-api` FOLDER: everything public of a folder of the package."""

    required_arguments = 1
    optional_arguments = 8

    def run(self) -> list:
        lines = ["```{eval-rst}"]
        for name in public_names(*self.arguments):
            is_class = isinstance(getattr(nextflow_hf, name), type)
            lines += [f".. auto{'class' if is_class else 'function'}:: nextflow_hf.{name}"]
            lines += ["   :members:", "   :special-members: __call__"] if is_class else []
            lines += [""]
        return self.parse_text_to_nodes(StringList([*lines, "```"], source="public-api"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    app.add_directive("public-api", PublicApi)
    return {"parallel_read_safe": True}
