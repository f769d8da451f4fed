"""What the transformers that are trained by flow matching have in common: target, timestep axis and its shift."""

from workbench.method.noise import ForwardProcess, flow
from workbench.models.backend import Backend


class FlowMatching(Backend):
    """A transformer that predicts the velocity eps - x0 of x_t = (1 - sigma) x0 + sigma eps (Lipman et al. 2023)."""

    DENOISER = "transformer"
    SCHEDULER = "FlowMatchEulerDiscreteScheduler"

    def _process(self) -> ForwardProcess:
        """The noise levels of sampling in T steps, turned around: diffusers counts from the noisy end.

        Samplers shift their levels towards noise, by a constant or by more the larger the image. The axis t = 0..T-1
        holds that shift, so that equal intervals of t are equal shares of sampling, and "early" means the same in
        both. (diffusers' training scripts use a scheduler's levels as it was loaded, where a shift by image size is
        still missing; the density `uniform_sigma` draws those.)
        """
        scheduler = self.scheduler
        sigma, time = scheduler.sigmas.flip(0).float(), scheduler.timesteps.flip(0).float()
        # A constant shift is in the loaded levels already; one by image size is only made at each call of a pipeline.
        if scheduler.config.use_dynamic_shifting:
            sigma = scheduler.time_shift(self._shift(), 1.0, sigma)
            time = scheduler.config.num_train_timesteps * sigma
        return flow(sigma, time)

    @property
    def _image_tokens(self) -> int:
        """Tokens that an image becomes in the transformer."""
        return (self.resolution // (self._pixels_per_latent * self._patch)) ** 2

    def _shift(self) -> float:
        """The shift mu by image size, which multiplies the odds sigma / (1 - sigma) by exp(mu).

        Linear in the number of image tokens, as the pipelines of FLUX.1, Qwen-Image and Z-Image compute it.
        """
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        keys = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15)
        return calculate_shift(self._image_tokens, *(self.scheduler.config.get(key, default) for key, default in keys))
