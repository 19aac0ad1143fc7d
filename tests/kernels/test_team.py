"""Threads for the kernel: all of them, fewer while others use the cores, all again when those have gone."""

import pytest
import torch

from dynaexq.kernels.cpu.team import GOOD_SECONDS, LONGEST_PAUSE, PAUSE, Team


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def contend(team: Team, calls: int = 8) -> None:
    for _ in range(calls):
        team.observe(0.016, 0.012)


@pytest.mark.parametrize(("available", "sizes"), [(2, [1]), (16, [12, 9, 7]), (1, [1])])
def test_a_team_that_waits_most_of_its_time_shrinks(available: int, sizes: list[int]) -> None:
    team = Team(lambda: available, Clock())
    assert team.size == available
    for size in sizes:
        team.observe(0.016, 0.014)
        assert team.size == size
    assert ("other programs" in str(team)) == (available > 1)


def test_short_waits_are_no_reason() -> None:
    team = Team(lambda: 2, Clock())
    for _ in range(1000):
        team.observe(0.0001, 0.00009)  # threads that begin late, in layers that take no time
        team.observe(0.01, 0.004)
    assert team.size == 2
    assert str(team) == "2 of 2"


def test_one_pause_is_no_program_that_wants_the_core() -> None:
    team = Team(lambda: 2, Clock())
    for call in range(1000):
        pause = 0.006 if call % 100 == 50 else 0.0
        team.observe(0.0005 + pause, pause)
        assert team.size == 2


def test_all_threads_are_tried_again_after_growing_pauses_and_soon_once_all_is_well() -> None:
    clock = Clock()
    team = Team(lambda: 2, clock)
    pauses = []
    for _ in range(9):
        contend(team, 1)
        start = clock.now
        while team.size == 1:
            clock.now += PAUSE
        pauses.append(clock.now - start)
    assert pauses == [0.25, 0.5, 1, 2, 4, 8, *[LONGEST_PAUSE] * 3]
    for _ in range(int(GOOD_SECONDS / 0.001) + 2):
        team.observe(0.001, 0.0)
    contend(team, 1)
    clock.now += PAUSE
    assert team.size == 2


def test_what_pytorch_is_told_holds() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert Team().size == 1
    finally:
        torch.set_num_threads(before)
