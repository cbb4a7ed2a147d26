"""Puts what was saved or exported on the Hugging Face hub, as it is on disk."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jaxprune.checkpoints.weights import CONFIG


def push_to_hub(path: str | Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a model folder, or an exported file, in one commit. `jaxprune.load(name)` gives the folder's model back.

    Files that are in the repository and not in the folder stay there.

    Args:
        path: A folder that `jaxprune.save`, a command or `jaxprune.export` wrote, or a file of an export.
        name: The repository: `USER/NAME`. It is made if there is none.
        private: Whether a repository that is made is private.
        revision: A branch that is there; None is the main one.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: If there is no such folder or file, or no model in the folder.
        ValueError: If the name is none of a repository, there is no token, or the hub refuses.
    """
    from huggingface_hub import HfApi, errors

    path = Path(path)
    if not path.exists() or (path.is_dir() and not (path / CONFIG).is_file()):
        raise FileNotFoundError(f"{path} is neither a model folder nor an exported file: there is nothing to push.")
    target = {"repo_id": name, "revision": revision, "commit_message": f"Upload by jaxprune {version('jaxprune')}"}
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        if path.is_file():
            return str(api.upload_file(path_or_fileobj=path, path_in_repo=path.name, **target))
        return str(api.upload_folder(folder_path=path, **target))
    except errors.LocalTokenNotFoundError as error:
        raise ValueError(f"the hub takes no model without a token: log in with `hf auth login`. ({error})") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be pushed to {name!r}: {reason}") from error
