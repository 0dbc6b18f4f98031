"""Recorded steps compute what plain torch does, in every family; a row's bits do not depend on what is beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from services.engine.batch import last_rows
from services.engine.kernels.jobs import Jobs
from services.engine.kernels.team import team_of
from services.engine.model.config import Activation, ModelConfig
from services.engine.model.decoder import Decoder
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.loader import LoadedModel, load_model
from services.engine.model.ops import TorchOps
from services.engine.model.team_ops import TeamOps
from tests.engine.model.random_models import VARIANTS, save_random
from tests.engine.model.running import RELATIVE_ERROR, PagedRunner, PagedSequence, random_tokens, relative_error
from tests.models import make_tiny_llama

FAMILIES = [name for name, (_, changes) in VARIANTS.items() if changes.get("head_dim", 16) == 16]
CPU = torch.device("cpu")


def _load(folder: Path, threads: int = 2, form: WeightForm = WeightForm.EXACT) -> Decoder:
    linear = linear_maker(CPU, torch.float32, threads, form)
    model = load_model(folder, device=CPU, dtype=torch.float32, linear=linear).model
    assert isinstance(model, Decoder)
    return model


def _steps(runner: PagedRunner, sequences: Sequence[PagedSequence], counts: Sequence[int]) -> list[Tensor]:
    return runner.step(list(zip(sequences, counts, strict=True)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), hidden=96, heads=6, kv_heads=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.inference_mode()
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family_equals_plain_torch(tmp_path: Path, variant: str) -> None:
    """Prompts, pieces beside decoding, and decoding, over the same pool twice: recorded, and by the plain twins."""
    config_class, changes = VARIANTS[variant]
    save_random(tmp_path, config_class, {**changes, "head_dim": 16})
    plain = load_model(tmp_path, device=CPU, dtype=torch.float32).model
    assert isinstance(plain, Decoder)
    runners = [PagedRunner(_load(tmp_path), "paged_numba", 200), PagedRunner(plain, "gather_sdpa", 200)]
    for counts in ((90, 1, 17), (1, 30, 1), (1, 1, 1), (1, 1, 1), (9, 2, 1)):
        if counts[0] == 90:
            works = [[PagedSequence(random_tokens(150, 300, seed)) for seed in range(3)] for _ in runners]
        actual, expected = (_steps(runner, work, counts) for runner, work in zip(runners, works, strict=True))
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) < RELATIVE_ERROR, counts
    hidden = torch.randn(5, plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for model in (runners[0].model, plain):
        assert torch.equal(model.largest(hidden), model.logits(hidden).argmax(-1))


@pytest.mark.parametrize("is_recorded", [True, False])
@torch.inference_mode()
def test_rows_that_nobody_wants_are_left_out_of_the_last_layer(folder: Path, is_recorded: bool) -> None:
    """Of a prompt the last row, of one all, of decoding its row, of a piece none: as if all were computed; all KV."""
    model = _load(folder) if is_recorded else load_model(folder, device=CPU, dtype=torch.float32).model
    assert isinstance(model, Decoder)
    counts, wanted = (70, 12, 1, 30), np.array([1, 12, 1, 0])
    runners = [PagedRunner(model, "paged_numba" if is_recorded else "gather_sdpa") for _ in range(2)]
    results = []
    for runner in runners:
        sequences = [PagedSequence(random_tokens(80, 512, seed)) for seed in range(4)]
        runner.step([(sequences[2], 20)])
        batch = runner.batch(list(zip(sequences, counts, strict=True)))
        some = last_rows(batch, wanted)
        assert some.rows.tolist() == [69, *range(70, 82), 82]
        batch = dataclasses.replace(batch, last=some) if runner is runners[0] else batch
        results.append(model.logits(model.forward(batch, runner.attention)[some.rows]))
        nobody = dataclasses.replace(batch, last=last_rows(batch, 0 * wanted))
        model.forward(nobody, runner.attention)
    assert relative_error(*results) < RELATIVE_ERROR
    ours, all_rows = (runner.kv.nan_to_num(5) for runner in runners)
    assert torch.equal(ours, all_rows)


def test_small_heads_are_left_to_torch(tmp_path: Path) -> None:
    """Heads of 8 elements fit no kernel of ours, so nothing is recorded, and all is computed."""
    folder = make_tiny_llama(tmp_path, hidden=32, heads=4)
    plain = load_model(folder, device=CPU, dtype=torch.float32).model
    assert isinstance(plain, Decoder)
    tokens = random_tokens(40, 512)
    actual, expected = (PagedRunner(model, "paged_numba").prefill(tokens) for model in (_load(folder), plain))
    assert relative_error(actual, expected) < RELATIVE_ERROR


@pytest.mark.parametrize("form", WeightForm)
def test_bits_of_a_sequence_are_its_own(folder: Path, form: WeightForm) -> None:
    """Decoding alone, beside seven others and beside a prompt, on one thread and on two."""
    others = [random_tokens(60, 512, seed) for seed in range(1, 8)]

    def logits(threads: int, num_others: int, prompt: bool) -> Tensor:
        runner = PagedRunner(_load(folder, threads, form), "paged_numba", 200)
        ours = PagedSequence(random_tokens(60, 512))
        beside = [PagedSequence(tokens) for tokens in others[:num_others]]
        for sequence in (ours, *beside):
            runner.step([(sequence, 40)])
        rows = [_steps(runner, [ours, *beside], [1] * (1 + num_others))[0] for _ in range(3)]
        if prompt:
            rows.append(runner.step([(PagedSequence(random_tokens(33, 512, 9)), 33), (ours, 1)])[1])
        else:
            rows.append(runner.step([(ours, 1)])[0])
        return torch.cat(rows)

    alone = logits(1, 0, False)
    for threads, num_others, prompt in ((2, 0, False), (2, 7, False), (1, 7, True), (2, 3, True)):
        assert torch.equal(logits(threads, num_others, prompt), alone), (threads, num_others, prompt)


def test_a_recording_survives_other_steps_and_another_pool(folder: Path) -> None:
    """Decoding of two sequences is recorded; then prompts use the same memory, and a second pool is computed over."""
    model, plain = _load(folder), load_model(folder, device=CPU, dtype=torch.float32).model
    assert isinstance(plain, Decoder)
    pools = [PagedRunner(model, "paged_numba"), PagedRunner(model, "paged_numba")]
    expected = PagedRunner(plain, "gather_sdpa")
    lines = [[PagedSequence(random_tokens(80, 512, seed)) for seed in range(2)] for _ in range(3)]
    for runner, sequences in zip((*pools, expected), lines, strict=True):
        _steps(runner, sequences, (20, 30))
    kept = []
    for _ in range(2):
        reference = _steps(expected, lines[2], (1, 1))
        for runner, sequences in zip(pools, lines, strict=False):
            kept.append((_steps(runner, sequences, (1, 1)), reference))
            runner.prefill(random_tokens(200, 512, 5))
    for actual, reference in kept:
        for one, other in zip(actual, reference, strict=True):
            assert relative_error(one, other) < RELATIVE_ERROR


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 7), (5, 64), (130, 100)])
def test_operations_equal_their_plain_twins(
    tiny: LoadedModel, activation: Activation, num_rows: int, size: int
) -> None:
    assert isinstance(tiny.config, ModelConfig)
    config = dataclasses.replace(tiny.config, activation=activation)
    random = torch.Generator().manual_seed(num_rows)
    hidden, added = (torch.randn(num_rows, size, generator=random) * 10 for _ in range(2))
    gate_up, weight = torch.randn(num_rows, 2 * size, generator=random) * 30, torch.randn(size, generator=random)
    plain, expected = TorchOps(config), hidden.clone()
    normed, scaled = plain.add_norm(expected, added, weight), plain.norm(added, weight)
    activated = plain.activate(gate_up)
    jobs = Jobs(team_of(2))
    fused, actual = TeamOps(config, jobs), hidden.clone()
    results = (fused.add_norm(actual, added, weight), fused.norm(added, weight), fused.activate(gate_up))
    jobs.run()
    for result, wanted in zip((actual, *results), (expected, normed, scaled, activated), strict=True):
        torch.testing.assert_close(result, wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))
    jobs = Jobs(team_of(2))
    TeamOps(config, jobs).add(actual, added)
    jobs.run()
    assert torch.equal(actual, expected + added)
