"""What every drafter is: memory of the verified prefix, and draft rows that read it. Training and decoding call the same methods.

Shapes: P memory positions, R rows of known tokens, N anchors, E hidden size, H query heads, G key/value heads, D head size.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import publish, write_text
from common.hashing import SUMS, file_hash, write_sums
from data_prep.target.described import Described
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.states import States
from train.attention.backend import AttentionBackend
from train.attention.visibility import DraftRows, Places, Visibility
from train.drafter.config import DrafterConfig
from train.drafter.heads import DraftHead, SequentialHead
from train.drafter.layers import DraftLayer, GatedDelta, Rope, Steps, TokenHalves
from train.drafter.memory import Memory

Past = list[dict[str, Steps]]  # the draft rows' own keys of earlier ttt steps, for each layer and branch


class Drafter(nn.Module):
    """The target's embedding and LM head (`FrozenHead`) are handed in, not owned.

    `layers` are the draft layers that the project knows from inside (of a language model: none). `head` is the LM head.
    `sequential` corrects each slot of a block by the token before it; None: nothing does.
    """

    recompute = False  # whether draft rows' activations are made again in the backward instead of kept
    head: DraftHead
    layers: nn.ModuleList | list[DraftLayer]
    sequential: SequentialHead | None

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        self.sequential = None

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def inv_freq(self, layer: int, branch: str) -> Tensor:
        """The inverse frequencies [R] by which the first 2 R dimensions of its keys are rotated, in float32."""
        raise NotImplementedError

    @property
    def fusions(self) -> list[GatedDelta]:
        """The gated deltas of a hybrid drafter."""
        return [layer.fuse for layer in self.layers if layer.fuse is not None]

    def compile_parts(self) -> None:
        """Compile what stands between the products of its layers; of a language model, whose code is its own, nothing."""

    def embed(self, ids: Tensor, head: FrozenHead) -> Tensor:
        """What the drafter reads of tokens, [..., E of its layers]."""
        return head.embed(ids)

    def remember(
        self,
        states: States,
        places: Places,
        token_RE: Tensor,
        rows: Places,
        attend: AttentionBackend,
        past: Memory | None = None,
    ) -> Memory:
        """Memory of `past` and of P more verified positions.

        Args:
            states: the target's states at `places`, [P, ...].
            token_RE: embeddings of the tokens newly known, at `rows`. With pairs, R = P: the pair (x_{i+1}, f_i) sits at position
                i + 1. The newest one is the anchor's own, and its anchor's rows do not see it.
        """
        raise NotImplementedError

    def known_queries(
        self, token_RE: Tensor, feature_RE: Tensor | None, rows: Places, memory: Memory, attend: AttentionBackend
    ) -> list[dict[str, Tensor]]:
        """The queries [R, H, D] with which known tokens at `rows` read all of the memory before them, for each layer and branch:
        what views choose by.

        Args:
            memory: all of it, without a selection: the queries are what the next selection is made by.
            feature_RE: with pairs, the feature of the position before each token.
        """
        raise NotImplementedError

    def halves(self, token_PE: Tensor) -> TokenHalves | None:
        """What ttt's rows will read of these tokens, where steps can share it: `step` takes a selection of it instead of
        embeddings. None: they cannot."""
        return None

    def step(
        self,
        token_NE: Tensor | TokenHalves,
        feature_NE: Tensor | None,
        rows: DraftRows,
        earlier: DraftRows | None,
        memory: Memory,
        past: Past | None,
        attend: AttentionBackend,
    ) -> tuple[Tensor, Tensor | None, Past]:
        """One step of ttt for every anchor.

        Args:
            token_NE: embeddings of x_{a+j−1}.
            feature_NE: with hidden states fc(f_{a−1}) at step 1, later the stream that the step before returned.
            earlier, past: rows and keys of the steps before.

        Returns:
            what the LM head reads [N, E], the stream that the next step reads (before the final norm; `norm_output`: after it)
            [N, E], or None where it reads none, the keys including this step's.
        """
        raise NotImplementedError

    def start(self, target: Described | None, head: FrozenHead, counts_V: Tensor | None = None) -> "Drafter":
        """Initial weights, a function of the configuration's seed; the drafter itself.

        Args:
            counts_V: how often the training text supervises each token; a reduced draft vocabulary keeps the most frequent.
        """
        raise NotImplementedError

    def rotate(self, layer: int, branch: str, key_PGD: Tensor, moved_PG: Tensor) -> Tensor:
        """Keys of a layer and branch as they would be, had each stood `moved_PG` positions further on."""
        # Rotations add up, so that a rotated key is moved by rotating it once more. The scale of the target's rotary embedding
        # (YaRN's) is in the key already: here it is 1.
        wide = torch.promote_types(key_PGD.dtype, torch.float32)
        rope = Rope(moved_PG / self.config.rope_factor, self.inv_freq(layer, branch), 1.0, wide)
        return rope(key_PGD.to(wide)).to(key_PGD.dtype)

    def visibility(self, queries: DraftRows, memory: Memory, drafts: DraftRows) -> list[dict[str, Visibility]]:
        """For each layer and branch; layers that see the same share it. Without keys of their own the rows see memory alone."""
        causal = self.config.schedule.causal(self.config)
        if not self.config.own_kv:
            drafts = drafts.none
        if memory.selection is not None:
            return [
                {n: Visibility(queries, places, drafts, causal, selection[n]) for n, places in memory.places.items()}
                for selection in memory.selection
            ]
        # One object for all layers of a window: what a backend derives from it (masks, tiles) is made once.
        made: dict[tuple[str, int | None], Visibility] = {}

        def of(layer: int, branch: str) -> Visibility:
            window = self.config.shape(layer, branch).window
            if (branch, window) not in made:
                made[branch, window] = Visibility(queries, memory.places[branch], drafts, causal, window=window)
            return made[branch, window]

        return [{branch: of(layer, branch) for branch in memory.places} for layer in range(len(memory.layers))]

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds; a tensor that has two names (a tied LM head) under the first."""
        every = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        first = {name for name, _ in self.named_parameters()}
        # safetensors refuses to save two tensors that share their memory.
        return {name: t for name, t in self.state_dict().items() if name not in every - first}

    def save_pretrained(self, folder: str | Path, parameters: dict[str, Tensor] | None = None) -> None:
        """`config.json` and `model.safetensors`, each whole or absent, and their checksums. `parameters`: their values by name,
        where an engine has them in parts."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMS).unlink(missing_ok=True)  # of a drafter that was here before
        weights = {name: t.detach().cpu().contiguous() for name, t in (self.weights() | (parameters or {})).items()}
        save_file(weights, folder / "model.safetensors.tmp")
        publish(folder / "model.safetensors.tmp", folder / "model.safetensors")
        write_text(folder / "config.json", self.config.to_json())
        write_sums(folder, {name: file_hash(folder / name) for name in ("config.json", "model.safetensors")})
