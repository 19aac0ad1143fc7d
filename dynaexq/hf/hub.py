"""Checkpoints from the Hugging Face Hub, and packed ones on their way to it. All of it is done by huggingface_hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from dynaexq.checkpoint.hub_files import NOT_FETCHED, first_line, is_repository
from dynaexq.errors import CheckpointError, SettingsError
from dynaexq.hf.model_card import CARD

OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "*.tflite")
"""Files of a repository that no checkpoint here is read from."""


def checkpoint_directory(source: str | Path, revision: str | None = None, subfolder: str = "") -> Path:
    """The directory of a checkpoint: `source` itself, or a copy of that repository in the cache of the Hub.

    Args:
        revision, subfolder: as in `from_pretrained`.

    Raises:
        CheckpointError: there is no such directory and no such repository, or it cannot be reached.
        SettingsError: a revision of a directory.
    """
    directory = Path(source)
    if directory.exists() or not is_repository(directory):
        if revision is not None:
            raise SettingsError(f"revision={revision!r} is for repositories on the Hub, and {source} is none")
        return directory / subfolder
    wanted = f"{subfolder}/*" if subfolder else None
    try:
        copy = snapshot_download(
            directory.as_posix(), revision=revision, allow_patterns=wanted, ignore_patterns=list(OTHER_FORMATS)
        )
    except NOT_FETCHED as error:
        raise CheckpointError(
            f"there is no directory {source}, and as a repository on the Hub it cannot be fetched: {first_line(error)}"
        ) from error
    return Path(copy) / subfolder


def upload(
    directory: str | Path,
    files: Iterable[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **commit: Any,
) -> str:
    """Put `files` of `directory` into the repository `repo_id`, made if need be; a card that it has stays.

    Args:
        commit: `commit_description`, `create_pr`; as `PreTrainedModel.push_to_hub` takes them.

    Returns:
        The address of the commit, or of the pull request.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not commit.get("create_pr"):
        api.create_branch(repo_id=repo_id, branch=revision, exist_ok=True)
    has_card = api.file_exists(repo_id, CARD, revision=revision)
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        allow_patterns=[name for name in files if not (has_card and name == CARD)],
        revision=revision,
        commit_message=commit_message or "Upload model",
        **commit,
    )
    return str(done)
