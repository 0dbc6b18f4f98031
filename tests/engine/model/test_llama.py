"""However a sequence is cut and batched, its logits are the same; layers report in time."""

from __future__ import annotations

import pytest
import torch

from services.engine.model.loader import LoadedModel, load_model
from tests.engine.model.running import BACKENDS, PagedRunner, PagedSequence, random_tokens, relative_error

ROUNDING = 2e-5


@pytest.fixture(params=BACKENDS)
def runner(request: pytest.FixtureRequest, tiny: LoadedModel) -> PagedRunner:
    return PagedRunner(tiny.model, request.param)


def test_chunked_prefill_equals_whole(runner: PagedRunner) -> None:
    tokens = random_tokens(150, 512)
    whole = runner.prefill(tokens)
    sequence = PagedSequence(tokens)
    pieces = [runner.step([(sequence, count)])[0] for count in (1, 15, 16, 17, 40, 61)]
    assert relative_error(torch.cat(pieces), whole) < ROUNDING


def test_decode_equals_prefill(runner: PagedRunner) -> None:
    tokens = random_tokens(40, 512)
    whole = runner.prefill(tokens)
    sequence = PagedSequence(tokens)
    steps = [runner.step([(sequence, 1)])[0] for _ in tokens]
    assert relative_error(torch.cat(steps), whole) < ROUNDING


def test_batched_equals_one_by_one(runner: PagedRunner) -> None:
    lengths = (1, 3, 33, 80, 17)
    prompts = [random_tokens(length, 512, seed) for seed, length in enumerate(lengths)]
    alone = [runner.prefill(prompt) for prompt in prompts]
    together = runner.step([(PagedSequence(prompt), len(prompt)) for prompt in prompts])
    for one, other in zip(together, alone, strict=True):
        assert relative_error(one, other) < ROUNDING


def test_decoding_beside_a_prefill(runner: PagedRunner) -> None:
    first, second = random_tokens(50, 512, 1), random_tokens(70, 512, 2)
    expected = [runner.prefill(first)[-1:], runner.prefill(second)]
    decoding, prefilling = PagedSequence(first), PagedSequence(second)
    runner.step([(decoding, 49)])
    actual = runner.step([(decoding, 1), (prefilling, 70)])
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < ROUNDING


def test_on_layer_comes_when_that_layer_is_written_and_the_next_is_not(runner: PagedRunner) -> None:
    sequence, seen = PagedSequence(random_tokens(20, 512)), []

    def on_layer(layer: int) -> None:
        written = runner.kv[:, sequence.pages].isfinite()
        assert written[: layer + 1, 0].all()  # the first page is full
        assert not written[layer + 1 :].any()
        seen.append(layer)

    runner.step([(sequence, 20)], on_layer)
    assert seen == list(range(runner.model.config.num_layers))


def test_no_logits_wanted(runner: PagedRunner) -> None:
    hidden = runner.model.forward(runner.batch([(PagedSequence([5, 6, 7]), 3)]), runner.attention)
    assert runner.model.logits(hidden[:0]).shape == (0, 512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tiny: LoadedModel, tiny_folder: object, dtype: torch.dtype) -> None:
    tokens = random_tokens(40, 512)
    exact = PagedRunner(tiny.model).prefill(tokens)
    half = load_model(str(tiny_folder), device="cpu", dtype=dtype)
    logits = PagedRunner(half.model).prefill(tokens)
    assert logits.dtype == torch.float32
    assert half.digest != tiny.digest
    assert relative_error(logits, exact) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_equals_cpu(tiny: LoadedModel, tiny_folder: object) -> None:
    tokens = random_tokens(100, 512)
    expected = PagedRunner(tiny.model).prefill(tokens)
    model = load_model(str(tiny_folder), device="cuda", dtype=torch.float32).model
    actual = PagedRunner(model).prefill(tokens).cpu()
    assert relative_error(actual, expected) < 1e-3
