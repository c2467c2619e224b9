from __future__ import annotations

import os

import matplotlib as mpl
import torch

mpl.use("Agg")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
