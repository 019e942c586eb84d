"""Exported folders to the Hub: a Hub of the test's own takes them, and no network is touched."""

from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from typer.testing import CliRunner

from mars_hf import cli, hub, upload

FILES = {"config.json": "{}", "README.md": "# mars", "gallery/0.png": "png"}


class FakeHub:
    """Takes what is brought to it; its line breaks as often as it is told."""

    def __init__(self, token: str | None = "hf_x", breaks: int = 0, refuses: bool = False):
        self.token, self.breaks, self.refuses = token, breaks, refuses
        self.repositories: dict[str, bool] = {}
        self.uploads: list[dict] = []
        self.files: set[str] = set()

    def whoami(self) -> dict:
        if self.refuses:
            raise HfHubHTTPError("401", response=SimpleNamespace(status_code=401, headers={}, request=None))
        return {"name": "ada", "orgs": [{"name": "engine"}]}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> RepoUrl:
        repo_id = repo_id if "/" in repo_id else f"ada/{repo_id}"
        assert exist_ok or repo_id not in self.repositories
        self.repositories.setdefault(repo_id, private)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list, delete_patterns: list
    ) -> None:
        if self.breaks:
            self.breaks -= 1
            raise httpx2.ConnectError("the line is broken")
        self.uploads.append({"repo_id": repo_id, "folder": Path(folder_path), "message": commit_message})
        new = {path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()}
        self.files = new | (self.files - set(filter_repo_objects(self.files, allow_patterns=delete_patterns)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "mars" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "mars"


def test_an_upload_makes_a_private_repository_and_brings_the_folder(folder: Path) -> None:
    api = FakeHub()
    assert upload.upload_folder(folder, "engine/mars", api=api) == "https://huggingface.co/engine/mars"
    assert upload.upload_folder(folder, "mars", private=False, api=api) == "https://huggingface.co/ada/mars"
    assert api.repositories == {"engine/mars": True, "ada/mars": False}
    assert [(one["repo_id"], one["folder"]) for one in api.uploads] == [("engine/mars", folder), ("ada/mars", folder)]


def test_weights_of_an_earlier_upload_do_not_stay_beside_new_ones(folder: Path) -> None:
    api, more = FakeHub(), ["model.safetensors", "super_resolution/model.safetensors", "super_resolution/config.json"]
    more += ["documents/adapter_model.safetensors", "documents/adapter_config.json"]
    for name in more:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("weights")
    upload.upload_folder(folder, "mars", api=api)
    assert api.files == {*FILES, *more}
    for name in more:
        (folder / name).unlink()
    (folder / "model-00001-of-00001.safetensors").write_text("weights")
    upload.upload_folder(folder, "mars", api=api)
    assert api.files == {*FILES, "model-00001-of-00001.safetensors"}


def test_the_list_is_what_the_library_would_upload(folder: Path) -> None:
    for name in (".git/config", ".cache/huggingface/x", "__pycache__/a.pyc", ".env", "gallery/.hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    assert upload.files_to_upload(folder) == {name: len(content) for name, content in sorted(FILES.items())}
    (folder / "README.md").unlink()  # the library would have the Hub check it
    options = {"path_in_repo": "", "ignore_patterns": list(upload.IGNORED)}
    additions = HfApi()._prepare_upload_folder_additions(folder, **options)
    assert {addition.path_in_repo for addition in additions} == FILES.keys() - {"README.md"}


@pytest.mark.parametrize("repo_id", ["a b", "../etc", "a/b/c", "", "https://huggingface.co/a/b"])
def test_what_is_no_name_of_a_repository_is_refused(repo_id: str) -> None:
    with pytest.raises(ValueError, match="[Rr]epo"):
        upload.check_upload(repo_id, FakeHub())


def test_what_cannot_work_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="There is no token for the Hub. Log in"):
        upload.check_upload("ada/mars", FakeHub(token=None))
    with pytest.raises(ValueError, match="does not accept the token"):
        upload.check_upload("ada/mars", FakeHub(refuses=True))
    api = FakeHub()
    with pytest.raises(ValueError, match="only to ada, engine: try ada/mars"):
        upload.upload_folder(tmp_path, "someone/mars", api=api)
    assert not api.repositories and not api.uploads


# The command


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were exported, by an export that copies nothing but a configuration."""
    made: list[Path] = []

    def export_folder(source: Path, out: Path, **options: object) -> Path:
        made.append(out)
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text('{"auto_map": {"AutoConfig": "configuration_mars.MarsConfig"}}')
        return out

    monkeypatch.setattr(hub, "export_folder", export_folder)
    return made


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["export", *map(str, arguments)])
    return done.exit_code, done.output


def test_a_broken_upload_goes_on_with_the_folder_that_is_there(tmp_path: Path, exports, monkeypatch) -> None:
    api = FakeHub(breaks=1)
    monkeypatch.setattr(upload, "_hub", lambda: api)
    out = tmp_path / "out"
    code, said = call(out, "--push", "ada/mars")
    assert code == 1 and "cannot be reached (the line is broken). Called again, an upload continues" in said
    assert exports == [out]
    code, said = call(out, "--push", "ada/mars")
    assert code == 0 and "https://huggingface.co/ada/mars" in said
    assert exports == [out] and [one["folder"] for one in api.uploads] == [out]
    code, said = call(out, "--push", "ada/mars", "--gallery", 1)
    assert code == 2 and "holds an earlier export" in said and len(api.uploads) == 1
    code, _ = call(out, "--push", "ada/mars", "--overwrite")
    assert code == 0 and exports == [out, out] and api.repositories == {"ada/mars": True}


def test_a_dry_run_lists_files_and_asks_nobody(tmp_path: Path, exports, monkeypatch) -> None:
    monkeypatch.setattr(upload, "_hub", lambda: pytest.fail("the Hub was asked"))
    code, said = call(tmp_path / "out", "--push", "ada/mars", "--dry-run")
    assert code == 0 and "config.json" in said and "in 1 files would go to ada/mars" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "a b"], "alphanumeric"),
        (["--push", "a b", "--dry-run"], "alphanumeric"),
        (["--push", "ada/mars"], "There is no token"),
        (["--dry-run"], "go with"),
        (["--public"], "go with"),
    ],
)
def test_the_command_refuses_before_it_exports(tmp_path: Path, exports, monkeypatch, arguments, message) -> None:
    monkeypatch.setattr(upload, "_hub", lambda: FakeHub(token=None))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, said = call(tmp_path / "out", *arguments)
    assert code == 2 and message in said and not exports
