"""Imported before Triton, lets its interpreter run kernels on the CPU where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
