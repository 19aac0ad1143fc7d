"""What a newcomer looks for has a file that is named after it."""

from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dynaexq"
WHERE = {
    "patcher": ("hf/patcher.py", "def patch("),
    "DynaExqMoE": ("runtime/moe.py", "class DynaExqMoE"),
    "HotnessTracker": ("policy/hotness.py", "class HotnessTracker"),
    "PrecisionController": ("policy/controller.py", "class PrecisionController"),
    "SwapPipeline": ("memory/swap_pipeline.py", "class SwapPipeline"),
    "SlabPool": ("memory/slab_pool.py", "class SlabPool"),
    "int2 and int4 kernels": ("kernels/triton/dequant.py", "4-bit"),
    "auto_pause": ("policy/auto_pause.py", "class AutoPause"),
    "copy_rate_limit": ("policy/rate_limit.py", "class CopyRateLimiter"),
    "host copies": ("memory/host_store.py", "class HostStore"),
    'hbm_budget="auto"': ("planning/budget.py", "def plan_within"),
    "CUDA graphs": ("memory/graph_sync.py", "graph"),
    "plan": ("cli/plan.py", "def run("),
    "packed format": ("checkpoint/packed_format.py", "class PackedReader"),
    "calibration text": ("hf/calibration.py", "def text_windows"),
}


@pytest.mark.parametrize("thing", WHERE)
def test_a_file_name_leads_to_it(thing):
    path, text = WHERE[thing]
    assert text in (PACKAGE / path).read_text()
