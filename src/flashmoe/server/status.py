"""What the server tells of itself: models, health, metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from flashmoe.server.metrics import exposition
from flashmoe.server.service import Service

router = APIRouter()
_STARTED = int(time.time())


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that there is."""
    service: Service = request.app.state.service
    return {"object": "list", "data": [_model(service)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """It, by its name."""
    service: Service = request.app.state.service
    if name != service.name:
        from starlette.exceptions import HTTPException

        raise HTTPException(404)
    return JSONResponse(_model(service))


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the model answers, 503 when it does not any more."""
    service: Service = request.app.state.service
    stats = service.scheduler.stats()
    state = {"status": "ok" if service.alive else "error", "running": stats.running, "waiting": stats.waiting}
    return JSONResponse(state, 200 if service.alive else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters in Prometheus's text format."""
    text, kind = exposition(request.app.state.service)
    return Response(text, media_type=kind)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "flashmoe",
        "context_length": service.llm.plan.context,
    }
