"""Memory and time of one training step on one long document: full branch and sparse views, against the full branch alone.

    python -m tests.benchmarks.long_context shape=tiny reuse=kv
    python -m tests.benchmarks.long_context shape=qwen3_8b reuse=hybrid lengths=[4096,8192,16384,32768]

Features are random, the drafter starts at random. `gib_per_1k_tokens` is what the step takes beyond the shortest length's, by
token: the same at every length if memory is linear in it.
"""

import time
from statistics import median

import numpy as np
import torch

from data_prep.target import Architecture, FrozenHead, pick_device, pick_dtype
from tests.benchmarks import QWEN3_8B, line, options
from train.attention import executor
from train.batches import Pack, make_pack
from train.drafter.config import DrafterConfig
from train.drafter.model import Drafter
from train.losses import LossRecipe
from train.objectives import Objective
from train.objectives.budgetdraft import Branches
from train.views import View

TINY = {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 8192, "num_hidden_layers": 6}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 32768}
LAYERS = [0, 2, 5]


def architecture(shape: str) -> Architecture:
    s = {"tiny": TINY, "qwen3_8b": QWEN3_8B}[shape]
    inv_freq = (1e6 ** (-torch.arange(0, s["head_dim"], 2) / s["head_dim"])).tolist()
    return Architecture(
        s["hidden_size"], s["intermediate_size"], s["vocab_size"], s["num_hidden_layers"], s["num_attention_heads"],
        s["num_key_value_heads"], s["head_dim"], 1e-6, True, False, inv_freq, 1.0, s["max_position_embeddings"],
    )  # fmt: skip


def document(a: Architecture, config: DrafterConfig, length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    named = {f"hidden.{i}": (a.hidden_size,) for i in config.hidden_layers}
    named |= {f"{kind}.{i}": (a.kv_heads, a.head_dim) for i in config.kv_layers for kind in ("key", "value")}
    mask = (torch.arange(length) > 0).to(torch.uint8)
    states = {name: torch.randn(length, *row, dtype=dtype) for name, row in named.items()}
    ids = torch.randint(a.vocab_size, (length,), dtype=torch.int32)
    return {"input_ids": ids, "loss_mask": mask, "last_hidden": torch.randn(length - 1, a.hidden_size, dtype=dtype), **states}


def main() -> None:
    o = options(
        shape="tiny", objective="ttt", reuse="kv", view="topk_chunk", lengths=[4096, 8192, 16384, 32768], anchors=64, layers=2,
        slots=5, draws=1, attention="auto", chunk=1024, repeats=3,
    )  # fmt: skip
    device, a = pick_device(), architecture(o.shape)
    dtype = pick_dtype("auto", device)
    attend, kv = executor(o.attention, device), o.reuse in ("kv", "hybrid")
    config = DrafterConfig(
        objective=o.objective, reuse=o.reuse, target_layers=LAYERS[: o.layers] if kv else list(range(o.layers)),
        hidden_layers=LAYERS if o.reuse in ("hidden", "hybrid") else [], slots=o.slots, shifted=False, causal=False, seed=0,
        start="random", mask_token_id=2, architecture=a, target={},
    )  # fmt: skip
    with torch.device(device):
        head = FrozenHead(*(torch.randn(a.vocab_size, a.hidden_size, dtype=dtype) * 0.02 for _ in range(2)))
    drafter = Drafter(config).start(None, head.to("cpu", torch.float32)).to(device, dtype)
    kinds = {"topk_chunk": {"sink": 8, "recent": 64, "chunk": 8}, "sink_recent": {"sink": 4}, "h2o": {}, "snapkv": {"recent": 32}}
    view = View(kind=o.view, **kinds[o.view])
    sandwich = Branches(1.0, 0.5, "sandwich", 256, 2048, o.draws, 0)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4, fused=device.type == "cuda")
    step_of = {}
    for name, branches in (("full", [1.0]), ("budgetdraft", sandwich.weights)):
        weight_J = torch.ones(config.draft_length)
        step_of[name] = Objective(drafter, head, LossRecipe(kl=1.0), weight_J, attend, o.chunk, view, branches)
    first: dict[str, tuple[int, float]] = {}
    for length in o.lengths:
        rng = np.random.default_rng(0)
        anchors = np.sort(rng.choice(np.arange(1, length - o.slots), o.anchors, replace=False))
        doc = document(a, config, length, dtype)
        for name, objective in step_of.items():
            budgets = [sandwich.budgets(0, "d")] if name == "budgetdraft" else None
            pack = make_pack(["d"], [doc], [anchors], budgets=budgets, ages=budgets and [anchors * 0]).to(device)
            seconds = [one_step(objective, optimizer, pack, device) for _ in range(o.repeats + 1)][1:]
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
            before = first.setdefault(name, (length, peak))
            more = device.type == "cuda" and length > before[0]
            line(
                "long_context",
                branch=name,
                length=length,
                **{key: o[key] for key in ("shape", "objective", "reuse", "view", "anchors", "layers", "slots", "attention")},
                step_ms=round(1e3 * median(seconds), 1),
                tokens_per_s=round(length / median(seconds)),
                gib_per_1k_tokens=round(1024 * (peak - before[1]) / (length - before[0]), 4) if more else None,
            )


def one_step(objective: Objective, optimizer, pack: Pack, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    objective(pack, objective.weight_sums(pack)).share.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
