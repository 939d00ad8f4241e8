"""`chat` against a server that speaks server-sent events over real sockets, and on a real terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headrace_cli.chat import Answering, Conversation, check_template, events, printable
from headrace_cli.problem import Problem
from headrace_cli.server import Server


class Speaker(ThreadingHTTPServer):
    """An OpenAI-compatible server of the model ``demo/ship`` that answers with a script.

    Attributes:
        script: the events of every answer; a ``threading.Event`` among them is waited for.
        asked: the bodies of the requests.
        gone: set once a client went away in the middle of an answer.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Speaking)
        self.script, self.asked, self.gone = [], [], threading.Event()
        self.server = Server(endpoint=f"http://127.0.0.1:{self.server_port}", model="demo/ship")

    def conversation(self, **answering):
        return Conversation(self.server, Answering(**{"max_tokens": 9, **answering}))


class Speaking(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.dumps({"data": [{"id": "demo/ship"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for part in self.server.script:
                if isinstance(part, threading.Event):
                    part.wait(30)
                    continue
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.gone.set()

    def log_message(self, *_):
        pass


def piece(text, **choice):
    delta = {"content": text} if text is not None else {}
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, **choice}]}).encode() + b"\n\n"


END = piece(None, finish_reason="stop")


@pytest.fixture
def speaker():
    server = Speaker()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_piece_is_there_before_the_next_one_is_made(speaker):
    heard = threading.Event()
    speaker.script = [piece("Two "), heard, piece("words"), END]
    answer = speaker.conversation().say("Hello")
    assert next(answer) == "Two "
    heard.set()
    assert list(answer) == ["words"]


def test_every_turn_goes_with_what_was_said_before(speaker):
    conversation = speaker.conversation(max_tokens=5, temperature=0)
    conversation.messages.append({"role": "system", "content": "Be short."})
    speaker.script = [piece("One"), piece("."), END, b"data: [DONE]\n\n"]
    assert "".join(conversation.say("First")) == "One."
    assert "".join(conversation.say("Second")) == "One."
    assert speaker.asked[1] == {
        "model": "demo/ship",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "First"},
            {"role": "assistant", "content": "One."},
            {"role": "user", "content": "Second"},
        ],
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
    }
    assert "temperature" not in _asked_without_temperature(speaker)


def _asked_without_temperature(speaker):
    list(speaker.conversation().say("Third"))
    return speaker.asked[-1]


def test_a_stopped_answer_stays_as_far_as_it_went_and_its_server_is_let_go(speaker):
    speaker.script = [piece("Much "), *[piece("more ")] * 100_000, END]
    conversation = speaker.conversation()
    answer = conversation.say("Go on")
    assert next(answer) == "Much "
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "Much "}
    assert speaker.gone.wait(30)


def test_a_turn_that_nothing_answered_is_forgotten(speaker):
    speaker.script = [b'data: {"error": "no room"}\n\n']
    conversation = speaker.conversation()
    with pytest.raises(Problem, match="no room"):
        list(conversation.say("Hello"))
    assert conversation.messages == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([piece("Half")], "the answer broke off"),
        ([b"data: not json\n\n"], "no answer"),
        ([b'data: {"choices": 3}\n\n'], "no answer"),
        ([], "the answer broke off"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(speaker, script, said):
    speaker.script = script
    with pytest.raises(Problem, match=said):
        list(speaker.conversation().say("Hello"))


def test_an_answer_that_was_cut_says_so(speaker):
    speaker.script = [piece("Long"), piece(None, finish_reason="length")]
    conversation = speaker.conversation()
    assert list(conversation.say("Hello")) == ["Long"]
    assert conversation.finish_reason == "length"


def test_a_server_of_another_model_is_not_believed(speaker):
    other = Conversation(Server(endpoint=speaker.server.endpoint, model="demo/other"), Answering(max_tokens=9))
    with pytest.raises(Problem, match="serves demo/ship, not demo/other: another server took the port"):
        list(other.say("Hello"))
    assert speaker.asked == []


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([b"data: a\n", b"\n", b"data: b\n", b"\n"], ["a", "b"]),
        ([b"data:a\r\n", b"data: b\r\n", b"\r\n"], ["a\nb"]),
        ([b": comment\n", b"\n", b"event: x\n", b"id: 3\n", b"data: a\n"], ["a"]),
        ([b"data: \xe2\x82\xac\n", b"\n"], ["\u20ac"]),
        ([], []),
    ],
)
def test_events_are_read_as_browsers_read_them(lines, found):
    assert list(events(lines)) == found


@pytest.mark.parametrize(
    ("files", "is_told"),
    [
        ({"tokenizer_config.json": "{}"}, True),
        ({"tokenizer_config.json": '{"chat_template": "{{ x }}"}'}, False),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}"}, False),
        ({}, False),
    ],
)
def test_a_model_without_a_template_is_not_talked_to(tmp_path, files, is_told):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    server = Server(endpoint="http://127.0.0.1:9", model="demo/ship", model_uri=str(tmp_path))
    if not is_told:
        check_template(server, name="demo")
        return
    with pytest.raises(Problem, match=r"no chat template.*`headrace ask demo PROMPT`, or add an sft stage"):
        check_template(server, name="demo")


def test_a_model_cannot_move_the_cursor():
    assert printable("a\x1b[2Jb\r\n\tc\u20ac") == "a\ufffd[2Jb\ufffd\n\tc\u20ac"


PROGRAM = """
import sys
from headrace_cli.chat import Answering, Conversation, converse
from headrace_cli.server import Server
def write(text):
    sys.stdout.write(text); sys.stdout.flush()
server = Server(endpoint=sys.argv[1], model="demo/ship")
converse(Conversation(server, Answering(max_tokens=9)), write=write, note=lambda text: write(f"({text})\\n"))
print("over")
"""


class Person:
    """Somebody at a terminal, in a conversation."""

    def __init__(self, endpoint):
        self.controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, endpoint],
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(terminal, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(terminal)
        self.seen = ""

    def waits_for(self, text, *, seconds=60):
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.controller], [], [], 0.1)[0]:
                self.seen += os.read(self.controller, 65536).decode()
        self.seen = self.seen.partition(text)[2]

    def presses_until(self, key, text, *, times=60):
        """A key is lost now and then: Ctrl-D, if it comes between the prompt and the moment when the line editor takes the
        terminal over, and Ctrl-C on a machine with much else to do. People press it again."""
        for _ in range(times):
            self.types(key)
            try:
                return self.waits_for(text, seconds=1)
            except AssertionError:
                continue
        raise AssertionError(self.seen)

    def types(self, text):
        os.write(self.controller, text.encode())


@pytest.fixture
def person(speaker):
    somebody = Person(speaker.server.endpoint)
    yield somebody
    if somebody.process.poll() is None:
        somebody.process.kill()
    somebody.process.wait()
    os.close(somebody.controller)


def test_a_conversation_on_a_terminal(speaker, person):
    """An answer that Ctrl-C stops, a line that it drops, another answer, and Ctrl-D."""
    held = threading.Event()
    speaker.script = [piece("I count: one "), held, END]
    person.waits_for("> ")
    person.types("Count\n")
    person.waits_for("one ")
    person.presses_until("\x03", "(stopped)")
    held.set()
    person.waits_for("> ")
    person.types("never mind\x03")
    person.waits_for("> ")
    speaker.script = [piece("Good."), END]
    person.types("How are you?\n")
    person.waits_for("Good.")
    person.waits_for("> ")
    person.presses_until("\x04", "over")
    assert person.process.wait(30) == 0
    assert [m["content"] for m in speaker.asked[-1]["messages"]] == ["Count", "I count: one ", "How are you?"]
