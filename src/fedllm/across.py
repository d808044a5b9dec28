"""
A run across machines: the server calls its sites, and a site that is called takes part.

Who carries the call (an order of a few lines) from the one to the other is the engine's business;
all else goes through a session that the site opens.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm import experiment as ex
from fedllm import federation
from fedllm.errors import FedllmError
from fedllm.federation import Listener, Silent
from fedllm.message import Failure, Frame
from fedllm.remote import Facts, Remote, hello
from fedllm.site import Hosted, prepare_server
from fedllm.transport.session import TOKEN_SECONDS, Keys, Sessions, attend

LOG = logging.getLogger(__name__)
Order = dict[str, str | int]
"""experiment (TOML), seed, run; for a session its address and token: all that a call says."""


def order_of(experiment: ex.Experiment, seed: int, folder: Path | None = None) -> Order:
    """
    What every site must know of a run.

    folder: of the run at the server. The sites' states of one run are no other's, however the
    experiment is called: a word of chance, kept in that folder, tells them apart.
    """
    run = federation.run_id(experiment, seed)
    order: Order = {"experiment": ex.dump(experiment), "seed": seed, "run": run, "word": ""}
    if folder is not None:
        kept = folder / "word.txt"
        if not kept.exists():
            kept.write_text(secrets.token_hex(4))
        order["word"] = kept.read_text()
    return order


class Called:
    """
    Sites that come when they are called: sessions, and how to call.

    One whose process died is called again at the next round.
    """

    window: int | None = None

    def __init__(
        self, sessions: Sessions, names: Sequence[str], call: Callable[[str, str], None],
        seconds: float, lost: Callable[[], Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        """
        call: (site, token).  seconds: to wait for all of them.  lost: of an engine that does not
        know which site is where (their certificates then say so): why calls ended since it was
        asked before.
        """
        self.sessions, self._names, self._call = sessions, list(names), call
        self._wait = seconds
        self._seconds, self._lost = max(seconds, TOKEN_SECONDS), lost
        self._owed = 0  # calls that ended and were not made again yet

    def begin(self, greet: Callable[[str], Facts], refuse: Callable[[str, Facts], str]) -> None:
        """Call everybody and wait. Raises FedllmError naming who did not come."""
        self.sessions.greet, self.sessions.check = greet, refuse
        for name in self._names:
            self._call(name, self.sessions.admit("" if self._lost else name, self._seconds))
        until = time.monotonic() + self._wait
        while missing := self.sessions.wait(self._names, 1.0):
            if self._lost and (reasons := self._lost()):
                raise FedllmError(f"{', '.join(missing)} did not come: {'; '.join(reasons)}")
            if time.monotonic() > until:
                raise FedllmError(
                    f"{', '.join(missing)} did not come within {self._wait:g} s; "
                    "the site's log says why"
                )

    def clients(self) -> Sequence[str]:
        """All sites of the federation."""
        if self._lost is not None:
            for reason in self._lost():
                LOG.warning("a site has to be called again: %s", reason)
                self._owed += 1
        while self._owed:
            try:
                self._call("", self.sessions.admit(seconds=self._seconds))
            except (
                FedllmError
            ) as error:  # its machine is away; perhaps it is back by the next round
                LOG.warning("nobody can be called: %s", error)
                break
            self._owed -= 1
        return self.sessions.clients()

    def post(self, client: str, frame: bytes) -> str:
        """Send a frame."""
        return self.sessions.post(client, frame)

    def expire(self, id: str) -> None:
        """An answer that nobody waits for."""
        self.sessions.expire(id)

    def collect(self, timeout: float | None = None) -> Iterator[tuple[str, Frame | Failure]]:
        """Answers as they come."""
        return self.sessions.collect(timeout)


def lead(
    experiment: ex.Experiment, seed: int, folder: Path, sessions: Sessions, names: Sequence[str],
    call: Callable[[str, Order], None], *, resume: bool = False, listener: Listener | None = None,
    seconds: float = 300.0, lost: Callable[[], Sequence[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """
    The server's half of a run over these sites, into ``folder``; returns its summary.

    call: brings an order to a site.  seconds: to wait until all have come.  lost: as for
    ``Called``.
    """

    def bring(name: str, token: str) -> None:
        order = order_of(experiment, seed, folder)
        call(name, {**order, "address": sessions.address, "token": token})

    agree_on_names(experiment, names)
    remote = Called(sessions, names, bring, seconds, lost)
    return lead_over(remote, experiment, seed, folder, resume=resume, listener=listener)


def agree_on_names(experiment: ex.Experiment, names: Sequence[str]) -> None:
    """Raise FedllmError for a table (of models, ranks, modules, cuts) that names other sites."""
    if isinstance(experiment.strategy, ex.Logits):
        experiment.strategy.models(names)
    elif isinstance(experiment.strategy, ex.Activations):
        experiment.strategy.cuts(names)
    if isinstance(experiment.tunables, ex.Lora):
        experiment.tunables.ranks_of(names)
        experiment.tunables.budgets_of(names)
        experiment.tunables.modules_of(names)


def lead_over(
    remote: Remote, experiment: ex.Experiment, seed: int, folder: Path, *, resume: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same over any transport to sites."""
    return federation.run(
        experiment, seed, folder, resume=resume, listener=listener,
        prepared=prepare_server(experiment, seed), remote=remote,
    )  # fmt: skip


def server_says(experiment: ex.Experiment) -> tuple[Facts, Mapping[str, str]]:
    """What the server would compare with what sites say of themselves (``Distant``)."""
    seed = experiment.seeds[0]
    prepared = prepare_server(experiment, seed)
    half = federation.halve(experiment, seed, prepared, Silent())
    public = federation.copied(experiment, prepared)
    return hello(half.model.base_hash, prepared.labels, public), half.bases


def hosted(order: Mapping[str, Any], site: ex.SiteFile, folder: Path) -> Hosted:
    """
    The site's half of the run that an order calls it to; it has a folder of its own in the site's.

    Raises FedllmError for an order that the site does not allow or cannot follow.
    """
    path = folder / "site.toml"
    experiment = ex.parse_text(
        str(order["experiment"]), "the server's experiment", path.parent, foreign=True
    )
    run = str(order["run"])
    own = "-".join(part for part in (run, str(order.get("word", ""))) if part)
    if Path(own).name != own or own in ("", ".", ".."):
        raise FedllmError(f"the server's run {own!r}: not the name of a folder")
    return Hosted(experiment, int(order["seed"]), site, run, folder / "runs" / own)


def take_part(
    order: Mapping[str, Any], site: ex.SiteFile, folder: Path, keys: Keys | None,
    patience: float = 60.0,
) -> None:  # fmt: skip
    """
    A site's half: build it, dial the server, answer until it says good-bye.

    folder: of the site.  Raises FedllmError as ``hosted`` does, and when the server stays away.
    """
    half = hosted(order, site, folder)
    attend(
        str(order["address"]), site.name, str(order["token"]), keys, half.answer, half.facts,
        half.welcomed, patience, sent=half.sent,
    )  # fmt: skip
