"""The Hugging Face Hub, as a server on this machine that speaks the part of its protocol that is used."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mefem.cli import app
from mefem.encoders import load_encoder
from mefem.export import export_encoder
from mefem.hub import REPOSITORIES, HubError, fetch_weights, online_file, push_folder
from mefem.models import create_encoder, save_encoder

TOY = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories as {name: {file: bytes}} in `server.files`."""

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def find(self):
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            return "/".join(path[2:4]), None
        return "/".join(path[:2]), "/".join(path[4:])

    def do_GET(self):
        repository, file = self.find()
        files = self.server.files.get(repository)
        if files is None or file and file not in files:
            missing = "EntryNotFound" if files else "RepoNotFound"
            return self.answer({"error": "not found"}, 404, X_Error_Code=missing)
        if file:
            etag = hashlib.sha256(self.server.told.get(file, files[file])).hexdigest()
            return self.answer(files[file], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        listed = []
        for name, data in files.items():
            sha256 = hashlib.sha256(self.server.told.get(name, data)).hexdigest()
            lfs = {"sha256": sha256, "size": len(data), "pointerSize": 100}
            listed.append({"rfilename": name, "size": len(data), "blobId": sha256[:40], "lfs": lfs})
        about = {"id": repository, "sha": COMMIT, "siblings": listed, "cardData": {"license": "mit"}}
        self.answer(about | {"private": False, "tags": [], "downloads": 0, "likes": 0})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = f"http://{self.headers['Host']}"
        if self.path.endswith("/repos/create"):
            about = json.loads(body)
            name = "/".join(filter(None, (about.get("organization"), about["name"])))
            self.server.files.setdefault(name, {})
            self.server.created.append(about)
            return self.answer({"url": f"{address}/{name}", "name": name})
        if "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            repository, _ = self.find()
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[repository][line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            return self.answer({"commitUrl": f"{address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        self.answer({"errors": [], "warnings": []})  # of the card's metadata


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.told = {}, [], {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    server.server_close()


def released(path):
    """A file as MeFEm's authors released theirs: a flat timm state dict."""
    encoder = create_encoder(**TOY)
    torch.save(encoder.state_dict(), path)
    return path.read_bytes()


def test_weights_come_on_request_with_size_licence_and_hash(hub, tmp_path, monkeypatch):
    data = released(tmp_path / "x.pth.tar")
    hub.files["boretsyury/MeFEm"] = {"MeFEm-B.pth.tar": data}
    monkeypatch.setenv("MEFEM_CACHE", str(tmp_path / "cache"))
    said = []
    path = fetch_weights("mefem-b", say=said.append, endpoint=hub.address)
    sha256 = hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data and path.parent == tmp_path / "cache"
    assert f"{len(data) / 1e6:,.1f} MB, licence mit, SHA-256 {sha256}: fetching to" in said[0]
    assert load_encoder("mefem-b").dim == 64
    fetch_weights("mefem-b", say=said.append, endpoint=hub.address)
    assert "there already" in said[1]
    path.write_bytes(data[:-1])  # as a copy that was cut
    assert fetch_weights("mefem-b", say=said.append, endpoint=hub.address).read_bytes() == data
    assert [one.name for one in path.parent.iterdir()] == ["MeFEm-B.pth.tar"]
    hub.told["MeFEm-B.pth.tar"] = b"a new release, whose bytes do not come"
    with pytest.raises(HubError, match="SHA-256"):
        fetch_weights("mefem-b", say=said.append, endpoint=hub.address)
    assert path.read_bytes() == data, "what was there stays until its successor is whole"


def test_what_has_another_hash_is_not_kept(hub, tmp_path):
    hub.files["boretsyury/MeFEm"] = {"MeFEm-S.pth.tar": b"another file"}
    hub.told["MeFEm-S.pth.tar"] = b"the file"
    with pytest.raises(HubError, match="SHA-256 .* expected .*removed"):
        fetch_weights("mefem-s", tmp_path, say=lambda _: None, endpoint=hub.address)
    assert not (tmp_path / "MeFEm-S.pth.tar").exists()


def test_errors_of_the_hub_are_one_line(hub):
    for files, words in (
        ({}, "boretsyury/MeFEm: .*check the network"),
        ({"boretsyury/MeFEm": {"a": b""}}, "has no MeFEm-S"),
    ):
        hub.files = files
        with pytest.raises(HubError, match=words) as error:
            online_file("mefem-s", hub.address)
        assert "\n" not in str(error.value)
    with pytest.raises(HubError, match="boretsyury/MeFEm: "):
        online_file("mefem-s", "http://127.0.0.1:9")


def test_an_export_goes_to_the_hub_and_timm_loads_it_from_there(hub, tmp_path):
    run = tmp_path / "run"
    save_encoder(run / "encoder.safetensors", create_encoder(**TOY), "vit_small_patch16_224", TOY)
    export_encoder(run, tmp_path / "out", place="hf-hub:me/faces")
    assert push_folder(tmp_path / "out", "me/faces", endpoint=hub.address).startswith(hub.address)
    assert hub.created[0]["visibility"] == "private"
    assert set(hub.files["me/faces"]) >= {"README.md", "config.json", "model.safetensors"}
    code = (
        "import numpy as np, timm, torch\n"
        "model = timm.create_model('hf-hub:me/faces', pretrained=True).eval()\n"
        "x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)\n"
        f"np.save({str(tmp_path / 'tokens.npy')!r}, model.forward_features(x).detach().numpy())"
    )
    home = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | home, timeout=120)
    ours = load_encoder(run).model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))
    np.testing.assert_allclose(np.load(tmp_path / "tokens.npy"), ours.numpy(), atol=1e-5)
    assert b'create_model("hf-hub:me/faces", pretrained=True)' in hub.files["me/faces"]["README.md"]


def test_the_command_fetches_nothing_unasked_and_says_what_it_cannot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["info", "weights"])
    assert result.exit_code == 0 and "hf download" not in result.output
    for name in REPOSITORIES:  # the others come by a command of their publisher
        assert f"; mefem info weights --fetch {name}\n" in result.output
    assert "; curl -L -o data/weights/FaRL" in result.output
    assert result.output.startswith("mefem-starter present in the package")  # the default needs no fetching
    result = CliRunner().invoke(app, ["info", "weights", "--fetch", "farl"])
    assert result.exit_code == 1 and "to get it: curl" in result.stderr
