"""What servers tell of their drafts: vLLM's counters, in Prometheus' text format, and SGLang's `meta_info` of an answer.

Shapes: C = 1 + J counts, for J drafted tokens of a round: the rounds, and of these the ones that accepted at least 1..J tokens.
"""

import re

import numpy as np

from common.errors import UserError

DRAFTS = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
FINISHED = "vllm:request_success_total"


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of each line of Prometheus' text format."""
    found = []
    for line in text.splitlines():
        whole = re.match(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)", line)
        if whole and not line.startswith("#"):
            name, labels, value = whole.groups()
            pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")
            found.append((name, dict(pairs), float(value)))
    return found


def vllm_counts(text: str) -> np.ndarray | None:
    """int64 [C] over all engines of a server since its start, from its `/metrics`; None: it does not draft."""
    rounds = None
    accepted = {}
    for name, labels, value in samples(text):
        if name == DRAFTS:
            # A server of several engines has a line for each.
            rounds = (rounds or 0) + round(value)
        if name == ACCEPTED:
            # vLLM counts from 0, which is slot 1.
            position = int(labels["position"])
            accepted[position] = accepted.get(position, 0) + round(value)
    if rounds is None or not accepted:
        return None
    return np.array([rounds, *(accepted.get(j, 0) for j in range(max(accepted) + 1))])


def sglang_counts(meta: dict, slots: int) -> np.ndarray:
    """int64 [C] of one request, from the `meta_info` of its answer. Raises UserError where it tells no histogram."""
    rounds = int(meta.get("spec_verify_ct") or 0)
    histogram = meta.get("spec_correct_drafts_histogram") or meta.get("spec_accept_histogram") or []
    if rounds and not histogram:
        raise UserError("the SGLang server tells no acceptance by position (spec_correct_drafts_histogram): 0.5.23 does")
    # histogram[k]: rounds that accepted exactly k tokens. At least j were accepted where k >= j.
    return np.array([rounds, *(sum(histogram[j:]) for j in range(1, slots + 1))])
