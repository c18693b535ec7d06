"""What every test shares: one thread, so that tests disturb nobody and results repeat."""

import torch

torch.set_num_threads(1)
