"""Losslessness in few digits: honest runs part at ties alone, and nothing else passes for one.

Shapes: B requests, J drafted tokens, K = J + 1, T rows, V vocabulary, E hidden size.
"""

import json
import tempfile

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import eval.main
from common import cli
from data_prep.recipe import TargetRecipe
from data_prep.target.loading import load_target, load_tokenizer, tokenizer_hashes
from data_prep.target.target import Target
from eval.check import check_evaluation
from eval.engine.drafting import StaticNobody
from eval.engine.lengths import Adaptive
from eval.engine.request import Stops
from eval.engine.rounds import Rounds
from eval.judging import lossless
from eval.oracle.decode import Generation, Round
from eval.oracle.verify import accept
from eval.recipe import EvalRecipe
from eval.reports import page
from tests.support.engines import engine_of, trained
from tests.support.models import HIDDEN_LAYERS
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig

VOCAB, NEW, BATCH = 40, 40, 4


class OtherOrder(nn.Linear):
    """Adds up its products in two halves where a forward has several rows of a request: what a GPU's kernels do, on any CPU."""

    def forward(self, x):
        if x.dim() < 3 or x.shape[1] == 1:
            return super().forward(x)
        half = x.shape[-1] // 2
        first, second = (nn.functional.linear(x[..., part], self.weight[:, part]) for part in (slice(half), slice(half, None)))
        return first + second


def in_few_digits(dtype=torch.bfloat16, seed=0, vocab=VOCAB) -> Target:
    """A random target whose layers neither blow up what enters them nor drown it, as in a trained one."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, max_position_embeddings=512, initializer_range=0.12)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, **heads)).to(dtype).save_pretrained(folder)
        target = Target(folder, dtype=dtype)
    for layer in target.layers:
        layer.mlp.down_proj.__class__ = OtherOrder
        layer.self_attn.o_proj.__class__ = OtherOrder
    target.capture(HIDDEN_LAYERS, (1, 2))
    return target


@pytest.fixture(scope="module")
def target():
    return in_few_digits()


def texts(count=32, seed=0):
    """Texts of a few words, so that prompt lookup finds something."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 20, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in sizes]


def decoded(target, drafting, length, prompts, batch=BATCH, **options):
    """(generations, how they were decoded)."""
    engine = engine_of(target, drafting, length, batch, longest=20, new=NEW, **options)
    found, groups = [], []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        groups.append(range(start, start + len(some)))
        found += engine.generate(some, NEW, [0] * len(some), Stops())
    return found, lossless.Batches(groups, engine._rounds.cache, options.get("prefill_chunk", 1024))


def judged(target, drafting, length, prompts, batch=BATCH, unreplayed="", **options):
    run, batches = decoded(target, drafting, length, prompts, batch, **options)
    plain, _ = decoded(target, StaticNobody(), 0, prompts, batch, **options)
    ids = [f"prompt-{i}" for i in range(len(prompts))]
    return lossless.greedy(target, prompts, ids, run, plain, None if unreplayed else batches, unreplayed)


def test_correct_bf16_runs_differ_only_at_ties(target):
    """Really different tokens, and every one of them is explained; nothing differs where rows are the same (the control)."""
    prompts = texts()
    found = judged(target, trained(target, "ttt", "hybrid"), 4, prompts)
    ties = found["ties"]
    assert found["lossless"] and ties["count"] == len(ties["per_prompt"]) >= 3 and ties["equal"] + ties["count"] == len(prompts)
    assert 0 <= ties["largest_gap"] <= ties["bound"] and ties["dtype"] == "bf16" and ties["replayed"]
    for one in ties["per_prompt"]:
        assert one["fault"] is None and one["gap"] <= one["bound"] and one["tokens"][0] != one["tokens"][1]
    assert page.lossless(found) == "yes, to bf16"
    counted = f"({ties['equal']} equal, {ties['count']} part at ties, largest gap {ties['largest_gap']:.2g})"
    assert page.lossless_line(found) == f"yes, to bf16 {counted}"
    assert found["lossless_by"].startswith(f"{ties['equal']} of 32 outputs equal plain decoding's")
    same = judged(target, StaticNobody(), 0, prompts)
    assert same == {"lossless": True, "lossless_by": "32 of 32 outputs equal plain decoding's, token for token"}


def test_an_error_behind_a_tie_is_found(target, monkeypatch):
    """One token, ten places behind the first difference, that no rounding explains."""
    prompts = texts()
    run, batches = decoded(target, trained(target, "ttt", "hybrid"), 4, prompts)
    plain, _ = decoded(target, StaticNobody(), 0, prompts)
    ids = [f"prompt-{i}" for i in range(len(prompts))]
    honest = lossless.greedy(target, prompts, ids, run, plain, batches)
    assert honest["lossless"]
    with monkeypatch.context() as quantised:
        quantised.setattr(target, "rounds", True)
        unknown = lossless.greedy(target, prompts, ids, run, plain, batches)
        assert not unknown["lossless"] and "the target is quantised, and has no wider dtype" in unknown["lossless_by"]
    one = next(tie for tie in honest["ties"]["per_prompt"] if tie["position"] - len(prompts[ids.index(tie["id"])]) < NEW - 12)
    number = ids.index(one["id"])
    place = one["position"] - len(prompts[number]) + 10
    text = torch.tensor([prompts[number] + run[number].tokens[:place]])
    run[number].tokens[place] = int(target.logits(target.forward(text).last_hidden[0, -1]).argmin())
    found = lossless.greedy(target, prompts, ids, run, plain, batches)
    assert not found["lossless"] and f"prompt {one['id']}" in found["lossless_by"]
    assert "10 tokens behind the first difference" in found["lossless_by"]


SETTINGS = [  # seed, dtype, objective, reuse, batch, options
    (1, torch.bfloat16, "ttt", "kv", 1, {}),
    (2, torch.bfloat16, "blockwise", "hidden", 5, {"prefill_chunk": 7}),
    (3, torch.float16, "ttt", "hybrid", 4, {}),
    (4, torch.bfloat16, "blockwise_shifted", "kv", 5, {}),
    (5, torch.bfloat16, "adaptive", "hybrid", 4, {}),
    (6, torch.float32, "ttt", "hidden", 4, {}),
]
MANY = [(seed, *SETTINGS[seed % 6][1:]) for seed in range(7, 31)]


def check_honest(seed, dtype, objective, reuse, batch, options) -> int:
    """Returns how many requests part."""
    target = in_few_digits(dtype, seed)
    adaptive = objective == "adaptive"
    drafting = trained(target, "ttt" if adaptive else objective, reuse)
    length = Adaptive(4) if adaptive else drafting.drafter.config.draft_length
    found = judged(target, drafting, length, texts(14, seed), batch, **options)
    assert found["lossless"], found["lossless_by"]
    return found.get("ties", {}).get("count", 0)


def test_correct_runs_are_never_reported_as_faulty():
    """Batches with idle places, prompts read in chunks, lengths that change, three dtypes."""
    assert sum(check_honest(*one) for one in SETTINGS) >= 5


@pytest.mark.slow
def test_correct_runs_of_many_seeds_are_never_reported_as_faulty():
    assert sum(check_honest(*one) for one in MANY) > 20


def test_replayed_rows_give_the_runs_own_tokens(target):
    """At every place asked, ties or not, both runs' own tokens; the other run's rows give another token where they parted."""
    prompts = texts(BATCH, seed=3)
    run, batches = decoded(target, trained(target, "ttt", "kv"), 4, prompts)
    plain, _ = decoded(target, StaticNobody(), 0, prompts)
    for place in (1, 2, 3, 5, 8, 13, 21, 34, 39):
        for generations in (run, plain):
            found = lossless.replayed(target, batches, prompts, generations, dict.fromkeys(range(BATCH), place))
            assert found == {b: one.tokens[place] for b, one in enumerate(generations)}


def harmed(monkeypatch, chance, closer=float("inf")):
    """A verification that takes the second likeliest token for the likeliest now and then, where they are close enough."""
    generator = torch.Generator().manual_seed(0)

    def accepted(self, proposal, logits_BKV):
        first_BK, second_BK = logits_BKV.topk(2).indices.unbind(-1)
        best_BK2 = logits_BKV.topk(2).values
        wrong_BK = torch.rand(first_BK.shape, generator=generator) < chance
        wrong_BK &= best_BK2[..., 0] - best_BK2[..., 1] < closer
        return accept(proposal.tokens_BJ, torch.where(wrong_BK, second_BK, first_BK), proposal.count_B)

    monkeypatch.setattr(Rounds, "_accept_chain", accepted)


def first(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)


@pytest.mark.parametrize("chance,closer,least", [(1e-3, float("inf"), 1), (0.5, 0.03, 5)], ids=["one in a thousand", "near ties"])
def test_a_verification_that_errs_is_found(target, monkeypatch, chance, closer, least):
    """Every request whose first difference is a wrong token is at fault, however close the two tokens are, and is named."""
    prompts = texts()
    drafting = trained(target, "ttt", "hybrid")
    plain, _ = decoded(target, StaticNobody(), 0, prompts)
    honest, batches = decoded(target, drafting, 4, prompts)
    harmed(monkeypatch, chance, closer)
    run, _ = decoded(target, drafting, 4, prompts)
    ids = [f"prompt-{i}" for i in range(len(prompts))]
    found = lossless.greedy(target, prompts, ids, run, plain, batches)
    faults = [one for one in found["ties"]["per_prompt"] if one["fault"]]
    parted = {id: first(a.tokens, b.tokens) for id, a, b in zip(ids, run, plain)}
    went_wrong = {id: first(a.tokens, b.tokens) for id, a, b in zip(ids, run, honest)}
    at_once = [id for id in ids if parted[id] is not None and parted[id] == went_wrong[id]]
    before = [id for id in ids if parted[id] is not None and (went_wrong[id] is None or parted[id] < went_wrong[id])]
    assert len(at_once) >= least and before  # a wrong token is what differs; a tie is
    assert {one["id"] for one in faults}.issuperset(at_once) and not {one["id"] for one in faults}.intersection(before)
    assert not found["lossless"] and page.lossless(found) == "NO"
    assert f"prompt {faults[0]['id']}, token" in page.lossless_line(found)
    if closer < 1:  # within the bound: it takes the rows to see it
        assert all(one["gap"] <= one["bound"] and "rows give token" in one["fault"] for one in faults)
        unseen = lossless.greedy(target, prompts, ids, run, plain, None, "drafts are trees")
        assert unseen["lossless"] and "(rows not computed once more: drafts are trees)" in unseen["lossless_by"]


class Wrong(nn.Linear):
    """Several rows of a request come out a tenth too large, in bf16: the same mistake every time."""

    def forward(self, x):
        scale = 1.1 if x.dtype == torch.bfloat16 and x.dim() == 3 and x.shape[1] in range(2, 6) else 1.0
        return super().forward(x) * scale


def test_rows_that_are_wrong_twice_are_found():
    """A fault of the target's own forward gives its token again, and lies beyond what rounding explains."""
    target = in_few_digits(seed=1)
    for layer in target.layers:
        layer.mlp.down_proj.__class__ = Wrong
    found = judged(target, trained(target, "ttt", "hybrid"), 4, texts(12))
    faults = [one for one in found["ties"]["per_prompt"] if one["fault"]]
    assert not found["lossless"] and any(one["gap"] > one["bound"] and "rounding may reach" in one["fault"] for one in faults)


def test_an_output_that_ends_early_or_begins_with_another_token_is_a_fault(target):
    """Without a forward: an output that ends early, and another first token, which comes from the prompt alone."""
    prompts = [[3, 4]] * 2
    plain = [Generation([5, 6, 7], [Round(2, 0, 0), Round(3, 0, 0)])] * 2
    found = lossless.greedy(target, prompts, ["x", "y"], [Generation([5, 6]), Generation([4, 6, 7])], plain, None)
    assert not found["lossless"] and found["ties"]["count"] == 0 and found["ties"]["largest_gap"] is None
    assert "prompt x, token 3: one output has 2 tokens" in found["lossless_by"]
    assert "prompt y, token 1: the prompt's own forward gave both" in found["lossless_by"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_bound_holds_and_is_tight(dtype):
    """Errors of the differences of the five largest logits on the embedded target: nearly all below, and a good part of it."""
    target = Target("data_prep/targets/tiny", dtype=dtype)
    wide = target.widened(torch.float32, target.device)
    ids = torch.randint(9, 8000, (1, 160), generator=torch.Generator().manual_seed(0))
    ids = target.model.generate(ids[:, :32], max_new_tokens=128, do_sample=True, pad_token_id=1)
    hidden_TE = wide.forward(ids).last_hidden[0]
    exact_TV = wide.logits(hidden_TE)
    rough_TV = target.logits(target.forward(ids).last_hidden[0])
    shares = []
    for hidden_E, exact_V, rough_V in zip(hidden_TE, exact_TV, rough_TV):
        best, *others = exact_V.topk(5).indices.tolist()
        for other in others:
            pair = [best, other]
            error = abs(float(exact_V[best] - exact_V[other] - rough_V[best] + rough_V[other]))
            limit = lossless.bound(dtype, len(wide.layers), hidden_E, wide.frozen_head.head_VE[pair], exact_V[pair])
            shares.append(error / limit)
    shares = torch.tensor(shares)
    assert float((shares <= 1).float().mean()) > 0.99 and float(shares.quantile(0.99)) > 0.2
    assert target.dtype == dtype and target.model.dtype == dtype  # the judged target is as it was
    if dtype == torch.bfloat16:  # what it was stored in
        loaded = Target("data_prep/targets/tiny", dtype=torch.float32)
        assert torch.equal(loaded.forward(ids).last_hidden[0], hidden_TE)


def test_table_page_and_report_say_that_bf16_runs_are_lossless(tmp_path, monkeypatch, capsys):
    """The whole of mode=decode in bf16, in batches, chains and trees, where rows round otherwise: table, page, report.json."""

    def loaded(recipe):
        target = load_target(recipe)
        for layer in target.layers:
            layer.mlp.down_proj.__class__ = OtherOrder
        return target

    monkeypatch.setattr(eval.main, "load_target", loaded)
    tokenizer = load_tokenizer("data_prep/targets/tiny")
    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    about = {"id": "tiny", "weights_hash": target.weights_hash(), "tokenizer_hash": tokenizer_hashes(tokenizer)[0]}
    config = DrafterConfig("ttt", "kv", [5], [], 4, False, False, 0, "target", None, target.architecture, about)
    new_drafter(config).start(target, target.frozen_head).save_pretrained(tmp_path / "drafter")
    words = [f"drafter={tmp_path / 'drafter'}", "target.dtype=bfloat16", "temperatures=[0]", "batch=4", "controls=false"]
    words += ["suite.count=12", "suite.prompt_tokens=64", "suite.new_tokens=40"]
    for name, more in (("chain", []), ("tree", ["draft.breadth=2"])):
        out = tmp_path / name
        recipe = cli.compose("eval", EvalRecipe, [*words, *more, f"out={out}"])
        check_evaluation(recipe)
        eval.main.run(recipe)
        figures = json.loads((out / "report.json").read_text())["temperatures"]["0"]
        ties = figures["ties"]
        said = capsys.readouterr().out
        assert figures["lossless"] and 0 < ties["count"] == len(ties["per_prompt"]) and ties["replayed"] == (name == "chain")
        verdict = "yes, to bf16" if name == "chain" else "yes, within bf16 rounding"
        line = f"lossless: {verdict} ({ties['equal']} equal, {ties['count']} part at ties, largest gap "
        line += f"{ties['largest_gap']:.2g})"
        assert f"T = 0: {line}" in said and verdict.split(" bf16")[0] in said.split("T = 0")[0]
        html = (out / "report.html").read_text()
        assert line in html and f"<td>{verdict}</td>" in html and ("drafts are trees" in html) == (name == "tree")
    words = ["mode=compare", f"runs=[{tmp_path / 'chain'},{tmp_path / 'tree'}]", f"out={tmp_path}"]
    eval.main.run(cli.compose("eval", EvalRecipe, words))
    assert "yes, to bf16" in capsys.readouterr().out and "yes, to bf16" in (tmp_path / "compare.html").read_text()
    assert "yes, within bf16 rounding" in (tmp_path / "compare.html").read_text()
