"""Which dialect a model speaks, by the markers in its chat template."""

from __future__ import annotations

import re

from flashmoe.chat.dialects.base import Dialect
from flashmoe.chat.dialects.deepseek import DeepSeek
from flashmoe.chat.dialects.harmony import Harmony
from flashmoe.chat.dialects.hermes_json import HermesJson
from flashmoe.chat.dialects.mistral import BRACKETS, Mistral
from flashmoe.chat.dialects.qwen_xml import QwenXml
from flashmoe.chat.dialects.tagged import THINK

_HERMES_ARGUMENTS = re.compile(r"[\"']arguments\\*[\"']")


def detect(template: str) -> Dialect | None:
    """The dialect of a chat template's source; None when it knows no tools, or writes calls in a way we cannot read."""
    if "<|channel|>" in template and "functions." in template:
        return Harmony()
    if "<｜tool▁call▁begin｜>" in template:
        return DeepSeek(fenced="```json" in template)
    if "[TOOL_CALLS]" in template:
        return Mistral(listed="[ARGS]" not in template, think=THINK if "<think>" in template else BRACKETS)
    if "<tool_call>" not in template:
        return None
    if "<function=" in template:
        return QwenXml()
    # Others, like GLM, write tags of their own within <tool_call>.
    return HermesJson() if _HERMES_ARGUMENTS.search(template) and "<arg_key>" not in template else None
