"""What the benchmarks share: alternating measurement, memory, tables and files, the candidates themselves."""

import logging

# torch.utils.benchmark warns of CUDA's files on a machine without a GPU
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
