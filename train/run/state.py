"""What a DeepSpeed engine must get back to go on as if it had never stopped: float32 weights, AdamW's moments and counters.
Whole, by parameter, so that the number of ranks and the ZeRO stage may change in between.

ZeRO 1-3 give and take whole parameters through `deepspeed.utils.safe_*`. Without ZeRO there is a float32 twin of each parameter,
or in a float32 run the parameter itself.
"""

from itertools import chain
from pathlib import Path

import deepspeed
import torch
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

WEIGHTS = "weights"
KINDS = (WEIGHTS, "exp_avg", "exp_avg_sq")


class EngineState:
    """Reads and writes an engine's state. All ranks call every method together."""

    def __init__(self, engine):
        self._engine, self._adam, self._optimizer = engine, engine.basic_optimizer, engine.optimizer
        self._named = dict(engine.module.named_parameters())
        self._stage = engine.zero_optimization_stage()
        if self._stage == 0:
            groups = getattr(self._optimizer, "fp16_groups", None)  # bf16; the name is DeepSpeed's
            self._twin = dict(zip(chain.from_iterable(groups) if groups else self._stepped(), self._stepped()))

    def counters(self) -> dict:
        engine = self._engine
        return {
            "adam_step": int(next(iter(self._adam.state.values()))["step"]),
            "lr_scheduler": engine.lr_scheduler.state_dict(),
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "skipped_steps": engine.skipped_steps,
        }

    def gather(self, kind: str, keep: bool) -> dict[str, Tensor]:
        """The float32 weights or one of the moments of every parameter, on the host, by name; nothing unless `keep`."""
        self._link()
        found = {}
        for name, parameter in self._named.items():  # a device holds one whole parameter at a time
            value = self._get(parameter, kind)
            if keep and value is not None:
                found[name] = value.detach().cpu().contiguous()
        return found

    @torch.no_grad()
    def load(self, folder: Path, counters: dict) -> None:
        """`folder` holds one safetensors file a kind, `KINDS`.

        Raises:
            OSError, SafetensorError, ValueError: a file is missing or cut, or of other parameters.
        """
        files = {kind: safe_open(folder / f"{kind}.safetensors", framework="pt") for kind in KINDS}
        if wrong := self._named.keys() ^ set(files[WEIGHTS].keys()):
            raise ValueError(f"it holds other parameters: {sorted(wrong)[0]}")
        for flat in self._stepped():
            step = torch.tensor(float(counters["adam_step"]), device=flat.device)
            self._adam.state[flat] = {"step": step} | {kind: torch.zeros_like(flat) for kind in KINDS[1:]}
        self._link()
        for name, parameter in self._named.items():
            for kind, file in files.items():
                if name in file.keys():  # without ZeRO, a parameter that never had a gradient has no moments
                    self._set(parameter, kind, file.get_tensor(name))
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        engine = self._engine
        engine.lr_scheduler.step(counters["lr_scheduler"]["last_batch_iteration"])  # the groups' rates too
        engine.global_steps, engine.global_samples = counters["global_steps"], counters["global_samples"]
        engine.skipped_steps = counters["skipped_steps"]
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()

    def _stepped(self) -> list[Tensor]:
        """The float32 tensors that AdamW knows."""
        if self._stage == 3:  # its groups are empty between steps
            return self._optimizer.fp32_partitioned_groups_flat
        return [p for group in self._adam.param_groups for p in group["params"]]

    def _link(self) -> None:
        """ZeRO 1-2 find moments through links that DeepSpeed makes when the first group has stepped, and the others not yet."""
        if self._stage in (1, 2):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _get(self, parameter: Parameter, kind: str) -> Tensor | None:
        if self._stage == 0:
            twin = self._twin[parameter]
            return twin if kind == WEIGHTS else self._adam.state.get(twin, {}).get(kind)
        return safe_get_full_fp32_param(parameter) if kind == WEIGHTS else safe_get_full_optimizer_state(parameter, kind)

    def _set(self, parameter: Parameter, kind: str, value: Tensor) -> None:
        if self._stage == 0:
            twin = self._twin[parameter]
            (twin if kind == WEIGHTS else self._adam.state[twin][kind]).copy_(value)
            parameter.copy_(twin)
        elif self._stage < 3 and kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, kind)
        else:
            self._set_sharded(parameter, kind, value)

    def _set_sharded(self, parameter: Parameter, kind: str, value: Tensor) -> None:
        """ZeRO-3: this rank's equal part of the padded parameter (DeepSpeed's setter of whole ones cannot pad)."""
        size = parameter.ds_tensor.numel()
        start = self._engine.global_rank * size
        part = torch.zeros(size)
        mine = value.flatten()[start : start + size]
        part[: len(mine)] = mine
        if kind != WEIGHTS:
            return safe_set_local_optimizer_state(parameter, part, kind)
        safe_set_local_fp32_param(parameter, part)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # what the model computes with
            if self._engine.global_rank == 0:
                parameter.copy_(value)
