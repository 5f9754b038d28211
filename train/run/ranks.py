"""How ranks join, and what is said when a collective fails."""

from datetime import timedelta

from common.errors import UserError
from common.ranks import ended, rank, without_nccl_dumps
from train.run import deepspeed_private
from train.run.build_lock import wait_for_builder

# A rank that is gone or frozen is noticed by its silence after `train.timeout_s` (`common/pulse.py`), and named. Collectives give
# up this much later. That ends the waiting for a rank that is heard of and does nothing; under NCCL PyTorch's watchdog then ends
# the process, another minute later and with words of its own.
LATER_S = 60  # seconds


def connect(on_gpu: bool, timeout_s: int) -> None:
    """Join the other ranks, through DeepSpeed. No collective waits longer than `timeout_s` + `LATER_S`.

    DeepSpeed gives the CPU ranks of one host 67 MB of shared memory each and removes none of it. Here the name goes once
    every rank has opened every other's, and the memory with the last process, however that ends.
    """
    import deepspeed  # it chooses its accelerator here: train/main.py has said which by now
    import torch.distributed as dist

    without_nccl_dumps()
    timeout = timedelta(seconds=timeout_s + LATER_S)
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
    """What to tell of an error of the collectives, None for any other."""
    if not ended(error):
        return None
    return UserError(
        f"an exchange between ranks failed (train.timeout_s={timeout_s}); the last checkpoint is intact: mend what is said here, "
        f"then say the same command again: {' '.join(str(error).split())}"
    )
