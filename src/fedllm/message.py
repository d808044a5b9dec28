"""
The one wire format: a Message, and the Frame (bytes) that carries it. Never pickle.

Frame layout: ``FLM2`` | CRC-32 of all that follows | header length (both u32, little endian) |
header (JSON) | safetensors body. The header holds what the body is not: who, which round and step,
roles, codecs, facts.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from enum import StrEnum

import safetensors
import safetensors.torch
from torch import Tensor

from fedllm.errors import FedllmError

MAGIC = b"FLM2"
VERSION = 2
MAX_HEADER = 16 * 2**20
START = 12  # bytes before the header
Fact = int | float | str


class Role(StrEnum):
    """What a tensor on the wire is; privacy rules and codecs go by it."""

    PARAMETER = "parameter"
    LOGIT = "logit"
    FEATURE = "feature"
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    LABEL = "label"
    MASK = "mask"
    INDEX = "index"
    SCALAR = "scalar"
    TOKEN = "token"
    STATISTIC = "statistic"


@dataclass(frozen=True)
class Message:
    """
    What one side says to the other. Strategies fill step, task, tensors, roles and facts;
    the exchange stamps the rest.
    """

    step: str
    task: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)
    client: str = ""
    id: str = ""
    attempt: int = 0
    run: str = ""
    round: int = 0
    base: str = ""


@dataclass(frozen=True)
class Failure:
    """A client that did not do its part: who, where and why."""

    client: str
    step: str
    reason: str


def of_role(role: Role, tensors: dict[str, Tensor]) -> dict[str, Role]:
    """The same role for every tensor."""
    return dict.fromkeys(tensors, role)


def pack(message: Message, codecs: dict[str, str] | None = None) -> bytes:
    """Message -> frame. ``codecs`` names what each tensor was encoded with, for the reader."""
    if set(message.tensors) != set(message.roles):
        raise ValueError(f"{message.step}: every tensor needs exactly one role")
    body = safetensors.torch.save({n: t.contiguous() for n, t in message.tensors.items()})
    header = json.dumps(
        {
            "version": VERSION,
            "id": message.id,
            "attempt": message.attempt,
            "run": message.run,
            "round": message.round,
            "step": message.step,
            "client": message.client,
            "task": message.task,
            "base": message.base,
            "roles": {name: role.value for name, role in message.roles.items()},
            "codecs": codecs or {},
            "facts": message.facts,
            "body": len(body),
        },
        separators=(",", ":"),
    ).encode()
    rest = struct.pack("<I", len(header)) + header
    return MAGIC + struct.pack("<I", zlib.crc32(body, zlib.crc32(rest))) + rest + body


def unpack(frame: bytes) -> tuple[Message, dict[str, str]]:
    """
    Frame -> (message, codec of each tensor).

    Sizes and checksum are looked at before anything is read. Raises FedllmError for anything that
    is not a whole, intact frame of this version.
    """
    if len(frame) < START or frame[:4] != MAGIC:
        raise FedllmError("frame: not a fedllm frame of this version, or truncated")
    checksum, size = struct.unpack("<II", frame[4:START])
    if size > MAX_HEADER or START + size > len(frame):
        raise FedllmError(f"frame: header of {size} bytes does not fit a frame of {len(frame)}")
    if zlib.crc32(memoryview(frame)[8:]) != checksum:
        raise FedllmError("frame: truncated or damaged (checksum differs)")
    try:
        header = json.loads(frame[START : START + size])
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise FedllmError(f"frame: version {VERSION} expected")
        body = frame[START + size :]
        if len(body) != header["body"]:
            raise FedllmError("frame: truncated body")
        facts = header["facts"]
        if not all(isinstance(value, int | float | str) for value in facts.values()):
            raise FedllmError("frame: a fact that is neither number nor text")
        tensors = safetensors.torch.load(body)
        roles = {str(name): Role(role) for name, role in header["roles"].items()}
        if set(roles) != set(tensors):
            raise FedllmError("frame: names of tensors and roles differ")
        codecs = {str(name): str(codec) for name, codec in header["codecs"].items()}
        message = Message(
            step=str(header["step"]),
            task=str(header["task"]),
            tensors=tensors,
            roles=roles,
            facts=facts,
            client=str(header["client"]),
            id=str(header["id"]),
            attempt=int(header["attempt"]),
            run=str(header["run"]),
            round=int(header["round"]),
            base=str(header["base"]),
        )
        return message, codecs
    except FedllmError:
        raise
    except (
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
        safetensors.SafetensorError,
    ) as error:  # fmt: skip
        raise FedllmError(f"frame: malformed ({type(error).__name__}: {error})") from None


def payload_bytes(message: Message) -> dict[Role, int]:
    """Bytes of tensor data per role (headers and names excluded), in the order of names."""
    sums: dict[Role, int] = {}
    for name, tensor in sorted(message.tensors.items()):
        role = message.roles[name]
        sums[role] = sums.get(role, 0) + tensor.numel() * tensor.element_size()
    return sums
