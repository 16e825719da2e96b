"""What ranks tell each other, and when: gradients averaged during the backward pass, and networks
that FSDP2 shards. Two gloo processes run `communication_worker.py` once for all tests.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from distill.core.limits import check_reduction
from distill.training.averaging import start_averaging
from distill.training.launch import _free_port

ENCODER = 6  # units up to the end of the middle block; the rest of the network is gathered as one
ALL = 12


@pytest.fixture(scope="module")
def seen(forks, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    started = [
        forks.begin(
            "communication_worker:main",
            str(folder),
            environment={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank)},
            err=folder / f"said_{rank}.txt",
        )
        for rank in (0, 1)
    ]
    for process in started:
        assert process.wait(timeout=240) == 0, process.said()[-3000:]
    return [json.loads((folder / f"{r}.json").read_text(encoding="utf-8")) for r in (0, 1)]


# -- gradients averaged ----------------------------------------------------------------------------


def test_each_gradient_is_the_mean_over_ranks(seen):
    for saw in seen:
        found = saw["averaged"]
        assert all(found[name] for name in ("first", "second", "accumulated", "one rank alone"))
        assert saw["otherwise"]["exact"]
        assert saw["otherwise"]["unstarted"]
        assert found["never"], "what no rank uses has no gradient"


def test_sums_begin_while_the_backward_pass_still_runs(seen):
    """In the first update the ranks learn what is used. Later five of six sums have begun before
    the first layer has its gradient, and all at the end of the pass."""
    for saw in seen:
        found = saw["averaged"]
        assert found["before the first layer"] == [0, 5, 0, 5, 5]
        assert found["asked first"] == [0]
        assert found["then"] == [6]
        assert saw["otherwise"]["exact passes"] == [6], "known heads need no first update"


def test_only_the_last_micro_batch_communicates(seen):
    for saw in seen:
        assert saw["averaged"]["accumulated passes"] == [0, 6]
        # the last two ask for layers that no pass has used yet
        sums = ["allreduce_"] * 6
        assert saw["averaged"]["sums of two micro-batches"] == [*sums, "allreduce_", "broadcast_"]
        assert saw["otherwise"]["exact sums"] == sums


def test_gradients_become_views_of_what_was_summed(seen):
    """So there is no second copy of all, and fused optimisers find the strides of the weights."""
    for saw in seen:
        assert saw["averaged"]["buffers"] == 6
        assert saw["averaged"]["strides"]


def test_a_sum_in_bfloat16_is_rounded_and_leaves_float32(seen):
    for saw in seen:
        assert saw["otherwise"]["bfloat16"]
        assert saw["otherwise"]["rounded"]
        assert saw["otherwise"]["dtypes"] == ["torch.float32"]


def test_a_gradient_of_a_head_that_was_not_drawn_is_no_silent_difference(seen):
    for saw in seen:
        assert "same_heads=False" in saw["otherwise"]["beyond"]


@pytest.mark.parametrize(
    "given", [("float16", 25.0), ("float64", 25.0), ("float32", 0), ("float32", "many")]
)
def test_other_sums_are_refused(given):
    with pytest.raises(ValueError, match=r"trainer\.strategy\.(reduce_dtype|bucket_mib)="):
        check_reduction(*given)


# -- heads of a pool -------------------------------------------------------------------------------


def started(method: Any, draws: list[Any]) -> list[tuple[list[Any], bool]]:
    """The parameters that are averaged during the next backward pass of the discriminator."""
    calls: list[tuple[list[Any], bool]] = []

    class Strategy:
        def start_averaging(self, parameters, *, exact=False):
            calls.append((list(parameters), exact))

    method = SimpleNamespace(
        heads=method.heads,
        same_heads=method.same_heads,
        trainer=SimpleNamespace(strategy=Strategy()),
    )
    start_averaging(method, [method.heads], draws)
    return calls


@pytest.mark.parametrize("mixed", [False, True])
def test_drawn_heads_are_known_before_the_backward_pass(mixed):
    method = tiny.nitrofusion(tiny.Toy(), options={"mixed": mixed})
    batch = tiny.simple_batch(method, 4)
    draws, sample = tiny.drawn(method, batch)
    losses = method.discriminator_loss(batch, draws, sample)
    ((parameters, exact),) = started(method, [draws])
    sum(losses.terms.values()).backward()
    with_gradient = {p for p in method.heads.parameters() if p.grad is not None}
    assert exact
    assert set(parameters) == with_gradient
    assert len(parameters) == len(with_gradient)
    assert len(parameters) < len(list(method.heads.parameters()))


def test_every_rank_draws_the_same_heads_and_levels():
    method = tiny.nitrofusion(tiny.Toy(), options={"mixed": True})
    batch = tiny.simple_batch(method, 4)
    one, other = (method.draw(batch, method.loop.streams(method, micro)) for micro in (0, 1))
    assert torch.equal(one.t, other.t)
    assert one.critic.head_of == other.critic.head_of
    assert not torch.equal(one.noise, other.noise)


def test_heads_that_are_all_used_are_averaged_as_they_are():
    method = tiny.ladd(tiny.Toy())
    draws, _ = tiny.drawn(method, tiny.simple_batch(method))
    assert started(method, [draws, draws]) == [(list(method.heads.parameters()), False)]


def test_nothing_is_assumed_where_ranks_may_run_other_heads():
    """LADD draws a noise level for each sample, so ranks run heads of different levels."""
    method = tiny.nitrofusion(tiny.Toy())
    method.same_heads = False
    draws, _ = tiny.drawn(method, tiny.simple_batch(method))
    assert started(method, [draws]) == []


# -- networks sharded ------------------------------------------------------------------------------


def test_units_are_blocks_and_not_whole_stages(seen):
    found = seen[0]["units"]
    assert len(found) == ALL
    assert "mid_block.resnets.0" in found
    assert "mid_block.attentions.0.transformer_blocks.0" in found
    assert not {"down_blocks.0", "up_blocks.1", "down_blocks.0.attentions.0"} & set(found)


@pytest.mark.parametrize("first", ["features first", "whole first"])
def test_a_pass_that_stops_early_leaves_a_right_network(first, seen):
    """Maps, their gradient, and a whole pass after it."""
    for saw in seen:
        assert all(saw[first][name] for name in ("maps", "gradient", "x0", "freed"))


def test_a_pass_that_stops_early_gathers_what_it_runs(seen):
    """And one unit more where an earlier pass went further: that after the last tap."""
    for saw in seen:
        short, whole = saw["features first"], saw["whole first"]
        assert whole["whole"] == 1 + ALL
        assert (short["features"], short["again"]) == (1 + ENCODER, 1 + ENCODER)
        assert (whole["features"], whole["again"]) == (2 + ENCODER, 2 + ENCODER)
        assert short["backward"] == whole["backward"] == 1 + ENCODER


def test_the_last_unit_waits_for_the_backward_pass_and_only_for_that(seen):
    for saw in seen:
        found = saw["trained"]
        assert found["kept"] == ["up_blocks.1.attentions.1"]
        assert found["gradients"]
        assert found["freed after backward"]
        assert found["new weights"], "a pass without gradient would have kept the old ones"


def test_weights_gathered_in_bfloat16_round_as_autocast_does(seen):
    for saw in seen:
        found = saw["bfloat16"]
        assert 0 < found["gathered"] < 1.5 * found["usual"] < 0.05
        assert found["shards"] == ["torch.float32"]
