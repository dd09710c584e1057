"""Run chapters under `pytest --nbval` as their stored outputs were made."""

import os

# inherited by the kernels: other threads sum in another order, and progress bars are outputs
os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
os.environ.setdefault("FLATMIN_SEED", "0")
