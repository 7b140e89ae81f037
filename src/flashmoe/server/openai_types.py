"""Requests of OpenAI's chat and completions APIs; unknown fields are ignored, as other servers do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flashmoe.chat.llm import LLM
from flashmoe.chat.structured import StructuredOutput
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import RequestError

MOST_ANSWERS = 16
MOST_LOGPROBS = 20


class StreamOptions(BaseModel):
    """What a stream contains besides the answer."""

    include_usage: bool = False


class SamplingRequest(BaseModel):
    """What both APIs share.  top_k, min_p and repetition_penalty are this server's (and others') additions."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None

    def params(self, llm: LLM, max_tokens: int | None = None) -> SamplingParams:
        """The model's defaults with what the request gives.  Raises ConfigError, RequestError."""
        if self.logit_bias:
            raise RequestError("logit_bias is not supported: leave it out", "logit_bias")
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        given = {name: getattr(self, name) for name in names}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = None if self.seed is None else self.seed % (1 << 64)  # clients send negative ones too
        return llm.sampling_params(
            **given, seed=seed, stop=tuple(stop), max_tokens=max_tokens or self.max_tokens
        )


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # As vLLM names them.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: Literal[1] | None = None


def structure_of(request: ChatRequest) -> StructuredOutput | None:
    """The form that the answer must have.  Raises RequestError, StructureError."""
    given = [_guided(request), response_format(request.response_format)]
    wanted = [one for one in given if one is not None]
    if len(wanted) > 1:
        raise RequestError(
            "response_format and a guided_ field exclude each other: give one", "response_format"
        )
    return wanted[0] if wanted else None


def _guided(request: ChatRequest) -> StructuredOutput | None:
    fields = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    given = [name for name in fields if getattr(request, name) is not None]
    if len(given) > 1:
        raise RequestError(f"{given[0]} and {given[1]} exclude each other: give one", given[0])
    if not given:
        return None
    value = getattr(request, given[0])
    if given[0] == "guided_json":
        return StructuredOutput.json_schema(_parsed(value) if isinstance(value, str) else value)
    if given[0] == "guided_regex":
        return StructuredOutput.regex(value)
    return StructuredOutput.choice(value) if given[0] == "guided_choice" else StructuredOutput.lark(value)


def _parsed(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"guided_json is no JSON: {error}", "guided_json") from None


def response_format(form: dict[str, Any] | None, name: str = "response_format") -> StructuredOutput | None:
    """What a field `name` of the request asks for.  Raises RequestError, StructureError."""
    kind = None if form is None else form.get("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput.json_object()
    if kind == "json_schema":
        holder = form.get("json_schema")
        schema = holder.get("schema") if isinstance(holder, dict) else None
        if not isinstance(schema, dict | bool):
            raise RequestError(f"{name} of type json_schema has no schema: give a JSON Schema", name)
        return StructuredOutput.json_schema(schema)
    raise RequestError(f"{name}.type {kind!r} is unknown: use text, json_object or json_schema", name)
