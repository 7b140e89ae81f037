"""How text is cut into words before byte-pair merges, by the names that GGUF files use.

The expressions are those of the models' own tokenizer.json; the names those of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDINGS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDINGS}"
    )


def _cased(contractions: str, digits: str) -> str:
    """Words end where small letters are followed by capitals."""
    capitals, small = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    head = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{head}{capitals}*{small}+{contractions}|{head}{capitals}+{small}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDINGS}"
    )


_LLAMA3 = (_words(r"\p{N}{1,3}"),)
_QWEN2 = (_words(r"\p{N}"),)
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDINGS}",
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDINGS}",
)
_GPT4O = (_cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}"),)
_TEKKEN = (_cased("", r"\p{N}"),)


@dataclass(frozen=True)
class PreTokenizer:
    """``patterns`` cut one after another; then GPT-2's own expression does where ``gpt2`` is set.

    ``whole_first``: a word that is a token is taken before any merge is tried.
    """

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    whole_first: bool = False
    bos: bool = False


_GPT2 = PreTokenizer(gpt2=True)
_DIGITS = PreTokenizer((r"\p{N}",), gpt2=True)
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3"), PreTokenizer(_LLAMA3, whole_first=True, bos=True)
    ),
    **dict.fromkeys(("chatglm-bpe", "glm4"), PreTokenizer(_LLAMA3)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), PreTokenizer(_QWEN2)),
    "qwen35": PreTokenizer(_QWEN35),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), PreTokenizer(_DEEPSEEK3)),
    **dict.fromkeys(("gpt-4o", "llama4"), PreTokenizer(_GPT4O)),
    "tekken": PreTokenizer(_TEKKEN, whole_first=True, bos=True),
}
