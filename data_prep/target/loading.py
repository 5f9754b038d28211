"""From the keys of a recipe to a target and its tokenizer: which device, which dtype, which files."""

import re
from importlib.util import find_spec

import torch
import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import UserError, first_line
from common.ranks import on_gpu
from data_prep.recipe import CaptureRecipe, TargetRecipe
from data_prep.target.architecture import needs_trust, target_sizes, untrusted
from data_prep.target.checkpoint import check_checkpoint
from data_prep.target.from_gguf import plain
from data_prep.target.parts import TargetParts
from data_prep.target.target import Target

# Tokens that a model of text alone may lack, though it shares a tokenizer with others (Gemma 3 1B).
OF_PICTURES = re.compile("image|video|audio|vision|img", re.IGNORECASE)


def pick_device(device: str = "auto") -> torch.device:
    """`auto`: the GPU this process may use (DS_ACCELERATOR=cpu: none), else the CPU. Raises UserError when cuda is asked
    for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("target.device=cuda, but this machine has no GPU that PyTorch can use")
    if device == "cuda" or (device == "auto" and on_gpu()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Raises UserError when there is no tokenizer at `path`, or one whose code must not run."""
    try:
        found = AutoTokenizer.from_pretrained(plain(path, revision), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if needs_trust(error):
            raise untrusted(path) from error
        raise UserError(f"target.path={path}: no tokenizer can be loaded there ({first_line(error)})") from error
    # Without its files transformers makes an empty tokenizer of the model's family.
    if not found("hello world", add_special_tokens=False)["input_ids"]:
        raise UserError(f"target.path={path}: its tokenizer makes no tokens of a text; is tokenizer.json missing?")
    return found


def target_tokenizer(recipe: TargetRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer, which knows as `model_vocab_size` how many tokens the target has. Raises UserError as `load_tokenizer` does,
    and for tokens that the target has not."""
    tokenizer = load_tokenizer(recipe.location, recipe.revision, recipe.trust_remote_code)
    rows = target_sizes(recipe).vocab_size
    beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= rows and not OF_PICTURES.search(token)}
    if beyond:
        last = max(beyond)
        raise UserError(
            f"target.path={recipe.path}: its tokenizer has '{beyond[last]}' (id {last}), and the model has {rows} tokens, from 0 "
            f"to {rows - 1}; take the tokenizer that belongs to the model, or enlarge the model's embedding"
        )
    tokenizer.model_vocab_size = rows
    return tokenizer


def load_target(recipe: TargetRecipe, capture: CaptureRecipe | None = None) -> Target:
    """The target of a `TargetRecipe`, on its device and in its dtype; with the attention and the spread of `capture`."""
    check_checkpoint(recipe)
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device)
    if capture is None:
        return Target(recipe.location, recipe.revision, dtype, device, trust_remote_code=recipe.trust_remote_code)
    half = device.type == "cuda" and dtype == torch.bfloat16
    attention = capture.attention
    if attention == "auto":
        attention = "flash_attention_2" if half and find_spec("flash_attn") else None
    elif attention == "flash_attention_2" and not half:
        raise UserError("capture.attention=flash_attention_2 needs a GPU and bf16")
    return Target(recipe.location, recipe.revision, dtype, device, attention, capture.spread, recipe.trust_remote_code)


def load_parts(recipe: TargetRecipe) -> TargetParts:
    """The target of which weights are read as they are asked for, on its device and in its dtype."""
    check_checkpoint(recipe)
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device)
    return TargetParts(recipe.location, recipe.revision, dtype, device, recipe.trust_remote_code)


def weights_hash(recipe: TargetRecipe) -> str:
    """`Target.weights_hash` of a target that nobody has loaded. However large it is, it is only hashed."""
    return load_parts(recipe.model_copy(update={"device": "cpu"})).weights_hash()


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(hash of the vocabulary and its rules, hash of the chat template)."""
    rules = (
        tokenizer.backend_tokenizer.to_str()
        if hasattr(tokenizer, "backend_tokenizer")
        else str(sorted(tokenizer.get_vocab().items()))
    )
    template = str(tokenizer.chat_template or "")
    return xxhash.xxh3_128_hexdigest(rules.encode()), xxhash.xxh3_128_hexdigest(template.encode())
