"""Folders of a federation's server and sites: keys, certificates, and a site's file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.transport.keys import (
    Authority,
    authority,
    issue,
    name_of,
    node_keys,
    request,
    same_key,
    write,
)
from fedllm.transport.session import Keys

SITE = """\
# What this site has, and what it allows. Nothing leaves it but answers to an experiment that this
# file allows; audit.jsonl in the run's folder says what left.
name = "{name}"

[data]                        # columns are those that the experiment's [data] names
train = "train.csv"           # .csv, .json or .jsonl, relative to this file
test = "test.csv"
# public = "public.csv"       # for the logits strategy, unless the server sends it

[allow]                       # what is commented out is allowed
# strategies = ["parameters", "logits", "activations"]
# tunables = ["lora", "adapter", "bitfit", "prompt", "prefix", "sparse", "full"]
# largest_rank = 16
# labels = false              # labels stay here: activations then need strategy.labels = "client"
# logits = false
"""


def _fresh(folder: Path, names: Sequence[str]) -> None:
    taken = [name for name in names if (folder / name).exists()]
    if taken:
        raise FedllmError(f"{folder / taken[0]}: exists; nothing was written")


FEDERATION = """\
# Where sites find the server: Flower's port, and the one for the sessions of a run.
superlink = "{host}:{port}"
sessions = "{host}:{sessions}"
sites = []          # those whose request was signed
"""


def init_server(folder: Path, hosts: Sequence[str], port: int = 8000) -> list[Path]:
    """
    An authority and the server's certificate for these names and addresses; returns what it wrote.

    port: of Flower; the one after it is for sessions.
    The authority's key signs sites: keep it off the server once all have their certificates.
    Raises FedllmError where something is in the way.
    """
    names = ["authority.key", "ca.pem", "certificate.pem", "key.pem", "federation.toml"]
    _fresh(folder, names)
    for host in hosts:
        if ":" in host or not host:
            raise FedllmError(
                f"--host {host!r}: expected a name or an IPv4 address, without a port"
            )
    own = authority(f"authority of {hosts[0]}"[:64])
    key, asked = request("server")
    certificate = issue(own, asked, hosts)
    write(folder / "authority.key", own.key, private=True)
    write(folder / "ca.pem", own.certificate)
    write(folder / "certificate.pem", certificate)
    write(folder / "key.pem", key, private=True)
    text = FEDERATION.format(host=hosts[0], port=port, sessions=port + 1)
    write(folder / "federation.toml", text.encode())
    return [folder / name for name in names]


def sign(folder: Path, asked: Path, again: bool = False) -> tuple[str, Path]:
    """
    A certificate for a site's request, beside the request; returns the site's name and its path.

    The site is one of the federation from then on; with its node.pub beside the request Flower will
    know it, too.  again: a site of this name has another key from now on.  Raises FedllmError for a
    folder without an authority, a request that is none, and a name that another key has.
    """
    try:
        own = Authority((folder / "ca.pem").read_bytes(), (folder / "authority.key").read_bytes())
        data = asked.read_bytes()
    except OSError as error:
        raise FedllmError(f"{error.filename}: cannot be read ({error.strerror})") from None
    path = asked.with_name("certificate.pem")
    if asked.resolve().parent == folder.resolve():
        raise FedllmError(
            f"{asked}: lies in the server's own folder, whose certificate the site's would replace"
        )
    certificate = issue(own, data)
    name = name_of(certificate)
    if not re.fullmatch(ex.SITE_NAME, name) or name == "server":
        raise FedllmError(f"{asked}: {name!r} is no name for a site")
    kept = folder / "nodes" / f"{name}.pem"
    known = kept.exists() and same_key(kept.read_bytes(), data)
    if name in ex.load_federation(folder / "federation.toml").sites and not (known or again):
        raise FedllmError(
            f"{asked}: a site {name!r} with another key is in this federation; if it is the same "
            "site with a new key, --again replaces it"
        )
    _add(folder / "federation.toml", name)
    node = asked.with_name("node.pub")
    if node.exists():
        write(folder / "nodes" / f"{name}.pub", node.read_bytes())
    write(kept, certificate)
    write(path, certificate)
    write(asked.with_name("ca.pem"), own.certificate)
    return name, path


def _add(path: Path, name: str) -> None:
    """One site more in federation.toml; the rest of the file stays as it is."""
    sites = ex.load_federation(path).sites
    if name in sites:
        return
    listed = ", ".join(f'"{one}"' for one in (*sites, name))
    before = path.read_text()
    text = re.sub(r"^sites = \[.*?\]", f"sites = [{listed}]", before, flags=re.M | re.S)
    if text == before:
        raise FedllmError(f"{path}: no line 'sites = [...]' to add {name!r} to")
    write(path, text.encode())


def init_site(folder: Path, name: str) -> list[Path]:
    """
    A site's keys, its request for a certificate, and a commented site.toml; what it wrote.

    Private keys never leave this folder. Raises FedllmError where something is in the way.
    """
    if not re.fullmatch(ex.SITE_NAME, name) or name == "server":
        raise FedllmError(f"--name {name!r}: letters, digits, '-', '_' and '.' make a site's name")
    _fresh(folder, ["key.pem", "request.pem", "site.toml", "node", "node.pub"])
    key, asked = request(name)
    private, public = node_keys()
    write(folder / "key.pem", key, private=True)
    write(folder / "request.pem", asked)
    write(folder / "node", private, private=True)
    write(folder / "node.pub", public)
    write(folder / "site.toml", SITE.format(name=name).encode())
    return [folder / n for n in ("key.pem", "request.pem", "node", "node.pub", "site.toml")]


def keys_of(folder: Path) -> Keys:
    """A server's or site's keys. Raises FedllmError saying which file is missing."""
    try:
        return Keys(*((folder / f"{n}.pem").read_bytes() for n in ("ca", "certificate", "key")))
    except OSError as error:
        raise FedllmError(
            f"{error.filename}: cannot be read ({error.strerror}); 'fedllm site init' makes keys, "
            "'fedllm server sign' the certificate"
        ) from None
