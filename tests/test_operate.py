"""Folders of a federation: made once, by their owners, and good for a session."""

from pathlib import Path

import pytest

from fedllm.operate import keys_of
from fedllm.transport.session import Sessions
from test_refusals import call
from test_session import Site


def test_keys_made_by_the_commands_open_a_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, site = tmp_path / "server", tmp_path / "a"
    assert call(monkeypatch, "server", "init", str(server), "--host", "127.0.0.1") == 0
    assert call(monkeypatch, "site", "init", str(site), "--name", "a") == 0
    assert call(monkeypatch, "server", "sign", str(server), str(site / "request.pem")) == 0
    assert "certificate.pem" in capsys.readouterr().out
    for path in (server / "authority.key", server / "key.pem", site / "key.pem", site / "node"):
        assert path.stat().st_mode & 0o077 == 0
    assert (site / "node.pub").read_bytes().startswith(b"ecdsa-sha2-nistp384 ")
    with Sessions("127.0.0.1:0", keys_of(server)) as sessions:
        there = Site(sessions, "a", keys_of(site))
        assert sessions.wait(["a"], 20) == []
    there.join(20)
    assert there.error is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["site", "init", "made", "--name", "b"], "exists; nothing was written"),
        (["server", "init", "made", "--host", "h"], "exists; nothing was written"),
        (["site", "init", "new", "--name", "a/b"], "--name 'a/b'"),
        (["server", "sign", "empty", "request.pem"], "cannot be read"),
        (["server", "sign", "server", "nonsense.pem"], "certificate request"),
    ],
)
def test_what_is_refused(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "server", "init", "server", "--host", "localhost") == 0
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "key.pem").write_text("precious")
    (tmp_path / "nonsense.pem").write_text("nonsense")
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error
    assert (tmp_path / "made" / "key.pem").read_text() == "precious"
    assert not (tmp_path / "new").exists()
