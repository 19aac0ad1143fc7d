"""Single files of repositories on the Hugging Face Hub, fetched by huggingface_hub into its cache."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dynaexq.errors import CheckpointError

NOT_FETCHED = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
"""What fetching from the Hub raises: no such repository or file, no name of one, no connection."""


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_repository(source: Path) -> bool:
    """Whether `source` can be the name of a repository, `organization/name` or `name`, and no other path."""
    return len(source.parts) in (1, 2) and not source.is_absolute() and source.parts[0] not in (".", "..", "~")


def hub_file(repository: str, name: str, revision: str | None = None) -> Path:
    """Where the file `name` of a repository lies now.

    Raises:
        CheckpointError: there is no such repository or file, or it cannot be reached.
    """
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except NOT_FETCHED as error:
        raise CheckpointError(
            f"there is no file {repository}, and {name} of a repository of that name cannot be fetched: "
            f"{first_line(error)}"
        ) from error
