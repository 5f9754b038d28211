"""Judging a checkpoint: acceptance and loss on documents that are not trained on, and diagnostics that explain them.

Shapes: V views (budgets), N anchors, J drafted slots.
"""

from dataclasses import replace

import torch
import torch.distributed as dist

from common.ranks import rank, world_size
from train.measure import acceptance, diagnostics
from train.run.parts import DataParts, ModelParts


@torch.no_grad()
def validate(model: ModelParts, data: DataParts, device: torch.device) -> list[dict]:
    """Teacher-forced acceptance and loss on the validation documents, under each budget of `data.budgets`:
    {"sampled": temperature 1, "greedy": temperature 0, "loss": mean over the slots that count}."""
    packs = data.validation.passes(0)
    views = len(data.budgets)
    counts_V4J = torch.zeros(views, 4, model.objective.slots, dtype=torch.float64, device=device)
    loss_V2 = torch.zeros(views, 2, dtype=torch.float64, device=device)  # (sum, number of slots)
    model.engine.eval()
    for start in range(0, len(packs), world_size()):
        mine = start + rank()
        # Every rank runs the same number of forwards, for ZeRO-3 gathers weights in each of them by collectives. A rank that has
        # no pack left runs the last one and counts nothing of it.
        counts = mine < len(packs)
        outcome = model.engine(data.validation.read(packs[min(mine, len(packs) - 1)]).to(device))
        counts_V4J += acceptance.counts(outcome) * counts
        losses_V = outcome.loss.double().sum((1, 2))
        slots_V = outcome.valid.sum().expand(views)
        loss_V2 += torch.stack([losses_V, slots_V], dim=1) * counts
    model.engine.train()
    dist.all_reduce(counts_V4J)
    dist.all_reduce(loss_V2)
    losses = (loss_V2[:, 0] / loss_V2[:, 1].clamp(min=1)).tolist()
    return [acceptance.summarise(counted_4J) | {"loss": loss} for counted_4J, loss in zip(counts_V4J, losses)]


@torch.no_grad()
def diagnose(model: ModelParts, data: DataParts, device: torch.device) -> dict:
    """Diagnostics of the first validation pack, under the full view. Every rank runs the same forwards, as ZeRO-3 needs."""
    model.engine.eval()
    pack = data.validation.read(data.validation.passes(0)[0]).to(device)
    found = diagnostics.diagnose(model.objective, [replace(pack, budget_VN=None)])
    model.engine.train()
    return found
