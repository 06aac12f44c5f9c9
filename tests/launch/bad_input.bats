#!/usr/bin/env bats
# What every launcher refuses in one line, before it calls anything: mistakes in the job, and what is missing around it.
# shellcheck disable=SC2154,SC2030,SC2031 # bats sets status, output and stderr, in a subshell for each test

setup_file() { load helpers && common_setup_file; }

setup() {
  load helpers
  common_setup
}

teardown() { [[ ! -s $FAKE/calls ]]; }

@test "an unknown TPU type, with the nearest" {
  job biomed 'tpu: v5litepod:4x4'
  launch launch/tpu_vm.sh "$JOB"
  refused 2 "unknown TPU type 'v5litepod'"
  [[ $stderr == *'did you mean v5e?'* ]]
}

@test "a slice that there is none of, with the nearest" {
  job biomed 'tpu: v5p:4x4x5'
  launch launch/gke_xpk.sh "$JOB"
  refused 2 'there is no slice v5p:4x4x5; the nearest is v5p:4x4x4'
}

@test "a mesh that is not the slice's" {
  set_also mesh.fsdp=32
  launch launch/tpu_vm.sh "$JOB"
  refused 2 'mesh data 1 x fsdp 32 x tensor 1 x expert 1 does not fill the 64 devices of v5p:4x4x4'
}

@test "a batch that does not divide" {
  set_also data.batch_size=96
  launch launch/tpu_vm.sh "$JOB"
  refused 2 'a microbatch of 24 records (data.batch_size 96 / train.accumulate 4) does not divide over the 64 devices'
}

@test "a config that no plan is stored for, with the command that makes one" {
  set_also train.remat=dots
  launch launch/skypilot.sh "$JOB"
  refused 2 'make one: flexolmo plan configs/7b/pair.yaml --set train.remat=dots '
  [[ $stderr == *"--topology v5p:4x4x4 --out "*/7b-pair-v5p-4x4x4.json && $stderr != *gs://* ]]
}

@test "a config that does not fit, with sizes and what to change" {
  plan_too --too-big
  launch launch/tpu_vm.sh "$JOB"
  refused 2 'configs/7b/pair.yaml does not fit v5p:4x4x4: a device needs 112.0 GiB and has 95.0 GiB; change it: --set train.remat=full'
}

@test "no job, two jobs, a job that is not there, an option that there is not" {
  launch launch/tpu_vm.sh
  refused 2 'got no job; expected launch/tpu_vm.sh launch/jobs/biomed.yaml'
  launch launch/tpu_vm.sh "$JOB" other.yaml
  refused 2 'other.yaml; expected one job'
  launch launch/tpu_vm.sh nowhere.yaml
  refused 2 'no job at nowhere.yaml'
  launch launch/tpu_vm.sh "$JOB" --dryrun
  refused 2 'unknown option --dryrun'
}

@test "--help says what a launcher does, and needs no job" {
  local launcher
  for launcher in tpu_vm gke_xpk skypilot; do
    launch "launch/$launcher.sh" --help
    [[ $status == 0 && -z $stderr && $output == 'One job on '*"launch/$launcher.sh launch/jobs/biomed.yaml [--dry-run]"* ]]
    [[ $output != *'#'* && $output != *pipefail* ]]
  done
}

@test "a command that is not installed" {
  local tool launcher missing
  mkdir "$FAKE/only"
  for tool in bash env dirname basename mktemp rm; do ln -s "$(command -v "$tool")" "$FAKE/only"; done
  PYTHON=$(command -v "$PYTHON")
  while read -r launcher missing; do
    rm "$FAKE/bin/$missing"
    PATH=$FAKE/bin:$FAKE/only launch "launch/$launcher" "$JOB"
    refused 2 "there is no $missing on PATH"
  done <<'EOF'
skypilot.sh sky
gke_xpk.sh xpk
gke_xpk.sh kubectl
tpu_vm.sh gcloud
EOF
}

@test "a Python that has not what is needed" {
  "$PYTHON" -m venv --without-pip "$FAKE/bare"
  PYTHON=$FAKE/bare/bin/python launch launch/tpu_vm.sh "$JOB"
  refused 2 'has no PyYAML; pip install -e . first'
}
