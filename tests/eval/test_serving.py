"""Exports in a server: vLLM on this machine's CPU drafts with them, and accepts what our own decode loop accepts.

vLLM needs an environment of its own, `.venv-serving` (`make serving` makes it): it pins transformers below ours.
"""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.target.loading import load_tokenizer
from data_prep.target.target import Target
from eval.oracle.decode import decode
from eval.oracle.drafting import Nobody, Trained
from tests.support.assistants import SERVED_SIZES, assistant_of, served_target
from tests.support.commands import ROOT, without_vllm
from tests.support.packs import cached
from tests.support.served_drafters import drafter_for
from train.attention.choose import BACKENDS
from train.data.pack import PackDocument, make_pack
from train.drafter.build import new_drafter
from train.drafter.formats.export import save_export
from train.losses.recipe import LossRecipe
from train.objectives.objective import Objective, Supervision

pytestmark = pytest.mark.slow
TINY = ROOT / "data_prep/targets/tiny"
PYTHON = ROOT / ".venv-serving/bin/python"
TEXTS = (
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items.append(",
    "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n\n\ndef main():\n",
    "import os\nimport sys\n\n\ndef find(name, path=None):\n    if path is None:\n        path = os.environ['PATH']\n    for",
    "class Error(Exception):\n    pass\n\n\nclass ParseError(Error):\n    def __init__(self, message, line):\n        super()",
)
NEW = 60  # tokens behind each
# Of training. ttt needs more where its layers start at random.
STEPS = {"ttt": 25, "blockwise": 80, "random": 75, "assistant": 60}
# Draft layers of their own sizes beside a target of hidden size 256 and heads of 64.
SIZES = {"hidden_size": 96, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate_size": 160}

# name -> (format, objective, what else the drafter is)
EXPORTS = {
    "eagle3": ("eagle3", "ttt", {}),
    "eagle3, reduced vocabulary": ("eagle3", "ttt", {"draft_vocab": 500, "own_head": True}),
    "eagle3, three layers, a head of its own": (
        "eagle3",
        "ttt",
        {"target_layers": [1, 2, 4], "hidden_layers": [0, 2, 5], "norm_before_residual": True, "own_head": True},
    ),
    "eagle3, norms of queries and keys": ("speculators", "ttt", {"target_layers": [1, 4], "qk_norm": True}),
    "eagle3.1, states of four layers": (
        "speculators",
        "ttt",
        {"fc_norm": True, "norm_output": True, "hidden_layers": [3, 0, 2, 4]},
    ),
    "peagle": ("speculators", "blockwise", {"pairs": True, "shifted": True, "causal": True, "qk_norm": False}),
    "peagle, norms": ("speculators", "blockwise", {"pairs": True, "shifted": True, "causal": True, "fc_norm": True}),
    "dflash, one layer": ("dflash", "blockwise", {"target_layers": [1], "rope_factor": 2.0}),
    "dflash": ("dflash", "blockwise", {}),
    "eagle3, own sizes": ("eagle3", "ttt", {"sizes": SIZES}),
    "eagle3.1, own sizes, norms, reduced": (
        "speculators",
        "ttt",
        {"sizes": SIZES, "target_layers": [1, 4], "qk_norm": True, "fc_norm": True, "norm_output": True, "draft_vocab": 500},
    ),
    "dflash, own sizes": ("dflash", "blockwise", {"sizes": SIZES}),
    "dflash, causal, reduced": ("speculators", "blockwise", {"causal": True, "draft_vocab": 500, "own_head": True}),
}


@pytest.fixture(scope="module")
def target():
    return Target(str(TINY))


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(str(TINY))
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def taught(target, drafter, prompts):
    """The drafter after some steps on the target's own continuations of the prompts, so that much of what it drafts is accepted
    and much is not."""
    config = drafter.config
    names = []
    documents = []
    target.capture(config.hidden_layers, config.kv_layers)
    for prompt in prompts:
        continued = decode(target, Nobody(), prompt, NEW, 0, 0)
        documents.append(cached(target, prompt + continued.tokens, capture=False))
        names.append(str(len(names)))
    weight_J = 0.8 ** torch.arange(config.draft_length)
    supervision = Supervision(LossRecipe(kl=1), weight_J, chunk_rows=4096)
    objective = Objective(drafter, target.frozen_head, BACKENDS["reference"], supervision)
    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=2e-3)
    generator = np.random.default_rng(0)
    behind = [np.arange(len(prompt), len(prompt) + NEW - 4) for prompt in prompts]
    start = "assistant" if config.is_assistant else config.start
    for _ in range(STEPS[start if start != "target" and config.objective == "ttt" else config.objective]):
        anchors = [np.sort(generator.choice(places, 16, replace=False)) for places in behind]
        objective(make_pack(list(map(PackDocument, names, documents, anchors)))).share.backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.eval()


def accepted(target, drafter, prompts):
    """(outputs, drafts, how many drafts were accepted up to each position, ties) of our own decode loop, the oracle. `ties`:
    drafted tokens that another one was as good as, but for float32's rounding."""
    outputs, rounds = [], []
    target.capture(drafter.config.hidden_layers, drafter.config.kv_layers)
    for prompt in prompts:
        who = Trained(drafter, target.frozen_head, BACKENDS["reference"], None)
        generation = decode(target, who, prompt, NEW, 0, 0)
        outputs.append(generation.tokens)
        rounds += generation.rounds
    best_R2 = torch.cat([r.draft.logits_JV for r in rounds]).topk(2).values
    ties = int(((best_R2[:, 0] - best_R2[:, 1]) < 1e-5 * best_R2[:, 0].abs()).sum())
    return outputs, len(rounds), [sum(r.kept > j for r in rounds) for j in range(drafter.config.draft_length)], ties


def swapped(folder, copy):
    """The export with the columns of fc that belong to two layers in each other's place: the fault that nobody notices."""
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    first, second, third = weights["fc.weight"].chunk(3, dim=1)
    weights["fc.weight"] = torch.cat([second, first, third], dim=1)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def served(target, prompts, tmp_path_factory):
    """(what vLLM did with every export, what our loop did with its drafter); one process serves them one after the other."""
    if why := without_vllm():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("served")
    runs = {"nobody": {"drafter": None}}
    ours = {}
    for name, (format, objective, changes) in EXPORTS.items():
        drafter = taught(target, drafter_for(target, objective, **changes), prompts)
        out = folder / name.replace(" ", "_")
        save_export(drafter, target, out, format)
        plain = {"method": format, "model": str(out), "num_speculative_tokens": drafter.config.draft_length}
        run = {"drafter": str(out) if format == "speculators" else plain}
        runs[name] = run | {"own_key_norms": True}
        if name == "dflash":
            runs["dflash, as vLLM is"] = run
        if name == "eagle3":
            runs["eagle3, fc swapped"] = {"drafter": plain | {"model": str(swapped(out, folder / "swapped"))}}
        ours[name] = accepted(target, drafter, prompts)
    return answered(folder, {"target": str(TINY), "prompts": prompts, "new_tokens": NEW, "runs": runs}), ours


def answered(folder, asked):
    """What vLLM did, in a process of its own (tests/support/vllm_decode.py)."""
    (folder / "asked.json").write_text(json.dumps(asked))
    script = [str(PYTHON), str(ROOT / "tests/support/vllm_decode.py"), str(folder / "asked.json"), str(folder / "answer.json")]
    done = subprocess.run(script, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "answer.json").read_text())


@pytest.mark.parametrize("name", EXPORTS)
def test_vllm_accepts_what_we_accept(served, name):
    """In float32 token for token: what it says, how often it drafts, and what it accepts at every position. Where two tokens tie
    in a draft, either server may take the other one, which moves the few rounds behind it."""
    answer, ours = served
    outputs, drafts, counts, ties = ours[name]
    assert answer[name]["outputs"] == answer["nobody"]["outputs"] == outputs
    apart = np.abs(np.array([drafts, *counts]) - [answer[name]["drafts"], *answer[name]["accepted"]])
    assert apart.max() <= 4 * ties, (answer[name], drafts, counts)
    assert 0 < counts[1] <= counts[0] < drafts and ties < 3  # the comparison has something to compare


def test_a_fault_in_an_export_is_seen(served):
    """Negative control: two layers' columns of fc in each other's place leave the output as it is, and less is accepted."""
    answer, ours = served
    faulty, (outputs, drafts, counts, _) = answer["eagle3, fc swapped"], ours["eagle3"]
    assert faulty["outputs"] == outputs
    assert faulty["drafts"] > drafts + 5 and faulty["accepted"][0] / faulty["drafts"] < counts[0] / drafts


def test_vllm_on_a_cpu_norms_all_keys_with_the_first_layers_weight(served):
    """The fault of vLLM 0.32 that `own_key_norms` repairs; an export of several DFlash layers says so. When this fails, vLLM has
    mended it: the repair, this test and the note in train/drafter/formats/served.py can go."""
    answer, ours = served
    faulty, (outputs, drafts, counts, _) = answer["dflash, as vLLM is"], ours["dflash"]
    assert faulty["outputs"] == outputs
    assert (faulty["drafts"], faulty["accepted"]) != (drafts, counts)


# Assistants of Gemma 4.

def exchanged(folder, copy):
    """The export with its first two layers in each other's place."""
    shutil.copytree(folder, copy)
    places = {"model.layers.0.": "model.layers.1.", "model.layers.1.": "model.layers.0."}
    weights = {places.get(name[:15], name[:15]) + name[15:]: t for name, t in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def elsewhere(drafter, **changes):
    """The same weights as a drafter that reads otherwise."""
    other = new_drafter(replace(drafter.config, **changes))
    other.load_state_dict(drafter.state_dict())
    return other.eval()


@pytest.fixture(scope="module")
def assisted(tmp_path_factory):
    """(what vLLM did with an assistant and with a faulty one, what our loop did with the assistant and with faulty ones)."""
    if why := without_vllm():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("assisted")
    target = served_target(folder / "target")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 29, (length,), generator=generator).tolist() for length in (5, 23, 40, 61)]
    drafter = taught(target, assistant_of(target, random=False, sizes=SERVED_SIZES), prompts)
    save_export(drafter, target, folder / "assistant", "gemma4_assistant")
    runs = {"nobody": {"drafter": None}}
    for name, place in {"ours": folder / "assistant", "exchanged": exchanged(folder / "assistant", folder / "exchanged")}.items():
        runs[name] = {"drafter": {"method": "mtp", "model": str(place), "num_speculative_tokens": drafter.config.draft_length}}
    without_norm = elsewhere(drafter)
    without_norm._feature = lambda hidden_PI: hidden_PI
    first = [0 if layer == 2 else layer for layer in drafter.config.target_layers]
    ways = {
        "ours": drafter,
        "state before the norm": without_norm,
        "an earlier layer's keys": elsewhere(drafter, target_layers=first),
        "positions that advance": elsewhere(drafter, constant_positions=False),
    }
    ours = {name: accepted(target, one, prompts) for name, one in ways.items()}
    asked = {"target": str(folder / "target"), "prompts": prompts, "new_tokens": NEW, "runs": runs}
    return answered(folder, asked), ours


def test_vllm_accepts_of_an_assistant_what_we_accept(assisted):
    answer, ours = assisted
    outputs, drafts, counts, ties = ours["ours"]
    assert answer["ours"]["outputs"] == answer["nobody"]["outputs"] == outputs
    assert (answer["ours"]["drafts"], answer["ours"]["accepted"]) == (drafts, counts)
    assert 0 < counts[2] < counts[0] < drafts and ties == 0


@pytest.mark.parametrize("fault", ["state before the norm", "an earlier layer's keys", "positions that advance"])
def test_an_assistant_that_reads_otherwise_is_seen(assisted, fault):
    """Negative controls on our side: the outputs stay, and the counts are not vLLM's."""
    answer, ours = assisted
    outputs, drafts, counts, _ = ours[fault]
    assert outputs == answer["ours"]["outputs"]
    assert (drafts, counts) != (answer["ours"]["drafts"], answer["ours"]["accepted"])


def test_an_export_whose_layers_are_exchanged_is_seen(assisted):
    answer, ours = assisted
    outputs, drafts, _, _ = ours["ours"]
    assert answer["exchanged"]["outputs"] == outputs and answer["exchanged"]["drafts"] > drafts
