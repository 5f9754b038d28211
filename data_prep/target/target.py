"""The frozen target: its forward, and the states that it hands out.

What is inside of a model of `transformers` is known to transformers_private.py alone.

Shapes: B batch, T positions, P positions of a pack, E hidden size, V vocabulary, H query heads, G key/value heads, D head size.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from data_prep.decoding import torch_private
from data_prep.decoding.attention import Reading
from data_prep.decoding.products import as_they_stand, lay_out
from data_prep.target import quantised, quantised_model
from data_prep.target import transformers_private as private
from data_prep.target.architecture import (
    CachedLayer,
    KVLayer,
    failures,
    kind_of,
    kv_owners,
    max_positions,
    no_causal_lm,
    read_config,
)
from data_prep.target.checkpoint import refuse_missing, refuse_unexpected
from data_prep.target.described import Described, hash_of
from data_prep.target.from_gguf import plain
from data_prep.target.proof import KVFound, prove
from data_prep.target.rotation import halves_of_neighbours
from data_prep.target.states import States, to_device
from data_prep.target.transformers_private import Source

# (layer, q [B, T, H, D], k and v [B, T, G, D], all rotated, how that layer reads keys) -> [B, T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, Reading], Tensor]

NOT_LOADED = (OSError, ValueError, RuntimeError, SafetensorError, ImportError, AssertionError)


@torch.compiler.disable  # a compiled layer would forget what it sets
def _take(module: nn.Module, inputs, output) -> None:
    """A forward hook. Some versions of transformers return a tuple from a layer."""
    module.taken = output[0] if isinstance(output, (tuple, list)) else output


class Target(Described):
    """A causal LM of transformers. What of it yields which state is found by structure and proven on six tokens.

    Raises:
        UserError: the model cannot be loaded, or its states are not those that it computes with.
    """

    # For captures. See data_prep/target/served.py, which has others.
    ahead = 0
    server: dict | None = None

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str | None = None,  # null: what transformers chooses
        spread: str = "none",
        trust_remote_code: bool = False,
    ):
        transformers_logging.disable_progress_bar()
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        self.packs = attention == "flash_attention_2"  # whether `forward_packed` exists
        self.spread_by_tensors = spread == "tp"
        self.folder = plain(path, revision)  # what transformers and servers load: of a GGUF file, what it was dequantised to
        self.model = self._load(attention, _spreading(spread), torch.device(device))
        self.config = private.text_config(self.model)
        self.device = self.model.get_input_embeddings().weight.device if spread == "device_map" else torch.device(device)
        self._sources: list[tuple[str, int, Source]] = []  # (kind, layer, what that state is the output of)
        self._hooks: list[RemovableHandle] = []
        self._kv: dict[int, KVFound] = {}
        # Whether it computes with quantised weights, or rounds what its layers read: no wider dtype says what rounding may do.
        self.rounds = any(quantised_model.rounds(module) for module in self.model.modules())
        if self.quantisation and not self.rounds:
            self.quantisation = quantised.dequantised(self.quantisation)
        self._heads_first = private.norms_heads_first(self.config)
        self._look_inside()
        self._kv = prove(self, self.layers_with_kv)

    def _load(self, attention: str | None, spreading: dict, device: torch.device) -> PreTrainedModel:
        config = read_config(self.path, self.folder, self.revision, self.trust_remote_code)
        self.quantisation = quantised.quantisation_of(self.path, self.revision, config)
        is_quantised = quantised.fields_of(config) is not None
        try:
            with private.report_in_errors():
                model, report = kind_of(config).from_pretrained(
                    self.folder,
                    config=quantised.to_load(config, device),
                    revision=self.revision,
                    trust_remote_code=self.trust_remote_code,
                    dtype=self.dtype,
                    attn_implementation=attention,
                    output_loading_info=True,
                    **(spreading or quantised.placing(config, device)),
                )
            model = (model if spreading else model.to(device)).eval()
            if is_quantised:
                quantised_model.settle(model, self.dtype)
        # Weights misshapen, cut or too large for the device, a package that is not there, what bitsandbytes takes for granted.
        except failures(self.trust_remote_code, *NOT_LOADED) as error:
            raise no_causal_lm(self.path, error) from error
        refuse_missing(self.path, report["missing_keys"])
        refuse_unexpected(self.path, report["unexpected_keys"], private.text_config(model).num_hidden_layers)
        return model.requires_grad_(False)

    def _look_inside(self) -> None:
        if self.dtype == torch.float64:
            private.loop_over_experts(self.model)
        super()._look_inside()
        self._looks_at_length = private.looks_at_length(self.model)

    def widened(self, dtype: torch.dtype, device: torch.device) -> "Target":
        """A target of its own with this one's weights, in a dtype that holds them exactly: nothing is captured or compiled. Not
        for one that `rounds`."""
        weights = {id(p): nn.Parameter(p.to(device, dtype), requires_grad=False) for p in self.model.parameters()}
        buffers = {id(b): b.to(device, copy=True) for b in self.model.buffers()}
        other = copy.copy(self)
        # A copy of a hook would still be ours, and a compiled layer cannot be copied.
        with self.as_loaded():
            other.model = copy.deepcopy(self.model, weights | buffers)
        other.device = torch.device(device)
        other.dtype = dtype
        other._sources = []
        other._hooks = []
        other._look_inside()
        return other

    @property
    def kv_shapes(self) -> dict[int, KVLayer]:
        """Of every layer that yields keys and values."""
        return {layer: found.shape for layer, found in self._kv.items()}

    def other_kv_shapes(self, layers: Iterable[int]) -> dict[int, KVLayer]:
        """Of these layers, where keys and values of some are not as `architecture` says; else nothing."""
        a = self.architecture
        alike = KVLayer(a.kv_heads, a.head_dim, a.inv_freq, a.rope_scale)
        shapes = {layer: self._kv[layer].shape for layer in sorted(layers)}
        return {} if all(shape == alike for shape in shapes.values()) else shapes

    @property
    def cached_layers(self) -> list[CachedLayer]:
        """What a cache keeps of each layer, of a target that is decoded here."""
        owners = kv_owners(self.config)
        return [CachedLayer(self._kv[owner].here, self._kv[owner].shape.head_dim, owner) for owner in owners]

    @property
    def turns_neighbours(self) -> bool:
        """Whether its own cache has keys in another layout than `forward` hands out (`KVFound.neighbours`)."""
        return any(found.neighbours for found in self._kv.values())

    def capture(self, hidden_layers, kv_layers, query_layers=()) -> None:
        """Choose the layers whose states `forward` hands out. Raises UserError for a layer that does not exist, or that has no
        such state."""
        for layer in {*hidden_layers, *kv_layers, *query_layers}:
            if not 0 <= layer < len(self.layers):
                raise UserError(f"the target has layers 0 to {len(self.layers) - 1}; there is no layer {layer}")
        self._unhook()
        kinds = {"hidden": hidden_layers, "key": kv_layers, "value": kv_layers, "query": query_layers}
        wanted = [(kind, layer) for kind, layers in kinds.items() for layer in sorted({*layers})]
        self._sources = [(kind, layer, private.source(self.model, self.layers[layer], kind)) for kind, layer in wanted]
        for kind, layer, source in self._sources:
            if source is None:
                raise UserError(f"target {self.path}: layer {layer} has no {kind} of its own")
        self._hook()

    def _hook(self) -> None:
        modules = {source.module for _, _, source in self._sources}
        self._hooks = [module.register_forward_hook(_take) for module in modules]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def forward(self, ids_BT: Tensor, cache: DynamicCache | None = None) -> States:
        """Read `ids_BT` after what `cache` holds (extended in place); states of these T positions.

        Rows may be padded on the right: under causal attention nothing before the padding changes.
        """
        return self._run(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None)

    @torch.no_grad()
    def forward_through(self, ids_BT: Tensor, position_BT: Tensor, attend: Attend) -> States:
        """The forward with another attention: `attend` decides what came before these rows, and what each of them sees."""
        if self._looks_at_length:
            # A draft may reach beyond the text's end, where it is cut. No row there may change how all others are turned.
            position_BT = position_BT.clamp(max=max_positions(self.config) - 1)
        with private.attention_given(self.model, attend):
            return self._run(input_ids=ids_BT, position_ids=position_BT, use_cache=False)

    @torch.no_grad()
    def forward_packed(self, ids_P: Tensor, lengths: Tensor) -> States:
        """Documents of `lengths` (int32, their sum is P) back to back, without padding: FlashAttention's variable-length
        kernel keeps them apart. Both are on the host. States [1, P, ...]."""
        ends = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        positions = torch.arange(len(ids_P)) - ends[:-1].repeat_interleave(lengths)
        longest = int(lengths.max())
        ends = to_device(ends, self.device)
        return self._run(
            input_ids=to_device(ids_P, self.device)[None],
            position_ids=to_device(positions, self.device)[None],
            use_cache=False,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=longest,
            max_length_k=longest,
        )

    def _run(self, **inputs) -> States:
        last_hidden = private.decoder(self.model)(**inputs).last_hidden_state
        states = self.taken()
        states.last_hidden = last_hidden if self.logit_scale == 1 else last_hidden * self.logit_scale
        return states

    def taken(self) -> States:
        """What the hooks took in the last forward, but for the last hidden state."""
        states = States()
        for kind, layer, source in self._sources:
            getattr(states, kind)[layer] = self._taken(kind, layer, source)
        for module in {source.module for _, _, source in self._sources}:
            del module.taken
        return states

    def compile(self) -> None:
        """Make forwards of a few rows fast. On a GPU, fuse what the layers do outside of attention, for each number of rows anew
        (torch.compile; all layers share it). On a CPU, lay their weights out. Layers whose parts lie in several processes stay as
        they are."""
        if self.spread_by_tensors:
            return
        if self.device.type == "cpu":
            if lay_out(private.decoder(self.model), self.frozen_head.head_VE.nbytes):
                self.frozen_head.product.lay_out()
            else:
                print("too little memory is free to lay the target's weights out for oneDNN: decoding is slower", flush=True)
            return
        # Code that waits for the choice of experts would be compiled for every number of tokens that an expert gets. Kernels of
        # quantised weights choose by the number of rows themselves, and few of them can be traced.
        if not private.experts_ask_host(self.model) and not self.rounds:
            torch_private.compile_for_widths(self.layers)

    def uncompiled(self) -> AbstractContextManager[None]:
        """For forwards of any length, each of which would be compiled."""
        return torch_private.uncompiled(self.layers)

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """The model as transformers made it, for its own `generate`: without hooks of ours, which break what it compiles."""
        self._unhook()
        try:
            with self.uncompiled(), as_they_stand(self.model):
                yield
        finally:
            self._hook()

    @property
    def graphs(self) -> bool:
        """Whether a CUDA graph can hold a forward: the host decides nothing in it."""
        return not (self.spread_by_tensors or self._looks_at_length or private.experts_ask_host(self.model))

    def logits(self, last_hidden: Tensor) -> Tensor:
        """float32 (or float64) logits of the next token, [..., V]."""
        if self.spread_by_tensors:
            # Each process has a part of the head, and its module puts the parts together.
            logits = self.model.get_output_embeddings()(last_hidden)
            return self.frozen_head.capped(logits if logits.dtype == torch.float64 else logits.float())
        logits = self.frozen_head.product(last_hidden)
        return self.frozen_head.finish(logits if logits.dtype == torch.float64 else logits.float())

    def new_cache(self) -> DynamicCache:
        """For `forward`. Layers with a window keep all positions too: to take refused tokens back, they need those that a window
        of these tokens had left behind."""
        return DynamicCache()

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a text, as `generate` takes them."""
        ids = self.model.generation_config.eos_token_id
        return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def weights_hash(self) -> str:
        """xxh3 of the parameters in name order, at bf16 precision: the same whichever dtype they were loaded in. Of a quantised
        checkpoint, that of its files: the same whichever kernels it was loaded for."""
        if (stored := self.hash_of_quantised()) is not None:
            return stored
        weights = self.model.state_dict()

        def value(name: str) -> Tensor:
            # Under tensor parallelism a process has a part, and all ask together.
            return weights[name].full_tensor() if hasattr(weights[name], "full_tensor") else weights[name]

        return hash_of(sorted(weights), value)

    def _taken(self, kind: str, layer: int, source: Source) -> Tensor:
        output = source.module.taken[..., source.part]
        if kind == "hidden":
            return output
        if output.dim() == 3:
            output = output.unflatten(-1, (-1, private.head_dim(self.model, layer)))
        elif self._heads_first:
            output = output.transpose(1, 2)
        heads = _all_heads(output, private.head_count(self.model, layer, kind))
        found = self._kv.get(layer)
        if found is None or kind == "value":
            return heads
        if kind == "query" and found.query_scale != 1:
            heads = heads * found.query_scale
        return halves_of_neighbours(heads, found.neighbours) if found.neighbours else heads


def _spreading(spread: str) -> dict:
    """What `from_pretrained` takes for `capture.spread`; nothing where the model lies on one device."""
    if spread == "tp":
        return private.tensor_parallel()
    return {"device_map": "auto"} if spread == "device_map" else {}


def _all_heads(local_BTGD: Tensor, heads: int) -> Tensor:
    """Under tensor parallelism each process computes some of the heads; the cache holds all of them, in order."""
    if local_BTGD.shape[-2] == heads:
        return local_BTGD
    parts = [torch.empty_like(local_BTGD) for _ in range(heads // local_BTGD.shape[-2])]
    torch.distributed.all_gather(parts, local_BTGD.contiguous())
    return torch.cat(parts, dim=-2)
