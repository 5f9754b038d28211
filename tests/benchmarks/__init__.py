"""What the benchmarks share: options as key=value, one JSON line a result, and the two target shapes.

Run one as `python -m tests.benchmarks.capture shape=qwen3_8b`. Times are medians after a warm-up; each result states its
reference, measured in the same run.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from datetime import date
from tempfile import TemporaryDirectory

import torch
import transformers
from omegaconf import OmegaConf

from common.cli import without_local_rank
from common.recipe import ROOT
from data_prep.recipe import CaptureRecipe, TargetRecipe
from data_prep.target.loading import load_target, pick_device
from data_prep.target.target import Target

QWEN3_8B = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)

# Eight of the 48 layers of Qwen3-30B-A3B, unless told otherwise: 128 experts a layer, of which a token meets eight.
QWEN3_30B_A3B = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)

SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)


def options(**defaults):
    """The command line's key=value words over `defaults`; an unknown key is an error."""
    known = OmegaConf.create(defaults)
    OmegaConf.set_struct(known, True)
    return OmegaConf.merge(known, OmegaConf.from_cli(without_local_rank(sys.argv[1:])))


def target_of(shape: str, attention: str = "auto", depth: int | None = None) -> Target:
    """`tiny`: the embedded target. `qwen3_8b`, `qwen3_30b_a3b`, `smollm2`: their dimensions with random weights, through a real
    checkpoint on disk. `depth`: their number of layers; None: the usual one."""
    capture = CaptureRecipe(batch_tokens=1, attention=attention)
    if shape == "tiny":
        return load_target(TargetRecipe(path=str(ROOT / "data_prep/targets/tiny")), capture)
    device = pick_device()
    config, kind = {
        "qwen3_8b": (transformers.Qwen3Config(**QWEN3_8B), transformers.Qwen3ForCausalLM),
        "qwen3_30b_a3b": (transformers.Qwen3MoeConfig(**QWEN3_30B_A3B), transformers.Qwen3MoeForCausalLM),
        "smollm2": (transformers.LlamaConfig(**SMOLLM2), transformers.LlamaForCausalLM),
    }[shape]
    config.num_hidden_layers = depth or config.num_hidden_layers
    with TemporaryDirectory() as folder:
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            model = kind(config)
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        del model
        return load_target(TargetRecipe(path=folder), capture)


def architecture_of(shape: str) -> dict:
    """The sizes a manifest needs, without a model."""
    if shape == "qwen3_8b":
        return {"hidden_size": 4096, "kv_heads": 8, "head_dim": 128}
    return {"hidden_size": 256, "kv_heads": 2, "head_dim": 64}


def timed(function: Callable, device: torch.device) -> float:
    """Milliseconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def line(name: str, **figures) -> None:
    """Print one result. `peak_gib` is the GPU's where there is one, else the process's resident set."""
    on_gpu = pick_device().type == "cuda"
    host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    machine = torch.cuda.get_device_name() if on_gpu else "cpu"
    result = {
        "name": name,
        **figures,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30 if on_gpu else host_gib, 2),
        "host_peak_gib": round(host_gib, 2),
        "machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": str(date.today()),
    }
    print(json.dumps(result), flush=True)
