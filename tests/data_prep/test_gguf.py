"""Targets that are GGUF files: bit-equal to what transformers dequantises, made once, whole or not at all."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFEndian
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from common import cli
from common.errors import UserError
from common.recipe import ROOT
from data_prep.capture.plan import plan
from data_prep.recipe import DataPrepRecipe, TargetRecipe
from data_prep.target import from_gguf, gguf_contents
from data_prep.target.architecture import target_sizes
from data_prep.target.from_gguf import cache_folder, is_whole, plain
from data_prep.target.loading import load_target, load_tokenizer
from data_prep.target.target import Target
from tests.support.commands import SMALL, command, fetch_smollm2
from tests.support.gguf_files import TINY, small_model, tiny_tokenizer, write_gguf

MIXED = {
    "token_embd": Kind.Q8_0,
    "attn_v": Kind.F16,
    "attn_output": Kind.BF16,
    "ffn_down": Kind.F32,
    "blk": Kind.Q4_1,  # the other matrices of layers
    "output": Kind.Q5_0,
}
TEXT = "def area(width, height):\n    return width * height  # naïve, 漢字 🙂\n\n\n     4 + 1234 = 1238; don't\t\tstop"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def folders() -> list[Path]:
    """What lies in the cache beside locks."""
    return [found for found in cache_folder().glob("*") if found.suffix != ".lock"]


def transformers_own(file: Path, dtype: torch.dtype):
    asked = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=asked, dtype=dtype)


def differing(file: Path, dtype: torch.dtype) -> list[str]:
    """Names of parameters that are not transformers' own, bit for bit."""
    ours = AutoModelForCausalLM.from_pretrained(plain(str(file)), dtype=dtype).state_dict()
    theirs = transformers_own(file, dtype).state_dict()
    assert list(ours) == list(theirs) and all(t.dtype == dtype for t in (*ours.values(), *theirs.values()))
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    "family, tied, head_dim",  # head sizes: transformers reads them of llama, and takes its own default for the others
    [("llama", True, 32), ("llama", False, 16), ("qwen2", True, 16), ("qwen2", False, 16), ("qwen3", True, 128)],
)
def test_weights_are_bit_equal_to_what_transformers_dequantises(tmp_path, family, tied, head_dim):
    file = write_gguf(tmp_path / "model.gguf", small_model(family, tied, head_dim), MIXED)
    assert differing(file, torch.float32) == []
    assert differing(file, torch.bfloat16) == []


def test_without_undoing_the_row_order_of_rotary_weights_queries_and_keys_differ(tmp_path, monkeypatch):
    """The negative control of the test above."""
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), MIXED)
    monkeypatch.setattr(gguf_contents, "rotary_halves", lambda rows_RC, heads: rows_RC)
    wrong = [f"model.layers.{layer}.self_attn.{which}_proj.weight" for layer in (0, 1) for which in "qk"]
    assert sorted(differing(file, torch.float32)) == sorted(wrong)


def test_dequantising_in_chunks_gives_the_same_rows(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=False), MIXED)
    monkeypatch.setattr(gguf_contents, "PIECE", 1000)  # 15 rows of the embedding
    assert differing(file, torch.float32) == []


@pytest.mark.parametrize(
    "family, tied, options, keys",
    [
        ("llama", True, {}, {}),
        ("llama", False, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, "linear"),
        ("qwen2", False, {}, {}),
        ("qwen3", True, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
        (
            "qwen3",
            False,
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "rope_theta": 1e6,
                }
            },
            "yarn",
        ),
    ],
)
def test_an_unquantised_file_computes_what_the_model_did(tmp_path, family, tied, options, keys):
    """Sizes, biases, norms, RoPE and end tokens: the same logits and the same greedy text, bit for bit."""
    model = small_model(family, tied, **options)
    if keys:
        rope = model.config.rope_parameters
        keys = {f"{family}.rope.scaling.type": keys, f"{family}.rope.scaling.factor": rope["factor"]}
        if "original_max_position_embeddings" in rope:
            keys[f"{family}.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    file = write_gguf(tmp_path / "model.gguf", model, keys=keys)
    target = load_target(TargetRecipe(path=str(file), device="cpu"))
    ids = torch.randint(5, 8000, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(target.model(ids).logits, model(ids).logits)
    words = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": 0}
    assert torch.equal(target.model.generate(ids, **words), model.generate(ids, **words))
    assert target.architecture.inv_freq == model.model.rotary_emb.inv_freq.double().tolist()
    assert target_sizes(TargetRecipe(path=str(file))).head_dim == 32


def test_the_scaled_rope_of_llama_3_is_recognised_by_its_frequencies(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = small_model("llama", True, rope_parameters=rope, max_position_embeddings=16384)
    factors = np.ones(16, np.float32)  # as llama.cpp's converter makes them
    for i in range(16):
        turns = 8192 / (2 * np.pi * 500000.0 ** (2 * i / 32))  # of this pair in the length that was trained
        between = (turns - 1) / (4 - 1)
        factors[i] = 8 if turns < 1 else 1 if turns > 4 else 1 / ((1 - between) / 8 + between)
    assert len(set(factors.tolist())) > 2  # the rule's three regions
    file = write_gguf(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": factors})
    read = Target(str(file)).model.model.rotary_emb.inv_freq
    assert torch.equal(read, model.model.rotary_emb.inv_freq)
    factors[5] *= 1.01
    other = write_gguf(tmp_path / "other.gguf", model, extra={"rope_freqs.weight": factors})
    with pytest.raises(UserError, match="rope_freqs.weight is not what Llama 3.1's rule gives"):
        plain(str(other))


def test_the_tokenizer_is_the_one_that_was_written(tmp_path):
    """Ids, special tokens and chat template, read back from the folder alone."""
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True))
    folder = plain(str(file))
    file.unlink()
    ours, theirs = load_tokenizer(folder), load_tokenizer(str(TINY))
    talk = [{"role": "user", "content": TEXT}]
    words = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(talk, **words) == theirs.apply_chat_template(talk, **words)
    for text in (TEXT, ours.apply_chat_template(talk, **words), "<|im_start|>system\n<|endoftext|>"):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"] and ours.decode(ids) == text
    assert ours.decode(ours("<|im_start|>hi<|im_end|>")["input_ids"], skip_special_tokens=True) == "hi"
    assert (ours.eos_token, ours.pad_token, ours.bos_token, len(ours)) == ("<|endoftext|>", "<|pad|>", None, len(theirs))


@pytest.mark.parametrize("rule", ["qwen2", "llama-bpe", "tekken"])
def test_pre_tokenization_equals_that_of_transformers(tmp_path, rule):
    words = tiny_tokenizer() | {"ggml.pre": rule}
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), tokenizer=words)
    ours = load_tokenizer(plain(str(file)))
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = TEXT * 3 + (ROOT / "README.md").read_text() + (ROOT / "data_prep/target/target.py").read_text()

    def cut(tokenizer):
        return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert cut(ours) == cut(theirs)
    assert cut(ours) != cut(load_tokenizer(str(TINY)))


def test_the_smollm_rule_splits_numbers_into_single_digits(tmp_path):
    """transformers takes GPT-2's rule for it, under which a space goes with the digit behind it."""
    words = tiny_tokenizer() | {"ggml.pre": "smollm"}
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), tokenizer=words)
    tokenizer = load_tokenizer(plain(str(file)))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x\n    42")
    assert [piece for piece, _ in cut] == ["x", "ĊĠĠĠĠ", "4", "2"]


def test_the_llama_3_rule_takes_a_word_of_the_vocabulary_without_merges(tmp_path):
    """A word that is in the vocabulary is one token, whether merges lead to it or not."""
    words = tiny_tokenizer()
    words["ggml.merges"] = [m for m in words["ggml.merges"] if "".join(m.split(" ")) != "Ġreturn"]
    word = words["ggml.tokens"].index("Ġreturn")
    for rule, alone in (("llama-bpe", True), ("gpt-2", False)):
        named = words | {"ggml.pre": rule, "ggml.add_bos_token": False}
        file = write_gguf(tmp_path / f"{rule}.gguf", small_model("llama", tied=True), tokenizer=named)
        assert (load_tokenizer(plain(str(file)))(" return")["input_ids"] == [word]) == alone


@pytest.mark.parametrize(
    "keys, rule, begins, ends",
    [
        ({"ggml.add_bos_token": True}, "gpt-2", True, False),
        ({"ggml.add_bos_token": False, "ggml.add_eos_token": True}, "llama-bpe", False, True),
        ({}, "gpt-2", False, False),
        ({}, "llama-bpe", True, False),  # llama.cpp's default for this rule
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, keys, rule, begins, ends):
    words = tiny_tokenizer() | {"ggml.pre": rule, "ggml.bos_token_id": 3}
    del words["ggml.add_bos_token"]
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), tokenizer=words | keys)
    tokenizer = load_tokenizer(plain(str(file)))
    ids = tokenizer(TEXT)["input_ids"]
    bare = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == [3] * begins + bare + [0] * ends


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_sentencepiece_tokenizer_merges_by_score_and_falls_back_to_bytes(tmp_path, prefixed):
    """Merges follow from scores, bytes stand in for what has no token, and the first word has a space where the file says so."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abehlot", "▁h", "ll", "he", "▁he", "llo"]
    tokens += ["▁hello", "<|turn|>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260), 4]
    words = {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "ggml.token_type": types,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_space_prefix": prefixed,
        "chat_template": "{{ messages[0]['content'] }}<|turn|>",
    }
    model = small_model("llama", tied=True, vocab=len(tokens))
    folder = plain(str(write_gguf(tmp_path / "model.gguf", model, tokenizer=words)))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello<|turn|>"
    first = tokens.index("▁hello") if prefixed else None
    ids = tokenizer("hello hello<|turn|>")["input_ids"]
    assert ids[0] == 1 and tokens.index("▁hello") in ids and ids[-1] == tokens.index("<|turn|>")
    assert (ids[1] == first) == prefixed
    for text in ("hello hello", "the boat é"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_manifest_names_the_types_of_tensors_and_stays_the_cache_it_was(tmp_path):
    model = small_model("qwen3", tied=True)
    recipe = lambda path: cli.compose("data_prep", DataPrepRecipe, [f"target.path={path}", f"cache.dir={tmp_path / 'cache'}"])
    found = {}
    for name, kinds in (("mixed", MIXED), ("whole", None)):
        file = write_gguf(tmp_path / f"{name}.gguf", model, kinds)
        found[name] = plan(recipe(file), {})
    assert found["mixed"].target["quantisation"]["method"] == "gguf"
    assert found["mixed"].target["quantisation"]["tensors"].keys() >= {"Q8_0", "Q4_1", "F16", "F32"}
    assert found["whole"].target["quantisation"]["tensors"].keys() == {"F32"}
    before = found["mixed"].model_copy(update={"target": found["mixed"].target | {"quantisation": None}})
    del before.target["quantisation"]  # as caches were captured before
    assert before.hash() == found["mixed"].hash() and before.differs(found["mixed"]) == []


def test_end_tokens_are_those_that_the_file_names(tmp_path):
    words = tiny_tokenizer() | {"ggml.eot_token_id": 4}
    file = write_gguf(tmp_path / "model.gguf", small_model("qwen3", tied=True), tokenizer=words)
    assert Target(str(file)).end_tokens == {0, 4}
    one = write_gguf(tmp_path / "one.gguf", small_model("qwen3", tied=True))
    assert Target(str(one)).end_tokens == {0}


def test_the_dequantised_folder_is_made_once_and_again_after_a_change(tmp_path, home, capsys):
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True))
    folder = Path(plain(str(file)))
    assert folder.parent == home / "understudy/gguf" and f"is dequantised, once, to {folder} (" in capsys.readouterr().out
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert plain(str(file)) == str(folder) and (folder / "model.safetensors").stat().st_mtime_ns == made
    assert capsys.readouterr().out == ""

    whole = (folder / "model.safetensors").read_bytes()
    for damage in (
        lambda: os.truncate(folder / "model.safetensors", len(whole) - 1000),
        lambda: (folder / "tokenizer.json").unlink(),
        lambda: (folder / from_gguf.SEAL).unlink(),
        lambda: (folder / from_gguf.SEAL).write_text("{"),
    ):
        damage()
        assert not is_whole(folder)
        (folder.parent / f"{folder.name}.tmp").mkdir()  # what a killed process leaves
        assert plain(str(file)) == str(folder) and is_whole(folder)
        assert (folder / "model.safetensors").read_bytes() == whole
        assert folders() == [folder]

    size = file.stat().st_size
    write_gguf(file, small_model("llama", tied=True, seed=1))
    assert file.stat().st_size == size
    other = Path(plain(str(file)))
    assert other != folder and (other / "model.safetensors").read_bytes() != whole


def test_concurrent_processes_share_one_dequantised_folder(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), MIXED)
    program = f"from data_prep.target.from_gguf import plain; print('folder', plain({str(file)!r}))"
    asking = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=300)[0] for process in asking]
    assert all(process.returncode == 0 for process in asking)
    assert sum("is dequantised" in one for one in said) == 1
    assert len({one.split("folder ")[1] for one in said}) == 1 and len(folders()) == 1 and is_whole(folders()[0])


def refused(file: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        plain(str(file))
    assert "\n" not in str(error.value) and folders() == []


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), MIXED)
    whole = file.read_bytes()
    header = whole.index(b"token_embd.weight")
    tensors = (header - 1, header + 5, header + 500, len(whole) // 2, len(whole) - 64)
    for length in (0, 3, 4, 20, 24, 100, 1000, header // 2, *tensors):
        file.write_bytes(whole[:length])
        refused(file, "is no whole GGUF file: it is cut or damaged")
    write_gguf(file, small_model("llama", tied=True), endianess=GGUFEndian.BIG)
    refused(file, "of the other byte order")
    file.write_bytes(b"not a GGUF file, but long enough to look like one" * 100)
    refused(file, "is no whole GGUF file")


@pytest.mark.parametrize(
    "words, match",
    [
        ({"architecture": "gemma2"}, "holds a 'gemma2'; Understudy reads GGUF files of llama, qwen2, qwen3"),
        ({"leave_out": ("tokenizer.ggml.tokens",)}, "carries no tokenizer"),
        ({"leave_out": ("tokenizer.ggml.model",)}, "carries no tokenizer"),
        ({"leave_out": ("tokenizer.ggml.merges",)}, "half a tokenizer: it lacks tokenizer.ggml.merges"),
        ({"keys": {"tokenizer.ggml.pre": "olmo"}}, "cuts text by the rule 'olmo'; those that are known: gpt-2, smollm"),
        ({"keys": {"tokenizer.ggml.model": "bert"}}, "a tokenizer of kind 'bert' is not supported"),
        ({"leave_out": ("llama.block_count",)}, "lacks block_count"),
        ({"leave_out": ("token_embd.weight",)}, "lacks token_embd.weight"),
        ({"leave_out": ("blk.1.attn_v.weight",)}, "lacks the tensor blk.1.attn_v.weight"),
        ({"keys": {"llama.feed_forward_length": 128}}, "ffn_gate.weight is .96, 64.; by the sizes that the file states"),
        ({"keys": {"llama.attention.head_count_kv": [2, 1]}}, r"llama.attention.head_count_kv=\[2, 1\] is not supported"),
        ({"keys": {"llama.attention.head_count": 5}}, "no llama has its sizes .*64.*5"),
        ({"keys": {"llama.attention.head_count": 0}}, "no llama has its sizes"),
        ({"keys": {"llama.context_length": "long"}}, "no llama has its sizes .*max_position_embeddings"),
        ({"keys": {"llama.attention.sliding_window": 64}}, "llama.attention.sliding_window=64 is not supported"),
        ({"keys": {"llama.logit_scale": 0.5}}, "llama.logit_scale=0.5 is not supported"),
        ({"keys": {"llama.rope.dimension_count": 16}}, "llama.rope.dimension_count=16 beside a head size of 32"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(128, np.float32)}}, "no place for the tensor blk.0.attn_q.bias"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_with_the_reason(tmp_path, words, match):
    refused(write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), **words), match)


def test_keys_that_change_nothing_are_accepted(tmp_path):
    keys = {"llama.expert_count": 0, "llama.rope.scaling.finetuned": False, "llama.rope.scaling.type": "none"}
    plain(str(write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), keys=keys)))


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    refused(write_gguf(tmp_path / "model.gguf", small_model("llama", True, vocab=8000)), "8192 tokens, the embedding 8000 rows")


def test_a_path_without_a_gguf_file_is_refused_with_the_files_that_exist(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    refused(tmp_path / "c.gguf", "there is no such file; that folder has a.gguf, b.gguf")
    refused(tmp_path / "nowhere/c.gguf", "there is no such file")
    refused(Path("nobody/nothing/c.gguf"), "no file here, and none of the hub")
    refused(tmp_path / "big-00001-of-00003.gguf", "in several parts is not read")
    with pytest.raises(UserError, match="there is no config.json; to use a GGUF file say target.gguf=NAME: a.gguf, b.gguf"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="is a GGUF file already: leave out target.gguf"):
        cli.compose("data_prep", DataPrepRecipe, ["target.path=a.gguf", "target.gguf=b.gguf"])
    with pytest.raises(UserError, match="target.gguf: String should match"):
        cli.compose("data_prep", DataPrepRecipe, ["target.gguf=b.bin"])


def test_without_the_gguf_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True))
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    refused(file, "needs the package gguf: pip install gguf")


def test_a_folder_dequantised_before_is_loaded_without_the_gguf_package(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True))
    folder = plain(str(file))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert plain(str(file)) == folder and load_tokenizer(str(file)).eos_token == "<|endoftext|>"


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace (unshare -rm)",
)
def test_dequantising_to_a_full_disk_ends_with_one_line_and_leaves_nothing(tmp_path):
    """Real file systems: one too small by the estimate, one too small for what is written (files of another process), and
    one that is read-only. Each ends with one line, and nothing half-written stays."""
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), MIXED)
    filling = f"""
        import os, shutil
        from data_prep.target import from_gguf
        from common.errors import UserError
        write = from_gguf.stream_safetensors
        def full(*words, **more):
            with open(os.environ["HF_HOME"] + "/other", "wb") as other:
                while True:
                    try:
                        os.write(other.fileno(), bytes(1 << 20))
                    except OSError:
                        break
            return write(*words, **more)
        if os.environ.get("FILL"):
            from_gguf.stream_safetensors = full
        try:
            from_gguf.plain({str(file)!r})
        except UserError as error:
            print("refused:", error)
    """
    (tmp_path / "ask.py").write_text(textwrap.dedent(filling))
    script = f"""
        cd {ROOT}; export PYTHONPATH={ROOT}; mkdir {tmp_path}/a {tmp_path}/b {tmp_path}/c
        mount -t tmpfs -o size=20m tmpfs {tmp_path}/a && HF_HOME={tmp_path}/a {sys.executable} {tmp_path}/ask.py
        mount -t tmpfs -o size=100m tmpfs {tmp_path}/b && FILL=1 HF_HOME={tmp_path}/b {sys.executable} {tmp_path}/ask.py
        mount -t tmpfs -o ro tmpfs {tmp_path}/c && HF_HOME={tmp_path}/c {sys.executable} {tmp_path}/ask.py
        find {tmp_path}/a {tmp_path}/b {tmp_path}/c -mindepth 3
    """
    done = subprocess.run(["unshare", "-rm", "bash", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    said = done.stdout.splitlines()
    small, filled, readonly = [line for line in said if line.startswith("refused: ")]
    left = [line for line in said if line.startswith("/")]
    assert "GB are free; HF_HOME=FOLDER chooses another place" in small, done.stdout + done.stderr
    assert "No space left on device" in filled
    assert "Read-only file system" in readonly
    assert all(path.endswith(".lock") or path.endswith("/gguf") for path in left), left


def test_the_commands_take_a_gguf_file(tmp_path, home):
    """Captured by a folder and a name, verified by what the manifest says, trained by the file itself."""
    file = write_gguf(tmp_path / "model.gguf", small_model("llama", tied=True), MIXED)
    environment = {"HF_HOME": str(home)}
    cache, run = tmp_path / "cache", tmp_path / "run"
    words = [f"target.path={tmp_path}", "target.gguf=model.gguf", "target.mask_token_id=null", f"cache.dir={cache}"]
    data = ["data.max_tokens=3000", "data.max_length=128"]
    done = command(ROOT / "data_prep/main.py", *words, *data, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "model.gguf is dequantised, once, to" in done.stdout, done.stderr
    assert json.loads((cache / "manifest.json").read_text())["target"]["id"] == str(file)
    done = command(ROOT / "data_prep/main.py", "mode=verify", f"cache.dir={cache}", cwd=tmp_path, env=environment)
    assert done.returncode == 0 and f"captured from {file} as it is now" in done.stdout, done.stdout + done.stderr
    own = [f"target.path={file}", "target.mask_token_id=null", f"cache.dir={cache}", f"run.dir={run}", "train.max_steps=2"]
    own += ["reuse=hidden", "drafter.vocabulary=null", "drafter.own_head=false", "train.validation_documents=2"]
    small = [word for word in SMALL if not word.startswith("train.validation_documents")]
    done = command(ROOT / "train/main.py", *own, *small, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "is dequantised" not in done.stdout, done.stdout + done.stderr
    assert json.loads((run / "checkpoints/best/config.json").read_text())["target"]["id"] == str(file)

    file.write_bytes(file.read_bytes()[:-100])
    done = command(ROOT / "data_prep/main.py", *words, *data, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "it is cut or damaged" in done.stderr


def test_a_target_that_is_not_downloaded_yet_says_how_to_fetch_it(tmp_path):
    absent = "target.path=data_prep/targets/smollm2/absent.gguf"  # the real one may be here
    recipe = cli.compose("data_prep", DataPrepRecipe, ["target=smollm2", absent])
    with pytest.raises(UserError, match="absent.gguf is not there; .*: bash launchers/smollm2.sh"):
        load_tokenizer(recipe.target.location)
    assert (ROOT / recipe.target.fetch.split()[1]).exists()
    done = command(ROOT / "data_prep/main.py", "target=smollm2", absent, "cache.dir=cache", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "bash launchers/smollm2.sh" in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The real file; fetched again it is left as it is."""
    file = fetch_smollm2()
    environment = {**os.environ, "PYTHON": sys.executable}
    again = subprocess.run(["bash", str(ROOT / "launchers/smollm2.sh")], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "it is there already" in again.stdout
    return file


@pytest.mark.slow
def test_smollm2_answers_a_question_from_its_gguf_file(smollm2):
    target = Target(str(smollm2))
    tokenizer = load_tokenizer(str(smollm2))
    assert differing(smollm2, torch.bfloat16) == []
    talk = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], tokenize=False)
    assert talk.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n")
    ids = tokenizer(talk + "<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    out = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    text = "Photosynthesis is the process by which plants convert light energy into chemical energy, stored in glucose."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text and target.model(ids, labels=ids).loss.exp() < 15
    same = target.frozen_head.embedding_VE[[5, 7, *range(8, 17)]]
    assert torch.nn.functional.cosine_similarity(same, same[-1:]).min() > 0.9999  # why its mask token is 16


@pytest.mark.slow
def test_the_three_commands_on_smollm2(smollm2, tmp_path, home):
    environment = {"HF_HOME": str(home)}
    words = ["target=smollm2", f"cache.dir={tmp_path / 'cache'}"]
    steps = [
        ("data_prep", ["data.max_tokens=3000", "data.max_length=256"]),
        (
            "train",
            [
                f"run.dir={tmp_path / 'run'}",
                "objective=blockwise",
                "reuse=hybrid",
                "train.max_steps=3",
                "train.batch=1",
                "drafter.vocabulary=null",
                "drafter.own_head=false",
                *(word for word in SMALL if not word.startswith("train.validation_documents")),
                "train.validation_documents=2",
            ],
        ),
        (
            "eval",
            [
                f"drafter={tmp_path / 'run/checkpoints/best'}",
                f"out={tmp_path / 'report'}",
                "suite.count=2",
                "suite.prompt_tokens=32",
                "suite.new_tokens=8",
                "temperatures=[0]",
                "controls=false",
            ],
        ),
    ]
    for entry, more in steps:
        done = command(ROOT / entry / "main.py", *words, *more, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["target"]["path"] == "data_prep/targets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
