"""vLLM decodes greedily with each of several drafters, and counts what it accepted. Run by the interpreter that has vLLM, in a
process of its own:

    .venv-serving/bin/python tests/support/vllm_decode.py ASKED.json ANSWER.json

    ASKED   {"target": folder, "prompts": [[token id]], "new_tokens": n, "runs": {name: run}}
            run: {"drafter": null | a vLLM speculative_config | a folder of the speculators format, which names its
            target itself; "own_key_norms": repair of the fault below}
    ANSWER  {name: {"outputs": [[token id]], "drafts": n, "accepted": [at the first position, at the second, ...]}}

Shapes: L layers, P positions, G key/value heads, D head size.
"""

import gc
import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that the repair reaches the model
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model  # noqa: E402


def own_key_norms(model: DFlashQwen3Model, key_LPGD: torch.Tensor) -> torch.Tensor:
    """Keys of memory, normed with the weight of their own layer. vLLM 0.32 hands all layers to one call of `rms_norm`, whose
    CPU version takes the first layer's weight for all of them."""
    normed = torch.empty_like(key_LPGD)
    for layer, key_PGD in enumerate(key_LPGD):
        ops.rms_norm(normed[layer], key_PGD.contiguous(), model._k_norm_weights[layer].contiguous(), model._rms_norm_eps)
    return normed


def decode(asked: dict, run: dict) -> dict:
    drafter = run["drafter"]
    names = {"model": drafter} if isinstance(drafter, str) else {"model": asked["target"], "speculative_config": drafter}
    llm = LLM(**names, dtype="float32", max_model_len=1024, enforce_eager=True, disable_log_stats=False, max_num_seqs=4)
    sampling = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], sampling, use_tqdm=False)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    result = {"outputs": [list(answer.outputs[0].token_ids) for answer in answers]}
    if drafter:
        result["drafts"] = metrics["vllm:spec_decode_num_drafts"].value
        result["accepted"] = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return result


def main() -> None:
    asked = json.load(open(sys.argv[1]))
    as_it_is = DFlashQwen3Model._normalize_context_k
    answer = {}
    for name, run in asked["runs"].items():
        DFlashQwen3Model._normalize_context_k = own_key_norms if run.get("own_key_norms") else as_it_is
        answer[name] = decode(asked, run)
        cleanup_dist_env_and_memory()
        gc.collect()
    json.dump(answer, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
