"""The dialect of a template, by what such templates contain."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmoe.chat.dialects import Dialect, detect
from flashmoe.chat.dialects.deepseek import DeepSeek
from flashmoe.chat.dialects.harmony import Harmony
from flashmoe.chat.dialects.hermes_json import HermesJson
from flashmoe.chat.dialects.mistral import Mistral
from flashmoe.chat.dialects.qwen_xml import QwenXml
from flashmoe.chat.dialects.tagged import THINK

PUBLISHED = Path(__file__).parents[4] / "shared" / "templates"


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        (r"""{{ '<tool_call>\n<function=' + call.name + '>\n' }}""", QwenXml()),
        (r"""{{ '\n<tool_call>\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}""", HermesJson()),
        (r"""{{ "<tool_call>\n{\"name\": <name>, \"arguments\": <json>}\n</tool_call>" }}""", HermesJson()),
        ("'<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments | tojson", DeepSeek()),
        (r"'<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + name + '\n```json\n'", DeepSeek(fenced=True)),
        ("""'<|start|>assistant to=functions.' + name + '<|channel|>commentary'""", Harmony()),
        ("'[TOOL_CALLS]' + name + '[ARGS]' + arguments", Mistral()),
        ("'[TOOL_CALLS] [' + call | tojson + ']'", Mistral(listed=True)),
        ("'<think>' '[TOOL_CALLS] ['", Mistral(listed=True, think=THINK)),
        (r"'<tool_call>' + name + '\n<arg_key>' + key + '</arg_key>' 'arguments'", None),
        ("'<seed:tool_call><function=' + name", None),
        ("{{ message.role }}: {{ message.content }}", None),
        ("", None),
    ],
)
def test_a_template_tells_its_dialect(template: str, dialect: Dialect | None) -> None:
    assert detect(template) == dialect


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published templates of ../shared are not here")
def test_published_templates() -> None:
    expected = {
        "Qwen-Qwen2.5-7B-Instruct": HermesJson(),
        "Qwen-Qwen3-0.6B": HermesJson(),
        "Qwen3-Coder": QwenXml(),
        "Qwen3.5-4B": QwenXml(),
        "deepseek-ai-DeepSeek-V3.1": DeepSeek(),
        "openai-gpt-oss-120b": Harmony(),
    }
    found = {file.stem: detect(file.read_text(encoding="utf-8")) for file in PUBLISHED.glob("*.jinja")}
    assert found == expected
