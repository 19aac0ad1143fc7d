"""A model on the meta device, from its configuration alone: every shape and dtype, and not a byte of weights.

No weights are looked for, and no code that a checkpoint may bring with it is run.
"""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dynaexq.checkpoint.hub_files import first_line, is_repository
from dynaexq.errors import CheckpointError, UnsupportedModelError

UNPACKING = ", or pack it first: `dynaexq quantize` takes those of FP8, MXFP4, GPTQ, AWQ and compressed-tensors"


def meta_model(source: Path, unpacked: Collection[str] = ()) -> Any:
    """The model of a 16-bit checkpoint directory.

    Args:
        unpacked: methods of quantization whose codes the caller makes 16-bit weights of.

    Raises:
        CheckpointError: there is no configuration, or the checkpoint is quantized by another method.
        UnsupportedModelError: no model can be built from it.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(f"expected a checkpoint directory with a config.json, found none in {source}")
    config = read_config(source)
    refuse_quantized(source, quantization_of(config).get("quant_method"), unpacked)
    return build_meta_model(config)


def refuse_quantized(source: Path, method: Any, unpacked: Collection[str]) -> None:
    """Raise a CheckpointError if the checkpoint is quantized by a method that is not among `unpacked`."""
    if method is None or method in unpacked:
        return
    raise CheckpointError(
        f"{source} is quantized already (quant_method={str(method)!r}), and its packing cannot be taken over exactly; "
        "give the 16-bit checkpoint it was made from" + UNPACKING
    )


def read_config(source: Path) -> Any:
    """The configuration at `source`: a directory, a config.json, or the name of a repository on the Hub.

    Raises:
        CheckpointError: it is missing, or Transformers cannot read it.
    """
    if not source.exists() and (source.suffix == ".json" or not is_repository(source)):
        raise CheckpointError(f"expected a checkpoint directory or a config.json, found nothing at {source}")
    if source.is_dir() and not (source / "config.json").is_file():
        raise CheckpointError(f"expected a checkpoint directory with a config.json, found none in {source}")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever the configuration of whatever family makes of what is written there
        raise CheckpointError(f"cannot read the configuration of {source}: {first_line(error)}") from error


def quantization_of(config: Any) -> dict[str, Any]:
    """How the weights that belong to `config` are quantized, as config.json has it; empty for 16 bit."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return {}
    return dict(quantized if isinstance(quantized, dict) else quantized.to_dict())


def build_meta_model(config: Any) -> Any:
    """The model that `config` describes, ready to infer.

    Raises:
        UnsupportedModelError: Transformers cannot build it.
    """
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    dtype = config.dtype or torch.bfloat16
    try:
        with torch.device("meta"):
            if model_class is None:
                return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            return model_class._from_config(config, dtype=dtype).eval()
    except Exception as error:  # as above
        raise UnsupportedModelError(
            f"cannot build a {name or config.model_type} from its configuration: {first_line(error)}"
        ) from error


def meta_twin(model: PreTrainedModel) -> Any:
    """A twin of a model that is loaded already; the model is left alone."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype).eval()
