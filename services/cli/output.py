"""Printing: tables and streamed text for people, one JSON value a line for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from services.cli.unreachable import in_short
from services.cli.values import Answer, Endpoint, Engine, Explanation, Leg, Option, Planner, Policy, Split

_PIPE_WIDTH = 200
_SHOWN_MOVES = 20


def say(text: str | Table, *, style: str = "") -> None:
    """Prints one line, or a table, to the letter; into a pipe nothing is wrapped at 80 columns."""
    # Markup would swallow what stands in brackets, as the hosts of IPv6 addresses do.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(highlight=False, markup=False, emoji=False, width=width).print(text, style=style)


def print_json(value: Any) -> None:
    """One line of JSON on stdout: a dataclass, a sequence of them, or anything JSON has."""
    plain = [_plain(item) for item in value] if isinstance(value, list | tuple) else _plain(value)
    print(json.dumps(plain, ensure_ascii=False), flush=True)


def print_piece(text: str) -> None:
    """A piece of a streamed answer, at once and unchanged."""
    print(text, end="", flush=True)


def print_legs(answer: Answer) -> None:
    """What happened: one row a verb."""
    _print_verbs(
        f"{answer.policy}: {answer.prompt_tokens} prompt tokens, {answer.output_tokens} generated", answer.legs
    )


def print_explanation(explanation: Explanation) -> None:
    """Expected against actual, the alternatives, and the verbs. Times in milliseconds."""
    _print_verbs(f"{explanation.policy}: {explanation.code}, {explanation.output_tokens} generated", explanation.legs)
    if explanation.chosen is None:
        say("this policy weighs no placements")
        return
    table = make_table(
        f"{explanation.weighed} placements weighed",
        ["", "pattern", "prefill", "decode"],
        ["split", "hold", "wait", "compute", "transfer", "ttft", "decode", "jct", "delay", "cost"],
    )
    for option in (explanation.chosen, *explanation.alternatives):
        table.add_row(*_option_row(option, chosen=option is explanation.chosen))
    ttft = "" if explanation.ttft_ms is None else f"{explanation.ttft_ms:.1f}"
    table.add_row("", "as it was", "", "", "", "", "", "", "", ttft, "", f"{explanation.jct_ms:.1f}", "", "")
    say(table)


def _option_row(option: Option, *, chosen: bool) -> list[str]:
    words = ["*" if chosen else "", option.pattern, option.prefill or "-", option.decode]
    ahead = (option.hold_ms, option.wait_ms, option.compute_ms, option.transfer_ms, option.ttft_ms)
    after = (option.decode_ms, option.jct_ms, option.delay_ms, option.cost_ms)
    return [*words, str(option.split), *(f"{time:.1f}" for time in (*ahead, *after))]


def _print_verbs(title: str, legs: Sequence[Leg]) -> None:
    table = make_table(
        title,
        ["verb", "engine"],
        ["range", "matched", "sent", "computed", "generated", "bytes", "ms"],
    )
    for leg in legs:
        table.add_row(
            leg.verb,
            leg.engine,
            f"[{leg.begin}, {leg.end})",
            str(leg.matched),
            str(leg.transferred),
            str(leg.computed),
            str(leg.generated),
            f"{leg.transferred_bytes:,}",
            f"{leg.elapsed_ms:.1f}",
        )
    say(table)


def print_endpoints(endpoints: Sequence[Endpoint]) -> None:
    """Where everything listens."""
    table = make_table("Endpoints", ["service", "gRPC", "HTTP"], ["pid"])
    for endpoint in endpoints:
        table.add_row(endpoint.name, endpoint.grpc, endpoint.http or "-", str(endpoint.pid))
    say(table)


def print_engines(engines: Sequence[Engine]) -> None:
    """The fleet as the router sees it."""
    table = make_table(
        "Engines",
        ["engine", "address", "state", "model", "device"],
        ["running", "waiting", "reserved", "free", "cached", "pages"],
    )
    for engine in engines:
        # Not "down": one that an operator drains, or that the breaker leaves alone, may well run.
        state = "healthy" if engine.healthy else f"takes no work: {in_short(engine.problem)}"
        sequences = (engine.running, engine.waiting, engine.reservations)
        pages = (engine.pages_free, engine.pages_cached, engine.pages_total)
        # Of an engine that is gone nobody knows them.
        numbers = ("-" if number is None else str(number) for number in (*sequences, *pages))
        table.add_row(engine.name or "?", engine.address, state, engine.model, engine.device, *numbers)
    say(table)


def print_policies(policies: Sequence[Policy]) -> None:
    """Programs at hand; the current one has a star."""
    table = make_table("Policies", ["", "policy", "what it does"], [])
    for policy in policies:
        table.add_row("*" if policy.current else "", policy.name, policy.summary)
    say(table)


def print_split(split: Split) -> None:
    """How requests are shared out and what came of them, the current program first."""
    if not split.arms:
        say("requests have not been split")
        return
    table = make_table(
        "Split" if split.active else "Split, ended",
        ["policy"],
        ["%", "requests", "refused", "errors", "ttft ms", "p99", "tpot ms", "jct ms", "p99"],
    )
    for arm in split.arms:
        total = sum(arm.requests.values())
        times = (arm.ttft_mean_ms, arm.ttft_p99_ms, arm.tpot_mean_ms, arm.jct_mean_ms, arm.jct_p99_ms)
        ended_well = arm.requests.get("OK", 0)
        refused = arm.requests.get("INVALID_ARGUMENT", 0)  # which the client is to mend
        shown = [f"{time:.1f}" if ended_well else "-" for time in times]
        counts = (total, refused, total - ended_well - refused)
        table.add_row(arm.policy, f"{arm.percent:g}", *map(str, counts), *shown)
    say(table)


def print_planner(state: Planner) -> None:
    """The planner, the topics and its latest moves."""
    if state.problem:
        last = f" ({state.planner})" if state.planner else ""
        say(f"no planner runs{last}: {state.problem}; at hand: {', '.join(each.name for each in state.programs)}")
    else:
        counts = ", ".join(f"{count} {code}" for code, count in sorted(state.moves_by_code.items())) or "none"
        say(f"{state.planner} runs for {state.age_s:.0f} s, {state.looks} looks, moves: {counts}")
    if state.topics:
        table = make_table("Topics", ["topic", "home", "cached"], ["tokens", "requests/s"])
        for topic in state.topics:
            cached = " ".join(f"{name}:{tokens}" for name, tokens in sorted(topic.cached_tokens.items()))
            home = " ".join(topic.homes)
            table.add_row(topic.name, home, cached, str(topic.tokens), f"{topic.requests_per_s:.2f}")
        say(table)
    if state.moves:
        table = make_table("Moves", ["topic", "from", "to", "outcome", "why"], ["s ago", "tokens", "MB", "ms"])
        for move in state.moves[:_SHOWN_MOVES]:
            numbers = (f"{move.age_s:.0f}", str(move.moved_tokens), f"{move.moved_bytes / 1e6:.1f}")
            row = (move.topic, move.source, move.target, move.code, move.why)
            table.add_row(*row, *numbers, f"{move.elapsed_ms:.1f}")
        say(table)


def make_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table with columns of words, and then of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
