"""Work on a Ray cluster gives the bytes of one process: with any number of workers, and when one
is killed.

The cluster is this machine, several times. Nothing of it listens to other machines.
"""

import contextlib
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray listens to this machine only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_num_workers_soft_limit": "12",  # processes take seconds to start: idle ones are kept
}
ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

from flexolmo_jax.config import Reading  # noqa: E402
from flexolmo_jax.data import over_shards, shards, spread  # noqa: E402
from flexolmo_jax.data.prepare import prepare  # noqa: E402
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402
from flexolmo_jax.errors import UserError  # noqa: E402
from flexolmo_jax.exchange.anchor import embed_domain  # noqa: E402
from flexolmo_jax.owner.proxy import select_proxies  # noqa: E402
from flexolmo_jax.runtime import cluster as runtime_cluster  # noqa: E402
from tests.chats import byte_chat, said  # noqa: E402
from tests.tiny import WORDS, documents, write_jsonl  # noqa: E402

SEQ_LEN = 64
# a process of its own makes the nodes: Ray forks, which does not go with JAX's threads
NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if cpus := int(line):
        nodes.append(cluster.add_node(num_cpus=cpus))
    else:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    print(cpus, flush=True)
cluster.shutdown()
"""
COMMAND = """
from flexolmo_jax.data import shards
from flexolmo_jax.cli import main
shards.SHARD = 1
raise SystemExit(main())
"""


class Cluster:
    """A head without workers, and a node with one; there may be more."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self.address = self._said()

    def add(self, workers: int) -> None:
        self._say(workers)

    def kill(self) -> None:
        """Kills the newest node."""
        self._say(0)

    def _say(self, number: int) -> None:
        assert self._process.stdin
        print(number, file=self._process.stdin, flush=True)
        assert self._said() == str(number)

    def _said(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    @property
    def processes(self) -> list:
        return psutil.Process(self._process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def cluster():
    command = [sys.executable, "-c", NODES]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3, text=True) as process:
        made = Cluster(process)
        before = signal.getsignal(signal.SIGTERM)
        ray.init(made.address, log_to_driver=False, logging_level=logging.CRITICAL)
        yield made
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)  # Ray leaves its own
        own = made.processes
    assert len(own) > 5
    assert psutil.wait_procs(own, timeout=10)[1] == []  # no process is left behind


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Path]:
    """Files of documents. Some are empty; some are again in the same or in later files. One file
    has nothing but documents of its own."""
    folder = tmp_path_factory.mktemp("many")
    files = []
    for number, domain in enumerate([*WORDS] * 2):
        texts = documents(domain, 120, seed=number)
        texts += [texts[3], "", *documents("public", 20, seed=number % 3)]
        files.append(write_jsonl(folder / f"{number}.jsonl", texts))
    return [*files, write_jsonl(folder / "own.jsonl", [f"own {n}" for n in range(50)])]


@pytest.fixture(scope="module")
def some_tokenizer(tmp_path_factory, many) -> Tokenizer:
    return train_tokenizer(many[:1], 320, tmp_path_factory.mktemp("tokenizer") / "t.json")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, many, some_tokenizer):
    """What one process prepares of them, a file a shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 1)
        out = tmp_path_factory.mktemp("alone") / "out"
        index = prepare(many, some_tokenizer, SEQ_LEN, out, heldout=0.2)
    assert index.duplicates_removed > 50
    return out


@pytest.fixture(autouse=True)
def a_file_a_shard(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 1)


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def has_workers(cluster, number: int) -> None:
    while (found := int(ray.cluster_resources().get("CPU", 0))) < number:
        cluster.add(min(3, number - found))


@pytest.mark.parametrize("workers", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_cluster_prepares_the_bytes_of_one_process(
    cluster, tmp_path, many, some_tokenizer, alone, workers
):
    has_workers(cluster, workers)
    prepare(many, some_tokenizer, SEQ_LEN, tmp_path / "out", heldout=0.2, ray=cluster.address)
    assert files_of(tmp_path / "out") == files_of(alone)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_cluster_prepares_conversations_as_one_process_does(cluster, tmp_path, many):
    """In some of the files: the others' records are no context. Each worker has the template."""
    has_workers(cluster, 2)
    tokenizer = byte_chat("chatml")
    rows = ({"messages": said(f"where {i}?", f"there {i}")} for i in range(60))
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [many[0], chats, many[1]]
    made = {}
    for name, ray_address in (("alone", None), ("spread", cluster.address)):
        how = {"heldout": 0.2, "ray": ray_address}
        prepare(files, tokenizer, SEQ_LEN, tmp_path / name / "out", **how)
        made[name] = files_of(tmp_path / name / "out")
    assert made["alone"] == made["spread"]
    assert {"chat.json", "train.context.npy", "heldout.context.npy"} < made["alone"].keys()
    tokenizer.chat = None
    with pytest.raises(
        UserError, match=r"chats\.jsonl, line 1: it has messages, and the tokenizer"
    ):
        prepare(files, tokenizer, SEQ_LEN, tmp_path / "none", ray=cluster.address)


def test_a_cluster_reads_documents_as_one_process_does(cluster, tmp_path, some_tokenizer):
    """Of every kind, with bad records, several documents in a file, and much that is none."""
    has_workers(cluster, 2)
    (folder := tmp_path / "docs").mkdir()
    texts = documents("code", 60)
    rows = [json.dumps({"body": text}) for text in texts]
    (folder / "a.json.gz").write_bytes(gzip.compress("\n".join([*rows[:20], "{oops"]).encode()))
    (folder / "b.csv").write_text("body,id\n" + "".join(f'"{text}",1\n' for text in texts[10:40]))
    (folder / "c.txt").write_text("\n---\n".join(texts[30:]) + "\n</s>\n")
    (folder / "d.pdf").write_text("x")
    (folder / ".e.jsonl").write_text(rows[0])
    made = {}
    for name, address in (("alone", None), ("spread", cluster.address)):
        how = {"ray": address, "reading": Reading("body", "---", skip_bad=True)}
        prepare([folder], some_tokenizer, SEQ_LEN, tmp_path / name / "out", **how)
        made[name] = files_of(tmp_path / name / "out")
    assert made["alone"] == made["spread"]
    index = json.loads(made["spread"]["index.json"])
    assert (index["bad_removed"], index["duplicates_removed"], len(index["left_out"])) == (1, 20, 2)


def test_a_killed_worker_changes_no_byte(cluster, tmp_path, many, some_tokenizer, alone):
    has_workers(cluster, 2)
    killed = threading.Event()

    def kill() -> None:
        while len(shards_in(tmp_path)) < 3:
            time.sleep(0.01)
        cluster.kill()
        killed.set()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    prepare(many, some_tokenizer, SEQ_LEN, tmp_path / "out", heldout=0.2, ray=cluster.address)
    was_midway = killed.is_set()
    killer.join(60)
    assert files_of(tmp_path / "out") == files_of(alone)
    assert was_midway


def test_a_cluster_embeds_a_domain_as_one_process_does(cluster, tmp_path, many, anchor):
    has_workers(cluster, 2)
    # more documents than an embedding is of
    more = [write_jsonl(tmp_path / f"{n}.jsonl", documents("law", 600, seed=n)) for n in (8, 9)]
    embed_domain(anchor, [*many, *more], tmp_path / "one.npy")
    embed_domain(anchor, [*many, *more], tmp_path / "ray.npy", ray=cluster.address)
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "ray.npy").read_bytes()


@pytest.mark.parametrize("diversity", [1, 3])
def test_a_cluster_chooses_the_proxies_of_one_process(cluster, tmp_path, anchor, diversity):
    has_workers(cluster, 2)
    parts = {
        name: [write_jsonl(tmp_path / f"{name}-{n}.jsonl", texts) for n, texts in enumerate(parts)]
        for name, parts in private_and_public().items()
    }
    chosen = [
        select_proxies(
            anchor,
            parts["private"],
            parts["public"],
            tmp_path / f"{name}.jsonl",
            share=0.1,
            diversity=diversity,
            ray=ray,
        )
        for name, ray in (("one", None), ("ray", cluster.address))
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0].documents > 20
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "ray.jsonl").read_bytes()


def private_and_public() -> dict[str, list[list[str]]]:
    """Files of documents; some are there several times, on one side or on both, or are blank."""
    own, public = documents("law", 90), documents("public", 200)
    near = documents("law", 120, seed=5)
    return {
        "private": [own[:50], [*own[40:], " ", *near[:9]]],
        "public": [[*public[:110], *near[:70], ""], [*public[90:], *near[60:], *near[:5]]],
    }


def shards_in(folder: Path) -> list[Path]:
    return list(folder.glob(".out.*.tmp/content/shards/*"))


@contextlib.contextmanager
def command(*arguments: object):
    """The command `flexolmo` with a file a shard, in a process of its own."""
    words = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    with subprocess.Popen(words, stdout=-1, stderr=-1, text=True) as process:
        yield process
        process.kill()


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_that_looks_complete(
    cluster, tmp_path, many, some_tokenizer, alone
):
    some_tokenizer.save(tmp_path / "t.json")
    how = ["--tokenizer", tmp_path / "t.json", "--seq-len", SEQ_LEN, "--heldout", 0.2]
    out = tmp_path / "out"
    prepare_it = ["data", "prepare", "--input", *many, *how, "--out", out]
    with command(*prepare_it, "--ray", cluster.address) as process:
        while process.poll() is None and not shards_in(tmp_path):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    with command(*prepare_it, "--ray", cluster.address, "--json") as process:
        told, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert json.loads(told)["duplicates_removed"] > 50
    assert files_of(out) == files_of(alone)


@pytest.mark.slow
def test_a_command_makes_a_cluster_of_its_own_and_says_no_more_than_without(
    tmp_path, many, some_tokenizer, alone
):
    some_tokenizer.save(tmp_path / "t.json")
    bad = write_jsonl(tmp_path / "bad.jsonl", ["one", "two"])
    bad.write_text(bad.read_text() + "{oops\n")
    how = ["--tokenizer", tmp_path / "t.json", "--seq-len", SEQ_LEN, "--heldout", 0.2, "--json"]
    prepare_them = ["data", "prepare", *how, "--out", tmp_path / "out", "--ray"]
    with command(*prepare_them, "--input", bad) as process:
        told, complaint = process.communicate(timeout=120)
    assert (process.returncode, told) == (2, "")
    assert complaint.startswith(f"flexolmo: {bad}, line 3: not JSON")
    assert complaint.count("\n") == 1
    with command(*prepare_them, "--input", *many) as process:
        told, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert told.count("\n") == 1
    assert all(line.startswith("prepare out: ") for line in complaint.splitlines())
    assert files_of(tmp_path / "out") == files_of(alone)


def test_a_worker_tells_a_mistake_in_a_document_in_one_line(cluster, tmp_path, some_tokenizer):
    bad = write_jsonl(tmp_path / "bad.jsonl", ["one", "two"])
    bad.write_text(bad.read_text() + "{oops\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 3: not JSON") as caught:
        prepare([bad], some_tokenizer, SEQ_LEN, tmp_path / "out", ray=cluster.address)
    assert type(caught.value) is UserError
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_path_that_a_worker_does_not_see_is_named(
    cluster, tmp_path, many, some_tokenizer, monkeypatch
):
    monkeypatch.setattr(over_shards, "everywhere", lambda path: f"/elsewhere{path}")
    with pytest.raises(UserError, match=r"the worker .* does not see /elsewhere/.* share"):
        prepare(many, some_tokenizer, SEQ_LEN, tmp_path / "out", ray=cluster.address)
    assert not list(tmp_path.iterdir())


def test_a_worker_with_another_version_is_refused(
    cluster, tmp_path, many, some_tokenizer, monkeypatch
):
    other = runtime_cluster.versions() | {"flexolmo-jax": "0123"}
    monkeypatch.setattr(runtime_cluster, "versions", lambda: other)
    with pytest.raises(UserError, match=r"the worker .* has flexolmo-jax \w+, the command 0123"):
        prepare(many, some_tokenizer, SEQ_LEN, tmp_path / "out", ray=cluster.address)


def test_a_worker_without_the_package_is_refused(
    cluster, tmp_path, many, some_tokenizer, monkeypatch
):
    monkeypatch.setattr(spread, "_HERE", "flexolmo_jax.data.missing")
    with pytest.raises(UserError, match=r"a worker lacks a package .*missing.* on every machine"):
        prepare(many, some_tokenizer, SEQ_LEN, tmp_path / "out", ray=cluster.address)


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("127.0.0.1:{closed}", "no Ray cluster answers at 127.0.0.1:"),
        ("nowhere", "got the Ray cluster 'nowhere', expected host:port or auto"),
        ("127.0.0.1:123456", "no Ray cluster answers at 127.0.0.1:123456"),
    ],
)
def test_a_cluster_that_does_not_answer_is_a_mistake_told_in_one_line(
    tmp_path, many, some_tokenizer, address, complaint
):
    some_tokenizer.save(tmp_path / "t.json")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = address.format(closed=taken.getsockname()[1])
        how = ["--tokenizer", tmp_path / "t.json", "--seq-len", SEQ_LEN, "--ray", address]
        with command(
            "data", "prepare", "--input", many[0], *how, "--out", tmp_path / "out"
        ) as process:
            _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told.startswith(f"flexolmo: {complaint}")
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ray_leaves_no_handler_of_signals_behind(cluster):
    program = f"""
import signal
from flexolmo_jax.runtime.cluster import connected
signals = signal.SIGTERM, signal.SIGINT
before = [signal.getsignal(number) for number in signals]
with connected({cluster.address!r}):
    pass
assert [signal.getsignal(number) for number in signals] == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_ray_the_extra_is_named(tmp_path, many, some_tokenizer, monkeypatch):
    monkeypatch.setattr(runtime_cluster.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'"):
        prepare(many, some_tokenizer, SEQ_LEN, tmp_path / "out", ray="")
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_cluster_listens_to_other_machines(cluster):
    def addresses(process) -> list[str]:
        each = process.net_connections("inet")
        return [one.laddr.ip for one in each if one.status == psutil.CONN_LISTEN]

    found = [ip for process in cluster.processes for ip in addresses(process)]
    assert len(found) > 5
    assert {ip.removeprefix("::ffff:") for ip in found} == {"127.0.0.1"}
