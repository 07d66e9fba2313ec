"""Choose the target of a call to the unified surface by the model in its body.

Owns what is read of the body for that, and the refusals of bodies that name no single model.
registry/unified_routes.py has the choice itself.
"""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import web

from relay.calls.body import Body, body_at_hand, read_body
from relay.calls.call import Call
from relay.core.errors import ModelMissing, ObjectNotFound, UnknownRoute, WrongBody
from relay.core.exchange import Exchange
from relay.core.fields import ABSENT, Reader
from relay.core.peek import model_is_plain, peek_body
from relay.core.provider import Route
from relay.core.text import MAX_CHARACTERS
from relay.core.unified import names_object, path_at
from relay.gate.rights import take_chosen
from relay.gateway import Gateway

_CHAT = "chat/completions"


class _Conversation(msgspec.Struct):
    messages: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT


_conversation = Reader(_Conversation)


async def choose_target(
    request: web.Request, call: Call, exchange: Exchange, gateway: Gateway
) -> tuple[Route, Body | None]:
    """Return the route of a call, and its body if that was read for its model: of a path that names
    an object, the provider that made it. Raises ModelMissing, WrongBody, ModelNotFound,
    EndpointNotSupported, ObjectNotFound, ProviderNotAllowed, and what reading a body raises.
    """
    if names_object(call.endpoint):
        return await _of_object(call, exchange, gateway), None
    if call.method != "POST":
        raise UnknownRoute(call.method, call.root)
    body = body_at_hand(request, exchange, gateway)
    if body is None:
        body = await read_body(request, exchange, gateway, needs_model=True)
    model = _model(body, call)
    unified = gateway.unified
    gateway.model_lists.refresh(unified.providers)
    exchange.request.model = model
    exchange.wait("nothing", gateway.clock())
    route = await gateway.model_lists.find(partial(unified.route, call.endpoint, model))
    exchange.request.requested_model = model if route.replaced_model is not None else None
    take_chosen(route, exchange.request)
    return route, body


async def _of_object(call: Call, exchange: Exchange, gateway: Gateway) -> Route:
    object_id = call.endpoint.split("/")[1]
    provider = await gateway.made_objects.provider_of(call.caller.client, object_id)
    speaks = gateway.registry.provider(provider).speaks
    path = path_at(speaks, call.endpoint)
    if path is None:
        raise ObjectNotFound(object_id)
    route = gateway.registry.match_rest(provider, path)
    take_chosen(route, exchange.request)
    return route


def _model(body: Body, call: Call) -> str:
    if body.text is None:
        raise ModelMissing("its body is too large to be read, or cannot be decompressed")
    content_type = call.headers.get("Content-Type", "")
    body.seen = peek_body(body.text, content_type)
    model = body.seen.model
    is_short = model is None or len(model) <= MAX_CHARACTERS
    if model and not (is_short and model_is_plain(body.text, content_type, model)):
        raise ModelMissing("it contains more than one `model`, or one that is too long")
    if call.endpoint == _CHAT:
        _check_chat(body.text)
    if not model:
        raise ModelMissing
    return model


def _check_chat(text: bytes) -> None:
    """Raise WrongBody for a body of the Responses API, which some editors send here."""
    found = _conversation.read(text)
    if found is not None and found.messages is ABSENT and found.input is not ABSENT:
        raise WrongBody
