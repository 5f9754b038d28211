"""The frozen target: its forward, and the states that it hands out.

What is inside of a model of `transformers` is known to transformers_private.py alone.

Shapes: B batch, T positions, P positions of a pack, E hidden size, V vocabulary, H query heads, G key/value heads, D head size.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.errors import UserError, first_line
from data_prep.decoding import torch_private
from data_prep.decoding.products import as_they_stand, lay_out
from data_prep.target import transformers_private as private
from data_prep.target.architecture import STATIC_ROPE, Architecture, refuse_family
from data_prep.target.from_gguf import plain
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.states import States

# (layer, q [B, T, H, D], k and v [B, T, G, D], all rotated) -> [B, T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@torch.compiler.disable  # a compiled layer would forget what it sets
def _take(module: nn.Module, inputs, output) -> None:
    """A forward hook. Some versions of transformers return a tuple from a layer."""
    module.taken = output[0] if isinstance(output, tuple) else output


class Target:
    """Any Hugging Face causal LM of the Llama / Qwen3 kind: pre-norm layers, RoPE, one KV cache a layer.

    Raises:
        UserError: the model cannot be loaded, or has a layer or a head that this class would get wrong.
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
    ):
        transformers_logging.disable_progress_bar()
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.packs = attention == "flash_attention_2"  # whether `forward_packed` exists
        self.folder = plain(path, revision)  # what transformers and servers load: of a GGUF file, what it was dequantised to
        self.model = self._load(attention, _spreading(spread), torch.device(device))
        self._refuse_unsupported()
        self.device = self.model.get_input_embeddings().weight.device if spread == "device_map" else torch.device(device)
        self._sources: list[tuple[str, int, nn.Module]] = []  # (kind, layer, the module whose output that state is)
        self._hooks: list[RemovableHandle] = []
        self._look_inside()

    def _load(self, attention: str | None, spreading: dict, device: torch.device) -> PreTrainedModel:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self.folder,
                revision=self.revision,
                dtype=self.dtype,
                attn_implementation=attention,
                output_loading_info=True,
                **spreading,
            )
            model = (model if spreading else model.to(device)).eval()
        # The last three: weights misshapen, cut or too large for the device, and a package that is not there.
        except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
            raise UserError(f"target.path={self.path}: no causal LM can be loaded there ({first_line(error)})") from error
        # transformers would go on with random values for them.
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"target.path={self.path}: the checkpoint lacks {', '.join(missing[:3])}")
        return model.requires_grad_(False)

    def _look_inside(self) -> None:
        """What is looked up in `model`, again whenever that is another one."""
        self.layers = private.layers(self.model)
        self.frozen_head = FrozenHead(self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight)

    def widened(self, dtype: torch.dtype, device: torch.device) -> "Target":
        """A target of its own with this one's weights, in a dtype that holds them exactly: nothing is captured or compiled."""
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
    def architecture(self) -> Architecture:
        config = self.model.config
        modules = private.weighted_modules(self.layers[0])
        inv_freq, rope_scale = private.rotary(self.model)
        return Architecture(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=private.head_dim(self.model),
            norm_eps=config.rms_norm_eps,
            qk_norm="k_norm" in modules,
            qkv_bias=modules["k"].bias is not None,
            inv_freq=inv_freq,
            rope_scale=rope_scale,
            max_positions=config.max_position_embeddings,
        )

    def capture(self, hidden_layers, kv_layers, query_layers=()) -> None:
        """Choose the layers whose states `forward` hands out. Raises UserError for a layer that does not exist."""
        for layer in {*hidden_layers, *kv_layers, *query_layers}:
            if not 0 <= layer < len(self.layers):
                raise UserError(f"the target has layers 0 to {len(self.layers) - 1}; there is no layer {layer}")
        self._unhook()
        kinds = {"hidden": hidden_layers, "key": kv_layers, "value": kv_layers, "query": query_layers}
        wanted = [(kind, layer) for kind, layers in kinds.items() for layer in sorted({*layers})]
        self._sources = [(kind, layer, private.state_module(self.layers[layer], kind)) for kind, layer in wanted]
        self._hook()

    def _hook(self) -> None:
        self._hooks = [module.register_forward_hook(_take) for _, _, module in self._sources]

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
        with private.attention_given(self.model, attend):
            return self._run(input_ids=ids_BT, position_ids=position_BT, use_cache=False)

    @torch.no_grad()
    def forward_packed(self, ids_P: Tensor, lengths: Tensor) -> States:
        """Documents of `lengths` (int32, their sum is P) back to back, without padding: FlashAttention's variable-length
        kernel keeps them apart. States [1, P, ...]."""
        ends = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        positions = torch.arange(len(ids_P), device=ids_P.device) - ends[:-1].repeat_interleave(lengths, output_size=len(ids_P))
        longest = int(lengths.max())
        return self._run(
            input_ids=ids_P[None],
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=longest,
            max_length_k=longest,
        )

    def _run(self, **inputs) -> States:
        states = States(last_hidden=private.decoder(self.model)(**inputs).last_hidden_state)
        for kind, layer, module in self._sources:
            getattr(states, kind)[layer] = self._taken(kind, module)
        return states

    def compile(self) -> None:
        """Make forwards of a few rows fast. On a GPU, fuse what the layers do outside of attention, for each number of rows anew
        (torch.compile; all layers share it). On a CPU, lay their weights out."""
        if self.device.type == "cpu":
            if lay_out(private.decoder(self.model), self.frozen_head.head_VE.nbytes):
                self.frozen_head.product.lay_out()
            else:
                print("too little memory is free to lay the target's weights out for oneDNN: decoding is slower", flush=True)
            return
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

    def logits(self, last_hidden: Tensor) -> Tensor:
        """float32 (or float64) logits of the next token, [..., V]."""
        logits = self.frozen_head.product(last_hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a text, as `generate` takes them."""
        ids = self.model.generation_config.eos_token_id
        return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def layer_weights(self, index: int) -> dict[str, Tensor]:
        """One layer under the names of `train/drafter/layers.py`."""
        modules = private.weighted_modules(self.layers[index])
        weights = {f"{name}.weight": module.weight for name, module in modules.items()}
        return weights | {f"{n}.bias": modules[n].bias for n in "qkv" if modules[n].bias is not None}

    @property
    def rope_config(self) -> dict:
        """The rotary embedding as a configuration file says it, in the names of old and new readers."""
        parameters = dict(self.model.config.rope_parameters)
        theta = parameters.pop("rope_theta")
        plain = parameters.get("rope_type", "default") == "default"
        return {
            "rope_theta": theta,
            "rope_scaling": None if plain else parameters,
            "rope_parameters": {"rope_theta": theta, **parameters},
        }

    @property
    def final_norm_weight(self) -> Tensor:
        return private.final_norm(self.model).weight

    def weights_hash(self) -> str:
        """xxh3 of the parameters in name order, at bf16 precision: the same whichever dtype they were loaded in."""
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # tensor parallel: all ranks ask
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _taken(self, kind: str, module: nn.Module) -> Tensor:
        output = module.__dict__.pop("taken")
        if kind == "hidden":
            return output
        output = output if output.dim() == 4 else output.unflatten(-1, (-1, private.head_dim(self.model)))
        config = self.model.config
        return _all_heads(output, config.num_attention_heads if kind == "query" else config.num_key_value_heads)

    def _refuse_unsupported(self) -> None:
        config = self.model.config
        refuse_family(self.path, config)
        sliding = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
        if sliding or (config.model_type == "mistral" and config.sliding_window):
            raise UserError(
                f"target {self.path}: layers with {', '.join(sorted(sliding)) or 'a sliding window'} are not supported"
            )
        output = private.weighted_modules(private.layers(self.model)[0])["o"]
        if config.hidden_act != "silu" or output.bias is not None or getattr(config, "mlp_bias", False):
            raise UserError(
                f"target {self.path}: only SiLU MLPs without biases, and attention outputs without one, are supported"
            )
        rope = private.rope_type(self.model)
        if rope not in STATIC_ROPE:
            raise UserError(
                f"target {self.path}: rope type '{rope}' changes with the length; supported: {', '.join(STATIC_ROPE)}"
            )


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
