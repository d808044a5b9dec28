"""
Each fault alone, over three site processes and mutual TLS: who saw it when, and what was lost.

A site damages its answer, is slow, or is killed; the server is killed; the network goes and comes
back; strangers dial in. What was committed is compared, bit for bit, with a run in one process in
which the answers that the ledger calls failed were missing, and no others. Ends with 1 where it
differs, or where a run did not get to its last round.

    python benchmarks/faults_across.py --out faults.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fedllm.errors import FedllmError
from fedllm.transport.keys import authority
from sites import (
    Proxy,
    Server,
    Sites,
    Watch,
    committed,
    failures,
    keys_into,
    missed,
    reference,
    same,
)
from small import experiment

ROUNDS = 4
LARGEST = 2**20  # bytes of a frame that the server takes
BAD, OTHER = "client-2", "client-3"
PATIENCE = 5.0  # seconds that a site may be away, but for the network's cut
DEADLINE, SLOW = 5.0, 7.0
Play = Callable[[Sites], str]


@dataclass(frozen=True)
class Case:
    """play: makes the fault in a run, and returns who saw it when."""

    fault: str
    how: str
    play: Play
    deadline: float = 60.0
    resumed: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table. good: it ran to its end, and what it committed is the reference's."""

    case: Case
    seen: str
    lost: str
    run: str
    good: bool


def after(watch: Watch, moment: float, word: str, within: float = 600.0) -> str:
    """How long after the fault the server said this. Raises FedllmError where none was made."""
    if not moment:
        raise FedllmError("the fault never came")
    found = [when - moment for when, _ in watch.after(moment, word) if when - moment < within]
    return f"{found[0]:.3f} s ({word})" if found else "not at all"


def told(log: Path, moment: float, word: str) -> str:
    """How long after this moment a site's log says this."""
    for line in log.read_text().splitlines():
        when, _, text = line.partition(" ")
        if word in text and when.replace(".", "").isdigit() and float(when) >= moment:
            return f"{float(when) - moment:.3f} s"
    return "not at all"


# what goes wrong --------------------------------------------------------------------------------


def answer(kind: str, word: str) -> Play:
    """A site gives a bad answer, late, or none; it is not called again."""

    def play(sites: Sites) -> str:
        sites.plan(BAD, rounds={"2": kind}, seconds=SLOW)
        with Watch() as watch:
            sites.lead("run", patience=PATIENCE, largest=LARGEST, listener=watch)
        return after(watch, sites.injected(BAD), word)

    return play


def rejoining(sites: Sites) -> str:
    """A site is killed and called again; the others wait for it after the round."""
    sites.plan(BAD, rounds={"2": "killed"})
    here = f"{BAD} is here"
    with Watch({2: lambda: watch.wait(here, sites.injected(BAD))}) as watch:
        sites.lead("run", patience=PATIENCE, lost=sites.lost, listener=watch)
    moment = sites.injected(BAD)
    return "; ".join(after(watch, moment, word) for word in ("not there", here))


def server(sites: Sites) -> str:
    """The server is killed while it waits for an answer, and resumed."""
    sites.plan(BAD, rounds={"2": "slow"}, seconds=3.0)
    first = Server(sites, "run")
    first.until(lambda: bool(sites.injected(BAD)))
    first.process.kill()
    killed = time.time()
    first.process.join()
    time.sleep(2.0)  # for the sites to notice
    second = Server(sites, "run", resume=True)
    second.until(second.ended)
    log = sites.folder / "client-1" / "log.txt"
    return f"{told(log, killed, 'dialling')} (by the sites, which dial again)"


def cut(seconds: float, silently: bool) -> Play:
    """The network is gone for a while, from the middle of a round."""

    def play(sites: Sites) -> str:
        proxy, moments = Proxy(), []
        sites.through = proxy.to
        for name in sites.names:
            sites.plan(name, rounds={"2": "slow"} if name == BAD else {}, seconds=0.5, patience=90)

        def goes() -> None:
            sites.wait(BAD)
            moments.append(time.time())
            proxy.cut(silently)
            time.sleep(seconds)
            proxy.mend()

        threading.Thread(target=goes, daemon=True).start()
        with Watch() as watch:
            sites.lead("run", patience=60.0, listener=watch)
        proxy.close()
        if not moments or time.time() - moments[0] < seconds:
            raise FedllmError("the run ended before the network was back")
        return after(watch, moments[0], "broke", within=seconds)

    return play


def dialling(word: str, enter: Callable[[Sites], dict[str, Any]]) -> Play:
    """Somebody dials in as another site after the first round; the run waits until it gave up."""

    def play(sites: Sites) -> str:
        found: list[dict[str, Any]] = []
        with Watch({1: lambda: found.append(enter(sites))}) as watch:
            sites.lead("run", patience=PATIENCE, listener=watch)
        if found[0]["code"] != 1:
            raise FedllmError("the stranger was let in")
        if word:
            return after(watch, found[0]["time"], word)
        log = sites.folder / "stranger" / "log.txt"
        return (
            f"{told(log, found[0]['time'], 'dialling')} (the handshake; gRPC's log alone says it)"
        )

    return play


def another_base(sites: Sites) -> dict[str, Any]:
    return sites.stranger(OTHER, sites.sessions.admit(OTHER), hello={"base": "beef"})


def wrong_certificate(sites: Sites) -> dict[str, Any]:
    def keys(folder: Path) -> Any:
        return keys_into(folder, authority("another"), OTHER)

    return sites.stranger(OTHER, sites.sessions.admit(OTHER), keys, patience=3.0)


def others_certificate(sites: Sites) -> dict[str, Any]:
    def keys(folder: Path) -> Any:
        return keys_into(folder, sites.own, BAD)

    return sites.stranger(OTHER, sites.sessions.admit(OTHER), keys)


def reused_token(sites: Sites) -> dict[str, Any]:
    order = json.loads((sites.folder / OTHER / "order.json").read_text())
    return sites.stranger(OTHER, order["token"])


def expired_token(sites: Sites) -> dict[str, Any]:
    return sites.stranger(OTHER, sites.sessions.admit(OTHER, seconds=0.0))


def cases(seconds: float) -> list[Case]:
    """seconds: that the network is gone."""
    mine = f"{BAD}'s answer in round 2"
    wrong = f"a process as {OTHER} after round 1, "
    return [
        Case("killed, called again", f"{BAD} kills itself before its answer in round 2", rejoining),
        Case("gone for good", "the same, and nobody calls it", answer("killed", "not there")),
        Case("slow", f"{mine} comes after {SLOW:g} s, the deadline is {DEADLINE:g} s",
             answer("slow", "no answer within"), DEADLINE),
        Case("server killed", "SIGKILL while it waits for answers in round 2; 2 s later `resume`",
             server, resumed=True),
        Case("network cut", f"all connections end in round 2, none for {seconds:g} s",
             cut(seconds, False)),
        Case("network silent", f"nothing passes for {seconds:g} s from round 2 on",
             cut(seconds, True)),
        Case("corrupted", f"one bit of {mine}", answer("flipped", "checksum differs")),
        Case("truncated", f"half of {mine}", answer("truncated", "checksum differs")),
        Case("replayed", f"its answer of round 1 for {mine}",
             answer("replayed", "belongs to another request")),
        Case("unknown version", f"version 9 on {mine}", answer("version", "version 2 expected")),
        Case("oversized", f"4 MiB more in {mine}, the server takes {LARGEST // 2**20}",
             answer("oversized", f"{LARGEST} may travel")),
        Case("NaN", f"one number of {mine}", answer("NaN", "NaN or infinity")),
        Case("wrong shapes", f"one tensor of {mine}", answer("shapes", "sent 'model")),
        Case("wrong names", f"all tensors of {mine}", answer("names", "other names")),
        Case("another base", wrong + "whose hello has another hash",
             dialling("has base 'beef'", another_base)),
        Case("wrong certificate", wrong + "signed by another authority",
             dialling("", wrong_certificate)),
        Case("another's certificate", wrong + f"with a certificate of {BAD}",
             dialling("came with the certificate", others_certificate)),
        Case("reused token", wrong + "with the token of its first call",
             dialling("no valid token", reused_token)),
        Case("expired token", wrong + "with a token that has run out",
             dialling("has expired", expired_token)),
    ]  # fmt: skip


# what came of it --------------------------------------------------------------------------------


def lost(sites: Sites) -> tuple[str, bool]:
    """What the ledger says was lost, and whether nothing else was."""
    failed = failures(sites.folder / "run")
    if not same(committed(sites.folder / "run"), reference(sites.simulated, missed(failed))):
        return f"COMMITTED OTHER TUNABLES than without {sorted(failed)}", False
    if not failed:
        return "nothing", True
    whose = {client: [str(n) for n, c in sorted(failed) if c == client] for _, client in failed}
    return "; ".join(
        f"{client}'s work of round {', '.join(of)}" for client, of in whose.items()
    ), True


def ran(sites: Sites) -> int:
    """Rounds of a run that got to its end."""
    summary = sites.folder / "run" / "summary.json"
    return len(json.loads(summary.read_text())["history"]) if summary.exists() else 0


def run(case: Case) -> Row:
    """One fault in a run of its own."""
    spec = experiment(
        rounds=ROUNDS, evaluation={"every": 0}, simulation={"cohort": 1},
        training={"optimizer": "adam", "rate": 0.003, "optimizer_state": "keep"},
        exchange={"minimum_replies": 2, "deadline": case.deadline},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        sites = Sites(Path(name), spec)
        try:
            seen = case.play(sites)
            what, good = lost(sites)
        except (FedllmError, TimeoutError) as error:
            return Row(case, "at the end", "all that followed", f"ENDED: {error}", False)
        finally:
            sites.stop()
        how = "resumed" if case.resumed else "went on"
        done = ran(sites)
        return Row(case, seen, what, f"{how}, {done} of {ROUNDS} rounds", good and done == ROUNDS)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| fault | injected how | seen after | lost | run |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {r.case.fault} | {r.case.how} | {r.seen} | {r.lost} | {r.run} |" for r in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cut", type=float, default=20.0, help="seconds without a network")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = []
    for case in cases(asked.cut):
        if asked.only in case.fault:
            start = time.perf_counter()
            found.append(run(case))
            spent = time.perf_counter() - start
            print(f"{case.fault}: {found[-1].run} ({spent:.0f} s)", file=sys.stderr)
    if asked.out:
        asked.out.write_text(table(found))
    else:
        print(table(found), end="")
    sys.exit(not all(row.good for row in found))
