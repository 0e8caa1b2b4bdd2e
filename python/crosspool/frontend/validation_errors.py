"""What a client is told of a body that SGLang's routes cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_MOST_FIELDS = 5
_LONGEST_TEXT = 200
_SYSTEM_ONE = "/v1/systemone"


async def respond(request: Request, error: RequestValidationError) -> Response:
    """Names the fields that are wrong, and what is wrong with each. SGLang's own handler repeats
    the whole input and names the source file of the route."""
    errors = error.errors()
    if request.url.path == _SYSTEM_ONE:  # its clients read FastAPI's list of errors
        listed = [{key: str(one.get(key)) for key in ("type", "loc", "msg")} for one in errors]
        return JSONResponse({"detail": listed}, 422)
    texts = list(dict.fromkeys(_text(one) for one in errors))
    more = ["..."] if len(texts) > _MOST_FIELDS else []
    named = [place for one in errors if (place := _place(one))]
    param = str(named[0][0]) if named else None
    message = "; ".join([*texts[:_MOST_FIELDS], *more])
    return JSONResponse({"object": "error", "message": message, "param": param, "code": 400}, 400)


def _place(error: dict[str, Any]) -> Sequence[str | int]:
    """Where in the body the error is; empty where it is in no field."""
    where, *place = error.get("loc") or ("",)
    return place if where == "body" and error.get("type") != "json_invalid" else ()


def _text(error: dict[str, Any]) -> str:
    field = ".".join(map(str, _place(error)))[:_LONGEST_TEXT]
    text = str(error.get("msg", "it is not valid"))[:_LONGEST_TEXT]
    if error.get("type") == "int_parsing_size":  # pydantic speaks of a string
        text = "Input should be an integer of at most 64 bits"
    return f"`{field}`: {text}" if field else text
