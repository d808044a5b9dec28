"""A base model and its tokenizer, from the hub, a folder, or built in."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.lora import A, B, module_of, rank_of, sizes
from fedllm.models.attention import NAME as BLOCKS
from fedllm.models.core import Core, Part, Piece, graft
from fedllm.models.families import FAMILIES, Family
from fedllm.models.frozen import Frozen
from fedllm.models.slots import SPARSE, Slots, give_slots
from fedllm.models.tunables import head_names, install, masks, within
from fedllm.streams import torch_stream

FLOAT = 4
BUILTIN = Path(__file__).parent / "builtin"


def source_of(name: str) -> str:
    """What ``from_pretrained`` is given for this name."""
    source, _ = shallow(name)
    return str(BUILTIN) if source == "builtin" else source


def hub_error(what: str, key: str, name: str, error: Exception) -> FedllmError:
    """Say what to do when something is neither here nor to be had from the hub."""
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
    if Path(name).is_absolute():
        return FedllmError(f"{key} = {name!r}: this folder holds no usable {what} ({first})")
    return FedllmError(
        f"{key} = {name!r}: no such folder here, and the hub did not give this {what} "
        f"({type(error).__name__}: {first}). Without a network: download it elsewhere "
        f"(`hf download {name}`) and write the folder's path; a private one needs HF_TOKEN; "
        f"'builtin' needs no download"
    )


def place(name: str) -> torch.device:
    """
    The device that ``model.device`` names.

    Raises FedllmError where there is none such.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise FedllmError(
            f"model.device = {name!r}: torch {torch.__version__} finds {count} CUDA devices here; "
            "expected 'auto', 'cpu'" + "".join(f", 'cuda:{i}'" for i in range(count))
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


# transformers replaces methods of its classes while it loads, and puts them back in the order in
# which loads end: two at once leave the whole process unable to tie an output to its embedding
_LOADING = threading.Lock()


def load_config(model: ex.Model, name: str | None = None) -> Any:
    """The model's configuration alone, without weights. Raises FedllmError where it is wrong."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    name = name or model.name
    _, blocks = shallow(name)
    try:
        config = AutoConfig.from_pretrained(source_of(name), revision=model.revision)
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise FedllmError(f"model.name = {name!r}: its config.json is wrong: {said}") from None
    except (OSError, ValueError) as error:
        raise hub_error("model", "model.name", name, error) from None

    if blocks is None:
        return config
    whole = int(getattr(config, "num_hidden_layers", 0))
    if not 1 <= blocks <= whole:
        raise FedllmError(f"{name!r}: the model has {whole} blocks; expected #1 to #{whole}")
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:blocks]
    return config


def shallow(name: str) -> tuple[str, int | None]:
    """``NAME#4``, the first four blocks of a model: (name, blocks), or (name, None)."""
    source, sign, number = name.rpartition("#")
    if not sign or not number.isdecimal() or Path(name).exists():
        return name, None
    return source, int(number)


def load_tokenizer(model: ex.Model, name: str | None = None) -> Any:
    """The tokenizer named in the experiment, or the model's own."""
    from transformers import AutoTokenizer

    name = name or model.tokenizer or model.name
    key = "model.tokenizer" if model.tokenizer else "model.name"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source_of(name), revision=model.revision)
    except (OSError, ValueError, ImportError) as error:
        raise hub_error("tokenizer", key, name, error) from None
    if len(tokenizer) <= 1:
        raise FedllmError(f"{key} = {name!r}: the tokenizer has no vocabulary")
    return tokenizer


def calm(model: torch.nn.Module) -> None:
    """
    Put a model into evaluation, but for layers in 4 bits, which have nothing to switch off.

    On a CPU bitsandbytes packs such a layer anew when it first runs in evaluation; it can then
    train no more, and its hash is another.
    """
    for module in model.modules():
        module.training = type(module).__name__ == "Linear4bit"


@dataclass(eq=False)
class LanguageModel:
    """
    A frozen base with its tunables; training happens on dictionaries of tunables outside.

    ``initial`` holds the tunables' first values, ``head`` the names of those of the task head.
    All names are those inside ``Core``, equal in the whole and in its parts.  slots: whose rows
    lie where during a pass.  stackable: whether many clients' tunables can train in one pass.
    frozen: what is remembered of the blocks below the first tunable one.  half: computes in
    bfloat16 under autocast.  twin: of a quantized base, the same architecture without values, to
    count what it costs.  before: of SLoRA, the same base with the tunables of its first stage.
    """

    name: str
    model: Any
    family: Family | None
    classification: bool
    virtual: dict[str, Any]
    head: frozenset[str]
    initial: dict[str, Tensor]
    spec: ex.Tunables
    slots: Slots = field(default_factory=Slots)
    stackable: bool = False
    frozen: Frozen = field(default_factory=Frozen)
    half: bool = False
    twin: LanguageModel | None = None
    before: LanguageModel | None = None
    _parts: dict[tuple[Part, float, float], Core] = field(default_factory=dict)
    _narrow: dict[ex.Modules, LanguageModel] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the base lies, and tunables in training; elsewhere they are on the CPU."""
        device: torch.device = self.model.device
        return device

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return int(self.model.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def outputs(self) -> int:
        """Width of the logits: classes or vocabulary."""
        config = self.model.config
        return int(config.num_labels if self.classification else config.vocab_size)

    @property
    def whole(self) -> Core:
        """The whole model."""
        return self.part("whole", 0)

    def stage(self, tunables: Iterable[str]) -> LanguageModel:
        """The one of itself, ``before`` and those of ``only`` that these are tunables of."""
        mine = set(tunables) - self.head
        others = [one for one in (self.before, *self._narrow.values()) if one is not None]
        return next((one for one in others if one.initial.keys() - one.head == mine), self)

    def only(self, modules: ex.Modules) -> LanguageModel:
        """
        The same base with LoRA around these alone (and the head); around the rest there is none.

        Raises FedllmError for what LoRA is not around here.
        """
        if modules not in self._narrow:
            assert isinstance(self.spec, ex.Lora)
            if any(A in name or B in name for name in self.head):
                raise FedllmError(
                    "tunables.modules: LoRA is around the head, which all have "
                    f"(tunables.targets = {list(self.spec.targets)}); expected targets below it"
                )
            mine = within(self.initial, modules, self.blocks)
            if mine == self.initial.keys():
                self._narrow[modules] = self
            else:
                initial = {n: t for n, t in self.initial.items() if n in mine}
                gone = {module_of(n).removeprefix("model.") for n in self.initial if n not in mine}
                bare: dict[str, Any] = {p: self.model.get_submodule(p).base_layer for p in gone}
                twin = None if self.twin is None else self.twin.only(modules)
                self._narrow[modules] = replace(
                    self, model=graft(self.model, bare), initial=initial,
                    spec=self.spec.only(modules), frozen=Frozen(), twin=twin, _parts={}, _narrow={},
                )  # fmt: skip
        return self._narrow[modules]

    def part(self, part: Part, cut: float, begin: float = 0) -> Core:
        """The whole or one side of a cut, from block ``begin`` on; cached, sharing all modules."""
        if part == "whole":
            cut = 0
        if (part, cut, begin) not in self._parts:
            core = Core(
                self.model, self.family, not self.classification, part, cut, begin,
                **self.virtual, name=f"{self.name} {self.spec!r}", slots=self.slots,
                half=self.half,
            )  # fmt: skip
            calm(core)
            self._parts[part, cut, begin] = core
        return self._parts[part, cut, begin]

    def piece(self, piece: Piece) -> Core:
        """The same, of a piece."""
        return self.part(piece.part, piece.cut, piece.begin)

    def countable(self, core: Core) -> Core:
        """The same part with layers whose operations torch can count without values."""
        _, part, cut, begin = core.key
        return core if self.twin is None else self.twin.part(part, cut, begin)

    @cached_property
    def untouched(self) -> int:
        """How many blocks, from the first on and with the embeddings, hold nothing tunable."""
        if self.family is None:
            return 0
        cuts = range(1, self.blocks)
        below = (cut for cut in cuts if self.tunables_of(self.part("client", cut)))
        return next(below, self.blocks) - 1

    def tunables_of(self, core: Core) -> list[str]:
        """Names of the tunables that lie in this part, sorted."""
        inside = {name for name, _ in core.named_parameters()}
        return sorted(inside & set(self.initial))

    def within(self, budget: int) -> int:
        """
        The highest rank of LoRA, up to its own, at which what travels takes so many bytes at most.

        Raises FedllmError where not even rank 1 does.
        """
        stays = self.head if self.spec.head == "personal" else frozenset[str]()
        fixed, each = sizes({n: t for n, t in self.initial.items() if n not in stays})
        rank = (budget // FLOAT - fixed) // each
        if rank < 1:
            raise FedllmError(
                f"tunables.budgets: {budget:,} bytes; expected at least "
                f"{(fixed + each) * FLOAT:,}, which is what rank 1 takes each way"
            )
        return min(rank, rank_of(self.initial))

    @property
    def draws(self) -> bool:
        """Whether the tunables have a dropout of their own."""
        return bool(getattr(self.spec, "dropout", 0.0))

    @cached_property
    def base_hash(self) -> str:
        """SHA-256 over names and bytes of everything that is not trained."""
        return self.hash_base()

    def hash_base(self) -> str:
        """Compute ``base_hash`` anew from the weights as they are now."""
        digest = hashlib.sha256(repr(sorted(self.initial)).encode())
        tensors = dict(self.whole.named_parameters()) | dict(self.whole.named_buffers())
        for name in sorted(tensors):
            if name not in self.initial:
                digest.update(name.encode())
                for tensor in (tensors[name], *_scales(tensors[name])):
                    data = tensor.detach().cpu().contiguous()
                    digest.update(data.view(torch.uint8).numpy().tobytes() if data.ndim else b"")
        return digest.hexdigest()[:16]

    @cached_property
    def base_bytes(self) -> int:
        """Bytes of the frozen tensors."""
        return sum(
            p.numel() * p.element_size()
            for n, p in self.whole.named_parameters()
            if n not in self.initial
        )


def _scales(weight: Tensor) -> list[Tensor]:
    """What a weight in 4 bits consists of besides its bits; of any other nothing."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    parts = state.as_dict(packed=True)
    return [parts[name] for name in sorted(parts) if isinstance(parts[name], Tensor)]


@torch.no_grad()
def _causal(model: Any) -> bool:
    """Whether a later token leaves the logits of an earlier one alone."""
    x = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)
    logits = model(input_ids=x).logits
    return torch.allclose(logits[0, 0], logits[1, 0], atol=1e-5)


def load(
    spec: ex.Model, task: ex.Task, tunables: ex.Tunables, labels: int, seed: int,
    name: str | None = None, meta: bool = False,
) -> LanguageModel:  # fmt: skip
    """
    Load a base and give it tunables; every random start draws from the run seed.

    meta: shapes only, on torch's meta device, from the configuration alone. Raises FedllmError when
    there is no such model, or the tunables do not fit it.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    transformers.logging.set_verbosity_error()  # its loading report is not for this user
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # misses kernels nobody asked for
    name = name or spec.name
    classification = task.kind == "classification"
    config = load_config(spec, name)
    family = FAMILIES.get(config.model_type)
    if family is not None and not family.decoder and not classification:
        raise FedllmError(
            f"task.kind = 'generation': {name!r} is an encoder ({config.model_type}); "
            "choose a causal language model such as 'openai-community/gpt2'"
        )
    kind = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    device = torch.device("meta") if meta else place(spec.device)
    options: dict[str, Any] = {"dtype": torch.float32}
    twin = None
    if spec.quantization != "none" and not meta:
        twin = load(spec, task, tunables, labels, seed, name, meta=True)
        options |= _in_four_bits(spec, twin.model)
    if classification:
        config.num_labels = labels
        options["ignore_mismatched_sizes"] = True  # another task's head is replaced by a new one
        padding = getattr(config, "pad_token_id", None)
        config.pad_token_id = 0 if padding is None else padding
    with _LOADING, torch_stream(seed, "initial weights"), device if meta else nullcontext():
        try:
            if spec.weights == "random" or meta:
                model = kind.from_config(config, dtype=torch.float32)
            else:
                model = kind.from_pretrained(
                    source_of(name), config=config, revision=spec.revision,
                    use_safetensors=True, **options,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            raise _too_large(name, device) from None
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise hub_error("model", "model.name", name, error) from None
        calm(model)
        virtual, names = install(model, tunables, classification, seed)
    head = head_names(model) if classification else set()
    if tunables.head != "frozen":
        names |= head
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if family is None and not classification and not meta and not _causal(model):
        raise FedllmError(
            f"task.kind = 'generation': {name!r} ({config.model_type}) sees the tokens that it is "
            "to predict; choose a causal language model such as 'openai-community/gpt2'"
        )
    if twin is not None:
        _mend(model)
    try:
        for module in (model, *virtual.values()):
            # past transformers' own method, which has doubts about bases in 4 bits
            torch.nn.Module.to(module, device)
    except torch.OutOfMemoryError:
        raise _too_large(name, device) from None
    slots = Slots()
    stackable = give_slots(model, names, slots) and family is not None
    if family is not None:
        model.config._attn_implementation = BLOCKS
    found = LanguageModel(
        name, model, family, classification, dict(virtual),
        frozenset(f"model.{n}" for n in head), {}, tunables, slots, stackable,
        half=spec.precision == "bf16", twin=twin,
    )  # fmt: skip
    initial = {}
    for key, parameter in found.whole.named_parameters():
        if key.removeprefix("model.") in names or key.partition(".")[0] in ("prompt", "prefix"):
            where = device if meta else "cpu"
            initial[key] = parameter.detach().to(where, torch.float32, copy=True)
            parameter.requires_grad_(False)
    found.initial = dict(sorted(initial.items()))
    if isinstance(tunables, ex.Lora) and tunables.sparse is not None:
        found.before = _before(found, tunables.first, seed)
    return found


def _before(model: LanguageModel, spec: ex.Sparse, seed: int) -> LanguageModel:
    """The same base with masks in place of LoRA, as a model with these tunables has them."""
    layers = masks(model.model, spec.density, seed)
    for layer in layers.values():
        layer.slots = model.slots
    values = {f"model.{path}{SPARSE}": torch.zeros(len(one.places), device=one.places.device)
              for path, one in layers.items()}  # fmt: skip
    where = None if model.device.type == "meta" else "cpu"
    initial = {n: t.to(where) for n, t in values.items()}
    initial |= {n: t for n, t in model.initial.items() if n in model.head}
    twin = None if model.twin is None else model.twin.before
    return replace(
        model, model=graft(model.model, dict(layers)), initial=dict(sorted(initial.items())),
        spec=spec, twin=twin, before=None, _parts={},
    )  # fmt: skip


def _too_large(name: str, device: torch.device) -> FedllmError:
    return FedllmError(
        f"model.name = {name!r}: does not fit into the memory of {device}; a smaller model, "
        "model.quantization = 'nf4' or model.device = 'cpu' may"
    )


def _in_four_bits(spec: ex.Model, shapes: Any) -> dict[str, Any]:
    """
    What ``from_pretrained`` needs for a base in 4 bits; heads stay whole.

    It is quantized on the CPU wherever it will compute, so that all sites have the same bits.
    Raises FedllmError where the library for it is missing.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedllmError(
            f"model.quantization = {spec.quantization!r}: needs bitsandbytes; "
            "pip install 'fedllm[qlora]'"
        )
    output = shapes.get_output_embeddings()
    whole = {name for name, module in shapes.named_modules() if module is output and name}
    whole |= {name.rpartition(".")[0] for name in head_names(shapes)}
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=spec.quantization, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if spec.precision == "bf16" else torch.float32,
        llm_int8_skip_modules=sorted({"lm_head", *whole}),
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def _mend(model: Any) -> None:
    """
    Make of a base in 4 bits what nothing changes any more.

    A layer that the weights on disk lack is drawn anew and was not quantized: it becomes a plain
    one. A bias gets the precision to which bitsandbytes would cast it, for good, in its first pass.
    """
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear4bit" or hasattr(module, "lora_A"):
            continue
        if getattr(module.weight, "quant_state", None) is None:
            plain = torch.nn.Linear(1, 1, bias=False)
            plain.in_features, plain.out_features = module.in_features, module.out_features
            plain.weight = torch.nn.Parameter(module.weight.data.float(), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)
        elif module.bias is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)
