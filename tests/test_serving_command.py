"""`nextflow-hf serve`: what it refuses, and that SIGTERM lets requests end."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request

import pytest

from nextflow_hf.commands import serve


def test_an_open_address_needs_a_key(command_line, monkeypatch):
    monkeypatch.delenv("NEXTFLOW_API_KEY", raising=False)
    assert "pass --api-key, or set NEXTFLOW_API_KEY" in command_line.mistake("serve", "--host", "0.0.0.0")
    assert "--max-queue: 0 is out of range, expected 1 to" in command_line.mistake("serve", "--max-queue", "0")
    for wait in ("inf", "-1", "nan"):
        assert f"--max-wait-ms is {float(wait)}, expected 0 to 60000" in command_line.mistake(
            "serve", "--max-wait-ms", wait
        )


@pytest.mark.parametrize("command", ["serve", "app"])
@pytest.mark.parametrize("port", ["-1", "0", "65536", "x"])
def test_a_port_that_is_none_is_refused_before_the_model_is_loaded(command_line, command, port):
    assert "argument --port: " in command_line.mistake(command, "--port", port)


def test_a_missing_package_names_the_extra(command_line, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for name in ("app", "metrics"):
        monkeypatch.delitem(sys.modules, f"nextflow_hf.serving.{name}", raising=False)
    assert 'pip install "nextflow-hf[serve]"' in command_line.mistake("serve")


@pytest.mark.parametrize(("model", "name"), [("user/model", "user/model"), ("{folder}/toy", "toy")])
def test_the_name_of_a_model_has_no_path(model, name, tmp_path):
    (tmp_path / "toy").mkdir()
    assert serve.served_name(model.format(folder=tmp_path)) == name


def test_the_end_of_the_server_is_told_as_it_was(monkeypatch, capsys):
    stops = []
    for cut, said in ((0, "with all requests answered"), (2, "with all but 2 requests answered")):
        state = types.SimpleNamespace(
            name="toy",
            run=lambda **options: None,
            worker=types.SimpleNamespace(stop=lambda cut=cut: stops.append(cut)),
            metrics=types.SimpleNamespace(num_unanswered=cut),
        )
        monkeypatch.setattr(serve, "load_app", lambda args, state=state: types.SimpleNamespace(state=state))
        assert serve.main(["--host", "::1"]) == 0
        output = capsys.readouterr()
        assert "http://[::1]:8000/v1" in output.out and said in output.err
    assert stops == [0, 2]


def test_sigterm_answers_what_waits(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nextflow_hf.cli", "serve", "--port", str(port), "--max-wait-ms", "0"]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert "nextflow-shapes on" in server.stdout.readline()
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except OSError:
                time.sleep(0.1)
        answers = []

        def ask() -> None:
            body = json.dumps({"prompt": "a red circle", "n": 10}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/images/generations", body, headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                answers.append(len(json.load(response)["data"]))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(250):  # one is sampled, the others wait
            if b"nextflow_queue_requests 2.0" in urllib.request.urlopen(f"{url}/metrics").read():
                break
            time.sleep(0.02)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert answers == [10, 10, 10]
        assert server.wait(60) == 0
        assert "all requests answered" in server.stderr.read()
    finally:
        server.kill()
