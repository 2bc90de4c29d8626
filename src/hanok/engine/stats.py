"""Counts and gauges of an engine, as metrics show them. Imports no torch."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Counts:
    """What an engine has done since it began, as far as its scheduler does not count it."""

    steps: int = 0
    cancelled: int = 0
    most_tokens_after_abort: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine does at a moment, and has done since it began."""

    num_waiting: int
    num_running: int
    waiting_tokens: int
    """Prompt tokens of those that wait."""
    used_blocks: int
    cached_blocks: int
    """Unused, kept for requests with the same prefix."""
    total_blocks: int
    block_size: int
    steps: int
    preemptions: int
    prefix_hit_tokens: int
    """Prompt tokens that were not computed, for others had been."""
    prefix_query_tokens: int
    """Prompt tokens of all that began."""
    cancelled: int
    most_tokens_after_abort: int
    """Of one request that was given up: those of the step that was under way."""
    generated_tokens: int
    drafted_tokens: int
    """Tokens that were guessed and checked."""
    accepted_tokens: int
    """Of these, those that were right."""
