"""Commands over Flower's own: each says which of them it runs."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedllm import experiment as ex
from fedllm.errors import FedllmError

Say = Callable[[str], None]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
STARTED = re.compile(r"started run (\d+)")
PATIENCE = 60.0  # seconds for a SuperLink to listen


def _tool(name: str) -> str:
    """A command of Flower's, beside this Python or on the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FedllmError(f"{name}: not found; pip install 'fedllm[flower]'")
    return found


def _environment(folder: Path) -> dict[str, str]:
    # Flower's commands start each other by name
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    home = str((folder / "flower").resolve())
    return os.environ | QUIET | {"FLWR_HOME": home, "PATH": path}


def _say(command: Sequence[str], say: Say) -> None:
    say("$ " + shlex.join([Path(command[0]).name, *command[1:]]))


def start_server(folder: Path, say: Say) -> int:
    """
    Run a SuperLink with TLS and node authentication until it ends; its exit code.

    Sites whose node.pub lies in ``nodes/`` are registered. Raises FedllmError where it does not
    come up.
    """
    spec = ex.load_federation(folder / "federation.toml")
    host, _, port = spec.superlink.rpartition(":")
    home = folder / "flower"
    home.mkdir(exist_ok=True)
    trust = f'root-certificates = "{(folder / "ca.pem").resolve()}"'
    secure = [
        "--ssl-ca-certfile", str(folder / "ca.pem"), "--ssl-certfile",
        str(folder / "certificate.pem"), "--ssl-keyfile", str(folder / "key.pem"),
        "--enable-supernode-auth",
    ]  # fmt: skip
    if spec.insecure:
        trust, secure = "insecure = true", ["--insecure"]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "fedllm"\n[superlink.fedllm]\naddress = "{spec.superlink}"\n'
        f"{trust}\n"
    )
    command = [
        _tool("flower-superlink"), *secure, "--host", host, "--port", port,
        "--database", str(home / "state.db"), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    _say(command, say)
    process = subprocess.Popen(command, env=_environment(folder))
    try:
        _listening(host, int(port), process)
        known = [folder / "nodes" / f"{name}.pub" for name in spec.sites]
        for public in (path for path in known if path.exists() and not spec.insecure):
            register(folder, public, say)
        say("ready")
        return process.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        _end(process)


def register(folder: Path, public: Path, say: Say) -> None:
    """Make a node's key known to the SuperLink; one that is known already is no error."""
    command = [_tool("flwr"), "supernode", "register", str(public), "fedllm"]
    _say(command, say)
    done = subprocess.run(
        command, env=_environment(folder), capture_output=True, text=True, check=False
    )
    words = (done.stdout + done.stderr).strip()
    if done.returncode and "already" not in words:
        raise FedllmError(f"{public}: not registered ({words[-300:]})")


def start_site(folder: Path, address: str, port: int, say: Say) -> int:
    """
    Keep a SuperNode running: whenever it ends, it is started again and rejoins.

    address: host:port of the SuperLink.  port: of this node's own, on this machine only.
    """
    site = ex.load_site(folder / "site.toml")
    secure = [
        "--root-certificates", str(folder / "ca.pem"),
        "--auth-supernode-private-key", str(folder / "node"),
    ]  # fmt: skip
    command = [
        _tool("flower-supernode"), "--superlink", address,
        *(["--insecure"] if site.insecure else secure),
        "--node-config", f'site="{folder.resolve()}"', "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    pause = 1.0
    while True:
        _say(command, say)
        began = time.monotonic()
        process = subprocess.Popen(command, env=_environment(folder))
        try:
            code = process.wait()
        except KeyboardInterrupt:
            return 130
        finally:
            _end(process)
        pause = 1.0 if time.monotonic() - began > 60 else min(2 * pause, 30.0)
        say(f"the SuperNode ended with code {code}; again in {pause:g} s")
        with suppress(KeyboardInterrupt):
            time.sleep(pause)
            continue
        return 130


def run_on(folder: Path, experiment: ex.Experiment, out: Path, resume: bool, say: Say) -> None:
    """
    Run an experiment on the federation whose server's folder this is, into ``out``.

    Raises FedllmError where Flower could not start it, or it did not end well.
    """
    if len(experiment.seeds) > 1:
        raise FedllmError(
            f"seeds = {list(experiment.seeds)}: a federation runs one at a time; "
            f"--set seeds=[{experiment.seeds[0]}]"
        )
    if not resume and (out / "summary.json").exists():
        raise FedllmError(f"{out}: holds a finished run; --out takes another folder")
    _submit(folder, experiment, say, out=str(out.resolve()), resume=resume)


def check_on(folder: Path, experiment: ex.Experiment, say: Say) -> dict[str, Any]:
    """
    Ask the sites of a federation what they would say to an experiment: a handshake, and no more.

    Returns what the server says (``server``), what each site says (``sites``), and why somebody is
    unfit (``refused``). Raises FedllmError where Flower could not ask.
    """
    return dict(_submit(folder, experiment, say, check=True)["check"])


def _submit(
    folder: Path, experiment: ex.Experiment, say: Say, **settings: str | bool
) -> dict[str, Any]:
    """
    Have Flower run an experiment, and wait for its end; returns what the server's end left.

    Raises FedllmError where it did not end well.
    """
    from fedllm.flower import ENDED, write_app

    spec = ex.load_federation(folder / "federation.toml")
    if not spec.sites:
        raise FedllmError(f"{folder / 'federation.toml'}: sites: no site was signed yet")
    app = folder / "flower" / "app"
    write_app(experiment, app)
    settings |= {"server": str(folder.resolve()), "word": secrets.token_hex(8)}
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    _watch(folder, [_tool("flwr"), "run", str(app), "fedllm", "--stream", "-c", text], say)
    try:
        ended = dict(json.loads((folder / ENDED).read_text()))
    except (OSError, ValueError):
        ended = {}
    error = "Flower's log above says why"
    if ended.get("word") == settings["word"]:
        if not ended["error"]:
            return ended
        error = ended["error"]
    raise FedllmError(f"the run did not end well: {error}; --resume goes on from the last round")


def _watch(folder: Path, command: list[str], say: Say) -> None:
    """Let Flower say how a run goes on until its end; Ctrl-C stops the run, too."""
    _say(command, say)
    run = ""
    process = subprocess.Popen(
        command, env=_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        for line in process.stdout or ():
            if found := STARTED.search(line):
                run = found[1]
            say(line.rstrip())
        process.wait()
    except KeyboardInterrupt:
        if run:
            stop = [_tool("flwr"), "stop", run, "fedllm"]
            _say(stop, say)
            subprocess.run(stop, env=_environment(folder), check=False)
        raise
    finally:
        _end(process)


def _listening(host: str, port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.2)
    raise FedllmError(f"the SuperLink does not listen on {host}:{port} (exit {process.poll()})")


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
