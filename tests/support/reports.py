"""Reports by hand, of the shapes that judging writes."""

ATTACK = "<script>alert(1)</script><img src=https://example.org/x.png onerror=alert(1)>"
PARTS = {"draft": 9.25, "verify": 6.5, "overhead": 0.25}


def contender(tau: float, prompts: int = 30, seconds: float = 0.5) -> dict:
    return {
        "tau_micro": tau,
        "tau_macro": tau,
        "per_prompt": [[int(10 * tau) + i % 3, 10] for i in range(prompts)],
        "per_prompt_s": [[20.0, seconds + 0.01 * (i % 5)] for i in range(prompts)],
        "by_context": {"from": [64, 72], "to": [71, 79], "tau": [tau, tau + 0.1], "rounds": [9, 7]},
        "joint": [0.6, 0.3],
        "conditional": [0.6, 0.5],
        "tokens_per_s": 123.4,
        "round_ms": PARTS,
    }


def made(tau: float = 1.9, prompts: int = 30, name: str = "RUN/checkpoints/best", **more) -> dict:
    """A report by hand, of the shape that decoding writes."""
    figures = contender(tau, prompts) | {
        "baseline_tokens_per_s": 100.0,
        "baseline_round_ms": {"draft": 0.0, "verify": 9.5, "overhead": 0.5},
        "baseline_per_prompt_s": [[20.0, 1.0] for _ in range(prompts)],
        "lossless": True,
        "lossless_by": f"{prompts} of {prompts} outputs equal",
        "controls": {"prompt_lookup": contender(1.2, prompts)},
    }
    drafter = {"path": name, "parameters": 1_500_000, "objective": "ttt", "reuse": "kv", "lm": None, "seed": 0, "budgets": None}
    return {
        "drafter": drafter,
        "target": {"path": "tiny", "id": "tiny", "dtype": "torch.float32", "device": "cpu", "weights_hash": "abc"},
        "view": {"kind": "h2o", "budget": 256},
        "context": None,
        "software": {"torch": "2.0"},
        "commit": "c0ffee",
        "prompts": {
            "suite": "heldout",
            "count": prompts,
            "tokens": 64,
            "max_new_tokens": 16,
            "source": "stdlib",
            "seed": 0,
            "ids": [f"document {i}" for i in range(prompts)],
        },
        "temperatures": {"0": figures, "1": figures},
        "examples": {"1": [{"prompt": ATTACK, "pieces": [[ATTACK, "accepted"], ["no\n    ", "rejected"], ["yes\n", "emitted"]]}]},
        "drafter_kv": {"read_mib": 0.16, "kept_mib": 0.5},
        "peak_gib": 0.47,
        **more,
    }


def scored(tau: float = 1.9) -> dict:
    """The same of `score.json`."""
    report = made(context=64)
    kind = {"joint": [0.6, 0.3], "conditional": [0.6, 0.5], "tau": tau}
    kept = {name: report[name] for name in ("drafter", "target", "view", "context", "software", "commit")}
    return kept | {"cache": "CACHE", "kl": 1.0, "sampled": kind, "greedy": kind, "copies": {}}
