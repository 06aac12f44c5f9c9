"""Models by their names on the hub: a stand-in for it on this machine serves one, and what fails is
said in one line."""

import base64
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.hub import local_copy, push
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for: a model's list of files, and each file."""

    folder: Path
    asked: list[str]
    created: list[dict]
    sent: dict[str, bytes]

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_mine":
            return self._send(401, b"", True, {"X-Error-Code": "RepoNotFound"})
        answer = {"url": "https://huggingface.co/lab/new", "name": "lab/new", "id": "lab/new"}
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(content)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": path, **mode} for path in paths]}
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.sent[value["path"]] = base64.b64decode(value["content"])
            answer = {
                "commitUrl": f"https://huggingface.co/lab/new/commit/{COMMIT}",
                "commitOid": COMMIT,
            }
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(content))
        return self._send(200, json.dumps(answer).encode(), True)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/lab/tiny"):
            files = sorted(file.name for file in self.folder.iterdir())
            entries = [{"type": "file", "path": name, "size": 1, "oid": name} for name in files]
            info = {
                "_id": "1",
                "id": "lab/tiny",
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in files],
            }
            self._send(200, json.dumps(entries if "/tree/" in path else info).encode(), with_body)
        elif path.startswith("/lab/tiny/resolve/"):
            file = self.folder / path.rsplit("/", 1)[1]
            if file.exists():
                return self._send(200, file.read_bytes(), with_body)
            self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(401, b"", with_body, {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict | None = None) -> None:
        self.send_response(status)
        tag = hashlib.sha256(body).hexdigest()
        for name, value in {
            "Content-Length": str(len(body)),
            "ETag": f'"{tag}"',
            "X-Repo-Commit": COMMIT,
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    folder = checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": [], "created": [], "sent": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    # the library reads its environment when it is imported
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = endpoint + template[template.index("/{repo_id}") :]
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["lab/tiny", "hf://lab/tiny", "hf://lab/tiny@main"])
def test_a_model_is_imported_by_its_name(name, hub, tmp_path):
    assert cli.main(["import-hf", name, str(tmp_path / "model"), "--names", "a,b"]) == 0
    assert open_artifact(tmp_path / "model").experts == ("anchor", "a", "b")
    assert not any("pytorch_model.bin" in path for path in hub.asked)


def test_what_is_there_is_not_downloaded_again(hub):
    first = local_copy("lab/tiny")
    files = sum("/resolve/" in path for path in hub.asked)
    assert files >= 3 and local_copy("lab/tiny") == first
    assert sum("/resolve/" in path for path in hub.asked) == files


def test_a_directory_goes_before_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab" / "tiny").mkdir(parents=True)
    assert local_copy("lab/tiny") == Path("lab/tiny") and not hub.asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lab/none",
            "there is no directory lab/none, and the hub's model lab/none cannot be had: ",
        ),
        ("hf://lab/none", "^the hub's model lab/none cannot be had: "),
        ("hf://tiny", "expected hf://org/name"),
        ("hf://a/b/c", "expected hf://org/name"),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_refused_in_one_line(name, message, hub):
    with pytest.raises(UserError, match=message) as error:
        local_copy(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("public", [False, True])
def test_an_export_is_uploaded_with_its_card(
    public, hub, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    model = import_hf(hub.folder, tmp_path / "model")
    export_hf(model.path, tmp_path / "out")
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / ".DS_Store").write_bytes(b"a Mac's")
    options = ["--public"] if public else []
    assert cli.main(["push-to-hub", str(tmp_path / "out"), "lab/new", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["address"].endswith("/lab/new")
    assert hub.sent == files
    (made,) = hub.created
    assert (made["name"], made["organization"]) == ("new", "lab")
    seen = made.get("visibility") or ("private" if made["private"] else "public")
    assert seen == ("public" if public else "private")


def test_what_cannot_be_uploaded_is_refused_in_one_line(hub, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"lacks README\.md; expected a checkpoint"):
        push(hub.folder, "lab/new")
    (hub.folder / "README.md").write_text("a card")
    with pytest.raises(UserError, match="expected org/name"):
        push(hub.folder, "new")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(UserError, match=r"lab/new cannot be uploaded: .*HF_TOKEN") as error:
        push(hub.folder, "lab/new")
    assert "\n" not in str(error.value) and not hub.sent
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks \*.safetensors"):
        push(hub.folder, "lab/new")


def test_without_a_network_it_says_so(hub, monkeypatch):
    import huggingface_hub.hf_api

    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be had: .*; check the name, the network") as error:
        local_copy("lab/tiny")
    assert "\n" not in str(error.value)
