"""Imports point one way, and the package opens without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import trilobit

ORDER = [
    "errors", "locks", "storage", "tensors", "listener", "corpus", "config", "recipes", "quant", "formats", "kernels", "nn",
    "surgery", "infer", "measure", "fourbit", "export", "train", "report", "demo", "doctor", "cli",
]  # fmt: skip
ROOT = Path(trilobit.__file__).parent


def imported(source: str) -> set[str]:
    """Names directly under `trilobit` that a source file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trilobit.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            if node.module == "trilobit":
                names |= {alias.name for alias in node.names if alias.name in ORDER}
            elif node.module and node.module.startswith("trilobit."):
                names.add(node.module.split(".")[1])
    return names


def violations(package: str, source: str) -> set[str]:
    return {name for name in imported(source) if name not in ORDER or ORDER.index(name) > ORDER.index(package)}


def test_imports_point_one_way() -> None:
    """A file of src/trilobit imports only from its own package or from those before it in design.md's order."""
    files = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py" and path != ROOT / "__main__.py"]
    packages = {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files}
    assert set(packages.values()) <= set(ORDER), set(packages.values()) - set(ORDER)
    wrong = {str(p.relative_to(ROOT)): bad for p in files if (bad := violations(packages[p], p.read_text("utf-8")))}
    assert not wrong
    assert violations("quant", "from trilobit import kernels") == {"kernels"}
    assert violations("nn", "def f():\n    import trilobit.surgery.roles") == {"surgery"}
    assert not violations("nn", "from trilobit.quant import fade")


def test_package_imports_no_torch() -> None:
    """`import trilobit` and its configurations load neither torch nor transformers."""
    code = "import sys, trilobit, trilobit.config; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
