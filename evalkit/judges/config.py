"""How a judge is described in a suite: a frozen dataclass, every field explained under itself."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from evalkit.errors import JudgeSetupError
from evalkit.judges.address import check_address, check_variable
from evalkit.util.registry import near_miss

SIMULATIONS = ("auto", "slots", "one-at-a-time-wide", "one-at-a-time", "constrained")
EXPLAIN_WITH = ("auto", "completions", "chat")
EXPLAIN_FROM = ("auto", "table", "peaks")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def not_in_key(default: Any) -> Any:
    """A field with this default that changes no answer: runs and calls stay the same when it changes."""
    return field(default=default, metadata={"in_key": False})


def in_key(config: JudgeConfig) -> dict[str, Any]:
    """The settings of a judge that can change an answer, by name."""
    return {one.name: getattr(config, one.name) for one in fields(config) if one.metadata.get("in_key", True)}


@dataclass(frozen=True)
class JudgeConfig:
    """Settings of one judge. Whatever can change an answer is part of the judge's identity; time-outs and the like are not.

    A provider with settings of its own inherits from this and adds fields (``base.settings_class``).
    """

    provider: str = "local"
    """'local' (a model that evalkit loads on this machine), 'openai' (any OpenAI-compatible endpoint), 'lexical' (word
    look-up, no language model) or 'scripted' (a fake for tests)."""
    model: str = ""
    """For 'openai': the name the endpoint knows the model by. For 'local': a packaged model or the path of a Hugging Face
    folder; empty means qwen2.5-coder-1.5b-instruct."""
    explainer_model: str = ""
    """Another model of the same endpoint that writes the explanations; empty means ``model``. 'openai' only."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the endpoint, up to and including its version, without name, password or key. 'openai' only."""
    api_key_env: str = not_in_key("OPENAI_API_KEY")
    """Environment variable that holds the key; empty for an endpoint that wants none. The key is never written anywhere."""
    simulation: str = "auto"
    """How activations are simulated. 'slots': one pass over the prompt reads the distribution at every slot (needs
    echo with logprobs on /completions). 'one-at-a-time-wide': one request for each token (logprobs on /completions without
    echo), with 500 alternatives, which llama.cpp's server gives. 'one-at-a-time': the same with ``top_logprobs`` alternatives.
    'constrained': the chat model writes one integer for each token under a JSON schema; compare its scores with those of other
    'constrained' judges only. 'auto' tries the endpoint once, in
    that order, and remembers what it found; the way used is part of the judge's identity."""
    least_tokens: float = 0.5
    """Share of a fragment's tokens that must have a value. A token is missing where the alternatives show too little of the
    digits; it is left out of the score and counted. With fewer values than this the fragment's simulation is failed."""
    explain_with: str = "auto"
    """'completions', 'chat', or 'auto': completions where the simulation uses them with the same model, chat otherwise."""
    explain_from: str = "auto"
    """What the explainer is shown. 'table': every token with its activation, the published form; 'peaks': the strongest token of
    each fragment with a little context, which small models need. 'auto': the table for chat models, peaks otherwise."""
    chat_logprobs: bool = True
    """Ask chat models for logprobs in 'constrained' simulation, to read an expectation instead of a single integer. Models that
    refuse them are asked without."""
    top_logprobs: int = 20
    """Alternatives asked for at each position. Most endpoints allow at most 20; the local model gives every digit besides."""
    temperature: float = 0.0
    """Temperature for explanations (simulation always reads probabilities or decodes greedily). A negative value leaves it
    out of every request, for models that accept only their default."""
    explanation_tokens: int = 40
    """Most tokens of one explanation. One that is cut off there is scored as it stands and counted; models that reason in their
    answer need several hundred."""
    explanation_characters: int = 300
    """Longer explanations are cut at a word boundary."""
    seed: int = 0
    """Seed sent with sampled requests (temperature above 0)."""
    dtype: str = "auto"
    """Number format of the local model: 'auto' takes bfloat16 where the processor multiplies it natively, else float32."""
    concurrency: int = not_in_key(4)
    """Requests in flight at once. The local model works on one at a time whatever this says; fragments that are read one token
    at a time from llama.cpp's server are no more than its slots (its option --parallel)."""
    batch: int = not_in_key(8)
    """Prompts in one /completions request. 1 for servers that take no lists. 'one-at-a-time-wide' sends each slot alone."""
    timeout_s: float = not_in_key(300.0)
    """Seconds without an answer after which a request counts as timed out. 'openai' only."""
    max_attempts: int = not_in_key(4)
    """Times one request is tried when it is rate-limited, times out, loses its connection or gets a 5xx."""
    rounds: int = not_in_key(2)
    """Times a call is asked in one run, where it failed in a way that may pass: 2 asks it once more before anything is scored."""
    give_up_after: int = not_in_key(5)
    """Requests that fail in a row, each after all its attempts, or are refused before any is answered, until the judge counts as
    gone."""
    startup_s: float = not_in_key(900.0)
    """Has no effect any more. It is accepted so that older suite files stay valid."""
    budget_tokens: int = not_in_key(0)
    """Most tokens (prompt and completion) one run may spend on this judge; 0 means no limit."""
    budget_dollars: float = not_in_key(0.0)
    """Most money one run may spend on this judge; 0 means no limit. Needs both prices below."""
    dollars_per_million_prompt: float | None = not_in_key(None)
    """Price of a million prompt tokens, in dollars."""
    dollars_per_million_completion: float | None = not_in_key(None)
    """Price of a million completion tokens, in dollars."""

    @property
    def name(self) -> str:
        """What tells the judges of a suite apart: 'lexical', 'local', 'openai:MODEL'."""
        return f"{self.provider}:{self.model}" if self.model and self.provider != "lexical" else self.provider

    def __post_init__(self) -> None:
        check_address(self.base_url)
        check_variable(self.api_key_env)
        for name, known in (
            ("simulation", SIMULATIONS),
            ("explain_with", EXPLAIN_WITH),
            ("explain_from", EXPLAIN_FROM),
            ("dtype", DTYPES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise JudgeSetupError(f"'{value}' is no {name}", where=f"[judge] {name}", fix=near_miss(str(value), known))
        for name in ("concurrency", "batch", "max_attempts", "rounds", "give_up_after", "top_logprobs", "explanation_tokens"):
            if getattr(self, name) < 1:
                raise JudgeSetupError(f"{name} must be 1 or more", where=f"[judge] {name}", fix=f"got {getattr(self, name)}")
        if not 0 < self.least_tokens <= 1:
            raise JudgeSetupError(
                "least_tokens is a share above 0, at most 1", where="[judge] least_tokens", fix="leave it at 0.5"
            )
        if self.timeout_s <= 0 or self.startup_s <= 0:
            raise JudgeSetupError("time limits must be above 0", where="[judge]", fix="set timeout_s and startup_s in seconds")
        if self.budget_tokens < 0 or self.budget_dollars < 0:
            raise JudgeSetupError("a budget cannot be negative", where="[judge]", fix="0 means no limit")
        if self.budget_dollars and (self.dollars_per_million_prompt is None or self.dollars_per_million_completion is None):
            raise JudgeSetupError(
                "a budget in dollars needs the prices of the judge",
                where="[judge] budget_dollars",
                fix="set dollars_per_million_prompt and dollars_per_million_completion, or use budget_tokens",
            )
