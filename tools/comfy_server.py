"""A headless ComfyUI server with this package dropped in, and a client for its API."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import aiohttp

Workflow = Mapping[str, Mapping[str, Any]]
Message = Mapping[str, Any]

_START_SECONDS = 300.0
_ANSWER_SECONDS = 180.0
"""How long an answer may take: a prompt that computes, and other processes, keep the server from answering."""

_SMALL_WORKFLOW: Workflow = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}


class ServerError(RuntimeError):
    """The server did not start, went away, or refused what it was asked."""


class ComfyServer:
    """``main.py`` of a ComfyUI tree as a subprocess, with a base directory of its own; a context manager.

    ``base`` has ComfyUI's folders (custom_nodes, models, output); ``log`` is what the server prints.
    """

    def __init__(self, comfyui: Path, base: Path, arguments: tuple[str, ...] = ()) -> None:
        self.comfyui, self.base, self.arguments = comfyui, base, arguments
        # Bound until the server ends, so that nobody else is given this port before it listens there.
        self._kept = socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind(("127.0.0.1", 0))
        self.port: int = self._kept.getsockname()[1]
        self.log = base / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ComfyServer":
        for folder in ("custom_nodes", "models", "output", "input", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "main.py", "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base / 'comfyui.db'}", "--disable-api-nodes"]
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, *self.arguments],
                    cwd=self.comfyui,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and everything it started. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            self._kept.close()
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._kept.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def get(self, path: str, **query: str) -> bytes:
        address = f"http://127.0.0.1:{self.port}{path}?{urlencode(query)}"
        with urllib.request.urlopen(address, timeout=_ANSWER_SECONDS) as answer:
            return bytes(answer.read())

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Post JSON. An HTTP error is raised as `ServerError` with the server's answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error.code}: {error.read().decode()}") from None
        return json.loads(text) if text else None

    def free(self, *, models: bool = True) -> None:
        """Have ComfyUI forget cached outputs and unload models, and wait until it has.

        It does so between two prompts: maybe not before one that is queued at once, but before the one after that.
        """
        self.post("/free", {"unload_models": models, "free_memory": True})
        self.run(_SMALL_WORKFLOW)

    def run(self, workflow: Workflow, on_message: Callable[[Message], None] = lambda _: None) -> dict[str, Any]:
        """Queue a workflow, follow it over the websocket to its end, and return its entry in the history."""
        # A thread of its own: Playwright's synchronous API leaves an event loop running in the caller's.
        with ThreadPoolExecutor(1) as thread:
            following = thread.submit(asyncio.run, self._run(workflow, on_message))
            try:
                return following.result()
            except (KeyboardInterrupt, SystemExit):
                self.stop()  # else the thread, and this with it, waits until the prompt has ended
                raise

    def images(self, history: Mapping[str, Any]) -> list[bytes]:
        """The PNG files that a run saved."""
        saved = [image for output in history["outputs"].values() for image in output.get("images", ())]
        return [self.get("/view", **image) for image in saved]

    async def _run(self, workflow: Workflow, on_message: Callable[[Message], None]) -> dict[str, Any]:
        client = uuid.uuid4().hex
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket_:
            prompt = self.post("/prompt", {"prompt": workflow, "client_id": client})["prompt_id"]
            async for frame in socket_:
                if frame.type != aiohttp.WSMsgType.TEXT:
                    continue
                message = json.loads(frame.data)
                on_message(message)
                ended = message["type"] in ("execution_success", "execution_error", "execution_interrupted")
                if ended and message["data"].get("prompt_id") == prompt:
                    break
            else:
                raise ServerError(f"the server went away; its log ends:\n{self._log_tail()}")
        return self._history(prompt)

    def _history(self, prompt: str) -> dict[str, Any]:
        for _ in range(1000):
            history: dict[str, dict[str, Any]] = json.loads(self.get(f"/history/{prompt}"))
            if prompt in history:
                return history[prompt]
            time.sleep(0.05)  # the entry is written just after the last message
        raise ServerError(f"prompt {prompt} is not in the history")

    def _wait_until_up(self) -> None:
        assert self._process is not None
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended while it started; its log ends:\n{self._log_tail()}")
            try:
                self.get("/system_stats")
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise ServerError(f"ComfyUI did not start in {_START_SECONDS:.0f} s; its log ends:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-30:])


def drop_package(root: Path, base: Path, name: str = "ComfyUI-Flux-NF4") -> None:
    """Put the package into ``base/custom_nodes`` as a user would: its files, under a name of the user's."""
    target = base / "custom_nodes" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "tools", "benchmarks")
    shutil.copytree(root, target, ignore=ignore)


def link_model(file: Path, base: Path, folder: str) -> None:
    """Make ``file`` show up in ``base/models/folder``."""
    target = base / "models" / folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(file.resolve())
