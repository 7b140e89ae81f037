"""Text to token ids and back, by the model's own tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as NativeTokenizer
from tokenizers.pre_tokenizers import ByteLevel

from flashmoe.errors import BundleError, PromptError

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """A model's tokenizer and the ids that end its answers.

    Immutable once opened, so safe to share between threads; each stream of tokens needs its own decoder().
    """

    def __init__(
        self, native: NativeTokenizer, stop_ids: frozenset[int], special_tokens: Mapping[str, str]
    ) -> None:
        self._native = native
        self.stop_ids = stop_ids
        self.special_tokens = special_tokens

    @classmethod
    def open(cls, path: Path | str) -> TextTokenizer:
        """Read tokenizer.json and the end-of-text ids from the directory ``path``.

        The ids are the union of those in config.json, generation_config.json and tokenizer_config.json: a
        real checkpoint names <|endoftext|> in the first, <|im_end|> in the last, and means both.
        Raises BundleError (one line) when a file is missing or damaged.
        """
        folder = Path(path)
        native = _load(folder / "tokenizer.json")
        settings = read_json(folder / "tokenizer_config.json")
        special = _special_tokens(settings)
        stop_ids = _config_stop_ids(folder)
        if "eos_token" in special:
            token_id = native.token_to_id(special["eos_token"])
            if token_id is not None:
                stop_ids.add(token_id)
        return cls(native, frozenset(stop_ids), special)

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer can produce; the model's own vocabulary may be padded further."""
        return self._native.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        Special tokens written out in the text become their ids.  add_special_tokens adds what the model's own
        post-processor puts around a plain text (often nothing); a rendered chat already has it.
        Raises PromptError when the text holds half of a surrogate pair, as undecodable bytes of a command line do.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt is no valid text (character {error.start} is {text[error.start]!a}): give it in UTF-8"
            ) from error
        return list(self._native.encode(text, add_special_tokens=add_special_tokens).ids)

    def bos_id(self, wanted: str = "auto") -> int | None:
        """The token before a text: "auto" as the model's own post-processor does, "on" the named one, "off" none.

        Raises BundleError when "on" finds no bos_token in tokenizer_config.json.
        """
        if wanted == "off":
            return None
        token = self.special_tokens.get("bos_token")
        named = None if token is None else self.token_id(token)
        if wanted == "on" and named is None:
            raise BundleError("tokenizer_config.json names no bos_token: leave BOS off")
        if wanted == "on":
            return named
        first = self.encode("a")[:1]
        return first[0] if first != self.encode("a", add_special_tokens=False)[:1] else None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._native.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of exactly this token, or None."""
        return self._native.token_to_id(token)

    @property
    def added_tokens(self) -> dict[str, int]:
        """Texts that are always one token, special or not, like <tool_call>."""
        added = self._native.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items()}

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that steer the model and are no text, like <|im_end|>."""
        added = self._native.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def token_bytes(self, count: int) -> list[bytes]:
        """The bytes of ids 0 .. count - 1, such that those of a text's ids make up the text; b"" for unused ids.

        A token may be part of a character.  Known are byte-level tokenizers and SentencePiece's with byte fallback.
        """
        added = {
            token_id: token.content for token_id, token in self._native.get_added_tokens_decoder().items()
        }
        to_bytes = _byte_level_spelling() if "ByteLevel" in repr(self._native.decoder) else _piece_bytes
        tokens = []
        for token_id in range(count):
            token = self._native.id_to_token(token_id)
            tokens.append(
                b"" if token is None else added[token_id].encode() if token_id in added else to_bytes(token)
            )
        return tokens

    def decoder(self, skip_special_tokens: bool = True) -> TextDecoder:
        """A decoder for one stream of tokens."""
        return TextDecoder(self, skip_special_tokens)


class TextDecoder:
    """Turns a stream of ids into text, never emitting half a character.  Not thread-safe.

    The last emitted ids stay as context, because a decoder may treat the first token of a text differently
    (SentencePiece drops its leading space).  The cost of a step is that of decoding a handful of ids.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes nothing yet."""
        self._pending.append(token_id)
        text = self._fresh_text()
        # Byte tokens of an unfinished character decode to one U+FFFD or to several: wait for the rest.
        return "" if text.endswith(_INCOMPLETE) else self._emit(text)

    def flush(self) -> str:
        """What is still held back at the end of the stream; broken bytes as U+FFFD."""
        return self._emit(self._fresh_text())

    def _fresh_text(self) -> str:
        known = self._tokenizer.decode(self._context, self._skip)
        return self._tokenizer.decode(self._context + self._pending, self._skip)[len(known) :]

    def _emit(self, text: str) -> str:
        if text:
            self._context = self._pending
        self._pending = []
        return text


def _byte_level_spelling() -> Callable[[str], bytes]:
    """Byte-level tokenizers write printable bytes as themselves and the others, in order, as U+0100 and up."""
    letters = set(ByteLevel.alphabet())
    plain = {letter: ord(letter) for letter in letters if ord(letter) < 0x100}
    others = sorted(set(range(0x100)) - set(plain.values()))
    byte_of = plain | dict(zip(sorted(letters - set(plain)), others, strict=True))
    return lambda token: bytes(byte_of[letter] for letter in token if letter in byte_of)


def _piece_bytes(token: str) -> bytes:
    """SentencePiece writes a space as U+2581 and a byte without a token of its own as <0x0A>."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is no such file; raises BundleError when it is damaged."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read ({error}): copy it from the source model again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{file} is no JSON object: copy it from the source model again")
    return value


def token_text(value: object) -> str | None:
    """A token as tokenizer_config.json writes it: plain, or an object with its ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _load(file: Path) -> NativeTokenizer:
    if not file.is_file():
        raise BundleError(f"{file} is missing: copy it from the source model")
    try:
        return NativeTokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        reason = " ".join(str(error).split())
        raise BundleError(f"{file} is damaged ({reason}): copy it from the source model again") from error


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as chat templates know them."""
    named = {name: token_text(value) for name, value in settings.items() if name.endswith("_token")}
    return {name: text for name, text in named.items() if text is not None}


def _config_stop_ids(folder: Path) -> set[int]:
    config = read_json(folder / "config.json")
    stop_ids: set[int] = set()
    for source in (config, config.get("text_config"), read_json(folder / "generation_config.json")):
        if isinstance(source, dict):
            stop_ids |= _as_ids(source.get("eos_token_id"), folder)
    return stop_ids


def _as_ids(value: object, folder: Path) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise BundleError(
            f"{folder}: eos_token_id {value!r} is neither a number nor a list of them: correct it"
        )
    return set(ids)
