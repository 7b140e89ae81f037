"""tokenizer.json, tokenizer_config.json and chat_template.jinja from GGUF metadata.

Byte-level BPE ("gpt2") and SentencePiece's BPE ("llama") vocabularies; others are refused by name.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from flashmoe.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_MAX_TOKEN = 512  # the longest of real vocabularies are 256 spaces
_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"  # SentencePiece's
# Names of special tokens in tokenizer_config.json, and GGUF's keys for them.
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Vocabulary:
    """The tokenizer part of a GGUF file's metadata, its lists checked against each other."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Raises CheckpointError when a list is missing, of a wrong kind or length, or a token appears twice."""
        self.path, self._metadata = path, metadata
        self.model = metadata.get(f"{_PREFIX}model")
        self.tokens = self._texts("tokens")
        self.types = self._numbers("token_type", np.integer)
        if len(set(self.tokens)) != len(self.tokens):
            raise self._damaged("a token appears twice")
        if max(map(len, self.tokens)) > _MAX_TOKEN:
            raise self._damaged(f"a token has more than {_MAX_TOKEN} characters")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key below tokenizer.ggml."""
        return self._metadata.get(f"{_PREFIX}{key}", default)

    def merges(self) -> list[tuple[str, str]]:
        """Pairs in the order of their rank."""
        pairs = [text.partition(" ") for text in self._texts("merges")]
        known = set(self.tokens)
        for left, _, right in pairs:
            if left not in known or right not in known or left + right not in known:
                raise self._damaged(f"the merge of {left!r} and {right!r} is no token")
        return [(left, right) for left, _, right in pairs]

    def scores(self) -> Any:
        """float32, one for each token."""
        return self._numbers("scores", np.floating)

    def id_of(self, name: str) -> int | None:
        """The id of a special token by GGUF's name for it; raises CheckpointError for one that is not there."""
        token_id = self.get(f"{name}_token_id")
        if token_id is None:
            return None
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            raise self._damaged(f"{name}_token_id is {reprlib.repr(token_id)} of {len(self.tokens)} tokens")
        return token_id

    def token_of(self, name: str) -> str | None:
        """The text of a special token by GGUF's name for it."""
        token_id = self.id_of(name)
        return None if token_id is None else self.tokens[token_id]

    def adds(self, which: str, default: bool) -> bool:
        """Whether the tokenizer itself adds BOS or EOS."""
        value = self.get(f"add_{which}_token")
        return value if isinstance(value, bool) else default

    def _texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not value:
            raise self._damaged(f"its {_PREFIX}{key} is no list of texts")
        return value

    def _numbers(self, key: str, kind: type) -> Any:
        value = self.get(key)
        if (
            not isinstance(value, np.ndarray)
            or not np.issubdtype(value.dtype, kind)
            or len(value) != len(self.tokens)
        ):
            raise self._damaged(f"its {_PREFIX}{key} does not fit {len(self.tokens)} tokens")
        return value

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {reason}; download it again")


def tokenizer_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of the tokenizer's files by name.

    Raises CheckpointError for a damaged vocabulary or one of a kind that flashmoe does not read.
    """
    vocabulary = Vocabulary(path, metadata)
    settings = {
        key: text for key, name in _SPECIAL.items() if (text := vocabulary.token_of(name)) is not None
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    files = {"tokenizer.json": _tokenizer(vocabulary).to_str().encode()}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
    ends = [i for name in ("eos", "eot", "eom") if (i := vocabulary.id_of(name)) is not None]
    if len(ends) > 1:
        files["generation_config.json"] = json.dumps({"eos_token_id": sorted(set(ends))}).encode()
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return files


def _tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.model == "gpt2":
        name = vocabulary.get("pre", "gpt-2")
        cut = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if cut is None:
            raise _unread(vocabulary, f"cuts words as {reprlib.repr(name)}")
        tokenizer, bos = _byte_level(vocabulary, cut), vocabulary.adds("bos", cut.bos)
    elif vocabulary.model == "llama":
        tokenizer, bos = _sentence_piece(vocabulary), vocabulary.adds("bos", True)
    else:
        raise _unread(vocabulary, f"has a tokenizer of the kind {reprlib.repr(vocabulary.model)}")
    special, plain = _added_tokens(vocabulary)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    _surround(tokenizer, vocabulary, bos)
    return tokenizer


def _unread(vocabulary: Vocabulary, what: str) -> CheckpointError:
    return CheckpointError(
        f"{vocabulary.path} {what}, which flashmoe does not read: convert the safetensors variant, which has its own"
        " tokenizer.json"
    )


def _byte_level(vocabulary: Vocabulary, cut: PreTokenizer) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, vocabulary.merges(), ignore_merges=cut.whole_first))
    # Cutting of words keeps every piece.
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: Vocabulary) -> Tokenizer:
    """A BPE that joins the neighbours whose union has the best score, which is SentencePiece's rule."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.token_of("unknown")
    tokenizer = Tokenizer(
        models.BPE(ids, _scored_merges(vocabulary, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = vocabulary.get("add_space_prefix", True) is not False
    space = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), space]) if prefix else space
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _scored_merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a token together from two, best score first, then as the vocabulary has their parts."""
    scores = vocabulary.scores()
    merges = [
        (-float(scores[i]), ids[token[:at]], ids[token[at:]])
        for token, i in ids.items()
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in sorted(merges)]


def _added_tokens(vocabulary: Vocabulary) -> tuple[list[AddedToken], list[AddedToken]]:
    """Control tokens, and others that are always one token."""
    from tokenizers import AddedToken

    control, plain = (
        [
            AddedToken(vocabulary.tokens[i], special=special, normalized=False)
            for i in np.flatnonzero(vocabulary.types == kind).tolist()
            if vocabulary.tokens[i]
        ]
        for kind, special in ((_CONTROL, True), (_USER_DEFINED, False))
    )
    return control, plain


def _surround(tokenizer: Tokenizer, vocabulary: Vocabulary, bos: bool) -> None:
    """What stands around every text."""
    from tokenizers import processors

    first = vocabulary.token_of("bos") if bos else None
    last = vocabulary.token_of("eos") if vocabulary.adds("eos", False) else None
    around = [token for token in (first, last) if token is not None]
    if around:
        single = [token for token in (first, "$A", last) if token is not None]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, "$B:1"],
            special_tokens=[(token, vocabulary.tokens.index(token)) for token in around],
        )
