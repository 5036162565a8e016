"""Figures of the code base as a Markdown table: size, functions, comments, types, circles of imports.

    python benchmarks/house.py            # of this checkout
    python benchmarks/house.py ../old     # of another one

Counts the package alone: no tests, benchmarks, docs, examples or integrations. Type errors are basedpyright's, of its
basic mode.
"""

import ast
import io
import json
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path


LEFT_OUT = {"tests", "benchmarks", "docs", "examples", "integrations", "build", "dist"}
TYPED_PACKAGES = ("modeling_nextflow", "conversion", "processing", "pipelines")
MOST_LINES, MOST_BASES = 600, 2


class Module:
    """A file of the package: its tree, and the lines that are code or comments."""

    def __init__(self, path: Path, root: Path):
        self.name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        self.room = path.relative_to(root).parts[0] if path.parent != root else "root"
        self.is_package = path.name == "__init__.py"
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.lines = self.text.count("\n")
        tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        self.comments = sum(token.type == tokenize.COMMENT for token in tokens)
        docstrings = {
            line
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            for line in range(node.lineno, node.end_lineno + 1)
        }
        skipped = {
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        }
        code = {line for t in tokens if t.type not in skipped for line in range(t.start[0], t.end[0] + 1)}
        self.code = len(code - docstrings)

    def nodes(self, kind: type | tuple[type, ...]) -> list:
        return [node for node in ast.walk(self.tree) if isinstance(node, kind)]

    def imports(self, names: set[str]) -> set[str]:
        """Modules of the package that are imported when this one is: not in functions, not for type checkers."""
        found, waiting = set(), list(self.tree.body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.ImportFrom):
                parts = self.name.split(".")[: len(self.name.split(".")) - node.level + self.is_package]
                base = ".".join([*parts, node.module or ""]) if node.level else node.module
                base = base.strip(".").removeprefix("nextflow_hf").removeprefix(".")
                found |= {base, *(f"{base}.{alias.name}" for alias in node.names)} & names
            elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                waiting += list(ast.iter_child_nodes(node))
        return found - {self.name}


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity, in radon's way of counting; without the functions inside."""
    count, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            count += 1 + bool(node.orelse)
        count += isinstance(node, (ast.If, ast.IfExp, ast.ExceptHandler, ast.Assert, ast.match_case))
        waiting += ast.iter_child_nodes(node)
    return count


def circles(edges: dict[str, set[str]]) -> int:
    """Groups of nodes that reach each other."""

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for found in edges.get(waiting.pop(), set()) - seen:
                seen.add(found)
                waiting.append(found)
        return seen

    reached = {name: reach(name) for name in edges}
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in edges if a in reached[a]}
    return len(groups)


def output_of(*command: str, root: Path) -> str:
    return subprocess.run([sys.executable, "-m", *command], cwd=root, capture_output=True, text=True).stdout


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    paths = sorted(path for path in root.rglob("*.py") if not path.relative_to(root).parts[0].startswith("."))
    modules = [Module(path, root) for path in paths if path.relative_to(root).parts[0] not in LEFT_OUT]
    functions = [node for module in modules for node in module.nodes((ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions)
    classes = [node for module in modules for node in module.nodes(ast.ClassDef)]
    own = {node.name for node in classes}
    wide = [c.name for c in classes if sum(ast.unparse(base).split(".")[-1] in own for base in c.bases) > MOST_BASES]
    names = {module.name for module in modules}
    imports = {module.name: module.imports(names) for module in modules}
    room_of = {module.name: module.room for module in modules}
    rooms: dict[str, set[str]] = {room: set() for room in room_of.values()}
    for name, imported in imports.items():
        rooms[room_of[name]] |= {room_of[other] for other in imported} - {room_of[name]}
    lines, code = Counter(), Counter()
    for module in modules:
        lines[module.room] += module.lines
        code[module.room] += module.code
    complexities = sorted(((complexity(node), node.name) for node in functions), reverse=True)
    above_15, above_20 = (sum(number > limit for number, _ in complexities) for limit in (15, 20))
    types = json.loads(output_of("basedpyright", "--outputjson", *TYPED_PACKAGES, root=root) or "{}")
    comments = sum(module.comments for module in modules)
    total = sum(code.values())
    rows = {
        "lines": f"{sum(lines.values()):,}",
        "lines of code": f"{total:,}",
        "functions: number, median and p90 length": f"{len(lengths):,}, {statistics.median(lengths):.0f}, "
        f"{lengths[len(lengths) * 9 // 10]}",
        "complexity: functions above 15, above 20, highest": f"{above_15}, {above_20}, {complexities[0][0]} "
        f"(`{complexities[0][1]}`)",
        "comments per 100 lines of code": f"{100 * comments / total:.1f}",
        "files that open with their contract": f"{sum(bool(ast.get_docstring(m.tree)) for m in modules)} of "
        f"{len(modules)}",
        f"classes with more than {MOST_BASES} own bases": ", ".join(wide) or 0,
        f"files above {MOST_LINES} lines": sum(module.lines > MOST_LINES for module in modules),
        "type errors (modeling, conversion, processing, pipelines)": types.get("summary", {}).get("errorCount", "?"),
        "ignored type errors": sum(module.text.count("pyright: ignore") for module in modules),
        "circles of imports: modules, rooms": f"{circles(imports)}, {circles(rooms)}",
    }
    print("| figure | |\n|---|---:|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    print("\n| room | lines | of code |\n|---|---:|---:|")
    print("\n".join(f"| {room} | {lines[room]:,} | {code[room]:,} |" for room in sorted(lines)))


if __name__ == "__main__":
    main()
