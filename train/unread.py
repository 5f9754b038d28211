"""Keys that the command line names and that do nothing beside the others. Each is warned about, and ignored."""

from collections.abc import Callable
from typing import NamedTuple

from train.recipe import TrainRecipe


class Unread(NamedTuple):
    """Keys that do nothing in some recipes. They are not refused, since a sweep or an experiment may name them for others.

    Attributes:
        keys: those that are ignored.
        where: takes the recipe, and says whether they are.
        why: what would have to be said for them to do something.
    """

    keys: tuple[str, ...]
    where: Callable[[TrainRecipe], bool]
    why: str


UNREAD = (
    Unread(
        tuple(f"objective.{name}" for name in ("full", "budgets", "smallest", "largest", "draws", "detach")),
        lambda r: r.view_sampler is None,
        "it is for objective=budgetdraft",
    ),
    Unread(
        tuple(f"objective.{name}" for name in ("budgets", "smallest", "largest", "draws")),
        lambda r: r.view_sampler is not None and bool(r.view.budget),
        "view.budget names the one budget",
    ),
    Unread(
        ("objective.largest", "objective.draws", "objective.smallest"),
        lambda r: r.view_sampler is not None and not r.view.budget and r.objective.budgets == "paper",
        "it is for objective.budgets=sandwich",
    ),
    Unread(
        ("objective.decay",),
        lambda r: r.objective.weights == "dpace",
        "it is for objective.weights=decay",
    ),
    Unread(
        ("drafter.sequential_size",),
        lambda r: r.drafter.sequential is None,
        "it is for drafter.sequential",
    ),
)


def unread(recipe: TrainRecipe) -> list[str]:
    """What is said of named keys that do nothing in this recipe, a line each."""
    return [
        f"warning: training does not read {key}: {one.why}"
        for one in UNREAD
        for key in one.keys
        if key in recipe.named and one.where(recipe)
    ]
