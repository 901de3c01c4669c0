"""What the server that forks ranks imports first: all that a rank needs (see recorder.py).

DeepSpeed takes each new interpreter ten seconds. It is prepared as a run prepares it, and runs of
other engines do not notice.
"""

import importlib

import torch

import maepretrain.workflows.pretrain  # noqa: F401
from maepretrain.strategies import zero

zero.import_deepspeed(on_cuda=torch.cuda.is_available())
# DeepSpeed imports these when its engine starts; the first brings torch's compiler along.
for _name in ("zero.muon.muon_optimizer", "zero.stage3", "zero.stage_1_and_2"):
    importlib.import_module(f"deepspeed.runtime.{_name}")
