"""`transformers serve` with the runtime of its model reachable: Transformers' own server, and a few read-only pages.

Chat, responses, completions, streaming and continuous batching are Transformers'. Added are `/metrics` for Prometheus,
precision management in `/health`, the snapshot as JSON at `/dynaexq/snapshot`, and a live page at `/dynaexq`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaexq.errors import CheckpointError, DynaExqError, PatchError
from dynaexq.hf.config import DynaExqConfig
from dynaexq.runtime.runtime import Runtime
from dynaexq.server.hotness_keeper import HotnessKeeper
from dynaexq.views.html import fragment

PAGE_TOKENS, MOST_TOKENS_AT_ONCE = 256, 1024
"""Tokens of a page of the cache, and those that one forward computes at most."""

PAGE = Path(__file__).with_name("page.html")
NEEDS = 'dynaexq serve needs the server of Transformers and prometheus_client: pip install "dynaexq[serve]"'


@dataclass(frozen=True)
class ServerOptions:
    """How to serve one model.

    Attributes:
        model: a checkpoint directory, or a name on the Hub; in 16 bit, annotated or packed.
        config: options of dynaexq; None leaves them to a checkpoint that was made with it.
        hotness: the file that keeps what is learned of the traffic; None keeps nothing.
        continuous_batching: whether requests are computed together as they come.
        max_context, max_batch: tokens of a sequence, and sequences at once, that the cache of continuous batching has
            room for; left alone it would take most of the memory that the weights leave.
    """

    model: str
    config: DynaExqConfig | None = None
    hotness: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    continuous_batching: bool = True
    max_context: int = 4096
    max_batch: int = 8
    log_level: str = "warning"


def serve(options: ServerOptions) -> None:
    """Load the model and answer until the process is told to end.

    Raises:
        PatchError: the parts that serve are not installed.
        CheckpointError: the model that was loaded is not one of dynaexq's.
    """
    try:
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
        from transformers.cli.serve import Serve
    except ImportError as error:
        raise PatchError(f"{NEEDS} ({error})") from error

    class Server(Serve):
        """Transformers' server, which hands over before it begins to listen."""

        def start_server(self) -> None:
            models = [timed.model for timed in self._model_manager.loaded_models.values()]
            runtime = getattr(models[0], "dynaexq", None) if models else None
            if not isinstance(runtime, Runtime):
                raise CheckpointError(
                    f"{options.model} was loaded without dynaexq, of which its configuration says nothing; pack it "
                    "first (dynaexq quantize)"
                )
            add_routes(self.server.config.app, runtime)
            # uvicorn raises the signal that ended it once more, and what follows must happen all the same.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with suppress(KeyboardInterrupt), _kept(runtime, options.hotness):
                try:
                    self.server.run()
                finally:
                    self._generation_state.shutdown()

    try:
        with _loaded_with(options.config):
            Server(
                force_model=options.model,
                continuous_batching=options.continuous_batching,
                cb_block_size=PAGE_TOKENS,
                cb_num_blocks=-(-options.max_context // PAGE_TOKENS) * options.max_batch,
                cb_max_batch_tokens=MOST_TOKENS_AT_ONCE,
                device=options.device,
                host=options.host,
                port=options.port,
                log_level=options.log_level,
                non_blocking=True,
            )
    except ValueError as error:
        if isinstance(error, DynaExqError):
            raise
        raise CheckpointError(f"{options.model} cannot be served: {error}") from error


def add_routes(app: Any, runtime: Runtime) -> None:
    """Add what is to be seen of `runtime` to an application of FastAPI, and precision management to its `/health`."""
    from fastapi import Response
    from fastapi.responses import HTMLResponse, JSONResponse

    from dynaexq.server.metrics import exposition

    healthy = next((route.endpoint for route in app.router.routes if getattr(route, "path", "") == "/health"), None)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/health"]

    @app.get("/health")
    def health() -> Response:
        found = healthy() if healthy is not None else None
        if found is not None and found.status_code != 200:
            return found
        return JSONResponse({"status": "ok", "precision": vars(runtime.health())})

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(runtime.snapshot), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/dynaexq/snapshot")
    def snapshot() -> Response:
        return JSONResponse(runtime.snapshot())

    @app.get("/dynaexq/report")
    def report() -> Response:
        return HTMLResponse(fragment(runtime.snapshot()))

    @app.get("/dynaexq")
    def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))


@contextmanager
def _kept(runtime: Runtime, hotness: Path | None) -> Iterator[None]:
    """Keep what is learned in a file for as long as this lasts, if there is one."""
    if hotness is None:
        yield
        return
    keeper = HotnessKeeper(runtime, hotness)
    keeper.start()
    try:
        yield
    finally:
        keeper.stop()


@contextmanager
def _loaded_with(config: DynaExqConfig | None) -> Iterator[None]:
    """Let the server load its model under these options of dynaexq."""
    from transformers.cli.serving.model_manager import ModelManager

    usual = ModelManager.get_quantization_config
    if config is not None:
        ModelManager.get_quantization_config = lambda manager: config
    try:
        yield
    finally:
        ModelManager.get_quantization_config = usual
