"""What a loss is made of: a key for each term of the table (`train/losses/terms.py`). `train/objectives` joins the terms."""

from typing import Annotated

from pydantic import Field, create_model, model_validator

from common.recipe import Section
from common.rules import obeying
from train.losses.terms import TERMS, per_slot, reads
from train.rules import LOSS

Weight = Annotated[float, Field(ge=0)]


class _Loss(Section):
    """A weighted sum of terms. Per-slot terms share the slot weights; the others are averaged by themselves.

    Each term's sum over all ranks is divided by its own sum of weights, so a term's weight means the same at any size.
    """

    @property
    def per_slot(self) -> dict[str, float]:
        """The weight of each per-slot term that has one."""
        return {name: getattr(self, name) for name in per_slot() if getattr(self, name)}

    @property
    def reads(self) -> str:
        """The most that a term reads of the target's distribution (`Term.reads`)."""
        return reads({name: getattr(self, name) for name in TERMS})

    @model_validator(mode="after")
    def _something_to_learn(self):
        return obeying(LOSS, self)


def _keys() -> dict[str, tuple]:
    """A key for each term, by which it gets its weight, and eta behind the terms that it belongs to."""
    weights = {name: (Weight, Field(0.0, description=f"Weight of {term.meaning}.")) for name, term in TERMS.items()}
    keys = {name: weights[name] for name in per_slot()}
    keys["eta"] = (float, Field(3.0, gt=0, description="lk_lambda: how fast KL gives way to TV as acceptance grows."))
    return keys | weights


LossRecipe = create_model("LossRecipe", __base__=_Loss, __module__=__name__, __doc__=_Loss.__doc__, **_keys())
