"""Jobs: what is accepted, what is refused and how, and that preflight agrees with what training
would say."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
import yaml

from flexolmo_jax.config import check_microbatch, load_config
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime import sharding
from launch.job import (
    ROOT,
    Job,
    check_devices,
    check_launcher,
    choices,
    load_job,
    main,
    preflight,
    variables,
)

from .plan_for import plan_for

EXAMPLES = sorted((ROOT / "launch/jobs").glob("*.yaml"))


PATHS = load_job(EXAMPLES[1]).set[2:]


def changed(tmp_path, /, **keys):
    """The path of biomed's job with other keys; None takes one out."""
    tree = (
        yaml.safe_load((ROOT / "launch/jobs/biomed.yaml").read_text())
        | {"plans": str(tmp_path / "plans")}
        | keys
    )
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in tree.items() if value is not None})
    )
    return path


def planned(tmp_path, /, fits=True, **keys):
    """The same as a Job that has a plan."""
    job = load_job(changed(tmp_path, **keys))
    (tmp_path / "plans").mkdir(exist_ok=True)
    (tmp_path / "plans/any.json").write_text(json.dumps(plan_for(job, fits)))
    return job


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_job_whose_config_runs_on_its_slice(path):
    job = load_job(path)
    check_devices(load_config(ROOT / job.config, job.set), job.slice.devices, job.where)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_a_plan_that_says_it_fits(path):
    preflight(load_job(path))


def test_the_first_example_names_every_key():
    assert (
        yaml.safe_load((ROOT / "launch/jobs/biomed.yaml").read_text()).keys()
        == Job.__dataclass_fields__.keys()
    )


def test_a_job_tells_the_launchers_what_to_run(tmp_path):
    job = planned(tmp_path)
    preflight(job)
    values = 'printf "%s\\n" "$JOB_OUT" "$JOB_ACCELERATOR" "$JOB_REGION" "$JOB_HOSTS"'
    words = 'eval "set -- $JOB_COMMAND"; printf "%s\\0" "$@"'
    script = f"{variables(job)}; {values}; {words}"
    read = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    told, command = read.stdout.rsplit("\n", 1)
    assert told.split("\n") == ["gs://biomed-4711-flexolmo/biomed-1", "v5p-128", "us-east5", "16"]
    assert command.split("\0")[:-1] == job.command
    train = job.command[job.command.index("flexolmo") :]
    assert train[:3] == ["flexolmo", "train", "configs/7b/pair.yaml"]
    assert train[-2:] == ["--out", job.out]


@pytest.mark.parametrize(
    "value", ["a'; touch owned; '", "$(touch owned)", "`touch owned`", "a\nb", "ünï"]
)
def test_nothing_in_a_job_is_run_by_the_shell(tmp_path, value):
    job = load_job(changed(tmp_path, set=[f"pair.owner={value}"]))
    done = subprocess.run(
        ["bash", "-c",
        f'eval {shlex.quote(variables(job))}; eval "set -- $JOB_COMMAND"; printf %s "$9"'],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == f"pair.owner={value}" and not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"owner": None}, "owner is ''; expected a short name"),
        ({"project": "Biomed"}, "project is 'Biomed'; expected a project's id"),
        ({"zone": "us-east5"}, "zone is 'us-east5'; expected a zone such as"),
        (
            {"bucket": "gs://biomed"},
            "bucket is 'gs://biomed'; expected a bucket's name, without gs://",
        ),
        ({"service_account": "flexolmo"}, "service_account is 'flexolmo'; expected NAME@PROJECT"),
        (
            {"service_account": "flexolmo@code-2718.iam.gserviceaccount.com"},
            "service_account is of project 'code-2718'; expected one of",
        ),
        ({"network": None}, "network is ''; expected the name of a network"),
        ({"image": "flexolmo"}, "image is 'flexolmo'; expected a container image"),
        ({"run": "Biomed 1"}, "run is 'Biomed 1'; expected a name"),
        ({"run": "b" * 41}, "expected a name of at most 40"),
        ({"config": "/etc/pair.yaml"}, "expected a file below configs/"),
        ({"config": "configs/../pair.yaml"}, "expected a file below configs/"),
        ({"capacity": "cheap"}, "capacity is 'cheap'; expected one of spot, on-demand, reserved"),
        ({"slices": 0}, "slices is 0; expected at least 1"),
        ({"restarts": -1}, "restarts is -1; expected at least 0"),
        ({"tpu": "v5p-128"}, "by its number of cores; expected its topology, v5p:4x4x4"),
        ({"tpu": "trillium:16x16"}, "did you mean v6e?"),
        ({"tpu": "v6e:16x17"}, "the nearest is v6e:16x16"),
        ({"buckett": "x"}, "unknown config key 'buckett'; did you mean 'bucket'?"),
        ({"set": "pair.name=a"}, "set is 'pair.name=a'; expected a list"),
    ],
)
def test_a_mistake_in_a_job_is_told_in_one_line_with_its_file(tmp_path, keys, message):
    path = changed(tmp_path, **keys)
    with pytest.raises(UserError) as error:
        load_job(path)
    assert (
        message in str(error.value)
        and "\n" not in str(error.value)
        and str(path) in str(error.value)
    )


def test_a_file_that_is_no_job_is_refused(tmp_path):
    for text, message in (
        ("", "owner is ''"),
        ("- a", "expected sections"),
        ("a: [", "not valid YAML"),
        ("owner: a\nowner: b", "a key is given twice"),
    ):
        (tmp_path / "job.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_job(tmp_path / "job.yaml")
    with pytest.raises(UserError, match="not a regular file; expected a YAML file"):
        load_job(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.fsdp=32"], "does not fill the 64 devices of v5p:4x4x4"),
        (["mesh.tensor=3"], "does not divide 64 devices"),
        (
            ["data.batch_size=96"],
            "a microbatch of 24 records .* does not divide over the 64 devices",
        ),
        (["train.accumulate=3"], "train.accumulate is 3; expected a divisor"),
        (["mesh.fspd=1"], "unknown config key 'mesh.fspd'; did you mean 'mesh.fsdp'"),
    ],
)
def test_a_run_that_does_not_suit_its_slice_is_refused(tmp_path, overrides, message):
    path = changed(tmp_path, set=["pair.name=biomed", *overrides])
    with pytest.raises(UserError, match=message):
        preflight(load_job(path))


@pytest.mark.parametrize(
    ("config", "overrides", "told"),
    [
        ("pair", ["pair.anchor=anchor"], "pair.anchor is 'anchor'; expected gs://biomed-4711-flex"),
        ("pair", ["pair.anchor=/mnt/gs/anchor"], "pair.anchor is '/mnt/gs/anchor'"),
        ("pair", ["pair.anchor=gs:/b/anchor"], "pair.anchor is 'gs:/b/anchor'"),
        ("pair", ["pair.public=public"], "pair.public is 'public'"),
        ("pair", ["data.train=[{path: data/private}]"], "data.train[0].path is 'data/private'"),
        (
            "pair",
            ["data.eval=[{path: gs://b/a}, {path: b}]", "data.tokenizer=c"],
            "data.eval[1].path is 'b' and data.tokenizer is 'c'; expected",
        ),
        (
            "anchor",
            ["data.train=[{path: gs://b/a}]", "train.init=runs/a"],
            "train.init is 'runs/a'",
        ),
        ("router", ["data.train=[{path: gs://b/a}]"], "router.model is 'model'"),
    ],
)
def test_what_no_worker_can_read_is_refused(tmp_path, config, overrides, told):
    own = list(load_job(EXAMPLES[1]).set) if config == "pair" else []
    keys = {"set": [*own, *overrides], "config": f"configs/7b/{config}.yaml"}
    assert told in refusal(load_job(changed(tmp_path, **keys)))


def test_a_job_whose_set_lacks_the_anchor_is_refused(tmp_path):
    given = [each for each in load_job(EXAMPLES[1]).set if "anchor" not in each]
    assert "pair.anchor is 'anchor'" in refusal(load_job(changed(tmp_path, set=given)))


def test_the_data_axis_runs_over_the_slices(tmp_path):
    with pytest.raises(
        UserError, match=r"mesh.data is 1; expected a multiple of 2, the number of slices"
    ):
        preflight(planned(tmp_path, slices=2))
    for mesh in (["mesh.data=2"], ["mesh.data=-1", "mesh.fsdp=64"]):
        preflight(planned(tmp_path, slices=2, set=[*PATHS, *mesh]))


def test_a_plan_counts_only_for_its_own_program_and_slices(tmp_path):
    planned(tmp_path)
    # what changes no program
    preflight(load_job(changed(tmp_path, set=[*PATHS, "optim.lr=1e-3", "pair.name=other"])))
    for keys in (
        {"tpu": "v5p:2x4x4"},
        {"set": [*PATHS, "train.remat=dots"]},
        {"set": [*PATHS, "mesh.tensor=2"]},
        {"slices": 2, "set": [*PATHS, "mesh.data=2"]},
    ):
        with pytest.raises(UserError, match="no plan in"):
            preflight(load_job(changed(tmp_path, **keys)))


def remedy(told):
    """What the command that makes a plan is given, as flexolmo reads it."""
    from flexolmo_jax.cli.command import PARSER

    command = shlex.split(told.partition("make one: ")[2])
    assert command[:2] == ["flexolmo", "plan"]
    return PARSER.parse_args(command[1:])


def refusal(job):
    with pytest.raises(UserError) as error:
        preflight(job)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_command_that_makes_a_plan_has_what_the_program_depends_on_and_reads_no_bucket(
    tmp_path,
):
    given = yaml.safe_load((ROOT / "launch/jobs/biomed.yaml").read_text())["set"]
    own = ["mesh.data=2", "train.remat=dots", "data.tokenizer=gs://biomed-4711-flexolmo/anchor"]
    told = refusal(load_job(changed(tmp_path, slices=2, set=[*given, *own])))
    args = remedy(told)
    assert (args.topology, args.slices, args.set) == ("v5p:4x4x4", 2, own[:2])
    assert args.out == tmp_path / "plans/7b-pair-v5p-4x4x4-2.json" and "gs://" not in told


def test_the_command_that_makes_a_plan_makes_the_one_that_is_looked_for(tmp_path):
    job = load_job(changed(tmp_path, set=[*load_job(EXAMPLES[1]).set, "model.d_ffn=64"]))
    args = remedy(refusal(job))
    args.out.parent.mkdir()
    args.out.write_text(json.dumps(plan_for(replace(job, set=tuple(args.set)))))
    preflight(job)
    # The file of another program's plan stays.
    assert remedy(refusal(replace(job, set=PATHS))).out == args.out.with_stem(f"{args.out.stem}_2")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"topology": "v5p:4x4x4"}', "\udcff"])
def test_a_broken_file_among_the_plans_stops_no_job_that_has_one(tmp_path, text):
    job = planned(tmp_path)
    broken = tmp_path / "plans/7b-pair-v5p-4x4x4.json"
    broken.write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "plans/folder.json").mkdir()
    preflight(job)
    (tmp_path / "plans/any.json").unlink()
    told = refusal(job)
    assert "(these are no plans, remove them: 7b-pair-v5p-4x4x4.json, folder.json)" in told
    assert remedy(told).out == broken


def test_a_config_that_does_not_fit_is_refused_with_what_to_change(tmp_path):
    with pytest.raises(
        UserError, match=r"needs 112.0 GiB and has 95.0 GiB; change it: --set train.remat=full"
    ):
        preflight(planned(tmp_path, fits=False))


def test_preflight_says_yes_where_training_does():
    devices = jax.devices()
    agreed = set()
    for data, fsdp, tensor, expert, batch in (
        (1, -1, 1, 1, 8), (2, -1, 2, 1, 8), (1, 8, 1, 1, 8), (2, 2, 2, 1, 4), (1, 2, 2, 2, 4), (1,
        2, 2, 2, 2), (3, -1, 1, 1, 8),
        (1, 16, 1, 1, 16), (1, -1, 1, 1, 4), (-1, 1, 1, 8, 8), (1, 1, 8, 1, 1), (1, 1, 16, 1, 1),
    ):  # fmt: skip
        mesh = [
            f"mesh.data={data}",
            f"mesh.fsdp={fsdp}",
            f"mesh.tensor={tensor}",
            f"mesh.expert={expert}",
        ]
        config = load_config(
            ROOT / "configs/tiny/anchor.yaml",
            [*mesh, f"data.batch_size={batch}", "train.accumulate=1"],
        )
        answers = [
            said_yes(check_devices, config, len(devices), "here"),
            said_yes(
                lambda c: check_microbatch(c, sharding.make_mesh(c.mesh, devices).shape), config
            ),
        ]
        assert answers[0] == answers[1], (mesh, batch)
        agreed.add(answers[0])
    assert agreed == {True, False}


def said_yes(check, *arguments):
    try:
        check(*arguments)
    except UserError:
        return False
    return True


def test_axes_that_use_too_few_devices_are_refused():
    config = load_config(ROOT / "configs/tiny/anchor.yaml", ["mesh.fsdp=2"])
    with pytest.raises(UserError, match="does not fill the 8 devices of here"):
        check_devices(config, 8, "here")


def test_preflight_on_gpus_needs_no_job(capsys):
    assert (
        main(["--devices", "16", str(ROOT / "configs/7b/pair.yaml"), "--set", "mesh.tensor=2"]) == 0
    )
    assert main(["--devices", "48", str(ROOT / "configs/7b/pair.yaml")]) == 2
    assert "does not divide over the 48 devices" in capsys.readouterr().err


def test_it_imports_no_jax(tmp_path):
    planned(tmp_path)
    code = (
        f"import sys; from launch.job import main; print(main([{str(tmp_path / 'job.yaml')!r}]),"
        " {'jax', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 set()"


@pytest.mark.parametrize(
    ("launcher", "keys", "told"),
    [
        ("tpu_vm", {"slices": 2}, "slices is 2; expected 1 on TPU VMs"),
        ("tpu_vm", {"tpu": "tpu7x:2x2x1"}, "tpu is tpu7x:2x2x1, which is to be had through GKE"),
        ("gke_xpk", {"fallbacks": ["v5p:4x4x12"]}, "fallbacks has 1; expected none on GKE"),
        ("gke_xpk", {"cluster": ""}, "cluster is ''"),
        ("gke_xpk", {"capacity": "reserved"}, "reservation is ''"),
        ("skypilot", {"fallbacks": ["v5p:4x4x12"]}, "fallbacks has 1; expected none with SkyPilot"),
        ("skypilot", {"slices": 2}, "slices is 2; expected 1 with SkyPilot"),
        ("skypilot", {"tpu": "v5e:16x16"}, "tpu is v5e:16x16; expected v5p or v6e"),
        ("skypilot", {"capacity": "reserved"}, "capacity is reserved"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused_before_the_rest_is_checked(
    tmp_path, capsys, launcher, keys, told
):
    """Neither fallbacks nor anything else of these jobs would pass."""
    path = str(changed(tmp_path, set=["pair.name=a", "mesh.fsdp=3"], **keys))
    assert main([path, "--launcher", launcher]) == 2
    assert f"launch: {told}" in capsys.readouterr().err
    assert main([path]) == 2 and told not in capsys.readouterr().err


def test_the_first_example_is_for_every_launcher_and_the_anchor_s_for_one():
    can = {
        path.stem: [
            launcher
            for launcher in ("tpu_vm", "gke_xpk", "skypilot")
            if said_yes(check_launcher, load_job(path), launcher)
        ]
        for path in EXAMPLES
    }
    assert can["biomed"] == ["tpu_vm", "gke_xpk", "skypilot"] and can["anchor"] == ["tpu_vm"]


def test_a_fallback_has_the_same_batch_in_other_microbatches(tmp_path):
    job = planned(tmp_path, fallbacks=["v5p:2x4x4", "v5p:4x4x8"])
    runs = [load_config(ROOT / choice.config, choice.set) for choice in choices(job)]
    assert [choice.slice.devices for choice in choices(job)] == [64, 32, 128]
    assert [run.train.accumulate for run in runs] == [4, 8, 2]
    assert len({run.data.batch_size for run in runs}) == 1
    assert choices(job)[0] == job and load_job(EXAMPLES[1]).fallbacks == ()


def test_every_fallback_is_checked_against_a_plan_of_its_own(tmp_path, capsys):
    path = changed(tmp_path, fallbacks=["v5p:2x4x4"])
    plans = tmp_path / "plans"
    plans.mkdir()
    first, second = choices(load_job(path))
    (plans / "first.json").write_text(json.dumps(plan_for(first)))
    assert main([str(path)]) == 2
    told = capsys.readouterr().err
    assert "fits v5p:2x4x4" in told and "--set train.accumulate=8 --topology v5p:2x4x4" in told
    (plans / "second.json").write_text(json.dumps(plan_for(second, fits=False)))
    assert main([str(path)]) == 2 and "does not fit v5p:2x4x4" in capsys.readouterr().err
    (plans / "second.json").write_text(json.dumps(plan_for(second)))
    assert main([str(path), "--choice", "1"]) == 0
    told = capsys.readouterr().out
    assert "JOB_ACCELERATOR=v5p-64\n" in told and told.endswith("JOB_CHOICE=1\nJOB_CHOICES=2\n")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fallbacks": ["v5p:4x4x4"]}, "v5p-128, v5p-128 by gcloud's names; expected each once"),
        ({"fallbacks": ["v5p:4x4x5"]}, "the nearest is v5p:4x4x4"),
        ({"patience": 0}, "patience is 0; expected at least 1"),
        ({"fallbacks": ["v5p:4x4x12"]}, "192 devices; expected a divisor of v5p:4x4x4's 64 x"),
        (
            {"fallbacks": ["v5p:2x4x4"], "config": "configs/7b/joint.yaml", "set": []},
            "needs train.accumulate 8 instead of 4, with which optim.load_balance is another loss",
        ),
    ],
)
def test_a_fallback_that_would_not_be_the_same_run_is_refused(tmp_path, keys, message):
    with pytest.raises(UserError) as error:
        choices(load_job(changed(tmp_path, **keys)))
    assert message in str(error.value) and "\n" not in str(error.value)
