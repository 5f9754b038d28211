"""Whether outputs are plain decoding's: a report's `lossless`, and by what.

Sampled outputs are tested (`measure.sampling_p_value`). Greedy ones are compared token for token; and as a forward of six rows
rounds otherwise than one of one row, two honest runs part where the target likes two tokens equally well. So the first
difference of a request (the run's token a, plain decoding's b, behind one text) is decided. It is a tie if

1. with the same weights in a wider dtype, the logits of a and b, and that of the likeliest token, lie within `bound`; and
2. each run's rows, computed once more as they were (`replayed`: as many rows, in as large a batch, over the same cache), make its
   own token the likeliest in the target's own dtype.

The first alone would let a verification accept wrong tokens wherever two are close; the second alone would let rows be wrong as
long as they are wrong twice. Behind a tie two texts go on that have nothing to do with each other: each later token of the run
has to be the likeliest, or lie within `bound` of it, by 1. Anything else is a fault, and its prompt is named.

Shapes: T rows, E hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.decoding.sampling import Sampling
from data_prep.target.target import Target
from eval.judging import measure
from eval.judging.replay import Batches, replayed
from eval.oracle.decode import Generation
from eval.recipe import EvalRecipe

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}  # any other dtype: float64
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # of dtypes, as reports say them
SPREAD = 5.0  # standard deviations that `bound` allows
NAMED = 5  # prompts that are at fault, in words; report.json has all


@dataclass
class Difference:
    """Where an output leaves plain decoding's: at `place` of the output (from 0), with `token` instead of `plain`. `fault`: why
    it is no tie."""

    request: int
    place: int
    token: int | None
    plain: int | None
    gap: float | None = None
    bound: float | None = None
    fault: str | None = None


def decide(
    recipe: EvalRecipe,
    target: Target,
    texts: list[list[int]],
    ids: list[str],
    runs: dict[str, list[Generation]],
    sampling: Sampling,
    batches: Batches,
) -> dict:
    """Whether the trained drafter's outputs are plain decoding's, and by what: `lossless`, `lossless_by` and `ties`."""
    trained = runs["trained"]
    baseline = runs["baseline"]
    unreplayed = {"partial_audited": "partial verification"}.get(recipe.verify.kind, "")
    if recipe.draft.breadth > 1:
        unreplayed = "drafts are trees"
    if sampling.temperature > 0:
        with target.uncompiled():
            found = sampled(target, texts, trained, sampling)
    elif recipe.verify.kind == "partial":
        found = compared(trained, baseline)
    else:
        found = greedy(target, texts, ids, trained, baseline, None if unreplayed else batches, unreplayed)
    if sampling.temperature == 0 and "transformers" in runs:
        theirs = sum(a.tokens == b.tokens for a, b in zip(runs["transformers"], baseline))
        found["lossless_by"] += f"; plain decoding's equal transformers' in {theirs}"
    if recipe.verify.kind == "partial":  # lossy, also where the few tokens of a test are equal
        found["lossless"] = False
        found["lossless_by"] = f"verify=partial is lossy; {found['lossless_by']}"
    return found


def sampled(target: Target, prompts: list[list[int]], trained: list[Generation], sampling: Sampling) -> dict:
    """`lossless` and `lossless_by` of outputs drawn above temperature 0."""
    p = measure.sampling_p_value(target, prompts, trained, sampling)
    said = f"tokens' ranks under the target are uniform: chi-square p = {p:.3f} (NO below 0.001)"
    return {"lossless": p > 1e-3, "lossless_by": said}


def compared(trained: list[Generation], baseline: list[Generation]) -> dict:
    """`lossless` and `lossless_by` of greedy outputs, by tokens alone."""
    same = sum(a.tokens == b.tokens for a, b in zip(trained, baseline))
    said = f"{same} of {len(baseline)} outputs equal plain decoding's, token for token"
    return {"lossless": same == len(baseline), "lossless_by": said}


def greedy(
    target: Target,
    prompts: list[list[int]],
    ids: list[str],
    trained: list[Generation],
    baseline: list[Generation],
    batches: Batches | None,
    unreplayed: str = "",
) -> dict:
    """`lossless` and `lossless_by` of greedy outputs; where any differs from plain decoding's, `ties` too.

    Args:
        ids: the prompts' names, for people.
        batches: how both runs were decoded; None: their rows cannot be computed once more, because of `unreplayed`.
    """
    found = compared(trained, baseline)
    if found["lossless"]:
        return found
    if target.rounds:
        found["lossless_by"] += "; whether they part at ties is not known: the target is quantised, and has no wider dtype"
        return found
    differences = [
        _difference(request, a.tokens, b.tokens)
        for request, (a, b) in enumerate(zip(trained, baseline))
        if a.tokens != b.tokens
    ]
    _measure([d for d in differences if not d.fault], target, prompts, trained)
    if batches is not None:
        _replay([d for d in differences if not d.fault], target, prompts, trained, baseline, batches)
    ties = [d for d in differences if not d.fault]
    faults = [d for d in differences if d.fault]
    closest = max(ties, key=lambda d: d.gap, default=None)
    said = found["lossless_by"]
    if closest:
        said += f"; {len(ties)} part at ties, largest gap {closest.gap:.2g} where rounding may reach {closest.bound:.2g}"
        said += f" (rows not computed once more: {unreplayed})" if batches is None else ""
    if faults:
        named = [f"prompt {ids[d.request]}, token {d.place + 1}: {d.fault}" for d in faults[:NAMED]]
        more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        said += f"; {len(faults)} at no tie: {'; '.join(named)}{more}"
    return {
        "lossless": not faults,
        "lossless_by": said,
        "ties": {
            "dtype": NAMES.get(target.dtype, str(target.dtype).removeprefix("torch.")),
            "equal": len(baseline) - len(differences),
            "count": len(ties),
            "largest_gap": closest.gap if closest else None,
            "bound": closest.bound if closest else None,  # of the largest gap
            "replayed": batches is not None,
            "per_prompt": [
                {"id": ids[d.request], "position": len(prompts[d.request]) + d.place, "tokens": [d.token, d.plain]}
                | {"gap": d.gap, "bound": d.bound, "fault": d.fault}
                for d in differences
            ],
        },
    }


def _difference(request: int, tokens: list[int], plain: list[int]) -> Difference:
    """The first one of two outputs that are not equal."""
    shorter = min(len(tokens), len(plain))
    place = next((i for i in range(shorter) if tokens[i] != plain[i]), shorter)
    token = tokens[place] if place < len(tokens) else None
    found = Difference(request, place, token, plain[place] if place < len(plain) else None)
    if place == shorter:
        found.fault = f"one output has {len(tokens)} tokens, the other goes on to {len(plain)}, and no token differs"
    elif place == 0:
        found.fault = "the prompt's own forward gave both, and no draft stood before it"
    return found


# The gap, in a wider dtype.


@torch.no_grad()
def _measure(differences: list[Difference], target: Target, prompts: list[list[int]], trained: list[Generation]) -> None:
    """Gaps and bounds, and faults where the one exceeds the other: at the first difference, and at every token of the run's own
    output behind it, which nothing else looks at."""
    if not differences:
        return
    # Made only when outputs differ: it is another copy of the target.
    wide = _wider(target)
    head_VE = wide.frozen_head.head_VE
    for one in differences:
        output = trained[one.request].tokens
        text = prompts[one.request] + output
        first = len(prompts[one.request]) + one.place
        hidden_TE = wide.forward(torch.tensor([text], device=wide.device)).last_hidden[0, first - 1 : -1]
        logit_TV = wide.logits(hidden_TE)
        best_T = logit_TV.argmax(-1).tolist()

        def apart(row: int, a: int, b: int) -> tuple[float, float]:
            """(how far their logits are apart, how far rounding may move them)."""
            pair = [a, b]
            gap = float((logit_TV[row, a] - logit_TV[row, b]).abs())
            return gap, bound(target.dtype, len(wide.layers), hidden_TE[row], head_VE[pair], logit_TV[row, pair])

        one.gap, one.bound = apart(0, one.token, one.plain)
        if one.gap > one.bound:
            one.fault = f"{_named(one)} are {one.gap:.2g} apart, rounding may reach {one.bound:.2g}"
            continue
        # Behind the first difference the two outputs are different texts, and nothing else would look at this one.
        rows = [(0, one.plain), *enumerate(output[one.place :])]
        for row, token in rows:
            gap, most = apart(row, best_T[row], token) if token != best_T[row] else (0.0, 0.0)
            if gap > most:
                where = f"{row} tokens behind the first difference, " * bool(row)
                one.fault = f"{where}token {best_T[row]} is likelier than {token} by {gap:.2g}, rounding may reach {most:.2g}"
                break


def _wider(target: Target) -> Target:
    """The target in a dtype of more digits, on its own device if there is room for it."""
    dtype = WIDER.get(target.dtype, torch.float64)
    device = target.device
    if device.type == "cuda":
        # A fifth more, for the activations of one text.
        needed = 1.2 * dtype.itemsize * sum(p.numel() for p in target.model.parameters())
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if needed > torch.cuda.mem_get_info(device)[0] + unused:
            print(f"the GPU has no room for the target in {dtype}: ties are decided on the CPU, which takes longer", flush=True)
            device = torch.device("cpu")
    return target.widened(dtype, device)


def bound(dtype: torch.dtype, layers: int, hidden_E: Tensor, row_2E: Tensor, logit_2: Tensor) -> float:
    """How far rounding to `dtype` may move the difference of two logits.

    A number rounds by at most u of itself (bf16: u = 2^-8). The residual stream is rounded some twice in each of N layers, each
    time by about u of its size in a direction of its own: sqrt(2 N) u |h| of error in the normed state h that the head reads. A
    random direction of E dimensions meets a given one, w_a - w_b, with |w_a - w_b| / sqrt(E) of its length, so that the
    difference of two logits errs with a standard deviation of u sqrt(2 N) |h| |w_a - w_b| / sqrt(E). `SPREAD` of these, and
    what the two logits themselves are rounded by, u |l| each.

    Args:
        hidden_E: after the final norm; with `row_2E` of the head and their `logit_2`, all in more digits than `dtype` has.
    """
    u = torch.finfo(dtype).eps / 2
    length = float(hidden_E.norm() * (row_2E[0] - row_2E[1]).norm())
    deviation = u * math.sqrt(2 * layers) * length / math.sqrt(len(hidden_E))
    return SPREAD * deviation + u * float(logit_2.abs().sum())


def _named(one: Difference) -> str:
    return f"the logits of tokens {one.token} and {one.plain}"


# The rows, once more.


def _replay(
    differences: list[Difference],
    target: Target,
    prompts: list[list[int]],
    trained: list[Generation],
    baseline: list[Generation],
    batches: Batches,
) -> None:
    """Faults where a run's own rows do not give its token."""
    for group in batches.groups:
        for run, name in ((trained, "token"), (baseline, "plain")):
            asked = {d.request: d for d in differences if d.request in group and not d.fault}
            if not asked:
                continue
            places = {request - group.start: d.place for request, d in asked.items()}
            some = slice(group.start, group.stop)
            best = replayed(target, batches, prompts[some], run[some], places)
            for request, one in asked.items():
                token = best.get(request - group.start)
                said = getattr(one, name)
                if token != said:
                    who = "the run's" if name == "token" else "plain decoding's"
                    one.fault = f"{who} rows give token {token} when they are computed once more, and the output has {said}"
