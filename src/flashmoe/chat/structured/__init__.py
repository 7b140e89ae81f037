"""Structured output: answers that follow a JSON Schema, a regular expression or a grammar (docs/structured.md)."""

from flashmoe.chat.structured.compile import compile_structure
from flashmoe.chat.structured.spec import StructuredOutput
from flashmoe.chat.structured.vocabulary import GrammarVocabulary

__all__ = ["GrammarVocabulary", "StructuredOutput", "compile_structure"]
