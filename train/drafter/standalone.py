"""A small language model of any Hugging Face family as a drafter that reuses nothing of the target (BudgetDraft's llama-68m).

The model's own code runs; only its attention is ours. transformers lets a function be registered as the attention of every family
and hands it rotated queries and keys: with that, memory, draft rows, views and backends are those of every other drafter.

Shapes: R rows, E the model's hidden size, H query heads, G key/value heads, D head size.
"""

import json
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.errors import UserError, first_line
from data_prep.target.architecture import STATIC_ROPE
from data_prep.target.described import Described
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.states import States
from train.attention.backend import AttentionBackend
from train.attention.reference import reference
from train.attention.visibility import DraftRows, Places, known_rows
from train.drafter.base import Drafter, Past
from train.drafter.config import DrafterConfig, rope_types
from train.drafter.heads import DraftHead
from train.drafter.layers import KV
from train.drafter.memory import Memory
from train.schedules.schedule import Start, Text

NAME = "understudy"  # of our attention, for transformers
BRANCH = "tokens"
# What the registered function calls: (layer, q, k, v) -> [R, H, D]. transformers has one registry for the whole process, while
# memory and rows are those of one call of one drafter. A context variable hands them over, also with several threads.
_running: ContextVar[Callable] = ContextVar("running")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, scaling: float | None = None, **options):
    """transformers' interface: [1, H, R, D] in, [1, R, H, D] out."""
    if options.get("sliding_window") or options.get("softcap") or options.get("s_aux") is not None:
        raise UserError("its attention has a sliding window, a cap on its scores, or sinks of its own")
    query = query if scaling is None else query * (scaling * query.shape[-1] ** 0.5)  # backends divide by sqrt(D)
    return _running.get()(module.layer_idx, *(t[0].transpose(0, 1) for t in (query, key, value)))[None], None


AttentionInterface.register(NAME, _attention)


def lm_config(path: str) -> dict:
    """What a drafter's configuration says of a causal LM. Raises UserError when there is none at `path`, or one whose rotary
    frequencies change with the length of the text."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # null would ask at the terminal
    except (OSError, ValueError) as error:
        raise UserError(f"drafter.lm={path}: there is no language model ({first_line(error)})") from error
    positions = getattr(config, "max_position_embeddings", None)
    fields = json.loads(config.to_json_string(use_diff=False)) | {"dtype": "float32"}
    if changing := set(rope_types(fields)) - set(STATIC_ROPE):
        raise UserError(
            f"drafter.lm={path}: rope type '{changing.pop()}' changes with the length; supported: {', '.join(STATIC_ROPE)}"
        )
    path = str(Path(path).resolve()) if Path(path).is_dir() else path  # a checkpoint is read from other folders
    return {"path": path, "layers": config.num_hidden_layers, "positions": positions, "config": fields}


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError when the model's tokens are not the target's."""
    mine = {i: t for t, i in tokenizer.get_vocab().items()}
    try:
        theirs = {i: t for t, i in AutoTokenizer.from_pretrained(path, trust_remote_code=False).get_vocab().items()}
    except (OSError, ValueError):
        if (size := lm_config(path)["config"]["vocab_size"]) != vocab_size:
            raise UserError(f"drafter.lm={path} has no tokenizer, and {size} tokens where the target has {vocab_size}") from None
        return
    if other := sorted(i for i in theirs.keys() & mine.keys() if theirs[i] != mine[i]):
        i = other[0]
        raise UserError(
            f"drafter.lm={path} has another vocabulary than the target: token {i} is {theirs[i]!r} there and {mine[i]!r} here"
        )


class Standalone(Drafter):
    """The model as layers over a memory of its own, of tokens. Its embedding and its LM head are its own, and trained."""

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        self.layers = []  # the model's own code runs: there are no draft layers to look into
        self._take(_made(config.lm))

    def _take(self, lm: PreTrainedModel) -> None:
        self.body = lm.base_model.eval()
        self.head = DraftHead(self.config, lm.get_output_embeddings().weight)
        buffers = ((m, name, b) for m in self.body.modules() for name, b in m.named_buffers(recurse=False))
        self._exact = [(m, name, b.clone()) for m, name, b in buffers if b.is_floating_point()]

    def _apply(self, function, recurse: bool = True):
        """Casts and moves the module, but keeps floating-point buffers exact: `.to(bfloat16)` would round the inverse
        frequencies, which would be wrong then."""
        super()._apply(function, recurse)
        for module, name, buffer in self._exact:
            setattr(module, name, buffer.to(self.head.weight.device))
        return self

    def train(self, mode: bool = True):
        super().train(mode)
        # Without dropout: training has to compute the function that decodes.
        self.body.eval()
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def inv_freq(self, layer: int, branch: str) -> Tensor:
        return self.body.rotary_emb.inv_freq.float()

    def embed(self, ids: Tensor, head: FrozenHead) -> Tensor:
        """A token that the model lacks (a target's table is often padded) is read as its last."""
        table = self.body.get_input_embeddings()
        return table(ids.clamp(max=table.num_embeddings - 1))

    def remember(
        self,
        states: States,
        places: Places,
        token_RE: Tensor,
        rows: Places,
        attend: AttentionBackend,
        past: Memory | None = None,
    ) -> Memory:
        memory = Memory.extended(past, self.config.depth, {BRANCH: rows})
        alone = known_rows(rows)
        self._run(token_RE, alone, alone, memory, None, attend, keep=True)
        return memory

    def known_queries(
        self, token_RE: Tensor, feature_RE: None, rows: Places, memory: Memory, attend: AttentionBackend
    ) -> list[dict[str, Tensor]]:
        alone = known_rows(rows)
        return self._run(token_RE, alone, alone, memory, None, attend)[2]

    def step(
        self,
        token_NE: Tensor,
        feature_NE: None,
        rows: DraftRows,
        earlier: DraftRows | None,
        memory: Memory,
        past: Past | None,
        attend: AttentionBackend,
    ) -> tuple[Tensor, None, Past]:
        drafts = rows if earlier is None else earlier + rows
        output_NE, kept, _ = self._run(token_NE, rows, drafts, memory, past, attend)
        return output_NE, None, kept

    def _run(
        self,
        x_RE: Tensor,
        rows: DraftRows,
        drafts: DraftRows,
        memory: Memory,
        past: Past | None,
        attend: AttentionBackend,
        keep: bool = False,
    ) -> tuple[Tensor, Past, list[dict[str, Tensor]]]:
        """Run rows through the model: each attends memory and the draft rows that it may see.

        Args:
            drafts: all draft rows whose keys there are: those of earlier ttt steps, then these.
            past: keys and values of the earlier steps' rows; None: there are none.
            keep: the rows' keys and values are added to `memory`, where later rows of the same pass see them.

        Returns:
            The output after the final norm [R, E]; `past` with this pass's keys and values; the queries of each layer.
        """
        visibility = self.visibility(rows, memory, drafts)
        kept: Past = []
        queries: list[dict[str, Tensor]] = []

        def attention(layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
            own = KV(k_RGD, v_RGD)
            queries.append({BRANCH: q_RHD})
            kept.append({BRANCH: own if past is None else past[layer][BRANCH] + own})
            if keep:
                memory.add(layer, BRANCH, own)
            keys = memory.layers[layer][BRANCH] + kept[layer][BRANCH]
            return attend(q_RHD, keys.key, keys.value, visibility[layer][BRANCH])

        token = _running.set(attention)
        try:
            position = self._position(rows.position)[None]
            output = self.body(inputs_embeds=x_RE[None], position_ids=position, use_cache=False).last_hidden_state[0]
        finally:
            _running.reset(token)
        return output, kept, queries

    def _position(self, position_R: Tensor) -> Tensor:
        """As the model is to read it. Rows before a document's start or beyond its end, which count for nothing, have no place in
        a table of learned positions."""
        if hasattr(self.body, "rotary_emb"):
            return position_R if self.config.rope_factor == 1 else position_R / self.config.rope_factor
        return position_R.clamp(0, self.config.lm["positions"] - 1) if self.config.lm["positions"] else position_R

    @torch.no_grad()
    def start(self, target: Described | None, head: FrozenHead, counts_V: Tensor | None = None) -> "Standalone":
        """The model's own weights, or with start="random" new ones; checked to say what the model says.

        Raises:
            UserError: the model cannot be loaded, or does something that our attention does not know.
        """
        path = self.config.lm["path"]
        dtype = self.dtype
        device = self.head.weight.device
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            lm = _made(self.config.lm, None if self.config.start == "random" else path)
        self._take(lm)
        self._check(lm, head)
        return self.to(device, dtype)

    def _check(self, lm: PreTrainedModel, head: FrozenHead) -> None:
        """Six tokens remembered and six drafted give the logits of the model's own forward over the twelve. Raises UserError when
        they do not."""
        where = f"drafter.lm={self.config.lm['path']} ({type(lm).__name__})"
        factor = self.config.rope_factor
        if factor != 1 and not hasattr(self.body, "rotary_emb"):
            raise UserError(f"{where}: drafter.rope_factor={factor:g} scales rotary positions, which it has not")
        size = min(len(self.head.weight), len(head.head_VE))
        ids = torch.randint(size, (12,), generator=torch.Generator().manual_seed(0))
        position = torch.arange(12)
        zero = torch.zeros_like(ids)
        token = self.embed(ids, head)
        anchor = torch.tensor([6])
        text = Text(lambda index_N: self.embed(ids[index_N], head), anchor, reference, length=6)
        try:
            lm.eval().set_attn_implementation("eager")
            expected = lm(input_ids=ids[None], position_ids=self._position(position)[None]).logits[0, 6:]
            lm.set_attn_implementation(NAME)
            memory = self.remember(States(), None, token[:6], Places(zero[:6], position[:6]), reference)
            self.config.schedule.draft(self, Start(memory, zero[:1], anchor, None), text)
            output_JE = text.output_NJE[0]
        except (UserError, LookupError, AttributeError, TypeError) as error:
            raise UserError(f"{where} cannot be a drafter: {error}") from error
        error = float((nn.functional.linear(output_JE, self.head.weight) - expected).abs().max())
        if error > 1e-3 * float(expected.abs().max()):
            raise UserError(
                f"{where} cannot be a drafter: its own logits differ by {error:.2g} from those through our attention (logits "
                "that are scaled or capped, positions or layers of another kind)"
            )

    @torch.no_grad()
    def check_in_cache(self) -> None:
        """Raises UserError when keys cannot be moved to positions in the cache by rotating them."""
        ids = torch.arange(4, device=self.head.weight.device)
        moved = 5
        place = Places(torch.zeros_like(ids), ids)
        tokens = self.embed(ids, None)

        def keys_at(offset: int) -> list[Tensor]:
            rows = Places(place.document, place.position + offset)
            return [kinds[BRANCH].key.float() for kinds in self.remember(States(), place, tokens, rows, reference).layers]

        def turns(layer: int, one: Tensor, other: Tensor) -> bool:
            try:
                found = self.rotate(layer, BRANCH, one, torch.full_like(one[..., 0], moved))
            except (AttributeError, RuntimeError):  # no rotary embedding, or one of another layout
                return False
            return bool((found - other).abs().max() < 1e-2 * other.abs().max())

        if not all(turns(i, one, other) for i, (one, other) in enumerate(zip(keys_at(0), keys_at(moved)))):
            raise UserError(f"view.positions=in_cache: the keys of {self.config.lm['path']} do not turn with their positions")


def _made(lm: dict, path: str | None = None) -> PreTrainedModel:
    """The model with its own weights from `path`, or with new ones, in float32. Raises UserError when that cannot be."""
    try:
        if not path:
            fields = dict(lm["config"])
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            return AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
        options = {"dtype": torch.float32, "attn_implementation": NAME, "output_loading_info": True}
        made, found = AutoModelForCausalLM.from_pretrained(path, **options)
    except KeyError as error:
        said = "its family lets no other attention in; it cannot draft under a view" if NAME in str(error) else f"no {error}"
        raise UserError(f"drafter.lm={lm['path']}: {said}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"drafter.lm={lm['path']} cannot be loaded ({first_line(error)})") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"drafter.lm={path} lacks {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    return made
