"""The model that a student learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptlab.config.distill import TeacherConfig
from ptlab.errors import ConfigError
from ptlab.recipes.models import ServiceModels
from ptlab.renderers import Renderer

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient

_PROBE = "What is 347+586? Ones: 7+6=13. \\boxed{933}\n\tnaïve café — Zürich 東京 🙂 def f(x):\n    return x ** 2\n"


async def open_teacher(teacher: TeacherConfig, models: ServiceModels, student: Renderer) -> SamplingClient:
    """A client of the teacher. Raises: ConfigError if its tokens are not the student's; NotFoundError, CheckpointError."""
    client, renderer = await models.open(base_model=teacher.base_model, model_path=teacher.path)
    if renderer.codec.encode(_PROBE) != student.codec.encode(_PROBE):
        raise ConfigError(
            f"teacher.base_model {teacher.base_model!r} has another tokenizer than the student, whose tokens it would have to read; "
            f"choose a teacher of the student's family"
        )
    return client
