"""What drafting is measured against besides our own plain decoding: transformers' `generate`, compiled where that is fast."""

import time

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from data_prep.decoding.sampling import Sampling
from data_prep.target.target import Target
from eval.engine.request import Stops
from eval.oracle.decode import Generation, clock


class _FirstToken(StoppingCriteria):
    """Stops nothing; knows when the prompt was read."""

    at: float | None = None

    def __call__(self, ids_BT, scores, **options):
        if self.at is None:
            if ids_BT.is_cuda:
                # Without it the clock would be read when the forward is launched and not when it is done.
                torch.cuda.synchronize()
            self.at = time.perf_counter()
        return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)


class Transformers:
    """`generate`, one request at a time; on a GPU with a static cache, for which it compiles the model into CUDA graphs."""

    def __init__(self, target: Target, sampling: Sampling):
        self._target = target
        warm = sampling.temperature > 0
        cut = {"top_p": sampling.top_p, "top_k": sampling.top_k}
        # A model's own generation settings may hold more than what we sample by.
        self._options = {"do_sample": warm, "repetition_penalty": 1.0}
        self._options |= {"temperature": sampling.temperature, **cut} if warm else {}
        if target.device.type == "cuda":
            self._options["cache_implementation"] = "static"

    def generate(self, prompt: list[int], max_new_tokens: int, seed: int, stops: Stops) -> Generation:
        target = self._target
        first = _FirstToken()
        ids = torch.tensor([prompt], device=target.device)
        ends = {"eos_token_id": sorted(stops.end_tokens) or None, "pad_token_id": 0}
        if stops.strings:
            ends |= {"stop_strings": list(stops.strings), "tokenizer": stops.tokenizer}
        # `generate` draws from the global generator.
        torch.manual_seed(seed)
        # Without our hooks and layouts of weights: the model that a user of transformers has.
        with target.as_loaded():
            began = clock(target)
            output = target.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList([first]),
                **ends,
                **self._options,
            )
            ended = clock(target)
        return Generation(output[0, len(prompt) :].tolist(), prefill_s=first.at - began, decode_s=ended - first.at)
