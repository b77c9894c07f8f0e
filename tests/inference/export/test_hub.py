"""A pushed run is what timm and the Hub read; the Hub is a local server with the calls of its API."""

import base64
import http.server
import io
import json
import os
import subprocess
import sys
import threading

import pytest
import timm
import torch
import yaml
from rich.console import Console

from support.commands import ROOT, rsb
from support.plans import small_set
from trainer.base.exits import EXIT_DONE
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.inference.export.card import model_card
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.run_folder import open_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("finished")
    job = Job("A2", "test_resnet", overrides=small_set("epochs=1 batch.images=96"))
    plan = plan_of(job)
    settings = make_settings("cpu", workers="0", runs=folder / "runs", results=folder / "results")
    with StopRequest() as stop:
        out = Console(file=io.StringIO(), width=140)
        code, row = run_job(job, plan, settings, open_data(plan.profile, None), out, stop)
    assert code == EXIT_DONE
    return settings.runs / row.run


def test_a_card_says_what_a_reader_needs(finished):
    card = model_card(finished, "mit")
    _, head, text = card.split("---\n", 2)
    assert (
        yaml.safe_load(head)["license"] == "mit" and yaml.safe_load(head)["library_name"] == "timm"
    )
    row = json.loads((finished / "row.json").read_text())
    for said in (
        row["run"],
        row["model"],
        f"{row['top1_pct']:.2f}",
        row["weights_sha256"],
        "A2.v2",
    ):
        assert said in text
    for one in row["deviations"]:
        assert f"| `{one['path']}` | {one['before']} | {one['after']} |" in text
    assert "license" not in yaml.safe_load(model_card(finished).split("---\n")[1])


class Hub(http.server.BaseHTTPRequestHandler):
    """Its calls for a new repository and for one commit of regular files."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            server.created = json.loads(content)
            return self._answer(200, {"url": f"{server.url}/somebody/model"})
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in files
            ]
            return self._answer(200, {"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    server.files[value["path"]] = base64.b64decode(value["content"])
            commit = {"commitUrl": f"{server.url}/somebody/model/commit/0", "commitOid": "0" * 40}
            return self._answer(200, commit)
        return self._answer(200, {})  # is the card valid?

    def do_GET(self):
        self._answer(404, {"error": "none"})

    def _answer(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture()
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url, server.files = f"http://127.0.0.1:{server.server_port}", {}
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pushed(finished, hub, home, token):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)} | token
    words = ["push", "--run", str(finished), "--repo", "somebody/model"]
    return subprocess.run(
        [sys.executable, "-m", "trainer", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip


def test_what_is_pushed_is_the_model_as_timm_reads_it(finished, hub, tmp_path):
    before = sorted(path.name for path in finished.iterdir())
    done = pushed(finished, hub, tmp_path / "home", {"HF_TOKEN": "hf_right"})
    assert done.returncode == 0, done.stderr
    assert hub.created["name"] == "model" and hub.created["organization"] == "somebody"
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    assert set(hub.files) == {
        "README.md", "config.json", "model.safetensors", "plan.json", "recipe.yaml", "row.json"
    }  # fmt: skip
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.files.items():
        (copy / name).write_bytes(content)
    images = torch.randn(2, 3, 32, 32)
    models = open_model(copy), timm.create_model(f"local-dir:{copy}", pretrained=True).eval()
    with torch.no_grad():
        expected = open_model(finished)(images)
        assert all(torch.equal(model(images), expected) for model in models)
    assert before == sorted(path.name for path in finished.iterdir())


@pytest.mark.parametrize(("token", "found"), [({}, "token"), ({"HF_TOKEN": "hf_wrong"}, "401")])
def test_what_the_hub_does_not_take_is_one_line(finished, hub, tmp_path, token, found):
    done = pushed(finished, hub, tmp_path, token)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert found in done.stderr and not hub.files


def test_push_refuses_a_run_that_is_not_there(tmp_path):
    done = rsb("push", "--run", "none", "--repo", "a/b", "--runs", tmp_path)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "none" in done.stderr
