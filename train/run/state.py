"""What a DeepSpeed engine must get back to go on as if it had never stopped: float32 weights, AdamW's moments and counters.
Whole, by parameter, so that the number of ranks and the ZeRO stage may change in between.

ZeRO 1-3 give and take whole parameters through `deepspeed.utils.safe_*`. Without ZeRO there is a float32 twin of each parameter,
or in a float32 run the parameter itself. All that DeepSpeed does not document is in `deepspeed_private`.
"""

from collections.abc import Container
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from train.run import deepspeed_private

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's own names
KINDS = (WEIGHTS, *MOMENTS)


def file_name(kind: str, index: int) -> str:
    """Of one of `EngineState.files`."""
    return f"{kind}-{index}.safetensors" if index else f"{kind}.safetensors"


def _opened(folder: Path, kind: str) -> dict[str, safe_open]:
    """{parameter: the file that holds it}"""
    files = [safe_open(path, framework="pt") for path in (folder / file_name(kind, 0), *folder.glob(f"{kind}-*.safetensors"))]
    return {name: file for file in files for name in file.keys()}


class EngineState:
    """Reads and writes an engine's state. All ranks call every method together: ZeRO gathers a parameter by collectives."""

    def __init__(self, engine):
        self._engine = engine
        self._adam = deepspeed_private.adam_of(engine)
        self._named = dict(engine.module.named_parameters())
        self._stage = engine.zero_optimization_stage()
        self._twin = deepspeed_private.float32_twins(engine) if self._stage == 0 else {}

    def counters(self) -> dict:
        """What is counted beside the weights, as JSON. Every tensor of AdamW has counted as many steps as the first."""
        adam_step = int(next(iter(self._adam.state.values()))["step"])
        return {"adam_step": adam_step} | deepspeed_private.counters(self._engine)

    def files(self, most_bytes: int) -> list[list[str]]:
        """Which parameters share a file, of `most_bytes` or of one parameter. The same for any number of ranks and any stage."""
        found: list[list[str]] = []
        size = most_bytes
        for name, parameter in self._named.items():
            own = 4 * deepspeed_private.whole_size([parameter])  # float32
            if size + own > most_bytes:
                found.append([])
                size = 0
            found[-1].append(name)
            size += own
        return found

    def gather(self, kind: str, kept: Container[str]) -> dict[str, Tensor]:
        """The float32 weights or one of the moments of every parameter in `kept`, on the host, by name."""
        deepspeed_private.link_moments(self._engine)
        found = {}
        # One after the other, so that a device holds one whole parameter at a time. Ranks gather what they do not keep too: the
        # others' collectives wait for them.
        for name, parameter in self._named.items():
            value = self._get(parameter, kind)
            if name in kept and value is not None:
                found[name] = value.detach().cpu().contiguous()
        return found

    @torch.no_grad()
    def load(self, folder: Path, counters: dict) -> None:
        """`folder` holds the safetensors files of each of `KINDS`.

        Raises:
            OSError, SafetensorError, ValueError: a file is missing or cut, or of other parameters.
        """
        files = {kind: _opened(folder, kind) for kind in KINDS}
        if wrong := self._named.keys() ^ files[WEIGHTS].keys():
            raise ValueError(f"it holds other parameters: {sorted(wrong)[0]}")
        # 1. AdamW has no state before its first step. It gets an empty one, to which DeepSpeed then links its parameters: moments
        # are set through those links.
        for flat in deepspeed_private.stepped_tensors(self._engine):
            step = torch.tensor(float(counters["adam_step"]), device=flat.device)
            self._adam.state[flat] = {"step": step} | {kind: torch.zeros_like(flat) for kind in MOMENTS}
        deepspeed_private.link_moments(self._engine)

        # 2. Weights and moments.
        for name, parameter in self._named.items():
            for kind, file_of in files.items():
                if name in file_of:  # without ZeRO, a parameter that never had a gradient has no moments
                    self._set(parameter, kind, file_of[name].get_tensor(name))
        deepspeed_private.weights_were_set(self._engine)

        # 3. Counters.
        deepspeed_private.set_counters(self._engine, counters)

    def _get(self, parameter: Parameter, kind: str) -> Tensor | None:
        if self._stage == 0:
            twin = self._twin[parameter]
            return twin if kind == WEIGHTS else self._adam.state.get(twin, {}).get(kind)
        return safe_get_full_fp32_param(parameter) if kind == WEIGHTS else safe_get_full_optimizer_state(parameter, kind)

    def _set(self, parameter: Parameter, kind: str, value: Tensor) -> None:
        if self._stage == 0:
            twin = self._twin[parameter]
            kept = twin if kind == WEIGHTS else self._adam.state[twin][kind]
            kept.copy_(value)
            parameter.copy_(twin)  # the forward's own, in bf16 or the same
        elif self._stage < 3 and kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, kind)
        else:
            self._set_sharded(parameter, kind, value)

    def _set_sharded(self, parameter: Parameter, kind: str, value: Tensor) -> None:
        """ZeRO-3: this rank's equal part of the padded parameter (DeepSpeed's setter of whole ones cannot pad)."""
        place = deepspeed_private.my_part(self._engine, parameter)
        mine = value.flatten()[place]
        part = torch.zeros(place.stop - place.start)
        part[: len(mine)] = mine
        if kind != WEIGHTS:
            safe_set_local_optimizer_state(parameter, part, kind)
            return
        safe_set_local_fp32_param(parameter, part)
        # The float32 part is set; what the model computes with is another tensor. At the end of the block rank 0's change is
        # broadcast and sharded again.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(value)
