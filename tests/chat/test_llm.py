"""The public LLM over a scripted engine: text, stop strings, defaults, options."""

from __future__ import annotations

from typing import Any

import pytest

from flashmoe.chat.llm import LLM, Chunk, generation_defaults
from flashmoe.errors import BundleError, ConfigError

END = 256


def say(llm: LLM, engine: Any, text: str, *, then: list[int] | None = None) -> None:
    engine.answer = [*llm.tokenizer.encode(text), *(then or [])]


def test_a_stream_ends_with_a_chunk_that_has_the_reason(llm: LLM, engine: Any) -> None:
    say(llm, engine, "aé")
    first, second = llm.tokenizer.encode("é")
    chunks = list(llm.stream("x"))
    assert chunks[1:] == [Chunk("", first), Chunk("é", second), Chunk("", None, "length")]


def test_a_stop_token_ends_the_answer(llm: LLM, engine: Any, write_json: Any) -> None:
    write_json("config.json", {"eos_token_id": END})
    stopping = LLM(engine.bundle.path)
    say(stopping, engine, "hello", then=[END, 65])
    completion = stopping.generate("x")
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == ("hello", "stop", 5)


def test_a_stop_string_ends_the_answer_and_is_not_shown(llm: LLM, engine: Any) -> None:
    say(llm, engine, "one. two. three")
    completion = llm.generate("x", llm.sampling_params(stop=("two",)))
    assert (completion.text, completion.finish_reason) == ("one. ", "stop")
    assert len(completion.token_ids) == len("one. two")


def test_text_held_back_for_a_stop_string_comes_at_the_end(llm: LLM, engine: Any) -> None:
    say(llm, engine, "one tw")
    assert llm.generate("x", llm.sampling_params(stop=("two",))).text == "one tw"


def test_half_a_character_at_the_end_is_replaced(llm: LLM, engine: Any) -> None:
    engine.answer = llm.tokenizer.encode("a😀")[:-1]
    assert llm.generate("x").text == "a\ufffd"


def test_prompts_may_be_text_or_ids(llm: LLM, engine: Any) -> None:
    llm.generate("ab")
    assert engine.prompt == llm.tokenizer.encode("ab")
    llm.generate((1, 2, 3))
    assert engine.prompt == [1, 2, 3]


def test_chat_uses_the_models_template(llm: LLM, engine: Any, write_json: Any) -> None:
    write_json("tokenizer_config.json", {"chat_template": "<|im_end|>{{ messages[0].content }}{{ mood }}"})
    say(llm, engine, "yes")
    assert llm.chat([{"role": "user", "content": "Hi"}], mood="!").text == "yes"
    assert llm.tokenizer.decode(engine.prompt, skip_special_tokens=False) == "<|im_end|>Hi!"


def test_chat_without_a_template_names_the_remedy(llm: LLM) -> None:
    with pytest.raises(BundleError, match="--raw"):
        llm.chat([{"role": "user", "content": "Hi"}])


def test_sampling_defaults_come_from_the_model_and_give_way(llm: LLM, engine: Any) -> None:
    llm.generate("x")
    assert (engine.params.temperature, engine.params.top_k) == (0.6, 20)
    params = llm.sampling_params(temperature=0.0, top_k=None, max_tokens=3)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 20, 3)


def test_do_sample_false_is_greedy() -> None:
    assert generation_defaults({"do_sample": False, "temperature": 0.7})["temperature"] == 0.0
    assert generation_defaults({"temperature": 0.7, "top_p": None, "eos_token_id": 1}) == {"temperature": 0.7}


@pytest.mark.parametrize("value", ["hot", True, [1]])
def test_a_default_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: temperature"):
        generation_defaults({"temperature": value})


def test_options_reach_the_engine(engine: Any) -> None:
    LLM(engine.bundle.path, memory="2GiB", context=64, threads=1, activations="f32", io="direct")
    options = engine.options
    assert not options.verify_reads
    assert (options.memory_bytes, options.context, options.threads) == (2 << 30, 64, 1)
    assert (options.activations, options.io, options.expert_slots) == ("f32", "direct", None)
    LLM(engine.bundle.path, verify_reads=True)
    assert engine.options.verify_reads


@pytest.mark.parametrize(("wanted", "slots"), [("25%", 4), ("1%", 1), ("100%", 16), ("7", 7), (5, 5)])
def test_expert_slots_are_a_number_or_a_share(engine: Any, wanted: int | str, slots: int) -> None:
    LLM(engine.bundle.path, expert_slots=wanted)
    assert engine.options.expert_slots == slots


@pytest.mark.parametrize("wanted", ["", "x", "0%", "-1", "25%%"])
def test_expert_slots_that_cannot_be_read(engine: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match="25%"):
        LLM(engine.bundle.path, expert_slots=wanted)


@pytest.mark.parametrize(("given", "lossy"), [(None, False), ("f16", False), ("f32", False), ("int8", True)])
def test_an_int8_cache_is_lossy(engine: Any, given: str | None, lossy: bool) -> None:
    assert LLM(engine.bundle.path, kv_cache=given).lossy is lossy
    assert engine.options.kv_cache == given


@pytest.mark.parametrize(("given", "lossy"), [(None, False), (4, False), (2, True), (6, True)])
def test_another_number_of_experts_is_lossy(engine: Any, given: int | None, lossy: bool) -> None:
    assert LLM(engine.bundle.path, experts_per_token=given).lossy is lossy


def test_closing(engine: Any) -> None:
    with LLM(engine.bundle.path) as llm:
        assert llm.stats()["hit_rate"] == 0.75
    assert engine.closed
