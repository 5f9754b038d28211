"""The tokenizer that a GGUF file describes, under llama.cpp's names of its keys.

A file of a byte-level tokenizer holds words and merges, and of the rule that cuts text before merges only a name. The rules
themselves are in llama.cpp's sources, and those that are known stand below.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.errors import UserError, first_line
from data_prep.target.gguf_contents import key_value

# Of tokenizer.ggml.token_type.
CONTROL = 3
USER_DEFINED = 4

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = WORDS.format(digits=r"\p{N}{1,3}")
QWEN2 = WORDS.format(digits=r"\p{N}")
# tokenizer.ggml.pre: how text is cut before merges. GPT-2's own rule is the byte level's.
SPLITS = {
    "gpt-2": None,
    "smollm": None,  # behind a cut around every digit
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "llama-bpe": LLAMA3,
    "tekken": TEKKEN,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")  # a word of the vocabulary is not merged; BOS unless told otherwise


def tokenizer_of(reader, file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the file's keys describe, with its chat template.

    Raises:
        UserError: the file carries none, or one of another kind.
    """
    kind = key_value(reader, "tokenizer.ggml.model")
    tokens = key_value(reader, "tokenizer.ggml.tokens")
    if not kind or not tokens:
        raise UserError(f"{file} carries no tokenizer (tokenizer.ggml.model and .tokens); a target needs its own")
    types = key_value(reader, "tokenizer.ggml.token_type") or []
    if kind == "llama":  # SentencePiece
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        if not key_value(reader, "tokenizer.ggml.add_space_prefix", True):  # which transformers does not read
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
            unspaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            tokenizer.backend_tokenizer.decoder = decoders.Sequence(unspaced)
    elif kind == "gpt2":
        try:
            tokenizer = _byte_level(reader, tokens, types, file)
        except UserError:
            raise
        except Exception as error:  # the library below raises plain exceptions
            raise UserError(f"{file}: the tokenizer cannot be rebuilt ({first_line(error)})") from error
    else:
        raise UserError(f"{file}: a tokenizer of kind '{kind}' is not supported; those that are: gpt2, llama")
    marked = [i for i, what in enumerate(types) if what in (CONTROL, USER_DEFINED)]
    if wrong := [tokens[i] for i in marked if tokenizer.convert_tokens_to_ids(tokens[i]) != i]:
        raise UserError(f"{file}: the tokenizer cannot be rebuilt; it would lose {wrong[0]!r}")
    return tokenizer


def _byte_level(reader, tokens: list[str], types: list[int], file: Path) -> PreTrainedTokenizerBase:
    rule = key_value(reader, "tokenizer.ggml.pre")
    if rule not in SPLITS:
        raise UserError(f"{file}: the tokenizer cuts text by the rule '{rule}'; those that are known: {', '.join(SPLITS)}")
    merges = key_value(reader, "tokenizer.ggml.merges")
    if merges is None:
        raise UserError(f"{file} carries half a tokenizer: it lacks tokenizer.ggml.merges")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{file}: the tokenizer has two tokens of one spelling")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=rule in WHOLE_WORDS))
    if SPLITS[rule] == QWEN2:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Digits(individual_digits=True)] if rule == "smollm" else []
    if split := SPLITS[rule]:
        cuts.append(pre_tokenizers.Split(Regex(split), "isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t, what in zip(tokens, types) if what == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, what in zip(tokens, types) if what == USER_DEFINED])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: key_value(reader, f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in named.items()}
    around = {
        "bos": key_value(reader, "tokenizer.ggml.add_bos_token", rule in WHOLE_WORDS),
        "eos": key_value(reader, "tokenizer.ggml.add_eos_token", False),
    }
    added = {which: (tokens[ids[which]], ids[which]) for which, wanted in around.items() if wanted and ids[which] is not None}
    template = [added[w][0] for w in ("bos",) if w in added] + ["$A"] + [added[w][0] for w in ("eos",) if w in added]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(added.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=key_value(reader, "tokenizer.chat_template"),
        **{f"{which}_token": None if i is None else tokens[i] for which, i in ids.items()},
    )
