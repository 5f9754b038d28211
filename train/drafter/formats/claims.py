"""What the configuration of a public checkpoint says, in one form for all formats.

    EAGLE-3       architectures LlamaForCausalLMEagle3, Eagle3LlamaForCausalLM or Eagle3Qwen3ForCausalLM; weights under
                  `midlayer.` or `layers.0.`
    P-EAGLE       PeagleLlamaForCausalLM or PeagleQwen3ForCausalLM, or EAGLE-3's with a tensor `mask_hidden`
    DFlash        architectures DFlashDraftModel, with dflash_config
    Gemma 4       architectures Gemma4AssistantForCausalLM (imported_assistant.py)
    DSpark        architectures Qwen3DSparkModel; with a Markov head whose tables factor through the target's, as our exports' do
    speculators   speculators_model_type eagle3, peagle, dflash or dspark; the layers in transformer_layer_config

Each key counts layers in its own way. `eagle_aux_hidden_state_layer_ids` (vLLM's) and speculators' `aux_hidden_state_layer_ids`
count inputs, one more than the layer whose output is read; `eagle_config.eagle_aux_hidden_state_layer_ids` (SGLang's, which
trainers for it write) and `dflash_config.target_layer_ids` count outputs. Features are stacked by ascending layer, as servers do.
"""

from pathlib import Path
from typing import NamedTuple

from train.drafter.formats.imported_weights import Tensors, refuse

ARCHITECTURES = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Eagle3LlamaForCausalLM": "eagle3",
    "Eagle3Qwen3ForCausalLM": "eagle3",
    "PeagleLlamaForCausalLM": "peagle",
    "PeagleQwen3ForCausalLM": "peagle",
    "DFlashDraftModel": "dflash",
    "Qwen3DSparkModel": "dspark",
}
ASSISTANTS = {"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"}  # read in imported_assistant.py
NAMES = {"eagle3": "EAGLE-3", "peagle": "P-EAGLE", "dflash": "DFlash", "dspark": "DSpark"}
# What dflash_config may say; another key could change what is computed.
DFLASH_KEYS = {"mask_token_id", "target_layer_ids", "causal", "block_size", "num_target_layers", "use_aux_hidden_state"}
DFLASH_KEYS |= {"sample_from_anchor", "use_swa", "swa_window_size", "projector_type", "attention_mode"}


class Claims(NamedTuple):
    """What a configuration says, whichever format it has."""

    kind: str  # eagle3 | peagle | dflash | dspark
    format: str
    said: dict  # where the format's own keys are
    layer: dict  # where those of the layers are
    verifier: str | None
    inputs: list[int] | None  # the layers that are read, counted as inputs
    outputs: list[int] | None  # the same, counted as outputs
    slots: int | None
    shifted: bool
    causal: bool | None  # inside a block; None: where attention is sliding
    mask_token_id: int | None

    def says(self, key: str):
        """A key of the format, wherever servers look for it; None: it is not said."""
        # Trainers write one key at the top or in a section of their own; servers take either.
        places = (self.said, self.said.get("eagle_config") or {}, self.said.get("dflash_config") or {})
        return next((place[key] for place in places if place.get(key) is not None), None)


def is_assistant(fields: dict) -> bool:
    """Whether a checkpoint's configuration is that of an assistant of Gemma 4."""
    return not ASSISTANTS.isdisjoint(fields.get("architectures") or [])


def read_claims(folder: Path, fields: dict, tensors: Tensors) -> Claims:
    """What the configuration says. Raises UserError for a kind that is not read, or a key of DFlash that is not known."""
    # First, because the package writes `architectures` too, of names of its own.
    speculators = fields.get("speculators_model_type")
    dflash = fields.get("dflash_config") or {}
    if speculators:
        return _speculators_claims(folder, fields, speculators, tensors)
    architectures = fields.get("architectures") or []
    kind = next((ARCHITECTURES[name] for name in architectures if name in ARCHITECTURES), None)
    if kind is None and tensors.named_midlayer:  # some say LlamaForCausalLM, which servers told --method eagle3 read all the same
        kind = "eagle3"
    # Some checkpoints of P-EAGLE carry EAGLE-3's name of a class.
    if kind == "eagle3" and "mask_hidden" in tensors:
        kind = "peagle"
    known = [*ARCHITECTURES, *sorted(ASSISTANTS)]
    refuse(
        folder,
        {
            f"is a {' '.join(architectures) or 'model'}; what is read: {', '.join(known)}, and speculators": kind is None,
            f"says dflash_config.{', '.join(sorted(dflash.keys() - DFLASH_KEYS))}, which is not known here": (
                bool(dflash.keys() - DFLASH_KEYS)
            ),
            f"has dflash_config.projector_type={dflash.get('projector_type')}": (
                dflash.get("projector_type") not in (None, "dflash")
            ),
            f"has dflash_config.attention_mode={dflash.get('attention_mode')}": (
                dflash.get("attention_mode") not in (None, "gqa", "mha")
            ),
        },
    )
    block = kind in ("dflash", "dspark")
    eagle = fields.get("eagle_config") or {}
    causal = fields.get("is_causal")
    dflash_causal = dflash.get("causal")
    anchor = bool(fields.get("sample_from_anchor", dflash.get("sample_from_anchor", kind == "dspark")))
    slots = (fields.get("block_size") or dflash.get("block_size")) if block else None
    if kind == "dspark" and slots and not anchor:
        slots += 1  # DSpark's block_size counts what is drafted, DFlash's the anchor's slot too
    named = [dflash.get(key, fields.get(key)) for key in ("mask_token_id", "pard_token", "ptd_token_id")]
    return Claims(
        kind=kind,
        format=NAMES[kind],
        said=fields,
        # What servers' own classes are, where a checkpoint does not say.
        layer={"model_type": "llama" if kind in ("eagle3", "peagle") else "qwen3"} | fields,
        verifier=None,
        inputs=fields.get("eagle_aux_hidden_state_layer_ids"),
        outputs=dflash.get("target_layer_ids") or fields.get("target_layer_ids") or eagle.get("eagle_aux_hidden_state_layer_ids"),
        slots=slots,
        shifted=kind == "peagle" or (block and anchor),
        causal=(dflash_causal if causal is None else causal) if block else kind == "peagle",
        mask_token_id=None if kind == "eagle3" else next((token for token in named if token is not None), None),
    )


def _speculators_claims(folder: Path, fields: dict, kind: str, tensors: Tensors) -> Claims:
    refuse(
        folder,
        {
            f"is speculators' {kind}; what is read: eagle3, peagle, dflash, dspark": (
                kind not in ("eagle3", "peagle", "dflash", "dspark")
            ),
        },
    )
    config = fields.get("speculators_config") or {}
    methods = config.get("proposal_methods") or [{}]
    named = [method for method in methods if method.get("proposal_type") == config.get("default_proposal_method")]
    block = kind in ("dflash", "dspark")
    # None: as the package's own code has it, causal where attention is sliding. vLLM 0.32 reads the key otherwise
    # (docs/design.md).
    causal = None if block and not fields.get("sliding_window_non_causal", False) else kind == "peagle"
    return Claims(
        kind=kind,
        format=f"speculators {kind}",
        said=fields,
        layer=fields.get("transformer_layer_config") or {},
        verifier=(config.get("verifier") or {}).get("name_or_path"),
        inputs=fields.get("aux_hidden_state_layer_ids" if block else "eagle_aux_hidden_state_layer_ids"),
        outputs=None,
        slots=fields.get("block_size", 8) if block else (named or methods)[0].get("speculative_tokens"),
        shifted=kind == "peagle" or (block and bool(fields.get("sample_from_anchor", kind == "dspark"))),
        causal=causal,
        mask_token_id=None if kind == "eagle3" else fields.get("mask_token_id"),
    )
