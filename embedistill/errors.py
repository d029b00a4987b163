"""What goes wrong, said once and in one form: where: what was found; what was expected; what to do."""

from __future__ import annotations

import errno


class EmbedistillError(Exception):
    """A failure that a user can act on.

    Args:
        where: The file and line, setting, stage or model it concerns.
        found: What was found there.
        expected: What should have been there; may be empty where `found` says it all.
        do: What to do about it.
    """

    exit_code = 1

    def __init__(self, where: str, found: str, expected: str = "", do: str = "") -> None:
        self.where, self.found, self.expected, self.do = where, found, expected, do
        tail = [f"expected {expected}"] if expected else []
        tail += [do] if do else []
        super().__init__("; ".join([f"{where}: {found}", *tail]))


class LostError(EmbedistillError):
    """A training whose student is lost: not finite, collapsed or diverged."""


class UsageError(EmbedistillError):
    """Wrong use: a recipe, an argument or an input file that has to be changed first."""

    exit_code = 2


class MissingError(UsageError):
    """Something is not there that a run may be able to do without."""


class RecipeError(UsageError):
    """All that is wrong with one recipe.

    Args:
        problems: One error a problem, in the order of the file.
    """

    def __init__(self, problems: list[UsageError]) -> None:
        self.problems = problems
        Exception.__init__(self, "\n".join(str(problem) for problem in problems))


def explain_os_error(error: OSError) -> EmbedistillError:
    """Say what an operating-system error means for a run: which path, why, and what is kept."""
    where = str(error.filename or "the file system")
    kept = "what is finished on disk is kept, so run the same command again"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return EmbedistillError(where, "no space left on the disk", do=f"free some space, then: {kept}")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return EmbedistillError(where, "no permission", do=f"choose another folder or change its rights; {kept}")
        case errno.ENOENT:
            return UsageError(where, "does not exist", do="check the path")
        case errno.EEXIST | errno.ENOTDIR:
            return UsageError(where, "a file", "a folder, in every part of the path", "choose another")
        case errno.EISDIR:
            return UsageError(where, "a folder", "a file", "choose another")
        case _:
            return EmbedistillError(where, error.strerror or str(error), do=kept)
