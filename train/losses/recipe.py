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

    kl: Weight = 0.0  # forward KL(p || q)
    reverse_kl: Weight = 0.0  # KL(q || p)
    ce: Weight = 0.0  # cross entropy with the text's own token
    ce_greedy: Weight = 0.0  # cross entropy with the target's most likely token
    tv: Weight = 0.0  # total variation; half of an L1 distance
    lk_alpha: Weight = 0.0  # -log sum_v min(p, q)
    lk_lambda: Weight = 0.0  # lambda KL + (1 - lambda) TV, lambda = exp(-eta alpha)
    eta: float = Field(3.0, gt=0)  # of lk_lambda
    expected_length: Weight = 0.0  # 1 - E/J, E the expected number of accepted slots, through the product of overlaps
    kv_align: Weight = 0.0  # the drafter's own K/V against the target's, at the slot's own position
    query_align: Weight = 0.0  # its queries against those with which the target made the slot's teacher

    @property
    def per_slot(self) -> dict[str, float]:
        names = ("kl", "reverse_kl", "ce", "ce_greedy", "tv", "lk_alpha", "lk_lambda")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @model_validator(mode="after")
    def _something_to_learn(self):
        return obeying(LOSS, self)
