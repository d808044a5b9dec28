import json
import math
import struct
import zlib
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm import message
from fedllm.errors import FedllmError
from fedllm.exchange import decode, encode
from fedllm.message import (
    MAGIC,
    MAX_HEADER,
    START,
    Message,
    Role,
    of_role,
    pack,
    payload_bytes,
    unpack,
)  # fmt: skip

names = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=12)
tensors = st.dictionaries(
    names,
    st.tuples(
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from([torch.float32, torch.float16, torch.int32, torch.int64, torch.float64]),
    ).map(lambda pair: torch.ones(pair[0], dtype=pair[1])),
    max_size=4,
)
facts = st.dictionaries(names, st.one_of(st.integers(), st.floats(allow_nan=False), st.text()))


@given(tensors=tensors, facts=facts, role=st.sampled_from(Role), round=st.integers(0, 10**6))
def test_what_is_packed_comes_out(
    tensors: dict[str, torch.Tensor], facts: dict[str, int | float | str], role: Role, round: int
) -> None:
    message = Message("a1", "train", tensors, dict.fromkeys(tensors, role), facts, "client-1",
                      "7", 2, "run", round, "base")  # fmt: skip
    frame, _, _, _ = encode(message, {})
    found, wire, _ = decode(frame, {})
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert (found.roles, found.facts, found.round) == (message.roles, facts, round)
    assert sum(payload_bytes(wire).values()) <= len(frame)


def framed(header: bytes, body: bytes = b"") -> bytes:
    """A frame whose checksum is right, whatever is in it."""
    rest = struct.pack("<I", len(header)) + header + body
    return MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, MAGIC + noise, framed(noise), framed(noise, b"x" * 9)):
        with pytest.raises(FedllmError):
            unpack(data)


FRAME = pack(Message("a1", tensors={"w": torch.arange(6.0)}, roles={"w": Role.PARAMETER}))


@given(place=st.integers(0, len(FRAME) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(place: int, bit: int) -> None:
    data = bytearray(FRAME)
    data[place] ^= 1 << bit
    with pytest.raises(FedllmError, match="frame"):
        unpack(bytes(data))


@given(st.integers(0, len(FRAME) - 1))
def test_a_truncated_frame_is_refused(length: int) -> None:
    with pytest.raises(FedllmError, match="frame"):
        unpack(FRAME[:length])


def opened() -> tuple[dict[str, Any], bytes]:
    """Header and body of the frame above."""
    (size,) = struct.unpack("<I", FRAME[8:START])
    return json.loads(FRAME[START : START + size]), FRAME[START + size :]


def test_another_version_is_refused() -> None:
    header, body = opened()
    with pytest.raises(FedllmError, match="version 3"):
        unpack(framed(json.dumps({**header, "version": 2}).encode(), body))
    with pytest.raises(FedllmError, match="of this version"):
        unpack(b"FLM2" + FRAME[4:])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(opened()[0])), value=values)
def test_whatever_a_header_says_is_a_message_or_refused(key: str, value: Any) -> None:
    header, body = opened()
    try:
        found, codecs = unpack(framed(json.dumps({**header, key: value}).encode(), body))
    except FedllmError:
        return
    assert torch.equal(found.tensors["w"], torch.arange(6.0))
    assert all(isinstance(fact, int | float | str) for fact in found.facts.values())
    assert all(isinstance(codec, str) for codec in codecs.values())


@given(st.binary(max_size=80))
def test_whatever_a_body_holds_is_tensors_or_refused(body: bytes) -> None:
    header, _ = opened()
    with pytest.raises(FedllmError):
        unpack(framed(json.dumps({**header, "body": len(body)}).encode(), body))


@pytest.mark.parametrize(
    "header",
    [b"[" * 10**6, b'{"version":3,"facts":' + b'{"a":' * 10**5, b'{"version":3,"round":1e999}',
     b'{"version":3,"body":' + b"9" * 5000 + b"}"],
    ids=["deep list", "deep facts", "infinite round", "long number"],
)  # fmt: skip
def test_a_hostile_header_is_refused(header: bytes) -> None:
    with pytest.raises(FedllmError, match="frame"):
        unpack(framed(header))


def test_a_header_larger_than_any_is_refused_unread() -> None:
    rest = struct.pack("<I", MAX_HEADER + 1) + b" " * (MAX_HEADER + 1)
    with pytest.raises(FedllmError, match="does not fit"):
        unpack(MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest)


def test_a_tensor_without_a_role_cannot_leave() -> None:
    with pytest.raises(ValueError, match="role"):
        pack(Message("a1", tensors={"w": torch.ones(2)}))


def test_parts_that_do_not_fit_are_refused() -> None:
    """From another machine anything may come."""
    large = {"left": torch.ones(2**15, 1), "right": torch.ones(1, 2**15)}
    odd = {"left": torch.ones(2, 3), "right": torch.ones(2, 3)}
    deep = {"left": torch.ones(1, 2**15, 1), "right": torch.ones(1, 1, 2**18)}
    wide = {"level": torch.zeros(10**5, 1, dtype=torch.uint8), "low": torch.zeros(1, 10**5),
            "step": torch.zeros(1, 10**5)}  # fmt: skip
    for parts, name in ((large, "lowrank-1"), (odd, "lowrank-1"), ({"low": odd["left"]}, "int8"),
                        (deep, "lowrank-1"), (wide, "int8")):  # fmt: skip
        tensors = {f"h//{part}": tensor for part, tensor in parts.items()}
        frame = pack(
            Message("b3", tensors=tensors, roles=of_role(Role.LOGIT, tensors)), {"h": name}
        )
        with pytest.raises(FedllmError, match="'h'"):
            decode(frame, {"logit": name})


def test_who_sends_does_not_choose_the_codec() -> None:
    """A codec of the experiment on another role's tensor, or one where none was asked for."""
    x = torch.ones(4, 4)
    frame, _, _, _ = encode(Message("b3", tensors={"z": x}, roles={"z": Role.LOGIT}),
                         {"logit": "lowrank-2"})  # fmt: skip
    for codecs in ({}, {"logit": "int8"}, {"parameter": "lowrank-2"}):
        with pytest.raises(FedllmError, match=r"'z' came with codec 'lowrank-2'; exchange.codecs"):
            decode(frame, codecs)
    assert torch.allclose(decode(frame, {"logit": "lowrank-2"})[0].tensors["z"], x)


def test_an_unknown_codec_is_refused() -> None:
    frame = pack(
        Message("c2", tensors={"h//x": torch.ones(2)}, roles={"h//x": Role.ACTIVATION}),
        {"h": "zip"},
    )
    with pytest.raises(FedllmError, match="zip"):
        decode(frame, {"activation": "zip"})


DTYPES = [torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16,
          torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    names=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=6),
        min_size=5,
        max_size=5,
        unique=True,
    ),
)
def test_a_body_is_what_the_library_writes(
    shapes: list[list[int]], dtypes: list[torch.dtype], names: list[str]
) -> None:
    """Byte for byte, whatever the shapes, kinds and names; and transposed ones, too."""
    tensors = {}
    for name, dtype, shape in zip(names, dtypes, shapes, strict=False):
        tensors[name] = (torch.arange(math.prod(shape)) % 2).reshape(shape).to(dtype).mT \
            if len(shape) > 1 else torch.ones(shape, dtype=dtype)  # fmt: skip
    theirs = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    assert b"".join(message._body(tensors)) == theirs


def test_the_outline_is_what_unpacking_says() -> None:
    sent = Message(
        "s", "t", {"a": torch.ones(3), "b": torch.ones(2, 2).half(), "c": torch.ones(2)},
        {"a": Role.LOGIT, "b": Role.PARAMETER, "c": Role.LOGIT}, {"x": 1}, round=3,
    )  # fmt: skip
    found, roles = message.outline(pack(sent))
    assert (found["step"], found["task"], found["round"], found["facts"]) == ("s", "t", 3, {"x": 1})
    assert roles == {role.value: size for role, size in message.payload_bytes(sent).items()}


def test_a_header_names_a_tensor_only_where_it_differs() -> None:
    """Names are long: what is so of nearly all stands there once."""
    x = {f"{'layer.' * 20}{n}": torch.ones(4) for n in range(50)}
    roles = of_role(Role.PARAMETER, x)
    odd = sorted(x)[7]
    codecs = {"parameter": {odd: "bf16", "*": "fp16"}, "logit": "int8"}
    for said in (roles, {**roles, odd: Role.LOGIT}, {**roles, odd: Role.INDEX}):
        frame, wire, used, _ = encode(Message("a3", tensors=x, roles=said), codecs)
        header, _ = message.outline(frame)
        assert len(json.dumps([header["roles"], header["codecs"]])) < 600
        found, travelled, told = decode(frame, codecs)
        assert found.roles == said and travelled.roles == wire.roles and told == used
