"""LoRA: policy, reference and pretrained model in one denoiser (Hu et al. 2021).

The denoiser holds two sets of adapters. It is the policy with the first set switched on, the reference with the second,
the pretrained model with neither. Each of the three is an `Adapter`, a module of its own to the rest of the workbench,
and to move the reference is to copy the small matrices of one set into the other.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workbench.common.errors import UserError
from workbench.models.layers import prepare
from workbench.models.safe_loading import explained, require_finite

POLICY, REFERENCE = "policy", "reference"

#: The file that `save_lora_weights` of diffusers writes and `load_lora_weights` reads.
LORA_FILE = "pytorch_lora_weights.safetensors"


class Adapter(nn.Module):
    """A denoiser with one of its sets of adapters switched on, or none; its parameters are that set's alone.

    Between calls the policy's set is on. Gradient checkpointing runs layers again during the backward pass, when no
    Adapter's forward is active, and what it recomputes is the policy's activations.

    Args:
        denoiser: holds peft's layers.
        name: of the set, POLICY or REFERENCE; "" = no set, which is the pretrained model.
    """

    def __init__(self, denoiser: nn.Module, name: str):
        from peft.tuners.tuners_utils import BaseTunerLayer

        super().__init__()
        self.denoiser, self.name = denoiser, name
        self._layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward pass with this set on."""
        with self._on():
            return self.denoiser(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this set alone, so that optimizers, copies and divergences see nothing else."""
        for key, parameter in super().named_parameters(*args, **kwargs):
            if self.name and f".{self.name}." in key:
                yield key, parameter

    @contextmanager
    def _on(self) -> Iterator[None]:
        """Switch this set on; afterwards the policy's again, also after an error."""
        if self.name == POLICY:
            yield
            return
        self._switch([self.name] if self.name else [])
        try:
            yield
        finally:
            self._switch([POLICY])

    def _switch(self, names: list[str]) -> None:
        for layer in self._layers:
            layer._active_adapter = names  # set_adapter would also switch the policy's gradients off

    @staticmethod
    @contextmanager
    def active(model: nn.Module) -> Iterator[nn.Module]:
        """The denoiser behind a model, with the model's set on.

        For callers that need more of a denoiser than its forward pass, such as pipelines, which read its config.
        """
        if isinstance(model, Adapter):
            with model._on():
                yield model.denoiser
        else:
            yield model


def adapt(
    denoiser: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0
) -> tuple[Adapter, Adapter, Adapter]:
    """Add two equal sets of adapters to a denoiser, which change nothing yet, as their second factor B is 0.

    Args:
        denoiser: of diffusers, frozen; changed in place.
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        targets: ends of the names of the layers to adapt.
        seed: of the adapters' first factor, the same on every process.
    Returns:
        Policy (its adapters trainable, float32), reference, pretrained model.
    Raises:
        UserError: no layer's name ends so.
    """
    config = lora_config(denoiser, rank, alpha, targets)
    for name in (REFERENCE, POLICY):  # peft switches on the set that was added last: the policy's, see Adapter
        try:
            # peft draws the factors on the CPU, on whichever device the denoiser is. The caller's generator is kept.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                denoiser.add_adapter(copy.deepcopy(config), adapter_name=name)
        except ValueError:
            known = sorted({key.rsplit(".", 1)[-1] for key, m in denoiser.named_modules() if isinstance(m, nn.Linear)})
            raise UserError(
                f"lora.targets = {list(targets)}: matches no layer of {type(denoiser).__name__}; its linear layers "
                f"end in {', '.join(known)}"
            ) from None
    prepare(denoiser)  # the adapters' own layers
    # The same denoiser three times: its weights exist once.
    policy, reference, pretrained = (Adapter(denoiser, name) for name in (POLICY, REFERENCE, ""))
    for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
        ours.data = ours.data.float()  # peft makes them in the precision of the layer that they adapt
        # The policy's numbers in the policy's precision, so that both compute alike to the bit.
        theirs.data = ours.data.clone()
        theirs.requires_grad_(False)
        ours.requires_grad_(True)
    return policy, reference, pretrained


def lora_config(denoiser: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> Any:
    """peft's configuration of adapters on the linear and convolution layers whose names end as `targets` say."""
    from peft import LoraConfig

    # The same name may be a layer in one block and a list of layers in another (`attn.to_out` in FLUX.2): not for peft.
    wrong = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList) and any(f".{name}".endswith(f".{end}") for end in targets)
    ]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by the rank, whole or not
        # As in diffusers' LoRA training scripts.
        init_lora_weights="gaussian",
        target_modules=list(targets),
        exclude_modules=wrong or None,
    )


def load_adapter(adapter: Adapter, folder: Path, file: str, part: str) -> None:
    """Give a set of adapters the numbers that `save_adapter` wrote.

    Args:
        file: the weights' name in the folder.
        part: what is adapted, "unet" or "transformer".
    Raises:
        UserError: the file is not there or cannot be read, or its adapters are of other layers or another rank.
    """
    weights = folder / file
    if not weights.is_file():
        raise UserError(f"{folder}: no {file} in it")
    with explained(str(weights)):
        found = load_file(weights)
    ours = {
        f"{part}.{name.removeprefix('denoiser.').replace(f'.{adapter.name}.', '.')}": p
        for name, p in adapter.named_parameters()
    }
    if {name: p.shape for name, p in ours.items()} != {name: x.shape for name, x in found.items()}:
        raise UserError(f"{weights}: its adapters are of other layers or another rank than lora.rank and lora.targets")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(found[name])
    require_finite(adapter, str(weights))


def save_adapter(policy: Adapter, folder: Path, pipeline: str, part: str) -> None:
    """Write LoRA weights that the pipeline's `load_lora_weights` reads, rank and alpha included.

    Args:
        policy: the set to save.
        pipeline: name of the diffusers pipeline.
        part: what is adapted, "unet" or "transformer".
    """
    import diffusers
    from peft.utils import get_peft_model_state_dict

    denoiser: Any = policy.denoiser
    weights: dict[str, Tensor] = get_peft_model_state_dict(denoiser, adapter_name=policy.name)
    getattr(diffusers, pipeline).save_lora_weights(
        folder,
        **{f"{part}_lora_layers": weights},
        **{f"{part}_lora_adapter_metadata": denoiser.peft_config[policy.name].to_dict()},
    )
