"""Many generations -> the figures of a report.

Definitions: tau = tokens emitted per round, the bonus token included; joint_j and cond_j as in
`train/measure/acceptance.py`, counted over all rounds (a slot that was not drafted was not accepted), so that
tau = 1 + sum_j joint_j. A round of which an audit took back everything emitted nothing: tau is less by the share of such rounds.
"""

import hashlib
import math
from statistics import mean

import torch
from transformers import PreTrainedTokenizerBase

from data_prep.decoding.sampling import Sampling, distribution
from data_prep.sources.tokens import HALF
from data_prep.target.target import Target
from eval.oracle.decode import Generation
from train.measure.acceptance import Acceptance


def acceptance(generations: list[Generation]) -> Acceptance:
    """Joint and conditional acceptance per slot over all rounds."""
    rounds = [r for g in generations for r in g.rounds]
    slots = range(1, max((r.drafted for r in rounds), default=0) + 1)
    kept = [sum(r.kept >= j for r in rounds) for j in slots]
    return Acceptance.of(kept, [len(rounds), *kept[:-1]])


def tau(generations: list[Generation]) -> tuple[float, float]:
    """(micro: over all rounds, macro: mean over requests)."""
    judged = [g for g in generations if g.rounds]
    if not judged:  # every output ended with its first token
        return 1.0, 1.0
    return (sum(g.emitted for g in judged) / sum(len(g.rounds) for g in judged), mean(g.emitted / len(g.rounds) for g in judged))


def by_context(runs: dict[str, list[Generation]], bins: int = 8) -> dict[str, dict[str, list]]:
    """{name: {"from": [...], "to": [...], "tau": [...], "rounds": [...]}}: tau of the rounds whose anchor stands at the text's
    positions from .. to (both included), in at most `bins` bins of equal width that all runs share. A bin without a round of
    one run is left out of it."""
    anchors = [r.anchor for generations in runs.values() for g in generations for r in g.rounds]
    low = min(anchors, default=0)
    high = max(anchors, default=0)
    # One width for all runs: bins of their own could not be compared.
    width = (high - low) // bins + 1
    found = {}
    for name, generations in runs.items():
        emitted: dict[int, list[int]] = {}
        for r in (r for g in generations for r in g.rounds):
            emitted.setdefault((r.anchor - low) // width, []).append(r.kept + 1)
        held = sorted(emitted)
        found[name] = {
            "from": [low + one * width for one in held],
            "to": [low + one * width + width - 1 for one in held],
            "tau": [mean(emitted[one]) for one in held],
            "rounds": [len(emitted[one]) for one in held],
        }
    return found


def by_part(run: list[Generation], baseline: list[Generation], parts: list[str]) -> dict[str, dict]:
    """{part: {"requests", "tokens" of the outputs, "tau" over all rounds, "speedup" of decoding}}; `parts` names that of each
    request."""
    found = {}
    for part in dict.fromkeys(parts):
        own, plain = ([g for g, name in zip(generations, parts) if name == part] for generations in (run, baseline))
        found[part] = {
            "requests": len(own),
            "tokens": sum(len(g.tokens) for g in own),
            "tau": tau(own)[0],
            "speedup": tokens_per_s(own, prefill=False) / max(tokens_per_s(plain, prefill=False), 1e-9),
        }
    return found


def per_prompt_s(generations: list[Generation]) -> list[list[float]]:
    """[output tokens, seconds] of each request, decode alone: what `tokens_per_s` adds up."""
    return [[len(g.tokens) - 1, g.decode_s] for g in generations]


def charted(figures: dict) -> dict:
    """`figures` without what is kept for each prompt: numbers and lists of numbers, as a log takes them."""
    kept = {name: value for name, value in figures.items() if "per_prompt" not in name}
    return {name: charted(value) if isinstance(value, dict) else value for name, value in kept.items()}


def examples(
    prompts: list[list[int]], generations: list[Generation], tokenizer: PreTrainedTokenizerBase, count: int = 3
) -> list[dict]:
    """The first `count` requests as people read them: {"prompt": its last 200 characters, "pieces": [[text, kind], ...]}, one
    piece a token. Kinds: `accepted` (drafted and kept), `rejected` (the first drafted token of a round that was refused: no part
    of the output), `emitted` (the target's own: a prefill's, a correction or a bonus). Nothing after the output's end."""
    shown = []
    for prompt, generation in list(zip(prompts, generations))[:count]:
        shown.append(
            {"prompt": tokenizer.decode(prompt[-200:])[-200:], "pieces": pieces(prompt, generation, tokenizer)}
        )
    return shown


def pieces(prompt: list[int], generation: Generation, tokenizer: PreTrainedTokenizerBase, since: int = 0) -> list[list[str]]:
    """[[text, kind], ...] of the output's tokens from place `since` on, of the kinds of `examples`."""
    output = generation.tokens
    # Of each place of the output: its kind, and the drafted token that was refused there. The first is the prefill's.
    marks = [("emitted", None)]
    for r in (r for r in generation.rounds if r.kept >= 0):
        drafted = r.drafted_tokens or []
        marks += [("accepted", None)] * r.kept + [("emitted", drafted[r.kept] if r.kept < len(drafted) else None)]
    found = []
    for at, (token, (kind, refused)) in list(enumerate(zip(output, marks)))[since:]:
        before = [*prompt[-WINDOW:], *output[max(0, at - WINDOW) : at]][-WINDOW:]
        if refused is not None:
            found.append([_text(tokenizer, before, refused), "rejected"])
        found.append([_text(tokenizer, before, token), kind])
    return found


WINDOW = 8  # tokens before one that decide how it is written: spaces, and characters of several tokens


def _text(tokenizer: PreTrainedTokenizerBase, before: list[int], token: int) -> str:
    """What `token` adds to the text; a character of several tokens is its last one's."""
    # Decoded with what stands before it: alone, many tokenizers would drop a leading blank.
    head, whole = (HALF.sub("", tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in (before, [*before, token]))
    return whole[len(head) :]


def tokens_per_s(generations: list[Generation], prefill: bool) -> float:
    """Output tokens over seconds, decode alone (without the prefill's token) or with the prefill. What the last round
    emitted beyond the output's end does not count: plain decoding would not have made it."""
    tokens = sum(max(0, len(g.tokens) - (not prefill)) for g in generations)
    return tokens / max(sum(g.decode_s + prefill * g.prefill_s for g in generations), 1e-9)


def round_ms(generations: list[Generation]) -> dict[str, float]:
    """Milliseconds a round of the batch: drafting (memory included), verifying, and all else."""
    count = max(1e-9, sum(len(g.rounds) if g.steps is None else g.steps for g in generations))
    draft, verify, total = (1e3 * sum(getattr(g, f"{k}_s") for g in generations) / count for k in ("draft", "verify", "decode"))
    return {"draft": draft, "verify": verify, "overhead": total - draft - verify}


def kv_mib(generations: list[Generation]) -> dict[str, float]:
    """The most MiB of the drafter's keys and values in any request: `read` by the rows of a round, `searched` to choose them,
    `kept` between rounds, and the `peak` with the prompt's."""
    return {f"{what}_mib": max(g.kv_bytes[what] for g in generations) / 2**20 for what in generations[0].kv_bytes}


def repetition(generations: list[Generation], n: int = 4) -> float:
    """Share of the outputs' n-grams that stood in the same output before; a loop tends to 1."""
    grams = [[tuple(g.tokens[i : i + n]) for i in range(len(g.tokens) - n + 1)] for g in generations]
    total = sum(map(len, grams))
    return 1 - sum(len(set(one)) for one in grams) / total if total else 0.0


@torch.no_grad()
def sampling_p_value(
    target: Target, prompts: list[list[int]], generations: list[Generation], sampling: Sampling, bins: int = 20
) -> float:
    """How likely outputs at least this odd are if they are samples of the target.

    Each token's randomised rank under the target's own distribution, recomputed in one plain forward over the text, is
    uniform on [0, 1] if and only if the token was drawn from it; a chi-square test over `bins` equal bins of all tokens.
    """
    # The ranks' random part must be independent of the decode loop's draws.
    generator = torch.Generator(device=target.device).manual_seed(int.from_bytes(hashlib.md5(b"ranks").digest()[:6], "big"))
    counts = torch.zeros(bins, dtype=torch.float64)
    for prompt, generation in zip(prompts, generations):
        ids = torch.tensor([prompt + generation.tokens], device=target.device)
        p_TV = distribution(target.logits(target.forward(ids).last_hidden[0, len(prompt) - 1 : -1]), *sampling).double()
        token = ids[0, len(prompt) :, None]
        own = p_TV.gather(1, token)
        before = torch.where(p_TV > own, p_TV, 0).sum(1, keepdim=True)  # likelier tokens rank first
        # Equal probabilities are put in order by token, so that each token has an interval of its own.
        ties = torch.where((p_TV == own) & (torch.arange(p_TV.shape[1], device=ids.device) < token), p_TV, 0).sum(1, keepdim=True)
        rank = before + ties + own * torch.rand(own.shape, generator=generator, device=own.device, dtype=own.dtype)
        counts += torch.histc(rank.cpu(), bins=bins, min=0, max=1)
    expected = counts.sum() / bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    # The upper tail of a chi-square distribution with bins - 1 degrees of freedom.
    return float(torch.special.gammaincc(torch.tensor((bins - 1) / 2, dtype=torch.float64), statistic / 2))


def divergence(
    target: Target, prompts: list[list[int]], lossy: list[Generation], full: list[Generation], sampling: Sampling
) -> dict:
    """How far verification over a part of the cache leads away from full verification's outputs, and whether to worse ones.

    Returns:
        same: share of outputs that are equal; agreement: share of places with equal tokens, over the longer output;
        first_divergent_token: the mean place, from 1, over outputs that differ (None: none does);
        perplexity: of the lossy outputs and of full verification's under the target that reads everything.
    """
    pairs = [(a.tokens, b.tokens) for a, b in zip(lossy, full)]
    longer = sum(max(len(a), len(b)) for a, b in pairs)
    first = [next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b))) + 1 for a, b in pairs if a != b]
    return {
        "same": mean(a == b for a, b in pairs),
        "agreement": sum(x == y for a, b in pairs for x, y in zip(a, b)) / longer,
        "first_divergent_token": mean(first) if first else None,
        "perplexity": {name: perplexity(target, prompts, g) for name, g in (("partial", lossy), ("full", full))},
    }


@torch.no_grad()
def perplexity(target: Target, prompts: list[list[int]], generations: list[Generation]) -> float:
    """exp of the mean negative log-likelihood of all output tokens under the target, at temperature 1."""
    nats = tokens = 0
    for prompt, generation in zip(prompts, generations):
        ids = torch.tensor([prompt + generation.tokens], device=target.device)
        logits_TV = target.logits(target.forward(ids).last_hidden[0, len(prompt) - 1 : -1])
        nats += float(torch.nn.functional.cross_entropy(logits_TV.double(), ids[0, len(prompt) :], reduction="sum"))
        tokens += len(generation.tokens)
    return math.exp(nats / tokens)
