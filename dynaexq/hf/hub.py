"""A packed checkpoint on its way to the Hugging Face Hub. All of it is done by huggingface_hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from dynaexq.hf.model_card import CARD


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
