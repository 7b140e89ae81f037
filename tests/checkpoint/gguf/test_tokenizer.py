"""Tokenizers from GGUF metadata: byte-level BPE against the original tokenizer, SentencePiece against its own rule."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from flashmoe.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from flashmoe.checkpoint.gguf.tokenizer import tokenizer_files
from flashmoe.errors import CheckpointError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\n\n\nand lines\r\n\tand tabs ",
    "It's 12345 and 3.14, isn't it? I'LL SAY so!",
    "naïve café, 日本語 Привет שלום 🙂🙃",
    "def f(x):\n    return x**2  # comment\n",
    "<|im_start|>user\nHi<|im_end|>",
    "",
]


def metadata(**values: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def original(demo: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The demo model's tokenizer, a byte-level BPE with Qwen's words, and what a GGUF file would say of it."""
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    spec = json.loads((demo / "tokenizer.json").read_text())
    size = tokenizer.get_vocab_size()
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    types = [3 if added.get(i) else 4 if i in added else 1 for i in range(size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    tokens = [tokenizer.id_to_token(i) for i in range(size)]
    return tokenizer, metadata(
        model="gpt2", pre=pre_of(spec), tokens=tokens, token_type=np.array(types, np.int32), merges=merges
    )


def pre_of(spec: Any) -> str:
    """The name whose expressions the tokenizer.json has."""
    steps = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])
    found = tuple(step["pattern"]["Regex"] for step in steps if step["type"] == "Split")
    return next((name for name, cut in PRE_TOKENIZERS.items() if cut.patterns == found), "gpt-2")


def test_byte_level_bpe_is_the_original(demo_bundle: Path) -> None:
    expected, values = original(demo_bundle)
    files = tokenizer_files(Path("m.gguf"), values)
    found = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in TEXTS:
        ids = expected.encode(text).ids
        assert found.encode(text).ids == ids, text
        assert found.decode(ids, skip_special_tokens=False) == expected.decode(ids, skip_special_tokens=False)


# What each way of cutting makes of this, by the expressions' own words.
SENTENCE = "We've 1234 HelloWorld's\n\n  x"
WORDS = {
    "gpt-2": ["We", "'ve", " 1234", " HelloWorld", "'s", "\n\n ", " x"],
    "smollm": ["We", "'ve", " ", "1", "2", "3", "4", " HelloWorld", "'s", "\n\n ", " x"],
    "llama-bpe": ["We", "'ve", " ", "123", "4", " HelloWorld", "'s", "\n\n", " ", " x"],
    "qwen2": ["We", "'ve", " ", "1", "2", "3", "4", " HelloWorld", "'s", "\n\n", " ", " x"],
    "qwen35": ["We", "'ve", " ", "1", "2", "3", "4", " HelloWorld", "'s", "\n\n", " ", " x"],
    "gpt-4o": ["We've", " ", "123", "4", " Hello", "World's", "\n\n", " ", " x"],
    "tekken": ["We", "'ve", " ", "1", "2", "3", "4", " Hello", "World", "'s", "\n\n", " ", " x"],
    "deepseek-v3": ["We", "'ve", " ", "123", "4", " HelloWorld", "'s", "\n\n", " ", " x"],
}


@pytest.mark.parametrize("name", WORDS)
def test_words(name: str) -> None:
    values = metadata(
        model="gpt2", pre=name, tokens=["a", "b", "ab"], token_type=np.ones(3, np.int32), merges=["a b"]
    )
    tokenizer = Tokenizer.from_str(tokenizer_files(Path("m.gguf"), values)["tokenizer.json"].decode())
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(SENTENCE)]
    assert [SENTENCE[start:end] for start, end in spans] == WORDS[name]


def sentence_piece(**more: Any) -> dict[str, Any]:
    """A vocabulary as SentencePiece makes it: controls, all bytes, characters, pieces with falling scores."""
    pieces = [
        "\u2581t",
        "he",
        "\u2581the",
        "in",
        "er",
        "\u2581c",
        "at",
        "\u2581cat",
        "hen",
        "th",
        "\u2581th",
        "ere",
    ]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(letters) + len(pieces))
    scores = (
        [0.0] * 259 + [-1000.0 - i for i in range(len(letters))] + [-float(i) for i in range(len(pieces))]
    )
    return metadata(
        model="llama",
        tokens=tokens,
        token_type=np.array(types, np.int32),
        scores=np.array(scores, np.float32),
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        **more,
    )


def best_merges(text: str, values: dict[str, Any]) -> list[int]:
    """SentencePiece's rule, the slow way: join neighbours with the best score, leftmost first; bytes for the rest."""
    tokens = values["tokenizer.ggml.tokens"]
    ids, scores = {token: i for i, token in enumerate(tokens)}, values["tokenizer.ggml.scores"]
    symbols = list(text)
    while True:
        pairs = [
            (-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids
        ]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        i
        for s in symbols
        for i in ([ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()])
    ]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_joins_by_score(prefix: bool) -> None:
    values = sentence_piece(**({} if prefix else {"add_space_prefix": False}))
    files = tokenizer_files(Path("m.gguf"), values)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in ("the cat in there.", "then  the hen", "Żółw \n the", "cat"):
        shaped = ("\u2581" if prefix else "") + text.replace(" ", "\u2581")
        ids = tokenizer.encode(text).ids
        assert ids == [1, *best_merges(shaped, values)], text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a</s>").ids[-1] == 2
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == "<s>"


def test_who_adds_bos(demo_bundle: Path) -> None:
    _, values = original(demo_bundle)
    values |= metadata(bos_token_id=3, eos_token_id=2, eot_token_id=5)
    for extra, expected in (({}, []), ({"add_bos_token": True}, [3]), ({"pre": "llama-bpe"}, [3])):
        files = tokenizer_files(Path("m.gguf"), values | metadata(**extra))
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        assert tokenizer.encode("").ids == expected, extra
        assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2, 5]}
    files = tokenizer_files(Path("m.gguf"), sentence_piece(add_bos_token=False, add_eos_token=True))
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("").ids[-1] == 2


BAD: dict[str, dict[str, Any]] = {
    "no tokens": {"tokens": None},
    "tokens that are numbers": {"tokens": np.ones(3)},
    "a token twice": {"tokens": ["a", "a", "b"], "token_type": np.ones(3, np.int32)},
    "an endless token": {"tokens": ["a", "b", "c" * 1000], "token_type": np.ones(3, np.int32)},
    "types too few": {"token_type": np.ones(1, np.int32)},
    "types that are floats": {"token_type": np.ones(3, np.float32)},
    "no merges": {"merges": None},
    "a merge of nothing": {"merges": ["a"]},
    "a merge of strangers": {"merges": ["a x"]},
    "bos outside": {"bos_token_id": 3},
    "bos of text": {"bos_token_id": "a"},
    "unknown words": {"pre": "no-such"},
    "unknown kind": {"model": "bert"},
    "kind of numbers": {"model": 3},
    "scores too few": {"model": "llama", "scores": np.ones(2, np.float32)},
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_vocabularies_are_refused(name: str) -> None:
    good = metadata(
        model="gpt2", pre="gpt-2", tokens=["a", "b", "ab"], token_type=np.ones(3, np.int32), merges=["a b"]
    )
    tokenizer_files(Path("m.gguf"), good)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        tokenizer_files(Path("m.gguf"), good | metadata(**BAD[name]))
