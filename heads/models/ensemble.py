"""Ensemble of image, caption and joint features of one backbone, at a common width, under a router.

Each modality's scaled vector goes through a linear map to H numbers, u_m = P_m f_m + p_m; then

    z = Σ_m w_m head_m(u_m),    w = softmax over modalities of r_m(u_m),

with head_m and r_m as in the router, so that no modality weighs more for being wider.

Reference: systems "MultiCLIP" (multi-label image and caption classification), its `blip_ensemble`.
Departures: heads are as wide as what they receive; the maps are trained on cached vectors, both
towers stay frozen; without a joint encoder, image and text alone can be ensembled.
"""

from typing import Literal

from pydantic import Field, PositiveInt

from heads.base import FeatureSpec
from heads.models.router import Modality, RoutedConfig, Router


class EnsembleConfig(RoutedConfig):
    """Image, caption and joint vectors brought to one width, then a router."""

    kind: Literal["ensemble"] = "ensemble"
    """Head kind."""
    modalities: tuple[Modality, ...] = Field(
        default=("image", "text", "multimodal"), min_length=2, max_length=3
    )
    """Two or three of image, text (the captions) and multimodal (the joint encoder's vector of
    image and caption, from blip)."""
    common_width: PositiveInt = 256
    """Numbers that each modality's vector is mapped to (H), 1 or more."""

    def build(self, spec: FeatureSpec) -> Router:
        """The head; its loss is the one that `spec` brings."""
        return Router(self.branches(spec, self.common_width), spec.criterion, self.hide_share)
