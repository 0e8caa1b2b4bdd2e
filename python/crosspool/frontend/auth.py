"""SGLang's rules for API keys, for routes that are not SGLang's."""

from __future__ import annotations

from sglang.srt.utils.auth import AuthLevel, decide_request_auth
from starlette.requests import Request


def refused_status(
    request: Request, api_key: str | None, admin_api_key: str | None, *, admin_only: bool
) -> int | None:
    """HTTP status of the refusal, or None where the request may go on."""
    decision = decide_request_auth(
        method=request.method,
        path=request.url.path,
        authorization_header=request.headers.get("authorization", ""),
        api_key=api_key,
        admin_api_key=admin_api_key,
        auth_level=AuthLevel.ADMIN_OPTIONAL if admin_only else AuthLevel.NORMAL,
    )
    return None if decision.allowed else decision.error_status_code
