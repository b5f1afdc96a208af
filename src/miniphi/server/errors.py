"""What a client is told when something is refused or fails: an HTTP status and OpenAI's error object.

`ApiError` is the one exception of this room; every other exception becomes one here.
"""

from collections.abc import Mapping
from typing import Any

from miniphi.errors import CapacityError, ChatTemplateError, ContextLengthError, InvalidRequestError, MiniphiError

__all__ = ["ApiError"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error.

    `param` names the field of the request that is at fault, `code` is what programs test, `headers` go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: Exception, param: str | None = None) -> "ApiError":
        """Return what a client is told of an error of another room; of one that is a bug, nothing but that."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, ContextLengthError):
            return cls(400, str(error), param=param, code="context_length_exceeded")
        if isinstance(error, InvalidRequestError | ChatTemplateError):
            return cls(400, str(error), param=param, code="invalid_value")
        if isinstance(error, CapacityError):
            return cls(503, str(error), code="insufficient_memory")
        if isinstance(error, MiniphiError):
            return cls(500, str(error), code="engine_error")
        return cls(500, "the server failed; its log says why", code="internal_error")

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
