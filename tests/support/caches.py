"""Manifests of caches: a small one, and one put in the place of another."""

import json

from data_prep.cache.manifest import FILES, FORMAT_VERSION, MANIFEST, Manifest, canonical, file_hash

SIZES = {"hidden_size": 4, "heads": 4, "kv_heads": 2, "head_dim": 3}


def manifest_of(architecture=SIZES, **changed):
    fields = dict(
        format_version=FORMAT_VERSION,
        target={"architecture": architecture},
        tokenizer_hash="k",
        chat_template_hash="c",
        hidden_layers=[0, 2],
        kv_layers=[1],
        codec="fp32",
        last_hidden="supervised",
        max_length=40,
        source={"name": "s"},
        software={},
    )
    return Manifest(**fields | changed)


def rewrite(folder, manifest):
    """Another manifest, sealed as if it had been captured so."""
    (folder / MANIFEST).write_text(json.dumps(manifest))
    sealed = json.loads((folder / FILES).read_text()) | {MANIFEST: file_hash(folder / MANIFEST)}
    (folder / FILES).write_text(canonical(sealed))
