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
def score(recipe: EvalRecipe, target: Target, drafter: Drafter) -> dict[str, acceptance.Acceptance]:
    """{"sampled": temperature 1, "greedy": temperature 0} on the documents that training held out."""
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
    return acceptance.summarise(
        sum(acceptance.counts(objective(stream.read(pack).to(target.device))) for pack in stream.passes(0)).cpu()
    )
