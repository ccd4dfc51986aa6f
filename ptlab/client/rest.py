"""RestClient: what is stored, and changes to it."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from ptlab.client.connection import Session
from ptlab.client.refusals import refuse_access_token, refuse_other_project
from ptlab.errors import InvalidRequestError
from ptlab.futures import APIFuture
from ptlab.types import (
    CheckpointArchiveUrlResponse,
    CheckpointsListResponse,
    ExternalWeightsUrlsResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ModelID,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)

if TYPE_CHECKING:
    from ptlab.backend.backend import Backend

T = TypeVar("T")
AccessScope = Literal["owned", "accessible"]
"""In-process both are the same: all that is on this disk."""


class RestClient:
    """Runs, checkpoints and sessions. Needs a connection, but opens no session.

    Made by ServiceClient.create_rest_client.
    """

    def __init__(self, _holder: Session | None = None, *, base_url: str | None = None, api_key: str | None = None) -> None:
        del api_key
        if _holder is None or base_url is not None:
            raise InvalidRequestError(
                "in-process a RestClient comes from ServiceClient.create_rest_client(); for a remote server use the official SDK's"
            )
        self._session = _holder

    @property
    def _backend(self) -> Backend:
        return self._session.connection.backend

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> APIFuture[T]:
        return self._session.connection.submit(coroutine)

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        return self._submit(self._backend.catalog.get_server_capabilities())

    # -- training runs

    def get_training_run(self, training_run_id: ModelID, access_scope: AccessScope = "owned") -> APIFuture[TrainingRun]:
        del access_scope
        return self._submit(self._backend.catalog.get_training_run(training_run_id))

    async def get_training_run_async(self, training_run_id: ModelID, access_scope: AccessScope = "owned") -> TrainingRun:
        return await self.get_training_run(training_run_id, access_scope)

    def get_training_run_by_tinker_path(self, tinker_path: str, access_scope: AccessScope = "owned") -> APIFuture[TrainingRun]:
        return self.get_training_run(ParsedCheckpointTinkerPath.from_tinker_path(tinker_path).training_run_id, access_scope)

    async def get_training_run_by_tinker_path_async(self, tinker_path: str, access_scope: AccessScope = "owned") -> TrainingRun:
        return await self.get_training_run_by_tinker_path(tinker_path, access_scope)

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned", project_id: str | None = None
    ) -> APIFuture[TrainingRunsResponse]:
        """Newest first."""
        del access_scope
        refuse_other_project(project_id)
        return self._submit(self._backend.catalog.list_training_runs(limit, offset))

    async def list_training_runs_async(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned", project_id: str | None = None
    ) -> TrainingRunsResponse:
        return await self.list_training_runs(limit, offset, access_scope, project_id)

    # -- checkpoints

    def list_checkpoints(self, training_run_id: ModelID) -> APIFuture[CheckpointsListResponse]:
        return self._submit(self._backend.catalog.list_checkpoints(training_run_id))

    async def list_checkpoints_async(self, training_run_id: ModelID) -> CheckpointsListResponse:
        return await self.list_checkpoints(training_run_id)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        return self._submit(self._backend.catalog.list_user_checkpoints(limit, offset))

    async def list_user_checkpoints_async(self, limit: int = 100, offset: int = 0) -> CheckpointsListResponse:
        return await self.list_user_checkpoints(limit, offset)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        return self._submit(self._backend.catalog.get_weights_info(tinker_path))

    def delete_checkpoint(self, training_run_id: ModelID, checkpoint_id: str) -> APIFuture[None]:
        """`checkpoint_id` is <kind>/<name>, for example "weights/step_10"."""
        return self._submit(self._backend.catalog.delete_checkpoint(training_run_id, checkpoint_id))

    async def delete_checkpoint_async(self, training_run_id: ModelID, checkpoint_id: str) -> None:
        await self.delete_checkpoint(training_run_id, checkpoint_id)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        path = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self.delete_checkpoint(path.training_run_id, path.checkpoint_id)

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        await self.delete_checkpoint_from_tinker_path(tinker_path)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Mark a checkpoint as public; in-process that is a note in its manifest."""
        return self._publish(tinker_path, public=True)

    async def publish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        await self.publish_checkpoint_from_tinker_path(tinker_path)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return self._publish(tinker_path, public=False)

    async def unpublish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        await self.unpublish_checkpoint_from_tinker_path(tinker_path)

    def _publish(self, tinker_path: str, *, public: bool) -> APIFuture[None]:
        path = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self._submit(self._backend.catalog.set_checkpoint_published(path.training_run_id, path.checkpoint_id, public=public))

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """Let a checkpoint expire that many seconds from now; None = never."""
        path = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self._submit(self._backend.catalog.set_checkpoint_ttl(path.training_run_id, path.checkpoint_id, ttl_seconds))

    async def set_checkpoint_ttl_from_tinker_path_async(self, tinker_path: str, ttl_seconds: int | None) -> None:
        await self.set_checkpoint_ttl_from_tinker_path(tinker_path, ttl_seconds)

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[ExternalWeightsUrlsResponse]:
        """file:// addresses of the checkpoint's files."""
        return self._submit(self._backend.catalog.get_external_weights_urls(tinker_path))

    async def get_external_weights_urls_async(self, tinker_path: str) -> ExternalWeightsUrlsResponse:
        return await self.get_external_weights_urls(tinker_path)

    def get_checkpoint_archive_url(self, training_run_id: ModelID, checkpoint_id: str) -> APIFuture[CheckpointArchiveUrlResponse]:
        """file:// address of a tar of the checkpoint. In the official SDK until 0.33; the cookbook still calls it."""
        archive = self._submit(self._backend.catalog.get_checkpoint_archive(training_run_id, checkpoint_id))
        return APIFuture(archive, convert=_archive_url, owner=self._session.connection.thread)

    async def get_checkpoint_archive_url_async(self, training_run_id: ModelID, checkpoint_id: str) -> CheckpointArchiveUrlResponse:
        return await self.get_checkpoint_archive_url(training_run_id, checkpoint_id)

    def get_checkpoint_archive_url_from_tinker_path(self, tinker_path: str) -> APIFuture[CheckpointArchiveUrlResponse]:
        path = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self.get_checkpoint_archive_url(path.training_run_id, path.checkpoint_id)

    async def get_checkpoint_archive_url_from_tinker_path_async(self, tinker_path: str) -> CheckpointArchiveUrlResponse:
        return await self.get_checkpoint_archive_url_from_tinker_path(tinker_path)

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copy a checkpoint; gives the path of the copy."""
        refuse_other_project(destination_project_id)
        refuse_access_token(weights_access_token)
        return self._submit(self._backend.catalog.copy_weights(path, ttl_seconds))

    async def copy_weights_async(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> str:
        return await self.copy_weights(path, destination_project_id, ttl_seconds=ttl_seconds, weights_access_token=weights_access_token)

    # -- sessions and samplers

    def get_session(self, session_id: str, access_scope: AccessScope = "owned") -> APIFuture[GetSessionResponse]:
        del access_scope
        return self._submit(self._backend.get_session(session_id))

    async def get_session_async(self, session_id: str, access_scope: AccessScope = "owned") -> GetSessionResponse:
        return await self.get_session(session_id, access_scope)

    def list_sessions(self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned") -> APIFuture[ListSessionsResponse]:
        """Newest first; those of this process."""
        del access_scope
        return self._submit(self._backend.list_sessions(limit, offset))

    async def list_sessions_async(self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned") -> ListSessionsResponse:
        return await self.list_sessions(limit, offset, access_scope)

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        return self._submit(self._backend.sampling.get_sampler(sampler_id))

    async def get_sampler_async(self, sampler_id: str) -> GetSamplerResponse:
        return await self.get_sampler(sampler_id)

    def whoami(self) -> APIFuture[WhoamiResponse]:
        return self._submit(self._backend.catalog.whoami())

    def get_telemetry(self) -> None:
        """None: ptlab sends no telemetry."""

    # -- what only a hosted service has

    def assign_session_project(self, session_id: str, project_id: str) -> NoReturn:
        del session_id
        _hosted_only(f"assign_session_project(project_id={project_id!r})", "projects")

    async def assign_session_project_async(self, session_id: str, project_id: str) -> NoReturn:
        self.assign_session_project(session_id, project_id)

    def export_session_trace(self, session_id: str) -> NoReturn:
        del session_id
        _hosted_only("export_session_trace", "session traces; see metrics.jsonl and transcripts.jsonl in the run directory")

    async def export_session_trace_async(self, session_id: str) -> NoReturn:
        self.export_session_trace(session_id)

    def search_sessions(self, request: Any) -> NoReturn:
        del request
        _hosted_only("search_sessions", "a session search; see list_sessions")

    def get_audit_log(
        self, event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all", day: date | None = None
    ) -> NoReturn:
        del event_type, day
        _hosted_only("get_audit_log", "an audit log")

    async def get_audit_log_async(
        self, event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all", day: date | None = None
    ) -> NoReturn:
        self.get_audit_log(event_type, day)

    def get_billing_usage(self, starting_on: datetime | str, ending_before: datetime | str) -> NoReturn:
        del starting_on, ending_before
        _hosted_only("get_billing_usage", "bills")

    async def get_billing_usage_async(self, starting_on: datetime | str, ending_before: datetime | str) -> NoReturn:
        self.get_billing_usage(starting_on, ending_before)

    def get_current_checkpoint_storage_usage(self, project_id: str | None = None) -> NoReturn:
        del project_id
        _hosted_only("get_current_checkpoint_storage_usage", "bills; list_user_checkpoints gives size_bytes of each checkpoint")

    async def get_current_checkpoint_storage_usage_async(self, project_id: str | None = None) -> NoReturn:
        self.get_current_checkpoint_storage_usage(project_id)


def _hosted_only(method: str, what: str) -> NoReturn:
    raise InvalidRequestError(f"{method}: an in-process ptlab has no {what}")


def _archive_url(archive: Path) -> CheckpointArchiveUrlResponse:
    return CheckpointArchiveUrlResponse(url=archive.resolve().as_uri(), expires=datetime.max.replace(tzinfo=UTC))
