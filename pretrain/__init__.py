"""Training, evaluation and checkpoints: the only home of deepspeed, wandb and tensorboard.

`pretrain.config` (recipes) and `pretrain.overrides` import no torch, so that the command line starts on a login node.
"""
