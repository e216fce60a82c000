from __future__ import annotations

import torch

# small networks: a second thread costs more than it brings, and the suite has a process for each core already
torch.set_num_threads(1)
