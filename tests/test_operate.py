"""Folders of a federation: made once, by their owners, and good for a session."""

import re
from pathlib import Path

import pytest

from fedllm import experiment as ex
from fedllm.operate import keys_of
from fedllm.transport.session import Sessions
from laws.test_law7_across import Sites
from small import experiment
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


def test_a_site_rehearses_what_it_would_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = Sites(tmp_path, experiment(strategy={"kind": "logits"}))
    file, site = tmp_path / "experiment.toml", tmp_path / "client-1"
    file.write_text(ex.dump(sites.spec))

    def checked(*more: str) -> tuple[int, str]:
        code = call(monkeypatch, "site", "check", str(site), str(file), *more)
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = checked()
    assert code == 0
    assert "certificate and key of 'client-1'" in said
    assert "allows it" in said
    assert re.search(r"public set\s+\W\s+\w{16}", said)
    assert not (site / "runs").exists()
    assert "Connection refused" in checked("--server", "127.0.0.1:1")[1]
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text + "[allow]\nlogits = false\n")
    code, said = checked()
    assert code == 2
    assert "logits may not leave this site" in said
    (site / "site.toml").write_text(text.replace("train.csv", "absent.csv"))
    (site / "key.pem").write_bytes((tmp_path / "client-2" / "key.pem").read_bytes())
    code, said = checked()
    assert code == 2
    assert "the signature is not its key's" in said
    assert "absent.csv" in said
    assert "Traceback" not in said


def test_nothing_is_open_unless_somebody_wrote_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What Flower is started with: TLS and known nodes, or ``--insecure`` where both wrote it."""
    run: list[list[str]] = []

    def started(command: list[str], **_: object) -> None:
        run.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen", started)
    server, site = tmp_path / "server", tmp_path / "a"
    call(monkeypatch, "server", "init", str(server), "--host", "127.0.0.1")
    call(monkeypatch, "site", "init", str(site), "--name", "a")
    begin = [("server", "start", str(server)),
             ("site", "start", str(site), "--server", "127.0.0.1:1")]  # fmt: skip
    for arguments in begin:
        call(monkeypatch, *arguments)
    assert "--enable-supernode-auth" in run[0]
    assert "--auth-supernode-private-key" in run[1]
    assert not any("--insecure" in command for command in run)
    for path in (server / "federation.toml", site / "site.toml"):
        path.write_text(f"insecure = true\n{path.read_text()}")
    for arguments in begin:
        call(monkeypatch, *arguments)
    assert all("--insecure" in command for command in run[2:])
    assert "--enable-supernode-auth" not in run[2]
