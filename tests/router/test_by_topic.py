"""What the default planner decides: a pure function of a view, here made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.router.planners.by_topic import Params, find_homes, find_moves
from services.router.planning.topics import Topic
from services.router.planning.view import Move, Site, View
from services.router.request import ModelKey, PolicyRequest

MODEL = ModelKey("m", b"weights", b"tokens")
PREFILL_S, SEND_S = 1e-3, 1e-5  # a token
PARAMS = Params()


class Linear:
    """Costs proportional to tokens."""

    def prefill_s(self, site: Site, tokens: int, after: int) -> float:
        return PREFILL_S * tokens

    def send_s(self, source: Site, target: Site, tokens: int) -> float:
        return SEND_S * tokens


def topic(name: str, rate: float, tokens: int = 1024) -> Topic:
    return Topic(name, PolicyRequest(name, MODEL, tuple(range(tokens))), rate)


def site(name: str, busy: float, usable_pages: int = 10_000, *, can_transfer: bool = True, **cached: int) -> Site:
    return Site(name, f"{name}:1", busy, 16, usable_pages, 500, can_transfer, {"x": 0, "y": 0, "z": 0} | cached)


def view(topics: list[Topic], sites: list[Site], *, rate: float = 0.0, homes: str = "", tried: str = "") -> View:
    """`homes` and `tried` as in "x:ab y:b": topic x on a and b, y on b."""
    pairs = [
        (name, letter) for name, _, letters in (each.partition(":") for each in homes.split()) for letter in letters
    ]
    at_home = {each.name: tuple(f"{letter}:1" for name, letter in pairs if name == each.name) for each in topics}
    done = frozenset((each[0], f"{each[2]}:1") for each in tried.split())
    rate = rate or sum(each.rate for each in topics)
    return View(MODEL, tuple(topics), rate, tuple(sites), at_home, done, Linear())


def homes(seen: View, params: Params = PARAMS) -> dict[str, str]:
    return {each.name: "".join(site.name for site in sites) for each, sites in find_homes(seen, params).items()}


def moves(seen: View, params: Params = PARAMS) -> list[tuple[str, str, str, int]]:
    made: list[Move] = find_moves(seen, find_homes(seen, params), params)
    assert all(move.why for move in made)
    return [(move.topic.name, move.source.name, move.target.name, move.tokens) for move in made]


# --- homes ------------------------------------------------------------------------------------------------------------


def test_a_topic_is_at_home_where_it_is_cached() -> None:
    seen = view([topic("x", 1.0)], [site("a", 0.1), site("b", 0.3, x=1024)])
    assert (homes(seen), moves(seen)) == ({"x": "b"}, [])


def test_a_topic_that_fills_its_engine_gets_another_and_its_context_is_copied_there() -> None:
    seen = view([topic("x", 1.0)], [site("a", 0.95, x=1024), site("b", 0.0), site("c", 0.0)])
    assert homes(seen) == {"x": "ab"}
    assert moves(seen) == [("x", "a", "b", 1024)]


@pytest.mark.parametrize(("busy", "expected"), [(0.7, "a"), (0.86, "a"), (0.89, "ab")])
def test_a_little_too_much_is_borne(busy: float, expected: str) -> None:
    """By a quarter: homes do not change at every turn."""
    assert homes(view([topic("x", 1.0)], [site("a", busy, x=1024), site("b", 0.0)])) == {"x": expected}


def test_a_full_fleet_is_shared_out_so_that_all_are_as_busy() -> None:
    """And still every engine holds one topic and not both."""
    sites = [site("a", 1.0, x=1024, y=1024), site("b", 1.0, x=1024, y=1024)]
    assert homes(view([topic("x", 5.0), topic("y", 5.0)], sites)) == {"x": "a", "y": "b"}
    assert homes(view([topic("x", 9.0), topic("y", 1.0)], sites)) == {"x": "ab", "y": "b"}


def test_topics_of_one_engine_part_when_it_is_full() -> None:
    seen = view([topic("x", 6.0), topic("y", 4.0)], [site("a", 1.0, x=1024, y=1024), site("b", 0.0)])
    assert homes(seen) == {"x": "a", "y": "b"}
    assert moves(seen) == [("y", "a", "b", 1024)]


def test_homes_stay_when_traffic_changes_a_little() -> None:
    sites = [site("a", 0.5, x=1024, y=1024), site("b", 0.5, x=1024, y=1024)]
    for rates in ((6.0, 4.0), (4.0, 6.0)):
        topics = sorted([topic("x", rates[0]), topic("y", rates[1])], key=lambda each: -each.rate)
        assert homes(view(topics, sites, homes="x:b y:a")) == {"x": "b", "y": "a"}


def test_an_engine_takes_other_topics_when_traffic_shifts() -> None:
    """What was hot has gone: its engines have room for what is hot now."""
    before = [site("a", 0.9, x=1024, y=1024), site("b", 0.9, x=1024)]
    shifted = view([topic("y", 10.0), topic("x", 0.2)], before, homes="x:ab y:a")
    assert homes(shifted) == {"y": "ab", "x": "b"}
    assert moves(shifted) == [("y", "a", "b", 1024)]


def test_requests_of_no_topic_fill_engines_too() -> None:
    assert homes(view([topic("x", 1.0)], [site("a", 0.9, x=1024), site("b", 0.9)], rate=4.0)) == {"x": "a"}


def test_a_topic_may_be_kept_on_several_engines_in_any_case() -> None:
    seen = view([topic("x", 1.0)], [site("a", 0.0, x=1024), site("b", 0.0), site("c", 0.0)])
    assert homes(seen, Params(replicas=2)) == {"x": "ab"}
    assert homes(seen, Params(replicas=9)) == {"x": "abc"}


def test_no_engines_and_no_topics() -> None:
    assert (homes(view([topic("x", 1.0)], [])), moves(view([topic("x", 1.0)], []))) == ({"x": ""}, [])
    assert moves(view([], [site("a", 1.0)])) == []


# --- moves ------------------------------------------------------------------------------------------------------------

TWICE = Params(replicas=2)


def copies(source: Site, target: Site, *, rate: float = 1.0, tried: str = "", params: Params = TWICE) -> list[int]:
    return [move[3] for move in moves(view([topic("x", rate)], [source, target], tried=tried), params)]


def test_only_what_is_cached_somewhere_is_moved_and_only_what_is_missing() -> None:
    assert copies(site("a", 0.0), site("b", 0.0)) == []
    assert copies(site("a", 0.0, x=512), site("b", 0.0)) == [512]
    assert copies(site("a", 0.0, x=512), site("b", 0.0, x=512)) == []


def test_whole_pages_of_the_target() -> None:
    assert copies(replace(site("a", 0.0, x=1000), page_size=8), site("b", 0.0)) == [992]


def test_engines_without_a_transfer_service_neither_send_nor_receive() -> None:
    alone = site("a", 0.0, can_transfer=False, x=1024)
    assert copies(alone, site("b", 0.0)) == copies(site("b", 0.0, x=1024), site("a", 0.0, can_transfer=False)) == []


@pytest.mark.parametrize(("rate", "expected"), [(0.0001, []), (0.001, [1024])])
def test_a_move_must_save_more_than_it_costs(rate: float, expected: list[int]) -> None:
    """A token saves a thousandth of a second each time, and costs a hundredth of that: in a minute, twice as much
    comes back from a third of a thousandth of a request a second on, for each of two homes."""
    assert copies(site("a", 0.0, x=1024), site("b", 0.0), rate=rate) == expected


def test_what_was_just_tried_is_not_tried_again() -> None:
    assert copies(site("a", 0.0, x=1024), site("b", 0.0), tried="x:b") == []
    assert copies(site("a", 0.0, x=1024), site("b", 0.0), tried="x:a y:b") == [1024]


@pytest.mark.parametrize(("usable_pages", "expected"), [(0, []), (563, []), (564, [1024])])
def test_the_longest_prompt_finds_room_afterwards(usable_pages: int, expected: list[int]) -> None:
    assert copies(site("a", 0.0, x=1024), site("b", 0.0, usable_pages)) == expected


def test_nothing_is_moved_onto_what_is_asked_for_more() -> None:
    """64 pages for each topic: there is room for one beside the longest prompt."""
    full = site("b", 0.0, 600, x=1024)
    for first, expected in (("x", []), ("y", [("y", "a", "b", 1024)])):
        topics = sorted([topic("x", 1.0 + (first == "x")), topic("y", 1.0 + (first == "y"))], key=lambda t: -t.rate)
        assert moves(view(topics, [site("a", 0.0, x=1024, y=1024), full]), TWICE) == expected


@pytest.mark.parametrize("wrong", [{"full": 0.0}, {"full": 1.1}, {"slack": -1}, {"replicas": 0}, {"horizon_s": 0}])
def test_parameters_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="full is in"):
        Params(**wrong)  # type: ignore[arg-type]
