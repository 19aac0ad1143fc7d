"""Figures of machines that planning takes for granted; where a figure is assumed and not measured, it says so."""

CARDS = {
    "8 GB": 8188 * 2**20,
    "12 GB": 12282 * 2**20,
    "16 GB": 16376 * 2**20,
    "24 GB": 24564 * 2**20,
    "32 GB": 32607 * 2**20,
    "48 GB": 49140 * 2**20,
    "80 GB": 81559 * 2**20,
    "96 GB": 97887 * 2**20,
    "141 GB": 143771 * 2**20,
}
"""Bytes that the driver reports for a card sold under that size; cards of one size differ by a few per cent."""

DRIVER_BYTES = 768 * 2**20
"""Of a card, what the driver and the CUDA context of one process take. Assumed: it varies with card and driver."""

DISK_RATE = 2_000_000_000
"""Bytes per second read from a disk. Assumed: a slow NVMe drive."""

ENCODE_RATE = {"als": 20_000_000, "rtn": 75_000_000}
"""Weights per second that one CPU core quantizes, by quantizer: the least of what `benchmarks/layers/encode_speed.py`
measured on an AMD EPYC, over the experts of two models at four pairs of tiers. More cores or a GPU are not in it."""
