"""vLLM's connector that writes hidden states to files, for a vLLM on a CPU. Its own copies on a stream of CUDA.

Imported by vLLM, in its own interpreter (`kv_connector_module_path`), never by this project's. Written for vLLM 0.32.

Shapes: K chosen layers, T tokens, E hidden size.
"""

from functools import partial

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as theirs


class _Arrived:
    """An event of CUDA, of a copy that was made at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class HiddenStatesOnCpu(theirs.ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: theirs.PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        places = torch.arange(self._block_size)
        slots = (torch.tensor(pending.block_ids)[:, None] * self._block_size + places).flatten()
        # Copied before vLLM gives the blocks to another request.
        states_TKE = theirs.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).contiguous()
        tensors = {"hidden_states": states_TKE, "token_ids": pending.token_ids.clone()}
        lock = self._lock_fds.pop(pending.req_id, None)
        arrived = _Arrived()
        future = self._executor.submit(self._write_tensors, tensors, arrived, pending.filename, lock)
        self._req_copy_events[pending.req_id] = arrived
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))
