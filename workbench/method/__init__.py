"""The paper's mathematics, as pure functions of tensors.

Noise, timestep densities, objectives, reward scales, divergences, and the rule by which the reference moves. It speaks
the paper's symbols; each module begins with their legend. It imports `common` and torch.
"""
