"""The page on which a person labels pairs, served to this machine's browsers alone."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from workbench.common.errors import UserError
from workbench.common.ports import HOST
from workbench.evaluation.labelling import Labels, media_type

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Which is better?</title>
<style>
body { margin: 0; font: 16px system-ui, sans-serif; background: #222; color: #eee; text-align: center; }
#caption { margin: 16px auto; max-width: 60em; min-height: 1.4em; font-size: 20px; }
#pair { display: flex; gap: 12px; justify-content: center; padding: 0 12px; }
#pair img { width: min(46vw, 68vh); height: min(46vw, 68vh); object-fit: contain; background: #111; cursor: pointer;
  border: 3px solid #222; }
#pair img:hover { border-color: #6af; }
button { font: inherit; margin: 16px 6px; padding: 8px 18px; background: #444; color: #eee; border: 0;
  border-radius: 6px; cursor: pointer; }
kbd { opacity: .65; margin-left: .5em; } #state { opacity: .75; }
</style>
<p id="caption"></p>
<div id="pair"><img id="left" alt="left image"><img id="right" alt="right image"></div>
<div id="buttons">
<button data-answer="left">Left is better<kbd>&larr;</kbd></button>
<button data-answer="tie">Tie<kbd>T</kbd></button>
<button data-answer="skip">Skip<kbd>S</kbd></button>
<button data-answer="right">Right is better<kbd>&rarr;</kbd></button>
<button data-answer="undo">Undo<kbd>Backspace</kbd></button>
</div>
<p id="state"></p>
<script>
const byId = id => document.getElementById(id);
// Busy until both images of a pair have been seen for a moment: a second click would answer a pair that nobody saw.
let shown = null, busy = false;
const SEEN = 250;  // milliseconds
function load(side) {
  const image = byId(side);
  return new Promise(done => {
    image.onload = () => {
      // Small images are enlarged as they are, not smoothed.
      image.style.imageRendering = image.naturalWidth < 256 ? "pixelated" : "auto";
      done();
    };
    image.onerror = () => { byId("state").textContent = `The ${side} image cannot be read: skip the pair.`; done(); };
    image.src = `/image/${shown}/${side}`;
  });
}
async function show(reply) {
  const state = await reply.json();
  shown = state.key;
  byId("state").textContent = state.error || `${state.answered} of ${state.total} answered`;
  byId("caption").textContent = shown ? state.caption : "No pair is left to answer. Stop the command with Ctrl-C.";
  byId("pair").hidden = !shown;
  byId("pair").style.display = shown ? "flex" : "none";
  if (!shown) return;
  await Promise.all(["left", "right"].map(load));
  await new Promise(done => setTimeout(done, SEEN));
}
async function ask(path, options) {
  if (busy) return;
  busy = true;
  try {
    await show(await fetch(path, options));
  } catch { byId("state").textContent = "No answer from the command: is it still running? Nothing was stored."; }
  busy = false;
}
function send(answer) {
  if (!shown && answer !== "undo") return;
  ask("/answer", { method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ key: shown, answer }) });
}
const keys = { ArrowLeft: "left", ArrowRight: "right", t: "tie", s: "skip", Backspace: "undo" };
document.addEventListener("keydown", event => {
  // With these the keys are the browser's: back, save, a new tab.
  if (!keys[event.key] || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  send(keys[event.key]);
});
for (const button of document.querySelectorAll("button"))
  button.onclick = () => { button.blur(); send(button.dataset.answer); };
for (const side of ["left", "right"]) byId(side).onclick = () => send(side);
ask("/pair");
</script></html>
"""


def server(labels: Labels, port: int) -> ThreadingHTTPServer:
    """A server of the page, which is to be told `serve_forever`.

    Each connection has a thread, since browsers open some on which they ask nothing; the labels are one thread's at a
    time.

    Args:
        port: 0 = any that is free.
    Raises:
        UserError: the port is taken.
    """
    handler = type("Labelling", (_Handler,), {"labels": labels, "lock": threading.Lock()})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise UserError(f"--port {port}: cannot be used ({error.strerror}); choose another") from None


class _Handler(BaseHTTPRequestHandler):
    labels: Labels
    lock: threading.Lock
    timeout = 60  # seconds that a connection may be silent

    def log_message(self, *arguments: Any) -> None:
        """Write no line a request."""

    def do_GET(self) -> None:
        """The page, the current question, or one of its images."""
        if not self._is_ours():
            return
        if self.path == "/":
            self._send(200, PAGE.encode(), "text/html; charset=utf-8")
        elif self.path == "/pair":
            self._state()
        else:
            with self.lock:
                question = self.labels.current()
            _, *parts = self.path.split("/")
            if question is None or parts not in (["image", question.key, side] for side in ("left", "right")):
                return self._send(404, b"", "text/plain")
            try:
                image = getattr(question, parts[2]).read()
                kind = media_type(image)
            except (OSError, UserError):  # of damaged images too
                return self._send(404, b"cannot be read", "text/plain")
            self._send(200, image, kind)

    def do_POST(self) -> None:
        """Store an answer, or take the newest back, and say what is asked next."""
        # Of another page, a browser would ask first whether it may send this type, and is never told so.
        if not self._is_ours() or self.headers.get("Content-Type") != "application/json" or self.path != "/answer":
            return self._send(403, b"", "text/plain")
        try:
            told = json.loads(self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0)))))
            key, answer = str(told["key"]), str(told["answer"])
        except (ValueError, KeyError, TypeError):
            return self._send(400, b"", "text/plain")
        try:
            with self.lock:
                done = self.labels.undo() if answer == "undo" else self.labels.answer(key, answer)
        except (OSError, UserError) as error:
            return self._state(f"Not stored: {error}")
        self._state("" if done or answer != "undo" else "Nothing to take back")

    def _is_ours(self) -> bool:
        """Whether the request names this machine; a page elsewhere could point a name of its own here."""
        ours = f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}"  # type: ignore[attr-defined]
        if self.headers.get("Host") in ours:
            return True
        if self.command == "GET":
            self._send(403, b"", "text/plain")
        return False

    def _state(self, error: str = "") -> None:
        labels = self.labels
        state: dict[str, Any] = {"key": None, "caption": "", "error": error, "total": len(labels.questions)}
        with self.lock:
            question = labels.current()
            state["answered"] = sum(one.key in labels.answered for one in labels.questions)
        if question is not None:
            state |= {"key": question.key, "caption": question.caption}
        self._send(200, json.dumps(state).encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
