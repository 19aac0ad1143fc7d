"""dynaexq serve: from options of the command line to those of the server, and where hotness is kept."""

import re
import socket
import zlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dynaexq.checkpoint import QUANT_METHOD
from dynaexq.errors import CheckpointError, SettingsError
from dynaexq.hf.config import DynaExqConfig
from dynaexq.kernels.cpu.cache import cache_directory
from dynaexq.server.app import ServerOptions, serve


def start(model: str, options: dict[str, Any], hotness: str, **server: Any) -> None:
    """Serve `model`; see `server.app.serve`.

    Args:
        options: of dynaexq, None where they were not named; a checkpoint that knows its own needs none.
        hotness: a path, `"auto"` for one of this model's own in the cache directory, or `"none"`.

    Raises:
        SettingsError: the port is taken; said before the model is loaded.
        CheckpointError: there is no such directory, or it cannot be served.
    """
    _check_free(server["host"], server["port"])
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise CheckpointError(f"expected a checkpoint directory or a name on the Hub, and there is no {model}")
    named = {name: value for name, value in options.items() if value is not None}
    config = None
    if named or not _knows_its_options(model):
        config = DynaExqConfig(**named, max_context=server["max_context"], max_batch=server["max_batch"])
    path = {"auto": default_hotness(model), "none": None}.get(hotness, Path(hotness))
    serve(ServerOptions(model, config, path, **server))


def default_hotness(model: str) -> Path:
    """A file of this model's own in the cache directory."""
    full = str(Path(model).resolve()) if Path(model).exists() else model
    name = re.sub(r"[^\w.-]+", "-", Path(model).name)
    return cache_directory() / "hotness" / f"{name}-{zlib.crc32(full.encode()):08x}.safetensors"


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise SettingsError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error


def _knows_its_options(model: str) -> bool:
    """Whether a checkpoint says itself that it is dynaexq's, packed or annotated."""
    found, _ = PreTrainedConfig.get_config_dict(model)
    return (found.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD
