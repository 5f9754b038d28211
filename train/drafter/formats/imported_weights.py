"""The tensors of a checkpoint that others trained, under our names (train/drafter/formats/imported.py reads its configuration).

Shapes: E hidden size, V target vocabulary, D draft vocabulary, R rank of a Markov head, N rows of a table.
"""

from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError, first_line
from data_prep.target.described import Described
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.loading import load_tokenizer, tokenizer_hashes
from train.drafter.base import Drafter
from train.drafter.config import DrafterConfig
from train.drafter.formats.assistant_names import HEAD, assistant_names
from train.drafter.formats.names import MASK_FILE, served_names

MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")  # [V, R] and [D, R]
LOOKED_AT = {"t2d", "d2t", "embed_tokens.weight", "mask_embedding", *MARKOV}  # tensors that need no place of their own


def refuse(folder: Path, reasons: dict[str, bool]) -> None:
    """Raises UserError with the first reason that holds."""
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise UserError(f"{folder} {reason}")


class Tensors:
    """What the safetensors files of a folder hold; each is read when it is asked for. Raises UserError where there are none."""

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}  # by the name of a tensor
        paths = sorted(folder.glob("*.safetensors"))
        pickles = sorted(folder.glob("*.bin"))
        if not paths and pickles:
            raise UserError(
                f"{folder} has its weights in {pickles[0].name}, a pickle, which is not read: convert it to model.safetensors "
                "(safetensors.torch.save_file of what torch.load(..., weights_only=True) returns)"
            )
        refuse(folder, {"holds no weights (model.safetensors)": not paths})
        for path in paths:
            try:
                with safe_open(path, "pt") as opened:
                    self.files |= dict.fromkeys(opened.keys(), path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: its weights cannot be read ({first_line(error)})") from error
        # Servers take both names of EAGLE-3's one layer.
        plain = {name: name.removeprefix("model.") for name in self.files}
        self.named_midlayer = any(name.startswith("midlayer.") for name in plain.values())
        self._theirs = {name.replace("midlayer.", "layers.0.", 1): theirs for theirs, name in plain.items()}

    @property
    def names(self) -> set[str]:
        return set(self._theirs)

    def __contains__(self, name: str) -> bool:
        return name in self._theirs

    def __getitem__(self, name: str) -> Tensor:
        theirs = self._theirs[name]
        with safe_open(self.files[theirs], "pt") as opened:
            return opened.get_tensor(theirs)

    def shape(self, name: str) -> list[int] | None:
        """None: there is no such tensor."""
        if name not in self:
            return None
        theirs = self._theirs[name]
        with safe_open(self.files[theirs], "pt") as opened:
            return opened.get_slice(theirs).get_shape()


def names_of(config: DrafterConfig) -> dict[str, str]:
    """Each of our weights -> its name in public checkpoints. What comes from the target has none."""
    if config.is_assistant:
        return {ours: theirs.removeprefix("model.") for ours, theirs in assistant_names(config).items()}
    names = served_names(config)
    if config.pairs:
        names["mask_hidden.weight"] = "mask_hidden"
    if config.own_head:
        names["head.weight"] = "lm_head.weight"
    if config.draft_vocab:
        names["head.d2t"] = "d2t"
    return names


def imported_weights(folder: Path, config: DrafterConfig) -> dict[str, Tensor]:
    """The checkpoint's weights under our names, but for what it leaves to its target. Raises UserError for tensors that are
    missing or have no place."""
    tensors = Tensors(folder)
    names = names_of(config)
    absent = [theirs for theirs in names.values() if theirs not in tensors]
    absent += [name for name in MARKOV if config.sequential and name not in tensors]
    confidence = {name for name in tensors.names if name.startswith("confidence_head.")}  # how much to verify: not what to draft
    # SGLang calls the norm of later layers otherwise than vLLM, so that some hold it twice.
    twice = {f"layers.{i}.hidden_norm.weight": f"layers.{i}.input_layernorm.weight" for i in range(1, config.depth)}
    twice = {name: other for name, other in twice.items() if name in tensors and other in tensors}
    tied = {"lm_head.weight"} if config.is_assistant else set()
    foreign = sorted(tensors.names - set(names.values()) - LOOKED_AT - confidence - twice.keys() - tied)
    refuse(
        folder,
        {
            "has norms of later layers for vLLM (input_layernorm) and for SGLang (hidden_norm) that differ": any(
                not torch.equal(tensors[name], tensors[other]) for name, other in twice.items()
            ),
            f"lacks the tensor {absent and absent[0]} (in all {len(absent)})": bool(absent),
            f"has a tensor that no drafter here has, {foreign and foreign[0]} (in all {len(foreign)})": bool(foreign),
        },
    )
    _check_vocabulary(folder, config, tensors)
    if config.is_assistant:
        _check_assistant(folder, config, tensors)
    weights = {mine: tensors[theirs] for mine, theirs in names.items()}
    if config.pairs:
        weights["mask_hidden.weight"] = weights["mask_hidden.weight"].view(1, -1)
    return weights


def _check_vocabulary(folder: Path, config: DrafterConfig, tensors: Tensors) -> None:
    """Raises UserError for a draft vocabulary that is none."""
    if "d2t" not in tensors:
        return
    d2t_D = tensors["d2t"]
    refuse(folder, {f"has d2t of {d2t_D.dtype}, which holds no offsets": d2t_D.is_floating_point()})
    d2t_D = d2t_D.long()
    # d2t holds offsets: draft token i is target token i + d2t[i].
    kept_D = torch.arange(len(d2t_D)) + d2t_D
    inside = bool(((kept_D >= 0) & (kept_D < config.architecture.vocab_size)).all())
    said = tensors["t2d"].bool().nonzero().flatten() if "t2d" in tensors else kept_D.sort().values
    refuse(
        folder,
        {
            "has d2t with tokens twice, or beyond the vocabulary": not inside or len(kept_D.unique()) < len(kept_D),
            "has d2t and t2d that name other tokens": not torch.equal(said, kept_D.sort().values),
            "has d2t that says the target's tokens in another order": config.draft_vocab is None and bool(d2t_D.any()),
        },
    )


def _check_assistant(folder: Path, config: DrafterConfig, tensors: Tensors) -> None:
    """Raises UserError for two LM heads, and for clusters that leave tokens out."""
    head = HEAD.removeprefix("model.")
    ordering_V = tensors["masked_embedding.token_ordering"] if config.centroids else torch.arange(0)
    whole_V = torch.arange(config.architecture.vocab_size if config.centroids else 0)
    refuse(
        folder,
        {
            "has an LM head that is not its embedding, and servers tie the two": (
                "lm_head.weight" in tensors and not torch.equal(tensors["lm_head.weight"], tensors[head])
            ),
            "has a masked_embedding.token_ordering that leaves tokens out": not torch.equal(ordering_V.sort().values, whole_V),
        },
    )


@torch.no_grad()
def bind(drafter: Drafter, folder: Path, name: str, target: Described) -> None:
    """Make an imported drafter this target's: what the checkpoint left to it, and whose it is from now on. Raises UserError as
    `left_to_target` does."""
    left = left_to_target(folder, drafter.config, target.frozen_head)
    if drafter.config.is_assistant:
        # The target's last hidden state is normed here with the drafter's own.
        mine = drafter.config.architecture.norm_eps
        theirs = target.architecture.norm_eps
        refuse(folder, {f"has rms_norm_eps={mine}, and the target {theirs}": mine != theirs})
        left["target_norm"] = target.final_norm_weight
    drafter.load_state_dict(left, strict=False)
    tokenizer_hash = tokenizer_hashes(load_tokenizer(target.path, target.revision, target.trust_remote_code))[0]
    identity = {"id": name, "weights_hash": target.weights_hash(), "tokenizer_hash": tokenizer_hash}
    drafter.config = replace(drafter.config, target=identity)


def left_to_target(folder: Path, config: DrafterConfig, head: FrozenHead) -> dict[str, Tensor]:
    """What a checkpoint says in terms of its target, under our names: MASK, a row of the embedding, and a Markov head's tables,
    which ours factors through embedding and LM head. An embedding table of the checkpoint's own has to be the target's, but for
    MASK's row. Raises UserError for another, and for tables that cannot be factored."""
    try:
        return _left_to_target(folder, config, head, Tensors(folder))
    except (RuntimeError, KeyError, TypeError, AttributeError, UnpicklingError) as error:  # shapes and files of any kind
        raise UserError(f"{folder}: its MASK or its Markov head cannot be read ({first_line(error)})") from error


def _left_to_target(folder: Path, config: DrafterConfig, head: FrozenHead, tensors: Tensors) -> dict[str, Tensor]:
    mask_1E = _mask(folder, config, head, tensors)
    found = {} if mask_1E is None else {"mask.weight": mask_1E}
    if config.sequential:
        draft_DE = tensors["lm_head.weight"] if config.own_head else head.head_VE.cpu()
        if config.draft_vocab and not config.own_head:
            draft_DE = draft_DE[torch.arange(config.draft_vocab) + tensors["d2t"]]
        found["sequential.down.weight"] = _factored(folder, tensors[MARKOV[0]], head.table_VE.cpu(), "embedding").T
        found["sequential.up.weight"] = _factored(folder, tensors[MARKOV[1]], draft_DE, "LM head")
    return found


def _mask(folder: Path, config: DrafterConfig, head: FrozenHead, tensors: Tensors) -> Tensor | None:
    """[1, E]; None under ttt."""
    if config.is_assistant:  # its one table is its LM head
        return None
    token = config.mask_token_id
    table_VE = head.table_VE
    mask_1E = None if token is None else table_VE[token : token + 1].clone()
    if "embed_tokens.weight" in tensors:
        theirs_VE = tensors["embed_tokens.weight"]
        off_V = _rows_that_differ(folder, theirs_VE, table_VE)
        # MASK is a token that no text holds, so that a trainer may put its learned embedding into that row.
        if token is not None and off_V[token]:
            mask_1E = theirs_VE[token : token + 1].to(table_VE)
            off_V[token] = False
        if off_V.any():
            raise UserError(
                f"{folder} has an embedding of its own: {int(off_V.sum())} rows are not the target's, such as that of token "
                f"{int(off_V.nonzero()[0])}; drafters here read their target's"
            )
    # The file goes before the row of the embedding.
    if token is not None and (folder / MASK_FILE).is_file():
        stored = torch.load(folder / MASK_FILE, weights_only=True)
        said = stored.get("mask_token_id", token) if isinstance(stored, dict) else token
        refuse(folder, {f"has a {MASK_FILE} for token {said}, and mask_token_id={token}": said != token})
        mask_1E = (stored["embedding"] if isinstance(stored, dict) else stored).view(1, -1).to(table_VE)
    if token is not None and "mask_embedding" in tensors:
        mask_1E = tensors["mask_embedding"].view(1, -1).to(table_VE)
    size = table_VE.shape[1]
    refuse(folder, {f"has a MASK that is no embedding of size {size}": mask_1E is not None and mask_1E.shape[1] != size})
    return mask_1E


def _factored(folder: Path, table_NR: Tensor, through_NE: Tensor, name: str) -> Tensor:
    """x [E, R] with table = through @ x, by least squares. Raises UserError where the table is no such product."""
    size = through_NE.shape[1]
    gram_EE = torch.zeros(size, size).double()
    right_ER = torch.zeros(size, table_NR.shape[1]).double()
    parts = list(zip(through_NE.detach().split(8192), table_NR.split(8192)))  # a vocabulary in float64 would be large
    for part_NE, part_NR in parts:
        gram_EE += part_NE.double().T @ part_NE.double()
        right_ER += part_NE.double().T @ part_NR.double()
    # A vocabulary's embedding may have fewer than E independent directions. This keeps the system solvable and changes nothing
    # else.
    gram_EE += 1e-12 * gram_EE.trace() * torch.eye(size).double()
    x_ER = torch.linalg.solve(gram_EE, right_ER)
    missed = sum((part_NE.double() @ x_ER - part_NR.double()).square().sum() for part_NE, part_NR in parts)
    if missed > 1e-4 * table_NR.double().square().sum():  # bf16 alone gives a hundredth of this
        raise UserError(
            f"{folder} has a Markov head of two tables of the vocabulary's size; ours (drafter.sequential) goes through the "
            f"target's embedding and LM head, and this one is no function of the {name}"
        )
    return x_ER.to(through_NE.dtype)


def _rows_that_differ(folder: Path, theirs_VE: Tensor, mine_VE: Tensor) -> Tensor:
    """bool [V]. Half precisions round otherwise; a row that was trained is further off than that."""
    if theirs_VE.shape != mine_VE.shape:
        raise UserError(f"{folder} has an embedding of its own, {list(theirs_VE.shape)}; the target's is {list(mine_VE.shape)}")
    mine_VE = mine_VE.detach().cpu().float()
    return ((theirs_VE.float() - mine_VE).abs() > 2**-7 * mine_VE.abs() + 1e-5).any(-1)
