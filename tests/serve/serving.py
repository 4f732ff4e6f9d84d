"""What tests of the server share: the demo model behind a real server on a free port of loopback."""

from __future__ import annotations

import copy
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import uvicorn
from transformers import AutoTokenizer

import collegium
from collegium.assets import SHIPPED
from collegium.decode import Batcher
from collegium.serve import build_app

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "{% if message.content == 'refuse' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
)


@cache
def demo() -> tuple[Any, Any]:
    """The demo model in float32, and its tokenizer, which has no chat template."""
    model = collegium.load(SHIPPED["demo"], dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(SHIPPED["demo"])


def chatting() -> Any:
    """The tokenizer with a chat template."""
    tokenizer = copy.deepcopy(demo()[1])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class FakeEngine:
    """Tells made-up sources, in the way an engine does."""

    def __init__(self, layers: int = 4) -> None:
        self.layers, self.watchers = layers, 0
        self._hooks: list[Any] = []

    def counters(self) -> dict[str, float]:
        return {"hits": 30.0, "misses": 12.0, "stall seconds": 0.5}

    def watch(self, callback: Callable[..., None]) -> Callable[[], None]:
        self.watchers += 1
        model, _ = demo()

        def hook(layer: int) -> Any:
            def see(module: Any, args: Any) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1]).shape[0]
                experts = (np.arange(rows)[:, None] * 3 + [0, 1] + layer) % 16
                callback(layer, experts, np.full((rows, 2), 0.5, np.float32), (experts % 3).astype(np.uint8))

            return see

        handles = [block.mlp.register_forward_pre_hook(hook(layer)) for layer, block in enumerate(model.model.layers)]

        def end() -> None:
            self.watchers -= 1
            for handle in handles:
                handle.remove()

        return end


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a server of `app` in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            app, log_level="critical", lifespan="off", timeout_graceful_shutdown=3, timeout_keep_alive=75
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def serving(tokenizer: Any = None, engine: Any = None, **settings: Any) -> Iterator[tuple[str, Batcher]]:
    """The demo model on a server: its address, and the batcher."""
    given = {
        name: settings.pop(name) for name in ("context", "max_batch", "queue", "prefill_chunk") if name in settings
    }
    batcher = Batcher(demo()[0], tokenizer or chatting(), **{"context": 256, **given})
    app = build_app(batcher, model_name="demo", engine=engine, **settings)
    with running(app) as address:
        yield address, batcher
    assert batcher.close(drain=False, timeout=10)


def eventually(true: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.005)
