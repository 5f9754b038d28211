"""Names of libraries that they do not document: each is still there, and does what the adapter's docstring says of it."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from train.run import deepspeed_private
from train.run.ranks import LATER_S

# Small engines in one process of their own: DeepSpeed leaks what it makes, and a process group belongs to its process.
SCRIPT = '''
import json, math, sys
from common.ranks import single_process_defaults
single_process_defaults()
import deepspeed, torch
from deepspeed.utils import logger, safe_get_full_optimizer_state
from torch.distributed import distributed_c10d as c10d
from train.run import deepspeed_private as private
from train.run.ranks import connect
from train.run.state import MOMENTS

logger.setLevel("ERROR")
connect(False, 1234)
found = {"timeouts": [t.total_seconds() for t in (c10d.default_pg_timeout, c10d.default_pg_nccl_timeout)]}


def names_of(thing):  # a property may raise: that it is there counts
    return set(dir(thing)) | set(vars(thing))


def engine_of(stage, bf16):
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))
    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
    }
    if bf16 and stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    x = torch.ones(1, 5, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(2):
        engine.backward(engine(x).sum())
        engine.step()
    return engine


for stage, bf16 in ((0, False), (0, True), (1, True), (2, True), (3, True)):
    engine = engine_of(stage, bf16)
    parameters = list(engine.module.parameters())
    private.link_moments(engine)
    one = {
        "engine": sorted(names_of(engine)), "optimizer": sorted(names_of(engine.optimizer)),
        "parameter": sorted({name for name in ("ds_numel", "ds_tensor") if hasattr(parameters[0], name)}),
        "adam": type(private.adam_of(engine)).__name__,
        "size": private.whole_size(parameters), "numel": sum(p.numel() for p in parameters),
        "stepped": sum(t.numel() for t in private.stepped_tensors(engine)),
        "float32": all(t.dtype == torch.float32 for t in private.stepped_tensors(engine)),
        "counters": private.counters(engine),
    }
    if stage == 0:
        twins = private.float32_twins(engine)
        one["twins"] = [torch.allclose(p.float(), twins[p], atol=0.01) for p in parameters]
    else:
        moments = [safe_get_full_optimizer_state(p, kind) for p in parameters for kind in MOMENTS]
        one["moments"] = all(m is not None and m.abs().sum() > 0 for m in moments[:4])
    if stage == 3:
        places = [private.my_part(engine, p) for p in parameters]
        one["parts"] = sum(place.stop - place.start for place in places)
    if stage in (1, 2):
        for flat in private.stepped_tensors(engine):
            flat.data.fill_(0.25)
        private.weights_were_set(engine)
        one["followed"] = all((p == 0.25).all().item() for p in parameters)
    private.set_counters(engine, one["counters"] | {"global_steps": 7})
    one["set"] = [engine.global_steps, engine.micro_steps]
    # One number that is not finite, in the last of the tensors.
    one["finite"] = [private.finite(engine)]
    state = list(private.adam_of(engine).state.values())[-1]
    for tensor in (private.stepped_tensors(engine)[-1], state["exp_avg_sq"]):
        with torch.no_grad():
            kept, tensor.view(-1)[0] = tensor.view(-1)[0].item(), math.inf
            one["finite"].append(private.finite(engine))
            tensor.view(-1)[0] = kept
    found[f"{stage}{'-bf16' * bf16}"] = one
print("FOUND" + json.dumps(found))
'''
ENGINE = ("basic_optimizer", "optimizer", "global_steps", "global_samples", "skipped_steps", "micro_steps", "global_rank")
OPTIMIZER = {
    "0-bf16": ["fp16_groups"],
    "1-bf16": ["_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state", "update_lp_params"],
    "2-bf16": ["_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state", "update_lp_params"],
    "3-bf16": ["fp32_partitioned_groups_flat"],
}


@pytest.fixture(scope="module")
def deepspeed_found():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[5:])


class TestDeepSpeed:
    @pytest.mark.parametrize("stage", ["0", "0-bf16", "1-bf16", "2-bf16", "3-bf16"])
    def test_every_name_is_there(self, deepspeed_found, stage):
        one = deepspeed_found[stage]
        assert not set(ENGINE) - set(one["engine"])
        assert not set(OPTIMIZER.get(stage, [])) - set(one["optimizer"])
        assert one["parameter"] == (["ds_numel", "ds_tensor"] if stage == "3-bf16" else [])
        assert one["adam"] == "AdamW" and one["counters"]["global_steps"] == 2
        assert one["set"] == [7, 7]

    def test_they_give_what_a_checkpoint_needs(self, deepspeed_found):
        size = 5 * 3 + 3 + 3 + 1
        for stage in ("0", "0-bf16", "1-bf16", "2-bf16", "3-bf16"):
            assert deepspeed_found[stage]["size"] == size and deepspeed_found[stage]["float32"]
            assert deepspeed_found[stage]["stepped"] >= size
        assert deepspeed_found["3-bf16"]["numel"] < size  # so that `ds_numel` is needed
        assert deepspeed_found["3-bf16"]["parts"] >= size
        assert all(deepspeed_found["0"]["twins"] + deepspeed_found["0-bf16"]["twins"])
        for stage in ("1-bf16", "2-bf16", "3-bf16"):
            assert deepspeed_found[stage]["moments"]
        assert deepspeed_found["1-bf16"]["followed"] and deepspeed_found["2-bf16"]["followed"]

    @pytest.mark.parametrize("stage", ["0", "0-bf16", "1-bf16", "2-bf16", "3-bf16"])
    def test_one_number_that_is_not_finite_is_found(self, deepspeed_found, stage):
        """(weights, moments): of a sound engine, with a bad weight, with a bad moment."""
        assert deepspeed_found[stage]["finite"] == [[True, True], [False, True], [True, False]]

    def test_groups_give_up(self, deepspeed_found):
        assert deepspeed_found["timeouts"] == [1234 + LATER_S] * 2

    def test_the_shared_memory_has_its_name(self, monkeypatch):
        import deepspeed

        (source,) = Path(deepspeed.__file__).parent.glob("ops/csrc/cpu/comm/shm.cpp")
        assert '#define SHM_BUFFER_NAME "deepspeed_allreduce_buffer"' in source.read_text()
        monkeypatch.setenv("MASTER_ADDR", "host")
        monkeypatch.setenv("MASTER_PORT", "123")
        name = deepspeed_private.shared_memory(4).name
        assert name.startswith("deepspeed_allreduce_buffer_") and name.endswith("_host_123_4")

    def test_each_is_explained_and_no_other_file_uses_one(self):
        names = {*ENGINE, *(name for names in OPTIMIZER.values() for name in names), "ds_numel", "ds_tensor"}
        names |= {"default_pg_timeout", "default_pg_nccl_timeout", "deepspeed_allreduce_buffer"}
        code = inspect.getsource(deepspeed_private).removeprefix('"""' + deepspeed_private.__doc__ + '"""')
        for name in names:
            assert name in deepspeed_private.__doc__ and name in code
        for path in (ROOT / "train").rglob("*.py"):
            if path.name != "deepspeed_private.py":
                used = [name for name in names - {"optimizer"} if name in path.read_text()]
                assert not used, (path, used)
