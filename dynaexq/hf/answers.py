"""Methods of a model that answer differently once it is patched; what each does is known where it is made."""

from collections.abc import Callable
from typing import Any

from dynaexq.hf.captured_decode import compiled_call
from dynaexq.hf.save import push_packed, save_packed

ANSWERS: dict[str, Callable[..., Any]] = {
    "save_pretrained": save_packed,
    "push_to_hub": push_packed,
    "get_compiled_call": compiled_call,
}
"""By name, what takes their places; see `ModelPatch.attach`."""
