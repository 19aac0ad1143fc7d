"""dynaexq quantize: what a directory holds once it is written."""

import json
from pathlib import Path
from typing import Any


def figures(directory: Path) -> dict[str, Any]:
    """The options that a checkpoint keeps, and the bytes of its weights, for JSON."""
    kept = json.loads((directory / "config.json").read_text())["quantization_config"]
    sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
    return {"directory": str(directory), "weights": sum(sizes), "files": len(sizes), "options": kept}
