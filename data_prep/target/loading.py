"""From the keys of a recipe to a target and its tokenizer: which device, which dtype, which files."""

from importlib.util import find_spec

import torch
import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import UserError, first_line
from common.ranks import on_gpu
from data_prep.recipe import CaptureRecipe, TargetRecipe
from data_prep.target.architecture import needs_trust, untrusted
from data_prep.target.from_gguf import plain
from data_prep.target.parts import TargetParts
from data_prep.target.quantised import check_checkpoint
from data_prep.target.target import Target


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
        return AutoTokenizer.from_pretrained(plain(path, revision), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if needs_trust(error):
            raise untrusted(path) from error
        raise UserError(f"target.path={path}: no tokenizer can be loaded there ({first_line(error)})") from error


def target_tokenizer(recipe: TargetRecipe) -> PreTrainedTokenizerBase:
    """Raises UserError as `load_tokenizer` does."""
    return load_tokenizer(recipe.location, recipe.revision, recipe.trust_remote_code)


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
