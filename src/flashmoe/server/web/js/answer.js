// One answer of the model: the request of a conversation, and its stream put together.

import { ApiError, events, request } from "./api.js";

/** The messages as the API wants them. */
function wire(conversation) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...conversation.messages.map(wireMessage)];
}

function wireMessage(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.call, content: message.content };
  const plain = { role: message.role, content: message.content };
  if (!message.calls?.length) return plain;
  const calls = message.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  return { ...plain, tool_calls: calls };
}

/** A message of the assistant in which nothing stands yet. */
export function emptyAnswer() {
  return { role: "assistant", content: "", reasoning: "", calls: [] };
}

/**
 * Fill `message` with the model's answer to the conversation (which does not hold it yet); changed() after each piece.
 * Problems and a stop by `signal` are noted in the message, not thrown.
 */
export async function answer(conversation, message, fields, signal, changed) {
  const clock = new Clock();
  const body = { ...fields, messages: wire(conversation), stream: true, stream_options: { include_usage: true } };
  try {
    const response = await request("/v1/chat/completions", { body, signal });
    for await (const { data } of events(response)) {
      take(message, data, clock);
      changed();
    }
    if (!message.finish) message.problem = "The answer broke off: the server ended the connection.";
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else message.problem = error instanceof ApiError ? error.message : "The answer broke off: the connection was lost.";
  }
  message.facts = clock.facts(message.facts);
  changed();
}

function take(message, chunk, clock) {
  if (chunk.error) {
    message.problem = chunk.error.message;
    message.finish = "error";
  }
  if (chunk.usage) message.facts = usage(chunk.usage);
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { delta } = choice;
  if (delta.reasoning_content || delta.content || delta.tool_calls) clock.piece();
  if (delta.reasoning_content) message.reasoning += delta.reasoning_content;
  if (delta.content) {
    message.content += delta.content;
    clock.said();
  }
  for (const call of delta.tool_calls ?? []) takeCall(message.calls, call);
  if (choice.finish_reason) message.finish = choice.finish_reason;
  message.thought = clock.thought;
}

function takeCall(calls, { index, id, function: part }) {
  calls[index] ??= { id, name: part.name, arguments: "" };
  calls[index].arguments += part.arguments ?? "";
}

function usage(counts) {
  const { prompt_tokens: prompt, completion_tokens: tokens } = counts;
  return { prompt, tokens, cached: counts.prompt_tokens_details?.cached_tokens ?? 0 };
}

/** Seconds until the first piece, seconds of thinking, and speed from the first piece to the last one. */
class Clock {
  constructor() {
    this.began = performance.now();
    this.first = this.last = this.thought = null;
    this.pieces = 0;
  }

  piece() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces++;
  }

  said() {
    this.thought ??= (this.last - this.first) / 1000;
  }

  facts(counts = {}) {
    if (this.first === null) return counts;
    const seconds = (this.last - this.first) / 1000;
    const tokens = counts.tokens ?? this.pieces;
    return { ...counts, tokens, wait: (this.first - this.began) / 1000, speed: seconds > 0 ? (tokens - 1) / seconds : null };
  }
}
