"""Reports that commands read back, held against what they need of them: one that was cut, changed by hand or made by an earlier
release is one line, and no picture of half of it."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import UserError
from common.files import read_json
from common.recipe import what_is_wrong

AGAIN = "judge that drafter again"
Pairs = list[Annotated[list[float], Field(min_length=2, max_length=2)]]


class Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)  # other keys are nobody's business here


class Named(Part):
    path: str | None


class Drafter(Part):
    path: str
    objective: str
    reuse: str
    budgets: str | int | None
    lm: str | None
    seed: int | None


class View(Part):
    budget: int


class Subject(Part):
    """What every figure is of."""

    drafter: Drafter
    view: View
    context: int | None


class Round(Part):
    draft: float


class Contender(Part):
    tau_micro: float
    tokens_per_s: float
    round_ms: Round


class Ties(Part):
    dtype: str
    replayed: bool


class Category(Part):
    requests: int
    tokens: int
    tau: float
    speedup: float


class Figures(Contender):
    """Of one temperature."""

    baseline_tokens_per_s: float = Field(gt=0)
    conditional: list[float]
    controls: dict[str, Contender]
    lossless: bool
    ties: Ties | None = None
    by_category: dict[str, Category] = {}
    per_prompt: Pairs
    per_prompt_s: Pairs
    baseline_per_prompt_s: Pairs
    per_prompt_id: list[str] | None = None


class Prompts(Part):
    suite: str
    ids: list[str] = Field(min_length=1)


class Target(Part):
    weights_hash: str


class Report(Subject):
    target: Target
    prompts: Prompts
    temperatures: dict[str, Figures] = Field(min_length=1)
    drafter_kv: dict[str, float]

    @model_validator(mode="after")
    def _every_request_is_counted(self):
        for name, one in self.temperatures.items():
            requests = len(one.per_prompt_id or self.prompts.ids)
            if {len(one.per_prompt), len(one.per_prompt_s), len(one.baseline_per_prompt_s)} != {requests}:
                raise ValueError(f"temperatures.{name} counts others than its {requests} requests")
        return self


class Accepted(Part):
    tau: float


class Score(Subject):
    kl: float
    sampled: Accepted
    greedy: Accepted


KINDS = {"report.json": Report, "score.json": Score}


class Held(Part):
    drafter: Named | str | None


def read_report(path: Path) -> dict[str, Any]:
    """A report.json or a score.json, as it was written.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        UserError: it cannot be read, or lacks what commands read of it.
    """
    found = read_json(path, AGAIN)
    try:
        KINDS[path.name].model_validate(found)
    except ValidationError as error:
        said = what_is_wrong(error)
        raise UserError(f"{path} is damaged or was made by an earlier release ({said}); {AGAIN}") from error
    return found


def drafter_of(path: Path) -> str | None:
    """The path of the drafter that any report is of; None: it is of none. Raises as `read_report` does."""
    found = read_json(path, AGAIN, first_line=path.suffix == ".jsonl")
    try:
        drafter = Held.model_validate(found).drafter
    except ValidationError as error:
        raise UserError(f"{path} does not say which drafter it is of ({what_is_wrong(error)}); {AGAIN}") from error
    return drafter.path if isinstance(drafter, Named) else drafter
