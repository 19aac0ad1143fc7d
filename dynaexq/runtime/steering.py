"""Carries out what control decides: it knows both who should be upgraded and where upgrades live, and moves them."""

import numpy as np

from dynaexq.memory import SwapPipeline
from dynaexq.policy.controller import ControlLoop


class Steering:
    """Joins one runtime's `ControlLoop` to its pipeline and pool. One thread at a time steers."""

    def __init__(self, control: ControlLoop, pipeline: SwapPipeline):
        self.control, self.pipeline, self.pool = control, pipeline, pipeline.pool

    def decide(self, frozen: bool) -> None:
        """Begin the moves of one tick. Never waits."""
        pipeline, pool = self.pipeline, self.pool
        pool.reclaim()
        moves = self.control.decide(pipeline.upgraded, pipeline.broken, pool.num_slots, pool.num_available, frozen)
        if pipeline.failing:
            moves = [move for move in moves if move.promote]
        self.control.limit.spend(sum(pipeline.submit(move) and move.promote for move in moves))
        pipeline.settle()

    def fill(self) -> None:
        """Give every free slot to the best expert that lacks one, and wait for it."""
        pipeline, pool, control = self.pipeline, self.pool, self.control
        promotions = control.controller.fill(
            control.tracker.hotness, pipeline.upgraded, pipeline.broken, pool.num_slots, pool.num_available
        )
        for promotion in promotions:
            pipeline.submit(promotion)
        pipeline.drain()

    def choose_anew(self) -> None:
        """Put the best experts into the slots, whoever holds them now; waits for copies and for readers."""
        pipeline, control = self.pipeline, self.control
        nobody = np.zeros_like(pipeline.upgraded)
        wanted = control.controller.followed(control.tracker.hotness, nobody, pipeline.broken, self.pool.num_slots)
        pipeline.keep(wanted)
        self.fill()

    def resize(self, num_slots: int) -> None:
        """Bring the slab to `num_slots`, dropping the segments of least worth; never above the old or the new."""
        pool, control = self.pool, self.control
        surplus = pool.surplus(num_slots, self.pipeline.worth(control.controller.score(control.tracker.hotness)))
        if surplus:
            self.pipeline.vacate(surplus)
            pool.drop(surplus)
        if num_slots > pool.num_slots:
            pool.grow(num_slots - pool.num_slots)
