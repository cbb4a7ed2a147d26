"""What is put on the hub, and what is refused before or by it; no test reaches it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import record_of, run
from huggingface_hub import HfApi, errors
from tiny import tiny_model

import jaxprune as jp


@pytest.fixture(name="calls")
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A hub that takes everything, and what it was given."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create(_: HfApi, repo_id: str, **settings: Any) -> None:
        calls.append(("create", {"repo_id": repo_id, **settings}))

    def upload(_: HfApi, **settings: Any) -> str:
        calls.append(("upload", settings))
        return f"hub:{settings['repo_id']}"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "upload_file", upload)
    return calls


def test_a_folder_and_a_file_are_uploaded(tmp_path: Path, calls: list[Any]):
    jp.save(tmp_path / "small", *tiny_model())
    record = record_of("push", tmp_path / "small", "you/small", "--private")
    assert record["url"] == "hub:you/small"
    (_, made), (_, sent) = calls
    assert made == {"repo_id": "you/small", "private": True, "exist_ok": True}
    assert sent["folder_path"] == tmp_path / "small" and sent["commit_message"].startswith("Upload by jaxprune")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    jp.push_to_hub(tmp_path / "model.gguf", "you/small", revision="files")
    assert calls[-1][1]["path_in_repo"] == "model.gguf" and calls[-1][1]["revision"] == "files"


def test_what_is_no_model_is_refused_before_anything_is_made(tmp_path: Path, calls: list[Any]):
    for path in (tmp_path, tmp_path / "nowhere"):
        result = run("push", path, "you/small")
        assert result.exit_code == 2 and "there is nothing to push" in result.output
    assert calls == []


def test_what_the_hub_refuses_is_one_line(tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch):
    jp.save(tmp_path / "small", *tiny_model())

    def refuse(*_: Any, **__: Any) -> None:
        answer: Any = SimpleNamespace(headers={}, request=None, status_code=403)
        raise errors.HfHubHTTPError("403 Forbidden: you may not\nmore", response=answer)

    def unknown(*_: Any, **__: Any) -> None:
        raise errors.LocalTokenNotFoundError("Token is required")

    for fault, says in ((refuse, "cannot be pushed to 'you/small': 403 Forbidden"), (unknown, "hf auth login")):
        monkeypatch.setattr(HfApi, "create_repo", fault)
        with pytest.raises(ValueError, match=says):
            jp.push_to_hub(tmp_path / "small", "you/small")
    assert calls == []


def test_a_name_that_is_none_is_refused(tmp_path: Path):
    jp.save(tmp_path / "small", *tiny_model())
    with pytest.raises(ValueError, match="cannot be pushed to 'a/b/c'"):
        jp.push_to_hub(tmp_path / "small", "a/b/c")
