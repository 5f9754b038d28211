"""How ranks join, and who is missing when a collective fails."""

import contextlib
import threading
import time
from datetime import timedelta

from common.errors import UserError
from common.ranks import ended, rank, world_size
from train.run import deepspeed_private
from train.run.build_lock import wait_for_builder


def connect(on_gpu: bool, timeout_s: int) -> None:
    """Join the other ranks, through DeepSpeed. No collective waits longer than `timeout_s`.

    DeepSpeed gives the CPU ranks of one host 67 MB of shared memory each and removes none of it. Here the name goes once
    every rank has opened every other's, and the memory with the last process, however that ends.
    """
    import deepspeed  # it chooses its accelerator here: train/main.py has said which by now
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    deepspeed_private.limit_waiting(timeout)
    if not on_gpu:
        wait_for_builder(deepspeed_private.build_lock(), lambda line: print(line, flush=True))
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=timeout, verbose=False)
    if not on_gpu:
        try:
            dist.barrier()  # a rank behind it has opened all of them; without it a slower rank would look for a name that is gone
        finally:
            deepspeed_private.shared_memory(rank()).unlink(missing_ok=True)


def loss_of_a_rank(error: Exception, timeout_s: int) -> UserError | None:
    """What to tell of an error of the collectives, None for any other. Takes seconds: ranks that are left count themselves."""
    said = str(error).strip()
    if "gloo" in said and "Timed out" in said:
        silent = _silent_ranks()
        who = f"rank {', '.join(map(str, silent))}" if silent else "a rank"
        return UserError(
            f"{who} did not answer for {timeout_s} s (train.timeout_s); the last checkpoint is intact: mend that host and "
            "say the same command again"
        )
    if ended(error):
        return UserError(f"the connection between ranks failed (train.timeout_s={timeout_s}): {said}")
    return None


def _silent_ranks(patience_s: float = 4) -> list[int]:
    """Who does not say in `patience_s` that it has waited in vain too. Rank 0 keeps the store: without an answer it is rank 0."""
    found = [0] if rank() else []

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # the store is gone, or there is none yet
            store = deepspeed_private.default_store()
            store.set(f"waited in vain/{rank()}", "")
            time.sleep(patience_s)  # ranks do not give up in the same moment
            found[:] = [other for other in range(world_size()) if not store.check([f"waited in vain/{other}"])]

    asking = threading.Thread(target=ask, daemon=True)  # a store on a host that is cut off never answers
    asking.start()
    asking.join(2 * patience_s)
    return found
