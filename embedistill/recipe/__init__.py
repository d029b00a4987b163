"""The recipe: what to distil, from what, into what. Strict models, YAML with line numbers, key=value overrides.

A recipe has a closed vocabulary. All that is wrong with one is said at once, before anything is loaded or downloaded.
Nothing here imports torch, so that checking a recipe takes a fraction of a second.
"""

from embedistill.recipe.loading import (
    REMOTE_SOURCES,
    Setting,
    dump_recipe,
    find_recipe,
    list_recipes,
    list_settings,
    load_recipe,
)
from embedistill.recipe.sections import (
    AFTERWARDS,
    AGREEMENT,
    KNOWN_ITEM,
    AssistantSection,
    CorpusSection,
    Recipe,
    ShapeSection,
    StudentSection,
)
from embedistill.recipe.training import LIVE, CourseSection, TrainingSection

__all__ = [
    "AFTERWARDS",
    "AGREEMENT",
    "KNOWN_ITEM",
    "LIVE",
    "REMOTE_SOURCES",
    "AssistantSection",
    "CorpusSection",
    "CourseSection",
    "Recipe",
    "Setting",
    "ShapeSection",
    "StudentSection",
    "TrainingSection",
    "dump_recipe",
    "find_recipe",
    "list_recipes",
    "list_settings",
    "load_recipe",
]
