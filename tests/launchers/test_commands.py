"""What a user types: every configuration composes, a mistake is one line and exit code 2 before anything is written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import cli
from common.errors import UserError
from data_prep.recipe import DataPrepRecipe
from eval.check import check_evaluation
from eval.recipe import EvalRecipe
from tests.support.caches import rewrite
from tests.support.commands import ROOT, SMALL, command
from train.build import check_training, engine_config
from train.recipe import TrainRecipe


def choices(group):
    return [path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if not path.stem.startswith("_")]


@pytest.mark.parametrize(
    "word",
    [
        f"{group}={choice}"
        for group in ("target", "objective", "reuse", "loss", "view", "deepspeed", "tracking", "experiment")
        for choice in choices(group)
    ],
)
def test_every_choice_of_train_composes(word):
    objective = ["objective=budgetdraft"] if word.startswith("view=") and word not in ("view=full", "view=auto") else []
    if word == "view=auto":
        with pytest.raises(UserError, match="view=auto is for evaluation"):
            cli.compose("train", TrainRecipe, [word])
        return
    recipe = cli.compose("train", TrainRecipe, [*objective, word])
    assert engine_config(recipe, bf16=True)["zero_optimization"] == recipe.deepspeed.zero_optimization


@pytest.mark.parametrize("group", ["target", "data", "view", "suite"])
def test_every_choice_of_the_others_composes(group):
    for choice in choices(group):
        if group in ("target", "data"):
            cli.compose("data_prep", DataPrepRecipe, [f"{group}={choice}"])
        cli.compose("eval", EvalRecipe, [f"{group}={choice}", "drafter=x"])


def test_budgetdraft_brings_a_view_and_a_number_is_the_only_budget():
    compose = lambda *words: cli.compose("train", TrainRecipe, ["objective=budgetdraft", *words])
    assert compose().view.kind == "topk_chunk" and compose("view=h2o").view.kind == "h2o"
    assert compose().view_sampler.sampler == "sandwich" and compose("objective.budgets=paper").view_sampler.sampler == "paper"
    assert compose("view.budget=512").view_sampler.judged[1:] == [512]
    block = compose("objective.kind=blockwise", "objective.slots=8", "objective.decay=4")
    assert block.objective.kind == "blockwise" and block.view_sampler.sparse == 0.5
    assert cli.compose("train", TrainRecipe, ["objective=ttt"]).view_sampler is None
    assert cli.compose("train", TrainRecipe, ["experiment=budgetdraft", "drafter.lm=x"]).view.refresh == "never"


@pytest.mark.parametrize("objective", ["ttt", "blockwise", "budgetdraft"])
@pytest.mark.parametrize("reuse", ["none", "hidden", "kv", "hybrid"])
def test_every_objective_with_every_reuse_and_source_is_accepted(cache, objective, reuse):
    sources = ["native", "projected", "projected_rope", "head_concat"] if reuse in ("kv", "hybrid") else [None]
    for source in sources:
        words = [f"objective={objective}", f"reuse={reuse}", f"cache.dir={cache}"]
        check_training(cli.compose("train", TrainRecipe, words + ([f"reuse.source={source}"] if source else [])))


def test_recipes_say_what_they_follow():
    """Every recipe begins with a comment; those after a paper also say where they depart from it."""
    for path in (ROOT / "conf/experiment").glob("*.yaml"):
        head = path.read_text().split("defaults:")[0]
        assert head.count("#") >= 3 and ("Departs:" in head or "control" in head or path.stem == "quickstart"), path


@pytest.mark.parametrize(
    "words,message",
    [
        (["train.max_stepz=3"], "train.max_stepz"),
        (["train.max_steps=many"], "train.max_steps.*integer.*many"),
        (["train.max_steps=0"], "train.max_steps.*greater than or equal to 1"),
        (["reuse=everything"], "Could not find 'reuse/everything'"),
        (["loss=mse"], "Could not find 'loss/mse'"),
        (["experiment=eagl3"], "Could not find 'experiment/eagl3'; there are .*; did you mean eagle3?"),
        (["deepspeed=3"], "there are zero0, .*; did you mean zero3.; a key of it is set as deepspeed.KEY=3"),
        (["loss=null"], "Could not find 'loss/null'; there are ce, "),
        (["loss=[kl,1]"], "Could not find 'loss/1'"),
        (["~loss=x"], "~loss=x: a recipe has one choice of every group"),
        (["train.lr=inf"], "train.lr: a number must be finite"),
        (["data.template={x: nan}"], "data.template: a number must be finite"),
        (["train.seed=9223372036854775808"], "train.seed: an integer must fit 64 bits"),
        ([f"run.dir={'x' * 300}"], "File name too long"),
        (["train.max_stepz=3", "reuse.gate.flor=1"], "flor: .* did you mean floor.; .*stepz: .* did you mean max_steps"),
        (["loss.kl=0"], "no term has a weight"),
        (["loss.tv=-1"], "loss.tv.*greater than or equal to 0"),
        (["objective.slots=1"], "a block needs at least 2 slots"),
        (["objective=ttt", "+objective.shifted=true"], "for block-wise drafting"),
        (["objective=ttt", "+objective.prefix=0.9"], "for block-wise drafting"),
        (["objective=ttt", "drafter.sequential=gru"], "drafter.sequential is for objective=blockwise"),
        (["reuse.fusion=cross_only"], "that is reuse=kv"),
        (["reuse=kv", "+reuse.fusion=cross_only"], "reuse.fusion is for reuse=hybrid"),
        (["reuse=kv", "+reuse.gate.floor=0.1"], "reuse.gate is for reuse=hybrid"),
        (
            ["objective=ttt", "reuse.fusion=cross_only", "reuse.gate.floor=0.1"],
            "reuse.gate is for reuse=hybrid reuse.fusion=gated",
        ),
        (["reuse=none", "+reuse.source=projected"], "reuse=none reads no K/V"),
        (["reuse=hidden", "+reuse.kv_layers=[0]"], "reuse=hidden reads no K/V"),
        (["reuse.kv_layers=[0]"], "reuse.source=native reads the layers of drafter.target_layers"),
        (["reuse=kv", "+reuse.hidden_layers=[0]"], "reuse=kv reads no hidden states"),
        (["reuse.source=projected", "reuse.kv_layers=[1,2]"], r"needs kv states of layer\(s\) \[1\]"),
        (["drafter.qk_norm=false"], "would be normed differently"),
        (["reuse=hidden", "loss.kv_align=1"], "reuse=hidden reads no K/V"),
        (["reuse.source=projected", "loss.query_align=1"], "projected keys have their own space"),
        (["loss.query_align=1"], r"loss.query_align needs query states.*cache.kinds=\[hidden,kv,query\]"),
        (["drafter.vocabulary=8192"], "drafter.vocabulary=8192 is no less than the target's 8192"),
        (["drafter.warm_start=nowhere"], "drafter.warm_start=nowhere holds no checkpoint"),
        (["drafter.layers=9"], "the cache holds 3 layer"),
        (["drafter.target_layers=[77]"], "there is no layer 77"),
        (["drafter.target_layers=[3]"], r"needs kv states of layer\(s\) \[3\].*holds \[0, 2, 5\]"),
        (["drafter.target_layers=[0,5]"], "names 2 layers for drafter.layers=1"),
        (["reuse=hidden", "reuse.hidden_layers=[1]"], r"needs hidden states of layer\(s\) \[1\]"),
        (["drafter.attention=flex"], "attention=flex cannot train on a CPU"),
        (["drafter.attention=flash", "objective=blockwise"], "attention=flash is for objective=ttt without views"),
        (["train.fp8=true"], "train.fp8=true needs bf16"),
        (["train.fp8=true", "train.precision=bf16", "deepspeed=zero3"], "train.fp8=true needs bf16"),
        (["target.mask_token_id=8192"], "outside the vocabulary of 8192"),
        (["target.path=nowhere"], "target.path=nowhere: no tokenizer can be loaded"),
        (["target.device=cuda"], "has no GPU"),
        (["cache.dir=nowhere", "cache.on_missing=fail"], "nowhere is not a cache"),
        ([f"cache.dir={__file__}", "cache.on_missing=fail"], "is not a cache"),
        ([f"cache.dir={__file__}"], "is a file; it must be a folder"),
        ([f"run.dir={__file__}"], "is a file; it must be a folder"),
        (["deepspeed.zero_optimization.stage=7"], "stage is 0, 1, 2 or 3, not 7"),
        (["train.betas=[2,0.9]"], "train.betas.0.*less than 1"),
        (["reuse=hidden", "reuse.hidden_layers=[]"], "hidden_layers"),
        (["view=topk_chunk"], "view=topk_chunk is practised by objective=budgetdraft"),
        (["view.budget=256"], "view=full shows everything"),
        (["objective=budgetdraft", "view=full"], "has nothing to hide"),
        (["objective=budgetdraft", "view.budget=0"], r"view.budget=0 \(everything\) trains no sparse branch"),
        (["objective=budgetdraft", "view.budget=-1"], "view.budget.*greater than or equal to 0"),
        (["objective=budgetdraft", "view.budget=79"], "always shows 8 sinks and 64 recent positions.*the least budget is 80"),
        (["objective=budgetdraft", "objective.smallest=79"], "a budget of 79: view=topk_chunk always shows 8 sinks"),
        (["objective=budgetdraft", "objective.smallest=300", "objective.largest=299"], "objective.smallest=300 exceeds"),
        (["objective=budgetdraft", "objective.budgets=fixed"], "objective.budgets=fixed is now view.budget=N"),
        (["objective=budgetdraft", "view.scorer=best"], "view.scorer: Input should be 'mean', 'lastkey', 'minmax' or 'quest'"),
        (["objective=budgetdraft", "view.sink=4"], "view.sink=4 is not whole chunks of view.chunk=8"),
        (["objective=budgetdraft", "view.refresh=0"], "a selection lasts 1 token or more"),
        (["objective=budgetdraft", "view=snapkv", "view.pool=4"], "view.pool is odd"),
        (["objective=budgetdraft", "view=snapkv", "view.recent=0"], "observes the last view.recent queries"),
        (["objective=budgetdraft", "+view=sink_recent", "view.scorer=mean"], "view"),
        (["objective=budgetdraft", "view=sink_recent", "+view.recent=9"], "it has no view.recent"),
        (["objective=budgetdraft", "loss.kv_align=1"], "where each anchor has one view"),
        (
            ["objective=budgetdraft", "reuse.source=projected", "view.positions=in_cache"],
            "reuse.source=projected mixes turned keys",
        ),
        (["objective=blockwise", "reuse=none", "drafter.lm=x"], "drafter.lm drafts token by token"),
        (["objective=ttt", "drafter.lm=x"], "drafter.lm drafts token by token"),
        (["objective=ttt", "reuse=none", "drafter.lm=x", "drafter.own_head=true"], "leave out drafter.own_head"),
        (["objective=ttt", "reuse=none", "drafter.lm=nowhere"], "drafter.lm=nowhere: there is no language model"),
        (["objective=blockwise", "reuse=hidden", "drafter.fc_norm=true"], "drafter.fc_norm norms what fc joins for pairs"),
        (["objective=ttt", "reuse=kv", "drafter.fc_norm=true"], "drafter.fc_norm norms what fc joins for pairs"),
        (["objective=blockwise", "reuse=hidden", "drafter.norm_output=true"], "drafter.norm_output is of the stream"),
        (["objective=ttt", "reuse=none", "drafter.norm_output=true"], "drafter.norm_output is of the stream"),
        (["reuse=kv", "+reuse.pairs=true"], "reuse.pairs is for reuse=hidden"),
        (["reuse=hybrid", "+reuse.pairs=true"], "reuse.pairs is for reuse=hidden"),
        (["objective=ttt", "reuse=hidden", "reuse.pairs=true"], "ttt over hidden states reads pairs by nature"),
        (["reuse=hidden", "reuse.pairs=true"], "say objective.shifted=true objective.causal=true"),
        (["experiment=peagle", "objective.causal=false"], "say objective.shifted=true objective.causal=true"),
        (["experiment=peagle", "objective.prefix=0.9"], "objective.prefix shows tokens whose features no block has"),
        (["experiment=peagle", "drafter.norm_output=true"], "drafter.norm_output is of the stream"),
        (["experiment=peagle", "drafter.attention=flash"], "attention=flash is for objective=ttt without views"),
        (["drafter.rope_factor=0.5"], "drafter.rope_factor.*greater than or equal to 1"),
    ],
)
def test_train_refuses_settings_that_cannot_work(cache, words, message):
    with pytest.raises(UserError, match=message):
        check_training(cli.compose("train", TrainRecipe, [f"cache.dir={cache}", *words]))


@pytest.mark.parametrize("on_missing", ["live", "capture"])
def test_a_cache_that_is_yet_to_be_made_is_checked_as_far_as_it_is_known(tmp_path, on_missing):
    words = [f"cache.on_missing={on_missing}", f"cache.dir={tmp_path / 'new'}", "data.max_tokens=2000", "reuse=kv"]
    compose = lambda *more: cli.compose("train", TrainRecipe, [*words, *more])
    check_training(compose())
    check_training(compose("loss.query_align=1", "cache.kinds=[kv,query]"))
    with pytest.raises(UserError, match="loss.query_align needs query states"):
        check_training(compose("loss.query_align=1"))
    assert not any(tmp_path.iterdir())


def test_pairs_take_eagle31_s_norms_before_fc_and_views(cache):
    compose = lambda *words: cli.compose("train", TrainRecipe, [f"cache.dir={cache}", "reuse=hidden", "reuse.pairs=true", *words])
    check_training(compose("experiment=peagle", "drafter.fc_norm=true"))
    block = ["objective.kind=blockwise", "+objective.shifted=true", "+objective.causal=true", "objective.decay=4"]
    check_training(compose("objective=budgetdraft", *block))


def test_recipes_run_on_a_cache_of_three_layers(cache):
    """Every recipe passes the check, with as few changes as its own comments name."""
    changes = {"eagle3": ["drafter.vocabulary=null"], "blockwise_native": ["drafter.layers=3"]}
    refused = {
        "blockwise_native_aligned": "loss.query_align needs query states",
        "gemma4_assistant": "is for targets of Gemma 4, and .* is a 'qwen3'",
    }
    for name in choices("experiment"):
        words = ["cache.on_missing=fail"] if name.startswith("smollm2_") else changes.get(name, [])  # those name SmolLM2's layers
        recipe = cli.compose("train", TrainRecipe, [f"experiment={name}", f"cache.dir={cache}", *words])
        if name in refused:
            with pytest.raises(UserError, match=refused[name]):
                check_training(recipe)
        else:
            check_training(recipe)


def test_a_world_size_that_does_not_divide_is_refused(cache, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="train.batch=8 packs a step cannot be shared by 3 ranks"):
        check_training(cli.compose("train", TrainRecipe, [f"cache.dir={cache}", "train.batch=8"]))


def test_a_cache_without_the_needed_states_is_refused(cache, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(cache, bare)
    manifest = json.loads((bare / "manifest.json").read_text())
    rewrite(bare, manifest | {"kv_layers": []})
    with pytest.raises(UserError, match="needs kv states, which the cache"):
        check_training(cli.compose("train", TrainRecipe, [f"cache.dir={bare}"]))
    rewrite(bare, manifest | {"tokenizer_hash": "0"})
    with pytest.raises(UserError, match="captured with another tokenizer"):
        check_training(cli.compose("train", TrainRecipe, [f"cache.dir={bare}"]))
    rewrite(bare, manifest)
    shard = next(bare.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard.name} is missing or truncated"):
        check_training(cli.compose("train", TrainRecipe, [f"cache.dir={bare}"]))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing or truncated"):
        check_training(cli.compose("train", TrainRecipe, [f"cache.dir={bare}"]))


@pytest.mark.parametrize(
    "words,message",
    [
        (["drafter=nowhere"], "nowhere holds no drafter"),
        (["temperatures=[-1]"], "a temperature is 0"),
        (["suite.count=1"], "suite.count"),
        (["top_p=0"], "top_p.*greater than 0"),
        (["batch=0"], "batch.*greater than or equal to 1"),
        (["verify=partial", "verify.retrieval=100"], "verify.retrieval=100 is not whole blocks of verify.block=16"),
        (["verify=partial", "verify.window=16"], "verify.window=16 is less than verify.partial_tokens=32"),
        (["mode=guess"], "mode: Input should be 'decode', 'score'"),
        (["view.budget=-3"], "view.budget.*greater than or equal to 0"),
        (["view=topk_chunk", "view.scorer=best"], "view.scorer: Input should be"),
        (["view=h2o", "view.budget=3", "view.sink=3"], "view=h2o always shows 3 sinks"),
        (["score.context=1"], "score.context.*greater than or equal to 2"),
        (["context=64"], r"context is now suite.prompt_tokens \(mode=decode and served\) or score.context \(mode=score and"),
        (["prompts.tokens=64"], "prompts.tokens is now suite.prompt_tokens"),
        (["suite.count=null"], "suite=heldout needs suite.count, 2 or more"),
        (["suite.prompt_tokens=null"], "suite=heldout needs suite.count, 2 or more, suite.prompt_tokens and suite.new_tokens"),
    ],
)
def test_eval_refuses_settings_that_cannot_work(words, message):
    with pytest.raises(UserError, match=message):
        check_evaluation(cli.compose("eval", EvalRecipe, ["drafter=nowhere", *words]))


@pytest.mark.parametrize(
    "program,words",
    [
        ("data_prep/main.py", ["cache.dir=new", "target=nope"]),
        ("data_prep/main.py", ["cache.dir=new", "data=jsonl", "data.path=absent.jsonl"]),
        ("data_prep/main.py", ["cache.dir=new", "cache.layers=[0,17]", "data.max_tokens=2000"]),
        ("train/main.py", ["cache.dir=absent", "cache.on_missing=fail", "run.dir=new"]),
        ("train/main.py", ["--no-such-flag", "cache.dir=absent"]),
        ("train/main.py", ["-m", "objective.slots=4,1", "cache.dir=absent", "cache.on_missing=fail", "run.dir=new"]),
        ("eval/main.py", ["drafter=absent", "out=new"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, program, words):
    done = command(ROOT / program, *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_three_commands_resume_score_and_judge(cache, tmp_path):
    """One process, from a folder of its own: train, say it again (nothing left to do), train another recipe into the same
    folder (refused), score and decode."""
    words = [
        "objective=blockwise",
        "reuse=hybrid",
        f"cache.dir={cache}",
        "train.batch=2",
        "train.max_steps=6",
        "train.save_every=3",
        *SMALL,
    ]
    done = command(ROOT / "train/main.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()  # named after the overrides
    assert (
        run.name.startswith("objective.anchors=8,objective.slots=4,objective=blockwise,reuse=hybrid,") and "cache" not in run.name
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "data_wait_share", "peak_gib", "sampled", "greedy"} <= lines[0].keys()
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["cache_manifest_hash"] and recipe["objective"]["slots"] == 4
    for link in ("best", "last"):  # as a kill between a checkpoint and its links would leave it
        (run / "checkpoints" / link).unlink()

    again = command(ROOT / "train/main.py", *words, cwd=tmp_path)
    assert again.returncode == 0 and "is finished: 6 steps" in again.stdout
    assert (run / "checkpoints/last").resolve().parent.name == "step-000006"
    other = command(ROOT / "train/main.py", *words, "train.seed=1", f"run.dir='{run}'", cwd=tmp_path)
    assert other.returncode == 2 and "holds a run of another recipe; these differ: train.seed" in other.stderr

    drafter = run / "checkpoints" / "best"
    assert {"config.json", "model.safetensors", "files.json"} == {p.name for p in drafter.iterdir()}
    scored = command(
        ROOT / "eval/main.py",
        "mode=score",
        f"drafter='{drafter}'",
        f"cache.dir={cache}",
        "out=scored",
        "score.documents=8",
        "score.anchors=8",
        "score.pack_tokens=256",
        cwd=tmp_path,
    )
    assert scored.returncode == 0, scored.stderr
    assert any("gate" in line.get("diagnostics", {}) for line in lines) and (run / "diagnostics.png").stat().st_size > 10_000
    best = max(line["validation"]["sampled"]["tau"] for line in lines if "validation" in line)
    assert json.loads((tmp_path / "scored/score.json").read_text())["sampled"]["tau"] == pytest.approx(best, abs=1e-6)

    small = ["score.documents=4", "score.anchors=4", "score.pack_tokens=256", f"cache.dir={cache}", f"drafter='{drafter}'"]
    diagnosed = command(ROOT / "eval/main.py", "mode=diagnose", "out=why", *small, cwd=tmp_path)
    assert diagnosed.returncode == 0, diagnosed.stderr
    found = json.loads((tmp_path / "why/diagnostics.json").read_text())  # the target's queries came from the target itself
    assert len(found["queries"]["layer0.cosine"]) == 3 and found["compute"]["gflop_per_anchor"] > 0
    assert {"trained", "zero_memory", "other_memory", "oracle_queries"} == found["acceptance"].keys()
    assert (tmp_path / "why/diagnostics.png").stat().st_size > 10_000
    for words, message in (
        (["draft.length=4"], "draft.length=4: .* drafts 1 to 3 tokens"),
        (["draft.breadth=2"], "trees are for drafters that draft token by token; objective=blockwise fills a block"),
        (["draft.nodes=4"], "draft.nodes=4 is for trees"),
        (["stop=['']"], "an empty string ends nothing"),
        (["verify.offload=true"], "verify.offload=true is for verify=partial"),
        (["verify=partial_audited"], r"verify=partial_audited .* temperatures=\[0\]"),
        (["verify=partial", "verify.partial_tokens=3"], "leaves no partial step beside drafts of 3 tokens"),
        (["verify=partial", "view=sink_recent", "view.budget=64"], "leave out view.budget"),
        (["suite.prompt_tokens=40000"], "exceed the target's .* positions"),
        (["mode=diagnose", "score.pack_tokens=64"], "mode=diagnose needs whole documents"),
        (["mode=export"], "cannot be exported as format=eagle3"),
        (["mode=export", "format=dflash"], "cannot be exported as format=dflash"),
    ):
        with pytest.raises(UserError, match=message):
            check_evaluation(cli.compose("eval", EvalRecipe, [*small, *words]))

    judged = command(
        ROOT / "eval/main.py",
        f"drafter='{drafter}'",
        "out=report",
        "suite.count=2",
        "suite.prompt_tokens=64",
        "suite.new_tokens=24",
        cwd=tmp_path,
    )
    assert judged.returncode == 0, judged.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert {"drafter", "target", "prompts", "commit", "temperatures"} <= report.keys()
    for figures in report["temperatures"].values():
        assert {
            "tau_micro",
            "tau_macro",
            "joint",
            "conditional",
            "tokens_per_s",
            "baseline_tokens_per_s",
            "speedup_decode",
            "speedup_end_to_end",
            "lossless",
            "repetition",
            "controls",
        } <= figures.keys()
        assert figures["lossless"]
        assert figures["tau_micro"] == pytest.approx(1 + sum(figures["joint"]))
        assert set(figures["controls"]) == {"untrained", "prompt_lookup", "zero_memory", "shuffled_memory"}
    assert (tmp_path / "report/report.png").stat().st_size > 10_000

    weights = load_file(drafter / "model.safetensors")
    weights["norm.weight"] = torch.zeros(3)
    broken = tmp_path / "broken"
    shutil.copytree(drafter, broken)
    save_file(weights, broken / "model.safetensors")
    for said in ("is not what files.json beside it says", "do not fit its config.json"):
        refused = command(ROOT / "eval/main.py", "drafter=broken", "out=no", cwd=tmp_path)
        assert refused.returncode == 2 and said in refused.stderr
        (broken / "files.json").unlink(missing_ok=True)


def test_deepspeed_builds_with_the_ninja_of_this_environment(cache, tmp_path):
    """Else two shells, with and without .venv/bin on their paths, build its operation in turns."""
    other = tmp_path / "bin/ninja"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    path = {"PATH": f"{other.parent}:{os.environ['PATH']}"}
    words = [f"cache.dir={cache}", "run.dir=run", "train.batch=1", "train.max_steps=1", *SMALL]
    done = command(ROOT / "train/main.py", *words, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {},
        pytest.param(
            {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online"}, marks=pytest.mark.slow
        ),
    ],
    ids=["no key", "a key, and a host that does not answer"],
)
def test_tracking_falls_back_to_an_offline_run(cache, tmp_path, environment):
    """Real W&B without a network: a run folder with the recipe, no prompt and no hang."""
    done = command(
        ROOT / "train/main.py",
        "tracking=wandb",
        f"cache.dir={cache}",
        "run.dir=run",
        "run.group=sweep",
        "train.batch=1",
        "train.max_steps=2",
        *SMALL,
        cwd=tmp_path,
        env={"NETRC": str(tmp_path / "none"), **environment},
        stdin=-3,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B cannot be reached") == bool(environment)
    (log,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for word in (b"cache_manifest_hash", b"git_revision", b"sampled.tau", b"grad_norm", b"sweep", b"diagnostics.attention"):
        assert word in content, word
    assert list(log.parent.glob("files/media/images/diagnostics*.png"))


@pytest.mark.slow
def test_the_eval_command_decodes_in_batches_with_stops_and_partial_verification(cache, tmp_path):
    """A ttt drafter: audited partial verification of trees, in batches, is plain decoding's; the lossy kind says how far it went;
    a stop string ends outputs; adaptive lengths change none; a cache on the host gives what one on the device gives."""
    words = ["objective=ttt", "reuse=kv", f"cache.dir={cache}", "run.dir=run", "train.batch=2", "train.max_steps=4", *SMALL]
    assert command(ROOT / "train/main.py", *words, cwd=tmp_path).returncode == 0
    few = ["suite.count=3", "suite.prompt_tokens=200", "suite.new_tokens=40", "controls=false", "temperatures=[0]"]
    part = ["verify.retrieval=32", "verify.window=32"]

    def judged(out: str, *more: str) -> dict:
        drafter = f"drafter={tmp_path / 'run/checkpoints/best'}"
        done = command(ROOT / "eval/main.py", drafter, f"out={out}", *few, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / out / "report.json").read_text())

    audited = judged("audited", "verify=partial_audited", *part, "batch=2", "draft.breadth=2", "draft.nodes=6")
    assert audited["temperatures"]["0"]["lossless"] and audited["verify"]["retrieval"] == 32 and audited["engine"]["batch"] == 2
    lossy, hosted = judged("lossy", "verify=partial", *part), judged("hosted", "verify=partial", *part, "verify.offload=true")
    assert not lossy["temperatures"]["0"]["lossless"] and "is lossy" in lossy["temperatures"]["0"]["lossless_by"]
    away = lossy["temperatures"]["0"]["divergence"]
    assert 0 <= away["agreement"] <= 1 and away["perplexity"]["full"] > 1
    assert "perplexity" in (tmp_path / "lossy/report.html").read_text()
    assert hosted["temperatures"]["0"]["per_prompt"] == lossy["temperatures"]["0"]["per_prompt"]
    stopped = judged("stopped", "draft.length=adaptive", "stop=[e]", "batch=3")["temperatures"]["0"]
    assert stopped["lossless"] and sum(tokens for tokens, _ in stopped["per_prompt_s"]) < 3 * 39
