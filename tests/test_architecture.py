"""Imports run one way, and what only parses loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import fedllm

SOURCE = Path(fedllm.__file__).parent
# What each part may import; a part is a folder or a flat file of the package.
LOW = {"errors", "flat", "lora", "streams"}
BASE = LOW | {"message", "ledger", "experiment"}
MODELS = BASE | {"models", "data", "codecs", "transport"}
TRAINING = MODELS | {"training"}
EXCHANGE = TRAINING | {"aggregation", "exchange"}
STRATEGIES = EXCHANGE | {"states", "strategies", "knowledge", "costs"}
ROUND = STRATEGIES | {"worker", "remote", "checkpoint", "round", "summary"}
ESTIMATES = STRATEGIES | {"summary", "estimates"}
FEDERATION = ROUND | {"federation", "report", "compare"}
ALLOWED = {
    "errors": set(),
    "flat": LOW,
    "lora": LOW,
    "streams": LOW,
    "message": LOW,
    "ledger": LOW,
    "experiment": LOW,
    "transport": LOW | {"message"},
    "states": LOW,
    "codecs": BASE,
    "data": BASE | {"data"},
    "models": BASE | {"models"},
    "aggregation": LOW,
    "knowledge": LOW | {"data"},
    "training": TRAINING,
    "exchange": EXCHANGE,
    "summary": {"ledger", "experiment"},
    "costs": BASE | {"models", "codecs"},
    "strategies": STRATEGIES,
    "worker": STRATEGIES,
    "remote": EXCHANGE,
    "site": FEDERATION,
    "across": FEDERATION | {"site"},
    "rehearse": FEDERATION | {"site", "operate"},
    "operate": LOW | {"transport", "experiment"},
    "flower": FEDERATION | {"across", "operate"},
    "engine": LOW | {"experiment", "flower"},
    "checkpoint": STRATEGIES,
    "round": ROUND,
    "estimates": ESTIMATES,
    "federation": ROUND | {"federation", "estimates"},
    "compare": FEDERATION,
    "sweep": FEDERATION | {"compare"},
    "predict": FEDERATION,
    "planning": ROUND | {"federation", "report", "planning", "estimates"},
    "report": FEDERATION,
    "cli": FEDERATION | {"predict", "operate", "engine", "rehearse", "planning", "sweep"},
    "__init__": {"errors"},
}


def part(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Parts of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "fedllm":
                names = [f"fedllm.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fedllm" and len(parts) > 1:
                found.add(parts[1])
    return found - {"__version__", "FedllmError"}


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        mine = part(path)
        for other in sorted(imported(path) - {mine}):
            if other not in ALLOWED[mine]:
                wrong.append(f"{path.relative_to(SOURCE)} imports {other}")
    assert not wrong


def test_only_the_exchange_calls_codecs_and_transport() -> None:
    callers = {
        part(path) for path in SOURCE.rglob("*.py") if imported(path) & {"codecs", "transport"}
    }
    # the federation builds a transport and hands it over
    # across opens sessions, remote names the protocol, operate makes keys
    builders = {"federation", "across", "remote", "operate", "flower", "rehearse", "cli"}
    sizes = {"costs"}  # asks codecs what they would make of a shape, and encodes nothing
    assert callers <= {"exchange", "codecs", "transport"} | builders | sizes


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(','.join(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    return {name.partition(".")[0] for name in out.splitlines()[-1].split(",")}


HEAVY = {"torch", "transformers", "peft", "flwr", "datasets", "matplotlib", "pandas", "numpy"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import fedllm") & HEAVY


def test_help_loads_nothing_heavy_and_takes_little_time() -> None:
    code = """
import resource
sys.argv = ["fedllm", "--help"]
from fedllm.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0
used = resource.getrusage(resource.RUSAGE_SELF)
assert used.ru_utime + used.ru_stime < 5, used  # a loaded machine counts its waiting, too
"""
    assert not loaded_by(code) & HEAVY


def test_parsing_an_experiment_loads_no_model_library() -> None:
    code = f"""
from pathlib import Path
from fedllm.experiment import load
load(Path({str(SOURCE / "demo.toml")!r}))
"""
    assert not loaded_by(code) & (HEAVY - {"numpy"})
