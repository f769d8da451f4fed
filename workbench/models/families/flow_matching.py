"""What the transformers that are trained by flow matching have in common."""

from workbench.method.noise import ForwardProcess, flow
from workbench.models.backend import Backend


class FlowMatching(Backend):
    """A transformer that predicts the velocity eps - x0 of x_t = (1 - sigma) x0 + sigma eps (Lipman et al. 2023)."""

    DENOISER = "transformer"
    SCHEDULER = "FlowMatchEulerDiscreteScheduler"

    def _process(self) -> ForwardProcess:
        """The scheduler's own grid, turned around: diffusers counts from the noisy end, the axis t from the clean."""
        return flow(self.scheduler.sigmas.flip(0).float(), self.scheduler.timesteps.flip(0).float())
