"""A patched model as a checkpoint: dense weights as Transformers saves them, packed experts beside them, one index.

Loaded without dynaexq, such a directory would give a model whose experts are random. A guard prevents it: under the
name of every expert parameter stands a tensor of a shape that no model has, which any loader refuses, and a key in
its report says why. dynaexq itself hides the experts from the loader and never meets the guard.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from dynaexq.checkpoint import (
    FORMAT_VERSION,
    INDEX,
    PackedWriter,
    Shard,
    ShardWriter,
    read_index,
    replaced,
    write_index,
)
from dynaexq.errors import CheckpointError, PatchError
from dynaexq.hf.compat import is_distributed
from dynaexq.hf.config import DynaExqConfig
from dynaexq.hf.discovery import SparseLayer
from dynaexq.hf.hub import upload
from dynaexq.hf.load import GUARD
from dynaexq.hf.model_card import CARD, may_be_written, model_card
from dynaexq.hf.model_patch import ModelPatch, by_transformers
from dynaexq.hf.packed_dense import PackedDense
from dynaexq.quantization import ExpertCodec
from dynaexq.settings import DENSE_FORMATS, parse_bytes
from dynaexq.weights.packed_experts import packed_shape

HUB_OPTIONS = (
    *("repo_id", "tags", "private", "token", "revision"),
    *("commit_message", "commit_description", "create_pr"),
)
"""Arguments of `save_pretrained` that are for the Hub alone."""

_DENSE = "model-dense.safetensors"
_GUARD_FILE = "dynaexq-guard.safetensors"
SHARD_METADATA = {"format": "pt", "dynaexq_format_version": str(FORMAT_VERSION)}


def save_packed(
    patch: ModelPatch,
    save_directory: str | Path,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    **kwargs: Any,
) -> None:
    """Save a patched model: what `model.save_pretrained(save_directory)` does; arguments as in Transformers.

    The directory appears complete, or stays as it was; with `push_to_hub`, its files are uploaded then, and a card
    says what they are.

    Raises:
        PatchError: `variant` was asked for, or the model is spread over ranks.
        CheckpointError: the directory cannot be written, or holds weights that are no packed checkpoint.
    """
    model: Any = patch.model
    if getattr(model, "_hf_peft_config_loaded", False):  # adapters only
        by_transformers(patch, "save_pretrained", save_directory, is_main_process, push_to_hub=push_to_hub, **kwargs)
        return
    if variant is not None:
        raise PatchError(f"a packed checkpoint has no variants; leave out variant={variant!r}")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise PatchError(
            "adapters are attached to the model; save them with save_pretrained of the PeftModel, or merge them first"
        )
    if is_distributed(model):
        raise PatchError("the model is spread over ranks, and none has all of it; load it in one process to save it")
    if not is_main_process:
        return
    to_hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    repo_id, tags = to_hub.pop("repo_id", None), to_hub.pop("tags", None) or ()
    if push_to_hub and repo_id is None:
        repo_id = Path(save_directory).absolute().name
    homes = patch.homes()
    refuse_foreign_weights(Path(save_directory))
    codec: ExpertCodec = homes[0][1].codec
    config: DynaExqConfig = model.hf_quantizer.quantization_config
    dense, head = _dense_format(model.hf_quantizer.wrapped), _head_format(model.hf_quantizer.wrapped)
    shard_size = parse_bytes(max_shard_size, "max_shard_size")
    layers = [layer for layer, _, _ in homes]
    shape = packed_shape(codec, tuple(layer.name for layer in layers), layers[0].num_experts)
    with replaced(save_directory, nbytes=shape.nbytes) as staging:
        stored = packed_config(config, codec, homes[0][1].plan.budget, dense, head)
        with _configured(model, stored):
            by_transformers(patch, "save_pretrained", staging, max_shard_size=max_shard_size, **kwargs)
        writer = PackedWriter(staging, shape, shard_size, SHARD_METADATA)
        try:
            for number, (_, runtime, local) in enumerate(homes):
                for expert, (base, upgrade, errors) in enumerate(runtime.stored.packed(local)):
                    writer.write(number, expert, base, upgrade, errors)
            files = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        write_index(staging, dense_files(staging) | files | write_guard(staging, layers))
        if may_be_written(Path(save_directory)):
            model_card(type(model).__name__, model.name_or_path, stored, repo_id, tags).save(staging / CARD)
        others = [path.name for path in staging.iterdir() if path.suffix != ".safetensors"]
    if push_to_hub:  # in a directory that was there, shards have got names of their own
        upload(save_directory, {*others, *read_index(Path(save_directory)).values()}, repo_id, **to_hub)


def push_packed(
    patch: ModelPatch, repo_id: str, *, max_shard_size: int | str | None = "50GB", tags: Any = None, **to_hub: Any
) -> str:
    """Upload a patched model: what `model.push_to_hub(repo_id)` does; arguments and result as in Transformers.

    Raises as `save_packed` does.
    """
    model: Any = patch.model
    if getattr(model, "_hf_peft_config_loaded", False):  # adapters only
        return str(by_transformers(patch, "push_to_hub", repo_id, tags=tags, **to_hub))
    own_tags = [tags] if isinstance(tags, str) else list(tags or ())
    with TemporaryDirectory() as directory:
        tags = [*(model.model_tags or ()), *own_tags]
        save_packed(patch, directory, max_shard_size=max_shard_size or "50GB", repo_id=repo_id, tags=tags)
        return upload(directory, (path.name for path in Path(directory).iterdir()), repo_id, **to_hub)


def packed_config(
    config: DynaExqConfig,
    codec: ExpertCodec,
    budget: int | None,
    dense: str | None = None,
    head: str | None = None,
    made_from: str | None = None,
) -> DynaExqConfig:
    """`config` as a packed checkpoint keeps it: with its tiers, the format of dense weights and the last budget.

    Args:
        made_from: how the source was quantized, if it was not in 16 bit.
    """
    options = config.named_options() | {"tiers": codec.tiers} | ({"hbm_budget": budget} if budget else {})
    packed = {
        "format_version": FORMAT_VERSION,
        "tiers": list(codec.tiers),
        "dtype": str(codec.dtype).removeprefix("torch."),
        "group_size": options.pop("group_size", 64),
        "quantizer": options.pop("quantizer", "als"),
        "scale_bits": codec.form.bits,
    }
    options.pop("scale_bits", None)
    made_from = made_from or (config.packed or {}).get("made_from")
    if made_from is not None:
        packed["made_from"] = made_from
    options.pop("dense", None)
    if dense is not None:
        packed["dense"] = options["dense"] = dense
    if dense in DENSE_FORMATS:
        options.pop("head", None)
        packed["head"] = head
    return DynaExqConfig(packed=packed, **options)


def refuse_foreign_weights(directory: Path) -> None:
    """Raise a CheckpointError rather than replace weights that are not a packed checkpoint of ours."""
    found = [name for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (directory / name).exists()]
    if found or ((directory / INDEX).exists() and GUARD not in read_index(directory)):
        raise CheckpointError(
            f"{directory} holds another model ({found[0] if found else INDEX}), which could not be loaded any more; "
            "choose another directory, or move it away first"
        )


def dense_files(directory: Path) -> dict[str, str]:
    """The file of every dense tensor, as Transformers saved them in `directory`."""
    if (directory / INDEX).is_file():
        return read_index(directory)
    # Under its usual name it would be taken for the whole checkpoint.
    (directory / SAFE_WEIGHTS_NAME).rename(directory / _DENSE)
    shard = Shard(directory / _DENSE)
    shard.close()
    return dict.fromkeys(shard.entries, _DENSE)


def write_guard(directory: Path, layers: list[SparseLayer]) -> dict[str, str]:
    """Write the guard against loading without dynaexq; returns the file of its tensors."""
    names = [GUARD] + [f"{layer.name}.{name}" for layer in layers for name in layer.parameter_names]
    writer = ShardWriter(directory / _GUARD_FILE, dict.fromkeys(names, (torch.float32, (1,))), SHARD_METADATA)
    for name in names:
        writer.write(name, 0, torch.zeros(1))
    writer.close()
    return dict.fromkeys(names, _GUARD_FILE)


def _head_format(wrapped: Any) -> str | None:
    """The least precision of a packed head; None where dense weights are not packed in our own formats."""
    return wrapped.quantization_config.head if isinstance(wrapped, PackedDense) else None


def _dense_format(wrapped: Any) -> str | None:
    """What the dense weights of a model are stored as, in the words of `Settings.dense`."""
    if wrapped is None:
        return None
    if isinstance(wrapped, PackedDense):
        return str(wrapped.quantization_config.tier)
    method = getattr(wrapped.quantization_config, "quantization_method", lambda: None)()
    if method in ("nf4", "fp4"):
        return "bnb-4bit"
    if method == "llm_int8":
        return "bnb-8bit"
    raise PatchError(
        f"the dense weights were quantized by {type(wrapped).__name__}, and can be saved with packed experts only in "
        "16 bits or by bitsandbytes; patch a model whose dense weights are"
    )


@contextmanager
def _configured(model: Any, config: DynaExqConfig) -> Iterator[None]:
    """Give the model's configuration `config` for as long as it is written down."""
    missing = object()
    before = getattr(model.config, "quantization_config", missing)
    model.config.quantization_config = config
    try:
        yield
    finally:
        if before is missing:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before
