"""What a loss is made of. `train/objectives` joins the terms; this file only names them."""

from typing import Annotated

from pydantic import Field, model_validator

from common.recipe import Section
from common.rules import obeying
from train.rules import LOSS

Weight = Annotated[float, Field(ge=0)]


class LossRecipe(Section):
    """A weighted sum of terms. The first seven are per slot and share the slot weights; the others are averaged by themselves.

    Each term's sum over all ranks is divided by its own sum of weights, so a term's weight means the same at any size.
    """

    kl: Weight = 0.0
    """Weight of the forward KL(p || q), p the target's distribution (EAGLE-3)."""
    reverse_kl: Weight = 0.0
    """Weight of KL(q || p)."""
    ce: Weight = 0.0
    """Weight of the cross entropy with the text's own token (DFlash)."""
    ce_greedy: Weight = 0.0
    """Weight of the cross entropy with the target's most likely token (BudgetDraft)."""
    tv: Weight = 0.0
    """Weight of the total variation, half of the L1 distance."""
    lk_alpha: Weight = 0.0
    """Weight of -log of the chance of acceptance, sum_v min(p, q) (LK losses)."""
    lk_lambda: Weight = 0.0
    """Weight of lambda KL + (1 - lambda) TV, lambda = exp(-eta * acceptance) (LK losses)."""
    eta: float = Field(3.0, gt=0)
    """lk_lambda: how fast KL gives way to TV as acceptance grows."""
    expected_length: Weight = 0.0
    """Weight of 1 - E/J, E the expected number of accepted slots of J."""
    kv_align: Weight = 0.0
    """Weight of the distance of the drafter's own K/V from the target's at the same position."""
    query_align: Weight = 0.0
    """Weight of the distance of the drafter's queries from the target's; needs cache.kinds=[...,query]."""

    @property
    def per_slot(self) -> dict[str, float]:
        names = ("kl", "reverse_kl", "ce", "ce_greedy", "tv", "lk_alpha", "lk_lambda")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @model_validator(mode="after")
    def _something_to_learn(self):
        return obeying(LOSS, self)
