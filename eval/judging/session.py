"""Everyone who drafts answers the same prompts, side by side."""

from collections.abc import Callable

import torch

from data_prep.decoding.sampling import Sampling
from data_prep.target.target import Target
from eval.engine.engine import Engine
from eval.engine.request import Stops
from eval.judging import measure
from eval.judging.baseline import Transformers
from eval.judging.controls import OtherMemory
from eval.oracle.decode import Generation
from eval.prompts.suites import Prompt
from eval.recipe import EvalRecipe


class Session:
    """All contenders answer the same prompts at one temperature, group by group.

    Attributes:
        runs: each contender's generations, one a request.
        requests: what was asked, in order. A conversation is a request for each turn.
        groups: which requests were decoded side by side.
    """

    def __init__(
        self,
        recipe: EvalRecipe,
        target: Target,
        engines: dict[str, Engine],
        sampling: Sampling,
        stops: Stops,
        other: OtherMemory,
    ):
        self._recipe = recipe
        self._target = target
        self._engines = engines
        self._stops = stops
        self._other = other
        self._theirs = Transformers(target, sampling) if recipe.transformers and recipe.batch == 1 else None
        self.runs: dict[str, list[Generation]] = {name: [] for name in engines}
        if self._theirs:
            self.runs["transformers"] = []
        self.requests: list[Prompt] = []
        self.groups: list[range] = []

    def warm_up(self, prompts: list[Prompt], asked: dict) -> None:
        """Answers that do not count, so that no contender's first request pays for what is done once."""
        if not asked["warmup"]:
            return
        limit = asked["max_new_tokens"]
        first = prompts[: self._recipe.batch]
        for _ in range(asked["warmup"]):
            self._answer(first, first, min(asked["warmup_tokens"] or limit, limit), self._recipe.seed)
        if self._theirs:
            # `generate` compiles for a cache of the size that a request needs: the longest prompt's.
            most = asked["positions"] - limit
            self._theirs.generate((first[0].tokens * most)[:most], limit, self._recipe.seed, self._stops)
        for generations in self.runs.values():
            generations.clear()

    def ask(self, prompts: list[Prompt], limit: int, told: Callable[[int, float], None]) -> None:
        """Every prompt, then the next turn of every conversation, until none goes on. `told`(requests, tau) after each group."""
        wave = prompts
        batch = self._recipe.batch
        while wave:
            for start in range(0, len(wave), batch):
                group = wave[start : start + batch]
                others = [_other(p, wave[start + b - 1], prompts) for b, p in enumerate(group)]
                self._answer(group, others, limit, self._recipe.seed + len(self.requests))
                self.groups.append(range(len(self.requests), len(self.requests) + len(group)))
                self.requests += group
                told(len(group), measure.tau(self.runs["trained"])[0])
            # One history for all, so that they can be compared: the one that plain decoding gave.
            replies = self.runs["baseline"][-len(wave) :]
            following = [p.after(reply.tokens) for p, reply in zip(wave, replies)]
            wave = [p for p in following if p]

    def _answer(self, group: list[Prompt], others: list[Prompt], limit: int, seed: int) -> None:
        """All contenders, one right after the other, so that a machine's slow moments meet all alike."""
        if "shuffled_memory" in self._engines:
            for b, one in enumerate(others):
                with self._target.uncompiled():  # prompts have any length
                    states = self._target.forward(torch.tensor([one.tokens], device=self._target.device))
                self._other.fill(b, states.map(lambda t: t[0]))
        # The same for all contenders, so that their draws are alike.
        seeds = [seed + b for b in range(len(group))]
        for name, engine in self._engines.items():
            self.runs[name] += engine.generate([p.tokens for p in group], limit, seeds, self._stops)
        if self._theirs:
            self.runs["transformers"].append(self._theirs.generate(group[0].tokens, limit, seed, self._stops))


def _other(prompt: Prompt, before: Prompt, prompts: list[Prompt]) -> Prompt:
    """Whose memory a request is shown as the control: that of the request before it, or of another one where both are of one
    conversation."""
    return before if before.id != prompt.id else next((p for p in prompts if p.id != prompt.id), before)
