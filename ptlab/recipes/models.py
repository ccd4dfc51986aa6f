"""Models besides the one that trains, and what every recipe asks about its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptlab.config import ModelConfig
from ptlab.model_info import get_recommended_renderer_name
from ptlab.renderers import Renderer, get_renderer
from ptlab.runlog import newest_sampler_weights

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient
    from ptlab.client.service import ServiceClient


def run_renderer(model: ModelConfig, tokenizer: Any) -> Renderer:
    """The renderer that the config names, else the one recommended for its model."""
    return get_renderer(model.renderer or get_recommended_renderer_name(model.name), tokenizer)


class ServiceModels:
    """envs.env_section.OtherModels over a service client. A path that is not tinker:// is a directory of this machine: a run directory,
    whose newest weights for sampling are taken, a directory of such weights, or one in PEFT layout."""

    def __init__(self, service_client: ServiceClient, model: ModelConfig, renderer: Renderer) -> None:
        self._service_client = service_client
        self._model = model
        self._renderer = renderer

    async def open(self, *, base_model: str | None = None, model_path: str | None = None) -> tuple[SamplingClient, Renderer]:
        """A client of these weights; see OtherModels.open."""
        if model_path is None and base_model is None:
            base_model = self._model.name
        if model_path is not None and not model_path.startswith("tinker://"):
            directory = newest_sampler_weights(Path(model_path))
            model_path = await self._service_client.import_adapter(directory, base_model or self._model.name)
        client = await self._service_client.create_sampling_client(model_path=model_path, base_model=base_model)
        if base_model in (None, self._model.name):
            return client, self._renderer
        return client, get_renderer(get_recommended_renderer_name(base_model), client.get_tokenizer())

    async def context_length(self) -> int | None:
        """Most tokens of the run's base model; None where the server does not say."""
        capabilities = await self._service_client.get_server_capabilities_async()
        lengths = {model.model_name: model.max_context_length for model in capabilities.supported_models}
        return lengths.get(self._model.name)
