"""Attractor Models and what they are compared with: the mathematics alone, in torch and the standard library.

`model.config` (what a model is) and `model.cost` (parameters and FLOPs) import no torch, so that a login node can plan;
everything else is reached through `model.language_model.build`.
"""
