"""What the kinds of questions share: the settings of a chat answer, and reading the alternatives of a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evalkit.judges.answers.explanations import Parser, alternatives_at
from evalkit.judges.config import JudgeConfig

Reader = Callable[[Sequence[Any]], dict[str, Any]]
"""From the alternatives at each slot to what is stored."""


def limit_name(config: JudgeConfig) -> str:
    """What the endpoint calls the limit on a chat answer: OpenAI's newer models refuse the old name, others know only that."""
    return "max_completion_tokens" if "api.openai.com" in config.base_url else "max_tokens"


def schema_settings(config: JudgeConfig, name: str, schema: dict[str, Any], most: int) -> dict[str, Any]:
    """Settings of a chat request whose answer follows a JSON schema.

    Args:
        config: of the judge.
        name: of the schema.
        schema: the JSON schema.
        most: most tokens of the answer.
    """
    settings: dict[str, Any] = {
        "model": config.model,
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}},
        limit_name(config): most,
    }
    if config.temperature >= 0:
        settings["temperature"] = 0
    if config.chat_logprobs:
        settings.update(logprobs=True, top_logprobs=min(20, config.top_logprobs))
    return settings


def at_slots(prompt: str, slots: Sequence[int], read: Reader) -> Parser:
    """Parser of echoed logprobs: ``read`` gets what would follow at each slot (a character offset) of ``prompt``."""

    def parse(choice: dict[str, Any]) -> dict[str, Any]:
        tops = alternatives_at(choice, prompt, slots)
        if None in tops:
            raise ValueError(f"no probabilities at token {tops.index(None)}: the judge's tokens do not begin at its slot")
        return read(tops)

    return parse


def at_next(read: Reader) -> Parser:
    """Parser of one generated token: ``read`` gets its alternatives."""
    return lambda choice: read([next_alternatives(choice)])


def next_alternatives(choice: dict[str, Any]) -> Any:
    """Alternatives of one generated token, in the legacy form or in the chat form some servers use (llama.cpp)."""
    logprobs = choice["logprobs"]
    return logprobs["top_logprobs"][0] if logprobs.get("top_logprobs") else logprobs["content"][0]["top_logprobs"]
