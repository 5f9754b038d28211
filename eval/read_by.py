"""Which modes read a key. One that the command line names and that its mode does not read is warned about, and ignored."""

from collections.abc import Iterable

DECODING = ("decode", "chat", "demo", "served")
DRAFTERS = ("decode", "score", "diagnose", "export", "chat", "demo", "served")

# A key, or a group of keys where all of its keys are alike. Below a group stand keys that more modes read than the others. What
# is not here is read by every mode.
READ_BY = {
    "drafter": DRAFTERS,
    "any_target": DRAFTERS,
    "target": DRAFTERS,
    "format": ("export",),
    "runs": ("compare",),
    "view": DRAFTERS,
    "tracking": ("decode", "score", "demo", "served", "compare"),
    "data": ("decode", "served"),
    "suite": ("decode", "served"),
    "cache": ("score", "diagnose"),
    "score": ("score", "diagnose"),
    "chat": ("chat",),
    "chat.thinking": ("chat", "demo"),
    "demo": ("demo",),
    "verify": ("decode",),
    "draft": DECODING,
    "server": ("served",),
    "batch": ("decode",),
    "temperatures": ("decode", "served"),
    # mode=demo is greedy.
    "top_p": ("decode", "chat", "served"),
    "top_k": ("decode", "chat", "served"),
    "stop": DECODING,
    "graphs": DECODING,
    "compile": DECODING,
    "transformers": ("decode",),
    "controls": ("decode",),
    "attention": ("decode", "score", "diagnose", "chat", "demo"),
    "seed": ("decode", "score", "diagnose", "chat", "demo", "served", "compare"),
}


def readers(key: str) -> tuple[str, ...] | None:
    """The modes that read a key, or any key of a group. None: all of them do."""
    if key in READ_BY:
        below = [modes for name, modes in READ_BY.items() if name.startswith(f"{key}.")]
        # A choice of a group (suite=gsm8k) sets its keys, and does something wherever one of them does.
        return tuple(dict.fromkeys(mode for modes in (READ_BY[key], *below) for mode in modes))
    group = key.rpartition(".")[0]
    while group and group not in READ_BY:
        group = group.rpartition(".")[0]
    return READ_BY.get(group)


def unread(mode: str, named: Iterable[str]) -> list[str]:
    """What is said of the `named` keys that `mode` does not read, a line each."""
    found = {key: readers(key) for key in named}
    return [
        f"warning: mode={mode} does not read {key}; {', '.join(f'mode={one}' for one in modes)} would"
        for key, modes in found.items()
        if modes is not None and mode not in modes
    ]
