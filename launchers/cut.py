"""Some layers of a target, with its embedding, final norm and LM head: a small language model of the target's tokens, to be
trained as `drafter.lm`.

    python launchers/cut.py TARGET OUT --layers 0,10,20,29     these layers
    python launchers/cut.py TARGET OUT --count 4               as many, spread from the first to the last

TARGET is a folder or hub id in the format of transformers, or a .gguf file; OUT becomes such a folder.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from common.cli import fail  # noqa: E402
from common.errors import UserError, first_line  # noqa: E402
from data_prep.target import quantised  # noqa: E402
from data_prep.target.architecture import read_config  # noqa: E402
from data_prep.target.from_gguf import plain  # noqa: E402
from data_prep.target.loading import load_tokenizer  # noqa: E402
from data_prep.target.target import Target  # noqa: E402


def cut(path: str, out: Path, layers: list[int] | None, count: int | None = None) -> list[int]:
    """Write the folder `out`, whole or not at all, and return the layers. Raises UserError when `out` exists, or `path` is no
    target of which layers can be taken, or has no such layers."""
    if out.exists():
        raise UserError(f"{out} is there already")
    config = read_config(path, plain(path), None, trust_remote_code=False)
    if quantised.fields_of(config) is not None:
        raise UserError(f"{path} is quantised: its layers cannot be trained")
    last = config.get_text_config(decoder=True).num_hidden_layers - 1
    layers = spread(last, count) if layers is None else layers
    if layers != sorted(set(layers)) or not layers or not 0 <= layers[0] <= layers[-1] <= last:
        raise UserError(f"layers {','.join(map(str, layers))}: name layers of {path}, 0 to {last}, each once and in their order")
    tokenizer = load_tokenizer(path)
    small = smaller(Target(path, dtype=config.dtype or torch.float32), layers)

    aside = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        small.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return layers


def spread(last: int, count: int) -> list[int]:
    """`count` layers from the first to the last; of one, the first. More than there are come twice, which `cut` refuses."""
    return [round(i * last / max(count - 1, 1)) for i in range(count)]


def smaller(target: Target, layers: list[int]) -> PreTrainedModel:
    """The same model with these layers alone."""
    model = target.model
    if target.config is not model.config:
        raise UserError(f"{target.path} reads more than text; only language models are cut")
    # What the configuration says of each layer, such as layer_types, it says of the kept ones.
    count = model.config.num_hidden_layers
    listed = {k: v for k, v in model.config.to_dict().items() if "layer" in k and isinstance(v, list) and len(v) == count}
    fields = {name: [value[layer] for layer in layers] for name, value in listed.items()}
    config = type(model.config).from_dict(model.config.to_dict() | fields | {"num_hidden_layers": len(layers)})

    prefix = next(name for name, module in model.named_modules() if module is target.layers) + "."
    weights = {}
    for name, weight in model.state_dict().items():
        layer, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            weights[name] = weight
        elif int(layer) in layers:
            weights[f"{prefix}{layers.index(int(layer))}.{rest}"] = weight
    small = type(model)(config).to(target.dtype)
    try:
        small.load_state_dict(weights)
    except RuntimeError as error:  # a family whose layers are told apart by other means
        raise UserError(f"{target.path}: its layers cannot be renumbered ({first_line(error)})") from error
    return small


def main() -> None:
    numbers = lambda text: [int(word) for word in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("out", type=Path)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--layers", type=numbers)
    which.add_argument("--count", type=int)
    o = parser.parse_args()
    try:
        layers = cut(o.target, o.out, o.layers, o.count)
    except UserError as error:
        fail(error)
    print(f"{o.out}: layers {', '.join(map(str, layers))} of {o.target}; train with drafter.lm={o.out} reuse=none objective=ttt")


if __name__ == "__main__":
    main()
