"""The drafter: memory from the target's states, and draft rows that read it. Training and decoding call the same methods.

Shapes: P memory positions, Q draft rows, N anchors, S slots of a block, E hidden size.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_prep.cache.manifest import publish, write_text
from data_prep.errors import UserError
from data_prep.target import FrozenHead, States, Target
from train.attention.visibility import Places, Rows, Visibility
from train.drafter.config import DrafterConfig
from train.drafter.layers import KV, DraftLayer, Rope
from train.drafter.memory import Memory

Past = list[dict[str, KV]]  # the draft rows' own keys of earlier ttt steps, for each layer and branch


class Drafter(nn.Module):
    """A stack of draft layers over one kind of target state or two. The embedding and the LM head are the target's
    (`FrozenHead`); they are handed in, not owned."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config, a = config, config.architecture
        self.layers = nn.ModuleList(DraftLayer(config, first=i == 0) for i in range(len(config.target_layers)))
        self.norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        if config.uses_hidden:
            self.fc = nn.Linear(len(config.hidden_layers) * a.hidden_size, a.hidden_size, bias=False)
        if config.objective == "blockwise":
            self.mask = nn.Embedding(1, a.hidden_size)  # what an undrafted slot carries
            if config.uses_hidden:
                self.hidden_norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        self._inv_freq = torch.tensor(a.inv_freq)  # no buffer: a bf16 engine would round it

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def rope(self, position_P: Tensor) -> Rope:
        return Rope(position_P, self._inv_freq, self.config.architecture.rope_scale, self.dtype)

    def remember(self, states: States, next_token_PE: Tensor, places: Places, attend, past: Memory | None = None) -> Memory:
        """Memory of `past` and of P more verified positions.

        Args:
            states: the target's states at `places`, [P, ...].
            next_token_PE: embedding of the token *after* each position. A pair (x_{i+1}, f_i) sits at position i + 1,
                so the pair of the newest position is the anchor's own and its anchor's rows do not see it.
        """
        config, pairs = self.config, Places(places.document, places.position + 1)
        memory = Memory.extended(
            past,
            len(self.layers),
            {name: pairs if name == "hidden" and config.reads_pairs else places for name in self.layers[0].branches},
        )
        for layer, source in enumerate(config.kv_layers):
            rope = self.rope(places.position)
            memory.add(layer, "kv", KV(rope(states.key[source].to(self.dtype)), states.value[source].to(self.dtype)))
        if not config.uses_hidden:
            return memory
        features = self.fc(torch.cat([states.hidden[i] for i in config.hidden_layers], dim=-1).to(self.dtype))
        if config.objective == "blockwise":
            features, rope = self.hidden_norm(features), self.rope(places.position)
            for layer, module in enumerate(self.layers):
                memory.add(layer, "hidden", module.branches["hidden"].keys_values(features, rope))
            return memory
        # ttt: the memory of every layer is that of step 1 with an anchor at every position, one causal pass.
        memory.feature, rope, x = features, self.rope(pairs.position), features
        order = torch.arange(len(pairs.position), device=x.device)
        rows = Rows(pairs.document, pairs.position, order, torch.ones_like(order), pairs.position)
        visibility = self._visibility(rows, memory, rows)
        for index, layer in enumerate(self.layers):
            inputs = layer.inputs(x, next_token_PE)
            own = layer.keys_values(inputs, rope)
            memory.add(index, "hidden", own["hidden"])
            if index + 1 < len(self.layers):
                x = layer(x, inputs, rope, {n: memory.layers[index][n] + own[n] for n in own}, visibility, attend)
        return memory

    def block(self, anchor_NE: Tensor, rows: Rows, memory: Memory, attend) -> Tensor:
        """Block-wise drafting: slot 0 carries the anchor's token, the others MASK; all slots at once.

        Args:
            anchor_NE: embeddings of the anchors' tokens.
            rows: N x S rows, slot by slot within an anchor.

        Returns:
            [N, J, E] after the final norm, of the slots that propose x_{a+1} .. x_{a+J}.
        """
        mask = self.mask(torch.zeros(1, dtype=torch.long, device=anchor_NE.device))
        x = torch.cat([anchor_NE[:, None], mask.expand(len(anchor_NE), self.config.slots - 1, -1)], dim=1).flatten(0, 1)
        x, _ = self._run(x, x, rows, rows, memory, None, attend)
        return self.norm(x.unflatten(0, (-1, self.config.slots))[:, self.config.first_slot :])

    def step(
        self,
        token_NE: Tensor,
        feature_NE: Tensor | None,
        rows: Rows,
        earlier: Rows | None,
        memory: Memory,
        past: Past | None,
        attend,
    ) -> tuple[Tensor, Tensor, Past]:
        """One step of ttt for every anchor.

        Args:
            token_NE: embeddings of x_{a+j−1}.
            feature_NE: with hidden states fc(f_{a−1}) at step 1, later the stream that the step before returned.
            earlier, past: rows and keys of the steps before.

        Returns:
            output after the final norm [N, E], the residual stream before it [N, E], the keys including this step's.
        """
        drafts = rows if earlier is None else earlier + rows
        x, past = self._run(feature_NE if self.config.reads_pairs else token_NE, token_NE, rows, drafts, memory, past, attend)
        return self.norm(x), x, past

    def _run(self, x, token, rows, drafts, memory, past, attend):
        visibility, rope, kept = self._visibility(rows, memory, drafts), self.rope(rows.position), []
        for index, layer in enumerate(self.layers):
            inputs = layer.inputs(x, token)
            own = layer.keys_values(inputs, rope)
            kept.append(own if past is None else {name: past[index][name] + own[name] for name in own})
            keys = {name: memory.layers[index][name] + kept[index][name] for name in own}
            x = layer(x, inputs, rope, keys, visibility, attend)
        return x, kept

    def _visibility(self, queries: Rows, memory: Memory, drafts: Rows) -> dict[str, Visibility]:
        causal = self.config.objective == "ttt" or self.config.causal
        return {name: Visibility(queries, places, drafts, causal) for name, places in memory.places.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """`config.json` and `model.safetensors`, each whole or absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}, folder / "model.safetensors.tmp"
        )
        publish(folder / "model.safetensors.tmp", folder / "model.safetensors")
        write_text(folder / "config.json", self.config.to_json())

    @staticmethod
    def from_pretrained(folder: str | Path) -> "Drafter":
        """Raises UserError when the folder holds no drafter or its weights do not fit its configuration."""
        drafter = Drafter(DrafterConfig.load(folder))
        try:
            drafter.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        except Exception as error:
            raise UserError(
                f"{folder}: the drafter's weights are missing or do not fit its config.json ({str(error).splitlines()[0]})"
            ) from error
        return drafter

    @torch.no_grad()
    def start(self, target: Target | None, head: FrozenHead) -> "Drafter":
        """Initial weights, a function of the configuration's seed. start="target": every draft layer begins as its
        target layer (Q, K, V, O, norms, MLP), fc as a copy of the hidden state that layer would have read."""
        generator = torch.Generator().manual_seed(self.config.seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # drawn on the CPU: the same start on every device
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        if self.config.objective == "blockwise":
            token = self.config.mask_token_id
            self.mask.weight.copy_(
                head.embedding_VE.mean(0, keepdim=True) if token is None else head.embedding_VE[token : token + 1]
            )
        if self.config.start == "target":
            self._start_from(target)
        return self

    def _start_from(self, target: Target) -> None:
        config, size = self.config, self.config.architecture.hidden_size
        self.norm.weight.copy_(target.final_norm_weight)
        for layer, source in zip(self.layers, config.target_layers):
            weights = target.layer_weights(source)
            # The layer's norm weight moves into Q, K and V, so that memory, which passes another norm, meets the
            # same projection as in the target.
            scale = weights["input_norm.weight"]
            for branch in layer.branches.values():
                for name, parameter in branch.named_parameters():
                    value = weights[name] * scale if name in ("q.weight", "k.weight", "v.weight") else weights[name]
                    # EAGLE-3's pair: token and feature halves both start as the layer's projection.
                    parameter.copy_(torch.cat([value, value], dim=1) / 2 if parameter.shape != value.shape else value)
            for name in ("post_norm", "gate", "up", "down"):
                getattr(layer, name).weight.copy_(weights[f"{name}.weight"])
        if config.uses_hidden:
            below = [i for i in config.hidden_layers if i < config.target_layers[0]]
            chosen = config.hidden_layers.index(below[-1] if below else config.hidden_layers[0])
            self.fc.weight[:, chosen * size : (chosen + 1) * size] += torch.eye(size, device=self.fc.weight.device)
