"""Time and memory of one training step, beside the matrix products that it cannot do without.

    python -m tests.benchmarks.train_step shape=qwen3_8b objective=ttt vocabulary=32000 own_head=true packs=[4x2048,1x8192]
    python -m tests.benchmarks.train_step shape=qwen3_8b objective=blockwise loss=ce packs=[4x2048,1x8192,1x32768]
    python -m tests.benchmarks.train_step objective=budgetdraft reuse=kv packs=[1x4096,1x8192]

The bare step: forward, backward, AdamW on weights of one precision (bf16 on a GPU), without an engine. `deepspeed=2`: also the
step under DeepSpeed at that ZeRO stage, with float32 master weights; on several GPUs, a pack each and tokens of all of them,
`deepspeed --num_gpus 2 --module tests.benchmarks.train_step deepspeed=2` times that alone. Features are random, the drafter
starts at random; every position is supervised. `floor_ms`: every matrix product of the step's linear layers and heads, forward
and backward, replayed with `torch.mm`; attention is none of them. `gib_per_1k_tokens`: what the step takes beyond the first
pack's, by token. `collectives_ms`: of rank 0 in one more step, which is profiled, by NCCL's kernels, waiting for the others
included; `exposed_ms`: how long nothing but them ran.

Shapes: N anchors, J steps or slots, P positions of a pack.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from common.ranks import single_process_defaults
from data_prep.target.architecture import Architecture
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.loading import pick_device, pick_dtype
from tests.benchmarks import QWEN3_8B, line, options, timed
from train.attention.choose import attention_backend
from train.data.pack import Pack, PackDocument, make_pack
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig
from train.losses.recipe import LossRecipe
from train.objectives.objective import Objective, Supervision
from train.run.ranks import connect
from train.views.budgets import ViewSampler
from train.views.recipe import View

TINY = {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 8192, "num_hidden_layers": 6}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 32768}
LAYERS = {"qwen3_8b": [2, 10, 18, 26, 33], "tiny": [0, 1, 2, 4, 5]}
DEFAULTS = {  # as the peers' steps were measured
    "ttt": dict(layers=1, slots=7, anchors=0, hidden=3),
    "blockwise": dict(layers=5, slots=16, anchors=512, hidden=5),
    "budgetdraft": dict(layers=2, slots=5, anchors=64, hidden=3),
}


def architecture(shape: str) -> Architecture:
    s = {"tiny": TINY, "qwen3_8b": QWEN3_8B}[shape]
    inv_freq = (1e6 ** (-torch.arange(0, s["head_dim"], 2) / s["head_dim"])).tolist()
    return Architecture(
        hidden_size=s["hidden_size"], intermediate_size=s["intermediate_size"], vocab_size=s["vocab_size"],
        num_layers=s["num_hidden_layers"], heads=s["num_attention_heads"], kv_heads=s["num_key_value_heads"],
        head_dim=s["head_dim"], norm_eps=1e-6, qk_norm=True, qkv_bias=False, inv_freq=inv_freq, rope_scale=1.0,
        max_positions=s["max_position_embeddings"],
    )  # fmt: skip


def drafter_config(o, a: Architecture) -> DrafterConfig:
    layers = LAYERS[o.shape]
    kv = o.reuse in ("kv", "hybrid")
    return DrafterConfig(
        objective="ttt" if o.objective == "budgetdraft" else o.objective, reuse=o.reuse, target_layers=layers[: o.layers],
        hidden_layers=layers[: o.hidden] if o.reuse in ("hidden", "hybrid") else [], slots=o.slots, shifted=o.shifted,
        causal=False, seed=0, start="random", source=o.source if kv else "native",
        source_layers=layers[: o.hidden] if kv and o.source != "native" else [], draft_vocab=o.vocabulary or None,
        own_head=o.own_head, own_kv=o.own_kv, mask_token_id=2, architecture=a, target={},
    )  # fmt: skip


def pack_of(o, a: Architecture, config: DrafterConfig, documents: int, length: int, dtype: torch.dtype) -> Pack:
    named = {f"hidden.{i}": (a.hidden_size,) for i in config.hidden_layers}
    named |= {f"{kind}.{i}": (a.kv_heads, a.head_dim) for i in config.kv_layers for kind in ("key", "value")}
    mask = (torch.arange(length) > 0).to(torch.uint8)

    def document() -> dict[str, Tensor]:
        states = {name: torch.randn(length, *row, dtype=dtype) for name, row in named.items()}
        ids = torch.randint(a.vocab_size, (length,), dtype=torch.int32)
        return {"input_ids": ids, "loss_mask": mask, "last_hidden": torch.randn(length - 1, a.hidden_size, dtype=dtype), **states}

    rng = np.random.default_rng(0)
    all_of_them = np.arange(1, length - 1)
    anchors = [np.sort(rng.choice(all_of_them, o.anchors, replace=False)) if o.anchors else all_of_them for _ in range(documents)]
    made = [PackDocument("d", document(), one) for one in anchors]
    if o.objective == "budgetdraft":
        budgets = sandwich(o).budgets(0, "d")
        made = [replace(one, budgets=budgets, ages=one.anchors * 0) for one in made]
    return make_pack(made)


def sandwich(o) -> ViewSampler:
    return ViewSampler(1.0, 0.5, "sandwich", 256, 2048, o.draws, 0)


def products(objective: Objective, pack: Pack) -> Counter:
    """(rows, inputs, outputs, products) of every linear layer and head: 3 where its input and its weight learn, 2 where one does,
    1 in a forward alone. Each position's teacher is computed once."""
    drafter = objective.drafter
    config = objective.drafter.config
    found = Counter()
    positions = len(pack.ids_P)
    rows = pack.views * len(pack.anchor_N) * config.slots
    for name, module in drafter.named_modules():
        if isinstance(module, nn.Linear):
            count = 2 if name == "fc" or name.startswith("target_kv") else 3
            seen = positions if count == 2 else rows
            if name.split(".")[-1] in ("k", "v") and count == 3:
                reads = ("hidden", "tokens") if config.objective == "blockwise" else (config.own_memory,)
                seen += positions * any(f".{branch}." in name for branch in reads)
            found[seen, module.in_features, module.out_features, count] += 1
    size = config.architecture.hidden_size
    valid = pack.valid(objective.slots)
    vocabulary = config.draft_vocab or config.architecture.vocab_size
    found[pack.views * int(valid.sum()), size, vocabulary, 3 if config.own_head else 2] += 1
    anchor, slot = valid.nonzero(as_tuple=True)
    found[len((pack.anchor_N[anchor] + slot).unique()), size, config.architecture.vocab_size, 1] += 1
    return found


def floor(found: Counter, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(milliseconds of all products one after the other, their TFLOP)."""
    total, tflop = 0.0, 0.0
    for (rows, inputs, outputs, count), times in found.items():
        x, w = torch.randn(rows, inputs, device=device, dtype=dtype), torch.randn(outputs, inputs, device=device, dtype=dtype)
        for left, right in ((x, w.T), (None, w), (None, x))[:count]:
            out = torch.randn(rows, outputs, device=device, dtype=dtype) if left is None else None
            a, b = (left, right) if left is not None else (out, w) if right is w else (out.T, x)
            total += times * median(timed(lambda: torch.mm(a, b), device) for _ in range(5))
            tflop += times * 2e-12 * rows * inputs * outputs
    return total, tflop


def under_deepspeed(objective: Objective, optimizer, stage: int, on_gpu: bool):
    single_process_defaults()
    import deepspeed

    connect(on_gpu, timeout_s=1800)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": on_gpu},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if on_gpu and stage else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    return engine


def collectives(step: Callable[[], None], device: torch.device) -> dict:
    """What a step spends in collectives on this GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        timed(step, device)
    kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        ours = kernel.name.startswith("ncclDevKernel")
        spans[ours].append((kernel.time_range.start, kernel.time_range.end))
        if ours:
            found[kernel.name.removeprefix("ncclDevKernel_").split("_")[0]] += kernel.time_range.elapsed_us() / 1e3
    alone = covered(spans[True] + spans[False]) - covered(spans[False])
    return {"collectives_ms": {name: round(ms, 2) for name, ms in found.items()}, "exposed_ms": round(alone / 1e3, 2)}


def covered(spans: list[tuple[float, float]]) -> float:
    """How long at least one of them lasted."""
    total, until = 0.0, -inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def main() -> None:
    o = options(
        shape="tiny", objective="ttt", reuse="hidden", source="native", attention="auto", packs=["1x2048"], loss="kl",
        vocabulary=0, own_head=False, layers=0, slots=0, anchors=-1, hidden=0, shifted=False, view="topk_chunk", draws=1,
        chunk=4096, compile=True, recompute=False, fp8=False, repeats=7, deepspeed=-1, own_kv=True, acceptance=True, profile="",
    )  # fmt: skip
    for key, value in DEFAULTS[o.objective].items():
        o[key] = value if o[key] == (-1 if key == "anchors" else 0) else o[key]
    torch.manual_seed(0)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if pick_device().type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = pick_device()
    a = architecture(o.shape)
    dtype = pick_dtype("auto", device)
    on_gpu = device.type == "cuda"
    config = drafter_config(o, a)
    with torch.device(device):
        head = FrozenHead(*(torch.randn(a.vocab_size, a.hidden_size, dtype=dtype) * 0.02 for _ in range(2)))
        drafter = new_drafter(config).to(dtype)  # a draft vocabulary of the first tokens
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    drafter.recompute = o.recompute
    if o.fp8:
        drafter.use_fp8()
    if o.compile and on_gpu and o.deepspeed < 3:
        drafter.compile_parts()
    plain = config.objective == "ttt" and o.objective != "budgetdraft"
    attend = attention_backend(o.attention, device, flash=plain, dense=not o.anchors)
    kinds = {"topk_chunk": {"sink": 8, "recent": 64, "chunk": 8}, "sink_recent": {"sink": 4}, "h2o": {}, "snapkv": {"recent": 32}}
    views = {}
    if o.objective == "budgetdraft":
        views = {"view": View(kind=o.view, **kinds[o.view]), "view_weights": sandwich(o).weights}
    weight_J = 0.8 ** torch.arange(config.draft_length)
    objective = Objective(drafter, head, attend, Supervision(LossRecipe(**{o.loss: 1.0}), weight_J, o.chunk, **views))
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-5, fused=True)
    engine, first = None, None
    for under in (False, True)[world > 1 : 1 + (o.deepspeed >= 0)]:
        if under:
            engine = under_deepspeed(objective, optimizer, o.deepspeed, on_gpu)
        for shape in o.packs:
            documents, length = map(int, str(shape).split("x"))
            pack = pack_of(o, a, config, documents, length, dtype).to(device)

            asked = {} if o.acceptance else {"acceptance": False}  # as in steps between `train.acceptance_every`
            losses = []

            def step() -> None:
                outcome = (engine or objective)(pack, objective.weight_sums(pack), **asked)
                losses.append(outcome.share.detach())
                if engine is not None:
                    engine.backward(outcome.share)
                    engine.step()
                    return
                outcome.share.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            for _ in range(3 if on_gpu else 1):  # compilers run in the first ones
                step()
            if o.profile:
                with torch.profiler.profile() as profiled:
                    timed(step, device)
                by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
                rows = profiled.key_averages().table(sort_by=by, row_limit=60)
                Path(o.profile).write_text(rows)
                profiled.export_chrome_trace(f"{o.profile}.json")
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            step_ms = median(timed(step, device) for _ in range(o.repeats))
            peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
            spent = collectives(step, device) if on_gpu and world > 1 else {}
            floor_ms, tflop = floor(products(objective, pack), device, dtype)
            tokens = documents * length
            if int(os.environ.get("RANK", 0)):
                continue
            growth = 1024 * (peak - first[1]) / (tokens - first[0]) if first and tokens > first[0] else None
            first = first or (tokens, peak)
            line(
                "train_step",
                deepspeed=o.deepspeed if under else None,
                gpus=world,
                pack=str(shape),
                **{key: o[key] for key in ("shape", "objective", "reuse", "attention", "loss", "layers", "slots", "anchors")},
                **{key: o[key] for key in ("vocabulary", "own_head", "compile", "recompute", "fp8", "chunk")},
                own_kv=o.own_kv,
                acceptance=o.acceptance,
                losses=[round(float(losses[i]), 5) for i in (0, -1)],  # of the first step and the last
                step_ms=round(step_ms, 1),
                **spent,
                tokens_per_s=round(1e3 * world * tokens / step_ms),
                floor_ms=round(floor_ms, 1),
                floor_share=round(floor_ms / step_ms, 3),
                floor_tflops=round(tflop / floor_ms * 1e3),
                step_peak_gib=round(peak, 2),
                gib_per_1k_tokens=growth and round(growth, 4),
            )


if __name__ == "__main__":
    main()
