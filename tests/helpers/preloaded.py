"""What ranks are forked from, once all else is imported: importing this runs layers.

On one thread: a fork has none of the others. The collector of garbage leaves alone what is there by now, which a fork
would otherwise copy to look at.
"""

import gc

import torch

from tests.helpers.layers import run_layers

torch.set_num_threads(1)
run_layers()
gc.freeze()
