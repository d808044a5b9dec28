"""A site in a process of its own, as an engine would start it: python site_process.py FOLDER."""

import json
import logging
import sys
from pathlib import Path

import torch

from fedllm import experiment as ex
from fedllm.across import take_part
from fedllm.transport.session import Keys

if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    folder = Path(sys.argv[1])
    order = json.loads((folder / "order.json").read_text())
    pems = [(folder / f"{part}.pem").read_bytes() for part in ("ca", "certificate", "key")]
    take_part(order, ex.load_site(folder / "site.toml"), folder, Keys(*pems), patience=20.0)
