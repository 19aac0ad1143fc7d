"""Codes in and out of 32-bit words. It knows one layout and neither scales nor experts.

A *plane* holds `bits` of every code of a matrix [N, K]. Along K the codes are cut into blocks of 256, 128 or 64. A
block of B codes takes W = B * bits / 32 words; seen as 2W half-words of 16 bits, half-word `h` holds the codes

    k = h, 2W + h, 4W + h, ...     at bits 0, bits, 2 * bits, ...

so that neighboring codes share a word and one shift and one mask-or turn a word into two 16-bit floats, on a GPU
as on a CPU. Words are little-endian.
"""

import torch
from torch import Tensor


def pack_plane(codes: Tensor, bits: int, block: int) -> Tensor:
    """Pack uint8 codes `[..., K]` below `2**bits` into int32 words `[..., K * bits / 32]`."""
    *rows, columns = codes.shape
    per_half_word = 16 // bits
    planes = codes.to(torch.int32).view(*rows, columns // block, per_half_word, block // per_half_word)
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=codes.device)[:, None]
    half_words = (planes << shifts).sum(-2, dtype=torch.int32).to(torch.int16)
    return half_words.view(*rows, columns // per_half_word).view(torch.int32)


def unpack_plane(words: Tensor, bits: int, block: int) -> Tensor:
    """The codes of `pack_plane` again, int16 `[..., K]`, from int32 words `[..., K * bits / 32]`."""
    half_words = words.view(torch.int16)
    *rows, length = half_words.shape
    per_half_word = 16 // bits
    columns = length * per_half_word
    blocks = half_words.view(*rows, columns // block, 1, block // per_half_word)
    shifts = torch.arange(0, 16, bits, dtype=torch.int16, device=words.device)[:, None]
    return ((blocks >> shifts) & (2**bits - 1)).view(*rows, columns)
