"""Distil a large sentence-embedding model into a small fast one, and say how much was kept.

from embedistill import compare, distill, evaluate, load_recipe

run = distill(load_recipe("quickstart"), "runs/mine")
print(run.report.retention("known-item"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedistill.judgement import compare, evaluate
    from embedistill.leaderboard import benchmark
    from embedistill.pipeline import Run, distill
    from embedistill.recipe import Recipe, load_recipe

__all__ = ["Recipe", "Run", "benchmark", "compare", "distill", "evaluate", "load_recipe"]

_HOMES = {
    "Recipe": "recipe",
    "Run": "pipeline",
    "benchmark": "leaderboard",
    "compare": "judgement",
    "distill": "pipeline",
    "evaluate": "judgement",
    "load_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that checking a recipe does not wait for torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'embedistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"embedistill.{_HOMES[name]}"), name)
