"""The page on which a person labels pairs, served to this machine's browsers alone."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
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
let shown = null, busy = false;
async function show(reply) {
  const state = await reply.json();
  shown = state.key;
  byId("state").textContent = state.error || `${state.answered} of ${state.total} answered`;
  byId("caption").textContent = shown ? state.caption : "All pairs are answered. Stop the command with Ctrl-C.";
  byId("pair").hidden = !shown;
  byId("pair").style.display = shown ? "flex" : "none";
  for (const side of ["left", "right"]) if (shown) byId(side).src = `/image/${shown}/${side}`;
}
async function send(answer) {
  if (busy || (!shown && answer !== "undo")) return;
  busy = true;
  try {
    await show(await fetch("/answer", { method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ key: shown, answer }) }));
  } catch { byId("state").textContent = "No answer from the command: is it still running? Nothing was stored."; }
  busy = false;
}
const keys = { ArrowLeft: "left", ArrowRight: "right", t: "tie", s: "skip", Backspace: "undo" };
document.addEventListener("keydown", event => {
  if (keys[event.key] && !event.repeat) { event.preventDefault(); send(keys[event.key]); }
});
for (const button of document.querySelectorAll("button"))
  button.onclick = () => { button.blur(); send(button.dataset.answer); };
for (const side of ["left", "right"]) {
  byId(side).onclick = () => send(side);
  // Small images are enlarged as they are, not smoothed.
  byId(side).onload = ({ target }) => target.style.imageRendering = target.naturalWidth < 256 ? "pixelated" : "auto";
}
fetch("/pair").then(show);
</script></html>
"""


def server(labels: Labels, port: int) -> HTTPServer:
    """A server of the page, which is to be told `serve_forever`; it answers one request after the other.

    Args:
        port: 0 = any that is free.
    Raises:
        UserError: the port is taken.
    """
    handler = type("Labelling", (_Handler,), {"labels": labels})
    try:
        return HTTPServer((HOST, port), handler)
    except OSError as error:
        raise UserError(f"--port {port}: cannot be used ({error.strerror}); choose another") from None


class _Handler(BaseHTTPRequestHandler):
    labels: Labels

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
            question, (_, *parts) = self.labels.current(), self.path.split("/")
            if question is None or parts not in (["image", question.key, side] for side in ("left", "right")):
                return self._send(404, b"", "text/plain")
            image = getattr(question, parts[2]).read()
            self._send(200, image, media_type(image))

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
        question, labels = self.labels.current(), self.labels
        state: dict[str, Any] = {"key": None, "caption": "", "error": error, "total": len(labels.questions)}
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
