"""
Exported folders to the Hub: what would go is listed, what cannot work is refused before any work, and an interrupted
upload continues when it is called again (huggingface_hub skips what is there).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

# An earlier upload may have left weights in other files, which would be read in place of the new ones.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "super_resolution/*", "documents/*", "gallery/*"]
IGNORED = [".*", "*/.*", "__pycache__/*", "*/__pycache__/*"]


class HubApi(Protocol):
    """What is needed of `huggingface_hub.HfApi`."""

    token: Any

    def whoami(self) -> dict[str, Any]: ...

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str | Path,
        commit_message: str,
        ignore_patterns: list[str],
        delete_patterns: list[str],
    ) -> Any: ...


def check_repo_id(repo_id: str) -> None:
    """
    Refuse what is no name of a repository.

    Raises:
        ValueError: If it is none.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)


def check_upload(repo_id: str, api: HubApi | None = None) -> None:
    """
    Ask the Hub whether an upload can work, before there is anything to upload.

    Args:
        repo_id (`str`): `namespace/name`, or `name` in the user's own namespace.
        api ([`HubApi`], *optional*): Defaults to `huggingface_hub.HfApi()`.

    Raises:
        ValueError: If `repo_id` is no name of a repository, there is no valid token, or it does not open the
            namespace.
        OSError: If the Hub cannot be reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    check_repo_id(repo_id)
    api = api or _hub()
    if not (api.token or get_token()):
        raise ValueError(
            "There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN to one that may write "
            "(https://huggingface.co/settings/tokens)."
        )
    try:
        with _broken_lines_told():
            user = api.whoami()
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ValueError("The Hub does not accept the token. Log in anew with `hf auth login`.") from None
        raise
    own = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    namespace, _, name = repo_id.rpartition("/")
    if namespace and namespace not in own:
        raise ValueError(f"The token may not write to {namespace!r}, only to {', '.join(own)}: try {own[0]}/{name}.")


def files_to_upload(folder: str | os.PathLike) -> dict[str, int]:
    """
    List what an upload would bring to the Hub.

    Returns:
        `dict[str, int]`: Names of files and their sizes in bytes, in order.
    """
    from huggingface_hub.utils import filter_repo_objects

    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: names[name].stat().st_size for name in filter_repo_objects(names, ignore_patterns=IGNORED)}


def upload_folder(folder: str | os.PathLike, repo_id: str, private: bool = True, api: HubApi | None = None) -> str:
    """
    Bring an exported folder to the Hub; called again, it continues.

    Args:
        folder (`str` or `os.PathLike`): As `mars-hf export` writes it.
        repo_id (`str`): `namespace/name`, or `name` in the user's own namespace.
        private (`bool`, defaults to `True`): Whether a new repository is private; one that is there stays as it is.
        api ([`HubApi`], *optional*): Defaults to `huggingface_hub.HfApi()`.

    Returns:
        `str`: Address of the repository.

    Raises:
        ValueError: See [`check_upload`].
        OSError: If the Hub cannot be reached, or breaks off.
    """
    api = api or _hub()
    check_upload(repo_id, api)
    with _broken_lines_told():
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=f"Upload {Path(folder).name} with mars_hf",
            ignore_patterns=list(IGNORED),  # the library adds its own to this list
            delete_patterns=REPLACED,
        )
    return str(repository)


@contextmanager
def _broken_lines_told() -> Iterator[None]:
    """Make an OSError of what the library raises where there is no network."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):  # an answer of the Hub
            raise
        raise OSError(f"The Hub cannot be reached ({error}). Called again, an upload continues.") from error


def _hub() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="mars_hf")
