"""The public face of a model: text and conversations in, text out.

The engine speaks token ids; this adds the tokenizer, the model's chat template, its sampling defaults and
stop strings.  What a caller may rely on is LLM, Chunk and Completion.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from flashmoe.bundle.reader import Bundle
from flashmoe.chat.messages import Message
from flashmoe.chat.options import LoadOptions, engine_options
from flashmoe.chat.stopping import StopStrings
from flashmoe.chat.structured import GrammarVocabulary, StructuredOutput, compile_structure
from flashmoe.chat.template import ChatTemplate
from flashmoe.engine.constraint import Constraint
from flashmoe.engine.engine import Engine
from flashmoe.engine.memory import MemoryPlan
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.tokenizer import TextTokenizer
from flashmoe.errors import ConfigError
from flashmoe.models.registry import find_family
from flashmoe.store.stats import CacheStats

_SAMPLING_KEYS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True)
class Chunk:
    """One step of a stream: the text it completes, its token, and why the stream ended (last chunk only).

    The last chunk has no token; it carries what was held back (half a character, the start of a stop string).
    """

    text: str
    token_id: int | None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """A finished answer.  finish_reason is "stop" or "length"; stats are those of LLM.stats()."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: dict[str, Any]


class LLM:
    """A model in memory, its experts streamed from the bundle's drive.

    Not thread-safe: one request at a time.  A context manager; close() frees its memory and threads.
    """

    def __init__(
        self, bundle: str | Path, *, structured: bool = False, **options: Unpack[LoadOptions]
    ) -> None:
        """Load the bundle in a directory; the options are those of LoadOptions.

        structured: build what structured output needs at once, so that the memory plan counts it; otherwise it comes
        with the first such request, and takes 58 MiB beyond the plan with 248,320 tokens.
        Raises BundleError, ConfigError, BudgetError or ReadError, each with one line that names the remedy.
        """
        opened = Bundle.open(Path(bundle), [Path(one) for one in options.get("experts_dirs", ())])
        # Before the engine: it plans its memory around what the process already holds, and the tokenizer of
        # a 248,320-entry vocabulary holds more than 100 MiB.
        self.tokenizer = TextTokenizer.open(opened.path)
        self._vocab_size = int(opened.text_config.get("vocab_size", 0))
        if structured:
            _ = self.grammar_vocabulary
        self._engine = Engine.open(opened.path, engine_options(options, opened))
        self.experts_per_token = options.get("experts_per_token") or self.native_experts_per_token
        self.kv_cache = options.get("kv_cache")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free memory and threads.  Calling it again is harmless."""
        self._engine.close()

    @property
    def bundle(self) -> Bundle:
        """The opened bundle."""
        return self._engine.bundle

    @property
    def engine(self) -> Engine:
        """What runs the model, for a scheduler; not together with stream() and its kin."""
        return self._engine

    def cache_stats(self) -> CacheStats:
        """Counters of the expert cache since the model was loaded.  Thread-safe."""
        return self._engine.cache_stats()

    @property
    def notice(self) -> str:
        """One line about a usage file that could not be used, or after close() not be written; empty if all is well."""
        return self._engine.notice

    @property
    def plan(self) -> MemoryPlan:
        """How the memory budget is split."""
        return self._engine.plan

    @functools.cached_property
    def native_experts_per_token(self) -> int:
        """Routed experts per token and layer that the model was trained with; 0 for a dense model."""
        raw = self.bundle.config
        return find_family(raw).config(raw).num_experts_per_tok

    @property
    def lossy(self) -> bool:
        """True when the output is not the model's own: another number of experts, or an int8 KV cache."""
        return self.experts_per_token != self.native_experts_per_token or self.kv_cache == "int8"

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's own template.  Raises BundleError when the bundle has none."""
        return ChatTemplate.from_dir(self.bundle.path)

    @cached_property
    def generation_defaults(self) -> dict[str, Any]:
        """Sampling values of the model's generation_config.json, by the names of SamplingParams."""
        return generation_defaults(self.bundle.generation_config)

    def sampling_params(self, **given: Any) -> SamplingParams:
        """The model's defaults with the ``given`` values (those not None) over them.

        Raises ConfigError when one is out of its range.
        """
        return SamplingParams(**self.generation_defaults | {k: v for k, v in given.items() if v is not None})

    @cached_property
    def grammar_vocabulary(self) -> GrammarVocabulary:
        """The tokens as structured output sees them; built when first needed.  Raises StructureError."""
        return GrammarVocabulary(self.tokenizer, self._vocab_size)

    def constraint(self, structured: StructuredOutput, params: SamplingParams) -> Constraint:
        """What keeps one answer to a form; raises StructureError when the form cannot be used."""
        return compile_structure(structured, self.grammar_vocabulary, params.stop_token_ids)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        structured: StructuredOutput | None = None,
    ) -> Iterator[Chunk]:
        """Continue a text (or token ids), chunk by chunk as tokens come; params None is the model's defaults.

        structured: the form that the answer has when it ends with "stop"; with "length" it is a prefix of one.
        Raises PromptError when the prompt is empty or longer than the context, StructureError when the form cannot
        be used, ReadError when an expert cannot be read.
        """
        params = params or self.sampling_params()
        constraint = None if structured is None else self.constraint(structured, params)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        decoder, stops = self.tokenizer.decoder(), StopStrings(params.stop)
        for token_id in self._engine.generate_ids(ids, params, set(self.tokenizer.stop_ids), constraint):
            text, stopped = stops.push(decoder.push(token_id))
            yield Chunk(text, token_id)
            if stopped:
                yield Chunk("", None, "stop")
                return
        text, stopped = stops.push(decoder.flush())
        reason = "stop" if stopped else self._engine.finish_reason
        yield Chunk(text + stops.flush(), None, reason)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        structured: StructuredOutput | None = None,
    ) -> Completion:
        """Continue a text (or token ids) to its end.  Raises what stream() raises."""
        chunks = list(self.stream(prompt, params, structured=structured))
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            token_ids=[chunk.token_id for chunk in chunks if chunk.token_id is not None],
            finish_reason=chunks[-1].finish_reason or "length",
            stats=self.stats(),
        )

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        structured: StructuredOutput | None = None,
        **template_kwargs: Any,
    ) -> Completion:
        """Answer a conversation of {"role", "content"} messages.

        template_kwargs reach the model's template: tools=[...], enable_thinking=False, ...
        Raises BundleError without a template, PromptError when the template refuses the conversation, and
        what stream() raises.
        """
        return self.generate(self.chat_ids(messages, **template_kwargs), params, structured=structured)

    def chat_ids(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """The prompt ids of a conversation, for stream(); raises BundleError or PromptError like chat()."""
        text = self.chat_template.render(messages, **template_kwargs)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stats(self) -> dict[str, Any]:
        """Speeds and their bound, hit rate, bytes read and memory of the last request."""
        return self._engine.stats()


def generation_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling values of a generation_config.json; do_sample false means greedy."""
    defaults = {key: config[key] for key in _SAMPLING_KEYS if config.get(key) is not None}
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    for key, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"generation_config.json: {key} must be a number, not {value!r}: correct it")
    try:
        SamplingParams(**defaults)
    except ConfigError as error:
        raise ConfigError(f"generation_config.json: {error}: correct it") from error
    return defaults
