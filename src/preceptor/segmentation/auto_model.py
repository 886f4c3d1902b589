"""`MultimodalUNet` as a model of transformers, so that `AutoConfig` and `AutoModel` load its model folders.

Training and prediction do not import this module, because importing transformers takes seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from preceptor.errors import UserError
from preceptor.segmentation.layers import initialise
from preceptor.segmentation.model import MODEL_TYPE, MultimodalUNet, MultimodalUNetConfig, Segmentation


class PretrainedUNetConfig(PretrainedConfig):
    """The fields of `MultimodalUNetConfig` as a configuration of transformers."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        modalities: Sequence[str] = ("image",),
        regions: Sequence[str] = ("region",),
        net: str = "compact",
        encoder: str = "shared",
        channels: Sequence[int] = (16, 32, 64, 128),
        fill: str = "all_levels",
        arguments: dict[str, Any] | None = None,
        norm_per_modality: bool = False,
        **kwargs: Any,
    ) -> None:
        self.modalities, self.regions = list(modalities), list(regions)
        self.net, self.encoder, self.channels, self.fill = net, encoder, list(channels), fill
        self.arguments, self.norm_per_modality = arguments or {}, norm_per_modality
        super().__init__(**kwargs)

    def network_config(self) -> MultimodalUNetConfig:
        """Return the configuration of the network. Raises UserError if a value is invalid."""
        names = [field.name for field in dataclasses.fields(MultimodalUNetConfig)]
        return MultimodalUNetConfig.from_dict({name: getattr(self, name) for name in names})


class PretrainedUNet(PreTrainedModel):
    """A `MultimodalUNet` with the methods of transformers. The names of its weights are those of the network.

    Raises UserError for a network of the user, whose class only `preceptor.load` imports.
    """

    config_class = PretrainedUNetConfig  # type: ignore[misc,assignment]
    base_model_prefix = ""
    main_input_name = "images"
    network: MultimodalUNet

    def __init__(self, config: PretrainedUNetConfig) -> None:
        super().__init__(config)
        settings = config.network_config()
        if settings.is_own:
            raise UserError(
                f"the network {settings.net} is a class of your own, which transformers cannot load; use "
                "preceptor.load(FOLDER, trust_remote_code=True)"
            )
        network = MultimodalUNet(settings)
        for name, child in network.named_children():
            self.add_module(name, child)
        # Bypass registration: as a submodule, the network would give every weight a second name.
        self.__dict__["network"] = network
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not list(module.children()):
            for name, parameter in module.named_parameters():
                (nn.init.zeros_ if name == "bias" else nn.init.ones_)(parameter)
            initialise(module)

    def forward(self, images: Tensor, available: Tensor) -> Segmentation:
        """Segment a batch.

        Args:
            images: Images (B, N, D, H, W), one channel per modality. Missing modalities are not read.
            available: Available modalities (B, N) bool.

        Raises:
            UserError: the sides do not fit the network, or a sample has no modality.
        """
        return self.network(images, available)


# After this import, AutoConfig and AutoModel load folders of this model.
AutoConfig.register(PretrainedUNetConfig.model_type, PretrainedUNetConfig, exist_ok=True)
AutoModel.register(PretrainedUNetConfig, PretrainedUNet, exist_ok=True)
