"""The paper's mathematics as pure functions of tensors: noise, timesteps, objectives, reward scales, divergences."""
