"""Records of tensors: a Cond stays aligned through every change, and its empty caption travels with
it.
"""

import pytest
import torch

from distill.core.types import Batch, Cond


def make_cond(n: int, *, first: int = 0) -> Cond:
    """Sample i holds the number first + i everywhere; the null holds -1."""

    def fill(values: torch.Tensor, null: Cond | None) -> Cond:
        column = values.float()[:, None]
        return Cond(
            tokens=column[..., None].expand(-1, 3, 4),
            pooled=column.expand(-1, 2),
            mask=torch.ones(len(values), 3, dtype=torch.bool),
            extra=column.expand(-1, 6),
            null=null,
        )

    return fill(torch.arange(first, first + n), fill(torch.tensor([-1]), None))


def samples(cond: Cond) -> list[float]:
    """The number each sample holds, after checking that all its tensors agree on it."""
    assert cond.pooled is not None
    assert cond.extra is not None
    assert cond.mask is not None
    assert cond.mask.dtype == torch.bool
    assert cond.mask.shape == cond.tokens.shape[:2]
    numbers = cond.tokens[:, 0, 0]
    assert torch.equal(cond.tokens, numbers[:, None, None].expand_as(cond.tokens))
    assert torch.equal(cond.pooled, numbers[:, None].expand_as(cond.pooled))
    assert torch.equal(cond.extra, numbers[:, None].expand_as(cond.extra))
    return numbers.tolist()


def test_length_is_batch_size():
    assert len(make_cond(5)) == 5


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(1, 3), [1, 2]),
        (torch.tensor([3, 0, 3]), [3, 0, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
    ],
)
def test_index_picks_samples_and_keeps_null(index, expected):
    cond = make_cond(4)
    picked = cond.index(index)
    assert samples(picked) == expected
    assert picked.null is cond.null


def test_unconditional_has_the_same_size_and_can_be_joined():
    cond = make_cond(3)
    empty = cond.unconditional()
    assert samples(empty) == samples(empty.unconditional()) == [-1, -1, -1]
    both = Cond.cat([cond, empty])
    assert samples(both) == [0, 1, 2, -1, -1, -1]
    assert samples(both.unconditional()) == [-1] * 6


def test_unconditional_without_null_says_what_to_do():
    with pytest.raises(ValueError, match="null="):
        Cond(torch.zeros(2, 3, 4)).unconditional()


def test_cat_joins_in_order_and_leaves_absent_fields_absent():
    assert samples(Cond.cat([make_cond(2), make_cond(1, first=9)])) == [0, 1, 9]
    bare = Cond.cat([Cond(torch.zeros(2, 3, 4)), Cond(torch.ones(1, 3, 4))])
    assert bare.pooled is bare.mask is bare.extra is bare.null is None
    assert bare.tokens[:, 0, 0].tolist() == [0, 0, 1]


def test_cat_refuses_a_field_that_only_some_have():
    with pytest.raises(ValueError, match="1 of 2 Conds have 'pooled'"):
        Cond.cat([Cond(torch.zeros(1, 3, 4), torch.zeros(1, 2)), Cond(torch.zeros(1, 3, 4))])
    with pytest.raises(ValueError, match="empty list"):
        Cond.cat([])


@pytest.mark.parametrize(
    "arguments", [(torch.bfloat16,), ("cpu", torch.bfloat16), (torch.zeros(1).bfloat16(),)]
)
def test_to_changes_floats_only_and_reaches_the_null(arguments):
    cond = make_cond(2).to(*arguments)
    assert cond.null is not None
    for record in (cond, cond.null):
        assert record.tokens.dtype == record.pooled.dtype == record.extra.dtype == torch.bfloat16
        assert record.mask.dtype == torch.bool
    assert samples(cond) == [0, 1]


def test_to_moves_every_tensor():
    cond = make_cond(2).to(device="meta", non_blocking=True)
    assert {
        x.device.type for x in (cond.tokens, cond.pooled, cond.mask, cond.extra, cond.null.mask)
    } == {"meta"}
    assert cond.mask.dtype == torch.bool


def test_misaligned_records_are_refused():
    with pytest.raises(ValueError, match="'pooled': 3"):
        Cond(torch.zeros(2, 3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="got batch size 2"):
        Cond(torch.zeros(1, 3, 4), null=Cond(torch.zeros(2, 3, 4)))
    with pytest.raises(ValueError, match="2 latents has 1 captions"):
        Batch(torch.zeros(2, 4, 8, 8), ("a circle",), make_cond(2))
    with pytest.raises(ValueError, match="and 3 Conds"):
        Batch(torch.zeros(2, 4, 8, 8), ("a circle", "a square"), make_cond(3))


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        make_cond(1).tokens = torch.zeros(1, 3, 4)  # type: ignore[misc]
