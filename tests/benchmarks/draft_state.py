"""What a drafter keeps beside the target's cache, and what that costs: bytes, the first token, a prefix that is cached already,
how many requests fit, a round.

    python -m tests.benchmarks.draft_state contexts=[64,128] repeats=2 new=8
    python -m tests.benchmarks.draft_state shape=smollm2 contexts=[1024,4096,8192]
    python -m tests.benchmarks.draft_state shape=qwen3_8b contexts=[1024,4096,8192] vocabulary=32000
    python -m tests.benchmarks.draft_state target=TARGET drafters=[smollm2-eagle3,smollm2-ttt,DRAFTER] contexts=[1024] count=8

With `shape` target and drafters have random weights: bytes and milliseconds are those of trained ones, what is accepted is not.
With `target` and `drafters` they are trained ones, and prompts are real: the standard library's held-out modules, end to end, or
`prompts=FILE`, a line each, {"prompt": ...} or {"tokens": [...]}.

`what=hit`: an earlier request has left the target's keys and values of a prefix (`hit`, a share of the prompt), but not the
drafter's own memory of it. Reading goes on behind the prefix. The prefix in the drafter's own memory is zero, as in a pool that
nobody wrote to; what it borrows of the target's cache is there. `missing` is decoded so, `whole` with all of the memory, `remade`
with what the target's cache gives back (a drafter over projected K/V). Between `whole` and `missing` nothing else differs.

`depth=N` builds N of the target's layers. Its bytes are then counted for all of them (`of_layers`); its milliseconds are of those
N. What a round proposes costs the same whatever the target's depth.

Shapes: B requests (one), L places of a text.
"""

import gc
import json
from pathlib import Path
from statistics import median

import torch

from common.errors import UserError
from data_prep.decoding.cache import StaticCache
from data_prep.recipe import CaptureRecipe, DataRecipe, TargetRecipe
from data_prep.target.loading import load_target, load_tokenizer
from data_prep.target.target import Target
from eval.engine.engine import room_for
from eval.prompts.load import load_prompts
from eval.prompts.suites import SuiteRecipe
from tests.benchmarks import QWEN3_8B, SMOLLM2, line, options, target_of, timed
from tests.benchmarks.contender import Contender
from train.drafter.base import Drafter
from train.drafter.build import load_drafter, new_drafter
from train.drafter.config import DrafterConfig

ALONE = "target alone"
KINDS = {  # drafters of random weights: EAGLE-3, DFlash, KVShot's projected K/V, queries alone
    "hidden": dict(objective="ttt", reuse="hidden", layers=1),
    "blocks": dict(objective="blockwise", reuse="hidden", layers=5),
    "projected": dict(objective="ttt", reuse="kv", source="projected_rope", layers=1),
    "queries": dict(objective="ttt", reuse="hybrid", fusion="cross_only", own_kv=False, layers=1),
}
LAYERS = {"qwen3_8b": QWEN3_8B["num_hidden_layers"], "smollm2": SMOLLM2["num_hidden_layers"]}


def random_drafter(target: Target, kind: str, o) -> Drafter:
    fields = dict(KINDS[kind])
    a = target.architecture
    count = fields.pop("layers")
    spread = [1, a.num_layers // 2, a.num_layers - 3]
    config = DrafterConfig(
        target_layers=[a.num_layers - 1 - i * a.num_layers // count for i in reversed(range(count))],
        hidden_layers=spread if fields["reuse"] in ("hidden", "hybrid") else [],
        source_layers=spread if "source" in fields else [], draft_vocab=o.vocabulary or None, shifted=False, causal=False,
        slots=o.slots if fields["objective"] == "blockwise" else o.length, seed=0, start="random", mask_token_id=2,
        architecture=a, target={}, **fields,
    )  # fmt: skip
    with torch.device(target.device):
        drafter = new_drafter(config).to(target.dtype)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    return drafter


def trained_drafter(target: Target, folder: str) -> Drafter:
    drafter = load_drafter(folder)
    if drafter.config.target["weights_hash"] != target.weights_hash():
        raise UserError(f"{folder} was trained for another target than {target.path}")
    return drafter.to(target.device, target.dtype)


def prompts_of(target: Target, o, context: int) -> list[list[int]]:
    """Of `context` tokens each, or as many as the target's positions leave; those of a file may be shorter."""
    if o.target is None:
        generator = torch.Generator().manual_seed(context)
        return torch.randint(3, target.architecture.vocab_size, (o.count, context), generator=generator).tolist()
    room = target.architecture.max_positions
    context = min(context, room - o.new - 2 * o.slots)
    records = [json.loads(line) for line in Path(o.prompts).read_text().split("\n") if line] if o.prompts else []
    if records and "tokens" in records[0]:
        return [record["tokens"][:context] for record in records[: o.count]]
    suite = dict(kind="heldout", prompt_tokens=context, new_tokens=o.new, count=o.count)
    if records:
        suite |= dict(kind="jsonl", path=o.prompts, id="id", template="{prompt}", chat=True, truncate="left")
    data = DataRecipe(source="stdlib", max_length=512, long="join")
    found, _ = load_prompts(SuiteRecipe(**suite), data, load_tokenizer(target.path), room)
    return [prompt.tokens for prompt in found]


class Bench:
    """The measurements at one context. Times are of the first prompt."""

    def __init__(self, target: Target, drafters: dict[str, Drafter], o, context: int):
        self._o = o
        self._target = target
        # All of the target's layers, where fewer were built.
        self._layers = LAYERS.get(o.shape, len(target.layers)) if o.target is None else len(target.layers)
        self._prompts = prompts_of(target, o, context)
        self._first = self._prompts[0]
        self._text_BL = torch.tensor([[*self._first, 0]], device=target.device)
        longest = max(drafter.config.draft_length for drafter in drafters.values())
        cache = StaticCache.of(target, 1, room_for(max(map(len, self._prompts)), o.new, longest))
        self._cache_bytes = cache.nbytes // cache.room // len(target.layers) * self._layers
        self._who = {name: Contender(target, drafter, cache, o) for name, drafter in {ALONE: None, **drafters}.items()}
        for one in self._who.values():  # kernels, graphs, and the drafters' memory
            one.generate(self._first, o.new)

    @property
    def _drafting(self) -> dict[str, Contender]:
        return {name: one for name, one in self._who.items() if one.drafter is not None}

    def _prefix(self, prompt: list[int]) -> int:
        """Positions of a prompt that are cached: whole blocks of a paged cache."""
        return int(self._o.hit * len(prompt)) // self._o.block * self._o.block

    def _line(self, what: str, who: str, **figures) -> None:
        subject = {"target": self._o.target} if self._o.target else {"shape": self._o.shape}
        depth = {"depth": len(self._target.layers), "of_layers": self._layers}
        line("draft_state", what=what, **subject, **depth, context=len(self._first), who=who, **figures)

    def _of_alone(self, what: str, times: dict[str, list[float]], **more) -> None:
        """A line for each, as a share of the target alone."""
        alone = median(times[ALONE])
        for name, found in times.items():
            ratio = round(median(found) / alone, 4)
            spread = [round(min(found), 3), round(max(found), 3)]
            self._line(what, name, ms=round(median(found), 3), of_target_alone=ratio, least_and_most=spread, **more)

    def bytes(self) -> None:
        """Of a position: the drafter's own memory beside the target's cache."""
        for name, one in self._drafting.items():
            generation = one.generate(self._first, self._o.new)
            kept = generation.kv_bytes["kept"] / (len(self._first) + generation.emitted)
            figures = {"kept_bytes": round(kept, 2), "from_tensors": one.kept, "target_bytes": self._cache_bytes}
            parameters = sum(p.numel() for p in one.drafter.parameters())
            self._line("bytes", name, **figures, of_target=round(kept / self._cache_bytes, 4), parameters=parameters)

    def first_token(self) -> None:
        """Milliseconds until a prompt is read and the first round can begin."""
        times: dict[str, list[float]] = {name: [] for name in self._who}
        for _ in range(self._o.repeats):
            for name, one in self._who.items():
                times[name].append(1e3 * one.generate(self._first, 1).prefill_s)
        self._of_alone("first_token", times)

    def hit(self) -> None:
        """The same where the target's cache holds the prefix: with the drafter's memory as it is then, and whole again."""
        device = self._target.device
        start = self._prefix(self._first)
        left: dict[str, list[float]] = {name: [] for name in self._who}
        whole: dict[str, list[float]] = {name: [] for name in self._who}
        for number in range(1 + self._o.repeats):
            for name, one in self._who.items():
                one.hand_out()
                left_ms = whole_ms = timed(lambda: one.read(self._text_BL, start), device)
                if one.can_remake:
                    whole_ms += timed(lambda: one.remake(self._text_BL, start), device)
                elif one.kept:  # hidden states are in no cache: the target has to read the prefix again
                    whole_ms = timed(lambda: one.read(self._text_BL, 0), device)
                if number:
                    left[name].append(left_ms)
                    whole[name].append(whole_ms)
        self._of_alone("hit, memory as it is", left, prefix=start)
        self._of_alone("hit, memory whole again", whole, prefix=start)

    def accepted(self) -> None:
        """tau after a hit, with the drafter's memory of the prefix whole, missing and remade."""
        for name, one in self._drafting.items():
            runs = {}
            for state in ["whole", "missing", *["remade"] * one.can_remake]:
                runs[state] = [one.after_hit(p, self._o.new, self._prefix(p), state) for p in self._prompts]
            rounds = {state: sum(len(g.rounds) for g in run) for state, run in runs.items()}
            tau = {state: sum(g.emitted for g in run) / max(1, rounds[state]) for state, run in runs.items()}
            drafts = {state: [g.rounds for g in run] for state, run in runs.items()}
            same_rounds = {state: one == drafts["whole"] for state, one in drafts.items() if state != "whole"}
            same_tokens = all([g.tokens for g in run] == [g.tokens for g in runs["whole"]] for run in runs.values())
            figures = {f"tau_{state}": round(value, 4) for state, value in tau.items()}
            figures["missing_of_whole"] = round(tau["missing"] / max(1.0, tau["whole"]), 4)
            said = {"hit": self._o.hit, "prompts": len(self._prompts), "trained": self._o.target is not None}
            self._line("accepted", name, **figures, same_rounds=same_rounds, same_tokens=same_tokens, rounds=rounds, **said)

    def round(self) -> None:
        """Milliseconds of a round: a draft alone, all of the drafter's part (`draft_ms`: it observes what was verified, too), and
        the target's."""
        times = {name: one.propose_ms(self._text_BL, 4 * self._o.repeats) for name, one in self._drafting.items()}
        reference = next(iter(times))
        for name, one in self._drafting.items():
            runs = [one.generate(self._first, self._o.new) for _ in range(self._o.repeats)]
            ms = {kind: [1e3 * getattr(g, f"{kind}_s") / max(1, len(g.rounds)) for g in runs] for kind in ("draft", "verify")}
            figures = {"propose_ms": round(times[name], 4), "of_reference": round(times[name] / times[reference], 3)}
            figures |= {f"{kind}_ms": round(median(found), 4) for kind, found in ms.items()}
            graphs = self._o.graphs and self._target.device.type == "cuda"
            self._line("round", name, **figures, reference=reference, length=one.length, graphs=graphs)

    def fit(self) -> None:
        """Requests of this context that fit in `gib`: weights, the target's cache and the drafter's. Activations are not counted.
        On a GPU `checked`: what fits in its free memory is allocated, and a little more is refused."""
        layer = sum(p.nbytes for p in self._target.layers[0].parameters())
        target = sum(p.nbytes for p in self._target.model.parameters()) + layer * (self._layers - len(self._target.layers))
        counts = {}
        for name, one in self._who.items():
            weights = target + one.weight_bytes
            request = len(self._first) * (self._cache_bytes + one.kept)
            counts[name] = int(max(0, self._o.gib * 2**30 - weights) // request)
            ratio = round(counts[name] / max(1, counts[ALONE]), 4)
            figures = {"gib": self._o.gib, "requests": counts[name], "of_target_alone": ratio}
            sizes = {"weights_gib": round(weights / 2**30, 3), "request_mib": round(request / 2**20, 3)}
            checked = self._checked(one.kept) if self._target.device.type == "cuda" else None
            self._line("fit", name, **figures, **sizes, checked=checked)

    def _checked(self, kept: int) -> dict[str, int | bool]:
        """Requests of the target as it was built, in the memory that is free now."""
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        request = len(self._first) * (self._cache_bytes * len(self._target.layers) // self._layers + kept)
        margin = 2**26  # an allocation is rounded up to pages of the GPU
        fits = (free - margin) // request
        more = (free + margin) // request + 1
        found = {"free_mib": free // 2**20, "fits": fits, "held": self._holds(fits, kept), "more_held": self._holds(more, kept)}
        torch.cuda.reset_peak_memory_stats()  # all of the GPU was held just now: no measurement of what follows
        return found

    def _holds(self, count: int, kept: int) -> bool:
        held = []
        try:
            held.append(StaticCache.of(self._target, count, len(self._first)))
            held.append(torch.zeros(count, len(self._first), kept, dtype=torch.uint8, device=self._target.device))
        except torch.OutOfMemoryError:
            return False
        finally:
            held.clear()
            torch.cuda.empty_cache()
        return True


def main() -> None:
    o = options(
        what="bytes,first_token,hit,accepted,round,fit", shape="tiny", depth=None, kinds=list(KINDS), contexts=[256], new=32,
        length=5, slots=16, vocabulary=0, target=None, drafters=[], prompts=None, count=2, hit=0.9, block=16, gib=80.0, repeats=5,
        graphs=True, compile=False, chunk=1024,
    )  # fmt: skip
    if o.target:
        target = load_target(TargetRecipe(path=o.target), CaptureRecipe(batch_tokens=1, attention="sdpa"))
        drafters = {folder: trained_drafter(target, folder) for folder in o.drafters}
    else:
        target = target_of(o.shape, "sdpa", o.depth)
        torch.manual_seed(0)
        drafters = {kind: random_drafter(target, kind, o) for kind in o.kinds}
    if o.compile:
        target.compile()
    for context in o.contexts:
        bench = Bench(target, drafters, o, context)
        for what in o.what.split(","):
            getattr(bench, what)()
        del bench
        gc.collect()


if __name__ == "__main__":
    main()
