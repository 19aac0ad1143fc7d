"""Experts on their way: from 16 bit or a packed checkpoint to blocks, and back."""
