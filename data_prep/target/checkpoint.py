"""A target's files before they are loaded: what of them is missing, misshapen, or would be left out or read wrongly.

What a quantisation is says quantised.py; what transformers makes of the files' tensors, checkpoint_private.py.
"""

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from common.errors import UserError, first_line
from common.ranks import on_gpu
from common.rules import refuse
from data_prep import rules
from data_prep.recipe import TargetRecipe
from data_prep.target import checkpoint_private
from data_prep.target.architecture import kind_of, no_causal_lm, read_config, target_config
from data_prep.target.from_gguf import plain
from data_prep.target.quantised import PACKAGES, SCALES, fields_of, found_at, method_of, multiplied_out, tensor_files
from data_prep.target.transformers_private import quantisation_methods

# Tensors of a checkpoint that a decoder of text does without, and why.
HARMLESS = (
    r"rotary_emb\.(\w+_)?inv_freq$",  # computed from the configuration
    r"^lm_head\.weight$",  # a copy of a tied embedding; without ties the model would have the name
    r"(^|\.)mtp(_\w+)?\.",  # draft layers of the model's own (Qwen3-Next, Qwen3.5)
    # Parts for pictures and sound.
    r"(^|\.)(vision_\w+|visual|multi_modal_projector|mm_projector|patch_merger|image_newline|audio_\w+|embed_(vision|audio))(\.|$)",
    r"\.(k|v|q|prob_output)_scale$|\.(k|v)_proj\.output_scale$",  # of a server's KV cache in fp8
)
WIDE = ("F64", "F32", "F16", "BF16")  # the format's names of numbers that need no scale
ROWS = 4096  # of two tensors that are compared at once


class Checkpoint(NamedTuple):
    """What there is to know of a target's files before they are loaded. `scale` names a tensor of scales, `missing` a package to
    install, `absent` a file that the index names and that is not there."""

    path: str
    method: str | None
    known: bool
    missing: str | None
    modelopt: bool
    adapter: bool
    scale: str | None
    safetensors: bool
    spread: str
    absent: str | None = None


class Stored(NamedTuple):
    """A tensor as its file says that it is."""

    file: Path
    shape: list[int]
    dtype: str


def check_checkpoint(recipe: TargetRecipe, spread: str = "none") -> None:
    """Raises UserError for files that are not the whole model of their configuration, that transformers would read without their
    scales, or that it cannot read here."""
    folder = plain(recipe.location, recipe.revision)
    if folder != recipe.location:  # made of a GGUF file
        return
    adapter = found_at(folder, "adapter_config.json", recipe.revision) is not None
    fields = None if adapter else fields_of(target_config(recipe))
    method = fields and method_of(fields)
    needed = PACKAGES.get(method, ())
    names = {} if adapter else tensor_files(folder, recipe.revision)
    # Of a hub id: where its files come to lie. Those that are not here yet will be fetched.
    local = Path(folder).is_dir()
    files = {name: found_at(folder, name, None) if local else None for name in sorted(set(names.values()))}
    found = Checkpoint(
        path=recipe.path,
        method=method,
        known=method in quantisation_methods(),
        missing=next((name.replace("_", "-") for name in needed if find_spec(name) is None), None),
        modelopt=found_at(folder, "hf_quant_config.json", recipe.revision) is not None,
        adapter=adapter,
        scale=next((name for name in names if SCALES.search(name)), None),
        safetensors=bool(names),
        spread=spread,
        absent=next((name for name, file in files.items() if local and file is None), None),
    )
    refuse(rules.CHECKPOINT, recipe, found)
    if local and names and not recipe.trust_remote_code:
        seen = (Path(folder) / "config.json", *files.values())
        _check_tensors(recipe.path, folder, method, tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in seen))


@lru_cache(maxsize=8)
def _check_tensors(path: str, folder: str, method: str | None, state: tuple) -> None:
    """Once for files of one `state`: all of a process's commands ask."""
    tensors = _headers(folder)
    if method is not None:
        _check_scales(path, tensors, method)
        return
    config = read_config(path, folder, None, False)
    try:
        model = checkpoint_private.skeleton(config, torch.float32, kind_of(config))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise no_causal_lm(path, error) from error
    try:
        origins = checkpoint_private.origins(model, tensors)
    except (ImportError, AttributeError, TypeError):  # another release of transformers: loading will tell
        return
    used = {name for origin in origins.values() for _, name in origin.tensors}
    unused = [name for name in tensors if name not in used and not checkpoint_private.passed_over(model, name)]
    refuse_unexpected(path, unused, config.get_text_config(decoder=True).num_hidden_layers)
    own = model.state_dict(keep_vars=True)
    there = {id(own[name]) for name in origins}
    refuse_missing(path, [name for name, value in own.items() if id(value) not in there])
    _check_shapes(path, model, origins, tensors)
    for one, other in ((a, b) for a in origins for b in origins if a < b and own[a] is own[b]):
        if not _equal(tensors, *(origins[name].tensors[-1][1] for name in (one, other))):
            raise UserError(
                f"target.path={path}: config.json ties {one} and {other}, and the files hold two that differ, of which some "
                "programs read one and some the other: set tie_word_embeddings=false there if both are meant"
            )


def _headers(folder: str) -> dict[str, Stored]:
    """Raises UserError for a file that is cut, or lacks what the index says that it has."""
    found = {}
    named = tensor_files(folder)
    try:
        for name in sorted(set(named.values())):
            with safe_open(Path(folder) / name, "pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    found[key] = Stored(Path(folder) / name, part.get_shape(), part.get_dtype())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: its safetensors cannot be read ({first_line(error)})") from error
    if lost := next((key for key in named if key not in found), None):
        raise UserError(f"{folder}: {named[lost]} does not hold {lost}, as the index says it does; fetch it again")
    return {key: found[key] for key in named}


def _check_shapes(path: str, model: PreTrainedModel, origins: dict, tensors: dict[str, Stored]) -> None:
    own = model.state_dict()
    for name, origin in origins.items():
        for _, stored in origin.tensors:
            if own[name].is_floating_point() and tensors[stored].dtype not in WIDE:
                raise UserError(
                    f"target.path={path}: {stored} is stored as {tensors[stored].dtype}, and nothing says by which scales to "
                    "multiply it"
                )
        try:
            made = checkpoint_private.made(model, name, origin, lambda key: torch.empty(tensors[key].shape, device="meta"))
            shape = list(made.shape)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            shape = first_line(error)
        if shape != list(own[name].shape):
            raise UserError(
                f"target.path={path}: {name} is {list(own[name].shape)} in the model of config.json, and {shape} in its files"
            )


def _check_scales(path: str, tensors: dict[str, Stored], method: str) -> None:
    """Of weights in 8 bits that a scale for each block belongs to."""
    whole = multiplied_out(method, torch.device("cuda" if on_gpu() else "cpu"))
    for name, (_, shape, dtype) in tensors.items():
        if not name.endswith(".weight") or not dtype.startswith("F8_E4M3"):
            continue
        scales = [f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}scale"]
        scale = next((tensors[scale].shape for scale in scales if scale in tensors), None)
        if scale is None:
            raise UserError(f"target.path={path}: {name} is stored as {dtype}, and no tensor holds its scales ({scales[0]})")
        if whole and len(scale) == 2 and any(size % blocks for size, blocks in zip(shape, scale)):
            raise UserError(
                f"target.path={path}: {name} is {shape}, which {scale} blocks of scales do not divide evenly: without a GPU and "
                "the package kernels, transformers cannot multiply it out"
            )


def _equal(tensors: dict[str, Stored], one: str, other: str) -> bool:
    with safe_open(tensors[one].file, "pt") as a, safe_open(tensors[other].file, "pt") as b:
        left, right = a.get_slice(one), b.get_slice(other)
        starts = range(0, tensors[one].shape[0], ROWS)
        return tensors[one].shape == tensors[other].shape and all(
            torch.equal(left[i : i + ROWS], right[i : i + ROWS]) for i in starts
        )


def refuse_missing(path: str, names) -> None:
    """Raises UserError for parameters that no tensor of the files is: transformers would go on with random values."""
    if names := sorted(names):
        raise UserError(f"target.path={path}: the checkpoint lacks {_few(names)}")


def refuse_unexpected(path: str, names, layers: int) -> None:
    """Raises UserError for tensors of the checkpoint that the model has no place for, unless it does without them."""
    strange = [name for name in sorted(names) if not _is_harmless(name, layers)]
    if strange:
        raise UserError(
            f"target.path={path}: transformers has no place for {_few(strange)} of its files; without them the "
            "states would be those of another model (scales of quantised weights need a quantization_config in config.json)"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_harmless(name: str, layers: int) -> bool:
    if any(re.search(pattern, name) for pattern in HARMLESS):
        return True
    # DeepSeek and GLM keep draft layers of the model's own behind its last layer.
    layer = re.search(r"(^|\.)layers\.(\d+)\.", name)
    return layer is not None and int(layer[2]) >= layers
