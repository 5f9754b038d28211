"""A recipe and a cache -> the drafter that is to be trained, what its engine is told, and every refusal that needs no GPU."""

import numpy as np
import torch

from common.cli import refuse_file
from common.errors import UserError
from common.ranks import world_size
from data_prep.cache.manifest import Manifest
from data_prep.cache.reader import CacheReader
from data_prep.capture.live import LiveReader, manifest_of
from data_prep.target.target import Architecture, load_tokenizer, pick_device, tokenizer_hashes
from train.attention.choose import attention_backend
from train.drafter.base import Drafter
from train.drafter.config import DrafterConfig
from train.drafter.standalone import check_vocabulary, lm_config
from train.drafter.warm_start import check_warm_start
from train.precision.fp8 import TILE
from train.recipe import ObjectiveRecipe, TrainRecipe
from train.schedules.registry import OBJECTIVES


def chosen_layers(recipe: TrainRecipe, manifest: Manifest) -> tuple[list[int], list[int], list[int]]:
    """(target layers, one a draft layer; layers whose hidden states are read; layers whose K/V are joined, unless native).

    Raises:
        UserError: the cache lacks a layer or a kind that the recipe needs.
    """
    reuse, count = recipe.reuse, recipe.drafter.layers
    if recipe.drafter.lm:
        return [], [], []
    needs = {
        "hidden": reuse.kind in ("hidden", "hybrid"),
        "kv": reuse.kind in ("kv", "hybrid"),
        "query": recipe.loss.query_align > 0,
    }
    held = {"hidden": manifest.hidden_layers, "kv": manifest.kv_layers, "query": manifest.query_layers}
    for name in (name for name, needed in needs.items() if needed and not held[name]):
        wants = "loss.query_align" if name == "query" else f"reuse={reuse.kind}"
        raise UserError(
            f"{wants} needs {name} states, which the cache {recipe.cache.dir} does not hold; "
            f"capture it with cache.kinds=[{','.join(n for n in held if needs[n] or held[n])}]"
        )
    target_layers = recipe.drafter.target_layers
    deepest = manifest.target["architecture"]["num_layers"] - 1
    if target_layers == "auto":
        available, native = held["kv"] or held["hidden"], needs["kv"] and reuse.source == "native"
        if len(available) < count and not native:
            available = list(range(deepest + 1))  # no states of theirs are read: a draft layer may start from any
        if len(available) < count:
            raise UserError(
                f"drafter.layers={count}, but the cache holds {len(available)} layer(s); name drafter.target_layers, "
                "or capture more layers"
            )
        first, last = (0 if count > 1 else len(available) - 1), len(available) - 1
        target_layers = [available[i] for i in np.linspace(first, last, count).round().astype(int)]
    elif len(target_layers) != count:
        raise UserError(f"drafter.target_layers names {len(target_layers)} layers for drafter.layers={count}")
    auto = lambda layers, name: [] if not needs[name] else held[name] if layers == "auto" else list(layers)
    hidden_layers = auto(reuse.hidden_layers, "hidden")
    source_layers = [] if reuse.source == "native" else auto(reuse.kv_layers, "kv")
    for layer in [*target_layers, *hidden_layers, *source_layers]:
        if not 0 <= layer <= deepest:
            raise UserError(f"the target has layers 0 to {deepest}; there is no layer {layer}")
    attended = source_layers or target_layers
    queried = source_layers if reuse.source == "head_concat" else target_layers
    for name, layers in (("hidden", hidden_layers), ("kv", attended), ("query", queried)):
        if needs[name] and (missing := sorted(set(layers) - set(held[name]))):
            raise UserError(
                f"reuse={reuse.kind} needs {name} states of layer(s) {missing}; the cache {recipe.cache.dir} holds {held[name]}"
            )
    return list(target_layers), list(hidden_layers), source_layers


def drafter_config(recipe: TrainRecipe, manifest: Manifest) -> DrafterConfig:
    """The drafter that this recipe trains on a cache of this manifest. Raises UserError as `chosen_layers` does."""
    target_layers, hidden_layers, source_layers = chosen_layers(recipe, manifest)
    lm, sampler = recipe.drafter.lm and lm_config(recipe.drafter.lm), recipe.view_sampler
    architecture, qk_norm = Architecture(**manifest.target["architecture"]), recipe.drafter.qk_norm
    sizes = [architecture.hidden_size, architecture.intermediate_size]
    sizes += [] if recipe.drafter.own_head else [recipe.drafter.vocabulary or architecture.vocab_size]
    if recipe.train.fp8 and any(size % TILE for size in sizes):
        raise UserError(f"train.fp8=true needs sizes that are whole {TILE}s; the target's states, MLP and head have {sizes}")
    beside = recipe.reuse.kind in ("kv", "hybrid") and recipe.reuse.source in ("native", "head_concat")
    if beside and qk_norm not in (None, architecture.qk_norm):
        raise UserError(
            f"drafter.qk_norm={str(qk_norm).lower()} with reuse.source={recipe.reuse.source}: draft keys and the target's "
            "would be normed differently; drafter.qk_norm=null follows the target"
        )
    return DrafterConfig(
        objective=recipe.objective.kind,
        reuse=recipe.reuse.kind,
        target_layers=target_layers,
        hidden_layers=hidden_layers,
        slots=recipe.objective.slots,
        causal=recipe.objective.causal,
        shifted=recipe.objective.shifted,
        seed=recipe.train.seed,
        start=recipe.drafter.start,
        source=recipe.reuse.source,
        source_layers=source_layers,
        fusion=recipe.reuse.fusion,
        gate_floor=recipe.reuse.gate.floor,
        qk_norm=qk_norm,
        draft_vocab=recipe.drafter.vocabulary,
        own_head=recipe.drafter.own_head,
        sequential=recipe.drafter.sequential,
        sequential_size=recipe.drafter.sequential_size,
        rope_factor=recipe.drafter.rope_factor,
        norm_before_residual=recipe.drafter.norm_before_residual,
        view=sampler and recipe.view.model_dump(exclude={"budget"}),
        budgets=sampler and (sampler.smallest if sampler.sampler == "fixed" else sampler.sampler),
        positions=_positions(recipe, manifest, lm),
        lm=lm,
        pairs=recipe.reuse.pairs,
        fc_norm=recipe.drafter.fc_norm,
        norm_output=recipe.drafter.norm_output,
        mask_token_id=recipe.target.mask_token_id,
        architecture=architecture,
        target={
            "id": manifest.target["id"],
            "weights_hash": manifest.target["weights_hash"],
            "tokenizer_hash": manifest.tokenizer_hash,
        },
    )


def uses_bf16(recipe: TrainRecipe, device: torch.device) -> bool:
    """Whether weights are bf16 in the forward and backward."""
    return recipe.train.precision == "bf16" or (recipe.train.precision == "auto" and device.type == "cuda")


def attention(recipe: TrainRecipe, device: torch.device, head_dim: int):
    """The backend that trains this recipe. Raises UserError as `attention_backend` does."""
    flash = OBJECTIVES[recipe.objective.kind].token_by_token and recipe.view_sampler is None and recipe.drafter.lm is None
    if device.type == "cuda":
        flash &= uses_bf16(recipe, device) and head_dim % 8 == 0 and head_dim <= 256
        flash &= torch.cuda.get_device_capability(device) >= (8, 0)
    return attention_backend(recipe.drafter.attention, device, flash=flash, dense=recipe.objective.anchors is None)


def _positions(recipe: TrainRecipe, manifest: Manifest, lm: dict | None) -> int | None:
    """Up to where the drafter will know positions: what it began with, or the longest document that a pack holds.

    Raises:
        UserError: the documents are longer than what a language model was made for.
    """
    factor, longest = recipe.drafter.rope_factor, manifest.max_length
    if lm is None:
        return min(longest, recipe.train.pack_tokens) if recipe.drafter.start == "random" else None
    if lm["positions"] and longest > factor * lm["positions"]:
        raise UserError(
            f"drafter.lm={lm['path']} knows {lm['positions']} positions, the cache's documents have up to {longest}; scale its "
            f"positions with drafter.rope_factor={-(-longest // lm['positions'])}, or cut the documents (data.max_length)"
        )
    return max(longest, int(factor * (lm["positions"] or 0)))


def check_training(recipe: TrainRecipe) -> None:
    """Raises UserError for everything that can be known before the target is loaded and a GPU is touched."""
    if recipe.train.batch % world_size():
        raise UserError(
            f"train.batch={recipe.train.batch} packs a step cannot be shared by {world_size()} ranks; "
            "make it a multiple of the world size"
        )
    if recipe.run.dir:
        refuse_file("run.dir", recipe.run.dir)
    device, manifest = pick_device(recipe.target.device), manifest_of(recipe)
    attention(recipe, device, manifest.target["architecture"].get("head_dim", 128))  # of a cache yet to be made it is not known
    if recipe.drafter.lm and recipe.train.recompute:
        raise UserError("train.recompute=true is not for drafter.lm")
    if recipe.train.fp8 and (recipe.drafter.lm or not uses_bf16(recipe, device) or recipe.deepspeed.stage == 3):
        raise UserError("train.fp8=true needs bf16 (train.precision=bf16), ZeRO 0 to 2, and no drafter.lm")
    if recipe.train.fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"train.fp8=true: {torch.cuda.get_device_name(device)} has no fp8 products; use train.fp8=false")
    chosen_layers(recipe, manifest)
    if manifest.target["weights_hash"]:  # else the target has yet to be loaded, and the engine says the rest
        config = drafter_config(recipe, manifest)
        if recipe.drafter.warm_start:
            check_warm_start(recipe.drafter.warm_start, config)
    tokenizer = load_tokenizer(recipe.target.location, recipe.target.revision)
    if tokenizer_hashes(tokenizer)[0] != manifest.tokenizer_hash:
        raise UserError(
            f"the cache {recipe.cache.dir} was captured with another tokenizer than that of target {recipe.target.path}"
        )
    vocab = manifest.target["architecture"]["vocab_size"]
    if recipe.drafter.lm:
        _positions(recipe, manifest, lm_config(recipe.drafter.lm))
        check_vocabulary(recipe.drafter.lm, tokenizer, vocab)
    if recipe.drafter.vocabulary and recipe.drafter.vocabulary >= vocab:
        raise UserError(f"drafter.vocabulary={recipe.drafter.vocabulary} is no less than the target's {vocab}; leave it out")
    if recipe.target.mask_token_id is not None and recipe.target.mask_token_id >= vocab:
        raise UserError(f"target.mask_token_id={recipe.target.mask_token_id} is outside the vocabulary of {vocab}")


def check_target(architecture: Architecture, weights_hash: str, manifest: Manifest, cache_dir: str) -> None:
    """Raises UserError when the loaded target is not the one that was captured."""
    if architecture.vocab_size != manifest.target["architecture"]["vocab_size"]:
        raise UserError(
            f"the target has a vocabulary of {architecture.vocab_size}, the cache {cache_dir} one of "
            f"{manifest.target['architecture']['vocab_size']}"
        )
    if weights_hash != manifest.target["weights_hash"]:
        raise UserError(
            f"the cache {cache_dir} was captured from another target: weights hash {manifest.target['weights_hash']}, "
            f"loaded {weights_hash}"
        )


def slot_weights(objective: ObjectiveRecipe, slots: int) -> torch.Tensor:
    """Weights of the drafted slots, [J]."""
    return OBJECTIVES[objective.kind].slot_weights(slots, objective.decay)


def parameter_groups(drafter: Drafter, recipe: TrainRecipe) -> list[dict]:
    """All parameters; the gates' in a group of their own where they learn at another rate."""
    ratio, gates = recipe.reuse.gate.lr_ratio, [p for fuse in drafter.fusions for p in fuse.parameters()]
    if ratio == 1:
        return [{"params": list(drafter.parameters())}]
    others = [p for p in drafter.parameters() if all(p is not gate for gate in gates)]
    return [{"params": others}, {"params": gates, "lr": ratio * recipe.train.lr}]


def token_counts(reader: CacheReader | LiveReader, documents: np.ndarray, vocabulary: int) -> torch.Tensor:
    """How often the documents supervise each token, [V]."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for part in np.array_split(documents, -(-len(documents) // 1000)):
        supervised = [ids[mask.bool()] for ids, mask in map(reader.text, part)]
        counts += torch.bincount(torch.cat(supervised).long(), minlength=vocabulary)
    return counts


def engine_config(recipe: TrainRecipe, bf16: bool) -> dict:
    """DeepSpeed's configuration, every default that matters spelled out."""
    train, stage = recipe.train, recipe.deepspeed.stage
    return {
        **recipe.deepspeed.model_dump(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.batch // world_size(),
        "gradient_clipping": train.clip,  # DeepSpeed's own default is 1.0
        "bf16": {"enabled": bf16},
        # ZeRO-0 refuses float32 accumulation of bf16 gradients.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and stage else {}),
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": train.max_steps,
                "warmup_num_steps": max(2, round(train.warmup_ratio * train.max_steps)),
                "warmup_min_ratio": 0.0,
                "warmup_type": "linear",
                "cos_min_ratio": train.min_lr_ratio,
            },
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
