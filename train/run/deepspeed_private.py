"""Every name of DeepSpeed (0.19) that we use and it does not document, and what breaks without it. No other file may use one.
`tests/train/test_private_names.py` fails when one goes.

Of the engine:
- `basic_optimizer`: our AdamW inside DeepSpeed's wrapper. Without it checkpoints hold no moments.
- `optimizer`: DeepSpeed's wrapper, the owner of the names below.
- `global_steps`, `global_samples`, `skipped_steps`, `micro_steps`: counters that are read and set. Without
  `micro_steps` a resumed run would place the ends of its optimizer steps wrongly; the others are what DeepSpeed counts by.
- `global_rank`: which part of a ZeRO-3 parameter this rank holds.

Of its optimizers:
- `fp16_groups` (ZeRO-0 in bf16; the name is DeepSpeed's): the bf16 parameters in the order of their float32 twins. Without it a
  checkpoint would hold bf16 weights instead of float32 ones.
- `_hp_optimizer_states_linked`, `_lazy_init_hp_params_optimizer_state` (ZeRO 1-2): DeepSpeed links parameters to their
  moments once, when the first group has stepped and the others have not. Without linking again
  `safe_get_full_optimizer_state` misses moments.
- `update_lp_params` (ZeRO 1-2): copies float32 weights to the bf16 ones that the forward uses. Without it a resumed run computes
  its first step with the weights that it started with.
- `fp32_partitioned_groups_flat` (ZeRO-3): the float32 tensors that AdamW steps, whose own groups are empty between steps. Without
  it moments cannot be put back.

Of its configuration:
- `runtime.zero.config.DeepSpeedZeroConfig`: what it checks a `zero_optimization` with. Without it a wrong key is a traceback,
  once the target is loaded.

Of ZeRO-3's parameters:
- `ds_numel`: how many numbers a parameter has. `numel()` is 0 while the parameter is sharded.
- `ds_tensor`: this rank's part. Its size says where the part begins.

Of its CPU collectives:
- `/dev/shm/deepspeed_allreduce_buffer_UID_ADDRESS_PORT_RANK`: shared memory that DeepSpeed never removes. Without the name
  each run leaves 67 MB a rank behind.

Of PyTorch's extensions, as which DeepSpeed builds an operation on this machine:
- `cpp_extension._get_build_directory`: the folder of the operation, in which a build has its lock. Without it the lock of a
  process that was killed is waited for without end.

Of `torch.distributed`, because DeepSpeed makes process groups of its own and names no timeout for them:
- `distributed_c10d.default_pg_timeout`, `default_pg_nccl_timeout`: without them `train.timeout_s` holds for our collectives and
  not for DeepSpeed's.

This module does not import DeepSpeed: that chooses its accelerator when it is imported, and train/main.py says which before that.
"""

import os
from collections.abc import Iterable
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.nn import Parameter
from torch.optim import Optimizer

from common.errors import UserError

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def refuse_unknown(zero_optimization: dict) -> None:
    """Raises UserError for a key of `deepspeed.zero_optimization` that DeepSpeed does not have, or a value it does not take."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero_optimization)
    except ValidationError as error:
        said = [f"deepspeed.zero_optimization.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise UserError(f"DeepSpeed refuses {'; '.join(said)}") from error


def adam_of(engine) -> Optimizer:
    return engine.basic_optimizer


def stepped_tensors(engine) -> list[Tensor]:
    """The float32 tensors that AdamW knows."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [parameter for group in adam_of(engine).param_groups for parameter in group["params"]]


def finite(engine) -> tuple[bool, bool]:
    """Whether all float32 weights are, and all moments, of all ranks. Each looks at the part that it steps."""
    moments = [tensor for state in adam_of(engine).state.values() for name, tensor in state.items() if name != "step"]
    bad = [sum(int(not tensor.isfinite().all()) for tensor in tensors) for tensors in (stepped_tensors(engine), moments)]
    bad_2 = torch.tensor(bad, device=engine.device)
    torch.distributed.all_reduce(bad_2)
    weights, moments = (bad_2 == 0).tolist()
    return weights, moments


def float32_twins(engine) -> dict[Parameter, Tensor]:
    """ZeRO-0: each parameter's float32 twin; in a float32 run that is the parameter itself."""
    stepped = stepped_tensors(engine)
    groups = getattr(engine.optimizer, "fp16_groups", None)  # a float32 run has no such wrapper
    return dict(zip(chain.from_iterable(groups) if groups else stepped, stepped))


def link_moments(engine) -> None:
    """ZeRO 1-2: make sure that every parameter finds its moments. Harmless under any other stage."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def weights_were_set(engine) -> None:
    """To be called when float32 weights were set: the forward's own follow, as ZeRO 1-2 do not do by themselves."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()


def my_part(engine, parameter: Parameter) -> slice:
    """ZeRO-3: which numbers of the flat parameter this rank holds. The last ranks' parts may reach beyond its end: DeepSpeed pads
    a parameter to equal parts."""
    size = parameter.ds_tensor.numel()
    start = engine.global_rank * size
    return slice(start, start + size)


def whole_size(parameters: Iterable[Parameter]) -> int:
    """How many numbers the parameters have on all ranks together."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def counters(engine) -> dict:
    return {name: getattr(engine, name) for name in COUNTERS}


def set_counters(engine, saved: dict) -> None:
    for name in COUNTERS:
        setattr(engine, name, saved[name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def limit_waiting(timeout: timedelta) -> None:
    """From now on collectives of groups that name no timeout, such as DeepSpeed's, give up after `timeout`."""
    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout


def shared_memory(rank: int) -> Path:
    """The file of the shared memory through which a rank of this host exchanges on a CPU."""
    parts = ("deepspeed_allreduce_buffer", os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank)
    return Path("/dev/shm", "_".join(map(str, parts)))


def build_lock() -> Path:
    """The file that is there while the operation is built through which the CPU ranks of a host exchange."""
    from torch.utils import cpp_extension  # slow to import, and GPUs need none of it

    return Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False), "lock")
