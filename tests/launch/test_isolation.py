"""launch/check_isolation: what two owners may not share, told in a line for each thing."""

import itertools
import subprocess
import sys

import pytest
import yaml

from launch.job import ROOT

JOBS = ROOT / "launch/jobs"
KUBERAY = ROOT / "launch/ray/kuberay.yaml"


def check(*paths):
    return subprocess.run(
        [sys.executable, ROOT / "launch/check_isolation", *paths], capture_output=True, text=True
    )


def written(path, name, **keys):
    path.write_text(yaml.safe_dump(yaml.safe_load((JOBS / f"{name}.yaml").read_text()) | keys))
    return path


def test_the_examples_share_nothing():
    done = check(*sorted(JOBS.glob("*.yaml")))
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == "4 owners (biomed, code, coordinator, legal) share no project, bucket, service"
        " account, network or compile cache\n"
    )


@pytest.mark.parametrize("key", ["project", "bucket", "service_account", "network"])
def test_two_owners_that_share_one_thing_are_refused(tmp_path, key):
    theirs = yaml.safe_load((JOBS / "biomed.yaml").read_text())
    keys = {key: theirs[key]}
    # an account is of the job's own project, so that these two go together
    if key in ("project", "service_account"):
        keys = {k: theirs[k] for k in ("project", "service_account")}
    done = check(JOBS / "biomed.yaml", written(tmp_path / "job.yaml", "code", **keys))
    assert done.returncode == 2 and not done.stdout
    words = {
        k: (
            f"check_isolation: owners biomed and code share the {k.replace('_', ' ')}"
            f" {theirs[k]!r}; give each its own"
        )
        for k in keys
    }
    assert words[key] in done.stderr.splitlines() and len(done.stderr.splitlines()) >= len(keys)


def test_every_pair_of_owners_is_compared(tmp_path):
    paths = [
        written(tmp_path / f"{name}.yaml", name, network="default")
        for name in ("biomed", "code", "legal")
    ]
    lines = check(*paths).stderr.splitlines()
    assert [line.split(" share ")[0] for line in lines] == [
        f"check_isolation: owners {one} and {other}"
        for one, other in itertools.combinations(("biomed", "code", "legal"), 2)
    ]


def test_an_owner_who_reads_anothers_bucket_is_refused(tmp_path):
    job = written(
        tmp_path / "job.yaml", "code", set=["pair.anchor=gs://coordinator-1618-flexolmo/anchor"]
    )
    done = check(JOBS / "anchor.yaml", job)
    assert done.returncode == 2
    assert (
        done.stderr
        == "check_isolation: code reads gs://coordinator-1618-flexolmo, the bucket of coordinator;"
        " copy what it needs to gs://code-2718-flexolmo\n"
    )


def test_jobs_of_one_owner_may_share(tmp_path):
    second = written(tmp_path / "second.yaml", "biomed", run="biomed-2")
    done = check(JOBS / "biomed.yaml", second, JOBS / "code.yaml")
    assert done.returncode == 0 and done.stdout.startswith("2 owners (biomed, code)")


def test_what_proves_nothing_is_refused(tmp_path):
    done = check(JOBS / "biomed.yaml")
    assert (
        done.returncode == 2
        and "got jobs of owner biomed alone, who may share everything; expected the files of two"
        in done.stderr
    )
    done = check(JOBS / "biomed.yaml", tmp_path / "none.yaml")
    assert (
        done.returncode == 2
        and done.stderr.startswith("check_isolation: no job at")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("configs/7b/pair.yaml", "a run's config"),
        ("launch/plans/pair-v5p-2x2x1.json", "a plan"),
        ("launch/skypilot.yaml", "a SkyPilot task"),
    ],
)
def test_a_file_that_is_no_job_is_named(file, kind):
    done = check(ROOT / file, JOBS / "code.yaml")
    told = f"check_isolation: {ROOT / file}: it seems to be {kind}; expected a launcher's job\n"
    assert (done.returncode, done.stderr) == (2, told)


def ray_job(path, *changes):
    """The RayJob of another owner, then with these texts replaced."""
    text = KUBERAY.read_text().replace("biomed", "code")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_ray_jobs_of_owners_who_share_a_cluster_share_nothing_else(tmp_path):
    done = check(KUBERAY, ray_job(tmp_path / "code.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 owners (biomed, code) share no namespace, bucket or service account\n"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            [("namespace: code", "namespace: biomed")],
            "owners biomed and code share the namespace 'biomed'",
        ),
        (
            [("gs://code-4711-flexolmo/data", "gs://biomed-4711-flexolmo/data")],
            "owners biomed and code share the bucket 'biomed-4711-flexolmo'",
        ),
        (
            [("gs://code-4711-flexolmo/documents", "gs://biomed-4711-flexolmo/documents")],
            "code reads gs://biomed-4711-flexolmo, the bucket of biomed",
        ),
    ],
)
def test_ray_jobs_that_share_one_thing_are_refused(tmp_path, changes, complaint):
    done = check(KUBERAY, ray_job(tmp_path / "code.yaml", *changes))
    assert done.returncode == 2 and not done.stdout
    assert f"check_isolation: {complaint}" in done.stderr


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ([("mode: token", "mode: disabled")], "lets pods of other namespaces reach Ray"),
        ([("kind: NetworkPolicy", "kind: Other")], "lets pods of other namespaces reach Ray"),
        ([("      ports:\n        - port: 8265\n", "")], "lets pods of other namespaces reach Ray"),
        ([("policyTypes: [Ingress]", "policyTypes: [Egress]")], "lets pods of other namespaces"),
        ([("--out ", "--put ")], "its command has no --out gs://"),
        ([("kind: RayJob", "kind: RayCluster")], "is no RayJob as in launch/ray/kuberay.yaml"),
        ([("flexolmo/owner", "owner")], "is no RayJob as in launch/ray/kuberay.yaml"),
    ],
)
def test_a_ray_job_that_is_open_or_is_none_is_refused(tmp_path, changes, complaint):
    done = check(KUBERAY, ray_job(tmp_path / "code.yaml", *changes))
    assert done.returncode == 2 and not done.stdout
    assert complaint in done.stderr and done.stderr.count("\n") == 1


POLICY = """---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: another, namespace: code}
spec: {podSelector: {}, policyTypes: [Ingress]INGRESS}
"""


@pytest.mark.parametrize(("ingress", "status"), [("", 0), (", ingress: [{}]", 2)])
def test_policies_of_a_namespace_add_up(tmp_path, ingress, status):
    path = ray_job(tmp_path / "code.yaml")
    path.write_text(path.read_text() + POLICY.replace("INGRESS", ingress))
    done = check(KUBERAY, path)
    assert done.returncode == status
    assert ("lets pods of other namespaces reach Ray" in done.stderr) == bool(ingress)


def test_pods_of_a_ray_job_that_act_as_two_accounts_are_refused(tmp_path):
    path = ray_job(tmp_path / "code.yaml")
    head, worker = path.read_text().split("workerGroupSpecs")
    path.write_text(f"{head}workerGroupSpecs{worker.replace(': flexolmo', ': default')}")
    done = check(KUBERAY, path)
    assert done.returncode == 2
    assert "pods that act as" in done.stderr
