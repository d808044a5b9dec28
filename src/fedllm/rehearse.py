"""What a site would answer to an experiment, and whether its keys are good; nothing is run."""

from __future__ import annotations

import secrets
import socket
import ssl
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.operate import keys_of
from fedllm.site import Hosted
from fedllm.transport.keys import prove, proven

FLOWER = "1.41."
DIAL = 10.0  # seconds


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    found: str
    good: bool = True


def rehearse(folder: Path, experiment: ex.Experiment, server: str | None = None) -> list[Finding]:
    """
    Everything short of training: versions, keys, policy, rows, labels, base and public set.

    folder: of the site.  server: host:port to dial, to see that its certificate is trusted here.
    Raises FedllmError where there is no valid site.toml.
    """
    site = ex.load_site(folder / "site.toml")
    found = [_flower()]
    if site.insecure:
        found.append(Finding("keys", "none, site.toml says insecure"))
    else:
        found.append(_tried("keys", lambda: _keys(folder, site.name)))
    if server is not None and not site.insecure:
        found.append(_tried("server", lambda: _dial(folder, server)))
    reason = site.allow.refusal(experiment)
    found.append(Finding("policy", reason or "allows it", not reason))
    if not reason:
        found += _half(experiment, site)
    return found


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, look())
    except (FedllmError, OSError) as error:
        return Finding(what, str(error), good=False)


def _flower() -> Finding:
    try:
        here = version("flwr")
    except PackageNotFoundError:
        return Finding("flower", "not installed: pip install 'fedllm[flower]'", good=False)
    return Finding("flower", here, here.startswith(FLOWER))


def _keys(folder: Path, name: str) -> str:
    keys = keys_of(folder)
    nonce = secrets.token_bytes(16)
    whose = proven(keys.authority, keys.certificate, prove(keys.key, nonce), nonce)
    if whose != name:
        raise FedllmError(f"certificate.pem is of {whose!r}, site.toml says {name!r}")
    return f"certificate and key of {whose!r}"


def _dial(folder: Path, server: str) -> str:
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit():
        raise FedllmError(f"--server {server!r}: expected HOST:PORT")
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    with (
        socket.create_connection((host, int(port)), timeout=DIAL) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return f"{server} is there, {secure.version()}, trusted by ca.pem"


def _half(experiment: ex.Experiment, site: ex.SiteFile) -> list[Finding]:
    """What only shows once the site's half is built."""
    try:
        with tempfile.TemporaryDirectory(prefix="fedllm-") as folder:
            half = Hosted(experiment, experiment.seeds[0], site, "rehearsal", Path(folder))
    except FedllmError as error:
        return [Finding("data and model", str(error), good=False)]
    train, test = half.rows
    labels = str(half.facts["labels"])
    return [
        Finding("rows", f"{train} to train, {test} to test"),
        Finding("labels", str(len(labels.split("|"))) if labels else "none"),
        Finding("fedllm", str(half.facts["version"])),
        Finding("base", str(half.facts["base"])),
        Finding("public set", str(half.facts["public"]) or "none here"),
    ]
