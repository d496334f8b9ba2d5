"""Models that reason over a whole puzzle grid at once: TRM, HRM, a Transformer, the Attractor reasoner and the Equilibrium one.

`model.reasoning.config` and `model.reasoning.cost` import no torch; `model.reasoning.reasoner.build` makes a model, and
`model.reasoning.supervision` is a step of deep supervision around it.
"""
