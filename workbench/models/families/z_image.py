"""Alibaba's family Z-Image."""

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.models.backend import Condition
from workbench.models.families.flow_matching import FlowMatching

#: Text tokens that are stored: the pipeline's default. The rest of a longer caption is cut off.
TEXT_TOKENS = 512


class ZImage(FlowMatching):
    """Z-Image: one transformer over image and text tokens, with the last but one layer of Qwen3 as its text embedding.

    The transformer takes each caption in its own length, which also decides where an image's positions begin. Stored
    embeddings are padded to TEXT_TOKENS, with `text_mask` 1 where they are a caption's, and cut to length again. Its
    output is the velocity from noise to image, x0 - eps, and it counts time from noise to image too.
    """

    PIPELINE = "ZImagePipeline"
    DENOISER_CLASS = "ZImageTransformer2DModel"
    SAMPLE_SIZE = 128
    ENCODERS = ("text_encoder", "tokenizer")

    @cached_property
    def _patch(self) -> int:
        return 2  # of the patch sizes in its config, the one that its pipeline uses

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        text, mask = condition["text"], condition["text_mask"]
        # The pipeline gives latents and text in the transformer's precision, which then also keeps its tokens in it.
        images, text = x_t.to(self.dtype)[:, :, None], text.to(self.dtype)  # a video of one frame
        # On the meta device lengths are not known; the longest possible is what a shape costs at most.
        lengths = [text.shape[1]] * len(text) if text.is_meta else mask.sum(1).int().tolist()
        velocities = denoiser(
            list(images.unbind()),
            # Time and velocity are turned round, so that both are those of the other families: noise grows with t.
            (1000 - time) / 1000,
            [tokens[:length] for tokens, length in zip(text, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(velocities)[:, :, 0]

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        texts, _ = self.pipeline.encode_prompt(captions, device=self.device, do_classifier_free_guidance=False)
        masks = [torch.ones(len(text), device=text.device) for text in texts]
        missing = [TEXT_TOKENS - len(text) for text in texts]
        return {
            "text": torch.stack([pad(text, (0, 0, 0, n)) for text, n in zip(texts, missing, strict=True)]),
            "text_mask": torch.stack([pad(mask, (0, n)) for mask, n in zip(masks, missing, strict=True)]),
        }
