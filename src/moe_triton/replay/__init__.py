"""Router replay: record which experts were chosen, and make a model choose them again.

In reinforcement learning an inference engine rolls out and another program trains; where the two choose different
experts for the same token, the ratio of their probabilities means nothing. Replaying the rollout's choices in training
removes the difference (Rollout Routing Replay, arXiv 2510.11370): the choices are given, while the weights, their
gradients and the losses are those of the model as it is now.
"""

from moe_triton.replay.recorder import RoutingRecorder
from moe_triton.replay.routers import layer_index

__all__ = ["RoutingRecorder", "layer_index"]
