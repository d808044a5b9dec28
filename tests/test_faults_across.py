"""What goes wrong at real sites and between them is named, and nothing of it is committed."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedllm import ledger
from sites import (
    Proxy,
    Server,
    Sites,
    Watch,
    committed,
    failures,
    missed,
    reference,
    same,
)
from small import experiment

KEPT = {"optimizer": "adam", "rate": 0.003, "optimizer_state": "keep"}
FRAMES = {  # what client-2 does to its answer in each round, and what the ledger says of it
    1: ("flipped", "checksum differs"),
    2: ("truncated", "checksum differs"),
    3: ("replayed", "belongs to another request"),
    4: ("version", "version 3 expected"),
    5: ("oversized", "1048576 may travel"),
    6: ("NaN", "NaN or infinity in"),
    7: ("shapes", "sent 'model.score.weight' with shape (1,"),
    8: ("names", "other names"),
}


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Callable[..., Sites]]:
    made: list[Sites] = []

    def make(**sections: Any) -> Sites:
        common = {"training": KEPT, "evaluation": {"every": 0}, "simulation": {"cohort": 1}}
        made.append(Sites(tmp_path, experiment(**{**common, **sections})))
        return made[-1]

    yield make
    for sites in made:
        sites.stop()


def test_every_fault_of_a_site_costs_its_own_answer_and_no_more(
    tmp_path: Path, three: Callable[..., Sites]
) -> None:
    sites = three(rounds=9, exchange={"minimum_replies": 1, "deadline": 4.0})
    sites.plan("client-1", rounds={"6": "slow"}, seconds=5.0)
    sites.plan("client-2", rounds={number: fault for number, (fault, _) in FRAMES.items()})
    sites.plan("client-3", rounds={"2": "killed"})

    def back() -> None:
        watch.wait("client-3 is here", since=sites.injected("client-3"))

    with Watch({2: back}) as watch:
        summary = sites.lead("run", patience=1.0, largest=2**20, lost=sites.lost, listener=watch)
    failed = failures(tmp_path / "run")
    expected = {(number, "client-2"): reason for number, (_, reason) in FRAMES.items()}
    expected |= {(2, "client-3"): "not there", (6, "client-1"): "no answer within 4 s"}
    assert failed.keys() == expected.keys()
    assert all(reason in failed[key] for key, reason in expected.items()), failed
    assert [entry["round"] for entry in summary["history"]] == list(range(1, 10))
    late = [r for r in ledger.read(tmp_path / "run" / "ledger.jsonl") if r.role == "late"]
    assert [(row.round, row.client) for row in late] == [(6, "client-1")]
    wanted = reference(sites.simulated, missed(failed))
    assert same(committed(tmp_path / "run"), wanted)
    assert not same(wanted, reference(sites.simulated))


def test_a_cut_network_and_a_site_of_another_base_change_nothing(
    tmp_path: Path, three: Callable[..., Sites]
) -> None:
    sites, proxy = three(rounds=2), Proxy()
    sites.through = proxy.to
    sites.plan("client-2", rounds={"2": "slow"}, seconds=1.0)
    strangers = []

    def stranger() -> None:
        token = sites.sessions.admit("client-3")
        strangers.append(sites.stranger("client-3", token, hello={"base": "beef"}))

    def cut() -> None:
        sites.wait("client-2")  # its answer comes while nobody can take it
        proxy.cut()
        time.sleep(3.0)
        proxy.mend()

    cutting = threading.Thread(target=cut, daemon=True)
    cutting.start()
    with Watch({1: stranger}) as watch:
        sites.lead("run", listener=watch)
    cutting.join()
    proxy.close()
    (found,) = strangers
    assert found["code"] == 1
    assert watch.after(found["time"], "has base 'beef'")
    assert len(watch.after(sites.injected("client-2"), "broke")) >= 3
    assert failures(tmp_path / "run") == {}
    assert same(committed(tmp_path / "run"), reference(sites.simulated))


def test_a_server_killed_in_mid_round_goes_on_as_if_nothing_had_been(
    tmp_path: Path, three: Callable[..., Sites]
) -> None:
    sites = three(rounds=3)
    sites.plan("client-2", rounds={"2": "slow"}, seconds=3.0)
    server = Server(sites, "run")
    server.until(lambda: bool(sites.injected("client-2")))
    server.process.kill()
    server.process.join()
    assert not (tmp_path / "run" / "checkpoints" / "round-00002").exists()
    again = Server(sites, "run", resume=True)
    again.until(again.ended)
    assert again.process.exitcode == 0
    assert failures(tmp_path / "run") == {}
    assert same(committed(tmp_path / "run"), reference(sites.simulated))
