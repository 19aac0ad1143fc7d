"""The Triton kernels take their tiles by how many pairs there are; tests take each kind, however many there are.

The fixture `regime` in conftest.py does it, for the tests in the interpreter and for those on a GPU.
"""

import pytest

REGIMES = {"single": {}, "few": {"SINGLE_PAIRS": 0}, "many": {"SINGLE_PAIRS": 0, "FEW_PAIRS": 0}}

each_regime = pytest.mark.parametrize("regime", REGIMES, indirect=True)
