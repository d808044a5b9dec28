"""What codecs promise: error, bias, bytes, shapes; alone, in stacks and with a memory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm import costs, federation
from fedllm import experiment as ex
from fedllm.codecs import CODECS, SIZED, chosen, codec
from fedllm.codecs.base import MOST, SIZE, Codec, weight
from fedllm.codecs.packed import Zstd
from fedllm.errors import FedllmError
from fedllm.exchange import decode, encode
from fedllm.ledger import total
from fedllm.message import Message, Role, of_role, outline, pack
from small import build, experiment, finish

SINGLE = [*sorted(CODECS), *(f"{kind}-30" for kind in SIZED)]
STACKS = ["topk-10+int8+zstd", "random-20+fp16", "lowrank-2+int4-channel", "topk-30+sign+zstd",
          "energy-90+bf16+zstd", "int4-tensor-stochastic+zstd"]  # fmt: skip
REMEMBER = ["topk-10+feedback", "random-20+feedback", "sign+feedback", "int4+feedback",
            "lowrank-1+feedback", "topk-10+int8-stochastic+zstd+feedback"]  # fmt: skip
EVERY = [*SINGLE, *STACKS, *REMEMBER]
SHAPES = [(), (0,), (1,), (5,), (301,), (0, 5), (3, 0), (1, 1), (17, 15), (2, 9, 7)]
SCAFFOLD = {"client": {"kind": "scaffold"}}
some_shape = st.lists(st.integers(0, 12), max_size=3).map(tuple)


def drawn(shape: tuple[int, ...], seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + offset


def there_and_back(name: str, x: Tensor, *purpose: object) -> Tensor:
    used = codec(name)
    return used.decode(used.encode({}, x, purpose)[1])


def ranges(x: Tensor, along: str) -> Tensor:
    """Largest minus least, along what shares a range."""
    if x.dim() < 2 or along == "tensor":
        return (x.max() - x.min()).expand_as(x)
    dims = (-1,) if along == "row" else tuple(range(x.dim() - 1))
    return (x.amax(dims, True) - x.amin(dims, True)).expand_as(x)


def uniform(x: Tensor, name: str) -> Tensor:
    bits, *more = name.removeprefix("int").split("-")
    along = next((one for one in more if one != "stochastic"), "row")
    step = ranges(x, along) / (2 ** int(bits) - 1)
    rounding = 1e-5 * step + 3e-7 * x.abs().max() + 1e-37
    return step / (1 if "stochastic" in more else 2) + rounding


def dropped(x: Tensor, k: int) -> Tensor:
    """The norm of all but the k largest."""
    return x.abs().reshape(-1).sort(descending=True).values[k:].norm().expand_as(x)


def error(name: str, x: Tensor) -> Tensor:
    """How far from x each number may come out."""
    k, tiny = math.ceil(0.3 * x.numel()), 1e-5 * x.norm()
    if name.startswith("int"):
        return uniform(x, name)
    if name in ("lowrank-30", "none", "zstd"):  # no matrix here has so high a rank
        return torch.zeros_like(x)
    return {
        "fp16": lambda: (x.abs() * 2**-11).clamp(min=2**-25) + (x.abs() - 65504).clamp(min=0),
        "bf16": lambda: x.abs() * 2**-8,
        # no difference of squares: numbers may lie close together far from zero
        "sign": lambda: (x.abs().double() - x.abs().double().mean()).norm() + tiny,
        "energy-30": lambda: 0.7**0.5 * x.norm() + tiny,
        "topk-30": lambda: dropped(x, k) + tiny,
        "random-30": lambda: x.abs() * max(x.numel() / k - 1, 1) + 1e-6 * x.abs(),
    }[name]()


@pytest.mark.parametrize("name", SINGLE)
@settings(max_examples=25)
@given(shape=some_shape, seed=st.integers(0, 99), scale=st.sampled_from([1e-4, 1.0, 3e4]),
       offset=st.sampled_from([0.0, -5.0]))  # fmt: skip
def test_the_error_is_as_small_as_said(
    name: str, shape: tuple[int, ...], seed: int, scale: float, offset: float
) -> None:
    x = drawn(shape, seed, scale, offset)
    found = there_and_back(name, x, seed)
    assert found.shape == x.shape and found.dtype == torch.float32
    if x.numel():
        wrong = (found - x).abs() > error(name, x)
        assert not bool(wrong.any()), (x, found)
        if name == "sign":  # the square of the error exactly
            assert float((found - x).norm()) <= float(error(name, x)) * 1.001


@pytest.mark.parametrize("name", EVERY)
def test_bytes_follow_from_the_shape(name: str) -> None:
    """Part by part, with kinds; where data decide, no part is larger than foreseen."""
    used = codec(name)
    for shape in SHAPES:
        _, parts = used.encode({}, drawn(shape, 3), ("any",))
        foreseen = used.layout(shape)
        if used.exact:
            assert {n: (tuple(t.shape), t.dtype) for n, t in parts.items()} == foreseen
        sent = {n: (tuple(t.shape), t.dtype) for n, t in parts.items()}
        assert weight(sent) <= weight(foreseen)
    assert {tensor.dtype for tensor in parts.values()} <= SIZE.keys()


def test_bytes_as_the_names_say() -> None:
    sizes = {"none": 4000, "fp16": 2000, "int8": 1000 + 10 * 8, "int8-tensor": 1000 + 8,
             "int8-channel": 1000 + 100 * 8, "int4": 500 + 10 * 8 + 8, "sign": 125 + 4 + 8,
             "topk-10": 400 + 125 + 8, "topk-1": 40 + 40 + 8, "random-10": 400 + 16 + 8,
             "topk-10+int8": 100 + 8 + 125 + 8, "topk-10+sign": 13 + 4 + 4 + 125 + 8,
             "lowrank-2": 2 * 110 * 4}  # fmt: skip
    assert {n: weight(codec(n).layout((10, 100))) for n in sizes} == sizes


@pytest.mark.parametrize("name", EVERY)
def test_zeros_and_shapes_are_kept(name: str) -> None:
    for shape in SHAPES:
        found = there_and_back(name, torch.zeros(shape), "any")
        assert found.shape == shape and torch.equal(found, torch.zeros(shape))
    assert there_and_back(name, torch.ones(3, 3, dtype=torch.float64)).dtype in (
        torch.float32, torch.float64 if name in ("none", "zstd") else torch.float32
    )  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_seen_behind_every_codec(name: str, bad: float) -> None:
    """So that the exchange can refuse it; and no memory is spoilt for ever."""
    for place in (0, 7, 151):
        x = drawn((19, 8), 1)
        x.view(-1)[place] = bad
        used = codec(name)
        state, parts = used.encode({}, x, ("any",))
        assert not bool(torch.isfinite(used.decode(parts)).all())
        assert all(bool(torch.isfinite(t).all()) for t in state.values())


@pytest.mark.parametrize("name", [n for n in SINGLE if "stochastic" in n] + ["random-20"])
def test_what_is_drawn_is_unbiased(name: str) -> None:
    """10,000 draws of each number, within five standard errors of it."""
    one = torch.tensor([0.0, 0.21, -0.7, 1.0, 0.5001, 0.3])
    x = torch.cat([one.repeat(10_000, 1), torch.full((1, 6), -1.0), torch.full((1, 6), 1.5)])
    found = there_and_back(name, x, "unbiased", 1)
    spread = found[:-2].std(0) / 100
    assert bool(((found[:-2].mean(0) - one).abs() <= 5 * spread + 1e-6).all())
    assert int((spread > 0).sum()) >= 2  # the others are values that there are
    assert torch.equal(found, there_and_back(name, x, "unbiased", 1))  # the same stream
    assert not torch.equal(found, there_and_back(name, x, "unbiased", 2))


@pytest.mark.parametrize("name", REMEMBER)
def test_with_feedback_the_sum_of_what_is_sent_is_that_of_the_truth(name: str) -> None:
    """It differs by what is left out now, an ever smaller share; without, that is not so."""
    used, plain = codec(name), codec(name.removesuffix("+feedback"))
    state: dict[str, Tensor] = {}
    truth, sent, forgot = torch.zeros(20, 30), torch.zeros(20, 30), torch.zeros(20, 30)
    steady, share = drawn((20, 30), 5), []
    for t in range(120):
        x = steady + 0.3 * drawn((20, 30), 100 + t)
        state, parts = used.encode(state, x, ("any", t))
        truth, sent = truth + x, sent + used.decode(parts)
        forgot += plain.decode(plain.encode({}, x, ("any", t))[1])
        share.append(float((truth - sent).norm() / truth.norm()))
        assert float((truth - sent - state["rest"]).norm()) <= 1e-4 * float(truth.norm())
    assert share[119] < min(0.15, 0.6 * share[29])
    if name not in ("random-20+feedback", "topk-10+int8-stochastic+zstd+feedback"):
        assert float((truth - sent).norm()) <= float((truth - forgot).norm())


def test_every_codec_says_what_it_loses() -> None:
    names = [*CODECS, *(f"{kind}-5" for kind in SIZED)]
    assert all(codec(name).loses != Codec.loses for name in names)
    assert codec("none").loses == codec("zstd").loses == "nothing"
    assert codec("topk-5+int8+zstd+feedback").loses == (
        "all but 5 % of the numbers, then up to half a step of each row's range, of 255, which is "
        "added to the next message"
    )


def test_a_stack_is_one_codec_after_the_other() -> None:
    x = drawn((30, 40), 8)
    _, parts = codec("topk-25").encode({}, x)
    _, inner = codec("int8").encode({}, parts["value"])
    by_hand = codec("topk-25").decode({**parts, "value": codec("int8").decode(inner)})
    assert torch.equal(there_and_back("topk-25+int8", x), by_hand)
    assert torch.equal(there_and_back("topk-25+int8+zstd", x), by_hand)
    _, whole = codec("topk-25+int8+zstd").encode({}, x)
    assert set(whole) == {"zstd"}  # as one: each part costs a name and a shape
    low_rank = drawn((50, 2), 1) @ drawn((2, 60), 2)
    _, halves = codec("lowrank-2+fp16").encode({}, low_rank)
    assert {n: t.dtype for n, t in halves.items()} == {"left.x": torch.float16,
                                                       "right.x": torch.float16}  # fmt: skip


def test_what_repeats_is_packed() -> None:
    x = torch.zeros(100, 100)
    x[3] = 1
    _, parts = codec("int8+zstd").encode({}, x)
    assert sum(t.numel() for t in parts.values()) < 1000
    for kind in SIZE:
        whole = torch.arange(6).reshape(2, 3).to(kind)
        found = Zstd().decode(Zstd().encode({}, whole)[1])
        assert found.dtype == kind and torch.equal(found, whole)


def on_the_wire(name: str, parts: dict[str, Tensor]) -> Tensor:
    tensors = {f"h//{part}": tensor for part, tensor in parts.items()}
    frame = pack(Message("b3", tensors=tensors, roles=of_role(Role.LOGIT, tensors)), {"h": name})
    return decode(frame, {"logit": name})[0].tensors["h"]


damage = st.one_of(
    st.just(lambda t: t[:-1] if t.dim() else t.reshape(1)), st.just(lambda t: t.reshape(-1, 1)),
    st.just(lambda t: torch.cat([t.reshape(-1), t.reshape(-1)])),
    st.just(lambda t: t.to(torch.int64)), st.just(lambda t: t.to(torch.float64)),
    st.integers(0, 255).map(lambda n: lambda t: torch.full_like(t, n)), st.just(None),
)  # fmt: skip


@pytest.mark.parametrize("name", ["int4", "int8-channel", "sign", "topk-40", "topk-2", "random-40",
                                  "zstd", *STACKS])  # fmt: skip
@settings(max_examples=20)
@given(which=st.integers(0, 9), hurt=damage)
def test_damaged_parts_are_refused_or_a_small_tensor(
    name: str, which: int, hurt: Callable[[Tensor], Tensor] | None
) -> None:
    """Never another error, and never more numbers than the parts can stand for."""
    _, parts = codec(name).encode({}, drawn((21, 10), 2), ("any",))
    key = sorted(parts)[which % len(parts)]
    if hurt is None:
        del parts[key]
        if not parts:  # then the tensor is not there, which whoever asked for it notices
            return
    else:
        parts[key] = hurt(parts[key])
    try:
        found = on_the_wire(name, parts)
    except FedllmError as error:
        assert "'h'" in str(error) or "role" in str(error) or "frame" in str(error)
        return
    assert found.numel() <= 210 * 100


def test_few_bytes_do_not_become_many() -> None:
    shape = torch.tensor([2**14, 2**13], dtype=torch.int32)
    huge = torch.tensor([2**15, 2**15], dtype=torch.int32)
    one = torch.ones(1)
    _, packed = Zstd().encode({}, torch.zeros(1000))
    body, lying = packed["zstd"], packed["zstd"].clone()
    size = slice(5, 9)  # after the number of parts, a name of one letter, its kind and dimensions
    lying[size] = torch.tensor([10**8], dtype=torch.int32).view(torch.uint8)
    more = body.clone()
    more[size] = torch.tensor([MOST + 1], dtype=torch.int32).view(torch.uint8)
    heavy = body.clone()
    heavy[size] = torch.tensor([MOST], dtype=torch.int32).view(torch.uint8)
    heavy[3] = 3  # float64
    level = torch.zeros(4, dtype=torch.uint8)
    drawn_by = torch.tensor([1, 2])
    for name, parts, said in (
        ("zstd", {"zstd": lying}, "4000 bytes packed for a tensor of 400000000"),
        ("zstd", {"zstd": more}, "is refused"),
        ("zstd", {"zstd": heavy}, "bytes are refused"),
        ("zstd", {"zstd": torch.cat([body, body[9:]])}, "damaged"),
        ("zstd", {"zstd": body[:-3]}, "damaged"),
        ("topk-10", {"value": one, "index": one.int(), "shape": shape}, "1"),
        ("random-10", {"value": one, "drawn": drawn_by, "shape": shape}, "1"),
        ("random-10", {"value": one, "drawn": drawn_by, "shape": one.int() * 4}, "other places"),
        ("sign", {"sign": level, "scale": one, "shape": huge}, "is refused"),
        ("int4", {"level": level, "low": one, "step": one, "shape": shape}, "do not fit"),
        ("int4-tensor", {"level": level, "low": one, "step": one, "shape": shape}, "do not hold"),
        ("topk-10", {"value": one, "index": one.int() * 9, "shape": one.int() * 4}, "beyond"),
    ):
        with pytest.raises(FedllmError, match=said):
            on_the_wire(name, parts)


@pytest.mark.parametrize(
    ("name", "said"),
    [("int8+topk-10", "in this order"), ("zstd+int8", "in this order"), ("topk-5+topk-5", "order"),
     ("feedback", "in this order"), ("feedback+int8", "in this order"), ("int8+int4", "order"),
     ("none+zstd", "unknown codec 'none'"), ("int8+", "unknown codec ''"), ("int5", "'int8'"),
     ("topk-10+init8", "did you mean 'int8'"), ("topk-101", "unknown"), ("topk+zstd", "unknown")],
)  # fmt: skip
def test_stacks_that_mean_nothing_are_refused(name: str, said: str) -> None:
    with pytest.raises(FedllmError, match=said):
        codec(name)
    with pytest.raises(FedllmError, match=rf"exchange.codecs.logit.*{said}"):
        ex.parse({"exchange": {"codecs": {"logit": name}}}, "test", Path.cwd())


def test_a_table_chooses_by_name_and_way() -> None:
    codecs = {"parameter": {"up:*lora_B*": "int4", "up": "topk-10+feedback", "*head*": "fp16"},
              "logit": "int8"}  # fmt: skip
    assert chosen(codecs, "parameter", "h.0.lora_B.w", "up") == "int4"
    assert chosen(codecs, "parameter", "h.0.lora_A.w", "up") == "topk-10+feedback"
    assert chosen(codecs, "parameter", "head.w", "down") == "fp16"
    assert chosen(codecs, "parameter", "h.0.lora_B.w", "down") == "none"
    assert chosen(codecs, "logit", "logits", "down") == "int8"
    assert chosen(codecs, "gradient", "gradient", "up") == "none"
    x = {"a.lora_B": torch.ones(4, 4), "head": torch.ones(4, 4)}
    message = Message("a3", "train", x, of_role(Role.PARAMETER, x))
    frame, _, used, _ = encode(message, codecs, way="up")
    assert used == {"a.lora_B": "int4", "head": "topk-10+feedback"}
    assert decode(frame, codecs, "up")[0].tensors["head"].shape == (4, 4)
    with pytest.raises(FedllmError, match=r"'a\.lora_B' came with codec 'int4'"):
        decode(frame, codecs, "down")


@pytest.mark.parametrize(
    ("codecs", "strategy", "said"),
    [({"activation": "topk-10+feedback"}, {}, "rows differ"),
     ({"parameter": "topk-10+feedback"}, {"payload": "delta"}, "expected exchange.codecs"),
     ({"parameter": {"down": "sign+feedback"}}, {"payload": "delta"}, "what clients send"),
     ({"parameter": {"up": "sign+feedback"}}, {}, "payload = 'delta' or 'change'"),
     ({"parameter": {"up": "sign+feedback"}}, {"kind": "activations"}, "values travel"),
     ({"parameter": {"up": "int8+feedback"}}, {"payload": "delta", "aggregation": "flexlora"},
      "another basis"),
     ({"parameter": {"up": "int8+feedback"}}, {"payload": "delta", "aggregation": "hetlora",
                                               "prune": 0.5}, "leave strategy.prune out"),
     ({"parameter": "topk-10"}, {"payload": "delta"}, "travels down is values"),
     ({"parameter": {"up": "random-10+int8"}}, {}, "travels up is values.*'random'"),
     ({"parameter": {"*lora_A*": "sign"}}, {"kind": "activations"}, "is values.*'sign'"),
     ({"gradient": "topk-10"}, SCAFFOLD, "travels up|c has to hear"),
     ({"gradient": {"up": "int8"}}, SCAFFOLD, "c has to hear.*up = 'int8\\+feedback'"),
     ({"gradient": {"down": "sign"}}, SCAFFOLD, "travels down is values"),
     ({"gradient": {"up": "int8+feedback"}}, {}, "rows differ"),
     ({"parameter": {"sideways:*A*": "int8"}}, {}, "no way 'sideways'.*'?up"),
     ({"parameter": 8}, {}, "exchange.codecs.parameter: 8: expected a codec's name")],
)  # fmt: skip
def test_codecs_are_refused_where_they_make_no_sense(
    codecs: dict[str, Any], strategy: dict[str, Any], said: str
) -> None:
    values = {"exchange": {"codecs": codecs}, "strategy": strategy,
              "training": {"optimizer": "sgd"}}  # fmt: skip
    with pytest.raises(FedllmError, match=said):
        ex.parse(values, "test", Path.cwd())


def test_what_was_left_out_at_another_rank_is_not_added() -> None:
    """A row would be added to every row."""
    with pytest.raises(FedllmError, match=r"leave tunables\.schedule out"):
        experiment(strategy={"payload": "delta"}, tunables={"schedule": {1: 1, 2: 2}},
                   exchange={"codecs": {"parameter": {"up": "int8+feedback"}}})  # fmt: skip
    used = codec("topk-10+feedback")
    state, _ = used.encode({}, drawn((1, 30), 1))
    with pytest.raises(FedllmError, match=r"\(1, 30\), for a tensor of \(4, 30\)"):
        used.encode(state, drawn((4, 30), 1))


def test_tables_survive_their_own_text(tmp_path: Path) -> None:
    table = {"up:*B*": "int4", "up": "sign"}
    spec = experiment(strategy={"payload": "delta"}, exchange={"codecs": {"parameter": table}})
    (tmp_path / "again.toml").write_text(ex.dump(spec))
    assert ex.load(tmp_path / "again.toml").exchange == spec.exchange


def test_a_codec_of_a_tunable_that_there_is_not_is_refused() -> None:
    with pytest.raises(FedllmError, match=r"codecs\.parameter: 'upp' is no tunable.*'up'"):
        build(experiment(exchange={"codecs": {"parameter": {"upp": "int8"}}}))


def remembering(**more: Any) -> ex.Experiment:
    """Deltas up with a memory and something drawn, each round; down as they are."""
    return experiment(
        strategy={"payload": "delta"}, evaluation={"every": 0}, training={"rate": 0.3},
        exchange={"codecs": {"parameter": {"up": "topk-20+int8-stochastic+feedback"}}}, **more,
    )  # fmt: skip


class Cut(federation.Silent):
    def round(self, entry: Any) -> None:
        if entry["round"] == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_remembers_the_same(tmp_path: Path) -> None:
    spec = remembering(rounds=3)
    prepared = federation.prepare(spec, 0)
    whole = federation.run(spec, 0, tmp_path / "whole", prepared=prepared)
    with pytest.raises(KeyboardInterrupt):
        federation.run(spec, 0, tmp_path / "cut", prepared=prepared, listener=Cut())
    again = federation.run(spec, 0, tmp_path / "cut", resume=True, prepared=prepared)
    for name in ("server.safetensors", "state.json"):
        one, other = (tmp_path / k / "checkpoints" / "round-00003" / name for k in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()
    assert again["history"] == whole["history"]


class Doubled:
    """Asks every client twice with the same message, and keeps what came."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.frames = handle, list[tuple[bytes, bytes]]()

    def __call__(self, frames: Any) -> Any:
        first, second = self.handle(frames), self.handle(frames)
        self.frames += [
            (first[c], second[c]) for c in first if outline(first[c])[0]["step"] == "a3"
        ]
        return first


def test_a_repeated_answer_and_a_repeated_round_leave_out_the_same() -> None:
    built = build(remembering(rounds=2))
    endpoint = Doubled(built.exchange.transport._endpoint)  # type: ignore[attr-defined]
    built.exchange.transport._endpoint = endpoint  # type: ignore[attr-defined]
    done = finish(built)
    assert len(endpoint.frames) == 6
    assert all(first == second for first, second in endpoint.frames)
    kept = {n: built.worker.recall(n) for n in built.worker.sites}
    assert all(kept.values())  # of the first round, until the third one opens
    plain = build(remembering(rounds=2))
    other = finish(plain)
    assert all(torch.equal(t, other.server.shared[n]) for n, t in done.server.shared.items())
    for _ in range(2):  # the same round twice: the second time from where the first began
        plain.exchange.open(3)
        again = plain.strategy.serve(other.server, list(plain.worker.sites), plain.exchange, None)  # type: ignore[arg-type]
        rest = {n: plain.worker.sites[n].group("left-out") for n in plain.worker.sites}
    built.exchange.open(3)
    once = built.strategy.serve(done.server, list(built.worker.sites), built.exchange, None)  # type: ignore[arg-type]
    assert all(torch.equal(t, again.shared[n]) for n, t in once.shared.items())
    for client, site in built.worker.sites.items():
        found = site.group("left-out")
        assert found.keys() == rest[client].keys() and len(found)
        assert all(torch.equal(t, rest[client][n]) for n, t in found.items())


@pytest.mark.parametrize(
    ("strategy", "codecs", "step"),
    [({"payload": "delta"}, {"parameter": {"up": "topk-7+int4", "*lora_A*": "int8-channel"}}, "a"),
     ({"kind": "logits"}, {"logit": "topk-30+sign"}, "b"),
     ({"kind": "activations", "cut": 1}, {"activation": "int8", "gradient": "int4-stochastic",
                                          "parameter": "bf16"}, "c")],
)  # fmt: skip
def test_the_plan_knows_the_bytes(
    strategy: dict[str, Any], codecs: dict[str, Any], step: str
) -> None:
    """Law 6 behind codecs: what the ledger counted is what follows from the shapes."""
    from fedllm.estimates import lines
    from fedllm.estimates.estimator import Estimator
    from fedllm.planning.sizes import sizes

    spec = experiment(strategy=strategy, exchange={"codecs": codecs}, evaluation={"every": 0})
    built = build(spec)
    finish(built)
    data = sizes(spec)
    line = lines.line(Estimator(spec, data.labels), spec.strategy, data)
    rows = [r for r in built.ledger.rows if r.step.startswith(step)]
    for way, foreseen in zip(("up", "down"), line.payload, strict=True):
        sent = total(rows, "payload_bytes", direction=way) / len(built.worker.sites)
        # of activations the plan has a mean batch
        assert foreseen == pytest.approx(sent, rel=0.01 if step == "c" else 1e-9)
    assert not costs.inexact(codecs) and costs.inexact({"logit": "int8+zstd"}) == ["int8+zstd"]
    used = {r.codec for r in rows if r.payload_bytes}
    named = {n for v in codecs.values() for n in ([v] if isinstance(v, str) else v.values())}
    assert named <= used


@given(n=st.integers(1, 40), c=st.integers(1, 40), q=st.integers(1, 45))
def test_low_rank_is_as_good_as_the_values_that_it_drops(n: int, c: int, q: int) -> None:
    """K-07: the squared error is the sum of the dropped sigma^2; q (n + C) numbers travel."""
    z = torch.randn(n, c, generator=torch.Generator().manual_seed(n * 100 + c))
    _, parts = codec(f"lowrank-{q}").encode({}, z)
    sent = sum(part.numel() for part in parts.values())
    assert sent == min(q * (n + c), n * c)
    lost = float((codec(f"lowrank-{q}").decode(parts) - z).square().sum())
    dropped = torch.linalg.svdvals(z.double())[q:].square().sum() if sent < n * c else 0.0
    assert lost == pytest.approx(float(dropped), rel=1e-3, abs=1e-6)


@given(n=st.integers(2, 40), c=st.integers(2, 40), last=st.integers(1, 100), at=st.floats(0, 1))
def test_enough_energy_is_kept(n: int, c: int, last: int, at: float) -> None:
    """K-03: of every matrix at least T, so that it errs by sqrt(1 - T); and no rank too many."""
    draw = torch.Generator().manual_seed(n * 100 + c)
    z = torch.randn(n, c, generator=draw) @ torch.diag(0.7 ** torch.arange(c))
    share = (90 + (last - 90) * at) / 100
    _, parts = codec(f"energy-90-{last}", at).encode({}, z)
    found = codec("energy-50").decode(parts)  # who decodes need not know the round
    assert float((found - z).norm() / z.norm()) <= math.sqrt(1 - share) + 1e-5
    assert sum(part.numel() for part in parts.values()) <= n * c
    if "left" in parts:
        q = parts["left"].shape[1]
        energy = torch.linalg.svdvals(z.double()).square()
        assert float(energy[: q - 1].sum() / energy.sum()) < share + 1e-9
        assert float(energy[:q].sum() / energy.sum()) >= share - 1e-9


@pytest.mark.parametrize("name", ["lowrank", "lowrank-0", "lowrank-x", "fp15", "topk", "energy-101",
                                  "energy-95-", "energy-9-9-9"])  # fmt: skip
def test_codecs_that_there_are_not(name: str) -> None:
    with pytest.raises(FedllmError, match="unknown codec"):
        codec(name)
    with pytest.raises(FedllmError, match=r"exchange.codecs.logit: unknown codec"):
        ex.parse({"exchange": {"codecs": {"logit": name}}}, "test", Path.cwd())


def test_the_experiment_knows_every_codec() -> None:
    assert (tuple(CODECS), tuple(SIZED)) == (ex.CODECS, tuple(ex.SIZED))
