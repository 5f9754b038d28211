"""`mode=score`: acceptance from the cache alone, teacher-forced on its validation documents."""

import torch

from data_prep.cache.reader import CacheReader
from data_prep.target import Target
from eval.recipe import EvalRecipe
from train import acceptance
from train.attention import executor
from train.batches import PackStream, split
from train.drafter.model import Drafter
from train.objectives import Objective


@torch.no_grad()
def score(recipe: EvalRecipe, target: Target, drafter: Drafter) -> tuple[dict[str, acceptance.Acceptance], float]:
    """({"sampled": temperature 1, "greedy": temperature 0}, KL in nats a slot) on the documents that training held out."""
    reader = CacheReader(recipe.cache.dir)
    _, validation = split(reader, recipe.score.documents)
    stream = PackStream(
        reader, validation, drafter.config.tensors, recipe.score.pack_tokens, recipe.score.anchors, recipe.seed, shuffle=False
    )
    objective = Objective(
        drafter.eval(),
        target.frozen_head,
        "kl",
        torch.ones(drafter.config.draft_length),
        executor(recipe.attention, target.device, training=False),
        chunk=1024,
    )
    total = loss = slots = 0.0
    for indices in stream.passes(0):
        outcome = objective(stream.read(indices).to(target.device))
        total = total + acceptance.counts(outcome).cpu()
        loss, slots = loss + float(outcome.loss_sum), slots + int(outcome.valid.sum())
    return acceptance.summarise(total), loss / slots
