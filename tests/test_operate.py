"""Folders of a federation: made once, by their owners, and good for a session."""

import json
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm import engine
from fedllm import experiment as ex
from fedllm.operate import keys_of
from fedllm.transport.keys import authority, issue, request
from fedllm.transport.session import Keys, Sessions
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


def test_a_name_is_signed_for_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has a certificate of a name answers for it."""
    server = tmp_path / "server"
    assert call(monkeypatch, "server", "init", str(server), "--host", "127.0.0.1") == 0
    for folder in ("one", "two"):
        call(monkeypatch, "site", "init", str(tmp_path / folder), "--name", "a")
    before = (server / "federation.toml").read_text()

    def sign(folder: str, *more: str) -> tuple[int, str]:
        request = tmp_path / folder / "request.pem"
        code = call(monkeypatch, "server", "sign", str(server), str(request), *more)
        said = capsys.readouterr()
        return code, said.out + said.err

    assert sign("one")[0] == 0
    assert sign("one")[0] == 0  # the same key again
    code, said = sign("two")
    assert code == 2
    assert "another key is in this federation" in said
    assert not (tmp_path / "two" / "certificate.pem").exists()
    code, said = sign("two", "--again")
    assert code == 0
    assert "SHA-256" in said
    after = (server / "federation.toml").read_text()
    assert after == before.replace("sites = []", 'sites = ["a"]')


@pytest.mark.parametrize("name", ["../../escaped", 'x"]\nsessions = "evil:1', "server", "", None])
def test_names_that_no_site_can_have_are_not_signed(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server = tmp_path / "server"
    assert call(monkeypatch, "server", "init", str(server), "--host", "127.0.0.1") == 0
    parts = [] if name is None else [x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False)]
    asked = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(parts))
    key = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "request.pem").write_bytes(
        asked.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    )
    (tmp_path / "node.pub").write_text("theirs")
    before = sorted(path for path in tmp_path.rglob("*"))
    text = (server / "federation.toml").read_text()
    assert call(monkeypatch, "server", "sign", str(server), str(tmp_path / "request.pem")) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (server / "federation.toml").read_text() == text


def test_a_site_cannot_pose_as_the_server(tmp_path: Path) -> None:
    """Whatever its request asks, its certificate is good for dialling and nothing else."""
    ours = authority("ours")
    key, asked = request("a")
    site = x509.load_pem_x509_certificate(issue(ours, asked))
    usage = site.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        site.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    keys = Keys(ours.certificate, issue(ours, asked), key)
    with Sessions("127.0.0.1:0", keys) as posing:
        there = Site(posing, "a", keys, patience=1.0)
        there.join(20)
        assert "no connection" in str(there.error)


@pytest.mark.parametrize("host", ["exämple host", "::1", "a:80", ""])
def test_hosts_that_are_none_are_refused(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "server"
    assert call(monkeypatch, "server", "init", str(folder), "--host", host) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not folder.exists()
    (tmp_path / "file").write_text("a file")
    assert call(monkeypatch, "server", "init", str(tmp_path / "file" / "x"), "--host", "h") == 2


def test_how_a_run_ended_its_own_end_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older run's results are not this one's."""
    sites = Sites(tmp_path, experiment())
    (tmp_path / "experiment.toml").write_text(ex.dump(sites.spec))
    (tmp_path / "server" / "federation.toml").write_text(
        'superlink = "h:1"\nsessions = "h:2"\nsites = ["a"]\n'
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    ended = tmp_path / "server" / "flower" / "ended.json"
    says: list[dict[str, str]] = [{}, {"word": "another's", "error": ""}, {"error": "disk full"}]

    def watched(folder: Path, command: list[str], say: object) -> None:
        word = re.search(r'word="(\w+)"', command[-1])
        assert word is not None
        ended.parent.mkdir(exist_ok=True)
        ended.write_text(json.dumps({"word": word[1], **says.pop(0)}))

    monkeypatch.setattr(engine, "_watch", watched)
    arguments = ("run", str(tmp_path / "experiment.toml"), "--on", str(tmp_path / "server"),
                 "--out", str(tmp_path / "out"), "--resume")  # fmt: skip
    says[0] = {"error": "out holds another experiment"}
    for reason in ("holds another experiment", "Flower's log above", "disk full"):
        assert call(monkeypatch, *arguments) == 2
        assert reason in capsys.readouterr().err
