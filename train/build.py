"""A recipe and a cache -> the drafter that is to be trained, what its engine is told, and every refusal that needs no GPU."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from common.cli import refuse_file
from common.errors import UserError
from common.ranks import rank, world_size
from common.rules import refuse
from data_prep.cache.manifest import Manifest
from data_prep.cache.reader import CacheReader
from data_prep.capture.live import LiveReader, manifest_of
from data_prep.target.architecture import Architecture, KVLayer, last_layers_with_kv, target_config, target_sizes, unlike
from data_prep.target.loading import pick_device, target_tokenizer, tokenizer_hashes
from data_prep.target.quantised import in_words
from train import machine_rules
from train.attention.choose import attention_backend
from train.drafter.config import DrafterConfig
from train.drafter.own_sizes import draft_architecture, own_sizes
from train.drafter.standalone import check_vocabulary, lm_config
from train.drafter.warm_start import check_warm_start
from train.gate import gate_floor
from train.precision.fp8 import TILE
from train.recipe import ObjectiveRecipe, TrainRecipe
from train.schedules.registry import OBJECTIVES
from train.unread import unread


def chosen_layers(recipe: TrainRecipe, manifest: Manifest) -> tuple[list[int], list[int], list[int]]:
    """(target layers, one a draft layer; layers whose hidden states are read; layers whose K/V are joined, unless native).

    Raises:
        UserError: the cache lacks a layer or a kind that the recipe needs.
    """
    # 1. What this drafter reads, and what the cache holds.
    reuse = recipe.reuse
    count = recipe.drafter.layers
    if recipe.drafter.lm:
        return [], [], []
    needs = {
        "hidden": reuse.kind in ("hidden", "hybrid"),
        "kv": reuse.kind in ("kv", "hybrid"),
        "query": recipe.loss.query_align > 0,
    }
    held = {"hidden": manifest.hidden_layers, "kv": manifest.kv_layers, "query": manifest.query_layers}
    deepest = manifest.target["architecture"]["num_layers"] - 1
    native = needs["kv"] and reuse.source == "native"
    available = held["kv"] or held["hidden"]
    assistant = recipe.drafter.kind == "gemma4_assistant"
    target_layers = _last_layers(recipe, held, deepest) if assistant else recipe.drafter.target_layers
    if assistant:
        available = target_layers
    elif len(available) < count and not native:
        available = list(range(deepest + 1))  # no states of theirs are read: a draft layer may start from any
    refuse(machine_rules.HELD, recipe, machine_rules.Held(needs, held, available))

    # 2. The layers: where `auto` stands, draft layers are spread from the first layer to the last (one alone: the last).
    if target_layers == "auto":
        last = len(available) - 1
        first = 0 if count > 1 else last
        target_layers = [available[i] for i in np.linspace(first, last, count).round().astype(int)]

    def layers_of(kind: str, said: list[int] | str) -> list[int]:
        if not needs[kind]:
            return []
        return held[kind] if said == "auto" else list(said)

    hidden_layers = [deepest] if assistant else layers_of("hidden", reuse.hidden_layers)
    source_layers = [] if reuse.source == "native" else layers_of("kv", reuse.kv_layers)

    # 3. They exist, and the cache holds their states.
    reads = {
        "hidden": hidden_layers,
        "kv": source_layers or target_layers,
        "query": source_layers if reuse.source == "head_concat" else target_layers,
    }
    named = [*target_layers, *hidden_layers, *source_layers]
    reads = {name: layers for name, layers in reads.items() if needs[name]}
    refuse(machine_rules.LAYERS, recipe, machine_rules.ReadLayers(named, reads, held, deepest))
    return list(target_layers), list(hidden_layers), source_layers


def _last_layers(recipe: TrainRecipe, held: dict[str, list[int]], deepest: int) -> list[int]:
    """What an assistant reads: the target's last full layer in its own last layer, the last sliding one in those before it."""
    target = target_config(recipe.target)
    text = target.get_text_config(decoder=True)
    last = last_layers_with_kv(target)
    refuse(machine_rules.ASSISTANT, recipe, machine_rules.Gemma(text.model_type, last, text.hidden_size, deepest, held))
    if recipe.drafter.target_layers != "auto":
        return recipe.drafter.target_layers
    before = recipe.drafter.layers - 1
    return [*[last.get("sliding_attention")] * before, last["full_attention"]]


def drafter_config(recipe: TrainRecipe, manifest: Manifest) -> DrafterConfig:
    """The drafter that this recipe trains on a cache of this manifest. Raises UserError as `chosen_layers` does."""
    target_layers, hidden_layers, source_layers = chosen_layers(recipe, manifest)
    lm = recipe.drafter.lm and lm_config(recipe.drafter.lm)
    sampler = recipe.view_sampler
    target = Architecture(**manifest.target["architecture"])
    architecture = draft_architecture(recipe.drafter.named_sizes, target)
    refuse(machine_rules.SHAPES, recipe, machine_rules.Shapes(architecture, target, TILE))
    config = DrafterConfig(
        kind=recipe.drafter.kind,
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
        own_kv=recipe.reuse.own_kv,
        constant_positions=recipe.objective.positions == "constant",
        gate_floor=gate_floor(recipe),
        qk_norm=recipe.drafter.qk_norm,
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
        target_hidden=target.hidden_size if architecture.hidden_size != target.hidden_size else None,
        own_sizes=own_sizes(architecture, target),
        target={
            "id": manifest.target["id"],
            "weights_hash": manifest.target["weights_hash"],
            "tokenizer_hash": manifest.tokenizer_hash,
            **{name: value for name, value in manifest.target.items() if name == "quantisation"},
        },
    )
    config = replace(config, kv_shapes=_kv_shapes(manifest, config))
    refuse(machine_rules.KV_SHAPES, recipe, config)
    return config


def _kv_shapes(manifest: Manifest, config: DrafterConfig) -> list[KVLayer] | None:
    """What the K/V are like that the drafter reads; None: as its own."""
    a = Architecture(**manifest.target["architecture"])
    usual = KVLayer(a.kv_heads, a.head_dim, a.inv_freq, a.rope_scale)
    said = {int(layer): KVLayer(**fields) for layer, fields in manifest.target.get("kv_shapes", {}).items()}
    shapes = [said.get(layer, usual) for layer in config.kv_layers]
    return shapes if any(shape != config.own_shape for shape in shapes) else None


def uses_bf16(recipe: TrainRecipe, device: torch.device) -> bool:
    """Whether weights are bf16 in the forward and backward."""
    return recipe.train.precision == "bf16" or (recipe.train.precision == "auto" and device.type == "cuda")


def attention(recipe: TrainRecipe, device: torch.device, config: DrafterConfig | None):
    """The backend that trains this recipe. Raises UserError as `attention_backend` does.

    Args:
        config: the drafter; None: not known yet, as with a cache that is still to be made.
    """
    # FlashAttention knows one mask, the causal one: one row of each anchor, without views and windows. A
    # language model attends by its own means.
    flash = OBJECTIVES[recipe.objective.kind].token_by_token and recipe.view_sampler is None and recipe.drafter.lm is None
    shapes = [config.shape(i, name) for i in range(len(config.target_layers)) for name in config.branches] if config else []
    flash &= not any(shape.window for shape in shapes)
    if device.type == "cuda":  # what its kernels take
        flash &= uses_bf16(recipe, device) and all(s.head_dim % 8 == 0 and s.head_dim <= 256 for s in shapes)
        flash &= torch.cuda.get_device_capability(device) >= (8, 0)
    return attention_backend(recipe.drafter.attention, device, flash=flash, dense=recipe.objective.anchors is None)


def _positions(recipe: TrainRecipe, manifest: Manifest, lm: dict | None) -> int | None:
    """Up to where the drafter will know positions: what it began with, or the longest document that a pack holds.

    Raises:
        UserError: the documents are longer than what a language model was made for.
    """
    factor = recipe.drafter.rope_factor
    longest = manifest.max_length
    if lm is None:
        return min(longest, recipe.train.pack_tokens) if recipe.drafter.start == "random" else None
    refuse(machine_rules.DOCUMENTS, recipe, machine_rules.Documents(longest, lm))
    return max(longest, int(factor * (lm["positions"] or 0)))


def check_training(recipe: TrainRecipe) -> None:
    """Raises UserError for everything that can be known before the target is loaded and a GPU is touched, and warns of named keys
    that do nothing."""
    # 1. What needs neither the cache nor the target.
    refuse(machine_rules.RANKS, recipe, world_size())
    if recipe.run.dir:
        refuse_file("run.dir", recipe.run.dir)
    device = pick_device(recipe.target.device)
    # 2. The machine.
    manifest = manifest_of(recipe)
    refuse(machine_rules.MACHINE, recipe, _machine(recipe, device))
    refuse(machine_rules.START, recipe, unlike(target_config(recipe.target)))
    # 3. The cache's layers, the drafter that reads them, and the attention that it can run.
    chosen_layers(recipe, manifest)
    if not manifest.target["weights_hash"]:  # the target has yet to be loaded, and the engine says the rest
        attention(recipe, device, None)
    else:
        config = drafter_config(recipe, manifest)
        attention(recipe, device, config)
        if recipe.drafter.warm_start:
            check_warm_start(recipe.drafter.warm_start, config, partial(target_sizes, recipe.target))
    # 4. The target's tokens.
    tokenizer = target_tokenizer(recipe.target)
    tokens = machine_rules.Tokens(manifest, tokenizer_hashes(tokenizer)[0])
    refuse(machine_rules.TOKENIZER, recipe, tokens)
    if recipe.drafter.lm:
        _positions(recipe, manifest, lm_config(recipe.drafter.lm))
        check_vocabulary(recipe.drafter.lm, tokenizer, tokens.vocabulary)
    refuse(machine_rules.VOCABULARY, recipe, tokens)
    # 5. Every rank gets here; one of them speaks, and only of a recipe that can be trained.
    if rank() == 0:
        for line in unread(recipe):
            print(line, flush=True)


def _machine(recipe: TrainRecipe, device: torch.device) -> machine_rules.Machine:
    on_gpu = device.type == "cuda"
    return machine_rules.Machine(
        bf16=uses_bf16(recipe, device),
        capability=torch.cuda.get_device_capability(device) if on_gpu else None,
        name=torch.cuda.get_device_name(device) if on_gpu else None,
    )


def check_target(architecture: Architecture, weights_hash: str, manifest: Manifest, cache_dir: str) -> None:
    """Raises UserError when the loaded target is not the one that was captured."""
    if architecture.vocab_size != manifest.target["architecture"]["vocab_size"]:
        raise UserError(
            f"the target has a vocabulary of {architecture.vocab_size}, the cache {cache_dir} one of "
            f"{manifest.target['architecture']['vocab_size']}"
        )
    if weights_hash != manifest.target["weights_hash"]:
        raise UserError(
            f"the cache {cache_dir} was captured from another target: {in_words(manifest.target.get('quantisation'))}, weights "
            f"hash {manifest.target['weights_hash']}, loaded {weights_hash}"
        )


def slot_weights(objective: ObjectiveRecipe, slots: int) -> torch.Tensor:
    """Weights of the drafted slots, [J]."""
    return OBJECTIVES[objective.kind].slot_weights(slots, objective.decay)


def token_counts(reader: CacheReader | LiveReader, documents: np.ndarray, vocabulary: int) -> torch.Tensor:
    """How often the documents supervise each token, [V]."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for part in np.array_split(documents, -(-len(documents) // 1000)):  # a thousand at a time: a text is read, not kept
        supervised = [ids[mask.bool()] for ids, mask in map(reader.text, part)]
        counts += torch.bincount(torch.cat(supervised).long(), minlength=vocabulary)
    return counts


def engine_config(recipe: TrainRecipe, bf16: bool) -> dict:
    """DeepSpeed's configuration, every default that matters spelled out."""
    train = recipe.train
    config = {
        **recipe.deepspeed.model_dump(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.batch // world_size(),
        "gradient_clipping": train.clip,  # DeepSpeed's own default is 1.0
        "bf16": {"enabled": bf16},
        # Our AdamW is PyTorch's own, which DeepSpeed calls untested. Without the second key it refuses it where states are
        # offloaded to the host.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,  # never: rank 0 speaks for itself
    }
    # Gradients of several packs are added up. In bf16 small ones would be lost. ZeRO-0 refuses to add them in float32.
    if bf16 and recipe.deepspeed.stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
