"""How much memory a device has to give."""

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that could be allocated now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "xpu":
        return int(torch.xpu.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)  # which an Apple GPU shares
