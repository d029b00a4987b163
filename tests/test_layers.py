"""Data flows one way, and so do imports."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "embedistill"
ORDER = [
    "errors",
    "choices",
    "files",
    "progress",
    "ranks",
    "recipe",
    "hub",
    "architectures",
    "corpus",
    "wheels",
    "cache",
    "teacher",
    "encoding",
    "student",
    "training",
    "evaluation",
    "forecast",
    "report",
    "search",
    "sources",
    "stages",
    "precomputation",
    "outlook",
    "judgement",
    "leaderboard",
    "teaching",
    "examination",
    "material",
    "construction",
    "pipeline",
    "cli",
]


def test_imports_point_to_the_left() -> None:
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module.startswith("__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("embedistill"):
                names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
                for name in names:
                    seen += 1
                    assert ORDER.index(name) <= ORDER.index(module), f"{path.name} imports {name}"
    assert seen > 50


def test_only_what_makes_a_run_knows_a_recipe() -> None:
    knowing = {
        path.relative_to(PACKAGE).with_suffix("").parts[0]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("embedistill.recipe")
    }
    assert knowing - {"__init__", "recipe"} == {
        "sources",
        "stages",
        "precomputation",
        "outlook",
        "teaching",
        "examination",
        "construction",
        "pipeline",
        "cli",
    }
