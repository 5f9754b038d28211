"""The draft-verify loop: KV caches on both sides, no prefix computed twice, batch of one.

A round with anchor a: the drafter proposes x_{a+1} .. x_{a+J}; the target processes x_a and the proposals in one forward;
n of them are kept, one more token is emitted, and the next anchor is a + n + 1.
"""

import time
from dataclasses import dataclass, field

import torch

from data_prep.decoding.sampling import distribution, sample
from data_prep.target.target import Target
from eval.oracle.drafting import Draft, Drafting
from eval.oracle.verify import verify


@dataclass
class Round:
    """`drafted` tokens proposed, `kept` of them accepted, after the anchor at position `anchor`. -1: a later step took back even
    the token behind them (`verify=partial_audited`)."""

    anchor: int
    drafted: int
    kept: int
    draft: Draft | None = None  # only when asked for
    drafted_tokens: list[int] | None = None  # the accepted ones, and the first that was refused


@dataclass
class Generation:
    """`tokens` is the output, cut at the first end token and at the limit; `rounds` are counted whole. Seconds. `kv_bytes`: of
    the drafter's keys and values."""

    tokens: list[int]
    rounds: list[Round] = field(default_factory=list)
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    decode_s: float = 0.0
    kv_bytes: dict[str, int] = field(default_factory=dict)
    undone: int = 0  # tokens that a later verify step took back (verify=partial_audited), in so many rollbacks
    rollbacks: int = 0
    steps: float | None = None  # the batch's rounds, of which this request bears its share; None: its own

    @property
    def emitted(self) -> int:
        """Tokens that verify steps emitted and did not take back."""
        return sum(r.kept + 1 for r in self.rounds)


@torch.no_grad()
def decode(
    target: Target,
    drafting: Drafting,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    end_tokens: frozenset[int] = frozenset(),
    keep_drafts: bool = False,
) -> Generation:
    """Continue `prompt`. At temperature 0 the output is the target's greedy continuation, above it a sample of the
    target's distribution, whoever drafts."""
    generator = torch.Generator(device=target.device).manual_seed(seed)
    started = now = clock(target)
    cache, tokens = target.new_cache(), list(prompt)
    drafting.begin()
    states = target.forward(torch.tensor([prompt], device=target.device), cache).map(lambda t: t[0])
    tokens.append(sample(distribution(target.logits(states.last_hidden[-1]), temperature), generator))
    drafting.observe(states, tokens)
    result = Generation([])
    result.prefill_s = (now := clock(target)) - started
    decoding = now
    while len(tokens) - len(prompt) < max_new_tokens and end_tokens.isdisjoint(tokens[len(prompt) :]):
        anchor = len(tokens) - 1
        draft = drafting.draft(tokens, temperature, generator)
        now, before = clock(target), now
        result.draft_s += now - before
        states = target.forward(torch.tensor([[tokens[-1], *draft.tokens]], device=target.device), cache).map(lambda t: t[0])
        p_JV = distribution(target.logits(states.last_hidden), temperature)
        kept, following = verify(draft.tokens, draft.q_JV, p_JV, generator)
        tokens += [*draft.tokens[:kept], following]
        if refused := len(draft.tokens) - kept:
            cache.crop(-refused)
        now, before = clock(target), now
        result.verify_s += now - before
        drafting.observe(states.map(lambda t: t[: kept + 1]), tokens[anchor + 1 :])
        now, before = clock(target), now
        result.draft_s += now - before
        result.rounds.append(Round(anchor, len(draft.tokens), kept, draft if keep_drafts else None, draft.tokens))
    result.decode_s = now - decoding
    result.kv_bytes = drafting.kv_bytes()
    output = tokens[len(prompt) : len(prompt) + max_new_tokens]
    end = next((i for i, token in enumerate(output) if token in end_tokens), len(output))
    result.tokens = output[: end + 1]
    return result


def clock(target: Target) -> float:
    """Seconds, when the device has done all that it was given."""
    if target.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
