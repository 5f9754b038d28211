"""Speculative decoding of one request, in plain PyTorch: the text to read first, and the oracle of the engine.

The target is the model whose text we want. A small draft model, the drafter, guesses several tokens ahead; the target checks all
of the guesses in one forward, which costs hardly more than a forward over one token. One such turn is a *round*:

    text so far     x_0 ... x_{a-1}   x_a
                    \\__ processed __/  \\_ the anchor: known, but the target has not processed it yet

    1. draft        the drafter proposes x_{a+1} ... x_{a+J}
    2. verify       the target processes x_a and the J proposals in one forward; at each it says what should follow
    3. accept       the first n proposals that agree with the target are kept, 0 <= n <= J
    4. emit         the kept ones are appended, and one more token, which the target's forward gives for free: its own token in
                    the place of the first refused one, or after the last proposal. The next anchor is a + n + 1
    5. observe      the drafter is given the target's states of the n + 1 positions that are processed now

Both sides have a KV cache, and no position of the text is computed twice. `eval/engine/engine.py` runs the same rounds for
batches, on static tensors; `tests/eval/test_engine.py` demands the same tokens and the same rounds of both.

Shapes: J drafted tokens, V vocabulary.
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
    """`drafted` tokens proposed, `kept` of them accepted, after the anchor at position `anchor`. -1: a later round took back even
    the token behind them (`verify=partial_audited`)."""

    anchor: int
    drafted: int
    kept: int
    draft: Draft | None = None  # here alone: the engine keeps no distributions
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
    undone: int = 0  # tokens that a later round took back (verify=partial_audited), in `rollbacks` rounds
    rollbacks: int = 0
    interval: float = 0.0  # tokens that might be verified partially from one full round to the next, on average
    steps: float | None = None  # the batch's rounds, of which this request bears its share; None: its own

    @property
    def emitted(self) -> int:
        """Tokens that rounds emitted and did not take back."""
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
) -> Generation:
    """Continue `prompt`. At temperature 0 the output is the target's greedy continuation, above it a sample of the target's
    distribution, whoever drafts: a bad drafter costs time and nothing else."""
    generator = torch.Generator(device=target.device).manual_seed(seed)
    result = Generation([])
    laps = _Laps(target)

    # Prefill: the target reads the prompt, and its last position gives the first token.
    cache = target.new_cache()
    drafting.begin()
    states = target.forward(torch.tensor([prompt], device=target.device), cache).map(lambda t: t[0])
    p_V = distribution(target.logits(states.last_hidden[-1]), temperature)
    tokens = [*prompt, sample(p_V, generator)]
    drafting.observe(states, tokens)
    result.prefill_s = laps.lap()

    decoding = laps.now
    while len(tokens) - len(prompt) < max_new_tokens and end_tokens.isdisjoint(tokens[len(prompt) :]):
        anchor = len(tokens) - 1

        # Draft: guess the tokens behind the anchor.
        draft = drafting.draft(tokens, temperature, generator)
        result.draft_s += laps.lap()

        # Verify: one forward over the anchor's token and the draft. Row j says what should follow the j-th drafted token.
        rows = torch.tensor([[tokens[anchor], *draft.tokens]], device=target.device)
        states = target.forward(rows, cache).map(lambda t: t[0])
        p_JV = distribution(target.logits(states.last_hidden), temperature)

        # Accept: how many drafted tokens are kept, and the target's token after them.
        kept, following = verify(draft.tokens, draft.q_JV, p_JV, generator)

        # Emit: at least one token per round. Refused tokens leave the cache, as if they had never been read.
        tokens += [*draft.tokens[:kept], following]
        refused = len(draft.tokens) - kept
        if refused:
            cache.crop(-refused)
        result.verify_s += laps.lap()

        # Observe: states of the anchor and of the kept tokens. The token `following` is the next anchor, without states yet.
        drafting.observe(states.map(lambda t, count=kept + 1: t[:count]), tokens[anchor + 1 :])
        result.draft_s += laps.lap()
        result.rounds.append(Round(anchor, len(draft.tokens), kept, draft, draft.tokens))

    result.decode_s = laps.now - decoding
    result.kv_bytes = drafting.kv_bytes()
    result.tokens = _cut(tokens[len(prompt) : len(prompt) + max_new_tokens], end_tokens)
    return result


def _cut(output: list[int], end_tokens: frozenset[int]) -> list[int]:
    """The output up to its first end token."""
    for index, token in enumerate(output):
        if token in end_tokens:
            return output[: index + 1]
    return output


class _Laps:
    """Seconds since the last lap."""

    def __init__(self, target: Target):
        self._target = target
        self.now = clock(target)

    def lap(self) -> float:
        before = self.now
        self.now = clock(self._target)
        return self.now - before


def clock(target: Target) -> float:
    """Seconds, when the device has done all that it was given."""
    if target.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
