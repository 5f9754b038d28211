"""What a target's modules and its configuration say of it, whether its weights are all there or only a few.

Shapes: V vocabulary, E hidden size.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
import xxhash
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from common.errors import UserError
from data_prep.target import quantised, quantised_model
from data_prep.target import transformers_private as private
from data_prep.target.architecture import Architecture, layers_with_kv, sizes_of, unlike
from data_prep.target.families import family_of
from data_prep.target.frozen_head import FrozenHead


class Described:
    """Of a causal LM of transformers: what its states are like, and what a drafter takes of it. Layers, embedding and head are
    found by structure.

    Who inherits it sets these; `config` is the language part's, `folder` what transformers and servers load.
    """

    path: str
    revision: str | None
    folder: str
    dtype: torch.dtype
    device: torch.device
    model: PreTrainedModel
    config: PretrainedConfig
    quantisation: dict | None  # as the manifest says it
    layers: nn.ModuleList
    frozen_head: FrozenHead
    logit_scale: float  # what the logits are multiplied by: `last_hidden` is, so that they are its products with the head

    def _look_inside(self) -> None:
        """What is looked up in `model`, again whenever that is another one."""
        try:
            self.layers = private.layers(self.model)
        except (ValueError, AttributeError, NotImplementedError) as error:
            kind = self.model.config.model_type
            raise UserError(f"target {self.path} is a '{kind}' without layers, embedding or head ({error})") from error
        self.logit_scale = private.logit_scale(self.config)
        head = self.model.get_output_embeddings()
        self.frozen_head = FrozenHead(
            quantised_model.plain_weight(self.path, "embedding", self.model.get_input_embeddings()),
            quantised_model.plain_weight(self.path, "LM head", head),
            embed_scale=private.embed_scale(self.model),
            bias_V=head.bias,
            softcap=getattr(self.config, "final_logit_softcapping", None),
        )

    @property
    def layers_with_kv(self) -> list[int]:
        """Layers that yield keys and values."""
        return [] if family_of(self.model.config).kv else layers_with_kv(self.model.config)

    @property
    def architecture(self) -> Architecture:
        """Of draft layers that are like the target's. Where its layers differ, they are like those that read all positions."""
        sizes = asdict(sizes_of(self.config))
        norm = None
        attention = private.attention_of(self.layers[0])
        if unlike(self.config) is None:
            sizes["head_dim"] = attention.head_dim  # configurations need not say it
        if self.layers_with_kv:
            norm = getattr(private.attention_of(self.layers[min(self.layers_with_kv)]), "k_norm", None)
        plain_rotary = ([1e4 ** (-2 * i / sizes["head_dim"]) for i in range(sizes["head_dim"] // 2)], 1.0)
        inv_freq, rope_scale = private.rotary(self.model) or plain_rotary
        return Architecture(
            **sizes,
            intermediate_size=getattr(self.config, "intermediate_size", None) or 4 * sizes["hidden_size"],
            norm_eps=private.norm_eps(self.config),
            qk_norm=norm is not None and norm.weight.shape == (sizes["head_dim"],),
            qkv_bias=unlike(self.config) is None and attention.k_proj.bias is not None,
            inv_freq=inv_freq,
            rope_scale=rope_scale,
        )

    @property
    def head_facts(self) -> dict[str, float]:
        """What is done to embeddings and logits beside the products, where anything is."""
        facts = {
            "embed_scale": private.embed_scale(self.model),
            "logit_scale": self.logit_scale,
            "softcap": self.frozen_head.softcap,
        }
        return {name: value for name, value in facts.items() if value not in (None, 1.0)}

    def layer_weights(self, index: int) -> dict[str, Tensor]:
        """One layer under the names of `train/drafter/layers.py`, in plain numbers."""
        modules = private.weighted_modules(self.layers[index])
        weights = {f"{name}.weight": quantised_model.dense(module, self.dtype) for name, module in modules.items()}
        return weights | {f"{n}.bias": modules[n].bias for n in "qkv" if modules[n].bias is not None}

    @property
    def final_norm_weight(self) -> Tensor:
        return private.final_norm(self.model).weight

    def hash_of_quantised(self) -> str | None:
        """What tells a quantised checkpoint from others; None: it is not quantised, or was made of a GGUF file."""
        if not self.quantisation or self.quantisation["method"] == "gguf":
            return None
        return quantised.files_hash(self.folder, self.revision, quantised.in_words(quantised.stored(self.quantisation)))

    @property
    def rope_config(self) -> dict:
        """The rotary embedding as a configuration file says it, in the names of old and new readers."""
        parameters = dict(self.config.rope_parameters)
        # Gemma 3 and 4 have one for each kind of layer.
        parameters = dict(parameters.get("full_attention", parameters))
        theta = parameters.pop("rope_theta")
        plain = parameters.get("rope_type", "default") == "default"
        return {
            "rope_theta": theta,
            "rope_scaling": None if plain else parameters,
            "rope_parameters": {"rope_theta": theta, **parameters},
        }


def hash_of(names: Iterable[str], value: Callable[[str], Tensor]) -> str:
    """`Target.weights_hash` of parameters of these names, one after the other."""
    digest = xxhash.xxh3_128()
    for name in names:
        digest.update(name.encode())
        digest.update(value(name).to("cpu", torch.bfloat16).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
