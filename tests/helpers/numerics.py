"""Comparison of a fast result with a slow one, by the size of the error and not entry by entry."""

import torch
from torch import Tensor

WORST = 5  # coordinates named in a message


def assert_close(name: str, reference: Tensor, got: Tensor, ratio: float) -> None:
    """Assert that the RMS of the error is at most `ratio` times the RMS of `reference`; 0 asks for the same bits."""
    assert got.shape == reference.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    assert got.dtype == reference.dtype, f"{name}: {got.dtype}, expected {reference.dtype}"
    assert got.isfinite().all(), f"{name}: not finite at {_named(~got.isfinite(), got, reference)}"
    error = (got.double() - reference.double()).abs()
    found = float(error.norm())
    allowed = ratio * float(reference.double().norm())
    assert found <= allowed, (
        f"{name}: error {found:.3g}, allowed {allowed:.3g} ({ratio:.2g} of the reference); "
        f"worst at {_named(error, got, reference)}"
    )


def _named(badness: Tensor, got: Tensor, reference: Tensor) -> str:
    worst = badness.double().flatten().topk(min(WORST, badness.numel())).indices
    places = zip(*torch.unravel_index(worst, badness.shape), strict=True)
    return ", ".join(
        f"{tuple(map(int, place))} got {float(got[place]):.6g} for {float(reference[place]):.6g}" for place in places
    )
