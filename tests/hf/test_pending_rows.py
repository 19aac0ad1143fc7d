"""Rows that are computed when somebody looks."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynaexq.hf.pending_rows import PendingRows, computed

LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "an operator": lambda rows: rows + 1,
    "an operator on a list": lambda rows: torch.cat([rows, rows]),
    "a keyword": lambda rows: torch.add(input=rows, other=rows),
    "a method": lambda rows: rows.sum(),
    "in place": lambda rows: rows.mul_(2),
    "an attribute": lambda rows: rows.shape,
    "an index": lambda rows: rows[0, 0],
    "a scalar": lambda rows: float(rows[0, 0, 0]),
    "a list": lambda rows: rows.tolist(),
    "an array": lambda rows: rows.numpy(),
    "its address": lambda rows: rows.data_ptr(),
    "its words": repr,
    "a copy": copy.deepcopy,
    "a pickle": pickle.dumps,
    "a loop": list,
}


def pending() -> tuple[PendingRows, list[int]]:
    memory, calls = torch.empty(1, 2, 3), list[int]()

    def work() -> None:
        if not calls:
            memory.copy_(torch.arange(6).view(1, 2, 3))
        calls.append(1)

    return PendingRows.of(memory, work), calls


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_every_look_finds_them_computed(look):
    rows, calls = pending()
    assert not calls
    found = look(rows)
    assert calls
    expected = look(torch.arange(6).float().view(1, 2, 3)) if look is not LOOKS["its address"] else found
    if isinstance(found, Tensor):
        assert type(found) is Tensor
        assert torch.equal(found, expected)
    elif look in (repr, list, LOOKS["a list"], LOOKS["a scalar"], LOOKS["an attribute"]):
        assert str(found) == str(expected)


def test_they_are_a_tensor_that_nobody_has_looked_at_yet():
    rows, calls = pending()
    assert isinstance(rows, Tensor)
    assert type(rows) is PendingRows
    assert not calls
    assert computed(rows).tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert type(computed(rows)) is Tensor
    assert computed(plain := torch.ones(1)) is plain
