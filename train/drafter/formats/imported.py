"""Drafters that others trained: public checkpoints -> our configuration, in memory.

The formats, and what each of their keys says, are in claims.py; weights are read in imported_weights.py.

A checkpoint says nothing of its target's weights, so that it is taken beside any target whose sizes fit. What it
leaves to its target (MASK is a row of the target's embedding) is taken once the target is there (`bind`). All that would make
another function of the same weights is refused by name, and so is every tensor that has no place here.
"""

from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from data_prep.target.architecture import Architecture, Sizes, read_layers
from train.drafter.config import DrafterConfig
from train.drafter.formats.claims import Claims, is_assistant, read_claims
from train.drafter.formats.imported_assistant import assistant_config
from train.drafter.formats.imported_weights import MARKOV, Tensors, refuse

STEPS = {"eagle3": 7, "peagle": 8}  # of a checkpoint that names none: as published
Beside = Callable[[], Sizes]  # the sizes of the target beside which a checkpoint is taken


def imported_config(folder: Path, fields: dict, beside: Beside | None) -> DrafterConfig:
    """The configuration of a checkpoint as one of ours. Raises UserError for one that no drafter of ours can be, or that is not
    for a target of these sizes."""
    if is_assistant(fields):
        return assistant_config(folder, fields, beside)
    tensors = Tensors(folder)
    claims = read_claims(folder, fields, tensors)
    if beside is None:
        raise UserError(f"{folder} is a checkpoint in {claims.format}'s format: it is read beside a target")
    sizes = beside()
    layer, rotary = read_layers(claims.layer, str(folder))
    # Counted by the weights, because num_hidden_layers is the target's in some checkpoints.
    depth = len({name.split(".")[1] for name in tensors.names if name.startswith("layers.")})
    _check_sizes(folder, claims, layer, sizes)
    _check_meaning(folder, claims, layer)
    _check_depth(folder, depth, layer, tensors)
    draft_vocab = _draft_vocabulary(folder, claims, sizes, tensors)
    architecture = Architecture(
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        vocab_size=layer.vocab_size,
        num_layers=sizes.num_layers,
        heads=layer.num_attention_heads,
        kv_heads=layer.num_key_value_heads,
        head_dim=layer.head_dim,
        norm_eps=layer.rms_norm_eps,
        qk_norm=any(name.endswith("q_norm.weight") for name in tensors.names),
        qkv_bias=any(name.endswith("q_proj.bias") for name in tensors.names),
        inv_freq=rotary.inv_freq,
        rope_scale=rotary.scale,
        max_positions=sizes.max_positions,
    )
    markov = tensors.shape(MARKOV[0])
    if markov and markov[1] == 1 and not tensors[MARKOV[0]].any():  # SGLang knows none without one
        markov = None
    knows = int(rotary.factor * layer.max_position_embeddings)
    return DrafterConfig(
        objective="ttt" if claims.kind == "eagle3" else "blockwise",
        reuse="hidden",
        target_layers=[sizes.num_layers - 1] * depth,  # none of them began as a target's layer, as far as is known
        hidden_layers=_hidden_layers(folder, claims, sizes),
        slots=claims.slots or STEPS[claims.kind],
        shifted=claims.shifted,
        causal=_causal(folder, claims, layer, depth, sizes),
        seed=0,
        start="random",
        mask_token_id=claims.mask_token_id,
        architecture=architecture,
        target={"id": claims.verifier or "unknown", "weights_hash": None, "tokenizer_hash": None},
        sequential=markov and "markov",
        sequential_size=markov[1] if markov else 256,
        draft_vocab=draft_vocab,
        own_head="lm_head.weight" in tensors,
        rope_factor=rotary.factor,
        positions=knows if knows < sizes.max_positions else None,
        pairs=claims.kind == "peagle",
        fc_norm=bool(claims.says("fc_norm")),
        norm_output=claims.kind == "eagle3" and bool(claims.says("norm_output")),
        norm_before_residual=bool(claims.says("norm_before_residual")),
        imported=claims.format,
    )


def _check_sizes(folder: Path, claims: Claims, layer, sizes: Sizes) -> None:
    targets = claims.says("num_target_layers")
    states = claims.says("target_hidden_size")
    fits = lambda mine, theirs: mine is None or mine == theirs
    refuse(
        folder,
        {
            f"is for targets of hidden size {states or layer.hidden_size}; this target has {sizes.hidden_size}": (
                (states or layer.hidden_size) != sizes.hidden_size
            ),
            f"is for targets of {layer.vocab_size} tokens; this target has {sizes.vocab_size}": (
                layer.vocab_size != sizes.vocab_size
            ),
            f"is for targets of {targets} layers; this target has {sizes.num_layers}": not fits(targets, sizes.num_layers),
            f"has layers of hidden size {layer.hidden_size} beside states of {states} (target_hidden_size), and an embedding and "
            "an LM head of its own, which are not read": not fits(states, layer.hidden_size),
        },
    )


def _check_meaning(folder: Path, claims: Claims, layer) -> None:
    """Raises UserError for a key under which the same weights are another function."""
    says = claims.says
    dflash = claims.kind in ("dflash", "dspark")
    markov = says("markov_head_type") or "vanilla"
    scale = claims.layer.get("logit_scale", 1)
    token = claims.mask_token_id
    states = claims.layer.get("num_aux_hidden_states")
    neox = {claims.layer.get("is_neox_style", True), claims.layer.get("rope_is_neox_style", True)}
    named = claims.inputs or claims.outputs
    refuse(
        folder,
        {
            "has norm_before_fc: one norm over all features, which no drafter here has": bool(says("norm_before_fc")),
            f"has a {markov} Markov head, and ours (drafter.sequential=markov) is vanilla": markov != "vanilla",
            "is DFlash's, and has EAGLE-3's norms (fc_norm, norm_before_residual)": (
                dflash and bool(says("fc_norm") or says("norm_before_residual"))
            ),
            "has use_aux_hidden_state=false: it reads the last hidden state alone, as EAGLE-1": (
                says("use_aux_hidden_state") is False
            ),
            f"scales its logits (logit_scale={scale})": scale != 1,
            "rotates interleaved pairs of a head (is_neox_style=false), and ours rotate halves": neox != {True},
            "has Gemma's norms (use_gemma_norm)": bool(claims.layer.get("use_gemma_norm")),
            f"says that it reads {states} hidden states (num_aux_hidden_states), and names {named and len(named)}": (
                states is not None and named is not None and states != len(named)
            ),
            f"has mask_token_id={token}, and {layer.vocab_size} tokens": token is not None and not 0 <= token < layer.vocab_size,
            f"drafts {claims.slots} tokens a round": claims.slots is not None and claims.slots < 1,
            f"has MLPs of {layer.hidden_act}, and ours are of silu": layer.hidden_act != "silu",
            "names no MASK (mask_token_id)": claims.kind != "eagle3" and claims.mask_token_id is None,
            f"has MASK as token {claims.mask_token_id} of {layer.vocab_size}": (claims.mask_token_id or 0) >= layer.vocab_size,
            f"drafts no token with block_size={claims.slots}": dflash and (claims.slots or 0) < (1 if claims.shifted else 2),
        },
    )


def _check_depth(folder: Path, depth: int, layer, tensors: Tensors) -> None:
    """Trainers for SGLang, which knows one `midlayer`, leave the target's num_hidden_layers as it was."""
    refuse(
        folder,
        {
            "has no layers (layers.0 or midlayer)": depth == 0,
            f"has {depth} layers, and says num_hidden_layers={layer.num_hidden_layers}": (
                depth != layer.num_hidden_layers and not tensors.named_midlayer
            ),
        },
    )


def _draft_vocabulary(folder: Path, claims: Claims, sizes: Sizes, tensors: Tensors) -> int | None:
    """How many tokens it can say; None: all."""
    said = claims.says("draft_vocab_size") or sizes.vocab_size
    kept = tensors.shape("d2t")
    kept = kept and kept[0]
    refuse(
        folder,
        {
            f"says {said} tokens (draft_vocab_size), and not which: it has no d2t": said != sizes.vocab_size and not kept,
            f"has draft_vocab_size={said}, and d2t of {kept} tokens": kept is not None and kept != said,
        },
    )
    return said if said != sizes.vocab_size else None


def _causal(folder: Path, claims: Claims, layer, depth: int, sizes: Sizes) -> bool:
    """Whether a block's slots see earlier ones only. Raises UserError for a window that hides something."""
    kinds = (getattr(layer, "layer_types", None) or [])[:depth]
    sliding = [kind == "sliding_attention" for kind in kinds]
    every = bool(claims.says("use_swa"))
    window = claims.says("swa_window_size") or getattr(layer, "sliding_window", None)
    refuse(
        folder,
        {
            "mixes layers of causal and of other attention": claims.causal is None and any(sliding) and not all(sliding),
            f"sees {window} positions back (a sliding window), and the target has {sizes.max_positions}": (
                (every or any(sliding)) and (window is None or window < sizes.max_positions)
            ),
        },
    )
    return any(sliding) if claims.causal is None else claims.causal


def _hidden_layers(folder: Path, claims: Claims, sizes: Sizes) -> list[int]:
    """The layers whose outputs are read, ascending. EAGLE-3 that names none reads the servers' default (vLLM's and SGLang's):
    the inputs of layers 2, L/2 and L - 3."""
    inputs = claims.inputs
    outputs = claims.outputs
    count = sizes.num_layers
    if inputs and outputs and sorted(inputs) != sorted(i + 1 for i in outputs):
        raise UserError(f"{folder} names the layers that it reads twice: inputs {inputs}, outputs {outputs}")
    if not inputs and not outputs:
        if claims.kind in ("dflash", "dspark"):
            raise UserError(f"{folder} names no layers that it reads (target_layer_ids)")
        inputs = [2, count // 2, count - 3]
    # The input of a layer is the output of the one before it.
    layers = sorted(i - 1 for i in inputs) if inputs else sorted(outputs)
    if layers[0] < 0 or layers[-1] >= count or len(set(layers)) < len(layers):
        raise UserError(f"{folder} reads the outputs of layers {layers}; the target has layers 0 to {count - 1}")
    return layers
