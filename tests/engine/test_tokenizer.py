"""Tokenizer: streams show whole characters, stop ids are the union, bad files are one-line errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from flashmoe.engine.tokenizer import TextTokenizer
from flashmoe.errors import BundleError

WriteJson = Callable[[str, object], Path]
END, IM_END = 256, 257


def stream(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [decoder.push(token_id) for token_id in ids] + [decoder.flush()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_streamed_text_is_the_whole_text_in_whole_characters(tokenizer_dir: Path, text: str) -> None:
    tokenizer = TextTokenizer.open(tokenizer_dir)
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_four_byte_character_comes_with_its_last_byte(tokenizer_dir: Path) -> None:
    tokenizer = TextTokenizer.open(tokenizer_dir)
    assert stream(tokenizer, tokenizer.encode("a😀b")) == ["a", "", "", "", "😀", "b", ""]


def test_a_broken_character_at_the_end_is_replaced_by_flush(tokenizer_dir: Path) -> None:
    tokenizer = TextTokenizer.open(tokenizer_dir)
    assert stream(tokenizer, tokenizer.encode("x😀")[:-1]) == ["x", "", "", "", "\ufffd"]


def test_bytes_that_never_become_a_character_do_not_swallow_what_follows(tokenizer_dir: Path) -> None:
    tokenizer = TextTokenizer.open(tokenizer_dir)
    lone = tokenizer.encode("é")[1:]
    assert "".join(stream(tokenizer, [*lone, *tokenizer.encode("ok")])) == "\ufffdok"


def test_special_tokens_are_encoded_as_such_and_skipped_in_text(tokenizer_dir: Path) -> None:
    tokenizer = TextTokenizer.open(tokenizer_dir)
    ids = tokenizer.encode("a<|im_end|>b")
    assert ids[1] == IM_END
    assert "".join(stream(tokenizer, ids)) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"
    assert tokenizer.vocab_size == 258
    assert tokenizer.token_id("<|im_end|>") == IM_END


def test_sentencepiece_spaces_and_byte_fallback(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    native = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    native.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    native.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer.open(tmp_path)
    smile = [4 + byte for byte in "é😀".encode()]
    pieces = stream(tokenizer, [1, 2, *smile, 3])
    assert pieces == ["Hello", " world", "", "é", "", "", "", "😀", "!", ""]


def test_stop_ids_are_the_union_of_three_files(tokenizer_dir: Path, write_json: WriteJson) -> None:
    write_json("config.json", {"eos_token_id": 7, "text_config": {"eos_token_id": END}})
    write_json("generation_config.json", {"eos_token_id": [3, END]})
    write_json("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}, "bos_token": None})
    tokenizer = TextTokenizer.open(tokenizer_dir)
    assert tokenizer.stop_ids == {3, 7, END, IM_END}
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}


def test_no_config_means_no_stop_ids(tokenizer_dir: Path) -> None:
    assert TextTokenizer.open(tokenizer_dir).stop_ids == frozenset()


def test_a_missing_tokenizer_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing: copy it"):
        TextTokenizer.open(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Alien"}}', "\x00\xff"])
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged") as caught:
        TextTokenizer.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[1]", "{", '"x"'])
def test_a_broken_config_names_its_file(tokenizer_dir: Path, name: str, content: str) -> None:
    (tokenizer_dir / name).write_text(content)
    with pytest.raises(BundleError, match=name):
        TextTokenizer.open(tokenizer_dir)


@pytest.mark.parametrize("value", ["2", [1, "x"], True, 1.5])
def test_a_stop_id_that_is_no_number_is_refused(
    tokenizer_dir: Path, write_json: WriteJson, value: object
) -> None:
    write_json("generation_config.json", {"eos_token_id": value})
    with pytest.raises(BundleError, match="eos_token_id"):
        TextTokenizer.open(tokenizer_dir)
