"""Text to token ids and back, as the model reads it: /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from miniphi.server.dependencies import Service
from miniphi.server.errors import ApiError
from miniphi.server.schemas import DetokenizeRequest, TokenizeRequest
from miniphi.server.service import ModelService
from miniphi.server.sse import json_response

__all__ = ["router"]

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", summary="Text or a conversation to token ids")
async def tokenize(body: TokenizeRequest, service: Service) -> Response:
    """Return the token ids of a text, or of a conversation in the model's chat format."""
    service.check_model(body.model)
    try:
        return json_response(await service.prepare(_tokenize, body, service))
    except Exception as error:
        raise ApiError.of(error, "prompt" if body.messages is None else "messages") from error


def _tokenize(body: TokenizeRequest, service: ModelService) -> dict[str, Any]:
    llm = service.llm
    if body.messages is not None:
        messages = [message.to_message() for message in body.messages]
        token_ids = list(llm.render(messages, add_generation_prompt=body.add_generation_prompt).token_ids)
    else:
        assert body.prompt is not None
        token_ids = list(llm.encode(body.prompt, add_bos=body.add_special_tokens))
    answer: dict[str, Any] = {"count": len(token_ids), "max_model_len": llm.context, "tokens": token_ids}
    if body.return_token_strs:
        answer["token_strs"] = [llm.tokenizer.token_text(token_id) for token_id in token_ids]
    return answer


@router.post("/detokenize", summary="Token ids to text")
async def detokenize(body: DetokenizeRequest, service: Service) -> Response:
    """Return the text of token ids, special tokens included."""
    service.check_model(body.model)
    tokenizer = service.llm.tokenizer
    for token_id in body.tokens:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise ApiError(
                400,
                f"token id {token_id} is outside 0 to {tokenizer.vocab_size - 1}",
                param="tokens",
                code="invalid_value",
            )
    return json_response({"prompt": await service.prepare(tokenizer.decode, body.tokens)})
