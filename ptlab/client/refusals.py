"""What the clients refuse before anything is sent: requests that have no meaning inside one process."""

from __future__ import annotations

from typing import Any, NoReturn

from pydantic import BaseModel

from ptlab.errors import InvalidRequestError
from ptlab.types import PATH_SCHEME


def refuse_to_pickle(what: str) -> NoReturn:
    raise InvalidRequestError(
        f"{what} of the in-process face cannot leave its process: it points to an engine in this one. For several processes start a ptlab "
        "server and use the official tinker SDK as its client; those clients can be pickled"
    )


def refuse_access_token(token: str | None) -> None:
    """An access token opens other people's weights on a server."""
    if token is not None:
        raise InvalidRequestError("weights_access_token has no meaning in-process: every checkpoint on this disk is yours; leave it out")


def refuse_other_project(project_id: str | None) -> None:
    if project_id is not None:
        raise InvalidRequestError(f"project {project_id!r}: in-process there are no projects to move to or filter by; leave it out")


def check_path(path: str) -> str:
    if not path.startswith(PATH_SCHEME):
        raise InvalidRequestError(f"{path!r} is not a path of saved weights; it must start with {PATH_SCHEME}")
    return path


def check_optimizer(optimizer: Any) -> None:
    """None or AdamOptimizerConfig, ours or the official SDK's."""
    if optimizer is not None and not (isinstance(optimizer, BaseModel) and optimizer.model_dump().get("type") == "adamw"):
        raise InvalidRequestError(f"optimizer {optimizer!r}: ptlab trains with AdamW only; leave it out or pass AdamOptimizerConfig()")
