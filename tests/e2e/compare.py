"""When are two generations the same? Token for token, except where the model itself cannot decide."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from tests.e2e.suite import Generated

# Below this difference between the two best logits, the order of float32 sums decides which token is taken.
CLOSE_CALL = 1e-3


async def assert_same_generation(
    expected: Generated,
    token_ids: Sequence[int],
    under_forced_tokens: Callable[[list[int]], Awaitable[Generated]],
    tolerance: float = CLOSE_CALL,
) -> None:
    """Tokens must be equal. Where they part at a step whose best two logits are closer than `tolerance`, the same way
    of serving is run again with the expected tokens forced, and the log-probabilities must agree as well instead."""
    if list(token_ids) == expected.token_ids:
        return
    assert len(token_ids) == len(expected.token_ids)
    step = next(i for i, pair in enumerate(zip(expected.token_ids, token_ids, strict=True)) if pair[0] != pair[1])
    best, second = expected.logprobs[step].top[:2]
    gap = best.logprob - second.logprob
    assert gap < tolerance, f"step {step}: {token_ids[step]} instead of {expected.token_ids[step]}, gap {gap}"
    forced = await under_forced_tokens(expected.token_ids)
    for step, (ours, theirs) in enumerate(zip(forced.logprobs, expected.logprobs, strict=True)):
        difference = abs(ours.chosen.logprob - theirs.chosen.logprob)
        assert difference < tolerance, f"step {step}: log-probabilities differ by {difference}"
