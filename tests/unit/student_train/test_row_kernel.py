"""Details of the torch sweeps that a loss would only show by luck."""

import pytest
import torch

from student_train.losses.base import PADDING_ID
from student_train.losses.row_kernel import ARGMAX_WIDTH, hide_stored, places_of, row_max


@pytest.mark.parametrize(
    "width", [1, ARGMAX_WIDTH - 1, ARGMAX_WIDTH, ARGMAX_WIDTH + 1, 5 * ARGMAX_WIDTH + 7]
)
def test_the_maximum_is_found_wherever_it_is(width: int) -> None:
    values = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    values += 100 * torch.eye(width)
    top, place = row_max(values)
    assert torch.equal(place.squeeze(-1), torch.arange(width))
    assert torch.equal(top.squeeze(-1), values.diagonal())


def test_the_maximum_of_nothing_but_minus_infinity_has_a_place() -> None:
    top, place = row_max(torch.full((2, 3 * ARGMAX_WIDTH + 1), -torch.inf))
    assert top.tolist() == [[-torch.inf]] * 2
    assert bool(((place >= 0) & (place <= 3 * ARGMAX_WIDTH)).all())


def test_a_maximum_that_is_not_a_number_is_kept() -> None:
    values = torch.zeros(1, 2 * ARGMAX_WIDTH)
    values[0, 200] = torch.nan
    assert bool(row_max(values)[0].isnan())


def test_unused_entries_share_a_used_place() -> None:
    ids = torch.tensor([[7, PADDING_ID, 3], [PADDING_ID, 5, PADDING_ID], [PADDING_ID] * 3])
    assert places_of(ids).tolist() == [[7, 7, 3], [5, 5, 5], [0, 0, 0]]


def test_only_stored_tokens_are_hidden() -> None:
    ids = torch.tensor([[2, PADDING_ID], [PADDING_ID, PADDING_ID], [0, 1]])
    logits = torch.ones(3, 4)
    hide_stored(logits, places_of(ids), ids == PADDING_ID)
    hidden = [[False, False, True, False], [False] * 4, [True, True, False, False]]
    assert torch.isneginf(logits).tolist() == hidden
