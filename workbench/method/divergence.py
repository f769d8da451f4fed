"""How far a model has moved from the pretrained one.

Symbols: eps = the noise that was added; eps_m, eps_init = noise predicted by the model and by the pretrained
model at the same x_t; e = mean-per-element squared error to eps. Every timestep has the same weight.
"""

from torch import Tensor

from workbench.method.noise import squared_error


def error_difference(error: Tensor, error_init: Tensor) -> Tensor:
    """D(p, p_init) by forward-process samples, e - e_init of each sample (paper Eq. 8); its mean is the estimate.

    Eq. 7 read literally, E_q[log p / p_init], is the negative of this; Eq. 8 is what the paper's figures show.
    Negative where the model denoises the samples better than the pretrained model does.

    Args:
        error, error_init: mean-per-element errors on the same noised winners, shape (B,).
    """
    return error - error_init


def kernel_kl(prediction: Tensor, prediction_init: Tensor) -> Tensor:
    """KL between the two reverse kernels, up to the constant weight: mean square of eps_m - eps_init, never negative.

    Eq. 8 = kernel KL + 2 mean<eps_m - eps_init, eps_init - eps>; the cross term vanishes in expectation when the
    pretrained model is the optimal denoiser of the samples.

    Args:
        prediction, prediction_init: shape (B, ...).
    Returns:
        Shape (B,), float32.
    """
    return squared_error(prediction, prediction_init)
