"""Fine-tune one language model on data that must not move, and measure what each way costs."""

from fedllm.errors import FedllmError

__all__ = ["FedllmError", "__version__"]
__version__ = "0.1.0"
